//! The configuration: one TOML file, drop-ins beside it, then command-line flags.
//!
//! Every key has a default, so that no file is needed. Files are checked one by one, so an
//! unknown key or a wrong type is reported with the file it stands in; then the tables are
//! merged, later files over earlier ones, in the order of their names.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use pinion_network::Watch;
use serde::{Deserialize, Serialize};

/// Where the configuration is looked for when no path is given.
pub const DEFAULT_PATH: &str = "/etc/pinion/config.toml";

/// Everything a person may set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Directories and the socket.
    pub server: Server,
    /// What is logged, and how.
    pub log: Log,
    /// How containers are run.
    pub runtime: Runtime,
    /// Pulling and storing images.
    pub image: Image,
    /// CNI.
    pub network: Network,
    /// The isolation contract.
    pub isolation: Isolation,
    /// Devices of containers.
    pub device: Device,
    /// The node itself.
    pub node: NodeFiles,
    /// The page that shows the node.
    pub web: Web,
    /// NRI plugins.
    pub nri: Nri,
    /// Checkpoints of containers and pods.
    pub checkpoint: Checkpoint,
    /// Pods with a kernel of their own.
    pub vm: Vm,
}

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

/// The isolation contract.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Isolation {
    /// What happens when a node's pool cannot hold a container's hugepage limit.
    pub hugepages: HugepagePolicy,
    /// Treat a container whose CPU request is whole and matches its cpuset as exclusive.
    pub infer_exclusive: bool,
    /// Keep interrupts off exclusive CPUs unless a pod says otherwise.
    pub steer_interrupts: bool,
    /// Where kubelet keeps its state: `cpu_manager_state`, `pod-resources/kubelet.sock`.
    pub kubelet_dir: PathBuf,
}

impl Default for Isolation {
    fn default() -> Self {
        Self {
            hugepages: HugepagePolicy::Enforce,
            infer_exclusive: true,
            steer_interrupts: true,
            kubelet_dir: "/var/lib/kubelet".into(),
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

/// Pods with a kernel of their own, handler `pinion-vm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Vm {
    /// QEMU; `qemu-system-x86_64` beside this executable, then in `PATH`, when empty.
    pub qemu: PathBuf,
    /// Directories of QEMU's firmware, besides its own.
    pub qemu_data: Vec<PathBuf>,
    /// QEMU's loadable parts, where they are not in its own place.
    pub qemu_modules: PathBuf,
    /// The guests' kernel, a bzImage or ELF; the newest `/boot/vmlinuz-*` when empty.
    pub kernel: PathBuf,
    /// Its modules; `/lib/modules/<release>` when empty.
    pub kernel_modules: PathBuf,
    /// The guests' first program; `pinion-agent`, found as the monitor is, when empty.
    pub agent: PathBuf,
    /// The guests' OCI runtime, a static program; that of the host when empty.
    pub runtime: PathBuf,
    /// `mke2fs`, which writes root filesystems as disks; found likewise when empty.
    pub mke2fs: PathBuf,
    /// How guests are executed. `auto`: by KVM where a guest comes up under it, else by
    /// translation where `allow_tcg` says so.
    pub accelerator: VmAccelerator,
    /// Whether guests may be executed by translation, some thirty times slower.
    pub allow_tcg: bool,
    /// Seconds a trial guest has to come up under KVM.
    pub kvm_probe_seconds: u64,
    /// Seconds a pod's guest has to come up.
    pub boot_seconds: u64,
    /// Processors of a guest whose pod asks for none.
    pub cpus: u32,
    /// MiB of memory of a guest whose pod asks for none, and the least there is.
    pub memory: u64,
}

impl Default for Vm {
    fn default() -> Self {
        Self {
            qemu: PathBuf::new(),
            qemu_data: Vec::new(),
            qemu_modules: PathBuf::new(),
            kernel: PathBuf::new(),
            kernel_modules: PathBuf::new(),
            agent: PathBuf::new(),
            runtime: PathBuf::new(),
            mke2fs: PathBuf::new(),
            accelerator: VmAccelerator::Auto,
            allow_tcg: false,
            kvm_probe_seconds: 15,
            boot_seconds: 90,
            cpus: 1,
            memory: 256,
        }
    }
}

/// How guests are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmAccelerator {
    /// KVM where it works, else translation where that is allowed.
    Auto,
    /// KVM or not at all.
    Kvm,
    /// Translation, where that is allowed.
    Tcg,
}

/// What happens when a node's pool cannot hold a container's hugepage limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugepagePolicy {
    /// Every container is refused, so that none meets SIGBUS later.
    Enforce,
    /// Only strict containers are refused; the others start and the log says so.
    Report,
}

/// Devices of containers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Device {
    /// Directories with CDI files, by rising priority.
    pub cdi_dirs: Vec<PathBuf>,
    /// PCI functions that pods may have handed over by VFIO: addresses (`0000:41:10.0`), or
    /// vendor and device (`8086:10ca`). None by default: whoever gets one takes it from the
    /// host.
    pub vfio_allow: Vec<String>,
}

impl Default for Device {
    fn default() -> Self {
        Self { cdi_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()], vfio_allow: Vec::new() }
    }
}

/// The node itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NodeFiles {
    /// What the node is declared to be; without the file nothing is.
    pub profile: PathBuf,
    /// Where features are written for Node Feature Discovery, such as
    /// `/etc/kubernetes/node-feature-discovery/features.d/pinion`; nowhere when empty.
    pub features_file: PathBuf,
}

impl Default for NodeFiles {
    fn default() -> Self {
        Self { profile: "/etc/pinion/node.toml".into(), features_file: PathBuf::new() }
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

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file that should be there cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not TOML, or has a key or type that is not known.
    #[error("{}: {detail}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The parser's own words, with line and key.
        detail: String,
    },
    /// A value is well-formed but makes no sense.
    #[error("configuration: {key}: {reason}")]
    Value {
        /// The key, dotted.
        key: &'static str,
        /// What is wrong.
        reason: String,
    },
}

/// Values given on the command line, which win over files.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `--socket`
    pub socket: Option<PathBuf>,
    /// `--root`
    pub root: Option<PathBuf>,
    /// `--run-dir`
    pub run_dir: Option<PathBuf>,
    /// `--log-level`
    pub log_level: Option<String>,
}

impl Config {
    /// Reads `path` and the `config.d/*.toml` beside it. A missing default file is no
    /// error; a missing file that was asked for by name is.
    pub fn load(path: Option<&Path>, overrides: &Overrides) -> Result<Self, ConfigError> {
        let main = path.unwrap_or(Path::new(DEFAULT_PATH));
        let mut files = Vec::new();
        if path.is_some() || main.exists() {
            files.push(main.to_path_buf());
        }
        files.extend(drop_ins(&main.with_file_name("config.d"))?);

        let mut merged = toml::Table::new();
        for file in files {
            let text = fs::read_to_string(&file)
                .map_err(|source| ConfigError::Read { path: file.clone(), source })?;
            merge(&mut merged, parse(&file, &text)?);
        }
        let mut config: Self = merged.try_into().map_err(|e: toml::de::Error| {
            ConfigError::Parse { path: main.to_path_buf(), detail: e.to_string() }
        })?;
        config.apply(overrides);
        config.check()?;
        Ok(config)
    }

    fn apply(&mut self, overrides: &Overrides) {
        let Overrides { socket, root, run_dir, log_level } = overrides.clone();
        if let Some(root) = root {
            self.server.root = root;
        }
        if let Some(run_dir) = run_dir {
            self.server.run_dir = run_dir;
        }
        if let Some(socket) = socket {
            self.server.socket = socket;
        }
        if let Some(level) = log_level {
            self.log.level = level;
        }
        if self.server.socket.as_os_str().is_empty() {
            self.server.socket = self.server.run_dir.join("piniond.sock");
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        let directories = [
            ("server.root", &self.server.root),
            ("server.run_dir", &self.server.run_dir),
            ("server.socket", &self.server.socket),
        ];
        for (key, path) in directories {
            if !path.is_absolute() {
                let reason = format!("{} is not an absolute path", path.display());
                return Err(ConfigError::Value { key, reason });
            }
        }
        if let Some(address) = self.web.address
            && !address.ip().is_loopback()
            && !self.web.allow_remote
        {
            let reason = format!("{address} is not loopback; allow_remote = true permits that");
            return Err(ConfigError::Value { key: "web.address", reason });
        }
        if self.runtime.pids_limit < 0 {
            let reason = format!("{} is negative; 0 means no limit", self.runtime.pids_limit);
            return Err(ConfigError::Value { key: "runtime.pids_limit", reason });
        }
        Ok(())
    }

    /// The configuration as TOML, as `piniond config` prints it.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string_pretty(self)
    }
}

/// The drop-ins in a directory, in the order of their names.
fn drop_ins(directory: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let read = |source| ConfigError::Read { path: directory.to_path_buf(), source };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(read(e)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(read)?.path();
        if path.extension().is_some_and(|e| e == "toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Parses one file and checks its keys on their own, so that the error can name it.
fn parse(path: &Path, text: &str) -> Result<toml::Table, ConfigError> {
    let detail = |e: toml::de::Error| ConfigError::Parse {
        path: path.to_path_buf(),
        detail: e.to_string().trim_end().to_string(),
    };
    toml::from_str::<Config>(text).map_err(detail)?;
    toml::from_str(text).map_err(detail)
}

/// Lays `over` on `base`; tables are merged, everything else is replaced.
fn merge(base: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => merge(below, above),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("config.d")).unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    fn load(dir: &tempfile::TempDir) -> Result<Config, ConfigError> {
        Config::load(Some(&dir.path().join("config.toml")), &Overrides::default())
    }

    #[test]
    fn drop_ins_win_over_the_file_and_later_names_over_earlier() {
        let dir = directory(&[
            ("config.toml", "[log]\nlevel = 'warn'\n[runtime]\nshm_size = 1\n"),
            ("config.d/10-a.toml", "[runtime]\nshm_size = 2\n"),
            ("config.d/20-b.toml", "[runtime]\nshm_size = 3\n"),
            ("config.d/30-c.conf", "nonsense"),
        ]);
        let config = load(&dir).unwrap();
        assert_eq!(config.runtime.shm_size, 3);
        assert_eq!(config.log.level, "warn");
    }

    #[test]
    fn an_unknown_key_is_an_error_naming_key_and_file() {
        let dir =
            directory(&[("config.toml", ""), ("config.d/bad.toml", "[runtime]\nshm_sise = 2\n")]);
        let text = load(&dir).unwrap_err().to_string();
        assert!(text.contains("bad.toml"), "{text}");
        assert!(text.contains("shm_sise"), "{text}");
    }

    #[test]
    fn a_file_asked_for_by_name_must_exist() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(load(&dir), Err(ConfigError::Read { .. })));
    }

    #[test]
    fn flags_win_and_the_socket_follows_the_run_directory() {
        let dir = directory(&[("config.toml", "[server]\nrun_dir = '/run/a'\n")]);
        let overrides = Overrides { run_dir: Some("/run/b".into()), ..Default::default() };
        let config = Config::load(Some(&dir.path().join("config.toml")), &overrides).unwrap();
        assert_eq!(config.server.socket, Path::new("/run/b/piniond.sock"));
    }

    #[test]
    fn what_config_prints_reads_back_as_the_same() {
        let dir = directory(&[("config.toml", "[image]\ninsecure_registries = ['a:5000']\n")]);
        let config = load(&dir).unwrap();
        let text = config.to_toml().unwrap();
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), config);
    }

    #[test]
    fn the_page_stays_on_loopback_unless_told_otherwise() {
        let dir = directory(&[("config.toml", "[web]\naddress = '0.0.0.0:9095'\n")]);
        assert!(matches!(load(&dir), Err(ConfigError::Value { key: "web.address", .. })));
        let text = "[web]\naddress = '0.0.0.0:9095'\nallow_remote = true\n";
        load(&directory(&[("config.toml", text)])).unwrap();
        load(&directory(&[("config.toml", "[web]\naddress = '[::1]:9095'\n")])).unwrap();
    }

    #[test]
    fn relative_directories_are_refused() {
        let dir = directory(&[("config.toml", "[server]\nroot = 'here'\n")]);
        assert!(matches!(load(&dir), Err(ConfigError::Value { key: "server.root", .. })));
    }
}
