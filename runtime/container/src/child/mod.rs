//! The code that runs in a container's process before it becomes the user's program.
//!
//! It is a copy of the runtime ([`pinion_sys::clone::spawn`]), so it works on the same plan
//! without any transfer. It reports through the [`Channel`](crate::protocol::Channel) and
//! must leave no descriptor, capability or signal disposition of the runtime behind.

mod identity;
mod init;
mod program;
mod tenant;
mod terminal;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::Failure;

pub(crate) use init::set_own_oom_score;
pub use init::{Init, Join, run as run_init};
pub use tenant::Tenant;

/// How far a process had come when it gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Waiting for the runtime, joining cgroups and namespaces.
    Enter,
    /// Mounts, devices, the change of the root.
    Rootfs,
    /// Kernel parameters, names, masks.
    Settings,
    /// Terminal and standard descriptors.
    Terminal,
    /// Hooks in the container's namespaces.
    Hooks,
    /// Limits, ids, capabilities, labels.
    Identity,
    /// Finding the program.
    Program,
    /// Executing it.
    Execute,
    /// Loading the system call filter.
    Seccomp,
}

impl fmt::Display for Step {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            // Clients look for runc's `exec: "…": executable file not found in $PATH`.
            Step::Program | Step::Execute => "exec",
            Step::Seccomp => "error loading seccomp filter",
            _ => "error during container init",
        })
    }
}

/// A failure and the step it happened in.
#[derive(Debug)]
struct Stopped {
    step: Step,
    failure: Failure,
}

/// Says in which step something failed.
trait During<T> {
    fn during(self, step: Step) -> Result<T, Stopped>;
}

impl<T> During<T> for Result<T, Failure> {
    fn during(self, step: Step) -> Result<T, Stopped> {
        self.map_err(|failure| Stopped { step, failure })
    }
}
