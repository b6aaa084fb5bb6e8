//! `start`: lets the waiting process become the user's program.

use std::path::Path;

use crate::error::{Doing, Error, Result};
use crate::protocol::Channel;
use crate::state::{Lock, Record, StateDir};
use crate::status::Status;
use crate::{config, hooks, listener, paths};

/// Starts the container `id`; returns once the program runs. The result are warnings.
///
/// # Errors
/// [`Error::CannotStart`], or what went wrong on the last steps to the program.
pub fn start(root: &Path, id: &str) -> Result<Vec<Error>> {
    let directory = StateDir::of(root, id)?;
    let lock = directory.lock_exclusive()?;
    let record = directory.load()?;
    start_locked(&directory, &record, &lock)
}

/// As [`start`], for a caller that has the lock.
///
/// # Errors
/// As [`start`].
pub fn start_locked(directory: &StateDir, record: &Record, _lock: &Lock) -> Result<Vec<Error>> {
    let status = directory.status(record);
    if status != Status::Created {
        return Err(Error::CannotStart(status));
    }
    let init = record.init.ok_or(Error::NotRunning)?;
    let pidfd = init.open().doing(|| "pidfd_open".into())?.ok_or(Error::NotRunning)?;
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
    poststart(directory, record, &running)
}

fn poststart(directory: &StateDir, record: &Record, state: &[u8]) -> Result<Vec<Error>> {
    if !record.has_poststart {
        return Ok(Vec::new());
    }
    let (parsed, _) = config::load_spec(&directory.config())?;
    let list = crate::plan::HookPlan::new(&parsed.value).poststart;
    Ok(hooks::run_all("poststart", &list, state, &record.bundle))
}
