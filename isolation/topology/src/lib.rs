//! CPUs, SMT siblings, NUMA nodes and hugepage pools, read from sysfs.
//!
//! Everything below [`Topology::read_from`] is plain data: the rest of Pinion decides on a
//! [`Topology`] value, and tests build one from a directory of files. Files that a kernel
//! does not have (no NUMA, no SMT, no hugetlb) are replaced by what they would say: one node
//! with all the memory, cores of one thread, no pools.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

pub mod cache;
mod page_size;
pub mod pci;
mod read;
mod render;
mod set;
#[cfg(test)]
mod testtree;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use page_size::{PageSize, ParsePageSizeError};
pub use read::ReadError;
pub use render::{Ownership, Style, render, render_with};
pub use set::{CpuSet, Cpus, IdSet, Kind, NodeSet, Nodes, ParseSetError};

/// The machine as one boot of one kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Every present CPU, by rising number.
    pub cpus: Vec<Cpu>,
    /// Every NUMA node, by rising number; at least one.
    pub nodes: Vec<Node>,
    /// The pools of the whole machine, by rising size; only here is `reserved` known.
    pub hugepages: Vec<Pool>,
    /// CPUs the scheduler may use.
    pub online: CpuSet,
    /// Present CPUs that are switched off.
    pub offline: CpuSet,
    /// CPUs without load balancing since boot (`isolcpus=`).
    pub isolated: CpuSet,
    /// CPUs whose tick stops while one task runs (`nohz_full=`).
    pub nohz_full: CpuSet,
}

/// A logical CPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// Number of the CPU.
    pub id: u32,
    /// Number of the core, unique within its socket only; unknown while offline.
    pub core: Option<u32>,
    /// Number of the physical package; unknown while offline.
    pub socket: Option<u32>,
    /// NUMA node.
    pub node: u32,
    /// Online threads of the same core, this one included; empty while offline.
    pub siblings: CpuSet,
    /// Whether the scheduler may use it.
    pub online: bool,
    /// Whether it was isolated at boot (`isolcpus=`).
    pub isolated: bool,
    /// Whether its tick may stop (`nohz_full=`).
    pub nohz_full: bool,
}

/// A NUMA node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Number of the node.
    pub id: u32,
    /// Its online CPUs; empty for a node of memory alone.
    pub cpus: CpuSet,
    /// ACPI SLIT distance to each node, 10 = itself.
    pub distances: BTreeMap<u32, u32>,
    /// Its memory.
    pub memory: Memory,
    /// Its hugepage pools, by rising size.
    pub hugepages: Vec<Pool>,
}

/// Memory of a node, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Usable memory, hugepage pools included.
    pub total: u64,
    /// Free memory, without reclaim.
    pub free: u64,
}

/// A pool of huge pages of one size, in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// Size of a page.
    pub size: PageSize,
    /// Pages in the pool, surplus included (`nr_hugepages`).
    pub total: u64,
    /// Pages nobody has touched.
    pub free: u64,
    /// Free pages promised to mappings; the kernel counts these for the whole machine only.
    pub reserved: Option<u64>,
    /// Pages above the configured pool, given back when freed.
    pub surplus: u64,
}

impl Topology {
    /// The CPU of this number.
    #[must_use]
    pub fn cpu(&self, id: u32) -> Option<&Cpu> {
        self.cpus.iter().find(|cpu| cpu.id == id)
    }

    /// The node of this number.
    #[must_use]
    pub fn node(&self, id: u32) -> Option<&Node> {
        self.nodes.iter().find(|node| node.id == id)
    }

    /// The numbers of all nodes.
    #[must_use]
    pub fn node_ids(&self) -> NodeSet {
        nodes_from(self.nodes.iter().map(|node| node.id))
    }

    /// The nodes that have memory, which is what `cpuset.mems.effective` can contain.
    #[must_use]
    pub fn memory_nodes(&self) -> NodeSet {
        nodes_from(self.nodes.iter().filter(|node| node.memory.total > 0).map(|node| node.id))
    }

    /// The nodes of these CPUs.
    #[must_use]
    pub fn nodes_of(&self, cpus: &CpuSet) -> NodeSet {
        nodes_from(self.cpus.iter().filter(|cpu| cpus.contains(cpu.id)).map(|cpu| cpu.node))
    }

    /// Online threads on the cores of these CPUs, the CPUs themselves included.
    #[must_use]
    pub fn siblings(&self, cpus: &CpuSet) -> CpuSet {
        self.cpus
            .iter()
            .filter(|cpu| cpus.contains(cpu.id))
            .fold(CpuSet::new(), |all, cpu| all.union(&cpu.siblings))
    }

    /// Whether the CPUs are all online and share no core with a CPU outside the set.
    #[must_use]
    pub fn whole_cores(&self, cpus: &CpuSet) -> bool {
        cpus.is_subset(&self.online) && self.siblings(cpus).is_subset(cpus)
    }

    /// Whether any core has more than one online thread.
    #[must_use]
    pub fn has_smt(&self) -> bool {
        self.cpus.iter().any(|cpu| cpu.siblings.len() > 1)
    }

    /// The cores as sets of online threads, by their first CPU.
    #[must_use]
    pub fn cores(&self) -> Vec<&CpuSet> {
        let leads = |cpu: &&Cpu| cpu.siblings.first() == Some(cpu.id);
        self.cpus.iter().filter(leads).map(|cpu| &cpu.siblings).collect()
    }

    /// The socket numbers in use.
    #[must_use]
    pub fn sockets(&self) -> Vec<u32> {
        let mut sockets: Vec<u32> = self.cpus.iter().filter_map(|cpu| cpu.socket).collect();
        sockets.sort_unstable();
        sockets.dedup();
        sockets
    }

    /// The pool of a size on a node.
    #[must_use]
    pub fn pool(&self, node: u32, size: PageSize) -> Option<&Pool> {
        self.node(node)?.hugepages.iter().find(|pool| pool.size == size)
    }
}

/// Node numbers come from directory names that [`read`] has already bounded.
fn nodes_from(ids: impl Iterator<Item = u32>) -> NodeSet {
    let mut set = NodeSet::new();
    ids.for_each(|id| {
        let _bounded = set.insert(id);
    });
    set
}
