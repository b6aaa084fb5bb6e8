//! The few numbers that are polled for every container every few seconds.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::parse::{number, text, value_of};
use crate::Result;

/// What a node agent wants to know: four or five reads instead of thirty.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// CPU time used so far, ns.
    pub cpu_nanoseconds: u64,
    /// Memory in use, page cache included, bytes.
    pub memory_bytes: u64,
    /// Memory that cannot be reclaimed at once: usage without inactive file pages, as
    /// kubelet defines its working set.
    pub working_set_bytes: u64,
    /// Anonymous memory and swap cache, bytes.
    pub rss_bytes: u64,
    /// The memory limit, `u64::MAX` without one.
    pub memory_limit_bytes: u64,
    /// Swap in use, bytes.
    pub swap_bytes: u64,
    /// Page faults so far.
    pub page_faults: u64,
    /// Page faults that needed I/O so far.
    pub major_page_faults: u64,
    /// Processes and threads.
    pub pids: u64,
}

impl Usage {
    /// From a v2 cgroup.
    pub(crate) fn read_v2(directory: &Path) -> Result<Self> {
        let stat = text(directory, "memory.stat")?;
        let of = |key| value_of(&stat, key).unwrap_or(0);
        let memory = number(directory, "memory.current")?;
        let cpu = value_of(&text(directory, "cpu.stat")?, "usage_usec").unwrap_or(0);
        Ok(Self {
            cpu_nanoseconds: cpu * 1000,
            memory_bytes: memory,
            working_set_bytes: memory.saturating_sub(of("inactive_file")),
            rss_bytes: of("anon"),
            memory_limit_bytes: number(directory, "memory.max")?,
            swap_bytes: number(directory, "memory.swap.current")?,
            page_faults: of("pgfault"),
            major_page_faults: of("pgmajfault"),
            pids: number(directory, "pids.current")?,
        })
    }

    /// From the v1 directories that exist.
    pub(crate) fn read_v1(directories: &BTreeMap<&str, &Path>) -> Result<Self> {
        let mut usage = Self::default();
        if let Some(directory) = directories.get("cpuacct") {
            usage.cpu_nanoseconds = number(directory, "cpuacct.usage")?;
        }
        if let Some(directory) = directories.get("memory") {
            let stat = text(directory, "memory.stat")?;
            let of = |key| value_of(&stat, key).unwrap_or(0);
            usage.memory_bytes = number(directory, "memory.usage_in_bytes")?;
            usage.working_set_bytes = usage.memory_bytes.saturating_sub(of("total_inactive_file"));
            usage.rss_bytes = of("total_rss");
            usage.memory_limit_bytes = number(directory, "memory.limit_in_bytes")?;
            usage.swap_bytes = of("total_swap");
            usage.page_faults = of("total_pgfault");
            usage.major_page_faults = of("total_pgmajfault");
        }
        if let Some(directory) = directories.get("pids") {
            usage.pids = number(directory, "pids.current")?;
        }
        Ok(usage)
    }
}
