//! What the kernel says, read by the test itself: a receipt is believed only when these
//! files agree with it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use pinion_topology::{CpuSet, Topology};

use crate::error::{During, Error, Result};

const CGROUPS: &str = "/sys/fs/cgroup";

/// The machine.
pub(crate) fn topology() -> Result<Topology> {
    Topology::read().map_err(|error| Error::check(format!("read the topology: {error}")))
}

/// The 2 MiB pages of a NUMA node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pool {
    /// All of them.
    pub(crate) total: u64,
    /// Those nobody has touched.
    pub(crate) free: u64,
}

/// The pool of a NUMA node.
pub(crate) fn hugepages(node: u32) -> Result<Pool> {
    let dir = format!("/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB");
    let read = |file: &str| number(&Path::new(&dir).join(file));
    Ok(Pool { total: read("nr_hugepages")?, free: read("free_hugepages")? })
}

/// Free 2 MiB pages of a NUMA node.
pub(crate) fn free_hugepages(node: u32) -> Result<u64> {
    hugepages(node).map(|pool| pool.free)
}

/// A file with one number in it.
fn number(path: &Path) -> Result<u64> {
    let text = line(path)?;
    text.parse::<u64>()
        .map_err(|error| Error::check(format!("{}: {text:?}: {error}", path.display())))
}

/// A file's content without the line end.
pub(crate) fn line(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).during(|| format!("read {}", path.display()))?;
    Ok(text.trim().to_owned())
}

/// The cgroup v2 directory of a process.
pub(crate) fn cgroup_of(pid: u32) -> Result<PathBuf> {
    let table = line(Path::new(&format!("/proc/{pid}/cgroup")))?;
    table
        .lines()
        .find_map(|entry| entry.strip_prefix("0::/"))
        .map(|relative| Path::new(CGROUPS).join(relative))
        .ok_or_else(|| Error::check(format!("process {pid} is in no v2 cgroup: {table}")))
}

/// The CPUs of all valid isolated partitions.
pub(crate) fn isolated_cpus() -> Result<String> {
    line(&Path::new(CGROUPS).join("cpuset.cpus.isolated"))
}

/// Scheduling domains of each CPU. None means that the load balancer never looks at it.
pub(crate) fn scheduling_domains() -> Result<BTreeMap<u32, usize>> {
    Ok(domains_in(&line(Path::new("/proc/schedstat"))?))
}

fn domains_in(schedstat: &str) -> BTreeMap<u32, usize> {
    let mut domains = BTreeMap::new();
    let mut cpu = None;
    for row in schedstat.lines() {
        let word = row.split_whitespace().next().unwrap_or_default();
        if let Some(id) = word.strip_prefix("cpu").and_then(|id| id.parse().ok()) {
            cpu = Some(id);
            domains.insert(id, 0);
        } else if word.starts_with("domain")
            && let Some(count) = cpu.and_then(|id| domains.get_mut(&id))
        {
            *count += 1;
        }
    }
    domains
}

/// The numbers of all interrupts.
pub(crate) fn interrupts() -> Vec<u32> {
    let listing = fs::read_dir("/proc/irq").into_iter().flatten().flatten();
    let mut irqs: Vec<u32> =
        listing.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    irqs.sort_unstable();
    irqs
}

/// How often each device interrupt has occurred on the CPUs, by its number.
pub(crate) fn interrupt_counts(cpus: &CpuSet) -> Result<BTreeMap<u32, u64>> {
    Ok(counts_in(&line(Path::new("/proc/interrupts"))?, cpus))
}

fn counts_in(table: &str, cpus: &CpuSet) -> BTreeMap<u32, u64> {
    let mut rows = table.lines();
    let heads = rows.next().unwrap_or_default().split_whitespace();
    let columns: Vec<u32> =
        heads.filter_map(|word| word.strip_prefix("CPU")?.parse().ok()).collect();
    let count = |row: &str| -> Option<(u32, u64)> {
        let (irq, rest) = row.split_once(':')?;
        let counts = columns.iter().zip(rest.split_whitespace());
        let own = counts.filter(|(cpu, _)| cpus.contains(**cpu));
        Some((irq.trim().parse().ok()?, own.filter_map(|(_, n)| n.parse::<u64>().ok()).sum()))
    };
    rows.filter_map(count).collect()
}

/// Nanoseconds in which tasks ran on each of the CPUs (`/proc/schedstat`, seventh number).
pub(crate) fn cpu_times(cpus: &CpuSet) -> Result<BTreeMap<u32, u64>> {
    let text = line(Path::new("/proc/schedstat"))?;
    let time = |row: &str| -> Option<(u32, u64)> {
        let mut words = row.split_whitespace();
        let cpu = words.next()?.strip_prefix("cpu")?.parse().ok()?;
        Some((cpu, words.nth(6)?.parse().ok()?))
    };
    Ok(text.lines().filter_map(time).filter(|(cpu, _)| cpus.contains(*cpu)).collect())
}

/// A list from a process's status, such as `Cpus_allowed_list`.
pub(crate) fn status_list(pid: u32, key: &str) -> Result<String> {
    let status = line(Path::new(&format!("/proc/{pid}/status")))?;
    status
        .lines()
        .find_map(|row| row.strip_prefix(key)?.strip_prefix(':'))
        .map(|value| value.trim().to_owned())
        .ok_or_else(|| Error::check(format!("/proc/{pid}/status has no {key}")))
}

/// The same as a set.
pub(crate) fn allowed_cpus(pid: u32) -> Result<CpuSet> {
    let text = status_list(pid, "Cpus_allowed_list")?;
    text.parse().map_err(|error| Error::check(format!("{text:?}: {error}")))
}

/// Mapped 2 MiB pages of a process by NUMA node.
pub(crate) fn mapped_hugepages(pid: u32) -> Result<BTreeMap<u32, u64>> {
    Ok(hugepages_in(&line(Path::new(&format!("/proc/{pid}/numa_maps")))?))
}

fn hugepages_in(numa_maps: &str) -> BTreeMap<u32, u64> {
    let mut pages = BTreeMap::new();
    for row in numa_maps.lines().filter(|row| row.ends_with("kernelpagesize_kB=2048")) {
        for word in row.split_whitespace() {
            let entry = word.strip_prefix('N').and_then(|word| word.split_once('='));
            let parsed = entry
                .and_then(|(node, count)| Some((node.parse().ok()?, count.parse::<u64>().ok()?)));
            if let Some((node, count)) = parsed {
                *pages.entry(node).or_default() += count;
            }
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_isolated_cpu_has_no_domain_lines() {
        let text =
            "version 17\ncpu0 0 0\ndomain0 MC 3 0\ndomain1 NUMA f\ncpu1 0 0\ncpu2 1\ndomain0 MC";
        assert_eq!(domains_in(text), BTreeMap::from([(0, 2), (1, 0), (2, 1)]));
    }

    #[test]
    fn interrupts_are_counted_on_the_cpus_asked_for() {
        let table =
            "      CPU0 CPU4 CPU5\n 1: 5 6 7 IO-APIC i8042\nLOC: 9 9 9 Local\n24: 1 0 2 PCI-MSI x";
        let counts = counts_in(table, &"4-5".parse().unwrap());
        assert_eq!(counts, BTreeMap::from([(1, 13), (24, 2)]));
    }

    #[test]
    fn only_huge_mappings_count_and_by_node() {
        let text = "7f00 default anon=3 N0=3 kernelpagesize_kB=4\n\
                    7f40 bind:1 file=/anon_hugepage\\040(deleted) huge anon=64 dirty=64 N1=64 kernelpagesize_kB=2048\n\
                    7f80 default huge anon=2 N0=1 N1=1 kernelpagesize_kB=2048";
        assert_eq!(hugepages_in(text), BTreeMap::from([(0, 1), (1, 65)]));
    }
}
