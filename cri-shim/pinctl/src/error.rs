//! Errors a person can act on: what failed, why, and what to do next.

use owo_colors::{OwoColorize as _, Stream::Stderr};
use std::path::PathBuf;

/// Everything that can go wrong here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("piniond does not answer on {}", socket.display())]
    Connect { socket: PathBuf, source: tonic::transport::Error },
    #[error("{action} failed")]
    Call { action: String, source: Box<tonic::Status> },
    #[error("{what} {given:?} is not known here")]
    Unknown { what: &'static str, given: String, hint: &'static str },
    #[error("{given:?} fits more than one: {}", found.join(", "))]
    Ambiguous { given: String, found: Vec<String> },
    #[error("{0}")]
    Invalid(String),
    #[error("cannot {action} {}", path.display())]
    File { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("piniond sent {what} that pinctl cannot read")]
    Answer { what: &'static str, source: serde_json::Error },
    #[error("cannot print")]
    Print(#[source] std::io::Error),
}

impl Error {
    /// A failed call, for use in `map_err`.
    pub(crate) fn call(action: impl Into<String>) -> impl FnOnce(tonic::Status) -> Self {
        let action = action.into();
        move |status| Self::Call { action, source: Box::new(status) }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Connect { .. } => Some(
                "is it running? `systemctl status piniond`, or name its socket with --socket"
                    .to_owned(),
            ),
            Self::Call { source, .. } => match source.code() {
                tonic::Code::Unimplemented => {
                    Some("this piniond does not have it; compare `pinctl info`".to_owned())
                }
                tonic::Code::PermissionDenied => Some("try it as root".to_owned()),
                tonic::Code::Unavailable => {
                    Some("piniond went away; `journalctl -u piniond` may say why".to_owned())
                }
                _ => None,
            },
            Self::Unknown { hint, .. } => Some((*hint).to_owned()),
            Self::Ambiguous { .. } => Some("give more of the id".to_owned()),
            _ => None,
        }
    }
}

/// Prints the error, its causes and the hint, to standard error.
pub(crate) fn print(error: &Error) {
    let head = "pinctl:".if_supports_color(Stderr, |t| t.red()).to_string();
    eprintln!("{head} {error}");
    if let Error::Call { source, .. } = error {
        eprintln!("  because: {} ({:?})", source.message(), source.code());
    } else {
        let mut cause = std::error::Error::source(error);
        while let Some(this) = cause {
            eprintln!("  because: {this}");
            cause = this.source();
        }
    }
    if let Some(hint) = error.hint() {
        eprintln!("  {} {hint}", "hint:".if_supports_color(Stderr, |t| t.cyan()));
    }
}
