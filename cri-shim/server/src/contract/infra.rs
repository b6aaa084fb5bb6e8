//! Our own processes and threads stay off the CPUs of others.
//!
//! ```text
//!  reserved CPUs of the profile, else all but exclusive ones ─▶ infra CPUs
//!      │ at the start, before the first thread: inherited by all that comes
//!      │ when containers come and go, every few seconds, and as soon as there is a monitor
//!      ▼
//!  every thread of this server and of every monitor: sched_setaffinity(2) where it differs
//! ```
//!
//! What they start (the runtime, hooks, CNI plugins, helpers of pulls, an exec up to the moment
//! when it enters its container) inherits the set; the runtime lifts it from the container's
//! process, whose CPUs are those of its cgroup alone.
//!
//! On cgroup v2 the kernel keeps everybody off a partition as well; here it is also so where
//! there are no partitions, and for reserved CPUs, of which the kernel knows nothing.
//!
//! [`usage`] is what all of it costs: CPU time and memory, to be held against the budget that
//! a platform has for its infrastructure (Anuket RA2: two cores, i.cap.014; 16 GB, i.cap.015).

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use pinion_topology::CpuSet;
use rustix::thread::{CpuSet as Mask, Pid, sched_setaffinity};
use serde::Serialize;

use crate::error::{Context, Result};
use crate::monitor;
use crate::node::Node;
use crate::record::Phase;
use crate::services::blocking;

/// What nobody tells of is put right by then.
const AUDIT: Duration = Duration::from_secs(5);
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// The CPUs for infrastructure: the reserved ones, else all but the exclusive ones. Never
/// none: then all online ones, and the contract's audit tells of it.
fn choose(online: &CpuSet, reserved: &CpuSet, exclusive: &CpuSet) -> CpuSet {
    let reserved = reserved.intersection(online);
    let rest = online.difference(exclusive);
    match (reserved.is_empty(), rest.is_empty()) {
        (false, _) => reserved,
        (true, false) => rest,
        (true, true) => online.clone(),
    }
}

fn online() -> Result<CpuSet> {
    let what = || format!("read {ONLINE}");
    fs::read_to_string(ONLINE).context(what)?.trim().parse().context(what)
}

/// The CPUs that are one container's alone.
fn exclusive(node: &Node) -> CpuSet {
    let snapshot = node.registry.snapshot();
    let live = snapshot.containers().filter(|(_, c)| c.phase() != Phase::Exited);
    live.fold(CpuSet::new(), |all, (_, c)| all.union(&c.contract.own()))
}

/// Confines the calling thread, and so all threads and processes it will make.
pub(crate) fn confine_start(reserved: &CpuSet) {
    let confined = online().and_then(|online| {
        let cpus = choose(&online, reserved, &CpuSet::new());
        let what = || format!("confine the server to CPUs {cpus}");
        if cpus == online { Ok(()) } else { sched_setaffinity(None, &mask(&cpus)).context(what) }
    });
    if let Err(error) = confined {
        tracing::warn!(error = %error.chain(), "infrastructure is not confined");
    }
}

fn mask(cpus: &CpuSet) -> Mask {
    let mut mask = Mask::new();
    for cpu in cpus.iter().filter_map(|cpu| usize::try_from(cpu).ok()) {
        if cpu < Mask::MAX_CPU {
            mask.set(cpu);
        }
    }
    mask
}

/// This process and the monitors.
fn processes(node: &Node) -> BTreeSet<i32> {
    let snapshot = node.registry.snapshot();
    let monitors = snapshot.pods();
    let pids = monitors.filter_map(|p| monitor::pid(node.paths.pod(&p.sandbox.id).path()));
    pids.chain(i32::try_from(std::process::id())).collect()
}

fn threads(pid: i32) -> Vec<i32> {
    let listing = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    listing.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Where a thread may run; `None` once it has ended.
fn allowed(thread: i32) -> Option<CpuSet> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    list.trim().parse().ok()
}

/// Confines every thread of ours; how many had to be. Blocks.
pub(crate) fn confine(node: &Node) -> Result<usize> {
    let cpus = choose(&online()?, &node.profile.reserved(), &exclusive(node));
    let mask = mask(&cpus);
    let (mut moved, mut refused) = (0, None);
    for pid in processes(node) {
        // A thread made meanwhile by one not yet confined is found in another round.
        loop {
            let strays: Vec<i32> = threads(pid)
                .into_iter()
                .filter(|thread| allowed(*thread).is_some_and(|allowed| allowed != cpus))
                .collect();
            let before = moved;
            for thread in strays {
                match sched_setaffinity(Pid::from_raw(thread), &mask) {
                    // The kernel takes the part of it that the thread's cgroup has; a set that
                    // is less than asked stays that, and is no reason to try again.
                    Ok(()) if allowed(thread).is_some_and(|allowed| allowed == cpus) => moved += 1,
                    Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                    Err(error) => refused = Some((thread, error)),
                }
            }
            if moved == before {
                break;
            }
        }
    }
    match refused {
        None => Ok(moved),
        Some((thread, error)) => Err(error)
            .context(|| format!("sched_setaffinity({thread}, {cpus}): thread of infrastructure")),
    }
}

/// Keeps everything of ours confined for as long as the server runs.
pub(crate) async fn run(node: Arc<Node>) {
    let mut changes = node.registry.changes();
    let mut audit = tokio::time::interval(AUDIT);
    audit.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut said = String::new();
    loop {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            _ = audit.tick() => {}
        }
        let confiner = node.clone();
        match blocking(move || confine(&confiner)).await {
            Ok(0) => said.clear(),
            Ok(threads) => tracing::debug!(threads, "infrastructure was confined"),
            // Once, not every few seconds.
            Err(error) if error.chain() != said => {
                said = error.chain();
                tracing::warn!(error = said, "infrastructure is not confined");
            }
            Err(_) => {}
        }
    }
}

/// What this server and the monitors cost, what they started and has ended included.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Usage {
    /// CPUs they are confined to.
    pub(crate) cpus: String,
    /// Processes that live.
    pub(crate) processes: usize,
    /// Their threads.
    pub(crate) threads: usize,
    /// Threads that may run on CPUs other than those.
    pub(crate) astray: usize,
    /// CPU time since each began, in nanoseconds.
    pub(crate) cpu_nanoseconds: u64,
    /// Memory, shared pages counted by their share (PSS), in bytes.
    pub(crate) memory_bytes: u64,
}

/// Reads [`Usage`]. Blocks.
pub(crate) fn usage(node: &Node) -> Result<Usage> {
    let cpus = choose(&online()?, &node.profile.reserved(), &exclusive(node));
    Ok(sum(processes(node), &cpus))
}

/// The same of one pod: its monitor, and what that has started and seen end. Blocks.
pub(crate) fn of_pod(node: &Node, pod: &str) -> Usage {
    sum(monitor::pid(node.paths.pod(pod).path()), &CpuSet::new())
}

fn sum(processes: impl IntoIterator<Item = i32>, cpus: &CpuSet) -> Usage {
    let mut usage = Usage { cpus: cpus.to_string(), ..Usage::default() };
    for pid in processes {
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let threads = threads(pid);
        let outside = |thread: &&i32| allowed(**thread).is_some_and(|own| !own.is_subset(cpus));
        usage.processes += 1;
        usage.astray += threads.iter().filter(outside).count();
        usage.threads += threads.len();
        usage.cpu_nanoseconds += ticks(&stat).unwrap_or(0) * (1_000_000_000 / TICKS);
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        usage.memory_bytes += pss(&rollup).unwrap_or(0);
    }
    usage
}

/// `USER_HZ`, which is part of the kernel's interface on every architecture we run on.
const TICKS: u64 = 100;

/// `utime`, `stime`, `cutime` and `cstime` of `/proc/<pid>/stat`; see proc_pid_stat(5).
fn ticks(stat: &str) -> Option<u64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let times = fields.get(11..15)?;
    Some(times.iter().filter_map(|time| time.parse::<u64>().ok()).sum())
}

fn pss(rollup: &str) -> Option<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_cpus_count_first_then_what_is_nobody_s_and_never_none() {
        let set = |list: &str| list.parse::<CpuSet>().unwrap();
        let choose =
            |reserved, exclusive| choose(&set("0-7"), &set(reserved), &set(exclusive)).to_string();
        assert_eq!(choose("0-1", "4-5"), "0-1");
        assert_eq!(choose("0,9", "4-5"), "0", "an absent CPU is not chosen");
        assert_eq!(choose("9", "4-5"), "0-3,6-7");
        assert_eq!(choose("", ""), "0-7");
        assert_eq!(choose("", "0-7"), "0-7");
    }

    #[test]
    fn a_name_with_spaces_and_parentheses_does_not_shift_the_times() {
        let stat = "7 (a ) b) S 1 2 3 0 -1 4 5 6 7 8 10 20 30 40 20 0 9";
        assert_eq!(ticks(stat), Some(100));
        assert_eq!(ticks("7 (x"), None);
    }

    #[test]
    fn the_proportional_share_is_read_in_bytes() {
        assert_eq!(pss("x rollup\nRss:  9 kB\nPss:   3 kB\nPss_Dirty: 1 kB\n"), Some(3072));
        assert_eq!(pss(""), None);
    }
}
