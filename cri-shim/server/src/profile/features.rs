//! What this node can do, for Node Feature Discovery's local source: a file of `name=value`
//! lines that NFD makes labels of (its documentation, "local feature source").

use std::collections::BTreeMap;
use std::path::Path;

use pinion_topology::Topology;

use crate::contract;
use crate::error::{Context, Result};
use crate::node::Node;

/// Writes the file if one is configured and it says something else. Blocks.
pub(super) fn publish(node: &Node) -> Result<()> {
    let path = &node.config.node.features_file;
    if path.as_os_str().is_empty() {
        return Ok(());
    }
    let what = || format!("write {}", path.display());
    let topology = Topology::read().context(what)?;
    let text = render(&features(&topology, &Host::look(node)));
    if std::fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).context(what)?;
    }
    pinion_sys::atomic_file::write_volatile(path, text.as_bytes(), 0o644).context(what)
}

/// What is not in the topology.
struct Host {
    /// Kinds of cpuset partition: `remote`, `local` or `none`.
    partitions: &'static str,
    kvm: bool,
    vfio: bool,
    iommu_groups: usize,
    drift: usize,
}

impl Host {
    fn look(node: &Node) -> Self {
        let v2 = node.cgroups.is_v2().then(|| node.cgroups.hierarchies().v2_root()).flatten();
        let below = |file: &str| {
            let entries = v2.and_then(|root| std::fs::read_dir(root).ok());
            entries.into_iter().flatten().flatten().any(|entry| entry.path().join(file).exists())
        };
        let groups = std::fs::read_dir("/sys/kernel/iommu_groups");
        Self {
            partitions: if below("cpuset.cpus.exclusive") {
                "remote"
            } else if below("cpuset.cpus.partition") {
                "local"
            } else {
                "none"
            },
            kvm: Path::new("/dev/kvm").exists(),
            vfio: Path::new("/sys/bus/pci/drivers/vfio-pci").exists(),
            iommu_groups: groups.map_or(0, Iterator::count),
            drift: node.profile.drift.lock().map_or(0, |drift| drift.len()),
        }
    }
}

fn features(topology: &Topology, host: &Host) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut put = |name: String, value: String| all.insert(format!("pinion.dev/{name}"), value);
    put("cpuset-partition".into(), host.partitions.into());
    for handler in [contract::PLAIN, contract::STRICT] {
        put(format!("handler.{handler}"), "true".into());
    }
    put("numa-nodes".into(), topology.nodes.len().to_string());
    put("smt".into(), topology.has_smt().to_string());
    put("isolcpus".into(), topology.isolated.len().to_string());
    put("nohz-full".into(), topology.nohz_full.len().to_string());
    for node in &topology.nodes {
        for pool in node.hugepages.iter().filter(|pool| pool.total > 0) {
            put(format!("hugepages.node{}.{}", node.id, pool.size), pool.total.to_string());
        }
    }
    put("kvm".into(), host.kvm.to_string());
    put("vfio".into(), host.vfio.to_string());
    put("iommu-groups".into(), host.iommu_groups.to_string());
    put("profile-drift".into(), (host.drift > 0).to_string());
    all
}

fn render(features: &BTreeMap<String, String>) -> String {
    features.iter().map(|(name, value)| format!("{name}={value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_labels() {
        let host = Host { partitions: "remote", kvm: false, vfio: true, iommu_groups: 9, drift: 1 };
        let text = render(&features(&Topology::read().unwrap(), &host));
        for line in text.lines() {
            let (name, value) = line.split_once('=').unwrap();
            let name = name.strip_prefix("pinion.dev/").unwrap();
            let label = |text: &str| {
                text.len() <= 63
                    && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            };
            assert!(label(name) && label(value), "{line}");
        }
        assert!(text.contains("pinion.dev/cpuset-partition=remote\n"));
        assert!(text.contains("pinion.dev/profile-drift=true\n"));
    }
}
