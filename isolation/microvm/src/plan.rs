//! A guest as its monitor starts it: the machine, what surrounds it on the host, and what it
//! is told first. One JSON file, written by who decides.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Result, bad};
use crate::machine::Machine;

/// A plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The machine.
    pub machine: Machine,
    /// Network namespace whose interfaces the guest gets; none without one.
    #[serde(default)]
    pub namespace: Option<PathBuf>,
    /// Directories of cgroups that the machine's process enters before it is the machine.
    #[serde(default)]
    pub cgroups: Vec<PathBuf>,
    /// User and group the machine's process runs as; the monitor's own if not said.
    #[serde(default)]
    pub user: Option<(u32, u32)>,
    /// CPUs the machine's process starts on, such as `0-1`; all when empty.
    #[serde(default)]
    pub cpus: String,
    /// The guest's host name.
    pub hostname: String,
    /// Files of the pod that are copied into the guest, by their names.
    #[serde(default)]
    pub files: Vec<PathBuf>,
    /// Kernel settings in the guest, in dotted form.
    #[serde(default)]
    pub sysctls: Vec<(String, String)>,
    /// Size of the pod's `/dev/shm`, in bytes.
    pub shm_bytes: u64,
    /// Milliseconds until the guest must be ready.
    pub boot_limit: u64,
}

impl Plan {
    /// Reads a plan.
    ///
    /// # Errors
    /// When the file cannot be read or is no plan.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).context(|| format!("read {}", path.display()))?;
        match serde_json::from_slice(&text) {
            Ok(plan) => Ok(plan),
            Err(error) => bad(path, format!("not a guest's plan: {error}")),
        }
    }
}
