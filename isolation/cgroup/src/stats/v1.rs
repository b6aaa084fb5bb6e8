//! Statistics of a v1 cgroup, gathered from its directories in several hierarchies.

use std::collections::BTreeMap;
use std::path::Path;

use super::parse::{
    hugetlb_sizes, list, map, number, pids, pressure, rdma, text, v1_devices, value_of,
};
use super::{Blkio, Cpu, CpuUsage, Cpuset, Hugetlb, Memory, MemoryEntry, Rdma, Stats, Throttling};
use crate::Result;

/// `cpuacct.stat` counts in user-visible ticks, 100 per second on every architecture.
const NANOSECONDS_PER_TICK: u64 = 10_000_000;

/// Reads everything the given controllers count. A v2 directory beside them adds pressure,
/// and the controllers that live there.
pub(crate) fn read(directories: &BTreeMap<&str, &Path>, unified: Option<&Path>) -> Result<Stats> {
    let of = |controller: &str| directories.get(controller).copied();
    let mut stats = Stats::default();
    if let Some(directory) = of("cpuacct") {
        stats.cpu.usage = cpu_usage(directory)?;
    }
    if let Some(directory) = of("cpu") {
        stats.cpu = Cpu { throttling: throttling(directory)?, ..stats.cpu };
    }
    if let Some(directory) = of("cpuset") {
        stats.cpuset = Cpuset {
            cpus: list(directory, "cpuset.cpus")?,
            mems: list(directory, "cpuset.mems")?,
            partition: None,
        };
    }
    if let Some(directory) = of("memory") {
        stats.memory = memory(directory)?;
    }
    if let Some(directory) = of("pids") {
        stats.pids = pids(directory)?;
    }
    if let Some(directory) = of("blkio") {
        stats.blkio = blkio(directory)?;
    }
    if let Some(directory) = of("hugetlb") {
        stats.hugetlb = hugetlb(directory)?;
    }
    if let Some(directory) = of("rdma") {
        stats.rdma =
            Rdma { current: rdma(directory, "rdma.current")?, limit: rdma(directory, "rdma.max")? };
    }
    if let Some(unified) = unified {
        stats.cpu.psi = pressure(unified, "cpu.pressure")?;
        stats.memory.psi = pressure(unified, "memory.pressure")?;
        stats.blkio.psi = pressure(unified, "io.pressure")?;
        if of("hugetlb").is_none() {
            stats.hugetlb = super::v2::hugetlb(unified)?;
        }
    }
    Ok(stats)
}

fn cpu_usage(directory: &Path) -> Result<CpuUsage> {
    let stat = text(directory, "cpuacct.stat")?;
    let ticks = |key| value_of(&stat, key).unwrap_or(0) * NANOSECONDS_PER_TICK;
    let mut usage = CpuUsage {
        total: number(directory, "cpuacct.usage")?,
        kernel: ticks("system"),
        user: ticks("user"),
        ..CpuUsage::default()
    };
    // "cpu user system", one line per CPU after the heading.
    for line in text(directory, "cpuacct.usage_all")?.lines().skip(1) {
        let mut fields = line.split_whitespace().skip(1).map(|field| field.parse().unwrap_or(0));
        let (user, kernel) = (fields.next().unwrap_or(0), fields.next().unwrap_or(0));
        usage.percpu_user.push(user);
        usage.percpu_kernel.push(kernel);
    }
    let percpu = text(directory, "cpuacct.usage_percpu")?;
    usage.percpu = percpu.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    Ok(usage)
}

fn throttling(directory: &Path) -> Result<Throttling> {
    let stat = text(directory, "cpu.stat")?;
    let of = |key| value_of(&stat, key).unwrap_or(0);
    Ok(Throttling {
        periods: of("nr_periods"),
        throttled_periods: of("nr_throttled"),
        throttled_time: of("throttled_time"),
    })
}

fn memory(directory: &Path) -> Result<Memory> {
    let raw = map(&text(directory, "memory.stat")?);
    let entry = |kind: &str| -> Result<MemoryEntry> {
        let of = |suffix: &str| number(directory, &format!("{kind}.{suffix}"));
        Ok(MemoryEntry {
            limit: of("limit_in_bytes")?,
            usage: of("usage_in_bytes")?,
            max: of("max_usage_in_bytes")?,
            failcnt: of("failcnt")?,
        })
    };
    Ok(Memory {
        cache: raw.get("cache").copied().unwrap_or(0),
        usage: entry("memory")?,
        swap: entry("memory.memsw")?,
        kernel: entry("memory.kmem")?,
        kernel_tcp: entry("memory.kmem.tcp")?,
        raw,
        events: map(&text(directory, "memory.oom_control")?),
        psi: None,
    })
}

/// The throttle layer's counts exist whatever the I/O scheduler; BFQ's, where it runs, are
/// complete.
fn blkio(directory: &Path) -> Result<Blkio> {
    let first = |names: [&str; 3]| -> Result<_> {
        for name in names {
            let entries = v1_devices(&text(directory, name)?);
            if !entries.is_empty() {
                return Ok(entries);
            }
        }
        Ok(Vec::new())
    };
    Ok(Blkio {
        io_service_bytes_recursive: first([
            "blkio.bfq.io_service_bytes_recursive",
            "blkio.throttle.io_service_bytes_recursive",
            "blkio.throttle.io_service_bytes",
        ])?,
        io_serviced_recursive: first([
            "blkio.bfq.io_serviced_recursive",
            "blkio.throttle.io_serviced_recursive",
            "blkio.throttle.io_serviced",
        ])?,
        psi: None,
    })
}

fn hugetlb(directory: &Path) -> Result<BTreeMap<String, Hugetlb>> {
    let mut sizes = BTreeMap::new();
    for size in hugetlb_sizes(directory) {
        let of = |suffix: &str| number(directory, &format!("hugetlb.{size}.{suffix}"));
        let stats = Hugetlb {
            usage: of("usage_in_bytes")?,
            max: of("max_usage_in_bytes")?,
            failcnt: of("failcnt")?,
            limit: of("limit_in_bytes")?,
            rsvd_usage: of("rsvd.usage_in_bytes")?,
            rsvd_limit: of("rsvd.limit_in_bytes")?,
            rsvd_failcnt: of("rsvd.failcnt")?,
            nodes: BTreeMap::new(),
        };
        sizes.insert(size, stats);
    }
    Ok(sizes)
}
