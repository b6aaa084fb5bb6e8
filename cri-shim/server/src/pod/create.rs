//! CreateContainer: from a configuration to a container whose process waits for its start.
//!
//! image → contract (hugepages in the ledger, with the intent) → root filesystem → OCI
//! configuration → monitor. Everything it may hold is committed with the intent, so a crash
//! or an error at any step gives all of it back.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pinion_cri_proto::v1::{self, NamespaceMode};
use pinion_image::Images;
use pinion_monitor_proto::message;
use pinion_spec::{Accounts, Built, HostPaths, Inputs, Kind as SpecKind, Settings, SpecError};

use super::operations::{Context, Failed};
use super::{release, users, volumes};
use crate::annotations::Wishes;
use crate::contract::devices::{self, Devices};
use crate::contract::{self, Decision, cpus, hugepages};
use crate::error::{Context as _, Error, Kind, Result};
use crate::ids;
use crate::images::Foreign as _;
use crate::intent::{self, CREATE_CONTAINER};
use crate::nri;
use crate::paths::ContainerDirectory;
use crate::record::{CONTAINERS, Container, Exit, Holding, Phase, Sandbox};
use crate::services::blocking;
use crate::vm;
use crate::wire::Wire;

/// Largest `/etc/passwd` or `/etc/group` of an image that is read.
const ACCOUNTS_LIMIT: u64 = 1 << 20;

/// The spec builder's refusals as ours.
pub(crate) fn spec_error(error: SpecError) -> Error {
    let kind = match error.kind {
        SpecKind::Invalid => Kind::Invalid,
        SpecKind::Unavailable => Kind::Precondition,
    };
    Error::from_foreign(kind, error)
}

/// Creates a container; on failure everything is given back.
pub(crate) async fn create(
    context: &Context,
    id: &str,
    config: &v1::ContainerConfig,
) -> Result<Container, Failed> {
    let early = |error| Failed { error, left: None };
    let ((planned, decision, devices), (intent, grants)) =
        commit(context, id, config).await.map_err(|error| {
            context.node.devices.unclaim(id);
            context.node.cpus.release(id);
            early(error)
        })?;
    let mut planned = steer(planned, &grants);
    if planned.config.0 != *config {
        planned.request = Some(Wire(config.clone()));
    }
    let decision = decision.with_grants(&grants);
    let outcome = match steps(context, &planned, &decision, devices).await {
        Ok(created) => {
            let (record, intent) = (created.clone(), intent.clone());
            let written = context.node.write(move |tx| {
                tx.put(CONTAINERS, &record.id, &record)?;
                tx.finish_intent(&intent)
            });
            written.await.map(|()| created)
        }
        Err(error) => Err(error),
    };
    match outcome {
        Ok(created) => Ok(created),
        Err(error) => Err(undo(context, planned, intent, error).await),
    }
}

/// Plans the container, claims what is the node's to give, and commits the intent.
async fn commit(
    context: &Context,
    id: &str,
    config: &v1::ContainerConfig,
) -> Result<((Container, Decision, Devices), (String, Vec<pinion_placement::Grant>))> {
    let (config, chosen) = cpus::choose(&context.node, &context.sandbox, id, config).await?;
    let (mut planned, decision, devices) = plan(context, id, &config).await?;
    // Given back last, when nothing runs on them any more.
    planned.holdings.splice(0..0, chosen);
    context.node.devices.claim(id, &devices.bindings)?;
    let reserved = reserve(context, &planned, &decision).await?;
    Ok(((planned, decision, devices), reserved))
}

/// Finds the image, decides the contract, and names all that the container will hold.
async fn plan(
    context: &Context,
    id: &str,
    config: &v1::ContainerConfig,
) -> Result<(Container, Decision, Devices)> {
    context.monitor()?;
    let sandbox = &context.sandbox;
    let log_path = log_path(sandbox, config)?;
    let name = config.image.as_ref().map(|i| i.image.clone()).unwrap_or_default();
    let missing = || Error::not_found(format!("image {name:?} is not on this node; pull it first"));
    let image = context.node.images.resolve(&name).ok_or_else(missing)?;
    let decision = contract::decide(&context.node, sandbox, id, config).await?;
    let devices = devices::plan(&context.node, sandbox, id, config, &decision.contract).await?;
    let container = id.to_string();
    let mut holdings = vec![Holding::ContainerDirectory { container: container.clone() }];
    // NRI plugins may ask for more later.
    let more = context.node.nri.get().is_some();
    if more || !decision.demands.is_empty() {
        holdings.push(Holding::Hugepages { container: container.clone() });
    }
    if more || !decision.contract.loans().is_empty() {
        holdings.push(Holding::Settings { container: container.clone() });
    }
    holdings.push(Holding::Rootfs { container: container.clone() });
    holdings.extend(devices.holding(id));
    let image_volumes = volumes::find(&context.node, config)?;
    holdings.extend(
        image_volumes.iter().map(|volume| Holding::ImageVolume {
            container: container.clone(),
            mount: volume.mount,
        }),
    );
    holdings.push(Holding::RuntimeContainer { container: container.clone() });
    let resources = config.linux.as_ref().and_then(|l| l.resources.clone()).unwrap_or_default();
    let record = Container {
        id: container,
        pod: sandbox.id.clone(),
        config: Wire(config.clone()),
        image_id: image.id,
        created_at: ids::now(),
        log_path,
        resources: Wire(resources),
        cgroups_path: pinion_spec::cgroups_path(
            context.node.cgroups.spec_driver(),
            &sandbox.cgroup_parent,
            id,
        )
        .map_err(spec_error)?,
        image_volumes,
        contract: decision.contract.clone(),
        holdings,
        ..Default::default()
    };
    Ok((record, decision, devices))
}

/// Binds a container that named no memory nodes to those its hugepages were granted on: the
/// kernel's own choice would be any node, and the pages there may be promised to others.
fn steer(mut planned: Container, grants: &[pinion_placement::Grant]) -> Container {
    if grants.is_empty() || !planned.contract.mems.is_empty() {
        return planned;
    }
    let nodes: std::collections::BTreeSet<String> =
        grants.iter().map(|grant| grant.node.to_string()).collect();
    let list = nodes.into_iter().collect::<Vec<_>>().join(",");
    if let (Ok(mems), Some(linux)) = (list.parse(), &mut planned.config.0.linux) {
        let resources = linux.resources.get_or_insert_default();
        resources.cpuset_mems.clone_from(&list);
        planned.resources.0.cpuset_mems = list;
        planned.contract.mems = mems;
    }
    planned
}

/// Where the container's log goes: below the pod's log directory, whatever the request says.
fn log_path(sandbox: &Sandbox, config: &v1::ContainerConfig) -> Result<PathBuf> {
    let (directory, file) = (&sandbox.config.log_directory, &config.log_path);
    if directory.is_empty() || file.is_empty() {
        return Ok(PathBuf::new());
    }
    let plain = |part| matches!(part, std::path::Component::Normal(_));
    if !Path::new(directory).is_absolute() || !Path::new(file).components().all(plain) {
        return Err(Error::invalid(format!(
            "log_path {file:?} is not a path below the pod's log directory {directory:?}"
        )));
    }
    Ok(Path::new(directory).join(file))
}

/// Commits the intent and, in the same transaction, the hugepages it reserves.
async fn reserve(
    context: &Context,
    planned: &Container,
    decision: &Decision,
) -> Result<(String, Vec<pinion_placement::Grant>)> {
    let step = intent::step(planned)?;
    let id = planned.id.clone();
    let target = context.node.paths.pod(&planned.pod).container(&id).rootfs();
    let claim = context.node.images.claim_rootfs(&id, &planned.image_id, &target).image_error()?;
    hugepages::reserve(&context.node, &planned.id, &planned.cgroups_path, decision, move |tx| {
        let intent = tx.begin_intent(CREATE_CONTAINER, &id)?;
        tx.append_step(&intent.id, step)?;
        claim.commit(tx)?;
        // Its lease is to outlive the transaction.
        Ok((intent.id, claim))
    })
    .await
    .map(|((intent, _claim), grants)| (intent, grants))
}

async fn undo(context: &Context, planned: Container, intent: String, error: Error) -> Failed {
    let (left, result) = release::all(&context.release(), planned.holdings.clone(), |_| true).await;
    if let Err(undo) = result {
        tracing::error!(container = planned.id, error = %undo.chain(), "undo failed, the container stays");
        let mut remains = Container { holdings: left, ..planned };
        remains.end(Exit {
            code: 128,
            finished_at: ids::now(),
            reason: Some("CreateFailed".into()),
            message: error.chain(),
            ..Exit::default()
        });
        let record = remains.clone();
        let written = context.node.write(move |tx| {
            tx.put(CONTAINERS, &record.id, &record)?;
            tx.finish_intent(&intent)
        });
        if let Err(error) = written.await {
            tracing::error!(container = remains.id, error = %error.chain(), "undo not stored");
        }
        return Failed { error, left: Some(Box::new(remains)) };
    }
    let id = planned.id.clone();
    let written = context.node.write(move |tx| {
        Images::forget_rootfs(tx, &id)?;
        tx.finish_intent(&intent)
    });
    let written = written.await;
    context.node.empty_trash();
    if let Err(error) = written {
        // The intent is still there: the next start undoes it once more.
        tracing::error!(container = planned.id, error = %error.chain(), "undo not stored");
    }
    Failed { error, left: None }
}

async fn steps(
    context: &Context,
    planned: &Container,
    decision: &Decision,
    devices: Devices,
) -> Result<Container> {
    let devices = Arc::new(devices);
    let (worker, record, asked) = (context.clone(), planned.clone(), decision.clone());
    let taken = devices.clone();
    let (built, volumes) = blocking(move || prepare(&worker, &record, &asked, &taken)).await?;
    let Finished { built, nodes, planned, config } =
        finish(context, Finished::as_planned(built, planned)?, volumes, devices).await?;
    let planned = &planned;
    let (node, pod) = (&context.node, &context.sandbox.id);
    // Last, so that what plugins mount is carried into the guest like the rest.
    let (config, shares) = match &context.sandbox.guest {
        None => (config, Vec::new()),
        Some(_) => {
            let id = planned.id.clone();
            blocking(move || vm::adapt_config(config, &id)).await?
        }
    };
    write_config(&node.paths.pod(pod).container(&planned.id), &config)?;
    for warning in &built.warnings {
        tracing::warn!(container = planned.id, warning, "not as asked");
    }
    let created = Container {
        user: Wire(v1::LinuxContainerUser {
            uid: built.user.uid.into(),
            gid: built.user.gid.into(),
            supplemental_groups: built.user.groups.iter().map(|g| i64::from(*g)).collect(),
        }),
        stop_signal: built.stop_signal,
        contract: contract::Contract { devices: nodes, ..planned.contract.clone() },
        ..planned.clone()
    };
    let directory = node.paths.pod(pod).container(&created.id);
    let disk = match &context.sandbox.guest {
        None => String::new(),
        Some(_) => {
            let (worker, image) = (node.clone(), created.image_id.clone());
            let rootfs = directory.rootfs();
            let disk = blocking(move || vm::ensure_disk(&worker, &image, &rootfs)).await?;
            disk.to_string_lossy().into_owned()
        }
    };
    let directory = directory.path().to_string_lossy().into_owned();
    let paths = node.cgroups.container_paths(&created.cgroups_path, &created.id)?;
    contract::settings::lease(node, &created.id, created.contract.loans()).await?;
    let text =
        |path: Option<&PathBuf>| path.map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
    let v2 = node.cgroups.is_v2();
    context
        .monitor()?
        .create(message::Create {
            id: created.id.clone(),
            bundle: directory.clone(),
            directory,
            log_path: created.log_path.to_string_lossy().into_owned(),
            terminal: created.config.tty,
            stdin: created.config.stdin,
            stdin_once: created.config.stdin_once,
            max_log_line: node.config.runtime.max_log_line,
            cgroup: if v2 { text(paths.unified.as_ref()) } else { String::new() },
            memory_cgroup: if v2 { String::new() } else { text(paths.v1.get("memory")) },
            disk,
            shares,
        })
        .await?;
    nri::post_create(node, &context.sandbox, &created).await;
    Ok(created)
}

/// A configuration, and the device nodes in it.
type Assembled = (Built, Vec<pinion_device::Demand>);

/// A container whose OCI configuration is complete.
struct Finished {
    built: Built,
    /// The device nodes it has.
    nodes: Vec<pinion_device::Demand>,
    planned: Container,
    /// `config.json`.
    config: serde_json::Value,
}

impl Finished {
    fn as_planned((built, nodes): Assembled, planned: &Container) -> Result<Self> {
        let config = serde_json::to_value(&built.spec)
            .context(|| format!("encode the configuration of {}", planned.id))?;
        Ok(Self { built, nodes, planned: planned.clone(), config })
    }
}

/// Lets plugins adjust the container. What concerns CPUs, memory and hugepages goes through
/// the same decision and ledger as a client's request, and the configuration is built anew.
async fn finish(
    context: &Context,
    mut finished: Finished,
    volumes: BTreeMap<String, PathBuf>,
    devices: Arc<Devices>,
) -> Result<Finished> {
    let node = &context.node;
    let Some(asked) =
        nri::create_container(node, &context.sandbox, &finished.planned, &finished.config).await?
    else {
        return Ok(finished);
    };
    if let Some(config) = nri::replan(&finished.planned.config, &asked) {
        let original = finished.planned.config.clone();
        let id = finished.planned.id.clone();
        let decision = contract::decide(node, &context.sandbox, &id, &config).await?;
        hugepages::release(node, &id).await?;
        let path = &finished.planned.cgroups_path;
        let ((), grants) = hugepages::reserve(node, &id, path, &decision, |_| Ok(())).await?;
        let resources = config.linux.as_ref().and_then(|l| l.resources.clone());
        let planned = Container {
            resources: Wire(resources.unwrap_or_default()),
            config: Wire(config),
            contract: decision.contract.clone(),
            ..finished.planned
        };
        let planned = steer(planned, &grants);
        let decision = decision.with_grants(&grants);
        let (worker, record) = (context.clone(), planned.clone());
        let built = blocking(move || {
            let rootfs = worker.node.paths.pod(&record.pod).container(&record.id).rootfs();
            let config = devices.extend(&record.config);
            build(&worker, &record, &decision, (&config, &devices), &rootfs, volumes)
        })
        .await?;
        finished = Finished::as_planned(built, &planned)?;
        // What the client asked for is what a retry is compared with.
        finished.planned.config = original;
    }
    nri::apply(node, &context.sandbox, &mut finished.planned, &mut finished.config, &asked)?;
    Ok(finished)
}

/// Directory, root filesystem, volumes, devices, and the configuration to be. Blocks.
fn prepare(
    context: &Context,
    record: &Container,
    decision: &Decision,
    devices: &Devices,
) -> Result<(Assembled, BTreeMap<String, PathBuf>)> {
    let node = &context.node;
    let directory = node.paths.pod(&context.sandbox.id).container(&record.id);
    let rootfs = directory.rootfs();
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&rootfs)
        .context(|| format!("create {}", rootfs.display()))?;
    if let Some(parent) = record.log_path.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs::create_dir_all(parent).context(|| format!("create {}", parent.display()))?;
    }
    match users::id_map(node, &context.sandbox) {
        None => node.images.prepare_rootfs(&record.id, &record.image_id, &rootfs),
        Some(ids) => node.images.prepare_mapped_rootfs(&record.id, &record.image_id, &rootfs, &ids),
    }
    .image_error()?;
    let volumes = volumes::mount(node, &context.sandbox, record)?;
    devices.bind()?;
    let config = devices.extend(&record.config);
    let built = build(context, record, decision, (&config, devices), &rootfs, volumes.clone())?;
    for source in &built.0.missing_sources {
        fs::create_dir_all(source).context(|| format!("create {}", source.display()))?;
    }
    Ok((built, volumes))
}

fn build(
    context: &Context,
    record: &Container,
    decision: &Decision,
    (config, devices): (&v1::ContainerConfig, &Devices),
    rootfs: &Path,
    volumes: BTreeMap<String, PathBuf>,
) -> Result<Assembled> {
    let node = &context.node;
    let sandbox = context.sandbox.config_in_force();
    let image = node.images.config(&record.image_id).image_error()?;
    let mut paths = HostPaths::inspect(config)
        .kind(Kind::Invalid, || "look at the request's host paths".to_string())?;
    paths.image_volumes = volumes;
    let passwd = read_inside(rootfs, "etc/passwd");
    let group = read_inside(rootfs, "etc/group");
    let security = record.config.linux.as_ref().and_then(|l| l.security_context.as_ref());
    let seccomp = security.and_then(pinion_spec::localhost_seccomp_path);
    let seccomp = seccomp
        .map(|path| fs::read(path).kind(Kind::Invalid, || format!("seccomp profile {path}")))
        .transpose()?;
    let image_name = record.config.image.as_ref().map_or("", |i| {
        if i.user_specified_image.is_empty() { &i.image } else { &i.user_specified_image }
    });
    let settings = Settings {
        pids_limit: Some(node.config.runtime.pids_limit).filter(|limit| *limit > 0),
        ..Settings::default()
    };
    let target = target_namespace(context, security)?;
    let with_shared = with_shared_cpus(config, &record.contract)?;
    let config = with_shared.as_ref().unwrap_or(config);
    let mut built = pinion_spec::build(&Inputs {
        container_id: &record.id,
        sandbox_id: &record.pod,
        container: config,
        sandbox: &sandbox,
        image: image.config().as_ref(),
        image_name,
        rootfs,
        pod: &super::lend(node, &context.sandbox),
        accounts: Accounts { passwd: passwd.as_deref(), group: group.as_deref() },
        host: &node.facts,
        paths: &paths,
        cgroup_driver: node.cgroups.spec_driver(),
        target_pid_namespace: target.as_deref(),
        localhost_seccomp: seccomp.as_deref(),
        annotations: &decision.annotations,
        settings: &settings,
    })
    .map_err(spec_error)?;
    let nodes = devices.add(&mut built.spec, config)?;
    devices::raise_memlock(node, record, &nodes, &mut built.spec)?;
    if Wishes::read(&context.sandbox.config.annotations, record.name())?.mount {
        hugepages::add_mounts(&record.contract.hugepages, &mut built.spec)?;
    }
    Ok((built, nodes))
}

/// The request with its shared CPUs beside its own, if it has both.
fn with_shared_cpus(
    config: &v1::ContainerConfig,
    contract: &contract::Contract,
) -> Result<Option<v1::ContainerConfig>> {
    if contract.beside.is_empty() {
        return Ok(None);
    }
    let mut config = config.clone();
    config.envs.extend(contract.environment());
    if let Some(limits) = config.linux.as_mut().and_then(|linux| linux.resources.as_mut()) {
        limits.cpuset_cpus = contract.with_shared(&limits.cpuset_cpus)?;
    }
    Ok(Some(config))
}

/// The PID namespace of another container of the same pod, if that is what was asked for.
fn target_namespace(
    context: &Context,
    security: Option<&v1::LinuxContainerSecurityContext>,
) -> Result<Option<PathBuf>> {
    let Some(options) = security.and_then(|s| s.namespace_options.as_ref()) else {
        return Ok(None);
    };
    if options.pid() != NamespaceMode::Target {
        return Ok(None);
    }
    let snapshot = context.node.registry.snapshot();
    let (_, target) = snapshot.container(&options.target_id)?;
    if target.pod != context.sandbox.id {
        return Err(Error::invalid(format!("target {} is in another pod", target.id)));
    }
    let pid = crate::info::pid(&context.node, target)
        .filter(|_| target.phase() == Phase::Running)
        .ok_or_else(|| Error::precondition(format!("target {} is not running", target.id)))?;
    Ok(Some(format!("/proc/{pid}/ns/pid").into()))
}

/// A file of an image, opened beneath its root so that no link leads out of it.
fn read_inside(rootfs: &Path, name: &str) -> Option<Vec<u8>> {
    use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};
    use std::io::Read as _;
    let root =
        open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = openat2(&root, name, flags, Mode::empty(), resolve).ok()?;
    let file = fs::File::from(file);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(ACCOUNTS_LIMIT).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Writes a bundle's `config.json`.
pub(crate) fn write_config(
    directory: &ContainerDirectory,
    spec: &impl serde::Serialize,
) -> Result<()> {
    let path = directory.config();
    let what = || format!("write {}", path.display());
    let bytes = serde_json::to_vec(spec).context(what)?;
    pinion_sys::atomic_file::write_volatile(&path, &bytes, 0o600).context(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(log_directory: &str) -> Sandbox {
        let config =
            v1::PodSandboxConfig { log_directory: log_directory.into(), ..Default::default() };
        Sandbox { config: Wire(config), ..Default::default() }
    }

    fn asks(log_path: &str) -> v1::ContainerConfig {
        v1::ContainerConfig { log_path: log_path.into(), ..Default::default() }
    }

    #[test]
    fn logs_stay_below_the_pod_s_log_directory() {
        let pod = pod("/var/log/pods/p");
        assert_eq!(log_path(&pod, &asks("c/0.log")).unwrap(), Path::new("/var/log/pods/p/c/0.log"));
        for bad in ["../x", "/etc/passwd", "a/../../b", "./../x"] {
            assert!(log_path(&pod, &asks(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn without_a_log_directory_output_is_discarded() {
        assert_eq!(log_path(&pod(""), &asks("x")).unwrap(), PathBuf::new());
        assert_eq!(log_path(&pod("/l"), &asks("")).unwrap(), PathBuf::new());
    }

    #[test]
    fn a_link_in_an_image_does_not_lead_out_of_it() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc/shadow", root.path().join("etc/passwd")).unwrap();
        assert_eq!(read_inside(root.path(), "etc/passwd"), None);
        fs::write(root.path().join("etc/group"), "g:x:5:").unwrap();
        assert_eq!(read_inside(root.path(), "etc/group").unwrap(), b"g:x:5:");
    }
}
