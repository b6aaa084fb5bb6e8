//! Killing a process with everything that descends from it.
//!
//! A descendant is found by its chain of parents; by its session when the root leads one,
//! for a session outlives the parents in it; and, when it has left both, by the root's
//! output pipes that it still holds, if it is in the root's cgroups. (One that has also
//! closed those lives on until its container ends.) A victim is killed through a pidfd
//! after a second look, so a recycled pid is never hit.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Passes over /proc until no new descendant shows up; a fork bomb ends with its parents.
const PASSES: usize = 16;

/// What `/proc/PID/stat` says of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Its pid.
    pub pid: i32,
    /// Its parent's pid.
    pub parent: i32,
    /// Its session: the pid of the session's leader.
    pub session: i32,
    /// Start time in clock ticks since boot; with the pid it names a process for ever.
    pub started: u64,
    /// Whether it has ended and waits for its parent.
    pub zombie: bool,
}

impl Process {
    /// Reads the text of `/proc/PID/stat` (proc(5)). The command may contain anything, so
    /// fields count from its last parenthesis.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (pid, rest) = text.split_once(" (")?;
        let (_, fields) = rest.rsplit_once(") ")?;
        let mut fields = fields.split(' ');
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        let session = fields.nth(1)?.parse().ok()?;
        let started = fields.nth(15)?.parse().ok()?;
        let pid = pid.parse().ok()?;
        Some(Self { pid, parent, session, started, zombie: matches!(state, "Z" | "X") })
    }

    fn read(pid: i32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }
}

/// How to recognise the descendants of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Family {
    /// The process: a child of ours, maybe a zombie, that has not been waited for.
    pub root: i32,
    /// Whether it leads a session.
    pub leads_session: bool,
    /// Pipes and sockets that only the process and its descendants write to, as
    /// `/proc/PID/fd` names them.
    pub outputs: Vec<PathBuf>,
}

impl Family {
    /// What there is to know about a process that has just been started.
    #[must_use]
    pub fn of(root: i32, outputs: Vec<PathBuf>) -> Self {
        let leads_session = Process::read(root).is_some_and(|process| process.session == root);
        Self { root, leads_session, outputs }
    }

    /// Sends SIGKILL to all of them; returns how many there were.
    ///
    /// Ends when a look at all processes finds nobody new: who has been killed cannot fork.
    pub fn kill(&self) -> usize {
        let mut killed = BTreeSet::new();
        for _ in 0..PASSES {
            let processes = all();
            let mut members = descendants(self.root, self.leads_session, &processes);
            members.extend(self.holders(&processes));
            let mut anyone_new = false;
            for process in members.iter().filter(|process| !process.zombie) {
                if killed.insert((process.pid, process.started)) {
                    anyone_new = true;
                    kill_exactly(process);
                }
            }
            if !anyone_new {
                break;
            }
        }
        killed.len()
    }

    /// Processes in the root's cgroups that hold one of the outputs.
    fn holders(&self, processes: &[Process]) -> Vec<Process> {
        let cgroups = |pid| fs::read_to_string(format!("/proc/{pid}/cgroup")).ok();
        let Some(ours) = cgroups(self.root).filter(|_| !self.outputs.is_empty()) else {
            return Vec::new();
        };
        let holds = |pid| {
            let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
            descriptors
                .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
                .any(|target| self.outputs.contains(&target))
        };
        let members = processes.iter().filter(|process| {
            cgroups(process.pid).is_some_and(|theirs| theirs == ours) && holds(process.pid)
        });
        members.copied().collect()
    }
}

fn descendants(root: i32, leads_session: bool, processes: &[Process]) -> Vec<Process> {
    let mut family = BTreeSet::from([root]);
    loop {
        let before = family.len();
        for process in processes {
            let kin =
                family.contains(&process.parent) || (leads_session && process.session == root);
            if kin {
                family.insert(process.pid);
            }
        }
        if family.len() == before {
            break;
        }
    }
    processes.iter().filter(|process| family.contains(&process.pid)).copied().collect()
}

/// The name by which `/proc/PID/fd` knows a pipe or socket wherever it is open.
#[must_use]
pub fn link_of(fd: impl AsFd) -> Option<PathBuf> {
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())).ok()?;
    let name = link.to_str()?;
    (name.starts_with("pipe:[") || name.starts_with("socket:[")).then_some(link)
}

fn kill_exactly(process: &Process) {
    let Some(pid) = Pid::from_raw(process.pid) else { return };
    let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    if Process::read(process.pid).is_some_and(|now| now.started == process.started) {
        // It may have ended by itself, which is as good.
        pidfd_send_signal(handle, Signal::KILL).ok();
    }
}

fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(Process::read)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, parent: i32, session: i32) -> Process {
        Process { pid, parent, session, started: 0, zombie: false }
    }

    fn pids(family: &[Process]) -> Vec<i32> {
        family.iter().map(|process| process.pid).collect()
    }

    #[test]
    fn a_hostile_command_name_does_not_shift_the_fields() {
        let text = "42 (a) R 1 (b\n) S 7 42 41 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 987654 1 1";
        let expected = Process { pid: 42, parent: 7, session: 41, started: 987_654, zombie: false };
        assert_eq!(Process::parse(text), Some(expected));
        assert_eq!(Process::parse("42 (a"), None);
        assert_eq!(Process::parse(""), None);
    }

    #[test]
    fn children_of_children_are_found_in_any_order() {
        let processes = [process(4, 3, 1), process(3, 2, 1), process(2, 1, 1), process(9, 1, 1)];
        assert_eq!(pids(&descendants(2, false, &processes)), [4, 3, 2]);
    }

    #[test]
    fn orphans_are_found_by_their_session_only_if_the_root_leads_it() {
        let processes = [process(2, 1, 2), process(3, 1, 2), process(4, 3, 4), process(5, 1, 1)];
        assert_eq!(pids(&descendants(2, true, &processes)), [2, 3, 4]);
        assert_eq!(pids(&descendants(2, false, &processes)), [2]);
    }

    #[test]
    fn a_real_tree_dies_with_its_orphans() {
        let mut root = std::process::Command::new("setsid")
            .args(["sh", "-c", "(sleep 1000 & exec sleep 1000 &); sleep 1000 & sleep 1000"])
            .spawn()
            .unwrap();
        let pid = i32::try_from(root.id()).unwrap();
        let settled = || {
            Family::of(pid, Vec::new()).leads_session && descendants(pid, true, &all()).len() == 5
        };
        while !settled() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(Family::of(pid, Vec::new()).kill() >= 5);
        root.wait().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(descendants(pid, true, &all()).iter().all(|process| process.zombie));
    }
}
