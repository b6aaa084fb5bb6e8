//! Running the six kinds of hooks.

use std::ffi::{CString, OsStr};
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime::Hook;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::MemfdFlags;

use crate::error::{Doing, Error, Failure, Result};

/// How much of a failed hook's output goes into the error.
const OUTPUT_BYTES: u64 = 4096;

/// Runs `hooks` one after the other with the container's state on standard input; the first
/// failure ends the series. A hook sees only the environment its entry names.
///
/// # Errors
/// [`Error::Hook`] with the kind, the position and the hook's output.
pub fn run(kind: &'static str, hooks: &[Hook], state: &[u8], directory: &Path) -> Result<()> {
    run_inheriting(kind, hooks, state, directory, &[])
}

/// As [`run`], but a hook without an environment of its own has `inherited`: the rule for
/// `startContainer`, whose hooks belong to the container and its process.
///
/// # Errors
/// As [`run`].
pub fn run_inheriting(
    kind: &'static str,
    hooks: &[Hook],
    state: &[u8],
    directory: &Path,
    inherited: &[CString],
) -> Result<()> {
    for (index, hook) in hooks.iter().enumerate() {
        run_one(hook, state, directory, inherited).map_err(|source| Error::Hook {
            kind,
            index,
            source,
        })?;
    }
    Ok(())
}

/// As [`run`], but every hook runs and failures are returned for the log: the rule for
/// `poststop`.
pub fn run_all(kind: &'static str, hooks: &[Hook], state: &[u8], directory: &Path) -> Vec<Error> {
    let failed = |(index, hook)| {
        let source = run_one(hook, state, directory, &[]).err()?;
        Some(Error::Hook { kind, index, source })
    };
    hooks.iter().enumerate().filter_map(failed).collect()
}

fn run_one(
    hook: &Hook,
    state: &[u8],
    directory: &Path,
    inherited: &[CString],
) -> Result<(), Failure> {
    let path = hook.path();
    if !path.is_absolute() {
        return Err(Failure::refused(format!("hook path {} is not absolute", path.display())));
    }
    let memory = rustix::fs::memfd_create(c"hook-output", MemfdFlags::CLOEXEC)
        .doing(|| "memfd_create".into())?;
    let mut output = std::fs::File::from(memory);
    let copy = || output.try_clone().doing(|| "dup".into());
    let mut command = Command::new(path);
    let mut args = hook.args().iter().flatten();
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    command.args(args).env_clear().current_dir(directory);
    match hook.env() {
        Some(own) => command.envs(own.iter().filter_map(|entry| entry.split_once('='))),
        None => command.envs(inherited.iter().filter_map(variable)),
    };
    command.stdin(Stdio::piped()).stdout(copy()?).stderr(copy()?);
    let mut child = command.spawn().doing(|| format!("run {}", path.display()))?;
    if let Some(mut input) = child.stdin.take() {
        // A hook need not read its input.
        let _ = input.write_all(state);
    }
    let deadline = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok())
        .map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let status = wait(&mut child, deadline, path)?;
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    let _ = output.rewind();
    let _ = output.take(OUTPUT_BYTES).read_to_string(&mut text);
    let ended = match status.signal() {
        // In the words of Go, for the filter of the container may be the reason.
        Some(libc::SIGSYS) => "signal: bad system call".to_owned(),
        _ => status.to_string(),
    };
    Err(Failure::refused(format!("{}: {ended}, output: {}", path.display(), text.trim_end())))
}

fn variable(entry: &CString) -> Option<(&OsStr, &OsStr)> {
    let bytes = entry.as_bytes();
    let end = bytes.iter().position(|byte| *byte == b'=')?;
    Some((OsStr::from_bytes(&bytes[..end]), OsStr::from_bytes(&bytes[end + 1..])))
}

fn wait(
    child: &mut std::process::Child,
    deadline: Option<Instant>,
    path: &Path,
) -> Result<ExitStatus, Failure> {
    let reap = |child: &mut std::process::Child| child.wait().doing(|| "wait for the hook".into());
    let Some(deadline) = deadline else { return reap(child) };
    let pid = rustix::process::Pid::from_child(child);
    let pidfd = pinion_sys::clone::pidfd_open(pid).doing(|| "pidfd_open".into())?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(0) => {
                let _ = child.kill();
                reap(child)?;
                return Err(Failure::refused(format!("{}: timed out", path.display())));
            }
            Ok(_) => return reap(child),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).doing(|| "poll".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        let mut json = serde_json::json!({
            "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["A=b"],
        });
        if let Some(timeout) = timeout {
            json["timeout"] = timeout.into();
        }
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_hook_gets_the_state_and_only_its_own_environment() {
        let script = r#"test "$(cat)" = state && test "$A" = b && test -z "$HOME""#;
        run("prestart", &[hook(script, None)], b"state", Path::new("/")).unwrap();
    }

    #[test]
    fn only_a_hook_without_an_environment_inherits_one() {
        let inherited = [c"C=d=e".to_owned()];
        let mut silent = hook(r#"test "$C" = d=e"#, None);
        let run_it = |hook: &Hook| {
            let hooks = std::slice::from_ref(hook);
            run_inheriting("startContainer", hooks, b"", Path::new("/"), &inherited)
        };
        assert!(run_it(&silent).is_err());
        silent.set_env(None);
        run_it(&silent).unwrap();
    }

    #[test]
    fn a_failing_hook_ends_the_series_and_tells_its_output() {
        let hooks = [hook("true", None), hook("echo why >&2; exit 3", None), hook("false", None)];
        let error = run("createRuntime", &hooks, b"", Path::new("/")).unwrap_err();
        let text = crate::error::chain(&error);
        assert!(text.contains("createRuntime hook #1") && text.contains("why"), "{text}");
    }

    #[test]
    fn a_hook_over_its_time_is_killed() {
        let begin = Instant::now();
        let error = run("prestart", &[hook("exec sleep 60", Some(1))], b"", Path::new("/"));
        assert!(crate::error::chain(&error.unwrap_err()).contains("timed out"));
        assert!(begin.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn poststop_hooks_all_run() {
        let errors =
            run_all("poststop", &[hook("exit 1", None), hook("exit 1", None)], b"", Path::new("/"));
        assert_eq!(errors.len(), 2);
    }
}
