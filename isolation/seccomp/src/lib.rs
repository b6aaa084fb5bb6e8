//! OCI seccomp profiles compiled to classic BPF.
//!
//! ```text
//! LinuxSeccomp ── profile ──▶ one rule table per ABI ── ranges ──▶ runs of syscall numbers
//!                (names, actions, errno, ENOSYS)                    with one fate each
//!                                                                        │ emit
//!                                            arch? → number tree → return or argument checks
//! ```
//!
//! The kernel's cost of loading a filter grows with its length and with the path each
//! syscall number takes through it (it precomputes which numbers are always allowed), so
//! numbers are merged into runs and found by binary search.
//!
//! Comparisons of arguments are compiled by seccompiler and linked into the tree; its filters
//! as a whole know one action, no notification and no second architecture, its way of
//! loading them always sets `no_new_privs`.
//!
//! Semantics follow runc with libseccomp, which profiles are written against:
//! * a name this build does not know is ignored;
//! * a rule whose action equals the default action is dropped;
//! * a rule without arguments beats rules with arguments on the same syscall; among several
//!   of either kind the first one that matches decides;
//! * several conditions on the *same* argument are alternatives, otherwise all must hold;
//! * a syscall number above every number the profile names is `ENOSYS`, not the default
//!   action, when the architecture is listed or the native one and the default action denies;
//! * a foreign architecture, and x32 where it is not listed, is killed.

mod abi;
mod emit;
mod profile;
mod ranges;

use std::path::PathBuf;

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompFilterFlag};

pub use abi::Abi;

/// A filter ready for `seccomp(SECCOMP_SET_MODE_FILTER)`.
#[derive(Debug, Clone)]
pub struct Program {
    /// The instructions, at most 4096 (`BPF_MAXINSNS`).
    pub instructions: Vec<libc::sock_filter>,
    /// `SECCOMP_FILTER_FLAG_*` bits, `NEW_LISTENER` included when a rule notifies.
    pub flags: u64,
    /// Where the notification descriptor is to be sent (`listenerPath`).
    pub listener_path: Option<PathBuf>,
    /// Opaque text handed over with the descriptor (`listenerMetadata`).
    pub listener_metadata: Option<String>,
}

impl Program {
    /// Whether loading yields a notification descriptor that has to be handed on.
    #[must_use]
    pub fn notifies(&self) -> bool {
        self.flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER != 0
    }
}

/// Why a profile cannot become a filter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// System calls have six arguments.
    #[error("seccomp rule for {syscall}: argument index {index} is above 5")]
    ArgumentIndex {
        /// The rule's first name.
        syscall: String,
        /// The index asked for.
        index: usize,
    },
    /// The runtime itself would hang while it hands the descriptor over.
    #[error("seccomp: SCMP_ACT_NOTIFY cannot be the default action")]
    NotifyByDefault,
    /// The runtime writes after the filter is in force.
    #[error("seccomp: SCMP_ACT_NOTIFY cannot be used for the write syscall")]
    NotifyOnWrite,
    /// A notifying rule with nobody to notify.
    #[error("seccomp: SCMP_ACT_NOTIFY needs listenerPath")]
    NotifyWithoutListener,
    /// The kernel takes 4096 instructions.
    #[error("seccomp filter of {instructions} instructions is above the kernel's limit of 4096")]
    TooLong {
        /// The length the filter would have.
        instructions: usize,
    },
    /// Conditions the compiler of comparisons does not take.
    #[error("seccomp: {0}")]
    Rule(#[from] seccompiler::BackendError),
    /// No syscall table for the architecture this was built for.
    #[error("seccomp: no syscall table for {0}")]
    NoTable(&'static str),
}

/// Compiles `profile` for the architecture this program was built for.
pub fn compile(profile: &LinuxSeccomp) -> Result<Program, Error> {
    let native = Abi::native().ok_or(Error::NoTable(std::env::consts::ARCH))?;
    compile_for(native, profile)
}

/// Compiles `profile` as it is to run on a kernel whose native ABI is `native`.
///
/// Architectures of the profile that such a kernel never reports are left out.
pub fn compile_for(native: Abi, profile: &LinuxSeccomp) -> Result<Program, Error> {
    let policy = profile::resolve(native, profile)?;
    if policy.notifies && profile.listener_path().is_none() {
        return Err(Error::NotifyWithoutListener);
    }
    let instructions = emit::program(&policy)?;
    Ok(Program {
        instructions,
        flags: flag_bits(profile.flags().as_deref(), policy.notifies),
        listener_path: profile.listener_path().clone(),
        listener_metadata: profile.listener_metadata().clone(),
    })
}

/// The load flags. A profile that says nothing gets `SPEC_ALLOW` (as runc and crun do): the
/// store-bypass mitigation costs every workload and protects only same-process sandboxes.
fn flag_bits(flags: Option<&[LinuxSeccompFilterFlag]>, notifies: bool) -> u64 {
    let default = [LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow];
    let mut bits = 0;
    for flag in flags.unwrap_or(&default) {
        bits |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
            }
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
            }
        };
    }
    if notifies {
        bits |= libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
        if bits & libc::SECCOMP_FILTER_FLAG_TSYNC != 0 {
            // Both answer through the return value; ESRCH keeps the two apart.
            bits |= libc::SECCOMP_FILTER_FLAG_TSYNC_ESRCH;
        }
    } else {
        // The kernel refuses this flag without a listener.
        bits &= !libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    }
    bits
}
