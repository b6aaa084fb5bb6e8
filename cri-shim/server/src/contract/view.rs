//! Looking at the node and at containers as the kernel shows them now.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use pinion_cri_proto::admin::{HugepageGrant, Owner};
use pinion_cri_proto::v1::LinuxContainerResources;
use pinion_placement::{
    Host, PartitionKind, Receipt, Request, Subject, Target, TermName, Verdict, audit,
};
use pinion_topology::{CpuSet, Topology};

use crate::error::{Context, Error, Kind, Result};
use crate::info;
use crate::node::Node;
use crate::record::{Container, Phase, Sandbox};
use crate::services::blocking;

/// The machine. Blocks.
pub(crate) fn topology() -> Result<Topology> {
    Topology::read().context(|| "read the machine's topology".to_string())
}

/// What placement looks at: where the hierarchies are mounted does not change while the
/// server runs. Blocks at first.
pub(super) fn host() -> Result<&'static Host> {
    static HOST: OnceLock<Host> = OnceLock::new();
    if let Some(host) = HOST.get() {
        return Ok(host);
    }
    let host = Host::detect().context(|| "look at the host".to_string())?;
    Ok(HOST.get_or_init(|| host))
}

/// What the container was promised, in the words of who writes it.
pub(super) fn asked(node: &Node, container: &Container) -> Result<(Target, Request)> {
    let contract = &container.contract;
    let paths = node.cgroups.container_paths(&container.cgroups_path, &container.id)?;
    let root = node.cgroups.hierarchies().v2_root().unwrap_or(Path::new("/"));
    let hugepages = contract.hugepages.iter().map(|d| (d.size, d.pages * d.size.bytes()));
    let target = Target {
        cgroup: paths.unified.and_then(|p| p.strip_prefix(root).ok().map(Path::to_path_buf)),
        v1: paths.v1,
        cpus: Some(contract.cpus.clone()).filter(|cpus| !cpus.is_empty()),
        mems: Some(contract.mems.clone()).filter(|mems| !mems.is_empty()),
        hugepages: hugepages.collect::<BTreeMap<_, _>>(),
    };
    let request = Request {
        partition: contract.exclusive.then_some(PartitionKind::Isolated),
        prefault: node.hugepages.of(&container.id),
        strict: contract.strict,
        unthrottled: contract.unthrottled,
        ..Request::default()
    };
    Ok((target, request))
}

/// The container as the quick look at its partition knows it.
pub(super) fn sketch(node: &Node, container: &Container) -> Result<Subject> {
    asked(node, container).map(|(target, request)| Subject::new(&target, &request))
}

/// The container as the audit knows it.
pub(super) fn subject(node: &Node, container: &Container) -> Result<Subject> {
    let contract = &container.contract;
    Ok(Subject {
        pid: info::pid(node, container),
        irqs: contract.irqs,
        unsteerable: node.settings.unsteerable(),
        governor: contract.governor.clone(),
        latency: contract.latency.clone(),
        ..sketch(node, container)?
    })
}

/// Audits a container. Blocks.
fn look(node: &Node, container: &Container) -> Result<Receipt> {
    let guest = {
        let snapshot = node.registry.snapshot();
        snapshot.pod(&container.pod).ok().and_then(|pod| pod.sandbox.guest.clone())
    };
    if let Some(guest) = guest {
        return crate::vm::receipt(&guest, container);
    }
    let mut receipt = audit(host()?, &subject(node, container)?);
    let exclusive = receipt.terms.iter_mut().find(|term| term.name == TermName::ExclusiveCpus);
    if let Some(term) = exclusive {
        let mut note = |key: &str, value| drop(term.evidence.insert(key.to_owned(), value));
        if !container.contract.ground.is_empty() {
            note("basis", container.contract.ground.clone());
        }
        if let Some(history) = node.histories.of(&container.id) {
            let (lost, repaired, last) = (history.lost, history.repaired, history.last);
            note("lost", format!("{lost} times, repaired {repaired} times; last: {last}"));
        }
    }
    if container.contract.declined {
        let asked = "CPUs of its own, by annotation";
        receipt.want(container.contract.strict, TermName::ExclusiveCpus, asked);
    }
    if let Some(refusal) = node.pools.refusal(&container.id) {
        receipt.add(container.contract.strict, &refusal);
    }
    if let Some(term) = super::devices::term(node, container)? {
        receipt.include(container.contract.strict, term);
    }
    Ok(receipt)
}

/// The isolation receipt of a container as JSON; none once it has exited.
pub(crate) async fn receipt(
    node: &Arc<Node>,
    container: &Arc<Container>,
) -> Result<Option<String>> {
    if container.phase() == Phase::Exited {
        return Ok(None);
    }
    let (node, container) = (node.clone(), container.clone());
    let receipt = blocking(move || look(&node, &container)).await?;
    let json = serde_json::to_string(&receipt).context(|| "encode a receipt".to_string())?;
    Ok(Some(json))
}

/// The last look before a strict container runs: what is not in force is a refusal.
pub(crate) async fn check_before_start(node: &Arc<Node>, container: &Container) -> Result<()> {
    prove_devices(node, container).await?;
    if !container.contract.strict {
        return Ok(());
    }
    let (node, looked_at) = (node.clone(), container.clone());
    let receipt = blocking(move || look(&node, &looked_at)).await?;
    match receipt.terms.iter().find_map(|term| term.refusal()) {
        None => Ok(()),
        Some(refusal) => Err(Error::from_foreign(Kind::Refused, refusal)),
    }
}

/// Asks the kernel whether the container may open its devices. Only a strict container needs
/// the answer to start.
async fn prove_devices(node: &Arc<Node>, container: &Container) -> Result<()> {
    let (prover, record) = (node.clone(), container.clone());
    match blocking(move || super::devices::prove(&prover, &record)).await {
        Err(error) if !container.contract.strict => {
            tracing::warn!(container = container.id, error = %error.chain(), "devices not probed");
            Ok(())
        }
        other => other,
    }
}

/// Looks at a container that was promised something and has just been started, and logs what
/// it did not get.
pub(crate) fn report_after_start(node: &Arc<Node>, container: &Container) {
    let contract = &container.contract;
    if contract.strict || !contract.promises() {
        return;
    }
    let (node, container) = (node.clone(), container.clone());
    tokio::spawn(async move {
        let id = container.id.clone();
        match blocking(move || look(&node, &container)).await {
            Ok(receipt) if receipt.verdict == Verdict::Aligned => {}
            Ok(receipt) => {
                for refusal in receipt.terms.iter().filter_map(|term| term.refusal()) {
                    tracing::warn!(container = id, %refusal, "isolation is degraded");
                }
            }
            Err(error) => tracing::warn!(container = id, error = %error.chain(), "no receipt"),
        }
    });
}

/// Refuses new CPUs that belong to another container alone.
pub(crate) fn check_update(
    node: &Node,
    container: &Container,
    wanted: &LinuxContainerResources,
) -> Result<()> {
    let cpus: CpuSet = wanted
        .cpuset_cpus
        .parse()
        .kind(Kind::Invalid, || format!("cpuset_cpus {:?}", wanted.cpuset_cpus))?;
    let snapshot = node.registry.snapshot();
    let taken = snapshot.containers().find(|(_, other)| {
        other.id != container.id
            && other.phase() != Phase::Exited
            && !other.contract.own().is_disjoint(&cpus)
    });
    match taken {
        None => Ok(()),
        Some((pod, other)) => Err(Error::new(
            Kind::Refused,
            format!(
                "CPUs {} belong to container {} of pod {} alone",
                other.contract.own().intersection(&cpus),
                other.name(),
                pod.sandbox.title()
            ),
        )),
    }
}

/// Who holds CPUs or hugepages.
pub(crate) fn owners(node: &Node) -> Vec<Owner> {
    let snapshot = node.registry.snapshot();
    let owner = |sandbox: &Sandbox, container: &Container| {
        let grants = node.hugepages.of(&container.id);
        let metadata = sandbox.metadata();
        let owner = Owner {
            container_id: container.id.clone(),
            container_name: container.name().to_string(),
            pod_name: metadata.name,
            pod_namespace: metadata.namespace,
            cpus: container.contract.cpus.to_string(),
            exclusive: container.contract.exclusive,
            hugepages: grants
                .iter()
                .map(|grant| HugepageGrant {
                    node: grant.node,
                    page_size: grant.size.bytes(),
                    pages: grant.pages,
                })
                .collect(),
        };
        let owns = !container.contract.cpus.is_empty() || !owner.hugepages.is_empty();
        (container.phase() != Phase::Exited && owns).then_some(owner)
    };
    snapshot.containers().filter_map(|(pod, c)| owner(&pod.sandbox, c)).collect()
}
