//! What a restart finds: puts every pod back to work and undoes what was left half done.
//!
//! Never fatal: a record that cannot be read is set aside, a pod that cannot be recovered is
//! listed as not ready so that kubelet removes it, and what belongs to nobody is removed.
//! Pods are recovered side by side.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use pinion_store::{Intent, Listing, Table};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::contract::heal::{self, HEALS};
use crate::contract::hugepages::GRANTS;
use crate::contract::settings::{self, LEASES, SETTINGS};
use crate::error::{Context, Error, Kind, Result};
use crate::ids;
use crate::intent::{CREATE_CONTAINER, RUN_POD};
use crate::monitor;
use crate::node::Node;
use crate::pod::{self, Reconnected, Release, Seed, release_all};
use crate::record::{CONTAINERS, Container, Exit, Holding, SANDBOXES, Sandbox};
use crate::services::blocking;

/// Everything the store holds at the start.
struct Found {
    sandboxes: Vec<Sandbox>,
    containers: Vec<Container>,
    intents: Vec<Intent>,
}

/// Recovers the node. After this the registry shows every pod.
pub(crate) async fn run(node: &Arc<Node>) -> Result<()> {
    let reader = node.clone();
    let found = blocking(move || read(&reader)).await?;
    let known: HashSet<String> = found.sandboxes.iter().map(|s| s.id.clone()).collect();

    let mut containers: BTreeMap<String, Vec<Container>> = BTreeMap::new();
    for container in found.containers {
        node.devices.restore(&container.holdings);
        node.cpus.restore(&container.holdings);
        containers.entry(container.pod.clone()).or_default().push(container);
    }
    let mut creations: BTreeMap<String, Vec<(String, Container)>> = BTreeMap::new();
    let mut runs = Vec::new();
    for intent in found.intents {
        sort_intent(node, intent, &mut creations, &mut runs).await;
    }

    let mut work = FuturesUnordered::new();
    for sandbox in found.sandboxes {
        let members = containers.remove(&sandbox.id).unwrap_or_default();
        let undone = creations.remove(&sandbox.id).unwrap_or_default();
        work.push(recover_pod(node.clone(), sandbox, members, undone));
    }
    while work.next().await.is_some() {}
    drop(work);

    for (intent, sandbox) in runs {
        undo_run(node, &intent, sandbox, &known).await;
    }
    // Their pods are gone, so nothing else will ever name them.
    for orphan in containers.into_values().flatten() {
        forget_container(node, orphan, None).await;
    }
    for (intent, orphan) in creations.into_values().flatten() {
        forget_container(node, orphan, Some(intent)).await;
    }
    remove_strangers(node).await;
    settle_settings(node).await;
    crate::checkpoint::sweep(node);
    node.events.recall(&node.registry.snapshot(), ids::now());
    collect_networks(node).await;
    Ok(())
}

/// Gives back what was lent to containers that have ended or are gone.
async fn settle_settings(node: &Arc<Node>) {
    let snapshot = node.registry.snapshot();
    let known = snapshot.containers().map(|(_, c)| c.id.clone()).collect();
    if let Err(error) = heal::settle(node, &known).await {
        node.find(error.chain());
    }
    let live = snapshot.containers().filter(|(_, c)| c.exit.is_none()).map(|(_, c)| c.id.clone());
    if let Err(error) = settings::settle(node, &live.collect()).await {
        node.find(error.chain());
    }
}

/// Gives back the network attachments of pods that are gone. Before the first request: a pod
/// being made then would look like one that is gone.
async fn collect_networks(node: &Node) {
    crate::info::note_engine(node, node.network.status().await.engine.as_ref());
    let snapshot = node.registry.snapshot();
    let known = snapshot.pods().map(|pod| pod.sandbox.id.clone()).collect();
    for error in node.network.collect(&known).await {
        let error = Error::from_foreign(Kind::Internal, error);
        node.find(format!("network of a pod that is gone: {}", error.chain()));
    }
}

fn read(node: &Node) -> Result<Found> {
    let sandboxes = list(node, SANDBOXES)?;
    let containers = list(node, CONTAINERS)?;
    let grants = list(node, GRANTS)?;
    node.hugepages.restore(grants.into_iter().collect());
    node.heals.restore(list(node, HEALS)?);
    restore_settings(node)?;
    let intents = list(node, pinion_store::INTENTS)?;
    Ok(Found {
        sandboxes: sandboxes.into_iter().map(|(_, record)| record).collect(),
        containers: containers.into_iter().map(|(_, record)| record).collect(),
        intents: intents.into_iter().map(|(_, record)| record).collect(),
    })
}

/// Takes over what is lent and owed; what a reboot has reset is owed no more.
fn restore_settings(node: &Node) -> Result<()> {
    let leases = list(node, LEASES)?.into_iter().collect();
    let entries = list(node, SETTINGS)?.into_iter().map(|(_, entry)| entry).collect();
    let void = node.settings.restore(leases, entries);
    let forget = |tx: &pinion_store::Tx| {
        void.iter().try_for_each(|setting| tx.delete(SETTINGS, &setting.to_string()).map(drop))
    };
    node.store.write(forget).context(|| "forget settings of an earlier boot".to_string())
}

/// The good records of a table; the bad ones are set aside.
fn list<R: Serialize + DeserializeOwned>(node: &Node, table: Table<R>) -> Result<Vec<(String, R)>> {
    let what = || format!("list table {}", table.name());
    let Listing { records, bad } = node.store.list(table).context(what)?;
    for (key, reason) in bad {
        node.find(format!("record {key} of table {} set aside: {reason}", table.name()));
        node.store.write(|tx| tx.set_aside(table, &key)).context(what)?;
    }
    Ok(records)
}

/// Reads what an intent was about; one that says nothing readable is dropped, and what it
/// may have left is found by [`remove_strangers`].
async fn sort_intent(
    node: &Node,
    intent: Intent,
    creations: &mut BTreeMap<String, Vec<(String, Container)>>,
    runs: &mut Vec<(String, Sandbox)>,
) {
    let step = intent.steps.into_iter().next().unwrap_or_default();
    let read = match intent.kind.as_str() {
        RUN_POD => {
            serde_json::from_value(step).map(|sandbox| runs.push((intent.id.clone(), sandbox)))
        }
        CREATE_CONTAINER => serde_json::from_value::<Container>(step).map(|container| {
            node.devices.restore(&container.holdings);
            node.cpus.restore(&container.holdings);
            let undone = creations.entry(container.pod.clone()).or_default();
            undone.push((intent.id.clone(), container));
        }),
        _ => Err(serde::de::Error::custom("unknown kind")),
    };
    if let Err(error) = read {
        node.find(format!("intent {} ({}) dropped: {error}", intent.id, intent.kind));
        finish(node, &intent.id).await;
    }
}

async fn finish(node: &Node, intent: &str) {
    let id = intent.to_string();
    if let Err(error) = node.write(move |tx| tx.finish_intent(&id)).await {
        node.find(format!("intent {intent} not finished: {}", error.chain()));
    }
}

async fn recover_pod(
    node: Arc<Node>,
    mut sandbox: Sandbox,
    mut containers: Vec<Container>,
    creations: Vec<(String, Container)>,
) {
    let directory = node.paths.pod(&sandbox.id);
    if sandbox.ready && !pod::namespaces_pinned(&node, &sandbox) {
        node.find(format!(
            "pod {} ({}) did not survive a restart of the node",
            sandbox.id,
            sandbox.title()
        ));
        sandbox.ready = false;
    }
    let notices = mpsc::unbounded_channel();
    let Reconnected { monitor, ended, started, machine_ended } = if sandbox.ready {
        pod::reconnect(node.clone(), sandbox.clone(), containers.clone(), notices.0.clone()).await
    } else {
        end_monitor(&node, directory.path()).await;
        let lost = |c: &Container| c.exit.is_none().then(|| (c.id.clone(), node_restarted()));
        let ended = containers.iter().filter_map(lost).collect();
        let monitor = Err(pod::no_monitor());
        Reconnected { monitor, ended, started: Vec::new(), machine_ended: None }
    };
    let monitor = monitor
        .inspect_err(|error| {
            if sandbox.ready {
                node.find(format!("pod {} has no monitor: {}", sandbox.id, error.chain()));
            }
        })
        .ok();
    sandbox.ready &= monitor.is_some() && machine_ended.is_none();
    if let Some(guest) = sandbox.guest.as_mut().filter(|_| machine_ended.is_some()) {
        guest.ended = machine_ended;
    }
    for container in &mut containers {
        if started.contains(&container.id) {
            container.start(ids::now());
        }
        if let Some((_, exit)) = ended.iter().find(|(id, _)| *id == container.id) {
            container.end(exit.clone());
        }
    }
    let known: HashSet<&String> = containers.iter().map(|c| &c.id).collect();
    let release = Release {
        node: node.clone(),
        sandbox: sandbox.clone(),
        monitor: monitor.clone(),
        forgets_layers: false,
    };
    let mut left_over = Vec::new();
    for (intent, mut container) in creations {
        if !known.contains(&container.id) {
            let (left, result) = release_all(&release, container.holdings, |_| true).await;
            if let Err(error) = result {
                node.find(format!("container {} not undone: {}", container.id, error.chain()));
                container.holdings = left;
                container.end(undone());
                left_over.push(container);
            }
        }
        finish(&node, &intent).await;
    }
    drop(known);
    containers.extend(left_over);
    store_pod(&node, &sandbox, &containers).await;
    node.restore_name(&sandbox);
    pod::spawn(node, Seed { sandbox, containers, monitor, notices });
}

async fn end_monitor(node: &Node, directory: &std::path::Path) {
    if let Err(error) = monitor::end(directory).await {
        node.find(error.chain());
    }
}

/// The exit of a container whose node went down under it.
fn node_restarted() -> Exit {
    Exit {
        code: 255,
        finished_at: ids::now(),
        reason: Some("NodeRestarted".into()),
        message: "the node was restarted while the container ran".into(),
        ..Exit::default()
    }
}

/// The exit of a container that was never finished, and could not be undone.
fn undone() -> Exit {
    Exit {
        code: 128,
        finished_at: ids::now(),
        reason: Some("CreateFailed".into()),
        message: "its creation was interrupted, and undoing it failed".into(),
        ..Exit::default()
    }
}

async fn store_pod(node: &Node, sandbox: &Sandbox, containers: &[Container]) {
    let (record, records) = (sandbox.clone(), containers.to_vec());
    let written = node.write(move |tx| {
        tx.put(SANDBOXES, &record.id, &record)?;
        records.iter().try_for_each(|c| tx.put(CONTAINERS, &c.id, c))
    });
    if let Err(error) = written.await {
        node.find(format!("pod {} not stored: {}", sandbox.id, error.chain()));
    }
}

/// Undoes a RunPodSandbox that was interrupted.
async fn undo_run(node: &Arc<Node>, intent: &str, mut sandbox: Sandbox, known: &HashSet<String>) {
    if !known.contains(&sandbox.id) {
        end_monitor(node, node.paths.pod(&sandbox.id).path()).await;
        let release = Release {
            node: node.clone(),
            sandbox: sandbox.clone(),
            monitor: None,
            forgets_layers: false,
        };
        let (left, result) = release_all(&release, sandbox.holdings.clone(), |_| true).await;
        if let Err(error) = result {
            node.find(format!("pod {} not undone: {}", sandbox.id, error.chain()));
            sandbox.holdings = left;
            sandbox.ready = false;
            store_pod(node, &sandbox, &[]).await;
            node.restore_name(&sandbox);
            let notices = mpsc::unbounded_channel();
            let seed = Seed { sandbox, containers: Vec::new(), monitor: None, notices };
            pod::spawn(node.clone(), seed);
        }
    }
    finish(node, intent).await;
}

/// Removes a container whose pod is gone.
async fn forget_container(node: &Arc<Node>, container: Container, intent: Option<String>) {
    let sandbox = Sandbox { id: container.pod.clone(), ..Default::default() };
    let release = Release { node: node.clone(), sandbox, monitor: None, forgets_layers: false };
    let id = container.id.clone();
    match release_all(&release, container.holdings, |_| true).await.1 {
        Ok(()) => node.find(format!("container {id} of a pod that is gone was removed")),
        // Nobody could retry by name, and the strangers' removal tries once more.
        Err(error) => node.find(format!("container {id} of a pod that is gone: {}", error.chain())),
    }
    let deleted = node.write(move |tx| {
        tx.delete(CONTAINERS, &id)?;
        intent.map_or(Ok(()), |intent| tx.finish_intent(&intent))
    });
    if let Err(error) = deleted.await {
        node.find(error.chain());
    }
}

/// Removes what lies in our own directories and belongs to nobody.
async fn remove_strangers(node: &Arc<Node>) {
    let snapshot = node.registry.snapshot();
    for id in names_in(&node.paths.runtime_root()) {
        // A container named like its pod is the init of a shared PID namespace.
        if snapshot.container(&id).is_err() && snapshot.pod(&id).is_err() {
            note(node, "runtime state", &id, node.programs.delete(&id).await);
        }
    }
    for id in names_in(&node.paths.pods()) {
        if snapshot.pod(&id).is_err() {
            let sandbox = Sandbox { id: id.clone(), ..Default::default() };
            let release =
                Release { node: node.clone(), sandbox, monitor: None, forgets_layers: false };
            let holdings =
                vec![Holding::PodDirectory, Holding::Namespaces, Holding::Shm, Holding::Monitor];
            let (_, result) = release_all(&release, holdings, |_| true).await;
            note(node, "directory of pod", &id, result);
        }
    }
    for container in node.hugepages.holders() {
        if snapshot.container(&container).is_err() {
            let result = crate::contract::hugepages::release(node, &container).await;
            note(node, "hugepage grant of", &container, result);
        }
    }
    let images = node.clone();
    let live: HashSet<String> = snapshot.containers().map(|(_, c)| c.id.clone()).collect();
    let swept = blocking(move || crate::images::remove_strange_rootfs(&images, &live)).await;
    match swept {
        Ok(removed) => removed.iter().for_each(|id| note(node, "root filesystem of", id, Ok(()))),
        Err(error) => node.find(error.chain()),
    }
}

fn note(node: &Node, what: &str, id: &str, result: Result<()>) {
    match result {
        Ok(()) => node.find(format!("{what} {id} belonged to nobody and was removed")),
        Err(error) => node.find(format!("{what} {id} belongs to nobody: {}", error.chain())),
    }
}

/// The directories in a directory of ours, by name.
fn names_in(directory: &std::path::Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}
