//! Why the agent cannot do what it is asked to.

use std::io;

/// A failure.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A system call failed.
    #[error("{what}")]
    System {
        /// What was attempted.
        what: String,
        #[source]
        source: io::Error,
    },
    /// The host asks for something that makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Something else did not work, in its own words.
    #[error("{0}")]
    Failed(String),
}

impl Error {
    /// With its cause, for the host.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::System { what, source } => format!("{what}: {source}"),
            Self::Invalid(text) | Self::Failed(text) => text.clone(),
        }
    }
}

/// Says what was attempted when a system call fails.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::System { what: what(), source: source.into() })
    }
}
