//! The node profile: what a person declares this node to be, compared with what it is.
//!
//! ```text
//!  node.toml ─▶ Declared ─┐
//!                         ├─ check (pure) ─▶ Drift… ─▶ log, Status.info, `pinctl node check`
//!  kernel ────▶ Facts ────┘                    │
//!                                              └─ where `repair` says so: write, look again
//! ```
//!
//! A profile that cannot be read is drift too, and never keeps the server from starting.

mod check;
mod features;
mod repair;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pinion_topology::CpuSet;
use serde::{Deserialize, Serialize};

pub(crate) use check::{Drift, Facts, check};

use crate::error::{Context, Result};
use crate::node::Node;
use crate::services::blocking;

/// How often the node is compared with its profile.
const INTERVAL: Duration = Duration::from_secs(2);

/// The file: `/etc/pinion/node.toml`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Declared {
    /// Words that the kernel's command line must have, such as `intel_iommu=on`.
    pub(crate) kernel_command_line: Vec<String>,
    /// CPUs kept for the system; Pinion gives none of them away.
    pub(crate) reserved_cpus: String,
    /// The only CPUs to which new interrupts may go (`default_smp_affinity`).
    pub(crate) irq_default: String,
    /// Pools of huge pages.
    pub(crate) hugepages: Vec<Pool>,
    /// PCI functions that are to be on `vfio-pci`, by address.
    pub(crate) vfio: Vec<String>,
    /// What is put right rather than reported only.
    pub(crate) repair: Vec<Kind>,
}

/// A pool of huge pages of one node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pool {
    /// NUMA node.
    pub(crate) node: u32,
    /// Page size, `2MB` or `1GB`.
    pub(crate) size: String,
    /// Pages.
    pub(crate) pages: u64,
}

/// What can drift.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// The file itself.
    Profile,
    /// The kernel's command line.
    KernelCommandLine,
    /// CPUs kept for the system.
    ReservedCpus,
    /// Where new interrupts go.
    IrqDefault,
    /// Pools of huge pages.
    Hugepages,
    /// Drivers of PCI functions.
    Vfio,
}

/// The profile and what was last found.
#[derive(Debug, Default)]
pub(crate) struct Profile {
    path: PathBuf,
    declared: Declared,
    /// Why the file could not be read.
    broken: Option<String>,
    drift: Mutex<Vec<Drift>>,
}

impl Profile {
    /// Reads the file; none is an empty profile.
    pub(crate) fn load(path: PathBuf) -> Self {
        let mut profile = Self { path, ..Self::default() };
        let parsed = match std::fs::read_to_string(&profile.path) {
            Ok(text) => parse(&text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Declared::default()),
            Err(error) => Err(error.to_string()),
        };
        match parsed {
            Ok(declared) => profile.declared = declared,
            Err(error) => profile.broken = Some(error),
        }
        profile
    }

    /// CPUs kept for the system.
    pub(crate) fn reserved(&self) -> CpuSet {
        self.declared.reserved_cpus.parse().unwrap_or_default() // checked by parse
    }

    /// For `info`.
    pub(crate) fn json(&self) -> serde_json::Value {
        let drift = self.drift.lock().unwrap_or_else(PoisonError::into_inner);
        serde_json::json!({ "path": self.path, "present": self.path.exists(), "drift": *drift })
    }

    /// Looks, repairs what may be repaired, and looks again. Blocks.
    pub(crate) fn look(&self) -> Result<Vec<Drift>> {
        let mut drift = self.compare()?;
        let mut failed = Vec::new();
        for found in drift.iter().filter(|drift| self.declared.repair.contains(&drift.kind)) {
            match repair::repair(found) {
                Ok(()) => tracing::warn!(%found, "the node had drifted and was put right"),
                Err(error) => failed.push((found.clone(), error.to_string())),
            }
        }
        if drift.iter().any(|drift| self.declared.repair.contains(&drift.kind)) {
            drift = self.compare()?;
        }
        for (found, error) in failed {
            if let Some(same) =
                drift.iter_mut().find(|d| d.kind == found.kind && d.what == found.what)
            {
                same.repair_failed = Some(error);
            }
        }
        Ok(drift)
    }

    fn compare(&self) -> Result<Vec<Drift>> {
        if let Some(broken) = &self.broken {
            let what = self.path.display().to_string();
            return Ok(vec![Drift::new(Kind::Profile, what, "a readable profile", broken)]);
        }
        let facts = Facts::read().context(|| "compare the node with its profile".to_string())?;
        Ok(check(&self.declared, &facts))
    }

    /// Keeps what was found; says what is new or gone.
    fn keep(&self, now: Vec<Drift>) {
        let mut before = self.drift.lock().unwrap_or_else(PoisonError::into_inner);
        for drift in now.iter().filter(|drift| !before.contains(drift)) {
            tracing::warn!(%drift, "the node is not what its profile says");
        }
        for drift in before.iter().filter(|drift| !now.contains(drift)) {
            tracing::info!(%drift, "no longer so");
        }
        *before = now;
    }
}

fn parse(text: &str) -> Result<Declared, String> {
    let declared: Declared = toml::from_str(text).map_err(|error| error.to_string())?;
    for (key, list) in
        [("reserved_cpus", &declared.reserved_cpus), ("irq_default", &declared.irq_default)]
    {
        list.parse::<CpuSet>().map_err(|error| format!("{key} {list:?}: {error}"))?;
    }
    for pool in &declared.hugepages {
        let size = pool.size.parse::<pinion_topology::PageSize>();
        size.map_err(|error| format!("hugepages.size {:?}: {error}", pool.size))?;
    }
    for address in &declared.vfio {
        let parsed = address.parse::<pinion_device::Address>();
        parsed.map_err(|error| format!("vfio: {error}"))?;
    }
    Ok(declared)
}

/// Looks once and keeps what was found.
pub(crate) async fn refresh(node: &Arc<Node>) -> Result<()> {
    let looker = node.clone();
    blocking(move || {
        let drift = looker.profile.look()?;
        looker.profile.keep(drift);
        features::publish(&looker)
    })
    .await
}

/// Compares for ever.
pub(crate) async fn watch(node: Arc<Node>) {
    let mut said = String::new();
    loop {
        if let Err(error) = refresh(&node).await {
            let text = error.chain();
            if text != said {
                tracing::warn!(error = text, "the node profile was not compared");
                said = text;
            }
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_with_everything_is_read_and_odd_values_are_named() {
        let good = "kernel_command_line = ['intel_iommu=on']\nreserved_cpus = '0-1'\n\
                    irq_default = '0-1'\nrepair = ['hugepages', 'irq-default']\n\
                    vfio = ['0000:41:10.0']\n[[hugepages]]\nnode = 1\nsize = '1GB'\npages = 2\n";
        assert_eq!(parse(good).unwrap().hugepages[0].pages, 2);
        for (bad, word) in [
            ("reserved = '0'", "reserved"),
            ("reserved_cpus = 'a-b'", "reserved_cpus"),
            ("vfio = ['../x']", "vfio"),
            ("repair = ['all']", "all"),
            ("[[hugepages]]\nnode = 0\nsize = '3MB'\npages = 1", "3MB"),
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains(word), "{bad}: {error}");
        }
    }

    #[test]
    fn a_broken_file_is_drift_and_no_file_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.toml");
        assert_eq!(Profile::load(path.clone()).look().unwrap(), []);
        std::fs::write(&path, "nonsense").unwrap();
        let drift = Profile::load(path).look().unwrap();
        assert_eq!(drift[0].kind, Kind::Profile);
    }
}
