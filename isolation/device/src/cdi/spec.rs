//! The shape of a CDI file. Unknown fields are errors, as the specification demands.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Encoding of a file, told by the end of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `.json`
    Json,
    /// `.yaml`
    Yaml,
}

/// A whole file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    /// Version of the specification it is written to.
    pub cdi_version: String,
    /// `vendor.com/class`.
    pub kind: String,
    /// For readers; without effect on containers.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// The devices, at least one.
    pub devices: Vec<Device>,
    /// Edits made once when any of the devices is given.
    #[serde(default)]
    pub container_edits: Edits,
}

/// A device of the file's kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    /// Its name within the kind.
    pub name: String,
    /// For readers; without effect on containers.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Edits made when the device is given.
    #[serde(default)]
    pub container_edits: Edits,
}

/// What is changed in a container's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Edits {
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Device nodes.
    pub device_nodes: Vec<DeviceNode>,
    /// Network interfaces to move into the container (1.1).
    pub net_devices: Vec<NetDevice>,
    /// Programs to run.
    pub hooks: Vec<Hook>,
    /// Mounts.
    pub mounts: Vec<Mount>,
    /// resctrl (0.7).
    pub intel_rdt: Option<IntelRdt>,
    /// Groups of the process (0.7); 0 is ignored.
    pub additional_gids: Vec<u32>,
}

/// A device node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct DeviceNode {
    /// Its place in the container.
    pub path: String,
    /// Its place on the host, if another (0.5).
    pub host_path: String,
    /// `c`, `b`, `u` (as `c`) or `p`; that of the host's node when empty.
    pub r#type: String,
    /// Major number; that of the host's node when type and major are not given.
    pub major: i64,
    /// Minor number.
    pub minor: i64,
    /// Permission bits.
    pub file_mode: Option<u32>,
    /// `r`, `w`, `m`; all when empty, none for `none`.
    pub permissions: String,
    /// Owner in the container.
    pub uid: Option<u32>,
    /// Group in the container.
    pub gid: Option<u32>,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetDevice {
    /// Its name on the host.
    pub host_interface_name: String,
    /// Its name in the container.
    pub name: String,
}

/// A program to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hook {
    /// When: one of the six hooks of the OCI runtime specification.
    pub hook_name: String,
    /// The program, absolute.
    pub path: String,
    /// Its arguments, the name first.
    #[serde(default)]
    pub args: Vec<String>,
    /// Its environment.
    #[serde(default)]
    pub env: Vec<String>,
    /// Seconds it may take.
    #[serde(default)]
    pub timeout: Option<i64>,
}

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mount {
    /// Source on the host.
    pub host_path: String,
    /// Target in the container.
    pub container_path: String,
    /// Mount options.
    #[serde(default)]
    pub options: Vec<String>,
    /// Type of the filesystem (0.4).
    #[serde(default)]
    pub r#type: String,
}

/// resctrl settings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IntelRdt {
    /// Class of service.
    #[serde(rename = "closID")]
    pub clos_id: String,
    /// L3 cache schema.
    #[serde(rename = "l3CacheSchema")]
    pub l3_cache_schema: String,
    /// Memory bandwidth schema.
    #[serde(rename = "memBwSchema")]
    pub mem_bw_schema: String,
    /// Lines of the schemata file (1.1).
    pub schemata: Vec<String>,
    /// A monitoring group of its own (1.1).
    #[serde(rename = "enableMonitoring")]
    pub enable_monitoring: bool,
    /// Before 1.1: cache monitoring.
    #[serde(rename = "enableCMT")]
    pub enable_cmt: bool,
    /// Before 1.1: bandwidth monitoring.
    #[serde(rename = "enableMBM")]
    pub enable_mbm: bool,
}

/// Why a file is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Not JSON or YAML of the right shape.
    #[error("{0}")]
    Parse(String),
    /// The right shape with a value that makes no sense.
    #[error("{place}: {reason}")]
    Value {
        /// Where: `devices[0].containerEdits.env[1]`.
        place: String,
        /// What is wrong.
        reason: String,
    },
}

impl Spec {
    /// Reads and validates a file's text.
    pub fn parse(text: &str, format: Format) -> Result<Self, SpecError> {
        let parsed = match format {
            Format::Json => serde_json::from_str(text).map_err(|error| error.to_string()),
            Format::Yaml => serde_saphyr::from_str(text).map_err(|error| first_line(&error)),
        };
        let spec: Self = parsed.map_err(SpecError::Parse)?;
        super::validate::validate(&spec)?;
        Ok(spec)
    }
}

/// The rest of the parser's message is the file itself, drawn.
fn first_line(error: &impl ToString) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

impl Edits {
    /// Whether nothing would be changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Adds edits after these; of `intelRdt` the last counts.
    pub fn append(&mut self, other: &Self) {
        self.env.extend_from_slice(&other.env);
        self.device_nodes.extend_from_slice(&other.device_nodes);
        self.net_devices.extend_from_slice(&other.net_devices);
        self.hooks.extend_from_slice(&other.hooks);
        self.mounts.extend_from_slice(&other.mounts);
        if other.intel_rdt.is_some() {
            self.intel_rdt.clone_from(&other.intel_rdt);
        }
        self.additional_gids.extend_from_slice(&other.additional_gids);
    }
}
