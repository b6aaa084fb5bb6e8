//! Where everything lies. Ids in paths are always our own.

use std::path::{Path, PathBuf};

use crate::config::Config;

/// Directories and programs, from the configuration.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    root: PathBuf,
    run_dir: PathBuf,
}

impl Paths {
    pub(crate) fn new(config: &Config) -> Self {
        Self { root: config.server.root.clone(), run_dir: config.server.run_dir.clone() }
    }

    /// Persistent state.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// State of this boot.
    pub(crate) fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.root.join("store.redb")
    }

    /// Checkpoints being made.
    pub(crate) fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// The runtime's own state, `--root`.
    pub(crate) fn runtime_root(&self) -> PathBuf {
        self.run_dir.join("runtime")
    }

    pub(crate) fn pods(&self) -> PathBuf {
        self.run_dir.join("pods")
    }

    pub(crate) fn pod(&self, pod: &str) -> PodDirectory {
        PodDirectory(self.pods().join(pod))
    }
}

/// The directory of one pod, `<run_dir>/pods/<id>`, and what is in it.
#[derive(Debug, Clone)]
pub(crate) struct PodDirectory(PathBuf);

impl PodDirectory {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The pinned namespaces.
    pub(crate) fn namespaces(&self) -> PathBuf {
        self.0.join("ns")
    }

    /// The pod's `/dev/shm`.
    pub(crate) fn shm(&self) -> PathBuf {
        self.0.join("shm")
    }

    pub(crate) fn hosts(&self) -> PathBuf {
        self.0.join("hosts")
    }

    pub(crate) fn hostname(&self) -> PathBuf {
        self.0.join("hostname")
    }

    pub(crate) fn resolv_conf(&self) -> PathBuf {
        self.0.join("resolv.conf")
    }

    pub(crate) fn container(&self, container: &str) -> ContainerDirectory {
        ContainerDirectory(self.0.join("containers").join(container))
    }
}

/// The directory of one container: its OCI bundle, and what the monitor writes.
#[derive(Debug, Clone)]
pub(crate) struct ContainerDirectory(PathBuf);

impl ContainerDirectory {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.0.join("config.json")
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.0.join("rootfs")
    }

    /// Where the image of a mount is mounted.
    pub(crate) fn volume(&self, mount: usize) -> PathBuf {
        self.0.join("volumes").join(mount.to_string())
    }

    pub(crate) fn exit(&self) -> PathBuf {
        self.0.join("exit.json")
    }

    pub(crate) fn pid(&self) -> PathBuf {
        self.0.join("pid")
    }
}
