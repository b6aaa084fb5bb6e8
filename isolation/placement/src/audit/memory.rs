//! Memory locality: the nodes a container may use, and where its memory lies.

use std::collections::BTreeMap;

use pinion_topology::{NodeSet, Topology};

use super::Subject;
use crate::{Host, Reason, Term, TermName, files};

pub(super) fn locality(host: &Host, subject: &Subject, topology: &Topology) -> Term {
    let cpus = subject.cpus.clone().unwrap_or_else(|| topology.online.clone());
    let local = topology.nodes_of(&cpus).intersection(&topology.memory_nodes());
    let asked = match (&subject.mems, subject.partition) {
        (Some(mems), _) => Some(format!("memory of nodes {mems} for CPUs {cpus}")),
        (None, Some(_)) => Some(format!("memory of nodes {local}, where CPUs {cpus} are")),
        (None, None) => None,
    };
    let mut term = Term::new(TermName::MemoryLocality, asked);
    term.note("nodes of the CPUs", local.to_string());
    let effective = match (subject.v2(host), subject.v1.get("cpuset")) {
        (Some(dir), _) => Some(dir.join("cpuset.mems.effective")),
        (None, Some(dir)) => Some(dir.join("cpuset.effective_mems")),
        (None, None) => None,
    };
    let read = effective.map(|path| files::read_set::<pinion_topology::Nodes>(&path));
    let effective: NodeSet = match read {
        Some(Ok(Some(effective))) => effective,
        Some(Err(error)) => {
            term.fail(Reason::Unreadable, format!("{error}: {}", error.source));
            return term;
        }
        // Without a cpuset a task may use every node.
        None | Some(Ok(None)) => topology.memory_nodes(),
    };
    term.note("cpuset.mems.effective", effective.to_string());
    if let Some(mems) = subject.mems.as_ref().filter(|mems| **mems != effective) {
        let detail = format!("memory nodes in force are {effective}, asked were {mems}");
        term.fail(Reason::EffectiveDiffers, detail);
    }
    let remote = effective.difference(&local);
    if !remote.is_empty() {
        let detail = format!(
            "memory may come from nodes {remote}, and the CPUs are on nodes {local}; set \
             cpuset.mems to {local}"
        );
        term.fail(Reason::MemoryNotLocal, detail);
    }
    residency(&mut term, host, subject);
    term
}

/// Where the memory lies now: information, since pages shared with others (libraries, page
/// cache) keep the node of whoever touched them first.
fn residency(term: &mut Term, host: &Host, subject: &Subject) {
    if let Some(dir) = subject.v2(host) {
        let stat = files::read(&dir.join("memory.numa_stat")).ok().flatten().unwrap_or_default();
        for name in ["anon", "file"] {
            let line = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.into_iter().for_each(|line| term.note(format!("memory.numa_stat {name}"), line));
        }
    }
    if let Some(pid) = subject.pid {
        let path = host.proc().join(format!("{pid}/numa_maps"));
        if let Ok(Some(text)) = files::read(&path) {
            let bytes = residents(&text);
            let shown: Vec<String> =
                bytes.iter().map(|((kind, node), kib)| format!("{kind} N{node}={kib}kB")).collect();
            term.note(format!("numa_maps of {pid}"), shown.join(" "));
        }
    }
}

/// KiB by kind (`anon`, `file`, `huge`) and node, summed over `numa_maps` (numa(7)).
pub(super) fn residents(text: &str) -> BTreeMap<(&'static str, u32), u64> {
    let mut sums = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().skip(2).collect();
        let size = words.iter().find_map(|word| word.strip_prefix("kernelpagesize_kB="));
        let kib: u64 = size.and_then(|size| size.parse().ok()).unwrap_or(4);
        let kind = if words.contains(&"huge") {
            "huge"
        } else if words.iter().any(|word| word.starts_with("anon=")) {
            "anon"
        } else {
            "file"
        };
        for word in words {
            let pages = word.strip_prefix('N').and_then(|word| word.split_once('='));
            let pages =
                pages.and_then(|(node, pages)| Some((node.parse().ok()?, pages.parse().ok()?)));
            let Some((node, pages)): Option<(u32, u64)> = pages else { continue };
            let sum: &mut u64 = sums.entry((kind, node)).or_default();
            *sum = sum.saturating_add(pages.saturating_mul(kib));
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn residents_are_summed_by_kind_and_node() {
        let text = "\
00400000 prefer:1 file=/bin/app mapped=3 N0=2 N1=1 kernelpagesize_kB=4
7f0000000000 bind:1 anon=16 dirty=16 N1=16 kernelpagesize_kB=4
7f1000000000 bind:1 file=/anon_hugepage\\040(deleted) huge anon=8 dirty=8 N1=8 kernelpagesize_kB=2048
7ffc00000000 default stack anon=1 dirty=1 N0=1 kernelpagesize_kB=4";
        let expected = [
            (("anon", 0), 4),
            (("anon", 1), 64),
            (("file", 0), 8),
            (("file", 1), 4),
            (("huge", 1), 16384),
        ];
        assert_eq!(residents(text), BTreeMap::from(expected));
    }
}
