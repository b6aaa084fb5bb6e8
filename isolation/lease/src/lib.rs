//! Kernel settings of the whole node, on loan to containers: who wants what, what each file
//! said before, and how it gets that back.
//!
//! ```text
//!  owner ─▶ Wish… ─┐
//!  owner ─▶ Wish… ─┼─ wanted ─▶ Want per Setting ─┐
//!                  │                               ├─ decide ─▶ Move ─▶ record (durable)
//!  kernel files ───┴── current ── Entry (undo) ────┘                       │
//!                         ▲                                                ▼
//!                         └───────────────── read back ◀────────────── write
//! ```
//!
//! An [`Entry`] is the undo of one setting: its old value and the values written here. It is
//! recorded before the write, so [`State::reconcile`] finds its way from any point at which
//! a process died:
//!
//! | the file says | while somebody wants it | when nobody does |
//! |---|---|---|
//! | a value of ours | written if it is not the wanted one | old value written, entry dropped |
//! | the old value | written | entry dropped |
//! | something else | theirs becomes the old value; written only if it breaks a wish | left alone, entry dropped |
//!
//! Invariants: deciding is pure; nothing is written that is not recorded first; a setting
//! that several owners want is given back when the last of them is gone; entries of another
//! boot are dropped unread, because the kernel has forgotten the writes.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

mod decide;
mod files;
pub mod irq;
mod setting;
mod state;
mod wish;

pub use decide::{Entry, Move, Want, decide};
pub use setting::Setting;
pub use state::{ReconcileError, Record, Refused, Report, State};
pub use wish::{Conflict, Leases, Wish, conflict, quiet_cpus, wanted};
