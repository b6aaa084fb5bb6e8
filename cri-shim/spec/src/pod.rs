//! What belongs to a pod rather than to a container: its name, its files, its sysctls, and the
//! init process of a shared PID namespace.

mod files;
mod init;
mod sysctl;

pub use files::{hostname, hosts, resolv_conf};
pub use init::{PodInit, init_spec};
pub use sysctl::{Sysctl, Sysctls, sysctls};
