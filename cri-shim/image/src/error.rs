//! What can go wrong with images. [`Error::kind`] says what a client can do about it.

use std::{io, path::PathBuf, sync::Arc};

use crate::{Digest, digest::DigestError, reference::ReferenceError, unpack::LayerError};

/// Result of an image operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Failure of an image operation. Nothing half-made is left behind.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The reference does not parse.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// A digest does not parse.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// The credentials handed over are unusable.
    #[error("registry credentials: {reason}")]
    Auth {
        /// Which field, and why.
        reason: &'static str,
    },
    /// A container id that cannot name a directory.
    #[error("container id {id:?} is not a plain file name")]
    ContainerId {
        /// The id.
        id: String,
    },
    /// A `hosts.toml` is wrong.
    #[error("registry configuration {path}: {reason}")]
    Hosts {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A registry could not be reached, or the connection broke.
    #[error("{method} {url}")]
    Http {
        /// HTTP method.
        method: &'static str,
        /// The URL, without its query.
        url: String,
        /// The HTTP client's reason.
        #[source]
        source: reqwest::Error,
    },
    /// A registry or token service answered with an error.
    #[error("{method} {url}: {status}{detail}")]
    Status {
        /// HTTP method.
        method: &'static str,
        /// The URL, without its query.
        url: String,
        /// The HTTP status.
        status: reqwest::StatusCode,
        /// `": "` and the registry's own words, or empty.
        detail: String,
    },
    /// A registry's answer breaks the protocol.
    #[error("{url}: {reason}")]
    Protocol {
        /// The URL, without its query.
        url: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// Credentials would have gone somewhere they must not go.
    #[error("registry {registry} asks for a token from {realm}: {reason}")]
    Realm {
        /// The registry.
        registry: String,
        /// The token service it named.
        realm: String,
        /// Why that is refused.
        reason: &'static str,
    },
    /// TLS is needed but this CPU cannot do it.
    #[error("TLS to {host} is not possible: the CPU lacks {missing}")]
    Tls {
        /// The registry.
        host: String,
        /// CPU features missing.
        missing: String,
    },
    /// A CA file or the HTTP client could not be set up.
    #[error("set up the connection to {host}: {reason}")]
    Setup {
        /// The registry.
        host: String,
        /// What failed.
        reason: String,
    },
    /// Several registry hosts were tried in vain; the source is the last one's failure.
    #[error("pull {reference}: no host could serve it ({})", tried.join("; "))]
    AllHosts {
        /// The image.
        reference: String,
        /// `host: failure` of those tried before the last.
        tried: Vec<String>,
        /// The last host's failure.
        #[source]
        source: Box<Error>,
    },
    /// Something is larger than allowed.
    #[error("{what} exceeds the limit of {limit}")]
    TooLarge {
        /// What, with its digest or name.
        what: String,
        /// The limit, with its unit.
        limit: String,
    },
    /// Content does not have the digest it was asked for by.
    #[error("{what}: expected {expected}, content is {actual}")]
    Mismatch {
        /// What was read.
        what: String,
        /// Digest or size announced.
        expected: String,
        /// Digest or size found.
        actual: String,
    },
    /// A manifest, index or configuration is not acceptable.
    #[error("{what}: {reason}")]
    Document {
        /// Which document.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The image uses something this server refuses to handle.
    #[error("{what}: {reason}")]
    Unsupported {
        /// What.
        what: String,
        /// Why not.
        reason: String,
    },
    /// No variant of the image fits this machine.
    #[error("{reference} offers no image for {wanted}, only {}", offered.join(", "))]
    Platform {
        /// The image.
        reference: String,
        /// `os/architecture` of this machine.
        wanted: String,
        /// Platforms offered.
        offered: Vec<String>,
    },
    /// A layer could not be unpacked.
    #[error("unpack layer {digest}")]
    Layer {
        /// Digest of the layer blob.
        digest: Digest,
        /// What went wrong inside it.
        #[source]
        source: LayerError,
    },
    /// No such image on this node.
    #[error("image {reference:?} is not on this node")]
    NoImage {
        /// What was asked for.
        reference: String,
    },
    /// No such container root file system on this node.
    #[error("container {id:?} has no root file system here")]
    NoRootfs {
        /// The container.
        id: String,
    },
    /// A file to load is not an image.
    #[error("load {path}: {reason}")]
    Archive {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A loaded archive claims a tag that was pulled from its registry.
    #[error("{tag} was pulled from its registry; name the loaded image explicitly to replace it")]
    TagTaken {
        /// The tag.
        tag: String,
    },
    /// A file operation failed.
    #[error("{action} {path}")]
    File {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The overlay could not be mounted.
    #[error("mount overlay at {target}: {step}")]
    Mount {
        /// Mount point.
        target: PathBuf,
        /// The system call and its argument.
        step: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A path inside an image that cannot be shown.
    #[error("{path:?} in image {image}: {reason}")]
    SubPath {
        /// The image.
        image: String,
        /// The path, as asked for.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] pinion_store::Error),
    /// The work was abandoned: the server is stopping, or a thread died.
    #[error("{what} was abandoned")]
    Abandoned {
        /// The work.
        what: String,
    },
    /// The failure of an operation that several callers waited for.
    #[error(transparent)]
    Shared(Arc<Error>),
}

/// What a failure means to a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request itself is wrong.
    InvalidArgument,
    /// The image, tag or platform does not exist.
    NotFound,
    /// Credentials are missing, wrong, or must not be sent.
    PermissionDenied,
    /// A registry cannot be reached or is overloaded: try again.
    Unavailable,
    /// A limit or the disk's end was reached.
    ResourceExhausted,
    /// Content is damaged or malformed.
    DataLoss,
    /// Valid, but not handled here.
    Unsupported,
    /// The node's state stands in the way.
    FailedPrecondition,
    /// Anything else.
    Internal,
}

impl Error {
    /// What a client can make of it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Reference(_)
            | Self::Digest(_)
            | Self::Auth { .. }
            | Self::ContainerId { .. }
            | Self::Archive { .. }
            | Self::SubPath { .. } => ErrorKind::InvalidArgument,
            Self::NoImage { .. } | Self::NoRootfs { .. } | Self::Platform { .. } => {
                ErrorKind::NotFound
            }
            Self::Realm { .. } => ErrorKind::PermissionDenied,
            Self::Http { .. } | Self::Setup { .. } => ErrorKind::Unavailable,
            Self::Status { status, .. } => match status.as_u16() {
                401 | 403 => ErrorKind::PermissionDenied,
                404 => ErrorKind::NotFound,
                408 | 429 | 500..=599 => ErrorKind::Unavailable,
                _ => ErrorKind::Internal,
            },
            Self::AllHosts { source, .. } => source.kind(),
            Self::Shared(source) => source.kind(),
            Self::TooLarge { .. } => ErrorKind::ResourceExhausted,
            Self::Mismatch { .. } | Self::Document { .. } | Self::Protocol { .. } => {
                ErrorKind::DataLoss
            }
            Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::Tls { .. } | Self::TagTaken { .. } | Self::Hosts { .. } => {
                ErrorKind::FailedPrecondition
            }
            Self::Layer { source, .. } => source.kind(),
            Self::File { source, .. } | Self::Mount { source, .. } => io_kind(source),
            Self::Store(_) | Self::Abandoned { .. } => ErrorKind::Internal,
        }
    }

    pub(crate) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }

    /// One line with all causes, for places that can only carry text.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            next = cause.source();
        }
        text
    }
}

/// Full disks and quotas are the operator's to solve, not a bug.
pub(crate) fn io_kind(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::ResourceExhausted,
        _ => ErrorKind::Internal,
    }
}
