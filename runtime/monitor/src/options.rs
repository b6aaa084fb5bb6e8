//! Command line of `pinion-monitor`.

use std::ffi::OsString;
use std::path::PathBuf;

/// Printed by `--help`.
pub const USAGE: &str = "\
Keeps the stdio, logs and exit codes of one pod's containers.

Usage: pinion-monitor --pod ID --dir DIR --runtime PATH --runtime-root DIR [options]

  --pod ID             the pod's id
  --dir DIR            the pod's directory: monitor.sock, monitor.pid, monitor.log
  --runtime PATH       the OCI runtime to invoke
  --runtime-root DIR   the runtime's --root
  --systemd-cgroup     pass --systemd-cgroup to the runtime
  --machine PLAN       run the containers in a virtual machine, started as the file says
  --foreground         do not go to the background; print a line once listening
  --version, --help
";

/// What to do, as asked for by the arguments.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Monitor a pod.
    Monitor(Options),
    /// Print the version.
    Version,
    /// Print [`USAGE`].
    Help,
}

/// How to monitor a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Id of the pod, for people.
    pub pod: String,
    /// Directory of the pod, absolute.
    pub dir: PathBuf,
    /// Path of the OCI runtime.
    pub runtime: PathBuf,
    /// The runtime's `--root`.
    pub runtime_root: PathBuf,
    /// Whether the runtime is to use systemd's cgroup driver.
    pub systemd_cgroup: bool,
    /// Stay in the foreground.
    pub foreground: bool,
    /// Plan of the virtual machine the containers run in, if they do.
    pub machine: Option<PathBuf>,
}

/// Why the arguments cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UsageError {
    /// An argument is not known.
    #[error("unknown argument {0:?}")]
    Unknown(OsString),
    /// An option stands without its value.
    #[error("{0} needs a value")]
    NoValue(&'static str),
    /// A required option is absent.
    #[error("{0} is required")]
    Missing(&'static str),
    /// A path is relative.
    #[error("{0} must be an absolute path, not {1:?}")]
    Relative(&'static str, PathBuf),
}

/// Reads the arguments that follow the program's name; `--option VALUE` and
/// `--option=VALUE` are the same.
///
/// # Errors
/// [`UsageError`] names the argument at fault.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, UsageError> {
    let (mut pod, mut dir, mut runtime, mut runtime_root) = (None, None, None, None);
    let (mut systemd_cgroup, mut foreground, mut machine) = (false, false, None);
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let text = argument.to_str().ok_or_else(|| UsageError::Unknown(argument.clone()))?;
        let (name, inline) = match text.split_once('=') {
            Some((name, value)) => (name, Some(OsString::from(value))),
            None => (text, None),
        };
        let mut value =
            |name| inline.clone().or_else(|| arguments.next()).ok_or(UsageError::NoValue(name));
        match name {
            "--pod" => pod = Some(value("--pod")?),
            "--dir" => dir = Some(absolute("--dir", value("--dir")?)?),
            "--runtime" => runtime = Some(absolute("--runtime", value("--runtime")?)?),
            "--runtime-root" => {
                runtime_root = Some(absolute("--runtime-root", value("--runtime-root")?)?);
            }
            "--machine" => machine = Some(absolute("--machine", value("--machine")?)?),
            "--systemd-cgroup" => systemd_cgroup = true,
            "--foreground" => foreground = true,
            "--version" => return Ok(Command::Version),
            "--help" | "-h" => return Ok(Command::Help),
            _ => return Err(UsageError::Unknown(argument)),
        }
    }
    Ok(Command::Monitor(Options {
        pod: pod.ok_or(UsageError::Missing("--pod"))?.to_string_lossy().into_owned(),
        dir: dir.ok_or(UsageError::Missing("--dir"))?,
        runtime: runtime.ok_or(UsageError::Missing("--runtime"))?,
        runtime_root: runtime_root.ok_or(UsageError::Missing("--runtime-root"))?,
        systemd_cgroup,
        foreground,
        machine,
    }))
}

fn absolute(name: &'static str, value: OsString) -> Result<PathBuf, UsageError> {
    let path = PathBuf::from(value);
    if path.is_absolute() { Ok(path) } else { Err(UsageError::Relative(name, path)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, UsageError> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn both_forms_of_options_are_read() {
        let Ok(Command::Monitor(options)) =
            parsed("--pod p --dir=/d --runtime /bin/r --runtime-root=/run/r --systemd-cgroup")
        else {
            panic!("not read")
        };
        assert_eq!(options.pod, "p");
        assert_eq!(options.dir, PathBuf::from("/d"));
        assert_eq!(options.runtime_root, PathBuf::from("/run/r"));
        assert!(options.systemd_cgroup && !options.foreground);
    }

    #[test]
    fn bad_arguments_are_named() {
        assert_eq!(parsed("--pod"), Err(UsageError::NoValue("--pod")));
        assert_eq!(parsed("--pod p"), Err(UsageError::Missing("--dir")));
        assert_eq!(parsed("--dir d"), Err(UsageError::Relative("--dir", "d".into())));
        assert_eq!(parsed("--color"), Err(UsageError::Unknown("--color".into())));
    }
}
