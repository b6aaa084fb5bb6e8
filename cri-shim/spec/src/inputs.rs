//! Everything a container's specification is decided from, and what comes out.

use crate::cgroups_path::CgroupDriver;
use crate::facts::{HostFacts, HostPaths};
use oci_spec::image::Config as ImageConfig;
use oci_spec::runtime::{PosixRlimit, Spec};
use pinion_cri_proto::v1;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The namespaces of a pod as files to join; `None` means the host's own.
///
/// What is `None` must agree with the pod's `NamespaceOption`: a pod that asked for its own
/// network and has no `net` here is refused, so a lost file never becomes host networking.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodNamespaces {
    /// Network namespace, `<pod>/ns/net`.
    pub net: Option<PathBuf>,
    /// IPC namespace, `<pod>/ns/ipc`.
    pub ipc: Option<PathBuf>,
    /// UTS namespace, `<pod>/ns/uts`; `None` for host-network pods.
    pub uts: Option<PathBuf>,
    /// The shared PID namespace (`/proc/<pod init>/ns/pid`), when the pod has one.
    pub pid: Option<PathBuf>,
    /// The pod's user namespace, when it has one.
    pub user: Option<PathBuf>,
}

/// What a pod lends to its containers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodPaths {
    /// Namespaces to join.
    pub namespaces: PodNamespaces,
    /// The pod's `/etc/hosts`; not mounted when `None`.
    pub hosts: Option<PathBuf>,
    /// The pod's `/etc/hostname`.
    pub hostname: Option<PathBuf>,
    /// The pod's `/etc/resolv.conf`.
    pub resolv_conf: Option<PathBuf>,
    /// The pod's `/dev/shm` (a tmpfs; the host's `/dev/shm` for host-IPC pods).
    pub shm: Option<PathBuf>,
}

/// `/etc/passwd` and `/etc/group` of the image, as read (bounded) from its root filesystem.
#[derive(Debug, Clone, Copy, Default)]
pub struct Accounts<'a> {
    /// Text of `/etc/passwd`; `None` when the image has none.
    pub passwd: Option<&'a [u8]>,
    /// Text of `/etc/group`; `None` when the image has none.
    pub group: Option<&'a [u8]>,
}

/// What to do when CRI says nothing about seccomp.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum UnsetSeccomp {
    /// No filter: what kubelet and critest mean by an absent profile.
    #[default]
    Unconfined,
    /// The default profile.
    RuntimeDefault,
}

/// The node's policy, from the server's configuration.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Meaning of an absent seccomp profile.
    pub unset_seccomp: UnsetSeccomp,
    /// `pids` limit of every container (tasks); none by default, kubelet limits the pod.
    pub pids_limit: Option<i64>,
    /// Resource limits of every container process; empty = those of the monitor.
    pub rlimits: Vec<PosixRlimit>,
}

/// One CreateContainer, with every fact it depends on.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Id of the new container.
    pub container_id: &'a str,
    /// Id of its pod sandbox.
    pub sandbox_id: &'a str,
    /// What CRI asked for.
    pub container: &'a v1::ContainerConfig,
    /// The pod it runs in, as given to RunPodSandbox.
    pub sandbox: &'a v1::PodSandboxConfig,
    /// The image's `config` object; `None` for an image without one.
    pub image: Option<&'a ImageConfig>,
    /// The image's name as a person would write it, for the annotation.
    pub image_name: &'a str,
    /// Root filesystem, absolute, already mounted.
    pub rootfs: &'a Path,
    /// What the pod lends.
    pub pod: &'a PodPaths,
    /// User and group database of the image.
    pub accounts: Accounts<'a>,
    /// The host.
    pub host: &'a HostFacts,
    /// What the request's host paths are, see [`HostPaths::inspect`].
    pub paths: &'a HostPaths,
    /// Who manages cgroups.
    pub cgroup_driver: CgroupDriver,
    /// Namespace file of the process `NamespaceMode::TARGET` names; the caller has checked
    /// that the target is a container of the same pod.
    pub target_pid_namespace: Option<&'a Path>,
    /// Content of the file that a `Localhost` seccomp profile names.
    pub localhost_seccomp: Option<&'a [u8]>,
    /// Isolation annotations (`dev.pinion.*`) the contract attaches; nothing else of the
    /// pod's annotations reaches the runtime.
    pub annotations: &'a BTreeMap<String, String>,
    /// The node's policy.
    pub settings: &'a Settings,
}

/// Who the process is, for `ContainerStatus.user`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedUser {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// All groups given to setgroups(2), the primary one included, ascending.
    pub groups: Vec<u32>,
}

/// A specification ready for `config.json`.
#[derive(Debug, Clone)]
pub struct Built {
    /// The OCI configuration.
    pub spec: Spec,
    /// The process's identity.
    pub user: ResolvedUser,
    /// Signal StopContainer sends first.
    pub stop_signal: i32,
    /// Host directories to create (mode 0755, with parents) before the container is created:
    /// mount sources that do not exist yet.
    pub missing_sources: Vec<PathBuf>,
    /// What the host could not give although the request may proceed; for a log line and an event.
    pub warnings: Vec<String>,
}
