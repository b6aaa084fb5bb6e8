//! `kill`, and the end of all processes of a container.

use std::os::fd::AsFd;
use std::path::Path;

use oci_spec::runtime::LinuxNamespaceType;
use pinion_cgroup::Cgroup;

use crate::error::{Doing, Error, Result};
use crate::namespaces::bit;
use crate::state::{Record, StateDir};
use crate::status::Status;

/// Why `kill --all`, `ps` and `pause` are refused for a container without a cgroup.
pub const NO_CGROUP: &str = "the container has no cgroup (--cgroup-manager disabled, or a plain user's): its processes are not known";

/// Sends `signal` to the first process of container `id`, or with `all` to every process.
///
/// # Errors
/// [`Error::NotRunning`] in the words clients look for.
pub fn kill(root: &Path, id: &str, signal: i32, all: bool) -> Result<()> {
    let directory = StateDir::of(root, id)?;
    let record = directory.load()?;
    // Without a PID namespace the other processes outlive the first one; SIGKILL means all.
    let shares_pids = record.namespaces & bit(LinuxNamespaceType::Pid) == 0;
    let end_of_all = signal == libc::SIGKILL && !shares_pids;
    if record.has_no_cgroup() {
        if all && !end_of_all {
            return Err(Error::Unsupported(NO_CGROUP.into()));
        }
    } else if all || (shares_pids && signal == libc::SIGKILL) {
        return kill_all(&record, signal);
    }
    let init = record.init.ok_or(Error::NotRunning)?;
    let Some(pidfd) = init.open_for_signals().doing(|| "pidfd_open".into())? else {
        return Err(Error::NotRunning);
    };
    match pinion_sys::signal::send(pidfd.as_fd(), signal) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Err(Error::NotRunning),
        other => other.doing(|| format!("send signal {signal}"))?,
    }
    if signal == libc::SIGKILL && directory.status(&record) == Status::Paused {
        // On v1 a frozen process dies only once it runs again.
        if let Some(paths) = record.cgroup {
            Cgroup::open(paths).thaw()?;
        }
    }
    Ok(())
}

/// Sends `signal` to every process in the container's cgroup.
///
/// # Errors
/// As the cgroup layer.
pub fn kill_all(record: &Record, signal: i32) -> Result<()> {
    match &record.cgroup {
        Some(paths) => Ok(Cgroup::open(paths.clone()).kill_all(signal)?),
        None => Err(Error::NotRunning),
    }
}
