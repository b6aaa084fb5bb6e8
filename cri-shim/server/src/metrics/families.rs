//! The table of metric families.

use std::collections::BTreeMap;

use pinion_cgroup::stats::{BlkioEntry, Hugetlb, Pressure};
use pinion_cri_proto::v1::MetricType::{Counter, Gauge};

use super::reading::Reading;
use super::{Family, Samples};
use crate::contract::infra::Usage;
use crate::contract::watch::History;
use crate::netdev::Interface;

/// Families of a container.
#[rustfmt::skip]
pub(super) const CONTAINER: &[Family<Reading>] = &[
    Family { name: "container_cpu_usage_seconds_total", help: "CPU time used, in seconds", kind: Counter, labels: &[], read: |r| one(seconds(r.stats.cpu.usage.total)) },
    Family { name: "container_cpu_user_seconds_total", help: "CPU time used in user mode, in seconds", kind: Counter, labels: &[], read: |r| one(seconds(r.stats.cpu.usage.user)) },
    Family { name: "container_cpu_system_seconds_total", help: "CPU time used in the kernel, in seconds", kind: Counter, labels: &[], read: |r| one(seconds(r.stats.cpu.usage.kernel)) },
    Family { name: "container_cpu_cfs_periods_total", help: "Periods of the CPU quota with something to run", kind: Counter, labels: &[], read: |r| one(r.stats.cpu.throttling.periods) },
    Family { name: "container_cpu_cfs_throttled_periods_total", help: "Periods in which the CPU quota ran out", kind: Counter, labels: &[], read: |r| one(r.stats.cpu.throttling.throttled_periods) },
    Family { name: "container_cpu_cfs_throttled_seconds_total", help: "Time spent throttled by the CPU quota, in seconds", kind: Counter, labels: &[], read: |r| one(seconds(r.stats.cpu.throttling.throttled_time)) },
    Family { name: "container_pressure_cpu_waiting_seconds_total", help: "Time in which some task waited for a CPU, in seconds", kind: Counter, labels: &[], read: |r| some(&r.stats.cpu.psi) },
    Family { name: "container_pressure_cpu_stalled_seconds_total", help: "Time in which all tasks waited for a CPU, in seconds", kind: Counter, labels: &[], read: |r| full(&r.stats.cpu.psi) },
    Family { name: "container_pressure_memory_waiting_seconds_total", help: "Time in which some task waited for memory, in seconds", kind: Counter, labels: &[], read: |r| some(&r.stats.memory.psi) },
    Family { name: "container_pressure_memory_stalled_seconds_total", help: "Time in which all tasks waited for memory, in seconds", kind: Counter, labels: &[], read: |r| full(&r.stats.memory.psi) },
    Family { name: "container_pressure_io_waiting_seconds_total", help: "Time in which some task waited for block devices, in seconds", kind: Counter, labels: &[], read: |r| some(&r.stats.blkio.psi) },
    Family { name: "container_pressure_io_stalled_seconds_total", help: "Time in which all tasks waited for block devices, in seconds", kind: Counter, labels: &[], read: |r| full(&r.stats.blkio.psi) },
    Family { name: "container_memory_usage_bytes", help: "Memory in use, page cache included, in bytes", kind: Gauge, labels: &[], read: |r| one(r.stats.memory.usage.usage) },
    Family { name: "container_memory_max_usage_bytes", help: "Most memory ever in use, in bytes", kind: Gauge, labels: &[], read: |r| one(r.stats.memory.usage.max) },
    Family { name: "container_memory_working_set_bytes", help: "Memory that cannot be reclaimed at once, in bytes", kind: Gauge, labels: &[], read: |r| one(r.stats.memory.usage.usage.saturating_sub(stat(r, &["total_inactive_file", "inactive_file"]))) },
    Family { name: "container_memory_cache", help: "Page cache, in bytes", kind: Gauge, labels: &[], read: |r| one(r.stats.memory.cache) },
    Family { name: "container_memory_rss", help: "Anonymous memory, in bytes", kind: Gauge, labels: &[], read: |r| one(stat(r, &["total_rss", "rss", "anon"])) },
    Family { name: "container_memory_mapped_file", help: "Mapped files, in bytes", kind: Gauge, labels: &[], read: |r| one(stat(r, &["total_mapped_file", "mapped_file", "file_mapped"])) },
    Family { name: "container_memory_kernel_usage", help: "Kernel memory, in bytes", kind: Gauge, labels: &[], read: |r| one(r.stats.memory.kernel.usage.max(stat(r, &["kernel"]))) },
    Family { name: "container_memory_swap", help: "Swap in use, in bytes", kind: Gauge, labels: &[], read: |r| one(r.stats.memory.swap.usage.saturating_sub(r.stats.memory.usage.usage)) },
    Family { name: "container_memory_failcnt", help: "How often the memory limit was hit", kind: Counter, labels: &[], read: |r| one(r.stats.memory.usage.failcnt) },
    Family { name: "container_memory_failures_total", help: "Page faults", kind: Counter, labels: &["failure_type", "scope"], read: |r| faults(r) },
    Family { name: "container_oom_events_total", help: "Processes killed for want of memory", kind: Counter, labels: &[], read: |r| one(r.oom_kills) },
    Family { name: "container_hugetlb_usage_bytes", help: "Hugepages in use, in bytes", kind: Gauge, labels: &["pagesize"], read: |r| hugetlb(r, |h| h.usage) },
    Family { name: "container_hugetlb_max_usage_bytes", help: "Most hugepages ever in use, in bytes", kind: Gauge, labels: &["pagesize"], read: |r| hugetlb(r, |h| h.max) },
    Family { name: "container_hugetlb_numa_usage_bytes", help: "Hugepages in use by NUMA node, in bytes; the node is empty where the kernel does not say (cgroup v1)", kind: Gauge, labels: &["pagesize", "numa_node"], read: |r| hugetlb_by_node(&r.stats.hugetlb) },
    Family { name: "container_blkio_device_usage_total", help: "Bytes read and written by device", kind: Counter, labels: &["device", "major", "minor", "operation"], read: |r| devices(r) },
    Family { name: "container_fs_reads_bytes_total", help: "Bytes read by device", kind: Counter, labels: &["device"], read: |r| io(&r.stats.blkio.io_service_bytes_recursive, "Read") },
    Family { name: "container_fs_reads_total", help: "Requests by device: reads", kind: Counter, labels: &["device"], read: |r| io(&r.stats.blkio.io_serviced_recursive, "Read") },
    Family { name: "container_fs_writes_bytes_total", help: "Bytes written by device", kind: Counter, labels: &["device"], read: |r| io(&r.stats.blkio.io_service_bytes_recursive, "Write") },
    Family { name: "container_fs_writes_total", help: "Requests by device: writes", kind: Counter, labels: &["device"], read: |r| io(&r.stats.blkio.io_serviced_recursive, "Write") },
    Family { name: "container_fs_usage_bytes", help: "Use of the writable layer, in bytes", kind: Gauge, labels: &["device"], read: |r| layer(r.disk.bytes) },
    Family { name: "container_fs_limit_bytes", help: "Size of the file system of writable layers, in bytes", kind: Gauge, labels: &["device"], read: |r| layer(r.filesystem.bytes) },
    Family { name: "container_fs_inodes_total", help: "Inodes of the file system of writable layers", kind: Gauge, labels: &["device"], read: |r| layer(r.filesystem.inodes) },
    Family { name: "container_fs_inodes_free", help: "Free inodes of the file system of writable layers", kind: Gauge, labels: &["device"], read: |r| layer(r.filesystem.inodes_free) },
    Family { name: "container_processes", help: "Processes", kind: Gauge, labels: &[], read: |r| one(r.processes.count) },
    Family { name: "container_threads", help: "Threads", kind: Gauge, labels: &[], read: |r| one(r.processes.threads.max(r.stats.pids.current)) },
    Family { name: "container_threads_max", help: "Most threads allowed, 0 without a limit", kind: Gauge, labels: &[], read: |r| one(r.stats.pids.limit) },
    Family { name: "container_file_descriptors", help: "Open file descriptors", kind: Gauge, labels: &[], read: |r| one(r.processes.descriptors) },
    Family { name: "container_sockets", help: "Open sockets", kind: Gauge, labels: &[], read: |r| one(r.processes.sockets) },
    Family { name: "container_ulimits_soft", help: "Soft limits of the first process", kind: Gauge, labels: &["ulimit"], read: |r| vec![(vec!["max_open_files".into()], r.processes.open_files)] },
    Family { name: "container_spec_cpu_period", help: "Period of the CPU quota, in microseconds", kind: Gauge, labels: &[], read: |r| one(positive(r.asked.cpu_period)) },
    Family { name: "container_spec_cpu_quota", help: "CPU quota, in microseconds for each period", kind: Gauge, labels: &[], read: |r| one(positive(r.asked.cpu_quota)) },
    Family { name: "container_spec_cpu_shares", help: "CPU shares", kind: Gauge, labels: &[], read: |r| one(positive(r.asked.cpu_shares)) },
    Family { name: "container_spec_memory_limit_bytes", help: "Memory limit, in bytes", kind: Gauge, labels: &[], read: |r| one(positive(r.asked.memory_limit_in_bytes)) },
    Family { name: "container_spec_memory_reservation_limit_bytes", help: "Memory reservation, in bytes", kind: Gauge, labels: &[], read: |_| one(0) },
    Family { name: "container_spec_memory_swap_limit_bytes", help: "Limit of memory and swap together, in bytes", kind: Gauge, labels: &[], read: |r| one(positive(r.asked.memory_swap_limit_in_bytes)) },
    Family { name: "pinion_container_isolation_in_force", help: "Whether exclusive CPUs are in force; 0 as well where none were promised", kind: Gauge, labels: &["promised"], read: |r| isolation(r, |i| u64::from(!i.missing)) },
    Family { name: "pinion_container_isolation_lost_total", help: "How often exclusive CPUs were lost", kind: Counter, labels: &["promised"], read: |r| isolation(r, |i| i.lost) },
    Family { name: "pinion_container_isolation_repaired_total", help: "How often lost exclusive CPUs were in force again", kind: Counter, labels: &["promised"], read: |r| isolation(r, |i| i.repaired) },
    Family { name: "pinion_container_isolation_repair_milliseconds", help: "Time from noticing the last loss to its repair, in milliseconds", kind: Gauge, labels: &["promised"], read: |r| isolation(r, |i| i.millis) },
    Family { name: "container_start_time_seconds", help: "Start, in seconds since the epoch", kind: Gauge, labels: &[], read: |r| one(r.started) },
    Family { name: "container_last_seen", help: "When this was read, in seconds since the epoch", kind: Gauge, labels: &[], read: |r| one(r.now) },
];

/// Families of a pod's infrastructure: its monitor and what that started.
#[rustfmt::skip]
pub(super) const INFRA: &[Family<Usage>] = &[
    Family { name: "pinion_pod_infra_cpu_microseconds_total", help: "CPU time of the pod's monitor and of what it started outside containers, in microseconds", kind: Counter, labels: &[], read: |u| one(u.cpu_nanoseconds / 1000) },
    Family { name: "pinion_pod_infra_memory_bytes", help: "Memory of the pod's monitor, shared pages by their share, in bytes", kind: Gauge, labels: &[], read: |u| one(u.memory_bytes) },
];

/// Families of a pod's network interface.
#[rustfmt::skip]
pub(super) const NETWORK: &[Family<Interface>] = &[
    Family { name: "container_network_receive_bytes_total", help: "Bytes received", kind: Counter, labels: &["interface"], read: |i| vec![(vec![i.name.clone()], i.rx.bytes)] },
    Family { name: "container_network_receive_packets_total", help: "Packets received", kind: Counter, labels: &["interface"], read: |i| vec![(vec![i.name.clone()], i.rx.packets)] },
    Family { name: "container_network_receive_packets_dropped_total", help: "Packets dropped that were to be received", kind: Counter, labels: &["interface"], read: |i| vec![(vec![i.name.clone()], i.rx.dropped)] },
    Family { name: "container_network_receive_errors_total", help: "Errors while packets were received", kind: Counter, labels: &["interface"], read: |i| vec![(vec![i.name.clone()], i.rx.errors)] },
    Family { name: "container_network_transmit_bytes_total", help: "Bytes sent", kind: Counter, labels: &["interface"], read: |i| vec![(vec![i.name.clone()], i.tx.bytes)] },
    Family { name: "container_network_transmit_packets_total", help: "Packets sent", kind: Counter, labels: &["interface"], read: |i| vec![(vec![i.name.clone()], i.tx.packets)] },
    Family { name: "container_network_transmit_packets_dropped_total", help: "Packets dropped that were to be sent", kind: Counter, labels: &["interface"], read: |i| vec![(vec![i.name.clone()], i.tx.dropped)] },
    Family { name: "container_network_transmit_errors_total", help: "Errors while packets were sent", kind: Counter, labels: &["interface"], read: |i| vec![(vec![i.name.clone()], i.tx.errors)] },
];

/// A number of an exclusive container's history. Others have a sample too, told apart by the
/// label: critest wants one of every family that is described.
fn isolation(reading: &Reading, of: fn(&History) -> u64) -> Samples {
    let (promised, value) = reading.isolation.as_ref().map_or(("no", 0), |i| ("yes", of(i)));
    vec![(vec![promised.into()], value)]
}

fn one(value: u64) -> Samples {
    vec![(Vec::new(), value)]
}

/// CRI's values are whole numbers.
fn seconds(nanoseconds: u64) -> u64 {
    nanoseconds / 1_000_000_000
}

/// A limit as asked for; none is 0.
fn positive(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

/// Seconds in which some task waited; the kernel counts microseconds.
fn some(pressure: &Option<Pressure>) -> Samples {
    pressure.as_ref().map(|p| (Vec::new(), p.some.total / 1_000_000)).into_iter().collect()
}

/// Seconds in which all tasks waited.
fn full(pressure: &Option<Pressure>) -> Samples {
    pressure.as_ref().map(|p| (Vec::new(), p.full.total / 1_000_000)).into_iter().collect()
}

/// The first of several names of a number in `memory.stat`: v1 hierarchical, v1, v2.
fn stat(reading: &Reading, names: &[&str]) -> u64 {
    let raw: &BTreeMap<String, u64> = &reading.stats.memory.raw;
    names.iter().find_map(|name| raw.get(*name)).copied().unwrap_or(0)
}

fn faults(reading: &Reading) -> Samples {
    let of = |kind: &str, scope: &str, names: &[&str]| {
        (vec![kind.to_string(), scope.to_string()], stat(reading, names))
    };
    vec![
        of("pgfault", "container", &["pgfault"]),
        of("pgmajfault", "container", &["pgmajfault"]),
        of("pgfault", "hierarchy", &["total_pgfault", "pgfault"]),
        of("pgmajfault", "hierarchy", &["total_pgmajfault", "pgmajfault"]),
    ]
}

fn hugetlb(reading: &Reading, of: fn(&Hugetlb) -> u64) -> Samples {
    reading.stats.hugetlb.iter().map(|(size, h)| (vec![size.clone()], of(h))).collect()
}

fn hugetlb_by_node(sizes: &BTreeMap<String, Hugetlb>) -> Samples {
    let mut samples = Vec::new();
    for (size, pages) in sizes {
        let split = pages.nodes.iter().map(|(node, bytes)| (node.to_string(), *bytes));
        let mut split: Vec<(String, u64)> = split.collect();
        if split.is_empty() {
            split.push((String::new(), pages.usage));
        }
        samples.extend(split.into_iter().map(|(node, bytes)| (vec![size.clone(), node], bytes)));
    }
    samples
}

fn device(entry: &BlkioEntry) -> String {
    format!("{}:{}", entry.major, entry.minor)
}

fn devices(reading: &Reading) -> Samples {
    let entries = &reading.stats.blkio.io_service_bytes_recursive;
    let sample = |e: &BlkioEntry| {
        let labels = vec![device(e), e.major.to_string(), e.minor.to_string(), e.op.clone()];
        (labels, e.value)
    };
    entries.iter().map(sample).collect()
}

fn io(entries: &[BlkioEntry], op: &str) -> Samples {
    let wanted = entries.iter().filter(|e| e.op.eq_ignore_ascii_case(op));
    wanted.map(|e| (vec![device(e)], e.value)).collect()
}

/// The writable layer has no device of its own.
fn layer(value: u64) -> Samples {
    vec![(vec![String::new()], value)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hugepages_are_told_by_node_where_the_kernel_splits_them() {
        let pages = |nodes: &[(u32, u64)]| {
            let nodes = nodes.iter().copied().collect();
            BTreeMap::from([("2MB".to_owned(), Hugetlb { usage: 6, nodes, ..Default::default() })])
        };
        let sample = |node: &str, bytes| (vec!["2MB".to_owned(), node.to_owned()], bytes);
        assert_eq!(hugetlb_by_node(&pages(&[(0, 4), (1, 2)])), [sample("0", 4), sample("1", 2)]);
        assert_eq!(hugetlb_by_node(&pages(&[])), [sample("", 6)]);
    }
}
