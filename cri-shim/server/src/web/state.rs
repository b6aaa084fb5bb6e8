//! The node as the page draws it.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::contract;
use crate::error::Result;
use crate::node::Node;
use crate::record::Phase;
use crate::services::blocking;

/// Interrupts of a device with queues come in dozens; more than this says nothing more.
const MOST_IRQS: usize = 1024;

/// Everything the page shows.
pub(super) async fn of(node: &Arc<Node>) -> Result<Value> {
    let looker = node.clone();
    let (topology, functions, irqs, infra) = blocking(move || {
        let topology = contract::topology()?;
        // A bus that cannot be read is an empty list on the page; the contract says why.
        let functions = pinion_device::functions(Path::new("/")).unwrap_or_default();
        let claims = looker.devices.claims();
        let functions: Vec<Value> = functions
            .into_iter()
            .filter(|function| !function.is_bridge())
            .map(|function| {
                let owner = claims.get(function.address.as_str());
                json!({ "function": function, "owner": owner })
            })
            .collect();
        let infra = contract::infra::usage(&looker).map_or(Value::Null, |usage| json!(usage));
        Ok((topology, functions, irqs(Path::new("/proc/irq")), infra))
    })
    .await?;
    let mut containers = Vec::new();
    let snapshot = node.registry.snapshot();
    for (pod, container) in snapshot.containers() {
        if container.phase() == Phase::Exited {
            continue;
        }
        let metadata = pod.sandbox.metadata();
        let receipt = match contract::receipt(node, container).await {
            Ok(receipt) => receipt.and_then(|text| serde_json::from_str::<Value>(&text).ok()),
            Err(error) => Some(json!({ "error": error.chain() })),
        };
        containers.push(json!({
            "id": container.id,
            "name": container.name(),
            "pod": metadata.name,
            "namespace": metadata.namespace,
            "handler": pod.sandbox.handler,
            "cpus": container.contract.cpus.iter().collect::<Vec<_>>(),
            "exclusive": container.contract.exclusive,
            "hugepages": node.hugepages.of(&container.id),
            "devices": container.contract.devices.iter().map(|d| &d.host).collect::<Vec<_>>(),
            "receipt": receipt,
        }));
    }
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "hostname": node.facts.hostname,
        "topology": topology,
        "reserved": node.profile.reserved().iter().collect::<Vec<_>>(),
        "containers": containers,
        "functions": functions,
        "irqs": irqs,
        "infrastructure": infra,
        "profile": node.profile.json(),
    }))
}

/// Interrupts with a handler, and the CPUs that serve them.
fn irqs(dir: &Path) -> Vec<Value> {
    let mut found: Vec<(u32, Value)> = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(number) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let path = entry.path();
        let handlers: Vec<String> = fs::read_dir(&path)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        let list = |name: &str| fs::read_to_string(path.join(name)).ok();
        let cpus = list("effective_affinity_list").or_else(|| list("smp_affinity_list"));
        let cpus: pinion_topology::CpuSet =
            cpus.and_then(|text| text.trim().parse().ok()).unwrap_or_default();
        if !handlers.is_empty() && found.len() < MOST_IRQS {
            let cpus: Vec<u32> = cpus.iter().collect();
            found.push((number, json!({ "irq": number, "names": handlers, "cpus": cpus })));
        }
    }
    found.sort_by_key(|(number, _)| *number);
    found.into_iter().map(|(_, irq)| irq).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_interrupts_that_somebody_handles_are_shown() {
        let dir = tempfile::tempdir().unwrap();
        for (irq, handler) in [("9", Some("acpi")), ("10", None)] {
            let path = dir.path().join(irq);
            fs::create_dir_all(path.join(handler.unwrap_or_default())).unwrap();
            fs::write(path.join("effective_affinity_list"), "0-1\n").unwrap();
        }
        let found = irqs(dir.path());
        assert_eq!(found, [json!({ "irq": 9, "names": ["acpi"], "cpus": [0, 1] })]);
    }
}
