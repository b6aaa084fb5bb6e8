//! Durable records of the CRI server: typed tables, intents and the undo journal, on redb.
//!
//! Invariants:
//! - A call that returned `Ok` is on disk (`Durability::Immediate`); a call that returned `Err`
//!   changed nothing.
//! - Records are JSON, keyed by string. One that no longer decodes is reported beside the good
//!   ones ([`Listing::bad`]) and never stops a caller from reading the rest.
//! - A database file that cannot be trusted is renamed to `<name>.quarantined-<unix seconds>` and
//!   an empty one takes its place. A file written by a newer build is left exactly as it was.
//! - An intent is committed before its first step, and each step before it is carried out, so
//!   after a crash [`Store::unfinished_intents`] names everything that may need undoing:
//!
//! ```text
//!   begin_intent ──▶ append_step ──▶ act ──▶ append_step ──▶ act ──▶ finish_intent
//!        │                crash here: unfinished, undo its steps           │
//!        └── one transaction with the records it reserves                  └── with those it settles
//! ```
//!
//! Calls are short and block: asynchronous callers go through `spawn_blocking`.

mod error;
mod intent;
mod open;
mod record;
mod transaction;

pub use error::Error;
pub use intent::{INTENTS, Intent};
pub use open::{Opened, Store};
pub use record::{Listing, Table};
pub use transaction::Tx;

/// Result of a store operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;
