//! Chooses exclusive CPUs for a container whose client has no CPU manager. Pure.
//!
//! ```text
//!  free cores = whole cores, online, without the boot CPU's,
//!               outside the reserved set and of everybody else's CPUs
//!  of those:  CPUs isolated at boot before others, never both in one set
//!             one node: the one asked for, else a preferred one, else the tightest fit
//!             in it, one last-level cache if any holds the set, else the fewest
//!             several nodes only when none alone has enough
//! ```
//!
//! The same inputs give the same CPUs. A set is whole cores: a number of CPUs that leaves a
//! thread over is refused rather than rounded.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use pinion_topology::{CpuSet, NodeSet, Topology};

use crate::{Reason, Refusal, TermName};

/// What a container asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuDemand {
    /// How many CPUs (threads).
    pub count: usize,
    /// The only NUMA node that will do.
    pub node: Option<u32>,
}

/// What there is to choose from.
#[derive(Debug, Clone, Copy)]
pub struct CpuSupply<'a> {
    /// The machine.
    pub topology: &'a Topology,
    /// CPUs by last-level cache; may be empty.
    pub caches: &'a [CpuSet],
    /// CPUs kept for the system.
    pub reserved: &'a CpuSet,
    /// CPUs of others, with their names.
    pub taken: &'a [(String, CpuSet)],
}

/// Chooses the CPUs, on `prefer`red nodes where the demand names none.
pub fn allocate(
    demand: CpuDemand,
    supply: &CpuSupply<'_>,
    prefer: &NodeSet,
) -> Result<CpuSet, Refusal> {
    let threads = supply.topology.cores().iter().map(|core| core.len()).max().unwrap_or(1);
    if demand.count == 0 || !demand.count.is_multiple_of(threads) {
        let below = demand.count - demand.count % threads;
        let detail = format!(
            "{} CPUs are not whole cores of {threads} threads; ask for {} or {}",
            demand.count,
            below.max(threads),
            below.max(threads) + threads
        );
        return Err(Refusal::new(TermName::WholeCores, Reason::NotWholeCores, detail));
    }
    let wanted = demand.count / threads;
    for isolated in [true, false] {
        let cores = free_cores(supply, threads, isolated);
        if let Some(chosen) = choose(wanted, demand.node, supply, prefer, &cores) {
            return Ok(chosen.into_iter().fold(CpuSet::new(), |all, core| all.union(core)));
        }
    }
    Err(exhausted(demand, supply, threads))
}

/// Whole cores that nobody has, by node, each node's in order.
fn free_cores<'a>(
    supply: &CpuSupply<'a>,
    threads: usize,
    isolated: bool,
) -> BTreeMap<u32, Vec<&'a CpuSet>> {
    let topology = supply.topology;
    let boot = topology.online.first();
    let mut free: BTreeMap<u32, Vec<&CpuSet>> = BTreeMap::new();
    for core in topology.cores() {
        let kind = if isolated {
            core.is_subset(&topology.isolated)
        } else {
            core.is_disjoint(&topology.isolated)
        };
        let ours = core.len() == threads
            && kind
            && boot.is_none_or(|cpu| !core.contains(cpu))
            && core.is_disjoint(supply.reserved)
            && supply.taken.iter().all(|(_, cpus)| core.is_disjoint(cpus));
        let node = core.first().and_then(|cpu| topology.cpu(cpu)).map(|cpu| cpu.node);
        if let Some(node) = node.filter(|_| ours) {
            free.entry(node).or_default().push(core);
        }
    }
    free
}

fn choose<'a>(
    wanted: usize,
    node: Option<u32>,
    supply: &CpuSupply<'_>,
    prefer: &NodeSet,
    free: &BTreeMap<u32, Vec<&'a CpuSet>>,
) -> Option<Vec<&'a CpuSet>> {
    let allowed = free.iter().filter(|(id, _)| node.is_none_or(|only| only == **id));
    let mut nodes: Vec<(u32, &Vec<&CpuSet>)> = allowed.map(|(id, cores)| (*id, cores)).collect();
    // The tightest fit keeps the large rooms for large containers.
    nodes.sort_by_key(|(id, cores)| (!prefer.contains(*id), cores.len(), *id));
    if let Some((_, cores)) = nodes.iter().find(|(_, cores)| cores.len() >= wanted) {
        return Some(by_cache(wanted, supply.caches, cores));
    }
    if node.is_some() {
        return None;
    }
    nodes.sort_by_key(|(id, cores)| (!prefer.contains(*id), Reverse(cores.len()), *id));
    let mut chosen = Vec::new();
    for (_, cores) in nodes {
        chosen.extend(by_cache(wanted - chosen.len(), supply.caches, cores));
        if chosen.len() == wanted {
            return Some(chosen);
        }
    }
    None
}

/// At most `wanted` of a node's cores, over as few caches as possible.
fn by_cache<'a>(wanted: usize, caches: &[CpuSet], cores: &[&'a CpuSet]) -> Vec<&'a CpuSet> {
    let mut rooms: BTreeMap<usize, Vec<&CpuSet>> = BTreeMap::new();
    for core in cores {
        let cache = caches.iter().position(|cache| !cache.is_disjoint(core));
        rooms.entry(cache.unwrap_or(caches.len())).or_default().push(core);
    }
    let holds = rooms.iter().filter(|(_, cores)| cores.len() >= wanted);
    if let Some((_, room)) = holds.min_by_key(|(cache, cores)| (cores.len(), **cache)) {
        return room.iter().take(wanted).copied().collect();
    }
    let mut rooms: Vec<_> = rooms.into_iter().collect();
    rooms.sort_by_key(|(cache, cores)| (Reverse(cores.len()), *cache));
    rooms.into_iter().flat_map(|(_, cores)| cores).take(wanted).collect()
}

fn exhausted(demand: CpuDemand, supply: &CpuSupply<'_>, threads: usize) -> Refusal {
    let topology = supply.topology;
    if let Some(node) = demand.node.filter(|node| topology.node(*node).is_none()) {
        let detail = format!(
            "the machine has no NUMA node {node} (nodes: {}), {} CPUs asked there",
            topology.node_ids(),
            demand.count
        );
        return Refusal::new(TermName::ExclusiveCpus, Reason::NoCpus, detail);
    }
    let mut parts = Vec::new();
    for node in topology.nodes.iter().filter(|n| demand.node.is_none_or(|only| only == n.id)) {
        let mut part = format!("node {} has {} CPUs", node.id, node.cpus.len());
        let reserved = node.cpus.intersection(supply.reserved);
        if !reserved.is_empty() {
            part.push_str(&format!(", {reserved} reserved"));
        }
        for (name, cpus) in supply.taken {
            let here = node.cpus.intersection(cpus);
            if !here.is_empty() {
                part.push_str(&format!(", {here} of {name}"));
            }
        }
        let left: usize = [true, false]
            .iter()
            .filter_map(|isolated| {
                Some(free_cores(supply, threads, *isolated).get(&node.id)?.len())
            })
            .sum();
        part.push_str(&format!(", {} in free whole cores", left * threads));
        parts.push(part);
    }
    let boot = topology.online.first().unwrap_or(0);
    let detail = format!(
        "{}; {} asked (the core of CPU {boot} always stays with the system); ask for fewer, or \
         end a container that has some",
        parts.join("; "),
        demand.count
    );
    Refusal::new(TermName::ExclusiveCpus, Reason::CpusExhausted, detail)
}

#[cfg(test)]
#[path = "allocate_tests.rs"]
mod tests;
