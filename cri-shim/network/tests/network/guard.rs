//! The non-interference guard against a plugin that meddles, and against pods in parallel.

use crate::support::{Node, on_a_node, output};

const EVIL: &str = r#"{"cniVersion":"1.0.0","name":"test","plugins":[
  {"type":"bridge","bridge":"br0","isGateway":true,"ipMasq":true,
   "ipam":{"type":"host-local","dataDir":"LEASES","subnet":"10.77.0.0/16"}},
  {"type":"evil"}]}"#;

/// Passes the result on, and sends a network of the node into nowhere.
const MEDDLE: &str = r#"input=$(cat)
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}';;
ADD) ip route add blackhole 10.99.0.0/16; ip link set uplink mtu 1400
     echo "$input" | sed 's/.*"prevResult"://; s/,"type":.*//';;
DEL) ip rule add pref 77 lookup 77;;
esac"#;

fn uplink() {
    output("ip", &["link", "add", "uplink", "type", "veth", "peer", "name", "switch"]);
    output("ip", &["link", "set", "uplink", "up"]);
}

#[test]
fn what_a_bad_plugin_does_to_the_node_is_reported_exactly() {
    on_a_node(|| async {
        uplink();
        let node = Node::new();
        node.plugin("evil", MEDDLE);
        node.configure(EVIL);
        let pod = node.pod("victim");
        node.network.add(&pod).await.unwrap();
        let reports = node.network.foreign_changes();
        assert_eq!(reports.len(), 1, "{reports:?}");
        assert_eq!(reports[0].pods, ["victim"]);
        let mut expected = vec![
            "removed: link uplink veth mtu 1500 up",
            "added: link uplink veth mtu 1400 up",
            "added: route 10.99.0.0/16 metric 0 table 254",
        ];
        let mut found: Vec<_> = reports[0].changes.iter().map(String::as_str).collect();
        expected.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, expected);
        node.network.del(&pod, None).await.unwrap();
        let reports = node.network.foreign_changes();
        assert_eq!(reports[0].changes, ["added: rule ip pref 77 lookup 77"]);
    });
}

#[test]
fn pods_in_parallel_are_not_taken_for_strangers() {
    for native in [true, false] {
        on_a_node(|| async {
            uplink();
            let node = Node::new();
            node.configure(&EVIL.replace(",\n  {\"type\":\"evil\"}", ""));
            let network = node.network.with_native(native);
            let count = if native { 30 } else { 8 };
            let pods: Vec<_> = (0..count).map(|number| node.pod(&format!("p{number}"))).collect();
            for attach in [true, false] {
                let mut tasks = tokio::task::JoinSet::new();
                for pod in pods.clone() {
                    let network = network.clone();
                    tasks.spawn(async move {
                        if attach {
                            network.add(&pod).await.unwrap();
                        } else {
                            network.del(&pod, None).await.unwrap();
                        }
                    });
                }
                tasks.join_all().await;
                assert_eq!(network.foreign_changes(), [], "native: {native}, {attach}");
            }
        });
    }
}

#[test]
fn a_stranger_s_change_beside_parallel_pods_is_reported_once() {
    on_a_node(|| async {
        let node = Node::new();
        node.plugin(
            "slow",
            "input=$(cat); case $CNI_COMMAND in ADD) sleep 0.3; \
            echo \"$input\" | sed 's/.*\"prevResult\"://; s/,\"type\":.*//';; esac",
        );
        node.configure(&EVIL.replace("evil", "slow"));
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..4 {
            let (network, pod) = (node.network.clone(), node.pod(&format!("p{number}")));
            tasks.spawn(async move { network.add(&pod).await.unwrap() });
        }
        tokio::time::sleep(std::time::Duration::from_millis(250)).await;
        output("ip", &["route", "add", "blackhole", "10.98.0.0/16"]);
        tasks.join_all().await;
        let reports = node.network.foreign_changes();
        assert_eq!(reports.len(), 1, "{reports:?}");
        assert_eq!(reports[0].changes, ["added: route 10.98.0.0/16 metric 0 table 254"]);
        assert_eq!(reports[0].pods.len(), 4, "{reports:?}");
    });
}
