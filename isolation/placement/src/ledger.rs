//! Who was promised which huge pages: per node and size, over all containers.
//!
//! The kernel reserves huge pages for the whole machine only, so two containers bound to one
//! node can both be promised its last page. The ledger is where that is decided instead:
//!
//! ```text
//! pool of a node = granted to containers + foreign (in use outside the ledger) + left
//! ```
//!
//! Invariant: a grant never makes `granted + foreign` exceed the pool. Only [`Ledger::observe`]
//! (the pool shrank underneath) and [`Ledger::restore`] (facts of the past) can leave it
//! exceeded, and both report that as [`Drift`].

use std::collections::BTreeMap;
use std::fmt;

use pinion_topology::{NodeSet, PageSize, Topology};
use serde::{Deserialize, Serialize};

use crate::{Reason, Refusal, TermName};

/// Pages of one size on one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Grant {
    /// The node.
    pub node: u32,
    /// The size.
    pub size: PageSize,
    /// How many.
    pub pages: u64,
}

impl fmt::Display for Grant {
    /// `1/2MB=64`, the form of the annotation.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}={}", self.node, self.size, self.pages)
    }
}

/// What a container needs of one size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugepageDemand {
    /// The size.
    pub size: PageSize,
    /// How many.
    pub pages: u64,
    /// The only nodes that will do; without them the ledger chooses.
    pub nodes: Option<NodeSet>,
}

/// A node's pool of one size as the kernel shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodePool {
    /// The node.
    pub node: u32,
    /// The size.
    pub size: PageSize,
    /// Pages in the pool.
    pub total: u64,
    /// Pages in use by nobody the ledger knows.
    pub foreign: u64,
}

impl NodePool {
    /// The pools of a machine. `held` are the pages that containers of the ledger have in
    /// use (see [`crate::hugepages_held`]); what else is in use is foreign.
    #[must_use]
    pub fn observed(topology: &Topology, held: &BTreeMap<(u32, PageSize), u64>) -> Vec<Self> {
        let pools = topology.nodes.iter().flat_map(|node| {
            node.hugepages.iter().map(move |pool| {
                let held = held.get(&(node.id, pool.size)).copied().unwrap_or(0);
                let foreign = pool.total.saturating_sub(pool.free).saturating_sub(held);
                Self { node: node.id, size: pool.size, total: pool.total, foreign }
            })
        });
        pools.collect()
    }
}

/// A difference between the ledger and the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Drift {
    /// A pool has another size than when last seen.
    Resized {
        /// The node.
        node: u32,
        /// The page size.
        size: PageSize,
        /// Pages before.
        before: u64,
        /// Pages now.
        now: u64,
    },
    /// More is granted, or used by others, than the pool has.
    Overcommitted {
        /// The node.
        node: u32,
        /// The page size.
        size: PageSize,
        /// Pages in the pool.
        total: u64,
        /// Pages granted.
        granted: u64,
        /// Pages in use outside the ledger.
        foreign: u64,
        /// The containers with grants there.
        containers: Vec<String>,
    },
}

/// See the module's documentation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    pools: BTreeMap<(u32, PageSize), NodePool>,
    grants: BTreeMap<String, Vec<Grant>>,
}

impl Ledger {
    /// A ledger without grants over these pools.
    #[must_use]
    pub fn new(pools: impl IntoIterator<Item = NodePool>) -> Self {
        let pools = pools.into_iter().map(|pool| ((pool.node, pool.size), pool)).collect();
        Self { pools, grants: BTreeMap::new() }
    }

    /// Grants all demands or none. A demand with nodes is met there; one without goes to a
    /// single node if any has room: of `prefer` (the CPUs' nodes) first, else the emptiest.
    /// An earlier grant of the same container is replaced, and kept when this fails.
    pub fn grant(
        &mut self,
        container: &str,
        demands: &[HugepageDemand],
        prefer: &NodeSet,
    ) -> Result<Vec<Grant>, Refusal> {
        let before = self.grants.remove(container);
        let mut granted: Vec<Grant> = Vec::new();
        for demand in demands.iter().filter(|demand| demand.pages > 0) {
            match self.place(demand, prefer, &granted) {
                Ok(placed) => granted.extend(placed),
                Err(refusal) => {
                    self.grants.extend(before.map(|grants| (container.to_owned(), grants)));
                    return Err(refusal);
                }
            }
        }
        merge(&mut granted);
        if !granted.is_empty() {
            self.grants.insert(container.to_owned(), granted.clone());
        }
        Ok(granted)
    }

    /// Forgets a container's grants and returns them.
    pub fn release(&mut self, container: &str) -> Vec<Grant> {
        self.grants.remove(container).unwrap_or_default()
    }

    /// Takes over grants made before a restart, whether they fit or not.
    pub fn restore(
        &mut self,
        grants: impl IntoIterator<Item = (String, Vec<Grant>)>,
    ) -> Vec<Drift> {
        for (container, mut granted) in grants {
            merge(&mut granted);
            if !granted.is_empty() {
                self.grants.insert(container, granted);
            }
        }
        self.overcommitted()
    }

    /// Takes over what the machine shows now and reports what changed or no longer fits.
    pub fn observe(&mut self, pools: impl IntoIterator<Item = NodePool>) -> Vec<Drift> {
        let seen = Self::new(pools).pools;
        let mut drift = Vec::new();
        let keys: std::collections::BTreeSet<_> =
            self.pools.keys().chain(seen.keys()).copied().collect();
        for key in keys {
            let total =
                |pools: &BTreeMap<_, NodePool>| pools.get(&key).map_or(0, |pool| pool.total);
            let (before, now) = (total(&self.pools), total(&seen));
            if before != now {
                drift.push(Drift::Resized { node: key.0, size: key.1, before, now });
            }
        }
        self.pools = seen;
        drift.extend(self.overcommitted());
        drift
    }

    /// The grants of every container.
    pub fn grants(&self) -> impl Iterator<Item = (&str, &[Grant])> {
        self.grants.iter().map(|(container, grants)| (container.as_str(), grants.as_slice()))
    }

    /// Pages granted on a node.
    #[must_use]
    pub fn granted(&self, node: u32, size: PageSize) -> u64 {
        let all = self.grants.values().flatten();
        let here = all.filter(|grant| (grant.node, grant.size) == (node, size));
        here.fold(0, |sum, grant| sum.saturating_add(grant.pages))
    }

    /// Pages that can still be granted on a node.
    #[must_use]
    pub fn left(&self, node: u32, size: PageSize) -> u64 {
        let pool = self.pools.get(&(node, size));
        let used = |pool: &NodePool| pool.foreign.saturating_add(self.granted(node, size));
        pool.map_or(0, |pool| pool.total.saturating_sub(used(pool)))
    }

    fn place(
        &self,
        demand: &HugepageDemand,
        prefer: &NodeSet,
        pending: &[Grant],
    ) -> Result<Vec<Grant>, Refusal> {
        let size = demand.size;
        let pending = |node: u32| -> u64 {
            let here = pending.iter().filter(|grant| (grant.node, grant.size) == (node, size));
            here.map(|grant| grant.pages).sum()
        };
        let allowed = |node: u32| demand.nodes.as_ref().is_none_or(|nodes| nodes.contains(node));
        let pools = self.pools.keys().filter(|(node, of)| *of == size && allowed(*node));
        let mut rooms: Vec<(u32, u64)> = pools
            .map(|&(node, _)| (node, self.left(node, size).saturating_sub(pending(node))))
            .collect();
        if rooms.is_empty() {
            return Err(self.no_pool(demand));
        }
        rooms.sort_by_key(|&(node, room)| (!prefer.contains(node), std::cmp::Reverse(room), node));
        let fits = rooms.iter().find(|(_, room)| *room >= demand.pages);
        if let Some(&(node, _)) = fits {
            return Ok(vec![Grant { node, size, pages: demand.pages }]);
        }
        let mut missing = demand.pages;
        let mut grants = Vec::new();
        for (node, room) in rooms.into_iter().filter(|(_, room)| *room > 0) {
            let pages = room.min(missing);
            grants.push(Grant { node, size, pages });
            missing -= pages;
            if missing == 0 {
                return Ok(grants);
            }
        }
        Err(self.exhausted(demand))
    }

    fn no_pool(&self, demand: &HugepageDemand) -> Refusal {
        let place = demand.nodes.as_ref().map_or("this machine".to_owned(), node_text);
        let sizes: std::collections::BTreeSet<String> =
            self.pools.keys().map(|(_, size)| size.to_string()).collect();
        let sizes: Vec<String> = sizes.into_iter().collect();
        let sizes = if sizes.is_empty() { "none".to_owned() } else { sizes.join(", ") };
        let detail = format!(
            "{place} has no pool of {} pages (sizes with a pool: {sizes}), {} asked",
            demand.size, demand.pages
        );
        Refusal::new(TermName::Hugepages, Reason::NoSuchPool, detail)
    }

    fn exhausted(&self, demand: &HugepageDemand) -> Refusal {
        let size = demand.size;
        let allowed = |node: u32| demand.nodes.as_ref().is_none_or(|nodes| nodes.contains(node));
        let mut parts = Vec::new();
        for pool in self.pools.values().filter(|pool| pool.size == size && allowed(pool.node)) {
            let holders = self.holders(pool.node, size);
            let mut part = format!("node {} has {} pages of {size}", pool.node, pool.total);
            for (container, pages) in holders.iter().take(3) {
                part.push_str(&format!(", {pages} granted to {container}"));
            }
            if holders.len() > 3 {
                let rest: u64 = holders.iter().skip(3).map(|(_, pages)| pages).sum();
                part.push_str(&format!(", {rest} to {} more", holders.len() - 3));
            }
            if pool.foreign > 0 {
                part.push_str(&format!(", {} in use outside the ledger", pool.foreign));
            }
            part.push_str(&format!(", {} left", self.left(pool.node, size)));
            parts.push(part);
        }
        let detail = format!(
            "{}, {} asked; ask for fewer, free some, or raise nr_hugepages of the node",
            parts.join("; "),
            demand.pages
        );
        Refusal::new(TermName::Hugepages, Reason::PoolExhausted, detail)
    }

    /// Containers with pages there, most pages first.
    fn holders(&self, node: u32, size: PageSize) -> Vec<(&str, u64)> {
        let here = |grants: &[Grant]| -> u64 {
            let here = grants.iter().filter(|grant| (grant.node, grant.size) == (node, size));
            here.map(|grant| grant.pages).sum()
        };
        let all = self.grants().map(|(container, grants)| (container, here(grants)));
        let mut holders: Vec<_> = all.filter(|(_, pages)| *pages > 0).collect();
        holders.sort_by_key(|&(container, pages)| (std::cmp::Reverse(pages), container));
        holders
    }

    fn overcommitted(&self) -> Vec<Drift> {
        let granted = self.grants.values().flatten().map(|grant| (grant.node, grant.size));
        let keys: std::collections::BTreeSet<_> = granted.collect();
        let over = keys.into_iter().filter_map(|(node, size)| {
            let pool = self.pools.get(&(node, size));
            let (total, foreign) = pool.map_or((0, 0), |pool| (pool.total, pool.foreign));
            let granted = self.granted(node, size);
            let containers =
                || self.holders(node, size).into_iter().map(|(name, _)| name.to_owned()).collect();
            (granted.saturating_add(foreign) > total).then(|| Drift::Overcommitted {
                node,
                size,
                total,
                granted,
                foreign,
                containers: containers(),
            })
        });
        over.collect()
    }
}

fn node_text(nodes: &NodeSet) -> String {
    let plural = if nodes.len() == 1 { "node" } else { "nodes" };
    format!("{plural} {nodes}")
}

/// One grant per node and size, in order.
fn merge(grants: &mut Vec<Grant>) {
    let mut sums: BTreeMap<(u32, PageSize), u64> = BTreeMap::new();
    for grant in grants.iter() {
        let sum = sums.entry((grant.node, grant.size)).or_default();
        *sum = sum.saturating_add(grant.pages);
    }
    let merged = sums.into_iter().map(|((node, size), pages)| Grant { node, size, pages });
    *grants = merged.filter(|grant| grant.pages > 0).collect();
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
