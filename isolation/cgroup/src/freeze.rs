//! Freezing and thawing, with the wait until it is done.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{Error, Result, file};

const PATIENCE: Duration = Duration::from_secs(2);

/// How often a stuck v1 freeze is thawed and tried again: a process in the middle of a
/// fork or of a wait that cannot be interrupted may keep it in FREEZING.
const V1_RETRY: Duration = Duration::from_millis(50);

/// Freezes or thaws and returns once the kernel says so. A freeze that does not succeed is
/// taken back.
pub(crate) fn set(directory: &Path, v2: bool, frozen: bool) -> Result<()> {
    let outcome = if v2 { set_v2(directory, frozen) } else { set_v1(directory, frozen) };
    if outcome.is_err() && frozen {
        let (name, value) = if v2 { ("cgroup.freeze", "0") } else { ("freezer.state", "THAWED") };
        let _ = file::try_write(&directory.join(name), value);
    }
    outcome
}

/// Whether every process is stopped.
pub(crate) fn is_frozen(directory: &Path, v2: bool) -> Result<bool> {
    if v2 {
        let events = file::read_if_present(&directory.join("cgroup.events"))?;
        return Ok(crate::stats::value_of(&events.unwrap_or_default(), "frozen") == Some(1));
    }
    let state = file::read_if_present(&directory.join("freezer.state"))?;
    Ok(state.is_some_and(|state| state.trim() == "FROZEN"))
}

fn timeout(directory: &Path, frozen: bool) -> Error {
    let state = if frozen { "frozen" } else { "thawed" };
    Error::Timeout { path: directory.to_owned(), state, after: PATIENCE }
}

fn set_v2(directory: &Path, frozen: bool) -> Result<()> {
    let path = directory.join("cgroup.events");
    let events = File::open(&path).map_err(|source| Error::Read { path, source })?;
    file::write(&directory.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
    let deadline = Instant::now() + PATIENCE;
    while is_frozen(directory, true)? != frozen {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(timeout(directory, frozen));
        }
        // The file signals every change; the short timeout covers one that came before.
        let pause = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        let _ = poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&pause));
    }
    Ok(())
}

fn set_v1(directory: &Path, frozen: bool) -> Result<()> {
    let path = directory.join("freezer.state");
    let wanted = if frozen { "FROZEN" } else { "THAWED" };
    let started = Instant::now();
    let mut tried = started;
    file::write(&path, wanted)?;
    loop {
        let state = file::read(&path)?;
        if state.trim() == wanted {
            return Ok(());
        }
        if started.elapsed() > PATIENCE {
            return Err(timeout(directory, frozen));
        }
        if frozen && tried.elapsed() > V1_RETRY {
            file::write(&path, "THAWED")?;
            file::write(&path, wanted)?;
            tried = Instant::now();
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}
