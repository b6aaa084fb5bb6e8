//! The configuration: one TOML file, drop-ins beside it, then command-line flags.
//!
//! Every key has a default, so that no file is needed. Files are checked one by one, so an
//! unknown key or a wrong type is reported with the file it stands in; then the tables are
//! merged, later files over earlier ones, in the order of their names.

mod machine;
mod service;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use machine::{Device, HugepagePolicy, Isolation, NodeFiles, Vm, VmAccelerator};
pub use service::{
    CgroupDriver, Checkpoint, Image, Log, LogFormat, Network, Nri, Runtime, Server, Web,
};

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
        if let Err(error) = self.isolation.shared_cpus.parse::<pinion_topology::CpuSet>() {
            let reason = format!("{:?}: {error}", self.isolation.shared_cpus);
            return Err(ConfigError::Value { key: "isolation.shared_cpus", reason });
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
