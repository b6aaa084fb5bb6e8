//! Pods. Each has an actor, the only writer of its state.
//!
//! ```text
//!   RPC ──Command──▶ actor ──▶ schedule ──▶ operation (a future) ──Done──▶ actor
//!                      ▲                        │                           │
//!    monitor ──Notice──┘                        └── node: files, CNI,       ├─ 1. commit to the store
//!                                                   monitor, images         ├─ 2. publish the view
//!                                                                           └─ 3. answer the RPC
//! ```
//!
//! Operations read copies of the state and return what changed; only the actor applies it.
//! A caller that goes away does not end its operation.

mod actor;
mod apply;
mod bring_up;
mod create;
mod kill;
mod limits;
mod network;
mod operations;
mod reconnect;
mod release;
mod schedule;
pub mod shared_pid;
pub(crate) mod users;
pub(crate) mod volumes;

use std::time::Duration;

use pinion_cri_proto::v1::{self, NamespaceMode};
use pinion_spec::{PodNamespaces, PodPaths};
use tokio::sync::{mpsc, oneshot};

use crate::error::{Error, Result};
use crate::node::Node;
use crate::record::Sandbox;
use crate::ticket::Ticket;

pub(crate) use actor::{Seed, spawn};
pub(crate) use bring_up::run;
pub(crate) use create::spec_error;
pub(crate) use network::namespaces_pinned;
pub(crate) use operations::Context;
pub(crate) use reconnect::{Reconnected, no_monitor, reconnect};
pub(crate) use release::{Release, all as release_all};

/// Where an answer goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T>>;

/// What a pod can be told to do.
#[derive(Debug)]
pub(crate) enum Command {
    /// Create a container; answered at once with a ticket for its id.
    Create {
        /// What to create.
        config: Box<v1::ContainerConfig>,
        /// Where the ticket goes.
        reply: Reply<Ticket<String>>,
    },
    /// Let a created container run.
    Start {
        /// Its id.
        container: String,
        /// When it runs.
        reply: Reply<()>,
    },
    /// End a container: the stop signal, and SIGKILL when the grace period is over.
    Stop {
        /// Its id.
        container: String,
        /// How long it may take.
        grace: Duration,
        /// When it has ended.
        reply: Reply<()>,
    },
    /// Remove a container, killing it if it runs.
    Remove {
        /// Its id.
        container: String,
        /// When nothing is left.
        reply: Reply<()>,
    },
    /// Change limits.
    Update {
        /// Whose.
        container: String,
        /// What is not zero or empty.
        resources: Box<v1::LinuxContainerResources>,
        /// NRI plugins know of it already.
        told: bool,
        /// When they are in force.
        reply: Reply<()>,
    },
    /// Ask again for exclusive CPUs that were lost.
    Heal {
        /// Whose.
        container: String,
        /// When it was tried.
        reply: Reply<()>,
    },
    /// Remember the pod's own limits; the client has set them already.
    UpdatePod {
        /// What the pod costs besides its containers.
        overhead: Option<Box<v1::LinuxContainerResources>>,
        /// The sum of its containers.
        resources: Option<Box<v1::LinuxContainerResources>>,
        /// When they are remembered.
        reply: Reply<()>,
    },
    /// Write the memory of running containers to an archive; they go on.
    Checkpoint {
        /// Which of the pod's; all that run when there is none.
        containers: Option<Vec<String>>,
        /// Where the archive goes.
        place: std::path::PathBuf,
        /// How long it may take; zero for as long as it takes.
        limit: Duration,
        /// An archive of the pod, with those of its containers in it.
        whole: bool,
        /// When the archive is there.
        reply: Reply<()>,
    },
    /// Open a log anew.
    ReopenLog {
        /// Whose.
        container: String,
        /// When the new file is there.
        reply: Reply<()>,
    },
    /// End all containers and give network and namespaces back.
    StopPod {
        /// When it is done.
        reply: Reply<()>,
    },
    /// Stop the pod and remove it and its containers.
    RemovePod {
        /// When nothing is left.
        reply: Reply<()>,
    },
}

/// Sends a command to an actor and waits for the answer.
pub(crate) async fn ask<T>(
    commands: &mpsc::Sender<Command>,
    command: impl FnOnce(Reply<T>) -> Command,
) -> Result<T> {
    let (reply, answer) = oneshot::channel();
    // An actor ends only with its pod.
    let gone = || Error::not_found("the pod sandbox has been removed");
    if commands.send(command(reply)).await.is_err() {
        return Err(gone());
    }
    answer.await.unwrap_or_else(|_| Err(gone()))
}

/// `namespace/name` of a pod, for logs.
pub(crate) fn title(config: Option<&v1::PodSandboxConfig>) -> String {
    let metadata = config.and_then(|c| c.metadata.clone()).unwrap_or_default();
    format!("{}/{}", metadata.namespace, metadata.name)
}

/// What a pod lends to its containers: namespaces, files, shared memory.
pub(crate) fn lend(node: &Node, sandbox: &Sandbox) -> PodPaths {
    if sandbox.guest.is_some() {
        return crate::vm::lend();
    }
    let directory = node.paths.pod(&sandbox.id);
    let namespaces = sandbox.namespaces();
    let own = |mode: NamespaceMode| mode != NamespaceMode::Node;
    let (net, ipc) = (own(namespaces.network()), own(namespaces.ipc()));
    let pinned = |have: bool, name: &str| have.then(|| directory.namespaces().join(name));
    PodPaths {
        namespaces: PodNamespaces {
            net: pinned(net, "net"),
            ipc: pinned(ipc, "ipc"),
            // Pods on the host's network have the host's name as well.
            uts: pinned(net, "uts"),
            pid: shared_pid::namespace(node, sandbox),
            user: pinned(users::of(sandbox).is_some(), "user"),
        },
        hosts: Some(directory.hosts()),
        hostname: Some(directory.hostname()),
        resolv_conf: Some(directory.resolv_conf()),
        shm: Some(if ipc { directory.shm() } else { "/dev/shm".into() }),
    }
}
