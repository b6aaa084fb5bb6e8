//! How processes end, and the exit file that outlives the monitor.

use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use pinion_monitor_proto::message::{Cause, Exited};
use rustix::process::WaitStatus;
use serde::{Deserialize, Serialize};

/// Content of `exit.json`: how a container's init ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitFile {
    /// 0..=255; 128 + n for signal n.
    pub code: i32,
    /// The signal that ended it, 0 if it exited by itself.
    pub signal: i32,
    /// Nanoseconds since the epoch.
    pub finished_at: i64,
    /// Whether the kernel killed it, or a part of it, for want of memory.
    pub oom_killed: bool,
    /// `vmm-gone`, `guest-panic` or `guest-broken`, where the machine ended under it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
}

impl From<&Exited> for ExitFile {
    fn from(exited: &Exited) -> Self {
        Self {
            code: exited.code,
            signal: exited.signal,
            finished_at: exited.finished_at,
            oom_killed: exited.oom_killed,
            cause: cause_name(exited.cause()).map(str::to_owned),
        }
    }
}

/// A cause in `exit.json`'s words; none for an end of its own.
fn cause_name(cause: Cause) -> Option<&'static str> {
    match cause {
        Cause::Own => None,
        Cause::VmmGone => Some("vmm-gone"),
        Cause::GuestPanic => Some("guest-panic"),
        Cause::GuestBroken => Some("guest-broken"),
    }
}

/// The end of a process as wait(2) told it, with the time now.
#[must_use]
pub fn exited(status: WaitStatus) -> Exited {
    told(status.exit_status(), status.terminating_signal())
}

fn told(code: Option<i32>, signal: Option<i32>) -> Exited {
    let signal = signal.unwrap_or(0);
    let code = code.unwrap_or(128 + signal);
    Exited { code, signal, finished_at: now(), ..Exited::default() }
}

/// Nanoseconds since the epoch.
#[must_use]
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Writes `exit.json` into a container's directory, whole or not at all.
///
/// # Errors
/// Those of creating, writing and renaming the file.
pub fn record(directory: &Path, exited: &Exited) -> io::Result<()> {
    let text = serde_json::to_vec(&ExitFile::from(exited))?;
    pinion_sys::atomic_file::write_volatile(&directory.join("exit.json"), &text, 0o600)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_signals_are_told_as_shells_do() {
        let by_itself = told(Some(7), None);
        assert_eq!((by_itself.code, by_itself.signal), (7, 0));
        let killed = told(None, Some(9));
        assert_eq!((killed.code, killed.signal), (137, 9));
    }

    #[test]
    fn the_exit_file_has_the_agreed_shape() {
        let directory = tempfile::tempdir().unwrap();
        let ended = Exited { code: 137, signal: 9, finished_at: 5, ..Exited::default() };
        record(directory.path(), &ended).unwrap();
        let text = std::fs::read_to_string(directory.path().join("exit.json")).unwrap();
        assert_eq!(text, r#"{"code":137,"signal":9,"finished_at":5,"oom_killed":false}"#);
    }
}
