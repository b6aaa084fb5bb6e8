//! The Container Device Interface, versions 0.3 to 1.1: vendors' files that say how a
//! container is edited to use a device (cncf-tags/container-device-interface, SPEC.md).
//!
//! ```text
//!  /etc/cdi/*.{json,yaml}      ─┐ read: bounded, regular, root's, no unknown field
//!  /var/run/cdi/*.{json,yaml}  ─┴▶ Registry ── resolve("vendor.com/class=name", …) ─▶ Edits
//!                                    │ errors by file                 apply ─▶ OCI configuration
//! ```
//!
//! Directories are listed by rising priority: a device of a later one replaces that of an
//! earlier one, and two of the same priority make the name unresolvable. A bad file costs
//! only its own devices. Files are read again whenever a directory or a file has changed.

mod edits;
mod name;
mod registry;
mod spec;
mod validate;

pub use edits::{ApplyError, apply, demands};
pub use name::{NameError, QualifiedName, from_annotations};
pub use registry::{Registry, ResolveError};
pub use spec::{
    Device, DeviceNode, Edits, Format, Hook, IntelRdt, Mount, NetDevice, Spec, SpecError,
};
