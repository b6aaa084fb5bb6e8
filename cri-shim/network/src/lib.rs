//! Pod networking: pinned namespaces, CNI plugin execution, and the network's status.
//!
//! ```text
//!  namespaces::create ──▶ <dir>/{net,ipc,uts}      nsfs bind mounts, lo up, sysctls written
//!           │
//!  Network::add ── record ─▶ ADD p1 ─▶ ADD p2 … ──▶ record + result ──▶ Attachment
//!                              │ any failure: DEL … p2, p1
//!  Network::del ── record ─▶ DEL pn … ─▶ DEL p1 ──▶ record removed only when all succeeded
//! ```
//!
//! Invariants:
//! * a record is on disk before the first plugin runs, so DEL is possible after any crash, with
//!   the configuration that ADD used, even if the administrator has replaced it since;
//! * DEL runs every plugin even if one fails, and works without the namespace;
//! * a plugin gets a clean environment, a process group of its own, a deadline, and bounded
//!   output; what it prints is never trusted to be well-formed.

mod builtin;
mod cidr;
pub mod cni;
mod engine;
mod error;
mod guard;
pub mod namespaces;
mod native;
mod netlink;
mod network;
mod pod;
mod status;

pub use cidr::pod_cidrs;
pub use cni::{Dns, Interface, IpAssignment, IpNet, PluginResult, Route};
pub use engine::Engine;
pub use error::NetworkError;
pub use guard::{ForeignChanges, Watch};
pub use network::{Network, NetworkConfig};
pub use pod::{Attachment, PodNetwork, PortMapping, Protocol};
pub use status::NetworkStatus;
