//! Names of terms, machine-readable reasons, and the refusal that carries both to a person.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A guarantee a container can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TermName {
    /// No other task of the system may run on the container's CPUs.
    ExclusiveCpus,
    /// The CPUs share no core with anything else.
    WholeCores,
    /// No CPU quota on the container or above it.
    NoThrottling,
    /// Memory comes from the nodes of the CPUs.
    MemoryLocality,
    /// The huge pages are limited, granted and there.
    Hugepages,
    /// Interrupts stay away from the CPUs.
    IrqQuiet,
    /// Frequency governor and wake-up latency of the CPUs are as asked.
    Power,
    /// The devices are there, may be opened, and sit beside the CPUs and the memory.
    Devices,
    /// A kernel of its own.
    Kernel,
}

/// Why a term is not in force. The spelling is part of the interface: clients match on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The cpuset controller is on cgroup v1, which has no partitions.
    CgroupV1,
    /// No cpuset controller reaches the container's group.
    NoCpusetController,
    /// The kernel has no partition of the kind asked for.
    NoPartitions,
    /// The kernel has partitions only directly below the root (before Linux 6.7).
    NoRemotePartitions,
    /// The container has no CPU list to be exclusive about.
    NoCpus,
    /// A CPU is offline or does not exist.
    CpusOffline,
    /// Another group holds one of the CPUs exclusively.
    CpusHeld,
    /// Nothing would be left for the rest of the system.
    NoCpusLeft,
    /// The kernel did not make or keep the partition.
    PartitionInvalid,
    /// The effective CPUs are not those asked for.
    EffectiveDiffers,
    /// Other groups or tasks may run on the CPUs.
    CpusShared,
    /// A core is shared with CPUs outside the set.
    NotWholeCores,
    /// A CPU quota can throttle the container.
    Quota,
    /// Memory may come from nodes that are not those of the CPUs.
    MemoryNotLocal,
    /// The hugetlb controller does not reach the container's group.
    NoHugetlbController,
    /// A hugetlb limit is not what was asked for.
    HugepageLimit,
    /// The kernel has no pool of this size, or no such node.
    NoSuchPool,
    /// Too few pages are left in the node's pool.
    PoolExhausted,
    /// The container's memory nodes exclude a granted page's node.
    NodeNotAllowed,
    /// The pages could not be touched in the container's group.
    ProofFailed,
    /// Huge pages of the container lie on a node that was not granted.
    PagesElsewhere,
    /// Interrupts are served on the CPUs.
    IrqsOnCpus,
    /// Interrupts are served on the CPUs, and the kernel does not let them go elsewhere.
    IrqsUnsteerable,
    /// The CPUs have no frequency governor or no latency limit to set.
    NoPowerControl,
    /// Governor or latency limit of a CPU are not what was asked for.
    PowerDiffers,
    /// The container runs on the host's kernel.
    SharedKernel,
    /// A device node is not there, or is another device than it was.
    DeviceAbsent,
    /// The kernel does not let the container open a device node.
    DeviceDenied,
    /// A device sits on another NUMA node than the CPUs or the memory.
    DeviceNotLocal,
    /// An IOMMU group is not given as a whole.
    PartialIommuGroup,
    /// Another container or the host uses the device.
    DeviceInUse,
    /// The device may not be given to containers, or not by the driver asked for.
    DeviceNotAllowed,
    /// Too few CPUs are left for the container.
    CpusExhausted,
    /// The kernel refused a write.
    WriteFailed,
    /// A fact could not be read, so nothing can be said.
    Unreadable,
}

/// A guarantee that cannot be given, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{term}: {detail} ({reason})")]
pub struct Refusal {
    /// Which guarantee.
    pub term: TermName,
    /// Why, for machines.
    pub reason: Reason,
    /// Why, for people: numbers, names and what to do.
    pub detail: String,
}

/// Said by the plan and by the audit.
pub(crate) const NO_PARTITIONS_ON_V1: &str = "the cpuset controller is on cgroup v1, which has no partitions: nothing keeps other tasks \
     off the CPUs; boot with cgroup v2 (systemd.unified_cgroup_hierarchy=1)";

impl Refusal {
    /// A refusal with its reason for machines and for people.
    pub fn new(term: TermName, reason: Reason, detail: impl Into<String>) -> Self {
        Self { term, reason, detail: detail.into() }
    }
}

/// Writes the serialised, kebab-case name.
fn spelled(name: &impl Serialize, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match serde_json::to_value(name) {
        Ok(serde_json::Value::String(name)) => f.pad(&name),
        _ => Err(fmt::Error),
    }
}

impl fmt::Display for TermName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        spelled(self, f)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        spelled(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_reads_as_one_sentence_and_travels_as_json() {
        let refusal = Refusal::new(TermName::ExclusiveCpus, Reason::CgroupV1, "no partitions here");
        assert_eq!(refusal.to_string(), "exclusive-cpus: no partitions here (cgroup-v1)");
        let json = serde_json::to_string(&refusal).unwrap();
        assert!(json.contains(r#""term":"exclusive-cpus","reason":"cgroup-v1""#), "{json}");
        assert_eq!(serde_json::from_str::<Refusal>(&json).unwrap(), refusal);
    }
}
