//! Why a request cannot be served, and how a client is told.

use std::error::Error as _;
use std::io;

use pinion_monitor_proto::message::{self, error::Kind};

use crate::log::file::OpenError;

/// Beginning of the runtime's message when a strict isolation term is not in force.
const REFUSAL: &str = "isolation refused:";

/// A request that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No container or exec of this name.
    #[error("{what} {id:?} does not exist")]
    NotFound {
        /// "container" or "exec".
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// The name is taken.
    #[error("{what} {id:?} already exists")]
    Exists {
        /// "container" or "exec".
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// The container's process does not run (any more).
    #[error("container {id:?} is not running: it is {phase}")]
    NotRunning {
        /// Id of the container.
        id: String,
        /// Where it is in its life.
        phase: &'static str,
    },
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The runtime failed, in its own words.
    #[error("{0}")]
    Runtime(String),
    /// The runtime took too long and was killed.
    #[error("runtime did not finish {verb} in {seconds} s and was killed")]
    Timeout {
        /// What it was doing.
        verb: &'static str,
        /// How long it was given.
        seconds: u64,
    },
    /// A log cannot be opened.
    #[error(transparent)]
    Log(#[from] OpenError),
    /// A system call failed.
    #[error("{what}")]
    System {
        /// What was attempted, with its arguments.
        what: String,
        /// The failure.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// What a client could do about it.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::NotFound { .. } => Kind::NotFound,
            Self::Exists { .. } => Kind::AlreadyExists,
            Self::NotRunning { .. } => Kind::NotRunning,
            Self::Invalid(_) | Self::Log(OpenError::NotPlain { .. }) => Kind::Invalid,
            Self::Runtime(message) if message.starts_with(REFUSAL) => Kind::Refused,
            Self::Runtime(_) => Kind::Runtime,
            Self::Timeout { .. } => Kind::Timeout,
            Self::Log(OpenError::Open { .. }) | Self::System { .. } => Kind::Internal,
        }
    }
}

impl From<&Error> for message::Error {
    fn from(error: &Error) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            text.push_str(": ");
            text.push_str(&inner.to_string());
            cause = inner.source();
        }
        Self { kind: error.kind().into(), message: text }
    }
}

/// Says what was attempted when a system call fails.
pub(crate) trait Context<T> {
    /// Names the attempt.
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::System { what: what(), source: source.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_holds_the_cause_once() {
        let missing = Err::<(), _>(io::Error::from(io::ErrorKind::NotFound));
        let error = missing.context(|| "open /x".to_owned()).unwrap_err();
        let sent = message::Error::from(&error);
        assert_eq!(sent.message, "open /x: entity not found");
        assert_eq!(sent.kind(), Kind::Internal);
    }

    #[test]
    fn a_refused_isolation_term_has_its_own_kind() {
        let refused = Error::Runtime("isolation refused: cpuset.partition".to_owned());
        assert_eq!(refused.kind(), Kind::Refused);
        assert_eq!(Error::Runtime("no rootfs".to_owned()).kind(), Kind::Runtime);
    }
}
