//! What the server says of itself, and the `info` maps of verbose answers.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;

use pinion_cgroup::Driver;
use pinion_cri_proto::v1;
use pinion_network::Engine;
use serde_json::{Value, json};

use crate::contract;
use crate::error::Result;
use crate::node::Node;
use crate::record::Container;
use crate::registry::PodView;

/// Handlers a RuntimeClass may name; see [`contract::Handler`].
const HANDLERS: [&str; 4] = ["", contract::PLAIN, contract::STRICT, contract::VM];

/// Answer to `Version`.
pub(crate) fn version() -> v1::VersionResponse {
    v1::VersionResponse {
        version: "0.1.0".into(), // of the kubelet API that asks; every server answers this
        runtime_name: "pinion".into(),
        runtime_version: env!("CARGO_PKG_VERSION").into(),
        runtime_api_version: "v1".into(),
    }
}

/// Answer to `RuntimeConfig`.
pub(crate) fn runtime_config(node: &Node) -> v1::RuntimeConfigResponse {
    let driver = match node.cgroups.driver() {
        Driver::Systemd => v1::CgroupDriver::Systemd,
        Driver::Cgroupfs => v1::CgroupDriver::Cgroupfs,
    };
    let linux = v1::LinuxRuntimeConfiguration { cgroup_driver: driver.into() };
    v1::RuntimeConfigResponse { linux: Some(linux) }
}

/// Answer to `Status`.
pub(crate) async fn status(node: &Arc<Node>, verbose: bool) -> Result<v1::StatusResponse> {
    let runtime =
        v1::RuntimeCondition { r#type: "RuntimeReady".into(), status: true, ..Default::default() };
    let network = node.network.status().await;
    note_engine(node, network.engine.as_ref());
    let engine = network.engine.as_ref().map(ToString::to_string);
    let network = v1::RuntimeCondition {
        r#type: "NetworkReady".into(),
        status: network.ready,
        reason: network.reason,
        message: network.message,
    };
    let features = v1::RuntimeHandlerFeatures {
        recursive_read_only_mounts: node.facts.recursive_read_only,
        user_namespaces: node.no_user_namespaces.is_none(),
    };
    let handler =
        |name: &&str| v1::RuntimeHandler { name: (*name).into(), features: Some(features) };
    Ok(v1::StatusResponse {
        status: Some(v1::RuntimeStatus { conditions: vec![runtime, network] }),
        info: if verbose {
            let mut info = of_node(node).await;
            if let Some(object) = info.as_object_mut() {
                object.insert("network".into(), json!({ "attachedBy": engine }));
            }
            HashMap::from([("info".to_string(), info.to_string())])
        } else {
            HashMap::new()
        },
        runtime_handlers: HANDLERS.iter().map(handler).collect(),
        features: Some(v1::RuntimeFeatures {
            supplemental_groups_policy: true,
            user_namespaces_host_network: node.no_user_namespaces.is_none(),
            mount_options: true,
        }),
    })
}

/// Logs who attaches pods, when that changes.
pub(crate) fn note_engine(node: &Node, engine: Option<&Engine>) {
    if let Some(engine) = engine
        && node.network.is_news(engine)
    {
        tracing::info!(by = %engine, "pods are attached to the network");
    }
}

/// What `pinctl info` shows.
pub(crate) async fn of_node(node: &Arc<Node>) -> Value {
    let runtime = match node.programs.version().await {
        Ok(version) => version,
        Err(error) => error.chain(),
    };
    let snapshot = node.registry.snapshot();
    let findings = node.findings.lock().map(|f| f.clone()).unwrap_or_default();
    if let Err(error) = crate::profile::refresh(node).await {
        tracing::warn!(error = %error.chain(), "the node profile was not compared");
    }
    let devices = node.clone();
    let cdi = crate::services::blocking(move || Ok(devices.devices.cdi())).await;
    let infra = node.clone();
    let infra = crate::services::blocking(move || crate::contract::infra::usage(&infra)).await;
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "root": node.paths.root(),
        "runDir": node.paths.run_dir(),
        "socket": node.config.server.socket,
        "runtime": { "path": node.programs.runtime, "version": runtime },
        "monitor": node.programs.monitor,
        "userNamespaces": match &node.no_user_namespaces {
            None => "yes".into(),
            Some(reason) => format!("no: {reason}"),
        },
        "cgroupDriver": format!("{:?}", node.cgroups.driver()).to_lowercase(),
        "cgroupMode": format!("{:?}", node.cgroups.hierarchies().mode()).to_lowercase(),
        "pods": snapshot.pods().count(),
        "containers": snapshot.containers().count(),
        "uptimeSeconds": node.began.elapsed().as_secs(),
        "findings": findings,
        "nodeSettings": node.settings.changed(),
        "hugepageDrift": node.pools.words(),
        "infrastructure": infra.map_or_else(|error| json!(error.chain()), |usage| json!(usage)),
        "cdi": cdi.unwrap_or_default(),
        "vfio": node.devices.claims(),
        "profile": node.profile.json(),
    })
}

/// The `info` map of a pod.
pub(crate) fn of_pod(node: &Node, pod: &PodView) -> HashMap<String, String> {
    let foreign = node.foreign_changes.lock().ok();
    let foreign = foreign.and_then(|known| known.get(&pod.sandbox.id).cloned());
    let info = json!({
        "foreignNetworkChanges": foreign.unwrap_or_default(),
        "directory": node.paths.pod(&pod.sandbox.id).path(),
        "cgroupParent": pod.sandbox.cgroup_parent,
        "holdings": pod.sandbox.holdings,
        "monitor": pod.monitor.is_some(),
        "guest": pod.sandbox.guest,
    });
    HashMap::from([("info".to_string(), info.to_string())])
}

/// The `info` map of a container: its OCI configuration, pid, and isolation receipt.
pub(crate) async fn of_container(
    node: &Arc<Node>,
    container: &Arc<Container>,
) -> HashMap<String, String> {
    let directory = node.paths.pod(&container.pod).container(&container.id);
    let spec: Option<Value> =
        fs::read(directory.config()).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let info = json!({
        "sandboxID": container.pod,
        "pid": pid(node, container),
        "runtimeSpec": spec,
        "contract": container.contract,
        "holdings": container.holdings,
    });
    let mut map = HashMap::from([("info".to_string(), info.to_string())]);
    match contract::receipt(node, container).await {
        Ok(Some(receipt)) => {
            map.insert("receipt".into(), receipt);
        }
        Ok(None) => {}
        Err(error) => {
            map.insert("receiptError".into(), error.chain());
        }
    }
    map
}

/// The container's first process, while it lives.
pub(crate) fn pid(node: &Node, container: &Container) -> Option<i32> {
    if container.exit.is_some() {
        return None;
    }
    let file = node.paths.pod(&container.pod).container(&container.id).pid();
    fs::read_to_string(file).ok()?.trim().parse().ok()
}
