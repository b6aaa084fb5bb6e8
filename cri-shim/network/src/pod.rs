//! A pod as the network sees it.

use crate::cni::{Dns, IpAssignment, PluginResult};
use crate::error::NetworkError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

/// Transport of a port mapping.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// A port of the node that leads to a port of the pod (`portMappings` capability).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// Port on the node; entries with 0 are left out.
    pub host_port: u16,
    /// Port in the pod.
    pub container_port: u16,
    /// Transport.
    pub protocol: Protocol,
    /// Address of the node to listen on; all when `None`.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

/// Everything plugins are told about a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodNetwork {
    /// Pod sandbox id: CNI's container id.
    pub sandbox_id: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Pod name.
    pub name: String,
    /// Pod uid.
    pub uid: String,
    /// The pinned network namespace.
    pub netns: PathBuf,
    /// Pod annotations; `kubernetes.io/{ingress,egress}-bandwidth` are read from here.
    pub annotations: BTreeMap<String, String>,
    /// Ports of the node.
    pub port_mappings: Vec<PortMapping>,
    /// Resolver settings (`dns` capability).
    pub dns: Dns,
    /// The pod's cgroup (`cgroupPath` capability); empty = none.
    pub cgroup_parent: String,
}

impl PodNetwork {
    /// Refuses what could be read as more than one CNI argument (`;`, `=`) or as a path.
    pub(crate) fn check(&self) -> Result<(), NetworkError> {
        let bad = |field, value: &str, reason| {
            Err(NetworkError::BadPod { field, value: value.chars().take(80).collect(), reason })
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        let id = &self.sandbox_id;
        let starts = id.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !starts || id.len() > 128 || !id.chars().all(plain) {
            return bad("sandbox id", id, "not of the form CNI allows for container ids");
        }
        for (field, value) in
            [("pod namespace", &self.namespace), ("pod name", &self.name), ("pod uid", &self.uid)]
        {
            if value.len() > 253 || !value.chars().all(plain) {
                return bad(field, value, "holds characters other than letters, digits, '-._'");
            }
        }
        Ok(())
    }
}

/// A pod's place in its network.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Attachment {
    /// Network name; empty when there was no configuration and the pod has only loopback.
    pub network: String,
    /// Name of the pod's interface, `eth0`.
    pub interface: String,
    /// The pod's addresses, the primary one first.
    pub ips: Vec<IpAddr>,
    /// What the last plugin returned.
    pub result: PluginResult,
}

impl Attachment {
    /// Whether the pod has nothing but loopback.
    pub fn is_loopback_only(&self) -> bool {
        self.network.is_empty()
    }

    /// Addresses of `interface`, or those that name no interface; IPv4 order is the plugin's.
    pub(crate) fn from_result(network: &str, interface: &str, result: PluginResult) -> Self {
        let own = |ip: &&IpAssignment| match ip.interface.map(|index| result.interfaces.get(index))
        {
            None => true,
            Some(Some(found)) => found.name == interface && !found.sandbox.is_empty(),
            Some(None) => false,
        };
        let ips = result.ips.iter().filter(own).map(|ip| ip.address.ip).collect();
        Self { network: network.to_owned(), interface: interface.to_owned(), ips, result }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_add_cni_arguments_are_refused() {
        let good = PodNetwork {
            sandbox_id: "0af3".to_owned(),
            namespace: "kube-system".to_owned(),
            name: "web-0.x".to_owned(),
            uid: "1b4e28ba-2fa1".to_owned(),
            ..Default::default()
        };
        assert!(good.check().is_ok());
        for name in ["x;K8S_POD_NAMESPACE=kube-system", "a=b", "a\nb", "a b", "../x"] {
            let pod = PodNetwork { name: name.to_owned(), ..good.clone() };
            assert!(pod.check().is_err(), "{name:?}");
        }
        for id in ["", "-x", "a/b", "a;b"] {
            let pod = PodNetwork { sandbox_id: id.to_owned(), ..good.clone() };
            assert!(pod.check().is_err(), "{id:?}");
        }
    }

    #[test]
    fn the_pod_s_addresses_are_those_of_its_own_interface() {
        let result = serde_json::from_value(serde_json::json!({
            "cniVersion": "1.0.0",
            "interfaces": [
                {"name": "cni0", "mac": "02:00:00:00:00:01"},
                {"name": "eth0", "sandbox": "/run/ns/x"}
            ],
            "ips": [
                {"address": "10.1.0.1/16", "interface": 0},
                {"address": "10.1.0.9/16", "interface": 1},
                {"address": "fd00::9/64"},
                {"address": "10.9.9.9/32", "interface": 7}
            ]
        }))
        .unwrap();
        let attachment = Attachment::from_result("net", "eth0", result);
        let expected: [IpAddr; 2] = ["10.1.0.9".parse().unwrap(), "fd00::9".parse().unwrap()];
        assert_eq!(attachment.ips, expected);
    }
}
