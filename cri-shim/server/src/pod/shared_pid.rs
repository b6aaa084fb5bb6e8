//! The PID namespace that the containers of a pod share, where the pod asks for one.
//!
//! A PID namespace lives as long as its first process, so here, and only here, a pod has a
//! process of its own: a container named like the pod, without rights, whose one file is this
//! very program. Started as [`ARGV0`] it does nothing but reap what the pod orphans.

use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use pinion_cri_proto::v1::NamespaceMode;
use pinion_monitor_proto::message;
use pinion_spec::pod::{PodInit, init_spec};

use super::create::{spec_error, write_config};
use crate::error::{Context, Result};
use crate::monitor::Client;
use crate::node::Node;
use crate::record::{Holding, Sandbox};

/// What the program is called inside the init container.
pub const ARGV0: &str = "/init";

/// Whether the containers of a pod share a PID namespace.
pub(crate) fn wanted(sandbox: &Sandbox) -> bool {
    sandbox.namespaces().pid() == NamespaceMode::Pod
}

/// What the init container holds.
pub(crate) fn holdings(pod: &str) -> [Holding; 2] {
    let container = pod.to_string();
    [
        Holding::ContainerDirectory { container: container.clone() },
        Holding::RuntimeContainer { container },
    ]
}

/// Creates and starts the init container.
pub(crate) async fn start(node: &Node, sandbox: &Sandbox, monitor: &Client) -> Result<()> {
    let id = &sandbox.id;
    let directory = node.paths.pod(id).container(id);
    let rootfs = directory.rootfs();
    let (uid, gid) = super::users::root(sandbox);
    fs::create_dir_all(&rootfs)
        .and_then(|()| std::os::unix::fs::chown(&rootfs, Some(uid), Some(gid)))
        .context(|| format!("create {}", rootfs.display()))?;
    let binary = std::env::current_exe().context(|| "find this executable".to_string())?;
    let spec = init_spec(&PodInit {
        sandbox_id: id,
        sandbox: &sandbox.config_in_force(),
        pod: &super::lend(node, sandbox),
        rootfs: &rootfs,
        binary: &binary,
        host: &node.facts,
        cgroup_driver: node.cgroups.spec_driver(),
    })
    .map_err(spec_error)?;
    write_config(&directory, &spec)?;
    let path = directory.path().to_string_lossy().into_owned();
    let create = message::Create {
        id: id.clone(),
        bundle: path.clone(),
        directory: path,
        ..Default::default()
    };
    monitor.create(create).await?;
    monitor.start(id).await
}

/// Where the namespace can be joined, if the pod shares one.
pub(crate) fn namespace(node: &Node, sandbox: &Sandbox) -> Option<PathBuf> {
    if !wanted(sandbox) {
        return None;
    }
    let file = node.paths.pod(&sandbox.id).container(&sandbox.id).pid();
    let pid = fs::read_to_string(file).ok()?;
    Some(format!("/proc/{}/ns/pid", pid.trim()).into())
}

/// Whether this process was started to be a pod's init.
#[must_use]
pub fn is_init(argv0: Option<&OsStr>) -> bool {
    argv0.is_some_and(|name| name == ARGV0)
}

/// The life of a pod's init: reap, and end when told to.
#[must_use]
pub fn init() -> ExitCode {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        signals.add(signal);
    }
    if signals.thread_block().is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        while matches!(
            waitpid(None, Some(WaitPidFlag::WNOHANG)),
            Ok(status) if status != WaitStatus::StillAlive
        ) {}
        match signals.wait() {
            Ok(Signal::SIGCHLD) | Err(_) => {}
            Ok(_) => return ExitCode::SUCCESS,
        }
    }
}
