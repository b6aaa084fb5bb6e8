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
mod checkpoint;
mod command_line;
mod domain;
mod errors;
mod exec;
mod faults;
mod hooks;
mod labels;
mod lifecycle;
mod mounts;
mod network_devices;
mod process;
mod rootfs;
mod rootless;
mod scheduling;
mod seccomp_notify;
mod security;
mod terminal;
mod user_namespace;
