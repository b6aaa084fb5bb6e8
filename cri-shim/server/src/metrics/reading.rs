//! One look at a container: everything its metrics are made of.

use pinion_cgroup::Stats;
use pinion_cri_proto::v1::LinuxContainerResources;
use rustix::fs::statvfs;

use super::process::Processes;
use crate::contract::watch::History;
use crate::ids;
use crate::node::Node;
use crate::record::Container;
use crate::stats;

/// What was seen.
#[derive(Debug, Clone, Default)]
pub(super) struct Reading {
    pub(super) stats: Stats,
    pub(super) oom_kills: u64,
    pub(super) processes: Processes,
    pub(super) disk: pinion_image::Usage,
    pub(super) filesystem: Filesystem,
    /// What became of exclusive CPUs, if they were promised.
    pub(super) isolation: Option<History>,
    /// Limits as asked for.
    pub(super) asked: LinuxContainerResources,
    /// Seconds since the epoch.
    pub(super) started: u64,
    /// Seconds since the epoch.
    pub(super) now: u64,
}

/// The file system writable layers lie on.
#[derive(Debug, Clone, Default)]
pub(super) struct Filesystem {
    pub(super) bytes: u64,
    pub(super) inodes: u64,
    pub(super) inodes_free: u64,
}

impl Reading {
    /// Looks at a container. What cannot be read counts as zero.
    pub(super) fn take(node: &Node, container: &Container) -> Self {
        let cgroup = node.cgroups.container(&container.cgroups_path, &container.id).ok();
        let cgroup = cgroup.filter(pinion_cgroup::Cgroup::exists);
        let seconds = |nanoseconds: i64| u64::try_from(nanoseconds / 1_000_000_000).unwrap_or(0);
        let pids = cgroup.as_ref().and_then(|c| c.pids(true).ok()).unwrap_or_default();
        let filesystem = statvfs(node.paths.root()).map(|fs| Filesystem {
            bytes: fs.f_blocks.saturating_mul(fs.f_frsize),
            inodes: fs.f_files,
            inodes_free: fs.f_ffree,
        });
        let exclusive = container.contract.exclusive;
        Self {
            stats: cgroup.as_ref().and_then(|c| c.stats().ok()).unwrap_or_default(),
            oom_kills: cgroup.as_ref().and_then(|c| c.oom_kill_count().ok()).unwrap_or(0),
            processes: Processes::read(&pids),
            disk: stats::disk(node, &container.id),
            filesystem: filesystem.unwrap_or_default(),
            isolation: exclusive.then(|| node.histories.of(&container.id).unwrap_or_default()),
            asked: container.resources.0.clone(),
            started: seconds(container.started_at),
            now: seconds(ids::now()),
        }
    }

    /// A made-up reading in which every family has a sample.
    #[cfg(test)]
    pub(super) fn example() -> Self {
        use pinion_cgroup::stats::{BlkioEntry, Hugetlb, Pressure};
        let mut reading = Self { isolation: Some(History::default()), ..Self::default() };
        reading.stats.hugetlb.insert("2MB".into(), Hugetlb::default());
        let entry = BlkioEntry { major: 8, op: "Read".into(), ..Default::default() };
        let write = BlkioEntry { op: "Write".into(), ..entry.clone() };
        reading.stats.blkio.io_service_bytes_recursive = vec![entry.clone(), write.clone()];
        reading.stats.blkio.io_serviced_recursive = vec![entry, write];
        reading.stats.cpu.psi = Some(Pressure::default());
        reading.stats.memory.psi = Some(Pressure::default());
        reading.stats.blkio.psi = Some(Pressure::default());
        reading
    }
}
