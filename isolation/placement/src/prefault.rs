//! The hugepage proof: touch every granted page from inside the container's groups.
//!
//! The pages are released again when the proof ends; from then on the hugetlb limits of the
//! other containers and the ledger keep them for this one. Pages that the container already
//! has in use need no proof, and its limits would leave no room for one.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::path::PathBuf;
use std::time::Duration;

use pinion_sys::mempolicy::{Demand, Proof, ProveError, Step, prove};
use pinion_topology::{PageSize, Topology};

use crate::audit::{held_of, reserved};
use crate::room::left_by_predecessors;
use crate::{Grant, Host, Reason, Refusal, Target, TermName, files};

/// Clearing memory runs at some GiB per second; the rest is for slow machines.
const BASE: Duration = Duration::from_secs(10);
const PER_GIB: Duration = Duration::from_secs(15);

/// Proves the grants, all held at once, from inside the container's groups. Returns a line
/// of evidence per grant that has pages left to prove.
pub fn prefault(host: &Host, target: &Target, grants: &[Grant]) -> Result<Vec<String>, Refusal> {
    let grants = unproven(host, target, grants);
    if grants.is_empty() {
        return Ok(Vec::new());
    }
    let demands: Vec<Demand> = grants
        .iter()
        .map(|grant| Demand { node: grant.node, page_size: grant.size.bytes(), pages: grant.pages })
        .collect();
    let bytes = grants.iter().map(|grant| grant.pages.saturating_mul(grant.size.bytes()));
    let gib = bytes.fold(0, u64::saturating_add) >> 30;
    let deadline = BASE + PER_GIB * u32::try_from(gib).unwrap_or(u32::MAX >> 8);
    let (paths, entrances) = entrances(host, target)?;
    let proofs = prove(&entrances, &demands, deadline)
        .map_err(|error| refusal(host, target, &grants, &paths, &error))?;
    grants.iter().zip(proofs).map(|(grant, proof)| judge(grant, &proof)).collect()
}

/// What of the grants the container neither holds, nor has mapped, nor was left by a
/// predecessor in a file that both share.
fn unproven(host: &Host, target: &Target, grants: &[Grant]) -> Vec<Grant> {
    let v1 = || Some((host.v1.get("hugetlb")?.clone(), target.v1.get("hugetlb")?.clone()));
    let v2 = || {
        let (root, cgroup) = (host.v2.clone()?, target.cgroup.as_ref()?);
        let group = root.join(cgroup.strip_prefix("/").unwrap_or(cgroup));
        Some((root, group))
    };
    let Some((root, group)) = v1().or_else(v2) else { return grants.to_vec() };
    let held: BTreeMap<PageSize, BTreeMap<u32, u64>> =
        grants.iter().map(|grant| (grant.size, held_of(&group, grant.size))).collect();
    let on_node = |grant: &Grant| held[&grant.size].get(&grant.node).copied().unwrap_or(0);
    let mut left: Vec<Grant> = grants
        .iter()
        .map(|grant| Grant { pages: grant.pages.saturating_sub(on_node(grant)), ..*grant })
        .collect();
    for (&size, held) in &held {
        // of these it is not known on which node they will lie, or do
        let mapped = reserved(&group, size).saturating_sub(held.values().sum());
        take(&mut left, size, mapped);
        let wanted = left.iter().filter(|grant| grant.size == size).map(|grant| grant.pages).sum();
        take(&mut left, size, left_by_predecessors(&root, &group, size, wanted));
    }
    left.retain(|grant| grant.pages > 0);
    left
}

/// Takes pages of one size off the grants.
fn take(grants: &mut [Grant], size: PageSize, mut pages: u64) {
    for grant in grants.iter_mut().filter(|grant| grant.size == size) {
        let taken = grant.pages.min(pages);
        grant.pages -= taken;
        pages -= taken;
    }
}

fn judge(grant: &Grant, proof: &Proof) -> Result<String, Refusal> {
    let here = |(node, pages): &&(u32, u64)| (*node, *pages) == (grant.node, grant.pages);
    let found: Vec<String> =
        proof.found.iter().map(|(node, pages)| format!("N{node}={pages}")).collect();
    let evidence = format!(
        "{} pages of {} for node {}: {}",
        grant.pages,
        grant.size,
        grant.node,
        found.join(" ")
    );
    match proof.found.as_slice() {
        [only] if here(&only) => Ok(evidence),
        _ => {
            let detail = format!("touched {evidence}");
            Err(Refusal::new(TermName::Hugepages, Reason::PagesElsewhere, detail))
        }
    }
}

/// The files by which a process enters the container's groups: of v1 only the controllers
/// that matter to huge pages.
fn entrances(host: &Host, target: &Target) -> Result<(Vec<PathBuf>, Vec<File>), Refusal> {
    let mut paths: Vec<PathBuf> = ["cpuset", "hugetlb"]
        .into_iter()
        .filter_map(|controller| Some(target.v1.get(controller)?.join("tasks")))
        .collect();
    paths.dedup(); // both controllers may be mounted together
    if let (Some(root), Some(cgroup)) = (&host.v2, &target.cgroup) {
        let dir = root.join(cgroup.strip_prefix("/").unwrap_or(cgroup));
        paths.push(dir.join("cgroup.procs"));
    }
    let mut files = Vec::with_capacity(paths.len());
    for path in &paths {
        let file = OpenOptions::new().write(true).open(path);
        files.push(file.map_err(|error| {
            let detail =
                format!("the container's group cannot be entered: {}: {error}", path.display());
            Refusal::new(TermName::Hugepages, Reason::ProofFailed, detail)
        })?);
    }
    Ok((paths, files))
}

/// Says what failed with the numbers that explain it.
fn refusal(
    host: &Host,
    target: &Target,
    grants: &[Grant],
    paths: &[PathBuf],
    error: &ProveError,
) -> Refusal {
    let because = std::error::Error::source(error).map(|cause| format!(": {cause}"));
    let mut detail = format!("{error}{}", because.unwrap_or_default());
    let mut reason = Reason::ProofFailed;
    match error {
        ProveError::Refused { index, step, .. } => {
            if let Some(grant) = grants.get(*index) {
                let (text, exhausted) = explain(host, target, grant, *step);
                reason = if exhausted { Reason::PoolExhausted } else { Reason::ProofFailed };
                detail = format!("{text} ({detail})");
            }
        }
        ProveError::Killed { index, .. } => {
            if let Some(grant) = grants.get(*index) {
                let (text, _) = explain(host, target, grant, Step::Populate);
                detail = format!("{text} ({detail})");
            }
        }
        ProveError::Join { index, .. } => {
            if let Some(path) = paths.get(*index) {
                detail = format!("{}: {detail}", path.display());
            }
        }
        ProveError::Setup { .. } | ProveError::Impossible(_) | ProveError::Timeout(_) => {}
    }
    Refusal::new(TermName::Hugepages, reason, detail)
}

/// The pool and the limits as they are now, and whether the pool explains the failure.
fn explain(host: &Host, target: &Target, grant: &Grant, step: Step) -> (String, bool) {
    let Grant { node, size, pages } = *grant;
    let topology = Topology::read_from(&host.root).ok();
    let pool = topology.as_ref().and_then(|topology| topology.pool(node, size)).copied();
    let reserved = topology
        .as_ref()
        .and_then(|topology| topology.hugepages.iter().find(|pool| pool.size == size)?.reserved);
    let mut text = match pool {
        Some(pool) => format!(
            "node {node} has {} pages of {size}, {} free, {pages} asked",
            pool.total, pool.free
        ),
        None => format!("node {node} has no pool of {size}, {pages} pages asked"),
    };
    if let Some(reserved) = reserved.filter(|reserved| *reserved > 0) {
        text.push_str(&format!(", {reserved} reserved by mappings anywhere on the machine"));
    }
    if step == Step::Bind {
        text.push_str(", and the container's cpuset.mems does not allow the node");
    }
    for limit in limits(host, target, grant) {
        text.push_str(&format!(", {limit}"));
    }
    let exhausted = step != Step::Bind && pool.is_none_or(|pool| pool.free < pages);
    (text, exhausted)
}

/// Both limits: the first bounds what may be touched, the second what may be mapped.
fn limits(host: &Host, target: &Target, grant: &Grant) -> Vec<String> {
    let v1 = target.v1.get("hugetlb").cloned();
    let v1 = v1.map(|dir| (dir, ["limit_in_bytes", "rsvd.limit_in_bytes"]));
    let v2 = host.v2.as_ref().zip(target.cgroup.as_ref());
    let v2 = v2.map(|(root, cgroup)| {
        (root.join(cgroup.strip_prefix("/").unwrap_or(cgroup)), ["max", "rsvd.max"])
    });
    let Some((dir, names)) = v1.or(v2) else { return Vec::new() };
    let limit = |name: &str| {
        let name = format!("hugetlb.{}.{name}", grant.size);
        let limit = files::read(&dir.join(&name)).ok().flatten()?;
        Some(format!("{name} is {limit}"))
    };
    names.into_iter().filter_map(limit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_must_all_lie_on_the_granted_node() {
        let grant = Grant { node: 1, size: "2MB".parse().unwrap(), pages: 4 };
        let evidence = judge(&grant, &Proof { found: vec![(1, 4)] }).unwrap();
        assert_eq!(evidence, "4 pages of 2MB for node 1: N1=4");
        for found in [vec![(1, 3), (0, 1)], vec![(0, 4)], vec![(1, 3)], vec![]] {
            let refusal = judge(&grant, &Proof { found }).unwrap_err();
            assert_eq!(refusal.reason, Reason::PagesElsewhere);
        }
    }

    #[test]
    fn without_groups_and_pages_the_refusal_has_the_numbers() {
        let tree = crate::testtree::Tree::with_machine();
        let grant = Grant { node: 0, size: "2MB".parse().unwrap(), pages: 1 << 20 };
        let refusal = prefault(&tree.host("6.12"), &Target::default(), &[grant]).unwrap_err();
        assert_eq!(refusal.reason, Reason::PoolExhausted);
        let start = "node 0 has 64 pages of 2MB, 64 free, 1048576 asked (map for 1048576 pages";
        assert!(refusal.detail.starts_with(start), "{}", refusal.detail);
    }

    #[test]
    fn a_group_that_is_gone_fails_the_proof_by_name() {
        let v1 = [("cpuset".to_owned(), PathBuf::from("/nowhere"))].into();
        let target = Target { v1, ..Target::default() };
        let grant = Grant { node: 0, size: "2MB".parse().unwrap(), pages: 1 };
        let host = crate::testtree::Tree::with_machine().host("6.12");
        let refusal = prefault(&host, &target, &[grant]).unwrap_err();
        assert_eq!(refusal.reason, Reason::ProofFailed);
        assert!(refusal.detail.contains("/nowhere/tasks"), "{}", refusal.detail);
    }

    #[test]
    fn pages_in_use_and_pages_mapped_are_not_asked_for_again() {
        let tree = crate::testtree::Tree::with_machine();
        let size: PageSize = "2MB".parse().unwrap();
        tree.file("cgroup/c/hugetlb.2MB.numa_stat", "total=33554432 N0=0 N1=33554432");
        tree.file("cgroup/c/hugetlb.2MB.rsvd.current", "50331648");
        let target = Target { cgroup: Some("c".into()), ..Target::default() };
        let host = tree.host("6.12");
        let grant = |node, pages| Grant { node, size, pages };
        // 16 pages in use on node 1, 8 more mapped anywhere
        let left = unproven(&host, &target, &[grant(1, 32), grant(0, 4)]);
        assert_eq!(left, [grant(1, 8), grant(0, 4)]);
        assert!(unproven(&host, &target, &[grant(1, 16)]).is_empty());
        let fresh = Target { cgroup: Some("new".into()), ..target };
        assert_eq!(unproven(&host, &fresh, &[grant(1, 32)]), [grant(1, 32)]);
    }
}
