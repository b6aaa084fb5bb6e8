//! Statistics of a v2 cgroup.

use std::collections::BTreeMap;
use std::path::Path;

use super::parse::{
    hugetlb_sizes, keyed_devices, list, map, number, pids, pressure, rdma, text, value_of,
};
use super::{
    Blkio, BlkioEntry, Cpu, CpuUsage, Cpuset, Hugetlb, Memory, MemoryEntry, Rdma, Stats, Throttling,
};
use crate::Result;

/// Reads everything there is about the cgroup at `directory`.
pub(crate) fn read(directory: &Path) -> Result<Stats> {
    Ok(Stats {
        cpu: cpu(directory)?,
        cpuset: Cpuset {
            cpus: list(directory, "cpuset.cpus.effective")?,
            mems: list(directory, "cpuset.mems.effective")?,
            partition: Some(text(directory, "cpuset.cpus.partition")?.trim().to_owned())
                .filter(|partition| !partition.is_empty()),
        },
        memory: memory(directory)?,
        pids: pids(directory)?,
        blkio: blkio(directory)?,
        hugetlb: hugetlb(directory)?,
        rdma: Rdma {
            current: rdma(directory, "rdma.current")?,
            limit: rdma(directory, "rdma.max")?,
        },
    })
}

fn cpu(directory: &Path) -> Result<Cpu> {
    let stat = text(directory, "cpu.stat")?;
    let micros = |key| value_of(&stat, key).unwrap_or(0);
    Ok(Cpu {
        usage: CpuUsage {
            total: micros("usage_usec") * 1000,
            kernel: micros("system_usec") * 1000,
            user: micros("user_usec") * 1000,
            ..CpuUsage::default()
        },
        throttling: Throttling {
            periods: micros("nr_periods"),
            throttled_periods: micros("nr_throttled"),
            throttled_time: micros("throttled_usec") * 1000,
        },
        psi: pressure(directory, "cpu.pressure")?,
    })
}

fn memory(directory: &Path) -> Result<Memory> {
    let raw = map(&text(directory, "memory.stat")?);
    let events = map(&text(directory, "memory.events")?);
    let entry = |kind: &str| -> Result<MemoryEntry> {
        Ok(MemoryEntry {
            limit: number(directory, &format!("{kind}.max"))?,
            usage: number(directory, &format!("{kind}.current"))?,
            max: number(directory, &format!("{kind}.peak"))?,
            failcnt: 0,
        })
    };
    let mut usage = entry("memory")?;
    usage.failcnt = events.get("max").copied().unwrap_or(0);
    let mut swap = entry("memory.swap")?;
    // v1 counts memory into the swap figures, and so does everybody who reads these.
    swap.usage += usage.usage;
    swap.limit = swap.limit.saturating_add(usage.limit);
    swap.max = 0;
    Ok(Memory {
        cache: raw.get("file").copied().unwrap_or(0),
        usage,
        swap,
        kernel: MemoryEntry::default(),
        kernel_tcp: MemoryEntry::default(),
        raw,
        events,
        psi: pressure(directory, "memory.pressure")?,
    })
}

fn blkio(directory: &Path) -> Result<Blkio> {
    let mut blkio = Blkio { psi: pressure(directory, "io.pressure")?, ..Blkio::default() };
    for ((major, minor), key, value) in keyed_devices(&text(directory, "io.stat")?) {
        let (bytes, op) = match key {
            "rbytes" => (true, "Read"),
            "wbytes" => (true, "Write"),
            "dbytes" => (true, "Discard"),
            "rios" => (false, "Read"),
            "wios" => (false, "Write"),
            "dios" => (false, "Discard"),
            _ => continue,
        };
        let entry = BlkioEntry { major, minor, op: op.to_owned(), value };
        if bytes {
            blkio.io_service_bytes_recursive.push(entry);
        } else {
            blkio.io_serviced_recursive.push(entry);
        }
    }
    Ok(blkio)
}

pub(super) fn hugetlb(directory: &Path) -> Result<BTreeMap<String, Hugetlb>> {
    let mut sizes = BTreeMap::new();
    for size in hugetlb_sizes(directory) {
        let of = |suffix: &str| number(directory, &format!("hugetlb.{size}.{suffix}"));
        let events = text(directory, &format!("hugetlb.{size}.events"))?;
        let stats = Hugetlb {
            usage: of("current")?,
            max: 0,
            failcnt: value_of(&events, "max").unwrap_or(0),
            limit: of("max")?,
            rsvd_usage: of("rsvd.current")?,
            rsvd_limit: of("rsvd.max")?,
            rsvd_failcnt: 0,
            nodes: nodes(&text(directory, &format!("hugetlb.{size}.numa_stat"))?),
        };
        sizes.insert(size, stats);
    }
    Ok(sizes)
}

/// "total=4194304 N0=4194304 N1=0".
fn nodes(text: &str) -> BTreeMap<u32, u64> {
    let fields = text.split_whitespace().filter_map(|field| {
        let (node, bytes) = field.strip_prefix('N')?.split_once('=')?;
        Some((node.parse().ok()?, bytes.parse().ok()?))
    });
    fields.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_v2_cgroup_is_read_into_runcs_shape() {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in [
            (
                "cpu.stat",
                "usage_usec 10\nuser_usec 6\nsystem_usec 4\nnr_periods 3\nnr_throttled 1\nthrottled_usec 9\n",
            ),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.swap.current", "1\n"),
            ("memory.swap.max", "max\n"),
            ("memory.stat", "anon 1\nfile 2\ninactive_file 1\n"),
            ("memory.events", "low 0\nmax 5\noom_kill 2\n"),
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n"),
            ("cpuset.cpus.effective", "2-3\n"),
            ("cpuset.cpus.partition", "isolated\n"),
            ("rdma.current", "mlx4_0 hca_handle=2 hca_object=1\n"),
        ] {
            std::fs::write(directory.path().join(name), content).unwrap();
        }
        let stats = read(directory.path()).unwrap();
        assert_eq!(stats.cpu.usage.total, 10_000);
        assert_eq!(stats.cpu.throttling.throttled_time, 9_000);
        assert_eq!(stats.memory.usage.failcnt, 5);
        assert_eq!(stats.memory.swap.usage, 4097);
        assert_eq!(stats.memory.swap.limit, u64::MAX);
        assert_eq!(stats.memory.cache, 2);
        assert_eq!((stats.pids.current, stats.pids.limit), (3, 0));
        assert_eq!(stats.blkio.io_service_bytes_recursive.len(), 3);
        assert_eq!(stats.cpuset.cpus, [2, 3]);
        assert_eq!(stats.cpuset.partition.as_deref(), Some("isolated"));
        let json = serde_json::to_value(&stats).unwrap();
        assert_eq!(json["memory"]["usage"]["limit"], u64::MAX);
        assert_eq!(json["blkio"]["ioServiceBytesRecursive"][0]["op"], "Read");
        assert_eq!(json["rdma"]["current"]["mlx4_0"]["hca_handle"], 2);
        assert_eq!(serde_json::from_value::<Stats>(json).unwrap(), stats);
    }

    #[test]
    fn huge_pages_are_split_by_node() {
        assert_eq!(nodes("total=6 N0=4 N1=2\n"), BTreeMap::from([(0, 4), (1, 2)]));
    }

    #[test]
    fn an_empty_directory_has_empty_statistics() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(read(directory.path()).unwrap().cpu.usage.total, 0);
    }
}
