//! The isolation contract: what a container is promised, and whether the promise is kept.
//!
//! ```text
//!  CRI request + annotations + handler ─▶ decide ─▶ Decision ─▶ ledger, OCI annotations
//!                                                      │
//!                                 pinion applies and verifies it at create
//!                                                      ▼
//!                              audit before the start (strict), and whenever asked: receipt
//! ```
//!
//! Afterwards [`watch`] keeps exclusive CPUs exclusive, and [`settings`] keeps the node's
//! settings as they were lent.
//!
//! The decision is pure ([`decide::decide`]); the runtime enforces it; the receipt is read
//! from the kernel alone.

mod allocator;
pub(crate) mod cpus;
mod decide;
pub(crate) mod devices;
pub(crate) mod heal;
pub(crate) mod hugepages;
pub(crate) mod infra;
pub(crate) mod pools;
pub(crate) mod settings;
mod view;
pub(crate) mod watch;

pub(crate) use decide::{Contract, Decision, Handler, PLAIN, STRICT, VM, decide, resized};
pub(crate) use view::{
    check_before_start, check_update, owners, receipt, report_after_start, topology,
};
