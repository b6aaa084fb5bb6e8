//! What the server does as a CRI server: directories, logs, containers, images, networks, plugins.

use std::net::SocketAddr;
use std::path::PathBuf;

use pinion_network::Watch;
use serde::{Deserialize, Serialize};

/// Directories and the socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// Persistent state: store, image content, snapshots.
    pub root: PathBuf,
    /// State that ends with the boot: pods, sockets, runtime state.
    pub run_dir: PathBuf,
    /// The CRI and admin socket; `piniond.sock` in `run_dir` when empty.
    pub socket: PathBuf,
    /// Where kubelet's clients connect for exec, attach and port-forward; port 0 takes any
    /// free one.
    pub stream_address: SocketAddr,
    /// Group that may use the socket besides root; the mode is then 0660 instead of 0600.
    pub socket_group: Option<u32>,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            root: "/var/lib/pinion".into(),
            run_dir: "/run/pinion".into(),
            socket: PathBuf::new(),
            stream_address: SocketAddr::from(([127, 0, 0, 1], 0)),
            socket_group: None,
        }
    }
}

/// What is logged, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// A `tracing` filter: `info`, or per module such as `info,piniond::pod=debug`.
    pub level: String,
    /// For people or for machines.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

/// Shape of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line of text.
    Text,
    /// One JSON object.
    Json,
}

/// How containers are run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Runtime {
    /// The OCI runtime; `pinion` beside this executable, then in `PATH`, when empty.
    pub path: PathBuf,
    /// The pod monitor; `pinion-monitor`, found likewise, when empty.
    pub monitor_path: PathBuf,
    /// Who makes cgroups. `auto`: systemd where it is the init, else plain directories.
    pub cgroup_driver: CgroupDriver,
    /// Parent of pods whose request names none. Empty: `/pinion`, or `pinion.slice`.
    pub default_cgroup_parent: String,
    /// cgroup that monitors are moved to on cgroup v2, so that ending the server's unit
    /// leaves them alone; empty to leave them where the server is.
    pub monitor_cgroup: String,
    /// Size of each pod's `/dev/shm` in bytes.
    pub shm_size: u64,
    /// Most processes in one container; 0 for no limit.
    pub pids_limit: i64,
    /// Bytes of a line before the log gets it as a partial one.
    pub max_log_line: u64,
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            monitor_path: PathBuf::new(),
            cgroup_driver: CgroupDriver::Auto,
            default_cgroup_parent: String::new(),
            monitor_cgroup: "/pinion-monitors".into(),
            shm_size: 64 << 20,
            pids_limit: 0,
            max_log_line: 16 << 10,
        }
    }
}

/// Who makes cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    /// systemd where it is the init, else plain directories.
    Auto,
    /// Transient units over D-Bus.
    Systemd,
    /// Plain directories.
    Cgroupfs,
}

/// Pulling and storing images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Image {
    /// Directories with `<host>/hosts.toml` for mirrors, in order.
    pub registry_configs: Vec<PathBuf>,
    /// Registries spoken to without TLS; loopback addresses always are.
    pub insecure_registries: Vec<String>,
}

impl Default for Image {
    fn default() -> Self {
        Self {
            registry_configs: vec!["/etc/pinion/certs.d".into(), "/etc/containerd/certs.d".into()],
            insecure_registries: Vec::new(),
        }
    }
}

/// CNI.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// Where network configurations are looked for.
    pub conf_dir: PathBuf,
    /// Where plugins are looked for, in order.
    pub bin_dirs: Vec<PathBuf>,
    /// Where results are kept.
    pub cache_dir: PathBuf,
    /// Common chains (`bridge` or `ptp` with `host-local`, `portmap`) are done by the server
    /// itself, with the plugins' leases and rules; `false` executes the plugins always.
    pub native: bool,
    /// The node's links, addresses, routes, rules and nftables tables are compared before and
    /// after a pod is attached or detached, and what is not the pod's is reported: when its
    /// `plugins` are executed, for `all` pods, or `off`.
    pub guard: Watch,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            cache_dir: "/var/lib/cni".into(),
            native: true,
            guard: Watch::Plugins,
        }
    }
}

/// Checkpoints: off unless asked for. An archive holds the memory of a container, and making
/// one stops it for a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub struct Checkpoint {
    /// Answer CheckpointContainer and CheckpointPod; needs CRIU.
    pub enabled: bool,
}

/// NRI plugins: on without being asked for, at the places containerd has, because plugins are
/// deployed that way and cannot tell servers apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Nri {
    /// Start plugins and let them connect.
    pub enabled: bool,
    /// Where plugins connect; for root alone. Empty: none may connect.
    pub socket: PathBuf,
    /// Programs called `NN-name` that are started with the server.
    pub plugin_dir: PathBuf,
    /// Their configurations, `NN-name.conf` or `name.conf`.
    pub plugin_config_dir: PathBuf,
    /// How long a plugin may take to register, and to take in the node's state.
    pub registration_timeout_ms: u64,
    /// How long it may take for an event before it is dropped.
    pub request_timeout_ms: u64,
    /// Names, without index, of plugins without which no pod or container is made.
    pub required_plugins: Vec<String>,
}

impl Default for Nri {
    fn default() -> Self {
        Self {
            enabled: true,
            socket: "/var/run/nri/nri.sock".into(),
            plugin_dir: "/opt/nri/plugins".into(),
            plugin_config_dir: "/etc/nri/conf.d".into(),
            registration_timeout_ms: 5000,
            request_timeout_ms: 2000,
            required_plugins: Vec::new(),
        }
    }
}

/// The page that shows the node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Web {
    /// Where it is served, such as `127.0.0.1:9095`; nowhere by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// Whether the address may be one that other machines reach. There is no login: whoever
    /// reaches it sees the names of all pods.
    pub allow_remote: bool,
}
