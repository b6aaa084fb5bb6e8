//! The node's pod network: attach, detach, and whether it is ready.

use crate::cni::cache;
use crate::cni::chain::{self, Chain};
use crate::cni::config::{self, NetworkList};
use crate::cni::exec::Executor;
use crate::cni::record::{Record, Records, Stored};
use crate::cni::request;
use crate::engine::Choice;
use crate::error::NetworkError;
use crate::guard::{ForeignChanges, Guard, Run, Watch};
use crate::namespaces;
use crate::native::config::Plan;
use crate::native::reaper::Reaper;
use crate::netlink::KeptSocket;
use crate::pod::{Attachment, PodNetwork};
use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

/// Name of a pod's interface in its default network, as Kubernetes expects it.
const INTERFACE: &str = "eth0";
/// How long one plugin may take; kubelet gives RunPodSandbox four minutes in all.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Where things are.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Configuration files, usually `/etc/cni/net.d`.
    pub conf_dir: PathBuf,
    /// Plugin directories in order of preference (`/opt/cni/bin`, `/usr/lib/cni`).
    pub bin_dirs: Vec<PathBuf>,
    /// Attachment records; must survive a reboot, so that addresses can be given back then.
    pub cache_dir: PathBuf,
    /// Common chains are done in this process instead of by their plugins.
    pub native: bool,
    /// When the node's network is compared before and after an attachment or detachment.
    pub guard: Watch,
}

/// The pod network. Cheap to clone; all methods may run concurrently for different pods,
/// the caller serialises those of one pod.
#[derive(Debug, Clone)]
pub struct Network {
    pub(crate) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) conf_dir: PathBuf,
    pub(crate) executor: Executor,
    pub(crate) records: Records,
    pub(crate) loopback_only: bool,
    pub(crate) choice: Choice,
    pub(crate) reaper: Reaper,
    pub(crate) rules: KeptSocket,
    pub(crate) guard: Arc<Guard>,
    pod_cidrs: RwLock<Vec<String>>,
    /// Versions each binary said it speaks, asked once per change of the file.
    pub(crate) spoken: Mutex<HashMap<PathBuf, (SystemTime, Vec<String>)>>,
}

impl Network {
    /// A network over these directories; none of them needs to exist yet. Without any
    /// configuration pods get loopback only, see [`Network::require_configuration`].
    pub fn new(config: NetworkConfig) -> Self {
        let shared = Shared {
            conf_dir: config.conf_dir,
            executor: Executor { bin_dirs: config.bin_dirs, timeout: TIMEOUT },
            records: Records { dir: config.cache_dir },
            loopback_only: true,
            choice: Choice::new(config.native),
            reaper: Reaper::default(),
            rules: KeptSocket::default(),
            guard: Arc::new(Guard::new(config.guard)),
            pod_cidrs: RwLock::default(),
            spoken: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Another view of the same network.
    fn with(&self, change: impl FnOnce(&mut Shared)) -> Self {
        let shared = &self.shared;
        let mut other = Shared {
            conf_dir: shared.conf_dir.clone(),
            executor: shared.executor.clone(),
            records: shared.records.clone(),
            loopback_only: shared.loopback_only,
            choice: Choice::new(shared.choice.allowed),
            reaper: shared.reaper.clone(),
            rules: shared.rules.clone(),
            guard: shared.guard.clone(),
            pod_cidrs: RwLock::new(self.pod_cidrs()),
            spoken: Mutex::default(),
        };
        change(&mut other);
        Self { shared: Arc::new(other) }
    }

    /// The same network, not ready until a configuration appears: what a cluster node wants.
    #[must_use]
    pub fn require_configuration(&self) -> Self {
        self.with(|shared| shared.loopback_only = false)
    }

    /// The same network with another deadline per plugin call.
    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        self.with(|shared| shared.executor.timeout = timeout)
    }

    /// The same network, its chains done by this process where it can, or by plugins only.
    #[must_use]
    pub fn with_native(&self, native: bool) -> Self {
        self.with(|shared| shared.choice = Choice::new(native))
    }

    fn pod_cidrs(&self) -> Vec<String> {
        self.shared.pod_cidrs.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The node's pod CIDRs (UpdateRuntimeConfig), for plugins with the `ipRanges` capability.
    pub fn set_pod_cidrs(&self, cidrs: Vec<String>) {
        *self.shared.pod_cidrs.write().unwrap_or_else(PoisonError::into_inner) = cidrs;
    }

    /// Attaches a pod whose network namespace is pinned and whose `lo` is up.
    ///
    /// # Errors
    /// Whatever a plugin says. What had been done is taken back; should that fail, the error
    /// says so and [`Network::del`] can be repeated.
    pub async fn add(&self, pod: &PodNetwork) -> Result<Attachment, NetworkError> {
        pod.check()?;
        let shared = &self.shared;
        if !namespaces::is_pinned(&pod.netns) {
            return Err(NetworkError::BadPod {
                field: "network namespace",
                value: pod.netns.display().to_string(),
                reason: "not a pinned namespace",
            });
        }
        let Some((_, list)) = config::load(&shared.conf_dir)? else {
            if shared.loopback_only {
                return Ok(Attachment::default());
            }
            return Err(NetworkError::NotConfigured { conf_dir: shared.conf_dir.clone() });
        };
        let record = self.record(pod, list);
        let id = &pod.sandbox_id;
        let plan = shared.choice.plan(&record.network);
        if plan.is_err() {
            for plugin in &record.network.plugins {
                shared.executor.find(&plugin.kind)?; // before anything has been done
            }
        }
        if let Some(left) = self.known(pod).await? {
            // An ADD that a crash cut short: CNI wants a DEL before the next ADD.
            self.detach(id, &left).await?;
        }
        let run = self.watch(id, plan.is_ok()).await;
        if run.is_none() {
            shared.guard.know_of(&record.claims(id, false)); // before they appear
        }
        let (record, outcome) = self.attach(id, plan, record).await;
        self.unwatch(run, id, &record, outcome.is_err()).await;
        outcome
    }

    async fn attach(
        &self,
        id: &str,
        plan: Result<Plan, String>,
        record: Record,
    ) -> (Record, Result<Attachment, NetworkError>) {
        let network = record.network.name.clone();
        let (record, outcome) = match plan {
            Ok(plan) => self.attach_native(id, plan, record).await,
            Err(_) => self.attach_by_plugins(id, record).await,
        };
        let outcome = match outcome {
            Ok(attachment) => Ok(attachment),
            Err(source) => Err(NetworkError::Add {
                pod: id.to_owned(),
                network,
                source: Box::new(source),
                cleanup: self.detach(id, &record).await.err().map(Box::new),
            }),
        };
        (record, outcome)
    }

    /// Looks at the node's network before a chain runs.
    async fn watch(&self, id: &str, built_in: bool) -> Option<Run> {
        if !self.shared.guard.watches(built_in) {
            return None;
        }
        let (guard, id) = (self.shared.guard.clone(), id.to_owned());
        tokio::task::spawn_blocking(move || guard.begin(&id)).await.ok().flatten()
    }

    /// Looks again. `last`: the pod is not attached any more.
    async fn unwatch(&self, run: Option<Run>, id: &str, record: &Record, last: bool) {
        let claims = record.claims(id, last);
        let guard = self.shared.guard.clone();
        let Some(run) = run else { return guard.know_of(&claims) };
        // An error is a panic of the thread, and the end of this run all the same.
        let _ = tokio::task::spawn_blocking(move || guard.end(&run, &claims)).await;
    }

    /// Foreign changes to the node's network found since the last call.
    pub fn foreign_changes(&self) -> Vec<ForeignChanges> {
        self.shared.guard.reports()
    }

    async fn attach_by_plugins(
        &self,
        id: &str,
        mut record: Record,
    ) -> (Record, Result<Attachment, NetworkError>) {
        let outcome = async {
            self.shared.records.write(id, &record).await?;
            let chain = Chain { executor: &self.shared.executor, pod: id, record: &record };
            let (value, result) = chain.add().await?;
            let attachment = record.attached(value, result)?;
            self.shared.records.write(id, &record).await?;
            self.cache(id, &record);
            Ok(attachment)
        };
        let outcome = outcome.await;
        (record, outcome)
    }

    /// Others look there; a pod is not refused because they would not find it.
    pub(crate) fn cache(&self, id: &str, record: &Record) {
        let _ = cache::write(&self.shared.records.dir, id, record);
    }

    /// Detaches a pod: every plugin, in reverse, with the configuration it was attached with.
    ///
    /// Succeeds when there is nothing to do, and works after the namespace is gone.
    /// `attachment` is what the caller remembers of it, used when the record is lost.
    ///
    /// # Errors
    /// All plugins' failures together; the record stays, so the call can be repeated.
    pub async fn del(
        &self,
        pod: &PodNetwork,
        attachment: Option<&Attachment>,
    ) -> Result<(), NetworkError> {
        pod.check()?;
        let shared = &self.shared;
        let mut record = match self.known(pod).await? {
            Some(record) => record,
            None => match config::load(&shared.conf_dir)? {
                // Records of built-in chains may be lost with the power, and these can detach
                // what is not attached.
                Some((_, list))
                    if attachment.is_some_and(|pod| !pod.is_loopback_only())
                        || shared.choice.plan(&list).is_ok() =>
                {
                    self.record(pod, list)
                }
                _ => return Ok(()), // nothing to detach, or nobody who knows how
            },
        };
        if !namespaces::is_pinned(&record.netns) {
            // A plugin must not be pointed at whatever is there now; it frees what it can.
            record.netns = PathBuf::new();
        }
        let id = &pod.sandbox_id;
        let built_in = shared.choice.plan(&record.network).is_ok();
        let run = self.watch(id, built_in).await;
        let outcome = self.detach(id, &record).await;
        self.unwatch(run, id, &record, true).await;
        outcome
    }

    /// The pod's record; in place of a damaged one, a new one from the configuration in force.
    async fn known(&self, pod: &PodNetwork) -> Result<Option<Record>, NetworkError> {
        let shared = &self.shared;
        match shared.records.read(&pod.sandbox_id)? {
            Stored::Missing => Ok(None),
            Stored::Sound(record) => Ok(Some(*record)),
            Stored::Damaged => {
                let Some((_, list)) = config::load(&shared.conf_dir)? else { return Ok(None) };
                let record = self.record(pod, list);
                shared.records.write(&pod.sandbox_id, &record).await?;
                Ok(Some(record))
            }
        }
    }

    async fn detach(&self, id: &str, record: &Record) -> Result<(), NetworkError> {
        let failures = match self.shared.choice.plan(&record.network) {
            Ok(plan) => self.detach_native(id, plan, record).await,
            Err(_) => {
                let chain = Chain { executor: &self.shared.executor, pod: id, record };
                chain.del().await
            }
        };
        if failures.is_empty() {
            let _ = cache::remove(&self.shared.records.dir, id, record);
            return self.shared.records.remove(id);
        }
        Err(NetworkError::Del {
            pod: id.to_owned(),
            network: record.network.name.clone(),
            failures,
        })
    }

    /// Asks whether a pod's attachment is still as it was made (CNI 0.4).
    ///
    /// # Errors
    /// The first thing that has changed.
    pub async fn check(&self, pod: &PodNetwork) -> Result<(), NetworkError> {
        let Stored::Sound(record) = self.shared.records.read(&pod.sandbox_id)? else {
            return Ok(());
        };
        if record.network.disable_check || !record.network.version.has_check() {
            return Ok(());
        }
        match self.shared.choice.plan(&record.network) {
            Ok(plan) => self.check_native(&pod.sandbox_id, plan, *record).await,
            Err(_) => {
                let executor = &self.shared.executor;
                Chain { executor, pod: &pod.sandbox_id, record: &record }.check().await
            }
        }
    }

    /// What a pod got, from its record: for a server that has lost its own.
    pub fn attachment(&self, sandbox_id: &str) -> Result<Option<Attachment>, NetworkError> {
        Ok(match self.shared.records.read(sandbox_id)? {
            Stored::Sound(record) => record.attachment,
            Stored::Missing | Stored::Damaged => None,
        })
    }

    /// Detaches recorded pods that are not among `valid` and lets plugins collect what no pod
    /// owns (CNI 1.1 GC). Called once at start.
    ///
    /// # Errors
    /// None stop it: the list names what could not be freed.
    pub async fn collect(&self, valid: &BTreeSet<String>) -> Vec<NetworkError> {
        let shared = &self.shared;
        shared.records.sweep();
        let pods = match shared.records.pods() {
            Ok(pods) => pods,
            Err(error) => return vec![error],
        };
        shared.guard.know(pods.iter().flat_map(|id| match shared.records.read(id) {
            Ok(Stored::Sound(record)) => record.claims(id, false).links,
            _ => BTreeSet::new(),
        }));
        let mut failures = Vec::new();
        for id in pods.iter().filter(|id| !valid.contains(*id)) {
            let pod = PodNetwork { sandbox_id: id.clone(), ..Default::default() };
            failures.extend(self.del(&pod, None).await.err());
        }
        match config::load(&shared.conf_dir) {
            Ok(Some((_, list))) if list.version.has_status() => {
                let valid: Vec<_> =
                    valid.iter().map(|id| (id.clone(), INTERFACE.to_owned())).collect();
                match shared.choice.plan(&list) {
                    Ok(plan) => failures.extend(self.collect_native(plan, list, valid).await),
                    Err(_) => failures.extend(chain::gc(&shared.executor, &list, &valid).await),
                }
            }
            Ok(_) => {}
            Err(error) => failures.push(error),
        }
        failures
    }

    fn record(&self, pod: &PodNetwork, network: NetworkList) -> Record {
        let cidrs = self.pod_cidrs();
        Record {
            network,
            interface: INTERFACE.to_owned(),
            netns: pod.netns.clone(),
            args: request::args(pod),
            capabilities: request::capabilities(pod, &cidrs),
            result: None,
            attachment: None,
        }
    }
}
