//! Monitor processes: starting them, and ending one that no longer answers.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::process::Command;

use crate::error::{Context, Error, Kind, Result};
use crate::services::blocking;

/// A monitor that has not begun to listen by then never will.
const START_LIMIT: Duration = Duration::from_secs(20);

/// How long a killed monitor may take to be gone.
const END_LIMIT: Duration = Duration::from_secs(5);

/// What a monitor is started with.
#[derive(Debug)]
pub(crate) struct Invocation<'a> {
    pub(crate) program: &'a Path,
    pub(crate) pod: &'a str,
    /// The pod's directory.
    pub(crate) directory: &'a Path,
    pub(crate) runtime: &'a Path,
    pub(crate) runtime_root: &'a Path,
    pub(crate) systemd_cgroup: bool,
    /// Plan of the pod's virtual machine, if it has one.
    pub(crate) machine: Option<&'a Path>,
}

/// Starts a pod's monitor; returns when it listens. It leaves our process tree, so that it
/// outlives us.
pub(crate) async fn start(invocation: &Invocation<'_>) -> Result<()> {
    let mut command = Command::new(invocation.program);
    command
        .arg("--pod")
        .arg(invocation.pod)
        .arg("--dir")
        .arg(invocation.directory)
        .arg("--runtime")
        .arg(invocation.runtime)
        .arg("--runtime-root")
        .arg(invocation.runtime_root)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true);
    if invocation.systemd_cgroup {
        command.arg("--systemd-cgroup");
    }
    if let Some(plan) = invocation.machine {
        command.arg("--machine").arg(plan);
    }
    // A file and not a pipe: the daemonised monitor keeps its standard error, and a pipe
    // would keep us reading for as long as it lives.
    let log = invocation.directory.join("monitor-start.log");
    let file = fs::File::create(&log).context(|| format!("create {}", log.display()))?;
    command.stderr(file);

    let program = invocation.program.display();
    let mut child = command.spawn().context(|| format!("start {program}"))?;
    let status = tokio::time::timeout(START_LIMIT, child.wait())
        .await
        .kind(Kind::Internal, || format!("{program} is not ready after {START_LIMIT:?}"))?
        .context(|| format!("wait for {program}"))?;
    if !status.success() {
        let words = fs::read_to_string(&log).unwrap_or_default();
        return Err(Error::internal(format!("{program}: {status}: {}", words.trim())));
    }
    Ok(())
}

fn pid_file(directory: &Path) -> PathBuf {
    directory.join("monitor.pid")
}

/// The monitor named by the pid file, if that process is a monitor of this very pod.
fn find(directory: &Path) -> Option<Pid> {
    let text = fs::read_to_string(pid_file(directory)).ok()?;
    let pid = Pid::from_raw(text.trim().parse().ok()?)?;
    // A pid may have been used again since; the arguments tell.
    let arguments = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
    let directory = directory.as_os_str().as_encoded_bytes();
    arguments.split(|b| *b == 0).any(|argument| argument == directory).then_some(pid)
}

/// The pid of the pod's monitor, while it lives.
pub(crate) fn pid(directory: &Path) -> Option<i32> {
    find(directory).map(Pid::as_raw_pid)
}

/// Continues the pod's monitor if somebody has stopped it; whether that was so.
pub(crate) fn wake(directory: &Path) -> bool {
    let Some(pid) = find(directory) else { return false };
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    // The name may have any parenthesis in it.
    let state = stat.ok().and_then(|s| s.rsplit_once(')')?.1.trim_start().chars().next());
    if state != Some('T') {
        return false;
    }
    tracing::warn!(monitor = pid.as_raw_nonzero(), "the pod's monitor was stopped, continuing it");
    let sent = pidfd_open(pid, PidfdFlags::empty()).and_then(|pidfd| {
        // As in `kill`: still the same process?
        if find(directory) == Some(pid) { pidfd_send_signal(&pidfd, Signal::CONT) } else { Ok(()) }
    });
    if let Err(error) = sent {
        tracing::warn!(monitor = pid.as_raw_nonzero(), %error, "cannot continue the pod's monitor");
        return false;
    }
    true
}

/// Kills the pod's monitor if it still lives, and waits until it is gone.
pub(crate) async fn end(directory: &Path) -> Result<()> {
    if let Some(pid) = find(directory)
        && let Some(pidfd) = kill(pid, directory)?
    {
        ended(pidfd).await;
    }
    // One that is on its way out and cannot be found any more still holds its lock.
    let lock = pid_file(directory);
    let began = Instant::now();
    while is_locked(&lock) {
        if began.elapsed() > END_LIMIT {
            let message = format!("the monitor that holds {} does not end", lock.display());
            return Err(Error::new(Kind::Unavailable, message));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// Waits until the process has ended, up to the limit.
async fn ended(pidfd: OwnedFd) {
    let limit = Timespec { tv_sec: END_LIMIT.as_secs().cast_signed(), tv_nsec: 0 };
    let wait = move || {
        // A pidfd is readable once its process has ended. Whether it has is asked afterwards.
        let _ = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit));
        Ok(())
    };
    let _ = blocking(wait).await;
}

/// Kills the process; its descriptor, if it was there.
fn kill(pid: Pid, directory: &Path) -> Result<Option<OwnedFd>> {
    let what = || format!("kill monitor {}", pid.as_raw_nonzero());
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(Errno::SRCH) => return Ok(None),
        Err(e) => return Err(e).context(what),
    };
    // Between the look at its arguments and the pidfd the process may have been replaced.
    if find(directory) != Some(pid) {
        return Ok(None);
    }
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => Ok(Some(pidfd)),
        Err(e) => Err(e).context(what),
    }
}

/// Whether a monitor lives: it locks its pid file for as long as it does, so that even one
/// that is on its way out, and has no arguments any more, can be waited for.
fn is_locked(path: &Path) -> bool {
    let Ok(file) = fs::File::open(path) else { return false };
    flock(&file, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_pid_file_kills_nobody() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(pid_file(dir.path()), std::process::id().to_string()).unwrap();
        assert!(find(dir.path()).is_none());
        assert!(!is_locked(&pid_file(dir.path())));
        end(dir.path()).await.unwrap();
    }

    #[tokio::test]
    async fn a_program_that_fails_is_reported_with_its_words() {
        let dir = tempfile::tempdir().unwrap();
        let invocation = Invocation {
            program: Path::new("/bin/cp"),
            pod: "p",
            directory: dir.path(),
            runtime: Path::new("/bin/true"),
            runtime_root: dir.path(),
            systemd_cgroup: false,
            machine: None,
        };
        let text = start(&invocation).await.unwrap_err().chain();
        assert!(text.contains("--pod"), "{text}");
    }
}
