//! The network on a real kernel: namespaces, real plugins, misbehaving plugins. Root only.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod broken_plugins;
mod differential;
mod guard;
mod namespaces;
mod pods;
mod real_plugins;
mod support;
