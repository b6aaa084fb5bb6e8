//! Devices of containers: what they are, where they sit, who may open them.
//!
//! ```text
//!  sysfs ──facts──▶ Function, Place ─┐
//!  device nodes ──────▶ Demand ──────┼─judge──▶ Term "devices" (evidence, verdict)
//!  probe inside the container's group┘
//!  CDI specs ──cdi──▶ Edits ──▶ OCI configuration
//!  PCI functions ──vfio::plan──▶ Step… ──apply──▶ vfio-pci; restore ──▶ the driver from before
//! ```
//!
//! Invariants:
//!
//! * Facts are read from sysfs and never from names; a node's place is that of the function
//!   or IOMMU group the kernel links it to.
//! * Judging is pure; the evidence says what was read and what was not probed.
//! * IOMMU groups are given as a whole or not at all.
//! * A driver is changed only after its name was recorded by the caller; giving it back is
//!   idempotent and leaves alone what others have bound since.
//!
//! The crate knows nothing of container runtimes' clients.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

mod address;
pub mod cdi;
mod facts;
mod judge;
mod netlink;
mod node;
mod probe;
#[cfg(test)]
mod testtree;
pub mod vfio;

pub use address::{Address, ParseAddressError};
pub use facts::{FactsError, Function, function, functions, group_members};
pub use judge::{Locality, Seen, judge};
pub use node::{Access, Demand, NodeKind, Place, place};
pub use probe::{Answer, probe, report};
