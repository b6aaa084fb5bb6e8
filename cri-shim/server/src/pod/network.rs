//! The pod's namespaces and its place in the network.

use std::collections::BTreeMap;
use std::net::{AddrParseError, IpAddr};
use std::sync::{Arc, PoisonError};

use pinion_cri_proto::v1::{self, NamespaceMode};
use pinion_network::namespaces::{self, Setup};
use pinion_network::{Dns, NetworkError, PodNetwork, PortMapping, Protocol};

use super::create::spec_error;
use super::users;
use crate::error::{Context, Error, Kind, Result};
use crate::node::Node;
use crate::record::Sandbox;

/// The kinds of namespaces a pod owns.
fn kinds(sandbox: &Sandbox) -> Vec<namespaces::Kind> {
    let options = sandbox.namespaces();
    let mut kinds = Vec::new();
    if options.network() != NamespaceMode::Node {
        kinds.extend([namespaces::Kind::Net, namespaces::Kind::Uts]);
    }
    if options.ipc() != NamespaceMode::Node {
        kinds.push(namespaces::Kind::Ipc);
    }
    kinds
}

/// The same with the user namespace that owns them, if the pod has one.
fn pinned_kinds(sandbox: &Sandbox) -> Vec<namespaces::Kind> {
    let user = users::of(sandbox).map(|_| namespaces::Kind::User);
    kinds(sandbox).into_iter().chain(user).collect()
}

/// Makes and pins them, with the pod's host name and sysctls inside. Blocks.
pub(crate) fn make_namespaces(node: &Node, sandbox: &Sandbox, hostname: &str) -> Result<()> {
    let sysctls = pinion_spec::pod::sysctls(&sandbox.config).map_err(spec_error)?;
    let kinds = kinds(sandbox);
    let user = users::of(sandbox);
    if kinds.is_empty() && user.is_none() {
        return Ok(());
    }
    let sysctls = sysctls.net.into_iter().chain(sysctls.ipc);
    let setup = Setup {
        hostname: Some(hostname.to_string()),
        sysctls: sysctls.map(|s| (s.path, s.value)).collect(),
    };
    let directory = node.paths.pod(&sandbox.id).namespaces();
    let made = match user {
        None => namespaces::create(&kinds, &directory, &setup),
        Some(ids) => namespaces::owned::create(&kinds, &directory, &setup, &users::to_be_made(ids)),
    };
    made.map_err(network_error)
}

/// Whether the pod's namespaces are all there: not so after a restart of the node.
pub(crate) fn namespaces_pinned(node: &Node, sandbox: &Sandbox) -> bool {
    let directory = node.paths.pod(&sandbox.id);
    let pins = directory.namespaces();
    directory.path().exists()
        && pinned_kinds(sandbox).iter().all(|kind| namespaces::is_pinned(&pins.join(kind.name())))
}

/// Attaches the pod to its network; its addresses, the primary one first.
pub(crate) async fn add(node: &Arc<Node>, sandbox: &Sandbox) -> Result<Vec<String>> {
    let outcome = node.network.add(&describe(node, sandbox)?).await;
    note_foreign_changes(node);
    let attachment = outcome.map_err(network_error)?;
    Ok(attachment.ips.iter().map(ToString::to_string).collect())
}

/// Detaches the pod; done when it is not attached.
pub(crate) async fn del(node: &Arc<Node>, sandbox: &Sandbox) -> Result<()> {
    let outcome = node.network.del(&describe(node, sandbox)?, None).await;
    note_foreign_changes(node);
    outcome.map_err(network_error)
}

/// Most changes kept per pod, for its verbose status.
const MAX_FOREIGN: usize = 64;

/// Makes known what changed of the node's network and belongs to no pod: a plugin meddles, or
/// somebody was at work at the same time.
fn note_foreign_changes(node: &Node) {
    for report in node.network.foreign_changes() {
        let pods = report.pods.join(" ");
        for change in &report.changes {
            tracing::warn!(pods, change, "the node's network changed beside that of its pods");
        }
        let mut known = node.foreign_changes.lock().unwrap_or_else(PoisonError::into_inner);
        for pod in report.pods {
            let changes = known.entry(pod).or_default();
            changes.extend(report.changes.iter().cloned());
            changes.truncate(MAX_FOREIGN);
        }
    }
}

fn network_error(error: NetworkError) -> Error {
    let kind = match error {
        NetworkError::BadPod { .. } => Kind::Invalid,
        _ => Kind::Internal,
    };
    Error::from_foreign(kind, error)
}

/// The pod in the words of CNI.
fn describe(node: &Node, sandbox: &Sandbox) -> Result<PodNetwork> {
    let metadata = sandbox.metadata();
    let config = &sandbox.config;
    let dns = config.dns_config.clone().unwrap_or_default();
    let annotations: BTreeMap<_, _> = config.annotations.clone().into_iter().collect();
    Ok(PodNetwork {
        sandbox_id: sandbox.id.clone(),
        namespace: metadata.namespace,
        name: metadata.name,
        uid: metadata.uid,
        netns: node.paths.pod(&sandbox.id).namespaces().join("net"),
        annotations,
        port_mappings: config.port_mappings.iter().map(port).collect::<Result<_>>()?,
        dns: Dns {
            nameservers: dns.servers,
            search: dns.searches,
            options: dns.options,
            ..Default::default()
        },
        cgroup_parent: sandbox.cgroup_parent.clone(),
    })
}

fn port(mapping: &v1::PortMapping) -> Result<PortMapping> {
    let number = |name: &str, value: i32| {
        u16::try_from(value)
            .map_err(|e| Error::invalid(format!("port_mappings: {name} {value}")).caused_by(e))
    };
    let host_ip = match mapping.host_ip.as_str() {
        "" => None,
        text => {
            let ip: Result<IpAddr, AddrParseError> = text.parse();
            Some(ip.kind(Kind::Invalid, || format!("port_mappings: host_ip {text:?}"))?)
        }
    };
    Ok(PortMapping {
        host_port: number("host_port", mapping.host_port)?,
        container_port: number("container_port", mapping.container_port)?,
        protocol: match mapping.protocol() {
            v1::Protocol::Tcp => Protocol::Tcp,
            v1::Protocol::Udp => Protocol::Udp,
            v1::Protocol::Sctp => Protocol::Sctp,
        },
        host_ip,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_outside_their_range_are_the_client_s_mistake() {
        let mapping = |host_port| v1::PortMapping { host_port, ..Default::default() };
        assert_eq!(port(&mapping(8080)).unwrap().host_port, 8080);
        assert_eq!(port(&mapping(70_000)).unwrap_err().kind(), Kind::Invalid);
        assert_eq!(port(&mapping(-1)).unwrap_err().kind(), Kind::Invalid);
    }
}
