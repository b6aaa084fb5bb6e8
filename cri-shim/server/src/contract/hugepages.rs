//! The hugepage ledger: who was promised which pages, over all containers of the node.
//!
//! A grant is stored in the transaction of the intent it is for, and the pools are read anew
//! for every decision, so the ledger follows an administrator who resizes them.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use pinion_placement::{Grant, HugepageDemand, Ledger, NodePool, hugepages_held, left_behind};
use pinion_store::{Table, Tx};
use pinion_topology::{PageSize, Topology};

use super::view::topology;
use super::{Contract, Decision};
use crate::config::HugepagePolicy;
use crate::error::{Error, Kind, Result};
use crate::node::Node;

/// Grants by container, as one look finds them.
pub(super) type Grants = BTreeMap<String, Vec<Grant>>;

/// Grants by container.
pub(crate) const GRANTS: Table<Vec<Grant>> = Table::new("hugepage-grants");

/// The grants in force.
#[derive(Debug, Default)]
pub(crate) struct Hugepages {
    grants: Mutex<BTreeMap<String, Vec<Grant>>>,
}

impl Hugepages {
    /// Takes over what the store remembers.
    pub(crate) fn restore(&self, grants: BTreeMap<String, Vec<Grant>>) {
        *self.lock() = grants;
    }

    /// The containers that hold grants.
    pub(crate) fn holders(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    /// The grants of a container.
    pub(crate) fn of(&self, container: &str) -> Vec<Grant> {
        self.lock().get(container).cloned().unwrap_or_default()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Vec<Grant>>> {
        self.grants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the ledger, as it would be over the pools of this moment. Blocks.
    fn ask(
        &self,
        node: &Node,
        container: &str,
        cgroups_path: &str,
        decision: &Decision,
    ) -> Result<Vec<Grant>> {
        let topology = topology()?;
        let mut grants = self.lock();
        let held = held(node, grants.keys(), &topology);
        let mut pools = NodePool::observed(&topology, &held);
        let left = |size| inherited(node, container, cgroups_path, size);
        for demand in &decision.demands {
            own_again(&mut pools, demand, left(demand.size));
        }
        let mut ledger = Ledger::new(pools);
        ledger.restore(grants.clone());
        let granted = ledger
            .grant(container, &decision.demands, &decision.prefer)
            .map_err(|refusal| Error::from_foreign(Kind::Refused, refusal))?;
        grants.insert(container.to_string(), granted.clone());
        Ok(granted)
    }
}

/// Pages that containers with grants have in use; what else is in use is foreign.
fn held<'a>(
    node: &Node,
    holders: impl Iterator<Item = &'a String>,
    topology: &Topology,
) -> BTreeMap<(u32, PageSize), u64> {
    let snapshot = node.registry.snapshot();
    let mut held = BTreeMap::new();
    for holder in holders {
        let Ok((_, container)) = snapshot.container(holder) else { continue };
        let paths = node.cgroups.container_paths(&container.cgroups_path, &container.id);
        let Ok(mut paths) = paths else { continue };
        let Some(group) = paths.v1.remove("hugetlb").or(paths.unified) else { continue };
        for (place, pages) in hugepages_held(&group, topology) {
            *held.entry(place).or_insert(0) += pages;
        }
    }
    held
}

/// The pools as they are, and what is granted of them. Blocks.
pub(super) fn observed(node: &Node) -> Result<(Vec<NodePool>, Grants)> {
    let topology = topology()?;
    let grants = node.hugepages.lock().clone();
    let held = held(node, grants.keys(), &topology);
    Ok((NodePool::observed(&topology, &held), grants))
}

/// Pages that a container's predecessors left in a volume of their pod: what the group above
/// it has in use and no living group in it has.
fn inherited(node: &Node, container: &str, cgroups_path: &str, size: PageSize) -> u64 {
    let Ok(mut paths) = node.cgroups.container_paths(cgroups_path, container) else { return 0 };
    let Some(group) = paths.v1.remove("hugetlb").or(paths.unified) else { return 0 };
    group.parent().map_or(0, |pod| left_behind(pod, size))
}

/// Takes inherited pages off what is foreign: they are within the successor's grant already.
/// The kernel does not tell on which node they are, so only a demand that leaves no choice
/// has them.
fn own_again(pools: &mut [NodePool], demand: &HugepageDemand, inherited: u64) {
    let Some(nodes) = demand.nodes.as_ref().filter(|nodes| nodes.len() == 1) else { return };
    for pool in pools.iter_mut().filter(|p| p.size == demand.size && nodes.contains(p.node)) {
        pool.foreign = pool.foreign.saturating_sub(inherited.min(demand.pages));
    }
}

/// Grants what a container demands and commits it with `begin`, its intent.
pub(crate) async fn reserve<T: Send + 'static>(
    node: &std::sync::Arc<Node>,
    container: &str,
    cgroups_path: &str,
    decision: &Decision,
    begin: impl FnOnce(&Tx) -> pinion_store::Result<T> + Send + 'static,
) -> Result<(T, Vec<Grant>)> {
    if decision.demands.is_empty() {
        return Ok((node.write(begin).await?, Vec::new()));
    }
    let (asker, id, asked) = (node.clone(), container.to_string(), decision.clone());
    let path = cgroups_path.to_owned();
    let ask = move || asker.hugepages.ask(&asker, &id, &path, &asked);
    let answer = crate::services::blocking(ask).await;
    let enforced =
        decision.contract.strict || node.config.isolation.hugepages == HugepagePolicy::Enforce;
    let granted = match answer {
        Ok(granted) => granted,
        Err(error) if error.kind() == Kind::Refused && !enforced => {
            tracing::warn!(container, error = %error.chain(), "hugepages are overcommitted");
            Vec::new()
        }
        Err(error) => return Err(error),
    };
    let (key, record) = (container.to_string(), granted.clone());
    let written = node
        .write(move |tx| {
            if !record.is_empty() {
                tx.put(GRANTS, &key, &record)?;
            }
            begin(tx)
        })
        .await;
    match written {
        Ok(result) => Ok((result, granted)),
        Err(error) => {
            node.hugepages.lock().remove(container);
            Err(error)
        }
    }
}

/// Moves a container's grants to the nodes its memory is to come from. Returns what it had,
/// for [`put_back`] if the move does not come about.
pub(crate) async fn regrant(
    node: &std::sync::Arc<Node>,
    container: &str,
    cgroups_path: &str,
    contract: &Contract,
) -> Result<Vec<Grant>> {
    let before = node.hugepages.of(container);
    let stays = |grant: &Grant| contract.mems.is_empty() || contract.mems.contains(grant.node);
    if before.iter().all(stays) {
        return Ok(before);
    }
    let demands = contract.hugepages.iter().cloned();
    let bound = demands.map(|d| HugepageDemand { nodes: Some(contract.mems.clone()), ..d });
    let mut decision = Decision::default();
    decision.demands.extend(bound);
    let (asker, id, path) = (node.clone(), container.to_owned(), cgroups_path.to_owned());
    let ask = move || asker.hugepages.ask(&asker, &id, &path, &decision);
    let granted = crate::services::blocking(ask).await?;
    store(node, container, granted).await?;
    Ok(before)
}

/// Takes over grants as they were.
pub(crate) async fn put_back(node: &Node, container: &str, grants: Vec<Grant>) -> Result<()> {
    if node.hugepages.of(container) == grants {
        return Ok(());
    }
    node.hugepages.lock().insert(container.to_owned(), grants.clone());
    store(node, container, grants).await
}

async fn store(node: &Node, container: &str, grants: Vec<Grant>) -> Result<()> {
    let key = container.to_owned();
    node.write(move |tx| tx.put(GRANTS, &key, &grants)).await
}

/// Mounts a hugetlbfs of its own for each size that the container may use: the smallest at `/dev/hugepages`, where applications look, the others beside it
/// with their size in the name. What is in it ends with the container.
pub(crate) fn add_mounts(
    demands: &[HugepageDemand],
    spec: &mut oci_spec::runtime::Spec,
) -> Result<()> {
    let user = spec.process().as_ref().map(|process| process.user().clone()).unwrap_or_default();
    let mut sizes: Vec<&HugepageDemand> = demands.iter().collect();
    sizes.sort_by_key(|demand| demand.size);
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for (index, demand) in sizes.into_iter().enumerate() {
        let bytes = demand.size.bytes();
        let at = match index {
            0 => "/dev/hugepages".to_string(),
            _ => format!("/dev/hugepages-{}", demand.size),
        };
        if mounts.iter().any(|mount| mount.destination() == std::path::Path::new(&at)) {
            continue; // the request has put something else there
        }
        let options = [
            "nosuid".to_string(),
            "nodev".to_string(),
            format!("pagesize={}K", bytes >> 10),
            format!("size={}", demand.pages.saturating_mul(bytes)),
            format!("uid={}", user.uid()),
            format!("gid={}", user.gid()),
            "mode=0770".to_string(),
        ];
        let mount = oci_spec::runtime::MountBuilder::default()
            .destination(at)
            .typ("hugetlbfs")
            .source("hugetlbfs")
            .options(options.to_vec())
            .build()
            .map_err(|error| Error::from_foreign(Kind::Internal, error))?;
        mounts.push(mount);
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

/// Gives a container's pages back. Quick when it has none: what the store knows is here.
pub(crate) async fn release(node: &Node, container: &str) -> Result<()> {
    if !node.hugepages.lock().contains_key(container) {
        return Ok(());
    }
    let key = container.to_string();
    node.write(move |tx| tx.delete(GRANTS, &key).map(drop)).await?;
    node.hugepages.lock().remove(container);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_owns_a_whole_pool_starts_again_beside_its_own_file() {
        let size: PageSize = "2MB".parse().unwrap();
        let pool = |node| NodePool { node, size, total: 32, foreign: 8 };
        let grant = |nodes: &str, inherited| {
            let nodes = Some(nodes.parse().unwrap());
            let demand = HugepageDemand { size, pages: 32, nodes };
            let mut pools = [pool(0), pool(1)];
            own_again(&mut pools, &demand, inherited);
            Ledger::new(pools).grant("next", &[demand], &pinion_topology::NodeSet::new())
        };
        assert!(grant("0", 0).is_err(), "somebody else's");
        assert!(grant("0", 8).is_ok());
        assert!(grant("0", 4).is_err());
        let both = grant("0-1", 8).unwrap();
        assert!(
            both.iter().all(|grant| grant.pages <= 24),
            "where they are is not known: {both:?}"
        );
    }

    #[test]
    fn every_size_gets_a_mount_bounded_by_its_limit() {
        let demand =
            |size: &str, pages| HugepageDemand { size: size.parse().unwrap(), pages, nodes: None };
        let demands = [demand("1GB", 2), demand("2MB", 64)];
        let mut spec = oci_spec::runtime::Spec::default();
        let before = spec.mounts().clone().unwrap().len();
        add_mounts(&demands, &mut spec).unwrap();
        let mounts = spec.mounts().clone().unwrap();
        let [small, large] = &mounts[before..] else { panic!("{mounts:?}") };
        assert_eq!(small.destination(), std::path::Path::new("/dev/hugepages"));
        assert_eq!(large.destination(), std::path::Path::new("/dev/hugepages-1GB"));
        let options = small.options().clone().unwrap();
        assert!(options.contains(&"pagesize=2048K".to_string()), "{options:?}");
        assert!(options.contains(&"size=134217728".to_string()), "{options:?}");
    }
}
