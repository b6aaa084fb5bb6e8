//! RunPodSandbox: from a request to a pod that can take containers.
//!
//! Everything the pod may come to hold is committed as an intent before the first step. The
//! steps that do not need each other run side by side: CNI, the monitor, the files. If one
//! fails, everything is given back; what cannot be stays with a pod that is not ready, which
//! kubelet then stops and removes.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;

use pinion_cri_proto::v1::{NamespaceMode, RunPodSandboxRequest};
use rustix::mount::{MountFlags, mount};
use tokio::sync::mpsc;

use super::actor::Seed;
use super::create::spec_error;
use super::release::{self, Release};
use super::{network, shared_pid, users};
use crate::admission::{Admit, Settled};
use crate::contract::Handler;
use crate::error::{Context, Error, Kind, Result};
use crate::events::Note;
use crate::ids;
use crate::intent::{self, RUN_POD};
use crate::monitor::{Client, Notice};
use crate::node::Node;
use crate::nri;
use crate::record::{Holding, SANDBOXES, Sandbox};
use crate::services::blocking;
use crate::ticket::{Completion, ticket};
use crate::vm;
use crate::wire::Wire;

type Notices = (mpsc::UnboundedSender<Notice>, mpsc::UnboundedReceiver<Notice>);

/// Runs a pod, joins the same request in progress, or answers with what that one made.
pub(crate) async fn run(node: &Arc<Node>, request: RunPodSandboxRequest) -> Result<String> {
    let sandbox = plan(node, request)?;
    let (completion, mine) = ticket();
    let request = (sandbox.config.0.clone(), sandbox.handler.clone());
    match node.admit(request, &sandbox.id, mine.clone()) {
        Admit::Start => {
            tokio::spawn(bring_up(node.clone(), sandbox, completion));
            mine.wait().await
        }
        Admit::Join(theirs) => theirs.wait().await,
        Admit::Made(id) => {
            // What a failed attempt left is no answer to the same request.
            let ready = node.registry.snapshot().pod(&id).is_ok_and(|pod| pod.sandbox.ready);
            if ready { Ok(id) } else { Err(taken(&sandbox, &id, "exists and is not ready")) }
        }
        Admit::Taken { id, in_progress } => {
            let state = if in_progress { "is being made" } else { "exists" };
            Err(taken(&sandbox, &id, &format!("{state} with another configuration")))
        }
    }
}

fn taken(sandbox: &Sandbox, id: &str, state: &str) -> Error {
    let (title, attempt) = (sandbox.title(), sandbox.metadata().attempt);
    Error::new(Kind::AlreadyExists, format!("pod {title} (attempt {attempt}) {state}: {id}"))
}

/// Checks the request and names all that the pod will hold.
fn plan(node: &Node, request: RunPodSandboxRequest) -> Result<Sandbox> {
    let config = request.config.ok_or_else(|| Error::invalid("the request has no config"))?;
    let metadata = config.metadata.clone().unwrap_or_default();
    if metadata.name.is_empty() || metadata.uid.is_empty() {
        return Err(Error::invalid("config.metadata: a pod needs a name and a uid"));
    }
    let handler = Handler::parse(&request.runtime_handler)?;
    let users = users::check(node, &config)?;
    let id = ids::random_id()?;
    let asked = config.linux.as_ref().map_or("", |l| l.cgroup_parent.as_str());
    let cgroup_parent = node.cgroups.parent_for(asked, &id);
    let mut sandbox = Sandbox {
        created_at: ids::now(),
        handler: request.runtime_handler,
        config: Wire(config),
        cgroup_parent: cgroup_parent.clone(),
        id,
        ..Default::default()
    };
    if handler == Handler::Vm {
        vm::check(&sandbox)?;
        if users.is_some() {
            return Err(Error::invalid(
                "a pod in a virtual machine has the machine's users: ask for no user namespace, or \
                 for another runtime handler",
            ));
        }
        sandbox.holdings = vm_holdings(cgroup_parent);
        return Ok(sandbox);
    }
    let namespaces = sandbox.namespaces();
    let host = |mode: NamespaceMode| mode == NamespaceMode::Node;
    let mut holdings = vec![Holding::PodDirectory, Holding::PodCgroup { parent: cgroup_parent }];
    if !host(namespaces.network()) || !host(namespaces.ipc()) || users.is_some() {
        holdings.push(Holding::Namespaces);
    }
    if !host(namespaces.ipc()) {
        holdings.push(Holding::Shm);
    }
    if !host(namespaces.network()) {
        holdings.push(Holding::Network);
    }
    holdings.push(Holding::Monitor);
    if shared_pid::wanted(&sandbox) {
        holdings.extend(shared_pid::holdings(&sandbox.id));
    }
    sandbox.holdings = holdings;
    Ok(sandbox)
}

/// What a pod in a machine holds: of namespaces only the network is used, to bring the pod's
/// interfaces to the machine.
fn vm_holdings(parent: String) -> Vec<Holding> {
    vec![
        Holding::PodDirectory,
        Holding::PodCgroup { parent: parent.clone() },
        Holding::Namespaces,
        Holding::Network,
        Holding::Machine { parent },
        Holding::Monitor,
    ]
}

/// The operation, in a task of its own.
async fn bring_up(node: Arc<Node>, sandbox: Sandbox, completion: Completion<String>) {
    let _until_it_is_listed = nri::creation(&node).await;
    let result = attempt(&node, &sandbox).await;
    let id = sandbox.id.clone();
    completion.complete(match result {
        Ok((ready, monitor, notices)) => {
            node.settle_name(&ready, Settled::Made);
            let announced = ready.clone();
            let seed =
                Seed { sandbox: ready, containers: Vec::new(), monitor: Some(monitor), notices };
            super::spawn(node.clone(), seed);
            announce(&node, &announced);
            Ok(id)
        }
        Err(error) => Err(error),
    });
}

/// Events of a new pod: made, and ready.
fn announce(node: &Node, sandbox: &Sandbox) {
    use pinion_cri_proto::v1::{ContainerEventResponse, ContainerEventType};
    for what in
        [ContainerEventType::ContainerCreatedEvent, ContainerEventType::ContainerStartedEvent]
    {
        let (pod, id, at) = (sandbox.id.clone(), sandbox.id.clone(), ids::now());
        node.events.tell(Note { pod, id, what, at }, || ContainerEventResponse {
            container_id: sandbox.id.clone(),
            container_event_type: what.into(),
            created_at: at,
            pod_sandbox_status: Some(crate::status::sandbox_status(sandbox)),
            containers_statuses: Vec::new(),
        });
    }
}

async fn attempt(node: &Arc<Node>, sandbox: &Sandbox) -> Result<(Sandbox, Client, Notices)> {
    let (id, step) = (sandbox.id.clone(), intent::step(sandbox)?);
    let begun = node
        .write(move |tx| {
            let intent = tx.begin_intent(RUN_POD, &id)?;
            tx.append_step(&intent.id, step)?;
            Ok(intent.id)
        })
        .await;
    let intent = match begun {
        Ok(intent) => intent,
        Err(error) => {
            node.settle_name(sandbox, Settled::Undone);
            return Err(error);
        }
    };
    let notices = mpsc::unbounded_channel();
    let outcome = match steps(node, sandbox, notices.0.clone()).await {
        Ok((ready, monitor)) => {
            let (record, intent) = (ready.clone(), intent.clone());
            let written = node.write(move |tx| {
                tx.put(SANDBOXES, &record.id, &record)?;
                tx.finish_intent(&intent)
            });
            written.await.map(|()| (ready, monitor))
        }
        Err(error) => Err(error),
    };
    match outcome {
        Ok((ready, monitor)) => Ok((ready, monitor, notices)),
        Err(error) => {
            undo(node, sandbox, &intent).await;
            Err(error)
        }
    }
}

/// Gives everything back; a pod that still holds something stays, not ready.
async fn undo(node: &Arc<Node>, sandbox: &Sandbox, intent: &str) {
    // For plugins that were told of it before another one refused.
    nri::remove_pod(node, sandbox).await;
    let release = Release {
        node: node.clone(),
        sandbox: sandbox.clone(),
        monitor: None,
        forgets_layers: false,
    };
    let (left, result) = release::all(&release, sandbox.holdings.clone(), |_| true).await;
    let intent = intent.to_string();
    let mut written = Ok(());
    if let Err(error) = result {
        tracing::error!(pod = sandbox.id, error = %error.chain(), "undo failed, the pod stays");
        let remains = Sandbox { holdings: left, ready: false, ..sandbox.clone() };
        let record = remains.clone();
        written = node
            .write(move |tx| {
                tx.put(SANDBOXES, &record.id, &record)?;
                tx.finish_intent(&intent)
            })
            .await;
        node.settle_name(sandbox, Settled::Made);
        let notices = mpsc::unbounded_channel();
        let seed = Seed { sandbox: remains, containers: Vec::new(), monitor: None, notices };
        super::spawn(node.clone(), seed);
    } else {
        node.settle_name(sandbox, Settled::Undone);
        written = written.and(node.write(move |tx| tx.finish_intent(&intent)).await);
    }
    if let Err(error) = written {
        // The intent is still there: the next start undoes it once more.
        tracing::error!(pod = sandbox.id, error = %error.chain(), "undo not stored");
    }
}

async fn steps(
    node: &Arc<Node>,
    sandbox: &Sandbox,
    notices: mpsc::UnboundedSender<Notice>,
) -> Result<(Sandbox, Client)> {
    let handler = Handler::parse(&sandbox.handler)?;
    let prepared = match handler {
        Handler::Vm => Some(node.machines.prepared(node).await?),
        Handler::Plain | Handler::Strict => None,
    };
    let (worker, planned) = (node.clone(), sandbox.clone());
    blocking(move || prepare(&worker, &planned)).await?;
    if let Some(prepared) = prepared {
        return vm_steps(node, sandbox, prepared, notices).await;
    }
    let attach = async {
        if sandbox.holdings.contains(&Holding::Network) {
            network::add(node, sandbox).await
        } else {
            Ok(Vec::new())
        }
    };
    let monitor = async {
        node.start_monitor(&sandbox.id, None).await?;
        let directory = node.paths.pod(&sandbox.id);
        let (client, _) = Client::connect(directory.path(), notices).await?;
        if shared_pid::wanted(sandbox) {
            shared_pid::start(node, sandbox, &client).await?;
        }
        Ok(client)
    };
    // Both run to their end: neither may be left half done while the other is undone.
    let (ips, monitor): (Result<Vec<String>>, Result<Client>) = tokio::join!(attach, monitor);
    let (ips, monitor) = (ips?, monitor?);
    let mut ready = sandbox.clone();
    ready.ips = ips;
    ready.ready = true;
    let (worker, known) = (node.clone(), ready.clone());
    blocking(move || write_hosts(&worker, &known)).await?;
    nri::run_pod(node, &ready).await?;
    Ok((ready, monitor))
}

/// The same for a pod in a machine: the machine needs the pod's interfaces and files, so it
/// comes last; and it must turn out to have a kernel of its own.
async fn vm_steps(
    node: &Arc<Node>,
    sandbox: &Sandbox,
    prepared: vm::Prepared,
    notices: mpsc::UnboundedSender<Notice>,
) -> Result<(Sandbox, Client)> {
    let mut ready = sandbox.clone();
    ready.ips = network::add(node, sandbox).await?;
    let (worker, known) = (node.clone(), ready.clone());
    let plan = vm::plan_path(node, sandbox);
    blocking(move || {
        write_hosts(&worker, &known)?;
        vm::write_plan(&worker, &known, &prepared)
    })
    .await?;
    node.start_monitor(&sandbox.id, Some(&plan)).await?;
    let directory = node.paths.pod(&sandbox.id);
    let (client, hello) = Client::connect(directory.path(), notices).await?;
    let told = hello.guest.ok_or_else(|| Error::internal("the pod's monitor has no machine"))?;
    let guest = vm::Guest::from(told);
    vm::verify(&guest)?;
    ready.guest = Some(guest);
    ready.ready = true;
    Ok((ready, client))
}

/// Directory, cgroup, files, namespaces, shared memory. Blocks.
fn prepare(node: &Node, sandbox: &Sandbox) -> Result<()> {
    let directory = node.paths.pod(&sandbox.id);
    let containers = directory.path().join("containers");
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&containers)
        .context(|| format!("create {}", containers.display()))?;
    node.cgroups.ensure_parent(&sandbox.cgroup_parent)?;

    let config = &sandbox.config;
    let hostname = pinion_spec::pod::hostname(config, &node.facts.hostname).map_err(spec_error)?;
    let host_dns = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let dns =
        pinion_spec::pod::resolv_conf(config.dns_config.as_ref(), &host_dns).map_err(spec_error)?;
    write(sandbox, &directory.hostname(), &format!("{hostname}\n"))?;
    write(sandbox, &directory.resolv_conf(), &dns)?;

    network::make_namespaces(node, sandbox, &hostname)?;
    if sandbox.holdings.contains(&Holding::Shm) {
        let shm = directory.shm();
        let what = || format!("mount {}", shm.display());
        fs::create_dir_all(&shm).context(what)?;
        let size = node.config.runtime.shm_size;
        let (uid, gid) = users::root(sandbox);
        let options = format!("mode=1777,size={size},uid={uid},gid={gid}");
        let options = std::ffi::CString::new(options).context(what)?;
        let flags = MountFlags::NOEXEC | MountFlags::NOSUID | MountFlags::NODEV;
        mount("shm", &shm, "tmpfs", flags, options.as_c_str()).context(what)?;
    }
    Ok(())
}

/// `/etc/hosts`, once the addresses are known. Pods on the host's network see the host's.
fn write_hosts(node: &Node, sandbox: &Sandbox) -> Result<()> {
    let directory = node.paths.pod(&sandbox.id);
    let text = if sandbox.namespaces().network() == NamespaceMode::Node {
        fs::read_to_string("/etc/hosts").unwrap_or_default()
    } else {
        let hostname = pinion_spec::pod::hostname(&sandbox.config, &node.facts.hostname)
            .map_err(spec_error)?;
        let addresses: Vec<_> = sandbox.ips.iter().filter_map(|ip| ip.parse().ok()).collect();
        pinion_spec::pod::hosts(&hostname, &addresses)
    };
    write(sandbox, &directory.hosts(), &text)
}

/// Files that containers bind: read-only mounts of them are the containers' affair.
fn write(sandbox: &Sandbox, path: &std::path::Path, text: &str) -> Result<()> {
    let (uid, gid) = users::root(sandbox);
    pinion_sys::atomic_file::write_volatile(path, text.as_bytes(), 0o644)
        .and_then(|()| std::os::unix::fs::chown(path, Some(uid), Some(gid)))
        .context(|| format!("write {}", path.display()))
}
