//! Who does a chain: this process or the plugins, and why.
//!
//! The choice is made for a chain as a whole, from its configuration and from which `iptables`
//! the node has, anew for each call: ADD and DEL of a pod may choose differently, which is why
//! both sides leave the same traces.

use crate::cni::config::NetworkList;
use crate::native::config::{self, Plan};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

/// Where plugins look for `iptables`.
const PATH: [&str; 6] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Who attaches and detaches pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Engine {
    /// This process.
    Native,
    /// The plugins' binaries, executed.
    Plugins {
        /// Why not this process.
        reason: String,
    },
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Native => f.write_str("built-in"),
            Self::Plugins { reason } => write!(f, "plugins ({reason})"),
        }
    }
}

/// Chooses.
#[derive(Debug)]
pub(crate) struct Choice {
    /// The switch of the configuration.
    pub(crate) allowed: bool,
    /// The choice that was reported last.
    reported: Mutex<Option<Engine>>,
    /// What `--version` said of a binary that does not tell by its name.
    asked: Mutex<Option<(PathBuf, SystemTime, bool)>>,
}

impl Choice {
    pub(crate) fn new(allowed: bool) -> Self {
        Self { allowed, reported: Mutex::default(), asked: Mutex::default() }
    }

    /// Notes what has been reported; whether it differs from what was before.
    pub(crate) fn report(&self, engine: &Engine) -> bool {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        reported.replace(engine.clone()).as_ref() != Some(engine)
    }

    /// The plan of a chain that is done here.
    ///
    /// # Errors
    /// Why the plugins do it.
    pub(crate) fn plan(&self, list: &NetworkList) -> Result<Plan, String> {
        if !self.allowed {
            return Err("network.native is off".to_owned());
        }
        let plan = config::plan(list)?;
        if plan.masquerade || plan.portmap.is_some() {
            self.check_iptables()?;
        }
        Ok(plan)
    }

    /// The rules made here are those of `iptables-nft`.
    fn check_iptables(&self) -> Result<(), String> {
        let found = PATH.iter().map(|dir| Path::new(dir).join("iptables")).find(|p| p.exists());
        let path = found.ok_or("no iptables: the plugins choose another backend")?;
        let real = path.canonicalize().map_err(|error| format!("{}: {error}", path.display()))?;
        let name = real.file_name().map(|name| name.to_string_lossy().into_owned());
        let name = name.unwrap_or_default();
        if name.contains("-nft") || (!name.contains("legacy") && self.says_nf_tables(&real)) {
            return Ok(());
        }
        Err(format!("{} is {name}, not the nf_tables one", path.display()))
    }

    fn says_nf_tables(&self, path: &Path) -> bool {
        let Ok(changed) = path.metadata().and_then(|meta| meta.modified()) else { return false };
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, when, answer)) = asked.as_ref()
            && (known.as_path(), *when) == (path, changed)
        {
            return *answer;
        }
        let output = Command::new(path).arg("--version").env_clear().output();
        let answer = output
            .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("nf_tables"));
        *asked = Some((path.to_owned(), changed, answer));
        answer
    }
}
