//! The runtime as its clients see it: the real binary on the real kernel, as root.
//!
//! `PINION_RUNTIME=/usr/sbin/runc cargo test -p pinion --test runtime` runs the same tests
//! against another runtime: what runc fails here is a wrong expectation. Tests of what only
//! this runtime does say so and pass at once then.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test's helpers end the test"
)]

mod bundle;
mod cgroups;
mod errors;
mod exec;
mod hooks;
mod lifecycle;
mod process;
mod rootfs;
mod security;
mod terminal;
mod user_namespace;
