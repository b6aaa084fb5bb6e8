//! The node: everything the pods' actors and the services share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use pinion_image::Images;
use pinion_network::Network;
use pinion_spec::HostFacts;
use pinion_store::{Store, Tx};

use crate::admission::{Admission, Admit, Settled};
use crate::cgroups::Cgroups;
use crate::config::Config;
use crate::contract::cpus::Chosen;
use crate::contract::devices::Inventory;
use crate::contract::heal::Journal;
use crate::contract::hugepages::Hugepages;
use crate::contract::pools::Pools;
use crate::contract::settings::Settings;
use crate::contract::watch::Histories;
use crate::error::{Context as _, Result};
use crate::events::Events;
use crate::monitor;
use crate::paths::Paths;
use crate::profile::Profile;
use crate::programs::Programs;
use crate::record::Sandbox;
use crate::registry::Registry;
use crate::services::blocking;
use crate::stats::Samples;
use crate::ticket::Ticket;
use crate::vm::Machines;

/// A pod's name as kubelet means it, and what was asked for under it.
type PodNames = Admission<PodName, PodRequest, Ticket<String>>;

/// What is unique among the pods of a node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct PodName {
    name: String,
    namespace: String,
    uid: String,
    attempt: u32,
}

/// What was asked for: the configuration and the handler.
pub(crate) type PodRequest = (pinion_cri_proto::v1::PodSandboxConfig, String);

impl PodName {
    pub(crate) fn of(config: &pinion_cri_proto::v1::PodSandboxConfig) -> Self {
        let metadata = config.metadata.clone().unwrap_or_default();
        Self {
            name: metadata.name,
            namespace: metadata.namespace,
            uid: metadata.uid,
            attempt: metadata.attempt,
        }
    }
}

/// The node.
pub(crate) struct Node {
    pub(crate) config: Config,
    pub(crate) paths: Paths,
    pub(crate) programs: Programs,
    pub(crate) store: Store,
    pub(crate) images: Arc<Images>,
    pub(crate) network: Network,
    pub(crate) cgroups: Cgroups,
    pub(crate) facts: HostFacts,
    /// Why pods cannot have user namespaces of their own here, if they cannot.
    pub(crate) no_user_namespaces: Option<String>,
    pub(crate) hugepages: Hugepages,
    pub(crate) pools: Pools,
    pub(crate) settings: Settings,
    pub(crate) histories: Histories,
    pub(crate) heals: Journal,
    pub(crate) devices: Inventory,
    pub(crate) cpus: Chosen,
    pub(crate) profile: Profile,
    pub(crate) registry: Registry,
    pub(crate) events: Events,
    /// There once the server listens for NRI plugins, if it does.
    pub(crate) nri: OnceLock<Arc<pinion_nri::Plugins>>,
    /// What was found wrong at the start, for `info`.
    pub(crate) findings: Mutex<Vec<String>>,
    /// Changes to the node's network during a pod's attachment that are not the pod's.
    pub(crate) foreign_changes: Mutex<HashMap<String, Vec<String>>>,
    pub(crate) samples: Samples,
    pub(crate) machines: Machines,
    pub(crate) began: Instant,
    names: Mutex<PodNames>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("paths", &self.paths).finish_non_exhaustive()
    }
}

/// The parts of a node, as the start-up code opens them.
pub(crate) struct Parts {
    pub(crate) config: Config,
    pub(crate) programs: Programs,
    pub(crate) store: Store,
    pub(crate) images: Arc<Images>,
    pub(crate) network: Network,
    pub(crate) cgroups: Cgroups,
    pub(crate) facts: HostFacts,
    pub(crate) profile: Profile,
    pub(crate) no_user_namespaces: Option<String>,
}

impl Node {
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            paths: Paths::new(&parts.config),
            devices: Inventory::new(parts.config.device.cdi_dirs.clone()),
            config: parts.config,
            programs: parts.programs,
            store: parts.store,
            images: parts.images,
            network: parts.network,
            cgroups: parts.cgroups,
            facts: parts.facts,
            no_user_namespaces: parts.no_user_namespaces,
            hugepages: Hugepages::default(),
            pools: Pools::default(),
            settings: Settings::default(),
            histories: Histories::default(),
            heals: Journal::default(),
            cpus: Chosen::default(),
            profile: parts.profile,
            registry: Registry::default(),
            events: Events::default(),
            nri: OnceLock::new(),
            findings: Mutex::default(),
            foreign_changes: Mutex::default(),
            samples: Samples::default(),
            machines: Machines::default(),
            began: Instant::now(),
            names: Mutex::default(),
        }
    }

    /// One transaction of the store, off the event loop.
    pub(crate) async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Tx) -> pinion_store::Result<T> + Send + 'static,
    ) -> Result<T> {
        let store = self.store.clone();
        blocking(move || store.write(work).context(|| "write to the store".to_string())).await
    }

    /// Has the trash of the image store emptied, when nobody waits for it.
    pub(crate) fn empty_trash(&self) {
        let images = self.images.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = images.empty_trash().context(|| "empty the trash".to_string()) {
                // The next time, or the next start, tries again.
                tracing::warn!(error = %error.chain(), "trash left");
            }
        });
    }

    /// Asks for a pod's name; see [`Admission`].
    pub(crate) fn admit(
        &self,
        request: PodRequest,
        id: &str,
        ticket: Ticket<String>,
    ) -> Admit<Ticket<String>> {
        self.names().admit(PodName::of(&request.0), request, id, ticket)
    }

    pub(crate) fn settle_name(&self, sandbox: &Sandbox, settled: Settled) {
        self.names().settle(&PodName::of(&sandbox.config), settled);
    }

    pub(crate) fn restore_name(&self, sandbox: &Sandbox) {
        let request = (sandbox.config.0.clone(), sandbox.handler.clone());
        self.names().restore(PodName::of(&sandbox.config), request, &sandbox.id);
    }

    pub(crate) fn release_name(&self, sandbox: &Sandbox) {
        self.names().release(&PodName::of(&sandbox.config), &sandbox.id);
    }

    fn names(&self) -> std::sync::MutexGuard<'_, PodNames> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes something a person should know, in the log and for `info`.
    pub(crate) fn find(&self, finding: String) {
        tracing::warn!("{finding}");
        self.findings.lock().unwrap_or_else(PoisonError::into_inner).push(finding);
    }

    /// Starts the monitor of a pod; with a plan, one with a virtual machine.
    pub(crate) async fn start_monitor(
        self: &Arc<Self>,
        pod: &str,
        machine: Option<&std::path::Path>,
    ) -> Result<()> {
        let directory = self.paths.pod(pod);
        monitor::start(&monitor::Invocation {
            program: &self.programs.monitor,
            pod,
            directory: directory.path(),
            runtime: &self.programs.runtime,
            runtime_root: &self.programs.runtime_root,
            systemd_cgroup: self.programs.systemd_cgroup,
            machine,
        })
        .await?;
        let Some(pid) = monitor::pid(directory.path()) else { return Ok(()) };
        let node = self.clone();
        if let Err(error) = blocking(move || node.cgroups.adopt_monitor(pid)).await {
            // It works where it is; only a restart of the unit's cgroup would end it.
            tracing::warn!(pod, error = %error.chain(), "the monitor stays in the server's cgroup");
        }
        Ok(())
    }
}
