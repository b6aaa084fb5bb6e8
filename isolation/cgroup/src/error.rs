//! What can go wrong, with the file and value it went wrong on.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure with everything needed to act on it; the cause is in `source()`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A cgroup file could not be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a value.
    #[error("write {value:?} to {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The value.
        value: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A cgroup directory could not be made.
    #[error("create cgroup {}", path.display())]
    Create {
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A cgroup directory could not be removed.
    #[error("remove cgroup {}", path.display())]
    Remove {
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A process could not be signalled.
    #[error("signal {signal} to process {pid} of cgroup {}", path.display())]
    Signal {
        /// The cgroup.
        path: PathBuf,
        /// The process.
        pid: i32,
        /// The signal number.
        signal: i32,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A cgroup file holds something unexpected.
    #[error("{} holds {text:?}, which is not {expected}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What it holds (the line in question).
        text: String,
        /// What was expected.
        expected: &'static str,
    },
    /// A limit was asked for that needs a controller this host does not offer here.
    #[error("cgroup controller {controller} is not available: cannot set {file} to {value:?}")]
    ControllerMissing {
        /// The controller.
        controller: String,
        /// The file the value was meant for.
        file: String,
        /// The value.
        value: String,
    },
    /// A value that makes no sense, whatever the host.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field of `LinuxResources`, in the spec's spelling.
        field: &'static str,
        /// Why.
        reason: String,
    },
    /// A setting this cgroup version has no means for.
    #[error("{field} is not supported on cgroup {version}")]
    Unsupported {
        /// The field of `LinuxResources`, in the spec's spelling.
        field: &'static str,
        /// `v1` or `v2`.
        version: &'static str,
    },
    /// The kernel accepted a value and then held another.
    #[error("{} holds {held:?} after writing {asked:?}", path.display())]
    NotInForce {
        /// The file.
        path: PathBuf,
        /// What was written.
        asked: String,
        /// What was read back.
        held: String,
    },
    /// `cgroupsPath` is not usable.
    #[error("cgroups path {path:?}: {reason}")]
    Path {
        /// The path.
        path: String,
        /// Why.
        reason: &'static str,
    },
    /// The cgroup exists and processes are in it.
    #[error("cgroup {} exists and is not empty", path.display())]
    Occupied {
        /// The directory.
        path: PathBuf,
    },
    /// No cgroup file system is mounted.
    #[error("no cgroup hierarchy is mounted")]
    NoHierarchy,
    /// The kernel did not get there in time.
    #[error("cgroup {} is not {state} after {} ms", path.display(), after.as_millis())]
    Timeout {
        /// The directory.
        path: PathBuf,
        /// What was waited for.
        state: &'static str,
        /// How long.
        after: Duration,
    },
    /// The device program could not be put in force.
    #[error("{action} device program of cgroup {}", path.display())]
    DeviceProgram {
        /// The directory.
        path: PathBuf,
        /// `load`, `attach` ...
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// systemd refused or could not be reached.
    #[error("systemd: {action} unit {unit}")]
    Systemd {
        /// The unit.
        unit: String,
        /// `start`, `stop` ...
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What a caller can decide on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request is wrong, on every host.
    Invalid,
    /// This host cannot do it.
    Unsupported,
    /// We are not allowed to.
    Permission,
    /// The kernel did not keep its word.
    NotInForce,
    /// The cgroup is gone.
    NotFound,
    /// The cgroup is in use.
    Busy,
    /// Not in time.
    Timeout,
    /// Anything else.
    Other,
}

impl Error {
    /// The class of this failure.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid { .. } | Self::Path { .. } => ErrorKind::Invalid,
            Self::ControllerMissing { .. } | Self::Unsupported { .. } | Self::NoHierarchy => {
                ErrorKind::Unsupported
            }
            Self::NotInForce { .. } => ErrorKind::NotInForce,
            Self::Timeout { .. } => ErrorKind::Timeout,
            Self::Occupied { .. } => ErrorKind::Busy,
            Self::Parse { .. } => ErrorKind::Other,
            Self::Write { source, .. } if source.kind() == io::ErrorKind::InvalidInput => {
                ErrorKind::Invalid
            }
            Self::Read { source, .. }
            | Self::Write { source, .. }
            | Self::Create { source, .. }
            | Self::Remove { source, .. }
            | Self::Signal { source, .. }
            | Self::DeviceProgram { source, .. }
            | Self::Systemd { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    ErrorKind::Permission
                }
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                io::ErrorKind::ResourceBusy => ErrorKind::Busy,
                _ => ErrorKind::Other,
            },
        }
    }
}
