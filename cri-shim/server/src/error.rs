//! The server's error: a kind a client can act on, a message with the arguments, and the
//! cause behind it.
//!
//! Errors are cloned to every caller that joined an operation, hence the shared source.
//! They are logged once, where an RPC answers ([`crate::services`]) or where a background
//! task ends, with the whole chain.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use tonic::{Code, Status};

/// What a client could do about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request itself is wrong; repeating it will not help.
    Invalid,
    /// No such pod, container or image.
    NotFound,
    /// The name is taken by something else.
    AlreadyExists,
    /// Not in this state, such as an exec in a container that does not run.
    Precondition,
    /// A guarantee the container asked for is not in force.
    Refused,
    /// Credentials are missing or wrong.
    Denied,
    /// The time the client gave is over.
    Timeout,
    /// Not now; the same request may work later.
    Unavailable,
    /// A disk, a pool or another finite thing is full.
    Exhausted,
    /// Anything else: a fault here or in the system.
    Internal,
}

impl Kind {
    /// The gRPC code of a kind.
    pub fn code(self) -> Code {
        match self {
            Self::Invalid => Code::InvalidArgument,
            Self::NotFound => Code::NotFound,
            Self::AlreadyExists => Code::AlreadyExists,
            Self::Precondition | Self::Refused => Code::FailedPrecondition,
            Self::Denied => Code::PermissionDenied,
            Self::Timeout => Code::DeadlineExceeded,
            Self::Unavailable => Code::Unavailable,
            Self::Exhausted => Code::ResourceExhausted,
            Self::Internal => Code::Internal,
        }
    }

    /// Whether the failure is the server's own and deserves a warning in its log.
    pub fn is_fault(self) -> bool {
        match self {
            Self::Internal | Self::Exhausted | Self::Unavailable => true,
            Self::Invalid
            | Self::NotFound
            | Self::AlreadyExists
            | Self::Precondition
            | Self::Refused
            | Self::Denied
            | Self::Timeout => false,
        }
    }
}

/// A failure.
#[derive(Debug, Clone)]
pub struct Error {
    kind: Kind,
    message: String,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

/// The result of everything here that can fail.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failure without a cause below it.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// A wrong request.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, message)
    }

    /// Something that is not there.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }

    /// Something that is not in the right state.
    pub fn precondition(message: impl Into<String>) -> Self {
        Self::new(Kind::Precondition, message)
    }

    /// A fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }

    /// Another crate's error, told in its own words and with its own causes.
    pub fn from_foreign(kind: Kind, error: impl StdError + Send + Sync + 'static) -> Self {
        Self { kind, message: String::new(), source: Some(Arc::new(error)) }
    }

    /// Names the cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(source));
        self
    }

    /// What a client could do about it.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The message and those of all causes, joined by colons.
    pub fn chain(&self) -> String {
        let mut text = self.message.clone();
        let mut cause = StdError::source(self);
        while let Some(error) = cause {
            let line = error.to_string();
            // A few libraries repeat their source in their own message.
            if !text.ends_with(&line) {
                if !text.is_empty() {
                    text.push_str(": ");
                }
                text.push_str(&line);
            }
            cause = error.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Some(source) if self.message.is_empty() => source.fmt(f),
            _ => f.write_str(&self.message),
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|e| e as &(dyn StdError + 'static))
    }
}

impl From<&Error> for Status {
    fn from(error: &Error) -> Self {
        Status::new(error.kind.code(), error.chain())
    }
}

/// Adds what was being done to a foreign error.
pub(crate) trait Context<T> {
    /// A fault while doing `what`.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
    /// A failure of a chosen kind while doing `what`.
    fn kind(self, kind: Kind, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: StdError + Send + Sync + 'static> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.kind(Kind::Internal, what)
    }

    fn kind(self, kind: Kind, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::new(kind, what()).caused_by(e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_names_every_cause_once() {
        let io = std::io::Error::other("disk on fire");
        let error = Error::internal("write store").caused_by(io);
        let outer = Error::new(Kind::Unavailable, "run pod").caused_by(error);
        assert_eq!(outer.chain(), "run pod: write store: disk on fire");
        assert_eq!(outer.to_string(), "run pod");
        assert_eq!(Status::from(&outer).code(), Code::Unavailable);
    }

    #[test]
    fn a_refusal_is_a_failed_precondition() {
        assert_eq!(Kind::Refused.code(), Code::FailedPrecondition);
    }
}
