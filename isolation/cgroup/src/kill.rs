//! Listing, killing and removing: getting rid of a cgroup for good.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal};

use crate::{Error, Result, file, freeze};

/// How long a killed process may take to leave its cgroup.
const PATIENCE: Duration = Duration::from_secs(2);

/// The processes in `directory`, and with `recursive` below it. A directory that is gone
/// has none.
pub(crate) fn pids_of(directory: &Path, recursive: bool) -> Result<Vec<i32>> {
    let mut pids = Vec::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        let path = directory.join("cgroup.procs");
        // A threaded v2 cgroup refuses to list processes: it has none of its own.
        let Some(text) = file::read_if_present(&path)? else {
            continue;
        };
        for line in text.lines() {
            let pid = line.trim().parse().map_err(|_not_a_pid| Error::Parse {
                path: path.clone(),
                text: line.to_owned(),
                expected: "a process id",
            })?;
            // 0 stands for a process outside our PID namespace.
            if pid != 0 {
                pids.push(pid);
            }
        }
        if recursive {
            pending.extend(children(&directory)?);
        }
    }
    Ok(pids)
}

/// The cgroups directly below.
fn children(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if file::is_gone(&error) => return Ok(Vec::new()),
        Err(source) => return Err(Error::Read { path: directory.to_owned(), source }),
    };
    let directories =
        entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    Ok(directories.map(|entry| entry.path()).collect())
}

/// Signals everything in `directory` and below. `killer` is the v2 directory when it holds
/// every process; `freezer` where to freeze, and whether that is on v2.
pub(crate) fn all(
    directory: &Path,
    killer: Option<&Path>,
    freezer: Option<(&Path, bool)>,
    signal: i32,
) -> Result<()> {
    if signal != Signal::KILL.as_raw() {
        return signal_each(directory, signal).map(drop);
    }
    if let Some(killer) = killer {
        match file::try_write(&killer.join("cgroup.kill"), "1") {
            Ok(()) => return Ok(()),
            // Before Linux 5.14, or gone altogether.
            Err(error) if file::is_gone(&error) => {}
            // A threaded cgroup has to be killed process by process.
            Err(error) if error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => {}
            Err(source) => {
                let path = killer.join("cgroup.kill");
                return Err(Error::Write { path, value: "1".to_owned(), source });
            }
        }
    }
    kill_until_empty(directory, freezer)
}

/// Frozen processes cannot fork, so one pass reaches all of them; without a freezer the
/// passes go on until one finds nobody alive.
fn kill_until_empty(directory: &Path, freezer: Option<(&Path, bool)>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // A freeze that does not come about in time still slows a fork bomb down.
        let frozen = freezer.is_some_and(|(path, v2)| freeze::set(path, v2, true).is_ok());
        let outcome = signal_each(directory, Signal::KILL.as_raw());
        if let Some((path, v2)) = freezer {
            // Killed processes die only after thawing (v1).
            let _ = freeze::set(path, v2, false);
        }
        let hit = outcome?;
        if frozen || hit == 0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Error::Timeout {
                path: directory.to_owned(),
                state: "without processes",
                after: PATIENCE,
            });
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Signals every process once; returns how many were there to be signalled.
fn signal_each(directory: &Path, signal: i32) -> Result<usize> {
    let mut hit = 0;
    for pid in pids_of(directory, true)? {
        let Some(target) = Pid::from_raw(pid) else {
            continue;
        };
        // A descriptor, since the number may have been reused by the time the signal is sent.
        let outcome = pinion_sys::clone::open_for_signals(target)
            .and_then(|process| pinion_sys::signal::send(process.as_fd(), signal));
        match outcome {
            Ok(()) => hit += 1,
            Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {}
            Err(source) => {
                return Err(Error::Signal { path: directory.to_owned(), pid, signal, source });
            }
        }
    }
    Ok(hit)
}

/// Removes `directory` and the cgroups below it, deepest first.
pub(crate) fn remove_tree(directory: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    // Usually a leaf: no need to look.
    if remove_one(directory, Instant::now())? {
        return Ok(());
    }
    let mut order = vec![directory.to_owned()];
    let mut next = 0;
    while let Some(parent) = order.get(next).cloned() {
        order.extend(children(&parent)?);
        next += 1;
    }
    for path in order.iter().rev() {
        if !remove_one(path, deadline)? {
            let source = io::Error::from(Errno::BUSY);
            return Err(Error::Remove { path: path.clone(), source });
        }
    }
    Ok(())
}

/// One rmdir, retried until `deadline` while the cgroup is busy with dying processes.
/// `false` when it still is.
fn remove_one(path: &Path, deadline: Instant) -> Result<bool> {
    let mut pause = Duration::from_micros(500);
    loop {
        let Err(error) = fs::remove_dir(path) else {
            return Ok(true);
        };
        let busy = error.raw_os_error() == Some(Errno::BUSY.raw_os_error());
        if file::is_gone(&error) {
            return Ok(true);
        } else if !busy && error.kind() != io::ErrorKind::DirectoryNotEmpty {
            return Err(Error::Remove { path: path.to_owned(), source: error });
        } else if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
