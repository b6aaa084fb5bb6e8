//! Becoming a daemon.
//!
//! The launcher starts the program again in the foreground form, waits for the line that
//! says it listens, and leaves: a fresh process image instead of a fork, so that a pod's
//! monitor shares no written page with anyone and needs no unsafe code. The new process
//! leads a session of its own and adopts orphans below it.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::stat::Mode;
use rustix::fs::FlockOperation;

use crate::error::{Context, Error};
use crate::journal::Journal;
use crate::options::Options;
use crate::pod::Pod;

/// Printed on stdout once the monitor listens.
const READY: &[u8] = b"ready\n";

/// Kernel's OOM killer looks elsewhere first; only root with `CAP_SYS_RESOURCE` may ask.
const OOM_SCORE: &str = "-999";

/// Why there is no monitor.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The daemon ended before it was ready, having told why on stderr.
    #[error("monitor did not come up")]
    NotReady,
    /// Another monitor has the pod.
    #[error("pod directory {0:?} has a monitor already")]
    Taken(std::path::PathBuf),
    /// A system call failed.
    #[error(transparent)]
    Failed(#[from] Error),
}

/// Starts the program again with the same arguments in the background and waits until it
/// listens.
///
/// # Errors
/// When it cannot be started or ends before it listens.
pub fn launch(arguments: impl Iterator<Item = OsString>) -> Result<(), DaemonError> {
    // The path, rather than /proc/self/exe, gives the process its name.
    let program = std::env::current_exe()
        .ok()
        .filter(|path| path.exists())
        .unwrap_or_else(|| "/proc/self/exe".into());
    let mut daemon = Command::new(&program)
        .args(arguments)
        .arg("--foreground")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context(|| format!("start {program:?}"))?;
    let mut line = Vec::new();
    if let Some(mut stdout) = daemon.stdout.take() {
        stdout.read_to_end(&mut line).context(|| "wait for the monitor".to_owned())?;
    }
    if line == READY {
        return Ok(());
    }
    drop(daemon.wait());
    Err(DaemonError::NotReady)
}

/// Monitors the pod until there is nothing left to monitor.
///
/// # Errors
/// When the monitor cannot come up; afterwards only when waiting for events fails.
pub fn serve(options: &Options) -> Result<(), DaemonError> {
    close_inherited();
    // Already a leader when started by a shell with job control: as good.
    rustix::process::setsid().ok();
    // Containers inherit it through the runtime; our own files have explicit modes.
    nix::sys::stat::umask(Mode::from_bits_truncate(0o022));
    drop(std::env::set_current_dir("/"));
    let adopt = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    adopt.context(|| "become a subreaper".to_owned())?;

    let lock = take_pod(&options.dir)?;
    let path = options.dir.join("monitor.log");
    let mut journal = Journal::open(&path).context(|| format!("open {path:?}"))?;
    let oom = OomScore::shield(&mut journal);
    let pod = Pod::new(options.clone(), journal, oom)?.with_machine()?;
    announce().context(|| "announce readiness".to_owned())?;
    let result = pod.run();
    if options.dir.exists() {
        drop(fs::remove_file(options.dir.join("monitor.sock")));
        drop(fs::remove_file(options.dir.join("monitor.pid")));
    }
    drop(lock);
    Ok(result?)
}

/// Closes every descriptor but stdio: whatever the caller leaked must not live as long as
/// the pod.
fn close_inherited() {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else { return };
    let numbers: Vec<i32> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        // The one that listed the directory is closed already.
        nix::unistd::close(number).ok();
    }
}

/// Locks `monitor.pid` for as long as the file returned is open and writes our pid there.
fn take_pod(dir: &Path) -> Result<File, DaemonError> {
    let path = dir.join("monitor.pid");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .context(|| format!("open {path:?}"))?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Err(DaemonError::Taken(dir.to_owned()));
    }
    let written = file
        .set_len(0)
        .and_then(|()| writeln!(file, "{}", rustix::process::getpid().as_raw_nonzero()));
    written.context(|| format!("write {path:?}"))?;
    Ok(file)
}

/// Tells the launcher, then lets go of its stdout and stderr.
fn announce() -> io::Result<()> {
    let null: OwnedFd = OpenOptions::new().read(true).write(true).open("/dev/null")?.into();
    let mut stdout = io::stdout();
    stdout.write_all(READY)?;
    stdout.flush()?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    Ok(())
}

/// Keeps the OOM killer away from the monitor but not from what it starts.
///
/// The score is inherited, so it is the ordinary one whenever a child is made.
#[derive(Debug)]
pub struct OomScore(Option<(File, String)>);

impl OomScore {
    /// Lowers our score if we may.
    pub fn shield(journal: &mut Journal) -> Self {
        let path = "/proc/self/oom_score_adj";
        let lowered = fs::read_to_string(path).and_then(|ordinary| {
            let mut file = OpenOptions::new().write(true).open(path)?;
            file.write_all(OOM_SCORE.as_bytes())?;
            Ok((file, ordinary))
        });
        Self(journal.noted("oom_score_adj stays as it is", lowered))
    }

    /// Runs `spawn` with the ordinary score.
    pub fn exposed<T>(&mut self, spawn: impl FnOnce() -> T) -> T {
        if let Self(Some((file, ordinary))) = self {
            drop(file.write_all(ordinary.as_bytes()));
        }
        let result = spawn();
        if let Self(Some((file, _))) = self {
            drop(file.write_all(OOM_SCORE.as_bytes()));
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_has_one_monitor_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let first = take_pod(directory.path()).unwrap();
        assert!(matches!(take_pod(directory.path()), Err(DaemonError::Taken(_))));
        let pid = fs::read_to_string(directory.path().join("monitor.pid")).unwrap();
        assert_eq!(pid.trim(), std::process::id().to_string());
        drop(first);
        assert!(take_pod(directory.path()).is_ok());
    }
}
