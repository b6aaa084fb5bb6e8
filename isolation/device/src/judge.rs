//! Pure judgement: demands and what the kernel shows → the term "devices".

use std::collections::BTreeMap;
use std::path::Path;

use pinion_placement::{Reason, Term, TermName};
use pinion_topology::NodeSet;

use crate::{Answer, Demand, Function, Place};

/// The node through which every group of VFIO is used.
const VFIO_CONTAINER: &str = "/dev/vfio/vfio";

/// A demand and what was found of it.
#[derive(Debug, Clone)]
pub struct Seen {
    /// What the container is to have.
    pub demand: Demand,
    /// Whether a node of this kind and number is at the demand's path.
    pub there: Result<(), String>,
    /// Where the device is; `None` when the kernel has none of that number.
    pub place: Option<Place>,
}

/// Where the container runs, and who else is there.
#[derive(Debug, Clone, Default)]
pub struct Locality {
    /// NUMA nodes of its CPUs; empty when it is not bound to CPUs.
    pub cpus: NodeSet,
    /// NUMA nodes of its memory; empty when it is not bound to any.
    pub mems: NodeSet,
    /// Whether the machine has one node only, so that everything is local.
    pub uniform: bool,
    /// IOMMU groups that other containers have, with their names.
    pub held: BTreeMap<u32, String>,
}

/// Judges the devices of a container; `answers` are those of [`crate::probe()`], if it was run.
#[must_use]
pub fn judge(seen: &[Seen], locality: &Locality, answers: Option<&[Answer]>) -> Term {
    let asked: Vec<String> =
        seen.iter().map(|seen| seen.demand.host.display().to_string()).collect();
    let asked = (!asked.is_empty()).then(|| asked.join(", "));
    let mut term = Term::new(TermName::Devices, asked);
    for seen in seen {
        node(&mut term, seen, locality, answers);
    }
    let groups = seen.iter().any(|seen| matches!(seen.place, Some(Place::Group(..))));
    let container = |seen: &Seen| seen.demand.host == Path::new(VFIO_CONTAINER);
    if groups && !seen.iter().any(container) {
        let detail = format!(
            "an IOMMU group is of no use without {VFIO_CONTAINER}, which is not among the devices"
        );
        term.fail(Reason::DeviceAbsent, detail);
    }
    term
}

fn node(term: &mut Term, seen: &Seen, locality: &Locality, answers: Option<&[Answer]>) {
    let Demand { host, kind, major, minor, access } = &seen.demand;
    let name = host.display().to_string();
    let mut evidence = format!("{} {major}:{minor} {access}", kind.letter());
    if let Err(why) = &seen.there {
        term.fail(Reason::DeviceAbsent, format!("{name}: {why}"));
    }
    match &seen.place {
        None => {
            let letter = kind.letter();
            let detail = format!("{name}: the kernel has no device {letter} {major}:{minor}");
            term.fail(Reason::DeviceAbsent, detail);
        }
        Some(Place::Virtual) => {}
        Some(Place::Other(numa)) => {
            if let Some(numa) = numa {
                evidence.push_str(&format!(", node {numa}"));
                local(term, &name, Some(*numa), locality);
            }
        }
        Some(Place::Function(function)) => {
            evidence.push_str(&format!(", {}", described(function)));
            local(term, &function_name(&name, function), function.numa, locality);
        }
        Some(Place::Group(group, members)) => {
            let list: Vec<String> = members.iter().map(described).collect();
            evidence.push_str(&format!(", IOMMU group {group} = {}", list.join(" + ")));
            whole_group(term, &name, *group, members);
            for function in members.iter().filter(|function| !function.is_bridge()) {
                local(term, &function_name(&name, function), function.numa, locality);
            }
            if let Some(holder) = locality.held.get(group) {
                let detail = format!("{name}: IOMMU group {group} belongs to {holder}");
                term.fail(Reason::DeviceInUse, detail);
            }
        }
    }
    match answers.and_then(|all| all.iter().find(|answer| answer.is_for(host))) {
        Some(answer) => match answer.refusal() {
            None => evidence.push_str(", openable in the container's group"),
            Some(error) => {
                let detail = format!(
                    "{name}: the container may not open it for {access}: {error} (device rules \
                     of its group)"
                );
                term.fail(Reason::DeviceDenied, detail);
            }
        },
        None => evidence.push_str(", not probed"),
    }
    term.note(name, evidence);
}

fn function_name(node: &str, function: &Function) -> String {
    format!("{node} ({})", function.address)
}

fn described(function: &Function) -> String {
    let driver = function.driver.as_deref().unwrap_or("no driver");
    let numa = function.numa.map_or("node unknown".to_owned(), |numa| format!("node {numa}"));
    format!("{} ({driver}, {numa})", function.address)
}

/// The kernel refuses a group of which any device is on a driver of the host's.
fn whole_group(term: &mut Term, name: &str, group: u32, members: &[Function]) {
    if members.is_empty() {
        let detail = format!("{name}: IOMMU group {group} has no device");
        term.fail(Reason::DeviceAbsent, detail);
    }
    let foreign: Vec<String> = members
        .iter()
        .filter(|function| !function.is_bridge() && !function.on_vfio())
        .filter_map(|function| {
            Some(format!("{} ({})", function.address, function.driver.as_deref()?))
        })
        .collect();
    if !foreign.is_empty() {
        let detail = format!(
            "{name}: IOMMU group {group} is not whole, the host's drivers have {}; bind them to \
             vfio-pci too",
            foreign.join(", ")
        );
        term.fail(Reason::PartialIommuGroup, detail);
    }
}

fn local(term: &mut Term, name: &str, numa: Option<u32>, locality: &Locality) {
    if locality.uniform || (locality.cpus.is_empty() && locality.mems.is_empty()) {
        return;
    }
    let Some(numa) = numa else {
        let detail = format!(
            "{name}: firmware does not say which NUMA node it is on, so it is not known to be \
             beside the container"
        );
        term.fail(Reason::DeviceNotLocal, detail);
        return;
    };
    for (what, nodes) in [("CPUs are on", &locality.cpus), ("memory is bound to", &locality.mems)] {
        if !nodes.is_empty() && !nodes.contains(numa) {
            let plural = if nodes.len() == 1 { "node" } else { "nodes" };
            let detail =
                format!("{name} is on node {numa}, and the container's {what} {plural} {nodes}");
            term.fail(Reason::DeviceNotLocal, detail);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testtree::{CARD, CARD_TWIN, Tree, VF0, telco};
    use crate::{NodeKind, place};

    fn demand(host: &str, major: u32, minor: u32) -> Demand {
        let access = "rw".parse().unwrap();
        Demand { host: host.into(), kind: NodeKind::Char, major, minor, access }
    }

    fn see(tree: &Tree, host: &str, major: u32, minor: u32) -> Seen {
        let demand = demand(host, major, minor);
        let place = place(tree.root(), &demand).unwrap();
        Seen { demand, there: Ok(()), place }
    }

    fn vfio(tree: &Tree) -> Vec<Seen> {
        tree.bind(VF0, Some("vfio-pci"));
        vec![see(tree, "/dev/vfio/vfio", 10, 196), see(tree, "/dev/vfio/11", 236, 0)]
    }

    fn on(node: &str) -> Locality {
        Locality { cpus: node.parse().unwrap(), mems: node.parse().unwrap(), ..Default::default() }
    }

    #[test]
    fn a_whole_group_beside_the_cpus_is_in_force_with_its_evidence() {
        let seen = vfio(&telco());
        let answers = [
            Answer { host: "/dev/vfio/vfio".into(), errno: 0 },
            Answer { host: "/dev/vfio/11".into(), errno: 0 },
        ];
        let term = judge(&seen, &on("1"), Some(&answers));
        assert!(term.in_force, "{term:?}");
        assert_eq!(
            term.evidence["/dev/vfio/11"],
            "c 236:0 rw, IOMMU group 11 = 0000:41:10.0 (vfio-pci, node 1), openable in the \
             container's group"
        );
        assert_eq!(term.asked.as_deref(), Some("/dev/vfio/vfio, /dev/vfio/11"));
    }

    #[test]
    fn the_wrong_node_is_refused_with_both_numbers() {
        let term = judge(&vfio(&telco()), &on("0"), None);
        assert_eq!(term.code, Some(Reason::DeviceNotLocal));
        let reason = term.reason.unwrap();
        assert!(reason.contains("(0000:41:10.0) is on node 1"), "{reason}");
        assert!(reason.contains("CPUs are on node 0"), "{reason}");
        assert!(reason.contains("memory is bound to node 0"), "{reason}");
        let uniform = Locality { uniform: true, ..on("0") };
        assert!(judge(&vfio(&telco()), &uniform, None).in_force);
        assert!(judge(&vfio(&telco()), &Locality::default(), None).in_force, "bound to nothing");
    }

    #[test]
    fn half_a_group_a_held_group_and_a_lost_function_are_told_apart() {
        let tree = telco();
        tree.bind(CARD, Some("vfio-pci"));
        tree.bind(CARD_TWIN, Some("xdma"));
        tree.file("sys/devices/virtual/vfio/7/dev", "236:7");
        tree.link("sys/dev/char/236:7", "../../devices/virtual/vfio/7");
        let mut seen = vfio(&tree);
        seen.push(see(&tree, "/dev/vfio/7", 236, 7));
        let term = judge(&seen, &Locality::default(), None);
        assert_eq!(term.code, Some(Reason::PartialIommuGroup));
        assert!(term.reason.unwrap().contains("0000:21:00.1 (xdma)"));

        let held = BTreeMap::from([(11, "ns/other/main".to_owned())]);
        let term = judge(&vfio(&tree), &Locality { held, ..Default::default() }, None);
        assert_eq!(term.code, Some(Reason::DeviceInUse));

        let gone = Seen {
            demand: demand("/dev/gone", 99, 9),
            there: Err("No such file".into()),
            place: None,
        };
        assert_eq!(judge(&[gone], &Locality::default(), None).code, Some(Reason::DeviceAbsent));
    }

    #[test]
    fn a_rule_that_denies_and_a_group_without_its_container_are_seen() {
        let seen = vfio(&telco());
        let denied = [Answer { host: "/dev/vfio/11".into(), errno: 1 }];
        let term = judge(&seen, &Locality::default(), Some(&denied));
        assert_eq!(term.code, Some(Reason::DeviceDenied));
        let term = judge(&seen[1..], &Locality::default(), None);
        assert!(term.reason.unwrap().contains("/dev/vfio/vfio"));
        assert!(judge(&[], &Locality::default(), None).asked.is_none());
    }
}
