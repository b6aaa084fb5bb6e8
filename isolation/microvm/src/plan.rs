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
    /// Where the machine's process is confined to; the host's root without it.
    #[serde(default)]
    pub jail: Option<Jail>,
    /// Serves files of the host to the guest; none without it.
    #[serde(default)]
    pub share: Option<Share>,
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

/// What the machine's process sees of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jail {
    /// An empty directory, which becomes its root.
    pub root: PathBuf,
    /// Files and directories that it finds there under their own names, read-only.
    pub visible: Vec<PathBuf>,
    /// The one group that it keeps besides its own, for a device it opens.
    #[serde(default)]
    pub group: Option<u32>,
}

/// How files of the host are served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// `virtiofsd`, 1.10 or later.
    pub program: PathBuf,
    /// An empty directory: where the process has what it shares, in a mount namespace of its
    /// own.
    pub directory: PathBuf,
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
