//! Images against a real registry (Debian's docker-registry on a loopback port), against one that
//! misbehaves on purpose, and on a real kernel. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed test panics")]

mod content;
mod faults;
mod hostile;
mod load;
mod names;
mod node;
mod pull;
mod registry;
mod rootfs;
