//! Watching a container's memory cgroup for processes the kernel killed.
//!
//! The count is always read from the cgroup; notifications only say when to look. On v2
//! that is `memory.events`, which can be polled; on v1 `memory.oom_control`, with an
//! eventfd named in `cgroup.event_control` (cgroup-v2.rst "Memory Interface Files",
//! cgroup-v1/memory.rst section 10).

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::EventfdFlags;

use crate::reactor::{Interest, Reactor, Watched};

/// A watched cgroup.
#[derive(Debug)]
pub struct OomWatch {
    notifier: Watched,
    file: PathBuf,
    interest: Interest,
    /// Kills before the container came.
    base: u64,
    /// Kills told so far.
    told: u64,
}

impl OomWatch {
    /// Watches a v2 cgroup directory, or a v1 memory cgroup directory if `v2` is empty;
    /// nothing if both are.
    ///
    /// # Errors
    /// Those of opening the cgroup's files; v1 also those of registering the eventfd.
    pub fn open(v2: &str, v1: &str) -> io::Result<Option<Self>> {
        let watch = match (v2, v1) {
            ("", "") => return Ok(None),
            ("", directory) => {
                let file = Path::new(directory).join("memory.oom_control");
                (Watched::new(register(Path::new(directory), &file)?), file, Interest::Read)
            }
            (directory, _) => {
                let file = Path::new(directory).join("memory.events");
                (Watched::new(fs::File::open(&file)?.into()), file, Interest::Change)
            }
        };
        let (notifier, file, interest) = watch;
        let base = kills(&fs::read_to_string(&file)?);
        Ok(Some(Self { notifier, file, interest, base, told: 0 }))
    }

    /// Starts to report on the cgroup.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn watch<S: Copy, T>(&mut self, reactor: &mut Reactor<S, T>, source: S) -> io::Result<()> {
        self.notifier.watch(reactor, self.interest, source)
    }

    /// Reports nothing more.
    pub fn unwatch<S: Copy, T>(&mut self, reactor: &mut Reactor<S, T>) {
        self.notifier.unwatch(reactor);
    }

    /// Takes note of a notification, so that the next one is seen. Fails when the cgroup
    /// is gone.
    ///
    /// # Errors
    /// Those of reading the notifier or the cgroup's file.
    pub fn acknowledge(&mut self) -> io::Result<()> {
        let mut buffer = [0; 512];
        match self.interest {
            Interest::Change => drop(rustix::io::pread(&self.notifier, &mut buffer, 0)?),
            _ => drop(rustix::io::read(&self.notifier, &mut buffer)?),
        }
        fs::metadata(&self.file).map(drop)
    }

    /// Processes killed since the watch began, if there are more than told before.
    pub fn news(&mut self) -> Option<u64> {
        let count = self.kills();
        let more = count > self.told;
        self.told = self.told.max(count);
        more.then_some(count)
    }

    /// Processes killed since the watch began; as last told when the cgroup is gone.
    #[must_use]
    pub fn kills(&self) -> u64 {
        fs::read_to_string(&self.file)
            .map_or(self.told, |text| kills(&text).saturating_sub(self.base))
    }
}

/// Names a new eventfd in `cgroup.event_control`.
fn register(directory: &Path, control: &Path) -> io::Result<OwnedFd> {
    let control = fs::File::open(control)?;
    let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let line = format!("{} {}", event.as_raw_fd(), control.as_fd().as_raw_fd());
    fs::write(directory.join("cgroup.event_control"), line)?;
    Ok(event)
}

/// The `oom_kill` line of `memory.events` or `memory.oom_control`.
fn kills(text: &str) -> u64 {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kill_count_is_found_in_both_formats() {
        assert_eq!(kills("low 0\nhigh 0\nmax 9\noom 3\noom_kill 2\noom_group_kill 1\n"), 2);
        assert_eq!(kills("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"), 7);
        assert_eq!(kills(""), 0);
    }

    #[test]
    fn no_cgroup_is_no_watch_and_a_missing_one_is_an_error() {
        assert!(OomWatch::open("", "").unwrap().is_none());
        assert!(OomWatch::open("/nonexistent", "").is_err());
        assert!(OomWatch::open("", "/nonexistent").is_err());
    }
}
