//! Keeping a partition: which files tell that it may be lost, the quick look that says
//! whether it is, and what a move to other nodes would do to huge pages.
//!
//! A partition is lost without an error anywhere: a group beside it takes its CPUs, somebody
//! rewrites a list above it, or a resize leaves it with other CPUs than asked. The kernel
//! signals a change of `cpuset.cpus.partition` (inotify, poll), and every write by a process
//! signals itself; what neither shows is found by the next full audit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pinion_topology::{CpuSet, Cpus, NodeSet, PageSize, Topology};

use crate::facts::PartitionState;
use crate::plan::is_quota;
use crate::{Host, Reason, Refusal, Subject, TermName, files};

const EXCLUSIVE: &str = "cpuset.cpus.exclusive";

/// The groups from the root's child to the container's own.
fn chain(root: &Path, leaf: &Path) -> Vec<PathBuf> {
    let below = leaf.ancestors().take_while(|dir| *dir != root && dir.starts_with(root));
    let mut dirs: Vec<PathBuf> = below.map(Path::to_owned).collect();
    dirs.reverse();
    dirs
}

/// The files whose modification may end the promise. Empty without partitions.
#[must_use]
pub fn watched(host: &Host, subject: &Subject) -> Vec<PathBuf> {
    let (Some(root), Some(leaf)) = (host.v2.as_deref(), subject.v2(host)) else {
        return Vec::new();
    };
    if subject.partition.is_none() {
        return Vec::new();
    }
    let mut found = Vec::new();
    for dir in chain(root, &leaf) {
        found.extend(["cpuset.cpus.partition", EXCLUSIVE].map(|name| dir.join(name)));
    }
    found.extend(["cpuset.cpus", "cpuset.mems", "cpu.max"].map(|name| leaf.join(name)));
    found.retain(|path| path.exists());
    found
}

/// Whether the partition is in force and nothing throttles it, by as few files as possible;
/// why not otherwise.
#[must_use]
pub fn lost(host: &Host, subject: &Subject) -> Option<Refusal> {
    let (root, leaf) = (host.v2.as_deref()?, subject.v2(host)?);
    let (kind, cpus) = (subject.partition?, subject.cpus.as_ref()?);
    let lost = |reason, detail| Some(Refusal::new(TermName::ExclusiveCpus, reason, detail));
    let path = leaf.join("cpuset.cpus.partition");
    let state = match files::read(&path) {
        Ok(Some(text)) => PartitionState::parse(&text),
        Ok(None) => return None, // the group is gone, and so is the promise
        Err(error) => {
            return lost(Reason::Unreadable, format!("{error}: {}", error.source));
        }
    };
    if state != PartitionState::Valid(kind) {
        let found = match state {
            PartitionState::Invalid(_, why) if why.is_empty() => "invalid".to_owned(),
            PartitionState::Invalid(_, why) => format!("invalid: {why}"),
            PartitionState::Valid(other) => other.to_string(),
            PartitionState::Member => "member".to_owned(),
        };
        let detail = format!("the partition of CPUs {cpus} is {found}, not {kind}");
        return lost(Reason::PartitionInvalid, detail);
    }
    let set = |path: &Path| files::read_set::<Cpus>(path).ok().flatten();
    let effective: CpuSet = set(&leaf.join("cpuset.cpus.effective")).unwrap_or_default();
    if effective != *cpus {
        let detail = format!("the container runs on CPUs {effective}, promised were {cpus}");
        return lost(Reason::EffectiveDiffers, detail);
    }
    for dir in chain(root, &leaf) {
        // In force all the same, but what comes next would end it.
        let Some(exclusive) = set(&dir.join(EXCLUSIVE)) else { continue };
        if !cpus.is_subset(&exclusive) {
            let detail = format!(
                "{} is {:?} and lacks CPUs {}",
                dir.join(EXCLUSIVE).display(),
                exclusive.to_string(),
                cpus.difference(&exclusive)
            );
            return lost(Reason::PartitionInvalid, detail);
        }
    }
    // The group of the workload is the one whose quota a partition lifts with its own.
    for dir in leaf.ancestors().take(2).filter(|dir| dir.starts_with(root)) {
        let quota = files::read(&dir.join("cpu.max")).ok().flatten();
        if let Some(quota) = quota.filter(|quota| is_quota(quota)) {
            let detail = format!("{} says {quota:?}", dir.join("cpu.max").display());
            return Some(Refusal::new(TermName::NoThrottling, Reason::Quota, detail));
        }
    }
    None
}

/// Whether huge pages held elsewhere fit on the nodes a container is to move to. The kernel
/// would move them whatever the pools there have, by moving pool pages along (seen on 6.12),
/// and every account of the pools would be wrong from then on.
#[must_use]
pub fn moves_hugepages(
    held: &BTreeMap<(u32, PageSize), u64>,
    topology: &Topology,
    mems: &NodeSet,
) -> Option<Refusal> {
    let mut moving: BTreeMap<PageSize, u64> = BTreeMap::new();
    for (&(node, size), &pages) in held {
        if !mems.contains(node) {
            *moving.entry(size).or_default() += pages;
        }
    }
    for (size, pages) in moving {
        let free: u64 =
            mems.iter().filter_map(|node| topology.pool(node, size)).map(|pool| pool.free).sum();
        if pages > free {
            let detail = format!(
                "{pages} pages of {size} in use would move to nodes {mems}, where {free} are \
                 free; free some there or raise nr_hugepages first"
            );
            return Some(Refusal::new(TermName::Hugepages, Reason::PoolExhausted, detail));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PartitionKind;
    use crate::testtree::{Tree, relative};

    fn subject() -> Subject {
        Subject {
            cgroup: relative("k/b/p1/c1"),
            cpus: Some("2-3".parse().unwrap()),
            partition: Some(PartitionKind::Isolated),
            ..Subject::default()
        }
    }

    fn in_force() -> Tree {
        let tree = Tree::with_groups();
        for dir in ["k", "k/b", "k/b/p1", "k/b/p1/c1"] {
            tree.file(&format!("cgroup/{dir}/cpuset.cpus.exclusive"), "2-3,6");
        }
        tree.file("cgroup/k/b/p1/c1/cpuset.cpus.exclusive", "2-3");
        tree.file("cgroup/k/b/p1/c1/cpuset.cpus.partition", "isolated");
        tree.file("cgroup/k/b/p1/c1/cpuset.cpus.effective", "2-3");
        tree
    }

    #[test]
    fn a_partition_in_force_is_not_lost_and_every_fault_is_named() {
        let tree = in_force();
        let look = |tree: &Tree| lost(&tree.host("6.12"), &subject());
        assert_eq!(look(&tree), None);
        for (file, text, word) in [
            (
                "k/b/p1/c1/cpuset.cpus.partition",
                "isolated invalid (Parent is not)",
                "Parent is not",
            ),
            ("k/b/p1/c1/cpuset.cpus.partition", "member", "member"),
            ("k/b/p1/c1/cpuset.cpus.effective", "2", "runs on CPUs 2,"),
            ("k/b/cpuset.cpus.exclusive", "3,6", "lacks CPUs 2"),
            ("k/b/p1/cpu.max", "200000 100000", "200000"),
            ("k/cpuset.cpus.exclusive", "", "lacks CPUs 2-3"),
        ] {
            let tree = in_force();
            tree.file(&format!("cgroup/{file}"), text);
            let found = look(&tree).unwrap().to_string();
            assert!(found.contains(word), "{found}");
        }
    }

    #[test]
    fn the_files_of_the_whole_way_down_are_watched() {
        let tree = in_force();
        let watched = watched(&tree.host("6.12"), &subject());
        assert_eq!(watched.len(), 4 * 2 + 3);
        assert!(watched.contains(&tree.path("cgroup/k/cpuset.cpus.exclusive")));
        assert!(watched.contains(&tree.path("cgroup/k/b/p1/c1/cpuset.cpus")));
        let shared = Subject { partition: None, ..subject() };
        assert!(super::watched(&tree.host("6.12"), &shared).is_empty());
    }

    #[test]
    fn pages_in_use_need_room_where_they_go() {
        let tree = Tree::with_machine();
        let topology = Topology::read_from(&tree.host("6.12").root).unwrap();
        let size: PageSize = "2MB".parse().unwrap();
        let moving = |pages, mems: &str| {
            let held = BTreeMap::from([((0, size), pages)]);
            moves_hugepages(&held, &topology, &mems.parse().unwrap())
        };
        assert_eq!(moving(64, "1"), None);
        assert_eq!(moving(100, "0-1"), None, "they may stay");
        let refusal = moving(65, "1").unwrap();
        assert_eq!(refusal.reason, Reason::PoolExhausted);
        assert!(refusal.detail.contains("65 pages of 2MB") && refusal.detail.contains("64 are"));
    }
}
