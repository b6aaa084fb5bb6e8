//! Why a request cannot become a container: the CRI field, and what is wrong with it.

use std::fmt;

/// What kind of refusal this is; the server maps it to a gRPC code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request contradicts itself or the CRI's rules (`InvalidArgument`).
    Invalid,
    /// The request is sound, but this node cannot honour it (`FailedPrecondition`).
    Unavailable,
}

/// A refused request: `linux.security_context.run_as_username: user "x" not in …`.
///
/// `field` is the path below the message in question: `ContainerConfig` for
/// [`build`](crate::build) (with what concerns the pod or the image prefixed `sandbox.` and
/// `image.`), `PodSandboxConfig` for the functions of [`pod`](crate::pod).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecError {
    /// Path of the CRI field, with indices: `mounts[3].container_path`.
    pub field: String,
    /// What is wrong, for a person, with the offending value in it.
    pub reason: String,
    /// Whose fault it is.
    pub kind: Kind,
}

impl SpecError {
    /// The request itself is wrong.
    pub(crate) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into(), kind: Kind::Invalid }
    }

    /// The node cannot give what was asked.
    pub(crate) fn unavailable(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into(), kind: Kind::Unavailable }
    }
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.reason)
    }
}

impl std::error::Error for SpecError {}
