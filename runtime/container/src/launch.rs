//! Giving birth to a container's process, in the right namespaces and cgroup.
//!
//! ```text
//! usual:            runtime ──clone3(NEW*, into cgroup)──▶ process
//! joined userns:    runtime ──clone3(into cgroup)──▶ midwife ──setns(pid, user), clone3(NEW*, PARENT)──▶ process
//! ```
//!
//! New namespaces must belong to the user namespace the container runs in. When that one
//! exists already, only a process that has joined it can make them; having joined, it cannot
//! come back, hence the [midwife](crate::midwife), which ends at once. It stays in our PID
//! namespace, so that the number it reports is the one we know the process by.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::LinuxNamespaceType;
use pinion_cgroup::Cgroup;
use pinion_sys::clone::{Child, Clone, setns, spawn, unshare};
use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;

use crate::child::{Join, Step, set_own_oom_score};
use crate::error::{Doing, Error, Failure, Result};
use crate::midwife;
use crate::namespaces::{Mappings, Namespaces};
use crate::protocol::Report;

/// The existing namespaces of a plan, opened.
#[derive(Debug, Default)]
pub struct Opened {
    user: Option<OwnedFd>,
    pid: Option<OwnedFd>,
    time: Option<OwnedFd>,
    /// Those the process joins itself, in order.
    pub others: Vec<OwnedFd>,
    /// The position of the network namespace among them.
    network: Option<usize>,
}

/// What a process is born with.
#[derive(Debug)]
pub struct Birth<'a> {
    /// Namespaces to create.
    pub namespaces: &'a Namespaces,
    /// Existing ones.
    pub opened: &'a Opened,
    /// Its cgroup.
    pub cgroup: &'a Cgroup,
    /// What a process that joins a user namespace may no longer give itself.
    pub oom_score: Option<i32>,
}

impl Opened {
    /// Opens the namespaces to join.
    ///
    /// # Errors
    /// Names the path.
    pub fn open(namespaces: &Namespaces) -> Result<Self> {
        let mut opened = Self::default();
        for (kind, path) in &namespaces.join {
            let fd = open_namespace(path)?;
            check_kind(&fd, path)?;
            match kind {
                LinuxNamespaceType::User => opened.user = Some(fd),
                LinuxNamespaceType::Pid => opened.pid = Some(fd),
                LinuxNamespaceType::Time => opened.time = Some(fd),
                LinuxNamespaceType::Network => {
                    opened.network = Some(opened.others.len());
                    opened.others.push(fd);
                }
                _ => opened.others.push(fd),
            }
        }
        Ok(opened)
    }

    /// The network namespace of a container: the one it joins, or that of its process `pid`,
    /// which was born in a new one.
    ///
    /// # Errors
    /// As open(2).
    pub fn network_of(&self, pid: Pid) -> Result<OwnedFd, Failure> {
        match self.network.and_then(|index| self.others.get(index)) {
            Some(fd) => fd.try_clone().doing(|| "dup".into()),
            None => open_namespace(format!("/proc/{}/ns/net", pid.as_raw_nonzero()).as_ref()),
        }
    }
}

/// Opens the file of a namespace.
///
/// # Errors
/// Names the path.
pub(crate) fn open_namespace(path: &Path) -> Result<OwnedFd, Failure> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .doing(|| format!("open the namespace {}", path.display()))
}

/// setns(2) would take a pidfd too; only namespace files are meant.
fn check_kind(fd: &OwnedFd, path: &Path) -> Result<(), Failure> {
    const NSFS_MAGIC: rustix::fs::FsWord = 0x6e73_6673;
    let kind = rustix::fs::fstatfs(fd).doing(|| format!("statfs {}", path.display()))?.f_type;
    if kind == NSFS_MAGIC {
        Ok(())
    } else {
        Err(Failure::refused(format!("{} is not a namespace", path.display())))
    }
}

impl Birth<'_> {
    /// Starts the process; `body` is told how to join its cgroup.
    ///
    /// # Errors
    /// As clone3(2), setns(2) and unshare(2).
    pub fn give(&self, body: impl FnOnce(Join) -> i32) -> Result<Child> {
        let _here = self.visit_parent_namespaces()?;
        let (directory, join) = birthplace(self.cgroup)?;
        let cgroup = directory.as_ref().map(AsFd::as_fd);
        // Made by the process itself, once it is in its cgroup: that becomes the root.
        let flags = self.namespaces.create & !(libc::CLONE_NEWCGROUP | libc::CLONE_NEWTIME) as u64;
        match &self.opened.user {
            None => spawn(&Clone { flags, cgroup }, || body(join))
                .doing(|| "clone the container's process".into())
                .map_err(Error::from),
            Some(user) => self.give_through_midwife(user, flags, join, cgroup, body),
        }
    }

    /// PID and time namespaces apply to children only: the runtime steps over, gives birth
    /// there, and steps back when the returned value is dropped. A midwife enters the PID
    /// namespace itself.
    fn visit_parent_namespaces(&self) -> Result<Visit, Failure> {
        let mut visit = Visit::default();
        if let Some(pid) = self.opened.pid.as_ref().filter(|_| self.opened.user.is_none()) {
            visit.leave("pid")?;
            join_pids(pid)?;
        }
        if let Some(time) = &self.opened.time {
            visit.leave("time")?;
            setns(time.as_fd(), libc::CLONE_NEWTIME as u64)
                .doing(|| "join the time namespace".into())?;
        } else if self.namespaces.creates(LinuxNamespaceType::Time) {
            visit.leave("time")?;
            unshare(libc::CLONE_NEWTIME as u64).doing(|| "unshare the time namespace".into())?;
            let offsets = self.namespaces.time_offsets.join("\n");
            if !offsets.is_empty() {
                std::fs::write("/proc/self/timens_offsets", &offsets)
                    .doing(|| format!("write {offsets:?} to /proc/self/timens_offsets"))?;
            }
        }
        Ok(visit)
    }

    fn give_through_midwife(
        &self,
        user: &OwnedFd,
        flags: u64,
        join: Join,
        cgroup: Option<BorrowedFd<'_>>,
        body: impl FnOnce(Join) -> i32,
    ) -> Result<Child> {
        let enter = |_: BorrowedFd<'_>| {
            join.carry_out(self.cgroup)
                .and_then(|()| self.oom_score.map_or(Ok(()), set_own_oom_score))
                .and_then(|()| self.opened.pid.as_ref().map_or(Ok(()), join_pids))
                .and_then(|()| setns(user.as_fd(), 0).doing(|| "join the user namespace".into()))
                .map_err(|failure| Report::new(Step::Enter, &failure))
        };
        midwife::give(cgroup, flags, enter, |()| body(Join::Done))
    }
}

/// Has the children of this process born in the PID namespace of a file or of a pidfd.
fn join_pids(namespace: &OwnedFd) -> Result<(), Failure> {
    setns(namespace.as_fd(), libc::CLONE_NEWPID as u64).doing(|| "join the PID namespace".into())
}

/// The directory to be born in, and what is then left to join.
pub(crate) fn birthplace(cgroup: &Cgroup) -> Result<(Option<OwnedFd>, Join), Failure> {
    let Some(path) = cgroup.v2_dir() else { return Ok((None, Join::All)) };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(path, flags, Mode::empty())
        .doing(|| format!("open {}", path.display()))?;
    let join = if cgroup.paths().v1.is_empty() { Join::Done } else { Join::V1 };
    Ok((Some(directory), join))
}

/// Remembers which namespaces the runtime came from.
#[derive(Debug, Default)]
struct Visit {
    home: Vec<OwnedFd>,
}

impl Visit {
    fn leave(&mut self, name: &str) -> Result<(), Failure> {
        self.home.push(open_namespace(format!("/proc/self/ns/{name}").as_ref())?);
        Ok(())
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        for namespace in &self.home {
            // Hooks would run in the wrong namespace; nothing else depends on it.
            let _ = setns(namespace.as_fd(), 0);
        }
    }
}

/// Writes the id mappings of a process that waits for them, and its OOM score, which it
/// cannot write itself any more.
///
/// # Errors
/// Names the file; without privileges, what newuidmap(1) or newgidmap(1) said.
pub fn map_ids(pid: Pid, mappings: &Mappings, oom_score: Option<i32>) -> Result<(), Failure> {
    let pid = pid.as_raw_nonzero();
    let write = |name: &str, text: &str| std::fs::write(format!("/proc/{pid}/{name}"), text);
    let map = |name: &str, tool: &str, lines: &str| match write(name, lines) {
        Err(error)
            if error.raw_os_error() == Some(libc::EPERM)
                && !rustix::process::geteuid().is_root() =>
        {
            map_by_tool(tool, pid.get(), lines)
        }
        other => other.doing(|| format!("write {lines:?} to /proc/{pid}/{name}")),
    };
    map("uid_map", "newuidmap", &mappings.uids)?;
    if !rustix::process::geteuid().is_root() && mappings.maps_one_group() {
        // Without newgidmap the kernel asks for this: membership in a group that denies
        // access could be given up otherwise.
        write("setgroups", "deny").doing(|| "deny setgroups".into())?;
    }
    map("gid_map", "newgidmap", &mappings.gids)?;
    match oom_score {
        None => Ok(()),
        Some(score) => write("oom_score_adj", &score.to_string())
            .doing(|| format!("write {score} to /proc/{pid}/oom_score_adj")),
    }
}

fn map_by_tool(tool: &str, pid: i32, lines: &str) -> Result<(), Failure> {
    let output = std::process::Command::new(tool)
        .arg(pid.to_string())
        .args(lines.split_whitespace())
        .output()
        .doing(|| format!("run {tool}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(Failure::refused(format!("{tool}: {}: {}", output.status, text.trim_end())))
}

/// A user namespace with these mappings, held by no process, for id-mapped mounts.
///
/// # Errors
/// As clone3(2); names the map file.
pub fn user_namespace(mappings: &Mappings) -> Result<OwnedFd, Failure> {
    let holder = spawn(&Clone { flags: libc::CLONE_NEWUSER as u64, cgroup: None }, || {
        // Ends with the runtime at the latest.
        let _ =
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
        loop {
            let _ = rustix::thread::nanosleep(&rustix::time::Timespec { tv_sec: 3600, tv_nsec: 0 });
        }
    })
    .doing(|| "clone a user namespace".into())?;
    let opened = map_ids(holder.pid, mappings, None).and_then(|()| {
        let path = format!("/proc/{}/ns/user", holder.pid.as_raw_nonzero());
        rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .doing(|| format!("open {path}"))
    });
    let _ = holder.kill();
    let _ = holder.wait();
    opened
}
