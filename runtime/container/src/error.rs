//! What can go wrong, in the words clients of OCI runtimes match on.

use std::io;
use std::path::PathBuf;

use crate::child::Step;
use crate::status::Status;

/// The result of every verb.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One system action that failed. The cause is the source, not part of the text.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct Failure {
    /// What was attempted, with its arguments.
    pub what: String,
    /// Why the kernel refused; absent when this crate itself refused.
    #[source]
    pub source: Option<io::Error>,
}

impl Failure {
    /// A refusal of ours: the text says all.
    pub fn refused(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: None }
    }

    /// The errno of the cause, if there is one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        self.source.as_ref().and_then(io::Error::raw_os_error)
    }
}

/// Attaches what was being done to an I/O error.
pub trait Doing<T> {
    /// Names the action; `what` runs only on failure.
    ///
    /// # Errors
    /// The receiver's error, named.
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure { what: what(), source: Some(error.into()) })
    }
}

/// Everything a verb can report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No state directory of that name.
    #[error("container does not exist")]
    NotFound,
    /// The state directory is there already.
    #[error("container with given ID already exists")]
    Exists,
    /// Only letters, digits and `_+-.` may be used.
    #[error("invalid container ID format: {0:?}")]
    InvalidId(String),
    /// The verb needs a process and there is none.
    #[error("container not running")]
    NotRunning,
    /// `start` on something that is past it.
    #[error("{}", match .0 {
        Status::Running | Status::Paused => "cannot start an already running container",
        Status::Stopped => "cannot start a container that has stopped",
        Status::Creating | Status::Created => "cannot start a container that is being created",
    })]
    CannotStart(Status),
    /// `exec` needs a running container.
    #[error("{}", match .0 {
        Status::Paused => "cannot exec in a paused container (use --ignore-paused)",
        _ => "cannot exec in a stopped container",
    })]
    CannotExec(Status),
    /// `checkpoint` needs a program that runs.
    #[error("Container cannot be checkpointed in {0} state")]
    CannotCheckpoint(Status),
    /// `delete` without `--force`.
    #[error("cannot delete container {id} that is not stopped: {status}")]
    NotStopped {
        /// The container.
        id: String,
        /// What it is instead of stopped.
        status: Status,
    },
    /// `resume` needs a paused container.
    #[error("container not paused")]
    NotPaused,
    /// `pause` and others that need life.
    #[error("container not running or created: {0}")]
    NotAlive(Status),
    /// The configuration could not be read or parsed.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// The configuration asks for something contradictory or impossible.
    #[error("invalid configuration: {0}")]
    Invalid(String),
    /// The configuration asks for something this runtime does not do.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// A state file that cannot be understood.
    #[error("unable to read the state of the container in {path}")]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A system action of the runtime itself.
    #[error(transparent)]
    System(#[from] Failure),
    /// A step of the container's own process before it became the user's program.
    #[error("unable to start container process: {step}")]
    Child {
        /// How far it had come.
        step: Step,
        /// What failed there.
        #[source]
        failure: Failure,
    },
    /// The container's process ended without a word.
    #[error("unable to start container process: it ended while {0}")]
    ChildVanished(&'static str),
    /// The container's process spoke out of turn.
    #[error("the container's process broke the protocol: {0}")]
    Protocol(String),
    /// A hook failed.
    #[error("error running {kind} hook #{index}")]
    Hook {
        /// The name in the configuration.
        kind: &'static str,
        /// Its position.
        index: usize,
        /// Why.
        #[source]
        source: Failure,
    },
    /// The cgroup layer.
    #[error("cgroup")]
    Cgroup(#[from] pinion_cgroup::Error),
    /// The seccomp profile does not compile.
    #[error("seccomp")]
    Seccomp(#[from] pinion_seccomp::Error),
    /// A strict isolation request that is not in force.
    #[error("isolation refused: {term}: {reason}: {detail}")]
    Isolation {
        /// The contract term.
        term: String,
        /// Machine-readable.
        reason: String,
        /// For a person.
        detail: String,
    },
    /// The isolation layer could not act.
    #[error("isolation: {0}")]
    Placement(String),
    /// Clean-up that did not come to its end; the container can be deleted again.
    #[error("unable to remove everything of the container: {}", .0.join("; "))]
    Cleanup(Vec<String>),
}

/// The error and all its causes in one line, as clients print it.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause_text(cause);
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

/// The kernel's message without Rust's "(os error 2)", in lower case as Go prints it.
fn cause_text(cause: &(dyn std::error::Error + 'static)) -> String {
    let text = cause.to_string();
    match cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
        Some(_) => text.split(" (os error").next().unwrap_or(&text).to_lowercase(),
        None => text,
    }
}
