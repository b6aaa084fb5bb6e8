//! NRI plugins: what they are told of pods and containers, and what is done at their wish.
//!
//! A plugin's refusal fails what it was asked about before it was done (run, create, start,
//! update); about what has been done (stop, remove, post-…) it can only complain. Limits that a
//! plugin changes take the way of a client's request: [`replan`] turns them into one.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use pinion_cri_proto::v1::{self, LinuxContainerResources};
use pinion_nri::api::{
    self, ContainerUpdate, LinuxCpu, LinuxMemory, LinuxResources, OptionalInt64, OptionalUInt64,
};
use pinion_nri::{Creation, Merged, Plugins, Refused, State};
use serde_json::Value;
use tokio::net::UnixListener;

use crate::error::{Context, Error, Kind, Result};
use crate::info;
use crate::node::Node;
use crate::pod::{self, Command};
use crate::record::{Container, Phase, Sandbox};

/// Starts plugins and lets others connect, if the configuration wants that.
pub(crate) async fn start(node: &Arc<Node>) -> Result<()> {
    let config = &node.config.nri;
    if !config.enabled {
        return Ok(());
    }
    let state = NodeState(Arc::downgrade(node));
    let plugins = Plugins::new(
        pinion_nri::Config {
            plugin_dir: config.plugin_dir.clone(),
            plugin_config_dir: config.plugin_config_dir.clone(),
            registration_timeout: Duration::from_millis(config.registration_timeout_ms),
            request_timeout: Duration::from_millis(config.request_timeout_ms),
            required: config.required_plugins.clone(),
        },
        Arc::new(state),
    );
    // Never set before.
    let _ = node.nri.set(plugins.clone());
    let what = || format!("look for NRI plugins in {}", config.plugin_dir.display());
    if let Err(error) = plugins.launch().await.context(what) {
        node.find(error.chain());
    }
    if !config.socket.as_os_str().is_empty() {
        match listen(&config.socket) {
            Ok(listener) => drop(tokio::spawn(plugins.accept(listener))),
            // Required plugins are then missing, and nothing is made without them.
            Err(error) => node.find(format!("NRI plugins cannot connect: {}", error.chain())),
        }
    }
    Ok(())
}

/// Binds the socket, unless another server has it.
fn listen(path: &Path) -> Result<UnixListener> {
    let what = || format!("listen on {}", path.display());
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        let message = format!("{} belongs to another server that runs", path.display());
        return Err(Error::new(Kind::Unavailable, message));
    }
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(parent).context(what)?;
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).context(what),
        _ => {}
    }
    let listener = UnixListener::bind(path).context(what)?;
    // A plugin may change what runs as root.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).context(what)?;
    Ok(listener)
}

fn plugins(node: &Node) -> Option<&Arc<Plugins>> {
    node.nri.get()
}

fn refused(refused: Refused) -> Error {
    let kind = match refused {
        Refused::Conflict(_) | Refused::Missing(_) | Refused::Rejected { .. } => Kind::Precondition,
        Refused::Plugin { .. } => Kind::Refused,
    };
    Error::from_foreign(kind, refused)
}

/// To be held until what is being made is listed.
pub(crate) async fn creation(node: &Node) -> Option<Creation> {
    match plugins(node) {
        Some(plugins) => Some(plugins.creation().await),
        None => None,
    }
}

/// A pod is complete but not ready yet.
pub(crate) async fn run_pod(node: &Node, sandbox: &Sandbox) -> Result<()> {
    let Some(plugins) = plugins(node) else { return Ok(()) };
    plugins.run_pod(&describe_pod(node, sandbox)).await.map_err(refused)
}

/// A pod's containers have ended.
pub(crate) async fn stop_pod(node: &Node, sandbox: &Sandbox) {
    if let Some(plugins) = plugins(node) {
        complain(sandbox, plugins.stop_pod(&describe_pod(node, sandbox)).await);
    }
}

/// A pod is gone.
pub(crate) async fn remove_pod(node: &Node, sandbox: &Sandbox) {
    if let Some(plugins) = plugins(node) {
        complain(sandbox, plugins.remove_pod(&describe_pod(node, sandbox)).await);
    }
}

/// A pod's limits are to change.
pub(crate) async fn update_pod(
    node: &Node,
    sandbox: &Sandbox,
    overhead: Option<&LinuxContainerResources>,
    resources: Option<&LinuxContainerResources>,
) -> Result<()> {
    let Some(plugins) = plugins(node) else { return Ok(()) };
    let pod = describe_pod(node, sandbox);
    let (overhead, resources) = (overhead.map(limits), resources.map(limits));
    plugins.update_pod(&pod, overhead, resources).await.map_err(refused)
}

/// A pod's limits have changed.
pub(crate) async fn post_update_pod(node: &Node, sandbox: &Sandbox) {
    if let Some(plugins) = plugins(node) {
        complain(sandbox, plugins.post_update_pod(&describe_pod(node, sandbox)).await);
    }
}

/// A container is to be made with this configuration; what plugins ask for, `None` without any.
pub(crate) async fn create_container(
    node: &Arc<Node>,
    sandbox: &Sandbox,
    container: &Container,
    config: &Value,
) -> Result<Option<Merged>> {
    let Some(plugins) = plugins(node) else { return Ok(None) };
    let pod = describe_pod(node, sandbox);
    let described = describe(node, container, Some(config));
    let asked = plugins.create(&pod, &described).await.map_err(refused)?;
    change_others(node, &asked);
    Ok(Some(asked))
}

/// A container has been made.
pub(crate) async fn post_create(node: &Node, sandbox: &Sandbox, container: &Container) {
    if let Some(plugins) = plugins(node) {
        let (pod, container) = (describe_pod(node, sandbox), describe(node, container, None));
        complain(sandbox, plugins.post_create(&pod, &container).await);
    }
}

/// A container is to be started.
pub(crate) async fn start_container(
    node: &Node,
    sandbox: &Sandbox,
    container: &Container,
) -> Result<()> {
    let Some(plugins) = plugins(node) else { return Ok(()) };
    let (pod, container) = (describe_pod(node, sandbox), describe(node, container, None));
    plugins.start(&pod, &container).await.map_err(refused)
}

/// A container runs.
pub(crate) async fn post_start(node: &Node, sandbox: &Sandbox, container: &Container) {
    if let Some(plugins) = plugins(node) {
        let (pod, container) = (describe_pod(node, sandbox), describe(node, container, None));
        complain(sandbox, plugins.post_start(&pod, &container).await);
    }
}

/// A container's limits are to change; the change with what plugins want of it.
pub(crate) async fn update(
    node: &Arc<Node>,
    sandbox: &Sandbox,
    container: &Container,
    change: &LinuxContainerResources,
) -> Result<Box<LinuxContainerResources>> {
    let Some(plugins) = plugins(node) else { return Ok(Box::new(change.clone())) };
    let (pod, described) = (describe_pod(node, sandbox), describe(node, container, None));
    let mut asked = plugins.update(&pod, &described, &limits(change)).await.map_err(refused)?;
    let mut change = change.clone();
    // What is asked about this very container is part of the change.
    asked.updates.retain(|update| {
        let own = update.container_id == container.id;
        if own && let Some(wanted) = resources_of(update) {
            lay_over(&mut change, wanted);
        }
        !own
    });
    change_others(node, &asked);
    Ok(Box::new(change))
}

/// A container's limits have changed.
pub(crate) async fn post_update(node: &Node, sandbox: &Sandbox, container: &Container) {
    if let Some(plugins) = plugins(node) {
        let (pod, container) = (describe_pod(node, sandbox), describe(node, container, None));
        complain(sandbox, plugins.post_update(&pod, &container).await);
    }
}

/// A container has ended.
pub(crate) async fn stop_container(node: &Arc<Node>, sandbox: &Sandbox, container: &Container) {
    let Some(plugins) = plugins(node) else { return };
    let (pod, container) = (describe_pod(node, sandbox), describe(node, container, None));
    match plugins.stop(&pod, &container).await {
        Ok(asked) => change_others(node, &asked),
        Err(error) => complain(sandbox, Err(error)),
    }
}

/// A container is gone.
pub(crate) async fn remove_container(node: &Node, sandbox: &Sandbox, container: &Container) {
    if let Some(plugins) = plugins(node) {
        let (pod, container) = (describe_pod(node, sandbox), describe(node, container, None));
        complain(sandbox, plugins.remove(&pod, &container).await);
    }
}

fn complain(sandbox: &Sandbox, result: Result<(), Refused>) {
    if let Err(error) = result {
        let error = refused(error).chain();
        tracing::warn!(pod = sandbox.id, error, "an NRI plugin complains");
    }
}

/// Does what plugins ask for about other containers, without holding up what they were asked
/// about.
fn change_others(node: &Arc<Node>, asked: &Merged) {
    if asked.updates.is_empty() && asked.evictions.is_empty() {
        return;
    }
    let state = NodeState(Arc::downgrade(node));
    let (updates, evictions) = (asked.updates.clone(), asked.evictions.clone());
    tokio::spawn(async move { state.update(updates, evictions).await });
}

/// The client's configuration with the limits and CDI devices that plugins want; `None` if they
/// want none.
pub(crate) fn replan(config: &v1::ContainerConfig, asked: &Merged) -> Option<v1::ContainerConfig> {
    let resources = asked.adjust.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    let mut replanned = config.clone();
    if let Some(wanted) = resources {
        let linux = replanned.linux.get_or_insert_default();
        lay_over(linux.resources.get_or_insert_default(), wanted);
    }
    for device in &asked.adjust.cdi_devices {
        match device.name.strip_prefix('-') {
            Some(removed) => replanned.cdi_devices.retain(|d| d.name != removed),
            None => replanned.cdi_devices.push(v1::CdiDevice { name: device.name.clone() }),
        }
    }
    (replanned != *config).then_some(replanned)
}

/// The rest of what plugins ask for, in the OCI configuration.
pub(crate) fn apply(
    node: &Node,
    sandbox: &Sandbox,
    planned: &mut Container,
    config: &mut Value,
    asked: &Merged,
) -> Result<()> {
    pinion_nri::spec::apply(config, &asked.adjust)
        .map_err(|unfit| Error::from_foreign(Kind::Precondition, unfit))?;
    let path = asked.adjust.linux.as_ref().map_or("", |linux| linux.cgroups_path.as_str());
    if !path.is_empty() {
        check_cgroups_path(node, sandbox, path)?;
        planned.cgroups_path = path.to_owned();
        if let Some(place) = config.pointer_mut("/linux/cgroupsPath") {
            *place = Value::from(path);
        }
    }
    Ok(())
}

/// A container stays in the cgroup of its pod, whatever a plugin asks for.
fn check_cgroups_path(node: &Node, sandbox: &Sandbox, path: &str) -> Result<()> {
    let refuse = |reason: String| Err(Error::precondition(format!("cgroups path: {reason}")));
    let parent = sandbox.cgroup_parent.trim_end_matches('/');
    let inside = match node.cgroups.spec_driver() {
        pinion_spec::CgroupDriver::Cgroupfs => path
            .strip_prefix(parent)
            .and_then(|rest| rest.strip_prefix('/'))
            .is_some_and(|rest| !rest.is_empty() && rest.split('/').all(plain)),
        pinion_spec::CgroupDriver::Systemd => path
            .strip_prefix(parent)
            .and_then(|rest| rest.strip_prefix(':'))
            .is_some_and(|rest| rest.split(':').count() == 2 && rest.split(':').all(plain)),
    };
    match inside {
        true => Ok(()),
        false => refuse(format!("{path:?} is not below the pod's {parent:?}")),
    }
}

fn plain(part: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !part.is_empty() && part != "." && part != ".." && part.chars().all(good)
}

/// A pod in NRI's words.
fn describe_pod(node: &Node, sandbox: &Sandbox) -> api::PodSandbox {
    let metadata = sandbox.metadata();
    let linux = sandbox.config.linux.clone().unwrap_or_default();
    let lent = pod::lend(node, sandbox).namespaces;
    let namespaces = [
        ("network", lent.net),
        ("ipc", lent.ipc),
        ("uts", lent.uts),
        ("pid", lent.pid),
        ("user", lent.user),
    ];
    api::PodSandbox {
        id: sandbox.id.clone(),
        name: metadata.name,
        uid: metadata.uid,
        namespace: metadata.namespace,
        labels: sorted(&sandbox.config.labels),
        annotations: sorted(&sandbox.config.annotations),
        runtime_handler: sandbox.handler.clone(),
        linux: Some(api::LinuxPodSandbox {
            pod_overhead: linux.overhead.as_ref().map(limits),
            pod_resources: linux.resources.as_ref().map(limits),
            cgroup_parent: sandbox.cgroup_parent.clone(),
            namespaces: namespaces
                .into_iter()
                .filter_map(|(kind, path)| {
                    let path = path?.to_string_lossy().into_owned();
                    Some(api::LinuxNamespace { r#type: kind.into(), path })
                })
                .collect(),
            ..Default::default()
        }),
        // There is no process that stands for a pod.
        pid: 0,
        ips: sandbox.ips.clone(),
    }
}

/// A container in NRI's words; `config` is its OCI configuration, else it is read.
fn describe(node: &Node, container: &Container, config: Option<&Value>) -> api::Container {
    let exit = container.exit.clone().unwrap_or_default();
    let image = container.config.image.clone().unwrap_or_default();
    let mut described = api::Container {
        id: container.id.clone(),
        pod_sandbox_id: container.pod.clone(),
        name: container.name().to_owned(),
        state: match container.phase() {
            Phase::Created => api::ContainerState::ContainerCreated,
            Phase::Running => api::ContainerState::ContainerRunning,
            Phase::Exited => api::ContainerState::ContainerStopped,
        }
        .into(),
        labels: sorted(&container.config.labels),
        annotations: sorted(&container.config.annotations),
        pid: info::pid(node, container).and_then(|pid| pid.try_into().ok()).unwrap_or(0),
        created_at: container.created_at,
        started_at: container.started_at,
        finished_at: exit.finished_at,
        exit_code: exit.code,
        status_reason: container.exit.as_ref().map(|e| e.reason().into()).unwrap_or_default(),
        status_message: exit.message,
        cdi_devices: container
            .config
            .cdi_devices
            .iter()
            .map(|device| api::CdiDevice { name: device.name.clone() })
            .collect(),
        image: Some(api::Image {
            name: match image.user_specified_image.is_empty() {
                true => image.image,
                false => image.user_specified_image,
            },
            config_digest: container.image_id.clone(),
            ..Default::default()
        }),
        ..Default::default()
    };
    match config {
        Some(config) => pinion_nri::spec::describe(config, &mut described),
        None => {
            let file = node.paths.pod(&container.pod).container(&container.id).config();
            let read = fs::read(file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
            // One that is being removed has none any more.
            if let Some(config) = read {
                pinion_nri::spec::describe(&config, &mut described);
            }
        }
    }
    if let Some(linux) = &mut described.linux {
        linux.resources = Some(limits(&container.resources));
    }
    described
}

fn sorted(map: &HashMap<String, String>) -> std::collections::BTreeMap<String, String> {
    map.clone().into_iter().collect()
}

/// CRI's limits in NRI's words; what is zero or empty there is not set.
fn limits(cri: &LinuxContainerResources) -> LinuxResources {
    let signed = |value: i64| (value != 0).then_some(OptionalInt64 { value });
    let unsigned = |value: i64| {
        u64::try_from(value).ok().filter(|v| *v != 0).map(|value| OptionalUInt64 { value })
    };
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: signed(cri.memory_limit_in_bytes),
            swap: signed(cri.memory_swap_limit_in_bytes),
            ..Default::default()
        }),
        cpu: Some(LinuxCpu {
            shares: unsigned(cri.cpu_shares),
            quota: signed(cri.cpu_quota),
            period: unsigned(cri.cpu_period),
            cpus: cri.cpuset_cpus.clone(),
            mems: cri.cpuset_mems.clone(),
            ..Default::default()
        }),
        hugepage_limits: cri
            .hugepage_limits
            .iter()
            .map(|l| api::HugepageLimit { page_size: l.page_size.clone(), limit: l.limit })
            .collect(),
        unified: sorted(&cri.unified),
        ..Default::default()
    }
}

/// Lays what a plugin wants over a client's limits.
fn lay_over(cri: &mut LinuxContainerResources, wanted: &LinuxResources) {
    let fits = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    if let Some(memory) = &wanted.memory {
        let set = |into: &mut i64, from: &Option<OptionalInt64>| {
            if let Some(from) = from {
                *into = from.value;
            }
        };
        set(&mut cri.memory_limit_in_bytes, &memory.limit);
        set(&mut cri.memory_swap_limit_in_bytes, &memory.swap);
    }
    if let Some(cpu) = &wanted.cpu {
        if let Some(shares) = &cpu.shares {
            cri.cpu_shares = fits(shares.value);
        }
        if let Some(quota) = &cpu.quota {
            cri.cpu_quota = quota.value;
        }
        if let Some(period) = &cpu.period {
            cri.cpu_period = fits(period.value);
        }
        for (into, from) in [(&mut cri.cpuset_cpus, &cpu.cpus), (&mut cri.cpuset_mems, &cpu.mems)] {
            if !from.is_empty() {
                into.clone_from(from);
            }
        }
    }
    for limit in &wanted.hugepage_limits {
        cri.hugepage_limits.retain(|other| other.page_size != limit.page_size);
        let (page_size, limit) = (limit.page_size.clone(), limit.limit);
        cri.hugepage_limits.push(v1::HugepageLimit { page_size, limit });
    }
    for (key, value) in &wanted.unified {
        match key.strip_prefix('-') {
            Some(removed) => drop(cri.unified.remove(removed)),
            None => drop(cri.unified.insert(key.clone(), value.clone())),
        }
    }
}

fn resources_of(update: &ContainerUpdate) -> Option<&LinuxResources> {
    update.linux.as_ref()?.resources.as_ref()
}

/// The node as plugins ask about it.
struct NodeState(Weak<Node>);

impl State for NodeState {
    fn all(&self) -> (Vec<api::PodSandbox>, Vec<api::Container>) {
        let Some(node) = self.0.upgrade() else { return Default::default() };
        let snapshot = node.registry.snapshot();
        let pods = snapshot.pods().map(|pod| describe_pod(&node, &pod.sandbox)).collect();
        let containers = snapshot.containers().map(|(_, c)| describe(&node, c, None)).collect();
        (pods, containers)
    }

    fn update(
        &self,
        updates: Vec<ContainerUpdate>,
        evictions: Vec<(String, String)>,
    ) -> BoxFuture<'static, Vec<ContainerUpdate>> {
        let node = self.0.upgrade();
        async move {
            let Some(node) = node else { return updates };
            let mut failed = Vec::new();
            for update in updates {
                if let Err(error) = update_one(&node, &update).await {
                    let (id, error) = (&update.container_id, error.chain());
                    tracing::warn!(container = id, error, "not changed as an NRI plugin asks");
                    if !update.ignore_failure {
                        failed.push(update);
                    }
                }
            }
            for (id, reason) in evictions {
                tracing::warn!(container = id, reason, "an NRI plugin has a container ended");
                if let Err(error) = evict(&node, &id).await {
                    tracing::warn!(container = id, error = error.chain(), "not ended");
                }
            }
            failed
        }
        .boxed()
    }
}

async fn update_one(node: &Node, update: &ContainerUpdate) -> Result<()> {
    let Some(wanted) = resources_of(update) else { return Ok(()) };
    let mut resources = LinuxContainerResources::default();
    lay_over(&mut resources, wanted);
    let (commands, container) = owner(node, &update.container_id)?;
    let resources = Box::new(resources);
    // Plugins are not asked about what one of them asks for.
    pod::ask(&commands, |reply| Command::Update { container, resources, told: true, reply }).await
}

async fn evict(node: &Node, id: &str) -> Result<()> {
    let (commands, container) = owner(node, id)?;
    let grace = Duration::ZERO;
    pod::ask(&commands, |reply| Command::Stop { container, grace, reply }).await
}

fn owner(node: &Node, id: &str) -> Result<(tokio::sync::mpsc::Sender<Command>, String)> {
    let snapshot = node.registry.snapshot();
    let (pod, container) = snapshot.container(id)?;
    Ok((pod.commands.clone(), container.id.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_go_there_and_back() {
        let cri = LinuxContainerResources {
            cpu_shares: 512,
            cpu_quota: -1,
            cpu_period: 100_000,
            memory_limit_in_bytes: 1 << 20,
            cpuset_cpus: "2-3".into(),
            hugepage_limits: vec![v1::HugepageLimit { page_size: "2MB".into(), limit: 4 }],
            unified: [("memory.high".to_owned(), "5".to_owned())].into(),
            ..Default::default()
        };
        let mut back = LinuxContainerResources::default();
        lay_over(&mut back, &limits(&cri));
        assert_eq!(back, cri);
    }

    #[test]
    fn a_plan_is_made_anew_only_for_what_concerns_it() {
        let config = v1::ContainerConfig::default();
        assert_eq!(replan(&config, &Merged::default()), None);
        let mut asked = Merged::default();
        asked.adjust.cdi_devices = vec![api::CdiDevice { name: "v/c=d".into() }];
        assert_eq!(replan(&config, &asked).unwrap().cdi_devices[0].name, "v/c=d");
        let mut asked = Merged::default();
        let cpu = LinuxCpu { cpus: "1".into(), ..Default::default() };
        asked.adjust.linux.get_or_insert_default().resources =
            Some(LinuxResources { cpu: Some(cpu), ..Default::default() });
        let linux = replan(&config, &asked).unwrap().linux.unwrap();
        assert_eq!(linux.resources.unwrap().cpuset_cpus, "1");
    }

    #[test]
    fn parts_of_cgroup_paths_are_plain() {
        for bad in ["", ".", "..", "a/b", "a b", "a:b"] {
            assert!(!plain(bad), "{bad:?}");
        }
        assert!(plain("cri-pinion-1.scope"));
    }
}
