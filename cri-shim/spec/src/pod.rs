//! What belongs to a pod rather than to a container: its name, its files, its sysctls, its
//! users, and the init process of a shared PID namespace.

mod files;
mod init;
mod sysctl;
mod user_namespace;

pub use files::{hostname, hosts, resolv_conf};
pub use init::{PodInit, init_spec};
pub use sysctl::{Sysctl, Sysctls, sysctls};
pub use user_namespace::{IdRun, UserIds, user_namespace};
