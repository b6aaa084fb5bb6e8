//! What the store remembers of pods and containers, and how their states may change.
//!
//! ```text
//!   sandbox:   Ready ──▶ NotReady                (a stopped pod is never ready again)
//!   container: Created ──▶ Running ──▶ Exited
//!                 └────────────────────▲
//! ```
//!
//! A record also lists what the pod or container *holds* on the node, in the order it was
//! taken: stopping and removing is giving those things back, and whatever could not be given
//! back stays listed and is tried again by the next Stop or Remove.

use std::path::PathBuf;

use pinion_cri_proto::v1;
use pinion_store::Table;
use serde::{Deserialize, Serialize};

use crate::contract::Contract;
use crate::ids;
use crate::vm::Guest;
use crate::wire::Wire;

/// Pods by id.
pub(crate) const SANDBOXES: Table<Sandbox> = Table::new("sandboxes");
/// Containers by id.
pub(crate) const CONTAINERS: Table<Container> = Table::new("containers");

/// A pod.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Sandbox {
    pub(crate) id: String,
    pub(crate) config: Wire<v1::PodSandboxConfig>,
    pub(crate) handler: String,
    /// Nanoseconds since the epoch.
    pub(crate) created_at: i64,
    /// Whether it can take containers.
    pub(crate) ready: bool,
    /// Addresses, the primary one first; none on the host's network.
    #[serde(default)]
    pub(crate) ips: Vec<String>,
    /// The cgroup its containers live under, as the driver names it.
    pub(crate) cgroup_parent: String,
    /// What it holds, oldest first.
    #[serde(default)]
    pub(crate) holdings: Vec<Holding>,
    /// The machine its containers run in, once it is up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) guest: Option<Guest>,
}

/// A container.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) pod: String,
    /// As it is in force.
    pub(crate) config: Wire<v1::ContainerConfig>,
    /// As the client asked, where that is something else: CPUs or memory nodes were chosen here.
    /// A retry after a restart is compared with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) request: Option<Wire<v1::ContainerConfig>>,
    pub(crate) image_id: String,
    /// Nanoseconds since the epoch.
    pub(crate) created_at: i64,
    /// Nanoseconds since the epoch; 0 before the start.
    #[serde(default)]
    pub(crate) started_at: i64,
    /// There once it has ended.
    #[serde(default)]
    pub(crate) exit: Option<Exit>,
    /// Whom its first process runs as.
    pub(crate) user: Wire<v1::LinuxContainerUser>,
    /// Absolute; empty when output is discarded.
    pub(crate) log_path: PathBuf,
    /// The signal that asks it to end, by number.
    pub(crate) stop_signal: i32,
    /// Limits as last asked for.
    pub(crate) resources: Wire<v1::LinuxContainerResources>,
    /// The runtime's `linux.cgroupsPath`.
    pub(crate) cgroups_path: String,
    /// The images of its image volumes.
    #[serde(default)]
    pub(crate) image_volumes: Vec<ImageVolume>,
    /// What it was promised.
    #[serde(default)]
    pub(crate) contract: Contract,
    /// What it holds, oldest first.
    #[serde(default)]
    pub(crate) holdings: Vec<Holding>,
}

/// An image that is mounted into a container.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct ImageVolume {
    /// Which of the configuration's mounts it is.
    pub(crate) mount: usize,
    /// The image.
    pub(crate) image_id: String,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Exit {
    /// 0..255; 128+n for signal n.
    pub(crate) code: i32,
    /// Nanoseconds since the epoch.
    pub(crate) finished_at: i64,
    /// The kernel ended it for want of memory.
    #[serde(default)]
    pub(crate) oom_killed: bool,
    /// A reason other than those that follow from code and OOM, such as `MonitorLost`.
    #[serde(default)]
    pub(crate) reason: Option<String>,
    /// More for a person to read.
    #[serde(default)]
    pub(crate) message: String,
}

/// Something taken from the node that must be given back. See [`crate::holding`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub(crate) enum Holding {
    /// A pod's directory under the run directory.
    PodDirectory,
    /// Cgroups made for the pod because the parent named in the request was missing.
    PodCgroup {
        /// As the driver names it.
        parent: String,
    },
    /// Namespaces pinned in the pod's directory.
    Namespaces,
    /// The pod's `/dev/shm`.
    Shm,
    /// Addresses and interfaces from CNI.
    Network,
    /// The cgroup of the pod's virtual machine, with what is in it.
    Machine {
        /// The pod's cgroup, as the driver names it.
        parent: String,
    },
    /// The pod's monitor process.
    Monitor,
    /// A container's directory.
    ContainerDirectory {
        /// The container.
        container: String,
    },
    /// A container's mounted root filesystem and its writable layer.
    Rootfs {
        /// The container.
        container: String,
    },
    /// An image mounted for a container's volume.
    ImageVolume {
        /// The container.
        container: String,
        /// Which of its configuration's mounts it is.
        mount: usize,
    },
    /// Hugepages in the ledger.
    Hugepages {
        /// The container.
        container: String,
    },
    /// Node-wide kernel settings on loan: interrupts kept away, governors, latency limits.
    Settings {
        /// The container.
        container: String,
    },
    /// CPUs that Pinion chose.
    Cpus {
        /// The container.
        container: String,
        /// The CPUs.
        cpus: pinion_topology::CpuSet,
    },
    /// PCI functions handed over by VFIO, and what they were before.
    Devices {
        /// The container.
        container: String,
        /// The functions.
        bindings: Vec<pinion_device::vfio::Binding>,
    },
    /// The container as the OCI runtime knows it, with its processes and cgroup.
    RuntimeContainer {
        /// The container.
        container: String,
    },
}

/// The CRI states of a container that the server distinguishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Waiting for its start.
    Created,
    /// Started and not ended.
    Running,
    /// Ended.
    Exited,
}

impl Container {
    /// The state it is in.
    pub(crate) fn phase(&self) -> Phase {
        match (&self.exit, self.started_at) {
            (Some(_), _) => Phase::Exited,
            (None, 0) => Phase::Created,
            (None, _) => Phase::Running,
        }
    }

    /// The configuration that the client sent.
    pub(crate) fn asked(&self) -> &v1::ContainerConfig {
        &self.request.as_ref().unwrap_or(&self.config).0
    }

    /// Its name as kubelet knows it.
    pub(crate) fn name(&self) -> &str {
        self.config.metadata.as_ref().map_or("", |m| m.name.as_str())
    }

    /// Notes the start. A container whose exit was seen first keeps it.
    pub(crate) fn start(&mut self, at: i64) {
        if self.started_at == 0 {
            self.started_at = at;
        }
    }

    /// Notes limits that are now in force.
    pub(crate) fn limit(&mut self, resources: v1::LinuxContainerResources) {
        // The runtime has accepted them, so they parse.
        self.contract.cpus = resources.cpuset_cpus.parse().unwrap_or_default();
        self.contract.mems = resources.cpuset_mems.parse().unwrap_or_default();
        self.resources.0 = resources;
    }

    /// Notes what is still held after a release. What the runtime no longer knows has ended,
    /// even if no monitor was there to say how.
    pub(crate) fn give_back(&mut self, left: Vec<Holding>) {
        let alive = left.iter().any(|h| matches!(h, Holding::RuntimeContainer { .. }));
        if !alive {
            self.end(Exit::lost());
        }
        self.holdings = left;
    }

    /// Notes the end; the first report counts. False if it had ended before.
    pub(crate) fn end(&mut self, exit: Exit) -> bool {
        if self.exit.is_some() {
            return false;
        }
        self.exit = Some(exit);
        true
    }
}

impl Sandbox {
    /// Kubelet's name for the pod.
    pub(crate) fn metadata(&self) -> v1::PodSandboxMetadata {
        self.config.metadata.clone().unwrap_or_default()
    }

    /// The namespaces the pod was asked to have.
    pub(crate) fn namespaces(&self) -> v1::NamespaceOption {
        namespaces(&self.config)
    }

    /// The pod's configuration with what was decided where it asked for nothing.
    pub(crate) fn config_in_force(&self) -> v1::PodSandboxConfig {
        let mut config = self.config.0.clone();
        config.linux.get_or_insert_default().cgroup_parent.clone_from(&self.cgroup_parent);
        config
    }

    /// `namespace/name`, for messages.
    pub(crate) fn title(&self) -> String {
        let metadata = self.metadata();
        format!("{}/{}", metadata.namespace, metadata.name)
    }
}

/// The namespace options of a pod's configuration.
pub(crate) fn namespaces(config: &v1::PodSandboxConfig) -> v1::NamespaceOption {
    config
        .linux
        .as_ref()
        .and_then(|l| l.security_context.as_ref())
        .and_then(|s| s.namespace_options.clone())
        .unwrap_or_default()
}

impl Exit {
    /// The end of a container whose monitor was gone: killed, so the code is SIGKILL's.
    pub(crate) fn lost() -> Self {
        Self {
            code: 137,
            finished_at: ids::now(),
            reason: Some("MonitorLost".into()),
            message: "the container's monitor was gone; its processes were killed".into(),
            ..Self::default()
        }
    }

    /// The end of a container that could not be started.
    pub(crate) fn not_started(message: String) -> Self {
        Self {
            code: 128,
            finished_at: ids::now(),
            reason: Some("StartError".into()),
            message,
            ..Self::default()
        }
    }

    /// CRI's reason: what kubelet shows as the container's terminated state.
    pub(crate) fn reason(&self) -> &str {
        match &self.reason {
            Some(reason) => reason,
            None if self.oom_killed => "OOMKilled",
            None if self.code == 0 => "Completed",
            None => "Error",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_goes_from_created_to_running_to_exited() {
        let mut c = Container::default();
        assert_eq!(c.phase(), Phase::Created);
        c.start(5);
        assert_eq!(c.phase(), Phase::Running);
        assert!(c.end(Exit { code: 3, ..Default::default() }));
        assert_eq!(c.phase(), Phase::Exited);
    }

    #[test]
    fn the_first_report_of_an_exit_counts() {
        let mut c = Container::default();
        assert!(c.end(Exit { code: 137, oom_killed: true, ..Default::default() }));
        assert!(!c.end(Exit { code: 255, ..Default::default() }));
        assert_eq!(c.exit.unwrap().reason(), "OOMKilled");
    }

    #[test]
    fn an_exit_seen_before_the_start_was_noted_stays_an_exit() {
        let mut c = Container::default();
        c.end(Exit::default());
        c.start(9);
        assert_eq!(c.phase(), Phase::Exited);
        assert_eq!(c.started_at, 9);
    }

    #[test]
    fn reasons_follow_from_the_exit() {
        let exit = |code, oom_killed| Exit { code, oom_killed, ..Default::default() };
        assert_eq!(exit(0, false).reason(), "Completed");
        assert_eq!(exit(1, false).reason(), "Error");
        assert_eq!(exit(137, true).reason(), "OOMKilled");
        let lost = Exit { reason: Some("MonitorLost".into()), ..Default::default() };
        assert_eq!(lost.reason(), "MonitorLost");
    }

    #[test]
    fn a_retry_is_compared_with_what_the_client_sent() {
        let config = |working_dir: &str| {
            Wire(v1::ContainerConfig { working_dir: working_dir.into(), ..Default::default() })
        };
        let mut container = Container { config: config("in force"), ..Default::default() };
        assert_eq!(container.asked().working_dir, "in force");
        container.request = Some(config("asked"));
        let text = serde_json::to_string(&container).unwrap();
        let read: Container = serde_json::from_str(&text).unwrap();
        assert_eq!(read.asked().working_dir, "asked");
    }

    #[test]
    fn records_survive_json() {
        let container = Container {
            id: "c".into(),
            holdings: vec![Holding::Rootfs { container: "c".into() }],
            exit: Some(Exit { code: 1, ..Default::default() }),
            ..Default::default()
        };
        let text = serde_json::to_string(&container).unwrap();
        assert_eq!(serde_json::from_str::<Container>(&text).unwrap(), container);
    }
}
