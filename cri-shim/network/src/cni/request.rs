//! What a plugin is told: its configuration on standard input, and `CNI_ARGS`.

use super::config::{NetworkList, PluginConfig};
use crate::pod::PodNetwork;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Bandwidth annotations of pods that CRI runtimes hand to the bandwidth plugin.
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
/// Token bucket size handed to the bandwidth plugin: the largest it takes.
const BURST: u64 = i32::MAX as u64;

/// `CNI_ARGS` of a pod whose fields [`PodNetwork::check`] has accepted.
///
/// `IgnoreUnknown` keeps plugins that know no Kubernetes from refusing the rest.
pub(crate) fn args(pod: &PodNetwork) -> String {
    format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};\
         K8S_POD_UID={}",
        pod.namespace, pod.name, pod.sandbox_id, pod.uid
    )
}

/// Data of all capabilities this runtime has, by name; each plugin gets those it asks for.
pub(crate) fn capabilities(pod: &PodNetwork, pod_cidrs: &[String]) -> Map<String, Value> {
    let mut all = Map::new();
    let ports: Vec<_> = pod.port_mappings.iter().filter(|map| map.host_port != 0).collect();
    if !ports.is_empty() {
        all.insert("portMappings".to_owned(), json!(ports));
    }
    let dns = &pod.dns;
    if !(dns.nameservers.is_empty() && dns.search.is_empty() && dns.options.is_empty()) {
        let value =
            json!({"servers": dns.nameservers, "searches": dns.search, "options": dns.options});
        all.insert("dns".to_owned(), value);
    }
    if !pod_cidrs.is_empty() {
        let ranges: Vec<_> = pod_cidrs.iter().map(|cidr| json!([{"subnet": cidr}])).collect();
        all.insert("ipRanges".to_owned(), json!(ranges));
    }
    if let Some(value) = bandwidth(&pod.annotations) {
        all.insert("bandwidth".to_owned(), value);
    }
    if !pod.cgroup_parent.is_empty() {
        all.insert("cgroupPath".to_owned(), json!(pod.cgroup_parent));
    }
    if !pod.annotations.is_empty() {
        all.insert("io.kubernetes.cri.pod-annotations".to_owned(), json!(pod.annotations));
    }
    all
}

/// Rates in bits per second; an annotation that is no quantity is left out.
fn bandwidth(annotations: &BTreeMap<String, String>) -> Option<Value> {
    let mut value = Map::new();
    for (annotation, direction) in [(INGRESS, "ingress"), (EGRESS, "egress")] {
        let rate = annotations.get(annotation).and_then(|text| quantity(text));
        if let Some(rate) = rate.filter(|rate| *rate > 0) {
            value.insert(format!("{direction}Rate"), json!(rate));
            value.insert(format!("{direction}Burst"), json!(BURST));
        }
    }
    (!value.is_empty()).then_some(Value::Object(value))
}

/// A Kubernetes quantity without fraction: `10M`, `1Gi`, `500k`, `1000`.
fn quantity(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let factor: u64 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

/// The plugin's standard input, derived as section 3 of the specification says.
pub(crate) fn stdin(
    list: &NetworkList,
    plugin: &PluginConfig,
    capabilities: &Map<String, Value>,
    previous: Option<&Value>,
) -> Value {
    let mut object = plugin.object.clone();
    object.retain(|key, _| !key.starts_with("cni.dev/"));
    for reserved in ["capabilities", "runtimeConfig", "prevResult"] {
        object.remove(reserved);
    }
    object.insert("cniVersion".to_owned(), json!(list.version));
    object.insert("name".to_owned(), json!(list.name));
    let wanted: Map<_, _> = capabilities
        .iter()
        .filter(|(name, _)| plugin.wants(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if !wanted.is_empty() {
        object.insert("runtimeConfig".to_owned(), Value::Object(wanted));
    }
    if let Some(previous) = previous {
        object.insert("prevResult".to_owned(), previous.clone());
    }
    Value::Object(object)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cni::{Dns, Version};
    use crate::pod::{PortMapping, Protocol};

    fn list(object: &Value) -> NetworkList {
        let plugin = PluginConfig {
            kind: "portmap".to_owned(),
            object: object.as_object().unwrap().clone(),
        };
        NetworkList {
            version: Version::V1_0_0,
            name: "net".to_owned(),
            disable_check: false,
            plugins: vec![plugin],
        }
    }

    fn pod() -> PodNetwork {
        PodNetwork {
            sandbox_id: "id1".to_owned(),
            namespace: "ns".to_owned(),
            name: "web".to_owned(),
            uid: "u1".to_owned(),
            port_mappings: vec![
                PortMapping {
                    host_port: 8080,
                    container_port: 80,
                    protocol: Protocol::Tcp,
                    host_ip: Some("127.0.0.1".parse().unwrap()),
                },
                PortMapping {
                    host_port: 0,
                    container_port: 81,
                    protocol: Protocol::Udp,
                    host_ip: None,
                },
            ],
            ..Default::default()
        }
    }

    #[test]
    fn arguments_identify_the_pod() {
        assert_eq!(
            args(&pod()),
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web;\
             K8S_POD_INFRA_CONTAINER_ID=id1;K8S_POD_UID=u1"
        );
    }

    #[test]
    fn plugins_get_the_capabilities_they_ask_for_and_no_reserved_keys() {
        let list = list(&json!({
            "type": "portmap", "snat": true, "capabilities": {"portMappings": true},
            "prevResult": "forged", "runtimeConfig": "forged", "cni.dev/x": 1
        }));
        let all = capabilities(&pod(), &["10.0.0.0/24".to_owned()]);
        let previous = json!({"cniVersion": "1.0.0"});
        let input = stdin(&list, &list.plugins[0], &all, Some(&previous));
        let expected = json!({
            "cniVersion": "1.0.0", "name": "net", "type": "portmap", "snat": true,
            "runtimeConfig": {"portMappings": [{
                "hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"
            }]},
            "prevResult": {"cniVersion": "1.0.0"}
        });
        assert_eq!(input, expected);
    }

    #[test]
    fn every_capability_is_filled_from_the_pod() {
        let mut pod = pod();
        pod.dns = Dns { nameservers: vec!["1.1.1.1".to_owned()], ..Default::default() };
        pod.cgroup_parent = "/kubepods/pod1".to_owned();
        pod.annotations =
            [(INGRESS.to_owned(), "10M".to_owned()), (EGRESS.to_owned(), "junk".to_owned())].into();
        let all = capabilities(&pod, &["10.0.0.0/24".to_owned()]);
        assert_eq!(all["dns"]["servers"], json!(["1.1.1.1"]));
        assert_eq!(all["ipRanges"], json!([[{"subnet": "10.0.0.0/24"}]]));
        assert_eq!(all["bandwidth"], json!({"ingressRate": 10_000_000, "ingressBurst": BURST}));
        assert_eq!(all["cgroupPath"], json!("/kubepods/pod1"));
    }

    #[test]
    fn quantities_are_whole_numbers_with_a_suffix() {
        for (text, expected) in
            [("1Gi", Some(1 << 30)), ("500k", Some(500_000)), ("7", Some(7)), ("1.5M", None)]
        {
            assert_eq!(quantity(text), expected, "{text}");
        }
        assert_eq!(quantity("99999999999999999T"), None, "does not wrap");
        assert_eq!(quantity(""), None);
    }
}
