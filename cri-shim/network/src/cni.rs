//! The Container Network Interface, runtime side: configuration, execution, results.
//!
//! Conforms to the CNI specification 1.1.0 and talks 0.3.0 to 1.1.0 with plugins.

pub(crate) mod cache;
pub(crate) mod chain;
pub mod config;
pub mod exec;
pub(crate) mod record;
pub(crate) mod request;
mod result;
mod version;

pub use result::{Dns, Interface, IpAssignment, IpNet, PluginResult, Route};
pub(crate) use result::{bits, next_ip};
pub use version::Version;
