//! Runs a command and turns a failure into an error that shows what it said.

use std::process::{Command, Output, Stdio};

use crate::error::{During, Error, Result};

/// The command line as a person would type it.
pub(crate) fn line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs a command to its end with nothing on standard input; its output, if it succeeded.
pub(crate) fn run(command: &mut Command) -> Result<Output> {
    let text = line(command);
    let output = command.stdin(Stdio::null()).output().during(|| format!("run `{text}`"))?;
    if output.status.success() {
        return Ok(output);
    }
    Err(Error::Command {
        command: text,
        status: output.status.to_string(),
        stderr: tail(&String::from_utf8_lossy(&output.stderr), 12),
    })
}

/// Runs a command and returns its standard output as text.
pub(crate) fn text(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&run(command)?.stdout).into_owned())
}

/// The last `lines` lines of a text.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.trim_end().lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Whether a program is on the PATH.
pub(crate) fn exists(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}
