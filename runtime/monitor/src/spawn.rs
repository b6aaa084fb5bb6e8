//! Invocations of the OCI runtime: arguments, start, and what it said when it failed.
//!
//! posix_spawn(3) rather than `std::process`: the monitor blocks signals for its signalfd,
//! and containers must not inherit that mask.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::SigSet;
use serde::Deserialize;

use crate::options::Options;

/// `PATH` of the runtime and its hooks when the monitor has none.
const DEFAULT_PATH: &CStr = c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Only this much of the end of a runtime's log is searched for its error.
const LOG_TAIL: u64 = 64 * 1024;

/// What the runtime is to do with a container.
#[derive(Debug)]
pub enum Verb<'a> {
    /// Create it from a bundle.
    Create {
        /// Directory with config.json.
        bundle: &'a Path,
        /// Where to write the pid of its init.
        pid_file: &'a Path,
        /// Where to send the terminal's master.
        console: Option<&'a Path>,
    },
    /// Start its process.
    Start,
    /// Send a signal to its init.
    Kill {
        /// Number of the signal.
        signal: i32,
        /// To all its processes instead.
        all: bool,
    },
    /// Remove it.
    Delete {
        /// Kill it first.
        force: bool,
    },
    /// Change its limits.
    Update {
        /// OCI resources as JSON.
        resources: &'a Path,
    },
    /// Run another process in it.
    Exec {
        /// OCI process JSON.
        process: &'a Path,
        /// Where to write the pid of the process.
        pid_file: &'a Path,
        /// Where to send the terminal's master.
        console: Option<&'a Path>,
    },
}

impl Verb<'_> {
    /// The runtime's subcommand.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Create { .. } => "create",
            Self::Start => "start",
            Self::Kill { .. } => "kill",
            Self::Delete { .. } => "delete",
            Self::Update { .. } => "update",
            Self::Exec { .. } => "exec",
        }
    }
}

/// The whole command line, as runc and its likes read it.
#[must_use]
pub fn arguments(options: &Options, log: &Path, id: &str, verb: &Verb<'_>) -> Vec<CString> {
    let mut line: Vec<&OsStr> = vec![
        options.runtime.as_os_str(),
        "--root".as_ref(),
        options.runtime_root.as_os_str(),
        "--log".as_ref(),
        log.as_os_str(),
        "--log-format".as_ref(),
        "json".as_ref(),
    ];
    if options.systemd_cgroup {
        line.push("--systemd-cgroup".as_ref());
    }
    line.push(verb.name().as_ref());
    let signal_text;
    let mut signal_argument = None;
    match verb {
        Verb::Create { bundle, pid_file, console } => {
            line.extend(["--bundle".as_ref(), bundle.as_os_str()]);
            line.extend(["--pid-file".as_ref(), pid_file.as_os_str()]);
            line.extend(console.iter().flat_map(|c| ["--console-socket".as_ref(), c.as_os_str()]));
        }
        Verb::Start => {}
        Verb::Kill { signal, all } => {
            line.extend(all.then_some(OsStr::new("--all")));
            signal_text = signal.to_string();
            signal_argument = Some(OsStr::new(&signal_text));
        }
        Verb::Delete { force } => line.extend(force.then_some(OsStr::new("--force"))),
        Verb::Update { resources } => line.extend(["--resources".as_ref(), resources.as_os_str()]),
        Verb::Exec { process, pid_file, console } => {
            line.extend(["--detach".as_ref(), "--process".as_ref(), process.as_os_str()]);
            line.extend(["--pid-file".as_ref(), pid_file.as_os_str()]);
            line.extend(console.iter().flat_map(|c| ["--console-socket".as_ref(), c.as_os_str()]));
        }
    }
    line.push(id.as_ref());
    line.extend(signal_argument);
    line.into_iter().filter_map(|argument| CString::new(argument.as_bytes()).ok()).collect()
}

/// Starts a program with the given stdin, stdout and stderr, an environment of nothing but
/// `PATH` and no signal blocked or ignored; returns its pid.
///
/// # Errors
/// Those of posix_spawn(3).
pub fn spawn(command: &[CString], stdio: [BorrowedFd<'_>; 3]) -> io::Result<i32> {
    let program = command.first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut actions = PosixSpawnFileActions::init()?;
    for (target, fd) in (0..).zip(stdio) {
        actions.add_dup2(fd.as_raw_fd(), target)?;
    }
    let mut attributes = PosixSpawnAttr::init()?;
    // Whatever we or who started us ignore is no business of a container's.
    attributes.set_sigdefault(&SigSet::all())?;
    attributes.set_sigmask(&SigSet::empty())?;
    attributes.set_flags(
        PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK,
    )?;
    let path = std::env::var_os("PATH")
        .and_then(|path| CString::new([b"PATH=".as_slice(), path.as_bytes()].concat()).ok());
    let environment = [path.as_deref().unwrap_or(DEFAULT_PATH)];
    let pid = posix_spawn(program.as_c_str(), &actions, &attributes, command, &environment)?;
    Ok(pid.as_raw())
}

/// The part of a runtime's log that one invocation writes.
#[derive(Debug)]
pub struct RuntimeLog {
    path: PathBuf,
    start: u64,
}

impl RuntimeLog {
    /// Whatever is added to `path` from now on.
    #[must_use]
    pub fn from_now(path: PathBuf) -> Self {
        let start = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
        Self { path, start }
    }

    /// Where the log is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The last error the runtime logged.
    #[must_use]
    pub fn last_error(&self) -> Option<String> {
        let mut file = File::open(&self.path).ok()?;
        let end = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(self.start.max(end.saturating_sub(LOG_TAIL)))).ok()?;
        let mut text = Vec::new();
        file.take(LOG_TAIL).read_to_end(&mut text).ok()?;
        last_error(&text)
    }
}

/// The message of the last line of level error or worse.
fn last_error(log: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Line {
        level: String,
        msg: String,
    }
    log.split(|byte| *byte == b'\n')
        .rev()
        .filter_map(|line| serde_json::from_slice::<Line>(line).ok())
        .find(|line| matches!(line.level.as_str(), "error" | "fatal" | "panic"))
        .map(|line| line.msg)
}

/// A pid as runtimes write it into `--pid-file`.
///
/// # Errors
/// Those of reading the file; `InvalidData` if it holds no pid.
pub fn read_pid(path: &Path) -> io::Result<i32> {
    let text = std::fs::read_to_string(path)?;
    match text.trim().parse() {
        Ok(pid) if pid > 1 => Ok(pid),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} is no pid"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::Signal;
    use std::os::fd::AsFd;

    fn line(systemd_cgroup: bool, verb: &Verb<'_>) -> String {
        let options = Options {
            pod: "p".to_owned(),
            dir: "/d".into(),
            runtime: "/bin/r".into(),
            runtime_root: "/run/r".into(),
            systemd_cgroup,
            foreground: false,
            machine: None,
        };
        let words = arguments(&options, Path::new("/l"), "c1", verb);
        words.iter().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn command_lines_are_those_runc_knows() {
        let global = "/bin/r --root /run/r --log /l --log-format json";
        let (bundle, pid_file) = (Path::new("/b"), Path::new("/p"));
        let create = Verb::Create { bundle, pid_file, console: Some(Path::new("/s")) };
        assert_eq!(
            line(true, &create),
            format!(
                "{global} --systemd-cgroup create --bundle /b --pid-file /p --console-socket /s c1"
            )
        );
        let process = Path::new("/j");
        assert_eq!(
            line(false, &Verb::Exec { process, pid_file, console: None }),
            format!("{global} exec --detach --process /j --pid-file /p c1")
        );
        assert_eq!(line(false, &Verb::Start), format!("{global} start c1"));
        assert_eq!(
            line(false, &Verb::Kill { signal: 9, all: true }),
            format!("{global} kill --all c1 9")
        );
        let delete = Verb::Delete { force: true };
        assert_eq!(line(false, &delete), format!("{global} delete --force c1"));
    }

    #[test]
    fn the_last_error_is_found_between_warnings_and_noise() {
        let log = br#"{"level":"error","msg":"first"}
{"level":"error","msg":"exec: \"x\": not found","time":"t"}
not json
{"level":"warning","msg":"later"}
"#;
        assert_eq!(last_error(log).as_deref(), Some("exec: \"x\": not found"));
        assert_eq!(last_error(b""), None);
    }

    #[test]
    fn only_what_an_invocation_added_is_its_log() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        std::fs::write(&path, "{\"level\":\"error\",\"msg\":\"old\"}\n").unwrap();
        assert_eq!(RuntimeLog::from_now(path).last_error(), None);
    }

    #[test]
    fn a_spawned_program_has_no_blocked_or_ignored_signals_and_no_foreign_environment() {
        SigSet::from(Signal::SIGTERM).thread_block().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let null = File::open("/dev/null").unwrap();
        let script = c"/bin/sh -c";
        let mut command: Vec<CString> =
            script.to_str().unwrap().split(' ').map(|word| CString::new(word).unwrap()).collect();
        command.push(c"grep Sig /proc/self/status; env".to_owned());
        let pid = spawn(&command, [null.as_fd(), writer.as_fd(), null.as_fd()]).unwrap();
        drop(writer);
        let text = io::read_to_string(reader).unwrap();
        rustix::process::waitpid(
            rustix::process::Pid::from_raw(pid),
            rustix::process::WaitOptions::empty(),
        )
        .unwrap();
        assert!(text.contains("SigBlk:\t0000000000000000"), "{text}");
        // 32 to 34 are the C library's own and beyond everyone's reach.
        let ignored = text.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
        let ignored = u64::from_str_radix(ignored, 16).unwrap();
        assert_eq!(ignored & !(0b111 << 31), 0, "{text}");
        assert!(text.contains("PATH=") && !text.contains("CARGO"), "{text}");
    }
}
