//! The monitor of one pod: keeps what only a parent can keep.
//!
//! ```text
//!   client ⇄ connection ─┐                     ┌─ spawn ──▶ runtime (create, start, exec …)
//!                        ▼                     │
//!        reactor ──▶   pod   ──────────────────┤
//!                        ▲                     ├─ stdio ──▶ log, attached clients
//!   SIGCHLD ── reap ─────┘                     └─ exit, oom ──▶ exit.json, events
//! ```
//!
//! Where the pod has a virtual machine, the machine is the monitor's child, and the same loop
//! speaks to the same loop inside it: `vmm` starts it, `link` is the channel, `pod::guest` what
//! takes the place of the runtime.
//!
//! Invariants:
//! - One thread, one loop, nothing in it waits: neither for the runtime, nor for a
//!   container, nor for a client. (Appending to a log file is the exception the kernel
//!   leaves no choice in.)
//! - Clients come and go; containers do not notice. What a client has missed it learns from
//!   its next hello, and exits also from `exit.json`, which is written before they are told.
//! - Every descriptor is close-on-exec, every child has an empty signal mask.
//! - Memory does not grow with output: one read buffer for all, and per stream at most one
//!   unterminated line.

pub mod connection;
pub mod console;
pub mod container;
pub mod daemon;
pub mod error;
pub mod event;
pub mod exit;
pub(crate) mod jail;
pub mod journal;
pub mod link;
pub mod log;
pub mod oom;
pub mod options;
pub mod pod;
pub mod reactor;
pub mod reap;
pub(crate) mod share;
pub mod socket;
pub mod spawn;
pub mod stdio;
pub mod tree;
pub mod vmm;
