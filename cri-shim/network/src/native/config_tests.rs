//! Which configurations are taken, and why others are not.

use super::*;
use crate::cni::Version;
use serde_json::json;

fn list(plugins: &Value) -> NetworkList {
    let plugins = plugins.as_array().unwrap().iter().map(|plugin| PluginConfig {
        kind: plugin["type"].as_str().unwrap().to_owned(),
        object: plugin.as_object().unwrap().clone(),
    });
    NetworkList {
        version: Version::V1_0_0,
        name: "net".to_owned(),
        disable_check: false,
        plugins: plugins.collect(),
    }
}

fn bridge(more: &Value) -> Value {
    let mut plugin = json!({
        "type": "bridge", "bridge": "br0", "isGateway": true, "ipMasq": true,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.1.0.0/16"}]],
                 "routes": [{"dst": "0.0.0.0/0"}]},
    });
    plugin.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    plugin
}

#[test]
fn the_common_chain_is_taken_with_all_it_asks_for() {
    let portmap = json!({"type": "portmap", "snat": true, "capabilities": {"portMappings": true}});
    let plan = plan(&list(&json!([bridge(&json!({"hairpinMode": true})), portmap]))).unwrap();
    let Link::Bridge(bridge) = &plan.link else { panic!() };
    assert!(bridge.is_gateway && bridge.hairpin && !bridge.is_default_gateway);
    assert_eq!(bridge.name, "br0");
    assert!(plan.masquerade);
    let range = &plan.ipam.sets[0][0];
    assert_eq!(range.first.to_string(), "10.1.0.1");
    assert_eq!(range.last.to_string(), "10.1.255.254");
    assert_eq!(range.gateway.to_string(), "10.1.0.1");
    assert_eq!(plan.portmap, Some(Portmap { snat: true, mark: 0x2000, wanted: true }));
    assert_eq!(plan.ipam.data_dir, PathBuf::from(LEASES));
}

#[test]
fn what_is_not_done_here_is_named() {
    let refused = |plugins: Value| plan(&list(&plugins)).unwrap_err();
    for (more, part) in [
        (json!({"vlan": 7}), "vlan"),
        (json!({"macspoofchk": true}), "macspoofchk"),
        (json!({"vlanTrunk": []}), "vlanTrunk"),
        (json!({"isgateway": true}), "isgateway"),
        (json!({"ipMasqBackend": "nftables"}), "nftables"),
        (json!({"args": {"cni": {}}}), "args"),
        (json!({"isGateway": "yes"}), "invalid type"),
        (json!({"hairpinMode": true, "promiscMode": true}), "promiscMode"),
        (json!({"ipam": {"type": "dhcp"}}), "dhcp"),
        (json!({"ipam": {}}), "ipam"),
        (json!({"ipam": {"type": "host-local", "resolvConf": "/x"}}), "resolvConf"),
        (json!({"ipam": {"type": "host-local"}}), "no ranges"),
        (json!({"ipam": {"type": "host-local", "subnet": "10.1.0.9/16"}}), "host bits"),
        (json!({"ipam": {"type": "host-local", "subnet": "10.1.0.0/31"}}), "too small"),
        (
            json!({"ipam": {"type": "host-local", "subnet": "10.1.0.0/16",
                "routes": [{"dst": "0.0.0.0/0", "mtu": 1400}]}}),
            "mtu",
        ),
        (
            json!({"ipam": {"type": "host-local",
                "ranges": [[{"subnet": "10.1.0.0/16"}], [{"subnet": "10.1.4.0/24"}]]}}),
            "overlap",
        ),
    ] {
        let reason = refused(json!([bridge(&more)]));
        assert!(reason.contains(part) && reason.contains("\"bridge\""), "{more}: {reason}");
    }
    let good = bridge(&json!({}));
    assert!(refused(json!([good, {"type": "calico"}])).contains("\"calico\": is not built in"));
    assert!(refused(json!([good, good])).contains("usual place"));
    assert!(refused(json!([{"type": "portmap"}, good])).contains("usual place"));
    assert!(refused(json!([good, {"type": "portmap", "masqAll": true}])).contains("masqAll"));
    assert!(
        refused(json!([good, {"type": "portmap", "conditionsV4": ["-d", "x"]}]))
            .contains("conditions")
    );
    assert!(refused(json!([])).contains("no interface"));
}

#[test]
fn point_to_point_takes_no_key_of_bridges() {
    let ipam = json!({"type": "host-local", "subnet": "10.1.0.0/24"});
    let taken = plan(&list(&json!([{"type": "ptp", "mtu": 1400, "ipam": ipam}]))).unwrap();
    assert_eq!((taken.link, taken.mtu), (Link::PointToPoint, 1400));
    let reason = plan(&list(&json!([{"type": "ptp", "bridge": "x", "ipam": ipam}]))).unwrap_err();
    assert!(reason.contains("bridge"), "{reason}");
}

#[test]
fn the_node_s_ranges_come_first() {
    let plugin = bridge(&json!({"capabilities": {"ipRanges": true}}));
    let plan = plan(&list(&json!([plugin]))).unwrap();
    let ranges = json!([[{"subnet": "10.9.0.0/24"}], [{"subnet": "fd00::/64"}]]);
    let ipam = plan.ipam.with_node_ranges(Some(&ranges)).unwrap();
    let subnets: Vec<_> = ipam.sets.iter().map(|set| set[0].subnet.to_string()).collect();
    assert_eq!(subnets, ["10.9.0.0/24", "fd00::/64", "10.1.0.0/16"]);
    assert_eq!(ipam.sets[1][0].last.to_string(), "fd00::ffff:ffff:ffff:ffff");
    let same = json!([[{"subnet": "10.1.0.0/16"}]]);
    assert!(plan.ipam.with_node_ranges(Some(&same)).unwrap_err().contains("overlap"));
}
