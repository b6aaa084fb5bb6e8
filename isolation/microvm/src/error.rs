//! What went wrong between a wish for a guest and a guest.

use std::io;
use std::path::PathBuf;

/// A failure, in words a person can act on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{what}")]
    System {
        /// What was attempted, with its arguments.
        what: String,
        /// The failure.
        #[source]
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: {reason}", path.display())]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// Something the guest needs is nowhere to be found.
    #[error("{0}")]
    Missing(String),
    /// The machine cannot be had on this host.
    #[error("{0}")]
    Refused(String),
}

/// The result of what may fail here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Says what was attempted when a system call fails.
pub(crate) trait Context<T> {
    /// Names the attempt.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::System { what: what(), source: source.into() })
    }
}

/// A file that is not what it should be.
pub(crate) fn bad<T>(path: impl Into<PathBuf>, reason: impl Into<String>) -> Result<T> {
    Err(Error::Bad { path: path.into(), reason: reason.into() })
}
