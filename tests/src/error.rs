//! The one error of the harness: what was being done, and why it did not work.
//!
//! A harness reports to a person, so its errors are sentences with their arguments; the
//! cause is kept as `source` and printed once, by `main`.

use std::io;

/// Result of everything in the harness.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Why a step of the harness did not work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// An operation of the operating system.
    #[error("{what}")]
    Io {
        /// The operation with its arguments.
        what: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// A command ended with a failure.
    #[error("`{command}` ended with {status}: {stderr}")]
    Command {
        /// The command line.
        command: String,
        /// Its exit status in words.
        status: String,
        /// The end of what it wrote to standard error.
        stderr: String,
    },
    /// A CRI call was answered with an error.
    #[error("{call}: {code}: {message}")]
    Rpc {
        /// The RPC and what it was about.
        call: String,
        /// gRPC status code.
        code: tonic::Code,
        /// The server's words.
        message: String,
    },
    /// Something that must hold does not.
    #[error("{0}")]
    Check(String),
    /// The virtual node did not boot or stopped answering: no verdict about the test.
    #[error("the node {0}")]
    Node(String),
}

impl Error {
    /// A failed check.
    pub(crate) fn check(text: impl Into<String>) -> Self {
        Error::Check(text.into())
    }

    /// The error and its causes in one line.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(inner) = cause {
            text.push_str(": ");
            text.push_str(&inner.to_string());
            cause = inner.source();
        }
        text
    }
}

/// Names the operation an I/O error belongs to.
pub(crate) trait During<T> {
    /// Adds the sentence to the error.
    fn during(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> During<T> for std::result::Result<T, E> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { what: what(), source: source.into() })
    }
}

/// Fails with the text unless the condition holds.
pub(crate) fn ensure(condition: bool, text: impl FnOnce() -> String) -> Result<()> {
    if condition { Ok(()) } else { Err(Error::Check(text())) }
}
