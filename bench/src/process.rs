//! Running commands: how long they take and how much memory they need.

use std::error::Error;
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use nix::sys::resource::{UsageWho, getrusage};

/// The hidden first argument that turns this program into a measuring parent.
pub(crate) const MEASURE: &str = "--measure-peak-memory";

/// Runs a command to its end; the milliseconds it took. Its standard error goes to `log`,
/// which becomes part of the error when it fails.
pub(crate) fn timed(command: &mut Command, log: &Path) -> Result<f64, Box<dyn Error>> {
    let errors = File::create(log)?;
    command.stdin(Stdio::null()).stdout(errors.try_clone()?).stderr(errors);
    let started = Instant::now();
    let status = command.status().map_err(|error| format!("{command:?}: {error}"))?;
    let elapsed = started.elapsed().as_secs_f64() * 1000.0;
    if status.success() {
        return Ok(elapsed);
    }
    let mut text = String::new();
    File::open(log)?.read_to_string(&mut text)?;
    Err(format!("{command:?}: {status}: {}", text.trim()).into())
}

/// The peak resident memory, in KiB, of a command and what it waited for.
///
/// The kernel keeps the maximum over all children of a process, so each command gets a
/// parent of its own: this program again, started in a mode that does nothing else. What the
/// parent itself has resident (about 1 MiB) is the least that can be measured.
pub(crate) fn peak_memory(command: &Command) -> Result<f64, Box<dyn Error>> {
    let mut parent = Command::new(std::env::current_exe()?);
    parent.arg(MEASURE).arg(command.get_program()).args(command.get_args());
    let output = parent.stdin(Stdio::null()).stderr(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let value = text.lines().last().and_then(|line| line.strip_prefix("peak ")?.parse().ok());
    value.ok_or_else(|| format!("{command:?}: no measurement: {text}").into())
}

/// The measuring parent: runs the command given by the remaining arguments.
pub(crate) fn measure(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(program) = arguments.next() else {
        return ExitCode::FAILURE;
    };
    let run = Command::new(program).args(arguments).stdout(Stdio::null()).status();
    match (run, getrusage(UsageWho::RUSAGE_CHILDREN)) {
        (Ok(status), Ok(usage)) if status.success() => {
            println!("peak {}", usage.max_rss());
            ExitCode::SUCCESS
        }
        _ => ExitCode::FAILURE,
    }
}
