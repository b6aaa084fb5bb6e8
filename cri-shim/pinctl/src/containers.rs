//! `pinctl pods` and `pinctl ps`.

use crate::connect::Node;
use crate::error::Error;
use crate::lookup;
use crate::output::{self, Format};
use pinion_cri_proto::v1::{ContainerState, PodSandboxState};
use serde::Serialize;
use std::collections::HashMap;

#[derive(Debug, Serialize)]
struct PodRow {
    id: String,
    namespace: String,
    name: String,
    state: &'static str,
    handler: String,
    created_at: i64,
}

#[derive(Debug, Serialize)]
struct ContainerRow {
    id: String,
    name: String,
    pod: String,
    image: String,
    state: &'static str,
    attempt: u32,
    created_at: i64,
}

/// Lists pods.
pub(crate) async fn pods(node: &mut Node, format: Format) -> Result<(), Error> {
    let pods = lookup::pods(node).await?;
    let rows: Vec<PodRow> = pods
        .into_iter()
        .map(|pod| {
            let state = match pod.state() {
                PodSandboxState::SandboxReady => "ready",
                PodSandboxState::SandboxNotready => "not ready",
            };
            let meta = pod.metadata.unwrap_or_default();
            PodRow {
                id: pod.id,
                namespace: meta.namespace,
                name: meta.name,
                state,
                handler: pod.runtime_handler,
                created_at: pod.created_at,
            }
        })
        .collect();
    if format == Format::Json {
        return output::json(&rows);
    }
    let line = |row: &PodRow| {
        let handler = if row.handler.is_empty() { "pinion" } else { &row.handler };
        vec![
            output::short(&row.id),
            row.namespace.clone(),
            row.name.clone(),
            row.state.to_owned(),
            handler.to_owned(),
            output::age(row.created_at),
        ]
    };
    output::table(
        &["POD", "NAMESPACE", "NAME", "STATE", "HANDLER", "AGE"],
        rows.iter().map(line).collect(),
    )
}

/// Lists containers; only running ones unless `all`.
pub(crate) async fn list(node: &mut Node, format: Format, all: bool) -> Result<(), Error> {
    let pods: HashMap<String, String> = lookup::pods(node)
        .await?
        .into_iter()
        .map(|p| (p.id, p.metadata.map(|m| m.name).unwrap_or_default()))
        .collect();
    let rows: Vec<ContainerRow> = lookup::containers(node)
        .await?
        .into_iter()
        .filter(|c| all || c.state() == ContainerState::ContainerRunning)
        .map(|c| {
            let state = state_name(c.state());
            let meta = c.metadata.unwrap_or_default();
            ContainerRow {
                id: c.id,
                name: meta.name,
                pod: pods.get(&c.pod_sandbox_id).cloned().unwrap_or_default(),
                image: c.image.map(|i| i.image).unwrap_or_default(),
                state,
                attempt: meta.attempt,
                created_at: c.created_at,
            }
        })
        .collect();
    if format == Format::Json {
        return output::json(&rows);
    }
    let line = |row: &ContainerRow| {
        vec![
            output::short(&row.id),
            row.name.clone(),
            row.pod.clone(),
            row.image.clone(),
            row.state.to_owned(),
            output::age(row.created_at),
        ]
    };
    output::table(
        &["CONTAINER", "NAME", "POD", "IMAGE", "STATE", "AGE"],
        rows.iter().map(line).collect(),
    )
}

fn state_name(state: ContainerState) -> &'static str {
    match state {
        ContainerState::ContainerCreated => "created",
        ContainerState::ContainerRunning => "running",
        ContainerState::ContainerExited => "exited",
        ContainerState::ContainerUnknown => "unknown",
    }
}
