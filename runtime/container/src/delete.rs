//! `delete`: takes back everything `create` made.

use std::path::Path;
use std::time::{Duration, Instant};

use pinion_cgroup::Cgroup;
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::error::{Doing, Error, Result, chain};
use crate::plan::HookPlan;
use crate::state::{Record, StateDir};
use crate::status::Status;
use crate::{config, hooks, isolation, kill};

/// How long a killed process may take to end before `delete --force` gives up.
const PATIENCE: Duration = Duration::from_secs(10);

/// Deletes container `id`; with `force` also a running one, and none is no error. The
/// result are warnings.
///
/// # Errors
/// [`Error::NotStopped`]; [`Error::Cleanup`] when something is left, which a further
/// `delete` tries again.
pub fn delete(root: &Path, id: &str, force: bool) -> Result<Vec<Error>> {
    let directory = StateDir::of(root, id)?;
    let _lock = match directory.lock_exclusive() {
        Err(Error::NotFound) if force => return Ok(Vec::new()),
        other => other?,
    };
    let mut record = match directory.load() {
        // A create that was killed before its first record, or a damaged file: nothing
        // tells what there was, and only the directory can go.
        Err(Error::NotFound | Error::State { .. }) if force => {
            directory.remove()?;
            return Ok(Vec::new());
        }
        other => other?,
    };
    let status = directory.status(&record);
    match status {
        Status::Stopped => {}
        // As runc: a container that was never started has nothing to lose.
        Status::Created | Status::Creating => end(&record)?,
        _ if force => end(&record)?,
        _ => return Err(Error::NotStopped { id: id.to_owned(), status }),
    }
    let poststop = if record.has_poststop {
        let (parsed, _) = config::load_spec(&directory.config())?;
        HookPlan::new(&parsed.value).poststop
    } else {
        Vec::new()
    };
    tear_down(&directory, &mut record)?;
    if poststop.is_empty() {
        return Ok(Vec::new());
    }
    let state = record.oci_state(Status::Stopped).to_json()?;
    Ok(hooks::run_all("poststop", &poststop, &state, &record.bundle))
}

/// Kills everything in the container and waits for the first process to end.
fn end(record: &Record) -> Result<()> {
    let init = match record.init {
        Some(init) => init.open_for_signals().doing(|| "pidfd_open".into())?,
        None => None,
    };
    if let Some(pidfd) = &init {
        use std::os::fd::AsFd;
        let _ = pinion_sys::signal::send(pidfd.as_fd(), libc::SIGKILL);
    }
    if record.cgroup.is_some() {
        kill::kill_all(record, libc::SIGKILL)?;
    }
    let Some(pidfd) = init else { return Ok(()) };
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout =
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        let gone = match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(0) => false,
            Ok(_) => true,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error).doing(|| "poll".into())?,
        };
        // A directory of procfs, in place of a pidfd, does not tell.
        if gone && !record.init.is_some_and(|init| init.is_alive()) {
            return Ok(());
        }
        if left.is_zero() || !gone {
            return Err(Error::Cleanup(vec!["the container's process does not end".into()]));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Takes back every step, whatever happens to the ones before; the state directory goes
/// last and only if nothing else is left.
///
/// # Errors
/// [`Error::Cleanup`] with one text per step that failed; the record then says what is left
/// and is saved.
pub(crate) fn tear_down(directory: &StateDir, record: &mut Record) -> Result<()> {
    let mut failures = isolation::undo(record).err().unwrap_or_default();
    if let Some(paths) = record.cgroup.clone() {
        let cgroup = Cgroup::open(paths);
        let removed = cgroup.kill_all(libc::SIGKILL).and_then(|()| cgroup.remove());
        match removed {
            Ok(()) => record.cgroup = None,
            Err(error) => failures.push(chain(&error)),
        }
    }
    if let Some(groups) = &record.rdt {
        match groups.remove() {
            Ok(()) => record.rdt = None,
            Err(failure) => failures.push(chain(&failure)),
        }
    }
    if !failures.is_empty() {
        let _ = directory.save(record);
        return Err(Error::Cleanup(failures));
    }
    Ok(directory.remove()?)
}
