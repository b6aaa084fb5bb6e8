//! Profile against facts. Pure, but for the reading of the facts.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use pinion_topology::{CpuSet, Topology};
use serde::Serialize;

use super::{Declared, Kind};

/// What the node is.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) command_line: String,
    pub(crate) topology: Topology,
    /// `default_smp_affinity`; `None` where it cannot be read.
    pub(crate) irq_default: Option<CpuSet>,
    /// Drivers of PCI functions by address.
    pub(crate) drivers: BTreeMap<String, Option<String>>,
    /// Where this server may run.
    pub(crate) own_cpus: CpuSet,
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Drift {
    pub(crate) kind: Kind,
    /// The thing, such as `node 1, 1GB pages`.
    pub(crate) what: String,
    /// As declared.
    pub(crate) wanted: String,
    /// As it is.
    pub(crate) found: String,
    /// Why it could not be put right.
    pub(crate) repair_failed: Option<String>,
}

impl Drift {
    #[expect(clippy::needless_pass_by_value, reason = "anything that can be printed")]
    pub(crate) fn new(
        kind: Kind,
        what: impl Into<String>,
        wanted: impl ToString,
        found: impl ToString,
    ) -> Self {
        let (wanted, found) = (wanted.to_string(), found.to_string());
        Self { kind, what: what.into(), wanted, found, repair_failed: None }
    }
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} declared, {} found", self.what, self.wanted, self.found)
    }
}

impl Facts {
    /// Reads the machine.
    pub(crate) fn read() -> std::io::Result<Self> {
        let text = |path: &str| std::fs::read_to_string(path);
        let mask = text("/proc/irq/default_smp_affinity").ok();
        let status = text("/proc/self/status")?;
        let own = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let functions = pinion_device::functions(Path::new("/")).map_err(std::io::Error::other)?;
        Ok(Self {
            command_line: text("/proc/cmdline")?,
            topology: Topology::read().map_err(std::io::Error::other)?,
            irq_default: mask.and_then(|mask| CpuSet::from_mask(mask.trim()).ok()),
            drivers: functions.into_iter().map(|f| (f.address.to_string(), f.driver)).collect(),
            own_cpus: own.and_then(|list| list.trim().parse().ok()).unwrap_or_default(),
        })
    }
}

/// Every difference, in the order of the profile.
pub(crate) fn check(declared: &Declared, facts: &Facts) -> Vec<Drift> {
    let mut drift = Vec::new();
    let words: Vec<&str> = facts.command_line.split_whitespace().collect();
    for wanted in &declared.kernel_command_line {
        if !words.contains(&wanted.as_str()) {
            let key = wanted.split('=').next().unwrap_or(wanted);
            let same = words.iter().find(|word| word.split('=').next() == Some(key));
            let found = same.map_or("nothing", |word| *word);
            drift.push(Drift::new(Kind::KernelCommandLine, "kernel command line", wanted, found));
        }
    }
    drift.extend(reserved(declared, facts));
    let irqs: CpuSet = declared.irq_default.parse().unwrap_or_default();
    if !irqs.is_empty() {
        let what = "CPUs of new interrupts";
        match &facts.irq_default {
            None => drift.push(Drift::new(Kind::IrqDefault, what, &irqs, "unreadable")),
            Some(found) if !found.is_subset(&irqs) => {
                drift.push(Drift::new(Kind::IrqDefault, what, &irqs, found));
            }
            Some(_) => {}
        }
    }
    for pool in &declared.hugepages {
        let size = pool.size.parse().ok();
        let found = size.and_then(|size| facts.topology.pool(pool.node, size));
        let pages = found.map(|found| found.total);
        if pages != Some(pool.pages) {
            let what = format!("node {}, {} pages", pool.node, pool.size);
            let found = pages.map_or("no such pool".to_owned(), |pages| pages.to_string());
            drift.push(Drift::new(Kind::Hugepages, what, pool.pages, found));
        }
    }
    for address in &declared.vfio {
        let found = match facts.drivers.get(address) {
            None => "no such function".to_owned(),
            Some(None) => "no driver".to_owned(),
            Some(Some(driver)) if driver == "vfio-pci" => continue,
            Some(Some(driver)) => driver.clone(),
        };
        drift.push(Drift::new(Kind::Vfio, address, "vfio-pci", found));
    }
    drift
}

/// The reserved CPUs are there, not isolated from the scheduler, and where this server runs.
fn reserved(declared: &Declared, facts: &Facts) -> Vec<Drift> {
    let wanted: CpuSet = declared.reserved_cpus.parse().unwrap_or_default();
    let mut drift = Vec::new();
    if wanted.is_empty() {
        return drift;
    }
    let mut add = |what: &str, found: String| {
        drift.push(Drift::new(Kind::ReservedCpus, what, &wanted, found));
    };
    let missing = wanted.difference(&facts.topology.online);
    if !missing.is_empty() {
        add("reserved CPUs online", format!("{missing} are not"));
    }
    let isolated = wanted.intersection(&facts.topology.isolated);
    if !isolated.is_empty() {
        add("reserved CPUs with load balancing", format!("{isolated} are in isolcpus"));
    }
    if !facts.own_cpus.is_subset(&wanted) {
        add("CPUs of piniond", facts.own_cpus.to_string());
    }
    drift
}

#[cfg(test)]
mod tests {
    use super::super::Pool;
    use super::*;

    fn facts() -> Facts {
        let mut topology = Topology::read().unwrap();
        topology.isolated = CpuSet::new();
        Facts {
            command_line: "quiet isolcpus=2-3 intel_iommu=on".into(),
            own_cpus: topology.online.clone(),
            irq_default: Some("0-3".parse().unwrap()),
            drivers: BTreeMap::from([
                ("0000:41:10.0".into(), Some("vfio-pci".into())),
                ("0000:41:10.2".into(), Some("igbvf".into())),
            ]),
            topology,
        }
    }

    #[test]
    fn what_is_as_declared_is_no_drift() {
        let declared = Declared {
            kernel_command_line: vec!["intel_iommu=on".into()],
            irq_default: "0-7".into(),
            vfio: vec!["0000:41:10.0".into()],
            ..Default::default()
        };
        assert_eq!(check(&declared, &facts()), []);
        assert_eq!(check(&Declared::default(), &facts()), []);
    }

    #[test]
    fn every_difference_says_what_was_wanted_and_what_is() {
        let declared = Declared {
            kernel_command_line: vec!["isolcpus=4-7".into(), "nohz_full=4-7".into()],
            reserved_cpus: "4000".into(),
            irq_default: "0-1".into(),
            hugepages: vec![Pool { node: 77, size: "1GB".into(), pages: 2 }],
            vfio: vec!["0000:41:10.2".into(), "0000:ff:00.0".into()],
            repair: Vec::new(),
        };
        let text: Vec<String> =
            check(&declared, &facts()).iter().map(ToString::to_string).collect();
        for line in [
            "kernel command line: isolcpus=4-7 declared, isolcpus=2-3 found",
            "kernel command line: nohz_full=4-7 declared, nothing found",
            "reserved CPUs online: 4000 declared, 4000 are not found",
            "CPUs of new interrupts: 0-1 declared, 0-3 found",
            "node 77, 1GB pages: 2 declared, no such pool found",
            "0000:41:10.2: vfio-pci declared, igbvf found",
            "0000:ff:00.0: vfio-pci declared, no such function found",
        ] {
            assert!(text.iter().any(|have| have == line), "{line} is not in {text:#?}");
        }
    }
}
