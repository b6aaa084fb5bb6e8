//! Exclusive CPUs, local memory and huge pages: facts → plan → apply → verify → undo.
//!
//! ```text
//!  Host ──Facts::read──▶ Facts ─┐
//!  OCI annotations ──▶ Request ─┼─plan──▶ Plan ──apply──▶ kernel
//!  cgroup, cpus, mems ▶ Target ─┘           │ each step journalled first (UndoStep)
//!                                           ▼
//!  Receipt ◀──audit── Subject        undo(UndoStep…) at failure or deletion
//! ```
//!
//! [`enforce`] walks the whole way for one container. Invariants:
//!
//! * `plan` is pure; only `apply`, `undo` and the hugepage proof change anything.
//! * A write that the kernel accepted proves nothing (a cpuset partition goes invalid
//!   silently), so every step is read back, and [`audit`] judges by the kernel's files alone.
//! * Undo is data, idempotent, and never takes CPUs that another group holds.
//! * What cannot be had is either a [`Refusal`] (strict) or a term that is not in force with
//!   a reason (otherwise); nothing is silently dropped.
//!
//! The crate knows nothing of container runtimes' clients; names in messages are whatever
//! the caller passes.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

mod allocate;
mod audit;
mod enforce;
mod exclusivity;
mod facts;
mod files;
mod heal;
mod hold;
mod host;
mod ledger;
mod plan;
mod prefault;
mod receipt;
mod refusal;
mod request;
mod room;
mod step;
#[cfg(test)]
mod testtree;

pub use allocate::{CpuDemand, CpuSupply, allocate};
pub use audit::{IrqQuiet, Subject, audit, hugepages_held};
pub use enforce::{EnforceError, enforce};
pub use exclusivity::{
    Basis, Exclusivity, ExclusivityInputs, Recorded, SharedWhy, Source, exclusivity,
};
pub use facts::{Facts, FactsError, Group, Holder, PartitionState, Support};
pub use heal::heal;
pub use hold::{lost, moves_hugepages, watched};
pub use host::{Host, Kernel, TreeLock};
pub use ledger::{Drift, Grant, HugepageDemand, Ledger, NodePool};
pub use plan::{Plan, Target, plan, verify};
pub use prefault::prefault;
pub use receipt::{Receipt, Term, Verdict};
pub use refusal::{Reason, Refusal, TermName};
pub use request::{PartitionKind, Request, RequestError};
pub use room::left_behind;
pub use step::{ApplyError, Check, Step, UndoFailure, UndoStep, apply, undo};
