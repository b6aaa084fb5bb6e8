//! The real `pinion-monitor` with a real OCI runtime and real containers.
//!
//! Needs root, busybox and a runtime: runc, or what `PINION_TEST_RUNTIME` names.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod attach;
mod execs;
mod hostile;
mod lifecycle;
mod logs;
mod memory;
mod resilience;
mod rig;
