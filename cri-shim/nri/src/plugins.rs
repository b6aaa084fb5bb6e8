//! All plugins of the node, and the events they are told.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use pinion_nri_proto::api::{
    CompoundFieldOwners, Container, ContainerUpdate, CreateContainerRequest,
    CreateContainerResponse, Event, FieldOwners, LinuxResources, OwningPlugins, PluginInstance,
    PodSandbox, PostCreateContainerRequest, PostStartContainerRequest, PostUpdateContainerRequest,
    PostUpdatePodSandboxRequest, RemoveContainerRequest, RemovePodSandboxRequest,
    RunPodSandboxRequest, StartContainerRequest, StopContainerRequest, StopContainerResponse,
    StopPodSandboxRequest, UpdateContainerRequest, UpdateContainerResponse,
    UpdatePodSandboxRequest, ValidateContainerAdjustmentRequest,
    ValidateContainerAdjustmentResponse,
};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, OwnedRwLockReadGuard, RwLock};

use crate::launch;
use crate::link::CallError;
use crate::merge::{Conflict, Merged};
use crate::plugin::{Launched, Plugin};

/// How plugins are found and how long they may take.
#[derive(Debug, Clone)]
pub struct Config {
    /// Programs that are started.
    pub plugin_dir: PathBuf,
    /// Their configurations.
    pub plugin_config_dir: PathBuf,
    /// How long a plugin may take to register, and to look at the node's state.
    pub registration_timeout: Duration,
    /// How long it may take for an event.
    pub request_timeout: Duration,
    /// Names, without index, of plugins without which nothing is made.
    pub required: Vec<String>,
}

/// The server as plugins need it.
pub trait State: Send + Sync + 'static {
    /// What exists now.
    fn all(&self) -> (Vec<PodSandbox>, Vec<Container>);
    /// Changes containers and ends others; the changes that failed and were to succeed.
    fn update(
        &self,
        updates: Vec<ContainerUpdate>,
        evictions: Vec<(String, String)>,
    ) -> BoxFuture<'static, Vec<ContainerUpdate>>;
}

/// Why something is not made or changed.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// A plugin said no.
    #[error("NRI plugin {plugin}: {method}")]
    Plugin {
        /// Which.
        plugin: String,
        /// To what.
        method: &'static str,
        /// Its words.
        #[source]
        source: CallError,
    },
    /// A plugin that judges adjustments rejects them.
    #[error("NRI plugin {plugin} rejects the adjustments: {reason}")]
    Rejected {
        /// Which.
        plugin: String,
        /// Its words.
        reason: String,
    },
    /// Two plugins want different things.
    #[error("NRI")]
    Conflict(#[source] Conflict),
    /// Plugins without which nothing is made are not there.
    #[error(
        "NRI: required plugins are not connected: {}; start them, or take them out of \
         `required_plugins`",
        .0.join(", ")
    )]
    Missing(Vec<String>),
}

/// Held while something is made: no plugin is told the node's state meanwhile.
#[derive(Debug)]
pub struct Creation {
    _guard: OwnedRwLockReadGuard<()>,
}

/// The plugins of the node.
pub struct Plugins {
    config: Arc<Config>,
    state: Arc<dyn State>,
    /// In the order they are called. Held for the whole of an event.
    list: Mutex<Vec<Arc<Plugin>>>,
    creations: Arc<RwLock<()>>,
}

impl std::fmt::Debug for Plugins {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugins").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Plugins {
    /// No plugins yet.
    #[must_use]
    pub fn new(config: Config, state: Arc<dyn State>) -> Arc<Self> {
        Arc::new(Self {
            config: Arc::new(config),
            state,
            list: Mutex::default(),
            creations: Arc::default(),
        })
    }

    /// Starts the plugins of the plugin directory. One that fails is left out, and said.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub async fn launch(self: &Arc<Self>) -> io::Result<()> {
        for found in launch::find(&self.config.plugin_dir)? {
            let name = format!("{}-{}", found.index, found.name);
            match launch::start(&self.config, &found) {
                Ok((socket, launched)) => self.join(socket, Some(launched)).await,
                Err(error) => tracing::error!(plugin = name, %error, "NRI plugin not started"),
            }
        }
        Ok(())
    }

    /// Lets plugins connect, for ever.
    pub async fn accept(self: Arc<Self>, listener: UnixListener) {
        loop {
            match listener.accept().await {
                // Each on its own: one that says nothing holds up no other.
                Ok((socket, _)) => drop(tokio::spawn(self.clone().welcome(socket))),
                Err(error) => {
                    tracing::warn!(%error, "accept an NRI plugin");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn welcome(self: Arc<Self>, socket: UnixStream) {
        self.join(socket, None).await;
    }

    /// Takes a plugin in: it registers, learns what exists, and is told events from then on.
    async fn join(&self, socket: UnixStream, launched: Option<Launched>) {
        let plugin = match Plugin::meet(socket, launched, &self.config, &self.state).await {
            Ok(plugin) => plugin,
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(error, "a connection became no NRI plugin");
                return;
            }
        };
        // What is being made is made first; what comes later is told by events.
        let alone = self.creations.write().await;
        let mut list = self.list.lock().await;
        let (pods, containers) = self.state.all();
        let updates = match plugin.synchronize(pods, containers).await {
            Ok(updates) => updates,
            Err(error) => {
                tracing::warn!(plugin = plugin.name, error = chain(&error), "NRI plugin dropped");
                return;
            }
        };
        tracing::info!(plugin = plugin.name, "NRI plugin connected");
        list.push(Arc::new(plugin));
        list.sort_by(|a, b| a.name.cmp(&b.name));
        drop(list);
        drop(alone);
        if !updates.is_empty() {
            self.state.update(updates, Vec::new()).await;
        }
    }

    /// To be held while a pod or container is made.
    pub async fn creation(&self) -> Creation {
        Creation { _guard: self.creations.clone().read_owned().await }
    }

    /// Names of the plugins that are connected.
    pub async fn names(&self) -> Vec<String> {
        self.list.lock().await.iter().map(|plugin| plugin.name.clone()).collect()
    }

    /// Whether the required plugins are there.
    fn require(&self, list: &[Arc<Plugin>]) -> Result<(), Refused> {
        let there = |name: &&String| {
            list.iter().any(|p| !p.is_closed() && p.name.get(3..) == Some(name.as_str()))
        };
        let missing: Vec<String> =
            self.config.required.iter().filter(|name| !there(name)).cloned().collect();
        if missing.is_empty() { Ok(()) } else { Err(Refused::Missing(missing)) }
    }

    /// Tells every plugin that wants it, one after the other.
    async fn tell(&self, event: Event, subject: Subject<'_>) -> Result<(), Refused> {
        let mut list = self.list.lock().await;
        let result = tell_all(&list, event, &subject).await;
        drop_closed(&mut list);
        result
    }

    /// A pod has been made and is not ready yet.
    ///
    /// # Errors
    /// When a plugin refuses the pod, or a required one is missing.
    pub async fn run_pod(&self, pod: &PodSandbox) -> Result<(), Refused> {
        self.require(&self.list.lock().await)?;
        self.tell(Event::RunPodSandbox, Subject::pod(pod)).await?;
        // One that did not answer has been dropped by now.
        self.require(&self.list.lock().await)
    }

    /// The containers of a pod have ended; its network is still there.
    ///
    /// # Errors
    /// When a plugin complains; the pod is stopped all the same.
    pub async fn stop_pod(&self, pod: &PodSandbox) -> Result<(), Refused> {
        self.tell(Event::StopPodSandbox, Subject::pod(pod)).await
    }

    /// A pod is gone.
    ///
    /// # Errors
    /// When a plugin complains.
    pub async fn remove_pod(&self, pod: &PodSandbox) -> Result<(), Refused> {
        self.tell(Event::RemovePodSandbox, Subject::pod(pod)).await
    }

    /// A pod's own limits are about to change.
    ///
    /// # Errors
    /// When a plugin refuses.
    pub async fn update_pod(
        &self,
        pod: &PodSandbox,
        overhead: Option<LinuxResources>,
        resources: Option<LinuxResources>,
    ) -> Result<(), Refused> {
        let subject = Subject { overhead, resources, ..Subject::pod(pod) };
        self.tell(Event::UpdatePodSandbox, subject).await
    }

    /// A pod's own limits have changed.
    ///
    /// # Errors
    /// When a plugin complains.
    pub async fn post_update_pod(&self, pod: &PodSandbox) -> Result<(), Refused> {
        self.tell(Event::PostUpdatePodSandbox, Subject::pod(pod)).await
    }

    /// A container is to be made; what all plugins together ask for.
    ///
    /// # Errors
    /// When a plugin refuses, two of them contradict each other, one that judges rejects the
    /// whole, or a required one is missing.
    pub async fn create(&self, pod: &PodSandbox, container: &Container) -> Result<Merged, Refused> {
        const METHOD: &str = "CreateContainer";
        let mut list = self.list.lock().await;
        self.require(&list)?;
        let mut merged = Merged::default();
        let request =
            CreateContainerRequest { pod: Some(pod.clone()), container: Some(container.clone()) };
        for plugin in list.iter().filter(|plugin| plugin.wants(Event::CreateContainer)) {
            let answer: CreateContainerResponse = match plugin.call(METHOD, &request).await {
                Ok(answer) => answer,
                Err(error) => {
                    survive(plugin, METHOD, error)?;
                    continue;
                }
            };
            if let Some(adjust) = &answer.adjust {
                merged.adjust(&plugin.name, adjust).map_err(Refused::Conflict)?;
            }
            merged.update(&plugin.name, &answer.update).map_err(Refused::Conflict)?;
            merged.evictions.extend(answer.evict.into_iter().map(|e| (e.container_id, e.reason)));
        }
        judge(&list, &request, &merged).await?;
        drop_closed(&mut list);
        self.require(&list)?;
        Ok(merged)
    }

    /// A container has been made.
    ///
    /// # Errors
    /// When a plugin complains.
    pub async fn post_create(&self, pod: &PodSandbox, c: &Container) -> Result<(), Refused> {
        self.tell(Event::PostCreateContainer, Subject::container(pod, c)).await
    }

    /// A container is to be started.
    ///
    /// # Errors
    /// When a plugin refuses.
    pub async fn start(&self, pod: &PodSandbox, c: &Container) -> Result<(), Refused> {
        self.tell(Event::StartContainer, Subject::container(pod, c)).await
    }

    /// A container runs.
    ///
    /// # Errors
    /// When a plugin complains.
    pub async fn post_start(&self, pod: &PodSandbox, c: &Container) -> Result<(), Refused> {
        self.tell(Event::PostStartContainer, Subject::container(pod, c)).await
    }

    /// A container's limits are to change; what plugins ask for beside.
    ///
    /// # Errors
    /// When a plugin refuses, or two contradict each other.
    pub async fn update(
        &self,
        pod: &PodSandbox,
        container: &Container,
        resources: &LinuxResources,
    ) -> Result<Merged, Refused> {
        const METHOD: &str = "UpdateContainer";
        let mut list = self.list.lock().await;
        let mut merged = Merged::default();
        let request = UpdateContainerRequest {
            pod: Some(pod.clone()),
            container: Some(container.clone()),
            linux_resources: Some(resources.clone()),
        };
        for plugin in list.iter().filter(|plugin| plugin.wants(Event::UpdateContainer)) {
            let answer: UpdateContainerResponse = match plugin.call(METHOD, &request).await {
                Ok(answer) => answer,
                Err(error) => {
                    survive(plugin, METHOD, error)?;
                    continue;
                }
            };
            merged.update(&plugin.name, &answer.update).map_err(Refused::Conflict)?;
            merged.evictions.extend(answer.evict.into_iter().map(|e| (e.container_id, e.reason)));
        }
        drop_closed(&mut list);
        Ok(merged)
    }

    /// A container's limits have changed.
    ///
    /// # Errors
    /// When a plugin complains.
    pub async fn post_update(&self, pod: &PodSandbox, c: &Container) -> Result<(), Refused> {
        self.tell(Event::PostUpdateContainer, Subject::container(pod, c)).await
    }

    /// A container has ended; what plugins ask for about the others.
    ///
    /// # Errors
    /// When a plugin complains.
    pub async fn stop(&self, pod: &PodSandbox, c: &Container) -> Result<Merged, Refused> {
        const METHOD: &str = "StopContainer";
        let mut list = self.list.lock().await;
        let mut merged = Merged::default();
        let request = StopContainerRequest { pod: Some(pod.clone()), container: Some(c.clone()) };
        for plugin in list.iter().filter(|plugin| plugin.wants(Event::StopContainer)) {
            match plugin.call::<StopContainerResponse>(METHOD, &request).await {
                Ok(answer) => {
                    merged.update(&plugin.name, &answer.update).map_err(Refused::Conflict)?;
                }
                Err(error) => survive(plugin, METHOD, error)?,
            }
        }
        drop_closed(&mut list);
        Ok(merged)
    }

    /// A container is gone.
    ///
    /// # Errors
    /// When a plugin complains.
    pub async fn remove(&self, pod: &PodSandbox, c: &Container) -> Result<(), Refused> {
        self.tell(Event::RemoveContainer, Subject::container(pod, c)).await
    }
}

/// What an event is about.
struct Subject<'a> {
    pod: &'a PodSandbox,
    container: Option<&'a Container>,
    overhead: Option<LinuxResources>,
    resources: Option<LinuxResources>,
}

impl<'a> Subject<'a> {
    fn pod(pod: &'a PodSandbox) -> Self {
        Self { pod, container: None, overhead: None, resources: None }
    }

    fn container(pod: &'a PodSandbox, container: &'a Container) -> Self {
        Self { container: Some(container), ..Self::pod(pod) }
    }
}

async fn tell_all(
    list: &[Arc<Plugin>],
    event: Event,
    subject: &Subject<'_>,
) -> Result<(), Refused> {
    let (method, told) = (method(event), list.iter().filter(|plugin| plugin.wants(event)));
    for plugin in told {
        if let Err(error) = tell_one(plugin, event, subject).await {
            survive(plugin, method, error)?;
        }
    }
    Ok(())
}

async fn tell_one(plugin: &Plugin, event: Event, subject: &Subject<'_>) -> Result<(), CallError> {
    let pod = Some(subject.pod.clone());
    let container = subject.container.cloned();
    macro_rules! send {
        ($request:expr) => {
            plugin.tell(event, method(event), &$request, Some(subject.pod), subject.container).await
        };
    }
    match event {
        Event::RunPodSandbox => send!(RunPodSandboxRequest { pod }),
        Event::StopPodSandbox => send!(StopPodSandboxRequest { pod }),
        Event::RemovePodSandbox => send!(RemovePodSandboxRequest { pod }),
        Event::UpdatePodSandbox => send!(UpdatePodSandboxRequest {
            pod,
            overhead_linux_resources: subject.overhead.clone(),
            linux_resources: subject.resources.clone(),
        }),
        Event::PostUpdatePodSandbox => send!(PostUpdatePodSandboxRequest { pod }),
        Event::PostCreateContainer => send!(PostCreateContainerRequest { pod, container }),
        Event::StartContainer => send!(StartContainerRequest { pod, container }),
        Event::PostStartContainer => send!(PostStartContainerRequest { pod, container }),
        Event::PostUpdateContainer => send!(PostUpdateContainerRequest { pod, container }),
        Event::RemoveContainer => send!(RemoveContainerRequest { pod, container }),
        // These have answers and methods of their own.
        Event::CreateContainer
        | Event::UpdateContainer
        | Event::StopContainer
        | Event::ValidateContainerAdjustment
        | Event::Unknown
        | Event::Last => Ok(()),
    }
}

fn method(event: Event) -> &'static str {
    match event {
        Event::RunPodSandbox => "RunPodSandbox",
        Event::StopPodSandbox => "StopPodSandbox",
        Event::RemovePodSandbox => "RemovePodSandbox",
        Event::UpdatePodSandbox => "UpdatePodSandbox",
        Event::PostUpdatePodSandbox => "PostUpdatePodSandbox",
        Event::CreateContainer => "CreateContainer",
        Event::PostCreateContainer => "PostCreateContainer",
        Event::StartContainer => "StartContainer",
        Event::PostStartContainer => "PostStartContainer",
        Event::UpdateContainer => "UpdateContainer",
        Event::PostUpdateContainer => "PostUpdateContainer",
        Event::StopContainer => "StopContainer",
        Event::RemoveContainer => "RemoveContainer",
        Event::ValidateContainerAdjustment => "ValidateContainerAdjustment",
        Event::Unknown | Event::Last => "",
    }
}

/// A plugin that cannot be worked with is dropped; one that says no is heard.
fn survive(plugin: &Plugin, method: &'static str, error: CallError) -> Result<(), Refused> {
    match error {
        CallError::Unimplemented => Ok(()),
        error if error.is_fatal() => {
            let (plugin_name, error) = (&plugin.name, chain(&error));
            tracing::error!(plugin = plugin_name, method, error, "NRI plugin dropped");
            plugin.close();
            Ok(())
        }
        source => Err(Refused::Plugin { plugin: plugin.name.clone(), method, source }),
    }
}

fn drop_closed(list: &mut Vec<Arc<Plugin>>) {
    list.retain(|plugin| !plugin.is_closed());
}

/// Asks the plugins that judge; unlike with other events, one that cannot answer this counts as
/// a no. One that was dropped before is asked no more: whoever needs it lists it as required.
async fn judge(
    list: &[Arc<Plugin>],
    request: &CreateContainerRequest,
    merged: &Merged,
) -> Result<(), Refused> {
    const METHOD: &str = "ValidateContainerAdjustment";
    let judges = || {
        let wants = |p: &&Arc<Plugin>| p.wants(Event::ValidateContainerAdjustment);
        list.iter().filter(wants).filter(|p| !p.is_closed())
    };
    if judges().next().is_none() {
        return Ok(());
    }
    let id = request.container.as_ref().map(|c| c.id.clone()).unwrap_or_default();
    let instance = |plugin: &Arc<Plugin>| {
        let (index, name) = plugin.name.split_once('-').unwrap_or_default();
        PluginInstance { name: name.into(), index: index.into() }
    };
    let question = ValidateContainerAdjustmentRequest {
        pod: request.pod.clone(),
        container: request.container.clone(),
        adjust: Some(merged.adjust.clone()),
        update: merged.updates.clone(),
        owners: Some(owners(&id, merged.owners())),
        plugins: list.iter().map(instance).collect(),
    };
    for plugin in judges() {
        let name = plugin.name.clone();
        match plugin.call::<ValidateContainerAdjustmentResponse>(METHOD, &question).await {
            Ok(answer) if answer.reject => {
                return Err(Refused::Rejected { plugin: name, reason: answer.reason });
            }
            Ok(_) | Err(CallError::Unimplemented) => {}
            Err(source) => return Err(Refused::Plugin { plugin: name, method: METHOD, source }),
        }
    }
    Ok(())
}

/// Who set what, by the numbers of the API's `Field` where a field has one.
fn owners(id: &str, owners: &BTreeMap<String, String>) -> OwningPlugins {
    use pinion_nri_proto::api::Field;
    let compound = [
        ("annotation ", Field::Annotations),
        ("mount ", Field::Mounts),
        ("env ", Field::Env),
        ("device ", Field::Devices),
        ("CDI device ", Field::CdiDevices),
        ("hugepage limit ", Field::HugepageLimits),
        ("unified ", Field::CgroupsUnified),
        ("rlimit ", Field::Rlimits),
        ("namespace ", Field::Namespace),
        ("sysctl ", Field::Sysctl),
    ];
    let simple = [
        ("args", Field::Args),
        ("cgroups path", Field::CgroupsPath),
        ("oom_score_adj", Field::OomScoreAdj),
        ("io_priority", Field::IoPriority),
        ("seccomp policy", Field::SeccompPolicy),
        ("scheduler", Field::LinuxSched),
        ("memory policy", Field::MemoryPolicy),
        ("cpu.shares", Field::CpuShares),
        ("cpu.quota", Field::CpuQuota),
        ("cpu.period", Field::CpuPeriod),
        ("cpu.cpus", Field::CpuSetCpUs),
        ("cpu.mems", Field::CpuSetMems),
        ("memory.limit", Field::MemLimit),
        ("memory.reservation", Field::MemReservation),
        ("memory.swap", Field::MemSwapLimit),
        ("memory.swappiness", Field::MemSwappiness),
        ("pids", Field::PidsLimit),
    ];
    let mut fields = FieldOwners::default();
    for (field, plugin) in owners {
        let part = compound
            .iter()
            .find_map(|(prefix, number)| Some((*number, field.strip_prefix(prefix)?)));
        if let Some((number, key)) = part {
            let into: &mut CompoundFieldOwners = fields.compound.entry(number.into()).or_default();
            into.owners.insert(key.to_owned(), plugin.clone());
        } else if let Some((_, number)) = simple.iter().find(|(name, _)| name == field) {
            fields.simple.insert((*number).into(), plugin.clone());
        }
    }
    OwningPlugins { owners: BTreeMap::from([(id.to_owned(), fields)]) }
}

/// The message of an error and those of its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(&format!(": {cause}"));
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
