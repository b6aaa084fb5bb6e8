//! The node's pod network: attach, detach, and whether it is ready.

use crate::cni::chain::{self, Chain};
use crate::cni::config::{self, NetworkList};
use crate::cni::exec::Executor;
use crate::cni::record::{Record, Records, Stored};
use crate::cni::request;
use crate::error::{self, NetworkError};
use crate::namespaces;
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
}

/// Whether pods can be attached; the `NetworkReady` condition of CRI's Status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkStatus {
    /// Pods can be attached.
    pub ready: bool,
    /// One word for machines; empty when ready with a configured network.
    pub reason: String,
    /// A sentence for people: what is wrong and where.
    pub message: String,
    /// No configuration: pods get loopback and nothing else.
    pub loopback_only: bool,
}

/// The pod network. Cheap to clone; all methods may run concurrently for different pods,
/// the caller serialises those of one pod.
#[derive(Debug, Clone)]
pub struct Network {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    conf_dir: PathBuf,
    executor: Executor,
    records: Records,
    loopback_only: bool,
    pod_cidrs: RwLock<Vec<String>>,
    /// Versions each binary said it speaks, asked once per change of the file.
    spoken: Mutex<HashMap<PathBuf, (SystemTime, Vec<String>)>>,
}

impl Network {
    /// A network over these directories; none of them needs to exist yet. Without any
    /// configuration pods get loopback only, see [`Network::require_configuration`].
    pub fn new(config: NetworkConfig) -> Self {
        let executor = Executor { bin_dirs: config.bin_dirs, timeout: TIMEOUT };
        Self::from_parts(config.conf_dir, executor, Records { dir: config.cache_dir }, true)
    }

    fn from_parts(
        conf_dir: PathBuf,
        executor: Executor,
        records: Records,
        loopback_only: bool,
    ) -> Self {
        let shared = Shared {
            conf_dir,
            executor,
            records,
            loopback_only,
            pod_cidrs: RwLock::default(),
            spoken: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// The same network, not ready until a configuration appears: what a cluster node wants.
    #[must_use]
    pub fn require_configuration(&self) -> Self {
        let shared = &self.shared;
        let (executor, records) = (shared.executor.clone(), shared.records.clone());
        Self::from_parts(shared.conf_dir.clone(), executor, records, false)
    }

    /// The same network with another deadline per plugin call.
    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        let shared = &self.shared;
        let executor = Executor { timeout, ..shared.executor.clone() };
        let records = shared.records.clone();
        Self::from_parts(shared.conf_dir.clone(), executor, records, shared.loopback_only)
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
        for plugin in &list.plugins {
            shared.executor.find(&plugin.kind)?; // before anything has been done
        }
        let mut record = self.record(pod, list);
        let id = &pod.sandbox_id;
        if let Some(left) = self.known(pod).await? {
            // An ADD that a crash cut short: CNI wants a DEL before the next ADD.
            self.detach(id, &left).await?;
        }
        shared.records.write(id, &record).await?;
        match self.attach(id, &mut record).await {
            Ok(attachment) => Ok(attachment),
            Err(source) => Err(NetworkError::Add {
                pod: id.clone(),
                network: record.network.name.clone(),
                source: Box::new(source),
                cleanup: self.detach(id, &record).await.err().map(Box::new),
            }),
        }
    }

    async fn attach(&self, id: &str, record: &mut Record) -> Result<Attachment, NetworkError> {
        let chain = Chain { executor: &self.shared.executor, pod: id, record };
        let (value, result) = chain.add().await?;
        let attachment = Attachment::from_result(&record.network.name, &record.interface, result);
        record.result = Some(value);
        if attachment.ips.is_empty() {
            let last = record.network.plugins.last().map(|plugin| plugin.kind.clone());
            return Err(NetworkError::BadOutput {
                plugin: last.unwrap_or_default(),
                command: "ADD",
                reason: format!("the result gives {} no address", record.interface),
            });
        }
        record.attachment = Some(attachment.clone());
        self.shared.records.write(id, record).await?;
        Ok(attachment)
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
            None if attachment.is_none_or(Attachment::is_loopback_only) => return Ok(()),
            None => match config::load(&shared.conf_dir)? {
                Some((_, list)) => self.record(pod, list),
                None => return Ok(()), // nothing is left that knows how to detach
            },
        };
        if !namespaces::is_pinned(&record.netns) {
            // A plugin must not be pointed at whatever is there now; it frees what it can.
            record.netns = PathBuf::new();
        }
        self.detach(&pod.sandbox_id, &record).await
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
        let chain = Chain { executor: &self.shared.executor, pod: id, record };
        let failures = chain.del().await;
        if failures.is_empty() {
            return self.shared.records.remove(id);
        }
        Err(NetworkError::Del {
            pod: id.to_owned(),
            network: record.network.name.clone(),
            failures,
        })
    }

    /// Asks the plugins whether a pod's attachment is still as it was made (CNI 0.4).
    ///
    /// # Errors
    /// The first plugin that finds something changed.
    pub async fn check(&self, pod: &PodNetwork) -> Result<(), NetworkError> {
        let Stored::Sound(record) = self.shared.records.read(&pod.sandbox_id)? else {
            return Ok(());
        };
        if record.network.disable_check || !record.network.version.has_check() {
            return Ok(());
        }
        let executor = &self.shared.executor;
        Chain { executor, pod: &pod.sandbox_id, record: &record }.check().await
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
        let pods = match shared.records.pods() {
            Ok(pods) => pods,
            Err(error) => return vec![error],
        };
        let mut failures = Vec::new();
        for id in pods.iter().filter(|id| !valid.contains(*id)) {
            let pod = PodNetwork { sandbox_id: id.clone(), ..Default::default() };
            failures.extend(self.del(&pod, None).await.err());
        }
        match config::load(&shared.conf_dir) {
            Ok(Some((_, list))) if list.version.has_status() => {
                let valid: Vec<_> =
                    valid.iter().map(|id| (id.clone(), INTERFACE.to_owned())).collect();
                failures.extend(chain::gc(&shared.executor, &list, &valid).await);
            }
            Ok(_) => {}
            Err(error) => failures.push(error),
        }
        failures
    }

    fn record(&self, pod: &PodNetwork, network: NetworkList) -> Record {
        let cidrs = self.shared.pod_cidrs.read().unwrap_or_else(PoisonError::into_inner);
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

    /// Whether an ADD would work now: a sound configuration, every binary in place and
    /// speaking the version, and no plugin reporting trouble (STATUS, CNI 1.1).
    pub async fn status(&self) -> NetworkStatus {
        let not_ready = |reason: &str, message: String| NetworkStatus {
            ready: false,
            reason: reason.to_owned(),
            message,
            loopback_only: false,
        };
        let shared = &self.shared;
        let list = match config::load(&shared.conf_dir) {
            Ok(Some((_, list))) => list,
            Ok(None) => {
                let place = shared.conf_dir.display();
                let message = format!("no CNI configuration in {place}");
                if !shared.loopback_only {
                    return not_ready("NetworkPluginNotReady", message);
                }
                return NetworkStatus {
                    ready: true,
                    reason: "LoopbackOnly".to_owned(),
                    message: format!("{message}: pods get loopback only"),
                    loopback_only: true,
                };
            }
            Err(error) => return not_ready("NetworkConfigInvalid", error::chain(&error)),
        };
        for plugin in &list.plugins {
            for binary in [Some(plugin.kind.as_str()), plugin.ipam()].into_iter().flatten() {
                if let Err(error) = shared.executor.find(binary) {
                    return not_ready("NetworkPluginMissing", error::chain(&error));
                }
            }
            if let Some(message) = self.mute(&plugin.kind, &list).await {
                return not_ready("NetworkPluginVersion", message);
            }
        }
        if list.version.has_status()
            && let Err(error) = chain::status(&shared.executor, &list).await
        {
            return not_ready("NetworkPluginNotReady", error::chain(&error));
        }
        NetworkStatus {
            ready: true,
            reason: String::new(),
            message: String::new(),
            loopback_only: false,
        }
    }

    /// Why a plugin cannot talk with this network's version, if it cannot.
    async fn mute(&self, plugin: &str, list: &NetworkList) -> Option<String> {
        let path = self.shared.executor.find(plugin).ok()?;
        let changed = std::fs::metadata(&path).and_then(|meta| meta.modified()).ok()?;
        let known = {
            let spoken = self.shared.spoken.lock().unwrap_or_else(PoisonError::into_inner);
            spoken.get(&path).filter(|(then, _)| *then == changed).map(|(_, list)| list.clone())
        };
        let versions = match known {
            Some(versions) => versions,
            None => match chain::versions(&self.shared.executor, plugin, list).await {
                Ok(versions) => {
                    let mut spoken =
                        self.shared.spoken.lock().unwrap_or_else(PoisonError::into_inner);
                    spoken.insert(path, (changed, versions.clone()));
                    versions
                }
                Err(error) => return Some(error::chain(&error)),
            },
        };
        let wanted = list.version.as_str();
        (!versions.iter().any(|version| version == wanted)).then(|| {
            let all = versions.join(", ");
            format!("CNI plugin {plugin:?} speaks {all}, network {:?} wants {wanted}", list.name)
        })
    }
}
