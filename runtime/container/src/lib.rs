//! The life of one OCI container.
//!
//! ```text
//!            create                     start              (ends)            delete
//!  bundle ───────────▶ created ───────────────▶ running ──────────▶ stopped ─────────▶ nothing
//!    config ─ plan ─ cgroup ─ isolation ─ process ─ wait ─ program
//! ```
//!
//! [`plan`] decides everything from the configuration without touching the system;
//! [`create`](mod@create) and [`exec`](mod@exec) act on it in the runtime, and [`child`] in
//! the container's process, which speaks [`protocol`] with them. Synchronous and
//! single-threaded: processes are made by copying this one.

pub mod capability;
pub mod checkpoint;
pub mod child;
pub mod config;
pub mod create;
pub mod delete;
pub mod devices;
pub mod error;
pub mod exec;
pub mod foreground;
pub mod hooks;
pub mod isolation;
pub mod kill;
pub mod launch;
pub mod listener;
pub mod memory_policy;
mod midwife;
pub mod mount_options;
pub mod mounts;
pub mod namespaces;
pub mod net_devices;
pub mod paths;
pub mod personality;
pub mod plan;
mod prepared;
pub mod process;
pub mod protocol;
pub mod rdt;
pub mod rootfs;
pub mod start;
pub mod state;
pub mod status;
pub mod sysctl;
pub mod time;
pub mod vm;

pub use error::{Error, Result};
