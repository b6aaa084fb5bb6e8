//! System calls, file descriptors, mounts and clone.
//!
//! The one crate of the workspace with `unsafe` code. Every function is a thin, typed
//! wrapper: it owns the descriptors it returns, reports `errno` as [`std::io::Error`],
//! and decides nothing. Policy lives in the crates above.

pub mod arena;
pub mod atomic_file;
pub mod bpf;
pub mod clone;
pub mod exe;
pub mod fd;
pub mod keyring;
pub mod mempolicy;
pub mod mount;
pub mod netlink;
pub mod process;
pub mod resident;
pub mod scm;
pub mod seccomp;
pub mod seccomp_notify;
pub mod signal;
pub mod tap;
pub mod tty;
pub mod userns;
pub mod vfio;
