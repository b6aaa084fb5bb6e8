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
//! The decision is pure ([`decide::decide`]); the runtime enforces it; the receipt is read
//! from the kernel alone.

mod decide;
pub(crate) mod hugepages;
mod view;

pub(crate) use decide::{Contract, Decision, Handler, PLAIN, STRICT, decide};
pub(crate) use view::{
    check_before_start, check_update, owners, receipt, report_after_start, topology,
};
