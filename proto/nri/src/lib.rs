//! What a runtime and its NRI plugins say to each other, and the envelope it travels in.
//!
//! Generated from `proto/nri.proto` and `proto/ttrpc.proto`.

/// Messages of the Node Resource Interface.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
pub mod api {
    include!(concat!(env!("OUT_DIR"), "/nri.pkg.api.v1alpha1.rs"));
}

/// The envelope.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
pub mod ttrpc {
    include!(concat!(env!("OUT_DIR"), "/ttrpc.rs"));
}

/// Full name of the service that plugins offer.
pub const PLUGIN: &str = "nri.pkg.api.v1alpha1.Plugin";
/// Full name of the service that the runtime offers to plugins.
pub const RUNTIME: &str = "nri.pkg.api.v1alpha1.Runtime";
