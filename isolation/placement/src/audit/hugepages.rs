//! Huge pages: limits, what is in use per node, and the pools.

use std::collections::BTreeMap;
use std::path::Path;

use pinion_topology::{PageSize, Topology};

use super::Subject;
use crate::{Host, Reason, Term, TermName, files};

/// Pages of a group in use, by node and size; empty where the controller or its file
/// (Linux 5.16) is missing. `group` is the group's directory.
///
/// `hugetlb.<size>.numa_stat` says how many, and on which node each was when it was touched:
/// Linux 6.12 does not change that when the pages move with `cpuset.mems`. So where the
/// processes' own maps account for every page, the maps say on which node it is.
#[must_use]
pub fn held(group: &Path, topology: &Topology) -> BTreeMap<(u32, PageSize), u64> {
    held_by(Path::new("/proc"), group, topology)
}

/// Pages of one size that a group has touched, by the node they were on then.
pub(crate) fn held_of(group: &Path, size: PageSize) -> BTreeMap<u32, u64> {
    let path = group.join(format!("hugetlb.{size}.numa_stat"));
    let text = files::read(&path).ok().flatten().unwrap_or_default();
    let used = by_node(&text).filter(|(_, bytes)| *bytes > 0);
    used.map(|(node, bytes)| (node, size.pages_in(bytes))).collect()
}

/// Pages of one size that a group has mapped, touched or not, wherever they will lie.
pub(crate) fn reserved(group: &Path, size: PageSize) -> u64 {
    let names = ["rsvd.current", "rsvd.usage_in_bytes"]; // v2, v1
    let read = |name| files::read(&group.join(format!("hugetlb.{size}.{name}"))).ok().flatten();
    let text = names.into_iter().find_map(read).unwrap_or_default();
    size.pages_in(text.parse().unwrap_or(0))
}

fn held_by(proc: &Path, group: &Path, topology: &Topology) -> BTreeMap<(u32, PageSize), u64> {
    let sizes = topology.hugepages.iter().map(|pool| pool.size);
    let mut held: BTreeMap<(u32, PageSize), u64> = sizes
        .flat_map(|size| held_of(group, size).into_iter().map(move |(n, p)| ((n, size), p)))
        .collect();
    let total = |pages: &BTreeMap<(u32, PageSize), u64>, size: PageSize| -> u64 {
        pages.iter().filter(|((_, of), _)| *of == size).map(|(_, pages)| pages).sum()
    };
    if held.is_empty() {
        return held;
    }
    let mapped = mapped(proc, group);
    for size in topology.hugepages.iter().map(|pool| pool.size) {
        if total(&mapped, size) == total(&held, size) {
            held.retain(|(_, of), _| *of != size);
            held.extend(mapped.iter().filter(|((_, of), _)| *of == size).map(|(k, v)| (*k, *v)));
        }
    }
    held
}

/// Huge pages that the processes of a group and of those below it have mapped. What several
/// of them share counts several times.
fn mapped(proc: &Path, group: &Path) -> BTreeMap<(u32, PageSize), u64> {
    let mut mapped = BTreeMap::new();
    let groups = files::directories(group);
    for dir in std::iter::once(group).chain(groups.iter().map(AsRef::as_ref)) {
        let list = files::read(&dir.join("cgroup.procs")).ok().flatten().unwrap_or_default();
        for pid in list.lines() {
            let path = proc.join(pid).join("numa_maps");
            let text = files::read(&path).ok().flatten().unwrap_or_default();
            for (place, pages) in huge_pages(&text) {
                *mapped.entry(place).or_default() += pages;
            }
        }
    }
    mapped
}

/// The pages of huge mappings in a `numa_maps` (numa(7)), by node and size.
fn huge_pages(text: &str) -> Vec<((u32, PageSize), u64)> {
    let mut pages = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let kib = words.iter().find_map(|word| word.strip_prefix("kernelpagesize_kB="));
        let kib = kib.and_then(|kib| kib.parse::<u64>().ok()).filter(|kib| *kib > 4);
        let size = kib.and_then(|kib| PageSize::from_bytes(kib << 10).ok());
        let Some(size) = size.filter(|_| words.contains(&"huge")) else { continue };
        for word in words {
            let entry = word.strip_prefix('N').and_then(|word| word.split_once('='));
            let entry = entry.and_then(|(node, n)| Some((node.parse().ok()?, n.parse().ok()?)));
            pages.extend(entry.map(|(node, count)| ((node, size), count)));
        }
    }
    pages
}

/// `total=6291456 N0=6291456 N1=0`; v1 adds a second, hierarchical line.
fn by_node(text: &str) -> impl Iterator<Item = (u32, u64)> + '_ {
    let words = text.lines().next().unwrap_or_default().split_whitespace();
    words.filter_map(|word| {
        let (node, bytes) = word.strip_prefix('N')?.split_once('=')?;
        Some((node.parse().ok()?, bytes.parse().ok()?))
    })
}

pub(super) fn term(host: &Host, subject: &Subject, topology: &Topology) -> Term {
    let limits = subject.hugepage_limits.iter().filter(|(_, bytes)| **bytes > 0);
    let mut wishes: Vec<String> = limits
        .map(|(size, bytes)| format!("at most {} pages of {size}", size.pages_in(*bytes)))
        .collect();
    let grant = |grant: &crate::Grant| {
        format!("{} pages of {} on node {}", grant.pages, grant.size, grant.node)
    };
    wishes.extend(subject.grants.iter().map(grant));
    let asked = (!wishes.is_empty()).then(|| wishes.join(", "));
    let mut term = Term::new(TermName::Hugepages, asked);
    for node in &topology.nodes {
        for pool in node.hugepages.iter().filter(|pool| pool.total > 0) {
            let state = format!("{} of {} free", pool.free, pool.total);
            term.note(format!("pool of node {}, {}", node.id, pool.size), state);
        }
    }
    let v2 = subject.v2(host).map(|dir| (dir, ["max", "rsvd.max"]));
    let v1 = subject.v1.get("hugetlb").cloned();
    let v1 = v1.map(|dir| (dir, ["limit_in_bytes", "rsvd.limit_in_bytes"]));
    match v1.or(v2) {
        Some((dir, files)) => inside(&mut term, host, subject, topology, &dir, files),
        None => missing(&mut term),
    }
    term
}

fn missing(term: &mut Term) {
    let detail = "no hugetlb controller reaches the container's group, so nothing limits or \
                  counts its huge pages";
    term.note("hugetlb controller", "absent");
    term.fail(Reason::NoHugetlbController, detail);
}

fn inside(
    term: &mut Term,
    host: &Host,
    subject: &Subject,
    topology: &Topology,
    dir: &Path,
    files: [&str; 2],
) {
    let mut sizes: Vec<PageSize> = topology.hugepages.iter().map(|pool| pool.size).collect();
    sizes.retain(|size| dir.join(format!("hugetlb.{size}.{}", files[0])).exists());
    if sizes.is_empty() {
        missing(term);
        return;
    }
    for (&size, &limit) in &subject.hugepage_limits {
        for file in files {
            limited(term, &dir.join(format!("hugetlb.{size}.{file}")), size, limit);
        }
    }
    for ((node, size), pages) in held_by(&host.proc(), dir, topology) {
        term.note(format!("in use on node {node}, {size}"), pages.to_string());
        let granted = subject.grants.iter().filter(|grant| grant.size == size);
        let nodes: Vec<u32> = granted.map(|grant| grant.node).collect();
        if !nodes.is_empty() && !nodes.contains(&node) {
            let detail = format!("{pages} pages of {size} lie on node {node}, granted: {nodes:?}");
            term.fail(Reason::PagesElsewhere, detail);
        }
    }
}

/// The kernel rounds limits down to whole pages.
fn limited(term: &mut Term, path: &Path, size: PageSize, limit: u64) {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let name = name.unwrap_or_default();
    match files::read(path) {
        Ok(Some(found)) => {
            term.note(&name, &found);
            let pages = found.parse().ok().map(|bytes| size.pages_in(bytes));
            if pages != Some(size.pages_in(limit)) {
                let detail = format!("{name} is {found}, asked was {limit}");
                term.fail(Reason::HugepageLimit, detail);
            }
        }
        Ok(None) => {
            term.fail(Reason::NoHugetlbController, format!("{} is missing", path.display()));
        }
        Err(error) => term.fail(Reason::Unreadable, format!("{error}: {}", error.source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_moved_are_where_the_maps_say_if_the_maps_have_them_all() {
        let tree = crate::testtree::Tree::with_machine();
        tree.file("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "128");
        let topology = Topology::read_from(&tree.path("")).unwrap();
        let size: PageSize = "2MB".parse().unwrap();
        tree.file("group/hugetlb.2MB.numa_stat", "total=16777216 N0=0 N1=16777216");
        tree.file("group/cgroup.procs", "7");
        let maps = |pages| {
            format!(
                "7f00 default anon=1 N1=1 kernelpagesize_kB=4\n7f40 bind:0 file=/anon_hugepage huge anon={pages} N0={pages} kernelpagesize_kB=2048"
            )
        };
        let held = || held_by(&tree.path("proc"), &tree.path("group"), &topology);
        tree.file("proc/7/numa_maps", &maps(8));
        assert_eq!(held(), BTreeMap::from([((0, size), 8)]));
        tree.file("proc/7/numa_maps", &maps(3));
        assert_eq!(held(), BTreeMap::from([((1, size), 8)]), "some are in no map");
    }

    #[test]
    fn only_the_first_line_of_a_numa_stat_counts() {
        let v1 = "total=4194304 N0=0 N1=4194304\nhierarchical_total=8388608 N0=4194304";
        assert_eq!(by_node(v1).collect::<Vec<_>>(), [(0, 0), (1, 4_194_304)]);
        assert_eq!(by_node("").count(), 0);
    }
}
