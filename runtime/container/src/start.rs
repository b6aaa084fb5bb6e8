//! `start`: lets the waiting process become the user's program.

use std::os::fd::AsFd;
use std::path::Path;

use crate::error::{Doing, Error, Result};
use crate::kill::kill_all;
use crate::protocol::Channel;
use crate::state::{Lock, Record, StateDir};
use crate::status::Status;
use crate::{config, hooks, listener, paths};

/// Starts the container `id`; returns once the program runs.
///
/// # Errors
/// [`Error::CannotStart`], or what went wrong on the last steps to the program; also a
/// `poststart` hook that failed, and then the container is stopped (runtime-spec, "Lifecycle").
pub fn start(root: &Path, id: &str) -> Result<()> {
    let directory = StateDir::of(root, id)?;
    let lock = directory.lock_exclusive()?;
    let record = directory.load()?;
    start_locked(&directory, &record, &lock)
}

/// As [`start`], for a caller that has the lock.
///
/// # Errors
/// As [`start`].
pub fn start_locked(directory: &StateDir, record: &Record, _lock: &Lock) -> Result<()> {
    let status = directory.status(record);
    if status != Status::Created {
        return Err(Error::CannotStart(status));
    }
    let init = record.init.ok_or(Error::NotRunning)?;
    let pidfd = init.open_for_signals().doing(|| "pidfd_open".into())?.ok_or(Error::NotRunning)?;
    let socket = match paths::connect_packets(&directory.start_socket()) {
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            return Err(Error::CannotStart(Status::Stopped));
        }
        other => other.doing(|| "connect to the waiting process".into())?,
    };
    // From now on the container counts as running: its process cannot be started twice.
    let _ = std::fs::remove_file(directory.start_socket());
    let channel = Channel::over(socket);
    let state = record.oci_state(Status::Created).to_json()?;
    channel.proceed(&state).doing(|| "start the waiting process".into())?;
    let running = record.oci_state(Status::Running).to_json()?;
    listener::until_exec(&channel, (init.pid, &pidfd), &directory.config(), &running)?;
    poststart(directory, record, &running).inspect_err(|_hook| {
        // The hook's error is the one to tell; what is left, `delete --force` will see to.
        let _ = kill_all(record, libc::SIGKILL);
        let _ = pinion_sys::signal::send(pidfd.as_fd(), libc::SIGKILL);
    })
}

fn poststart(directory: &StateDir, record: &Record, state: &[u8]) -> Result<()> {
    if !record.has_poststart {
        return Ok(());
    }
    let (parsed, _) = config::load_spec(&directory.config())?;
    let list = crate::plan::HookPlan::new(&parsed.value).poststart;
    hooks::run("poststart", &list, state, &record.bundle)
}
