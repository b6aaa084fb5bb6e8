//! CRI requests to OCI runtime configuration, as plain functions over data.
//!
//! ```text
//!  ContainerConfig ─┐
//!  PodSandboxConfig ┤                     ┌─ Spec (config.json)
//!  image config ────┼─▶ build(&Inputs) ─▶─┼─ ResolvedUser, stop signal
//!  HostFacts ───────┤                     ├─ host directories to create
//!  HostPaths ───────┘                     └─ warnings
//! ```
//!
//! The semantics are those of containerd's CRI plugin, where it and CRI-O agree; where they
//! do not, the safer one is taken and the place says so. Nothing here does input or output
//! except [`HostFacts::read`] and [`HostPaths::inspect`], which gather facts.
//!
//! Invariants: the same inputs give the same specification; a guarantee that cannot be put
//! into it is an error naming the CRI field; what merely falls short of the request becomes a
//! warning; pod and image annotations never reach the runtime.

mod accounts;
mod annotations;
mod build;
mod capabilities;
mod cgroups_path;
mod confinement;
mod devices;
mod error;
mod facts;
mod inputs;
mod mount_table;
mod mounts;
mod namespaces;
pub mod pod;
mod process;
mod resources;
mod seccomp_default;
pub mod signal;
mod user;

pub use build::build;
pub use cgroups_path::{CgroupDriver, cgroups_path};
pub use confinement::{DEFAULT_APPARMOR_PROFILE, default_apparmor_profile, localhost_seccomp_path};
pub use error::{Kind, SpecError};
pub use facts::{AppArmor, DeviceNode, DevicesByPath, HostFacts, HostPaths, MountSource};
pub use inputs::{
    Accounts, Built, Inputs, PodNamespaces, PodPaths, ResolvedUser, Settings, UnsetSeccomp,
};
pub use mount_table::{MountTable, Propagation};
pub use resources::{resource_changes, resources};
