//! Built-in chains against the real plugins: the same configuration must leave the same links,
//! addresses, routes, rules, leases and result, and either must be able to undo the other.

use pinion_network::{Attachment, Engine, Network, PodNetwork, PortMapping, Protocol};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::support::{Node, ip, on_a_node, output, within};

/// Bridge, masquerading and host ports: what most clusters without a CNI product run.
const COMMON: &str = r#"{"cniVersion":"1.0.0","name":"test","plugins":[
  {"type":"bridge","bridge":"br0","isGateway":true,"ipMasq":true,"hairpinMode":true,
   "ipam":{"type":"host-local","dataDir":"LEASES","ranges":[[{"subnet":"10.77.0.0/16"}]],
           "routes":[{"dst":"0.0.0.0/0"}]}},
  {"type":"portmap","snat":true,"capabilities":{"portMappings":true}}]}"#;

const DUAL: &str = r#"{"cniVersion":"0.4.0","name":"test","plugins":[
  {"type":"bridge","bridge":"br0","isDefaultGateway":true,"ipMasq":true,"mtu":1400,
   "dns":{"nameservers":["10.9.9.9"],"search":["a.example"]},
   "ipam":{"type":"host-local","dataDir":"LEASES",
     "ranges":[[{"subnet":"10.77.0.0/20","rangeStart":"10.77.0.9","rangeEnd":"10.77.0.99",
                 "gateway":"10.77.15.254"}],[{"subnet":"fd77::/64"}]]}},
  {"type":"portmap","capabilities":{"portMappings":true}}]}"#;

const PLAIN: &str = r#"{"cniVersion":"0.3.1","name":"test","plugins":[
  {"type":"bridge","bridge":"br0","promiscMode":true,
   "ipam":{"type":"host-local","dataDir":"LEASES","subnet":"10.77.0.0/24",
           "routes":[{"dst":"10.0.0.0/8","gw":"10.77.0.200"}]}}]}"#;

const POINT_TO_POINT: &str = r#"{"cniVersion":"1.0.0","name":"test","plugins":[
  {"type":"ptp","ipMasq":true,"mtu":1300,
   "ipam":{"type":"host-local","dataDir":"LEASES","ranges":[[{"subnet":"10.77.0.0/24"}]],
           "routes":[{"dst":"0.0.0.0/0"}]}},
  {"type":"portmap","snat":false,"capabilities":{"portMappings":true}}]}"#;

const ALL: [(&str, &str); 4] =
    [("common", COMMON), ("dual", DUAL), ("plain", PLAIN), ("ptp", POINT_TO_POINT)];

/// Ports of all protocols, more than one `multiport` match holds, and for single addresses.
fn mappings() -> Vec<PortMapping> {
    let map = |host_port, protocol, host_ip: Option<&str>| PortMapping {
        host_port,
        container_port: 80,
        protocol,
        host_ip: host_ip.map(|ip| ip.parse().unwrap()),
    };
    let mut all: Vec<_> = (9000..9017).map(|port| map(port, Protocol::Tcp, None)).collect();
    all.push(map(5353, Protocol::Udp, None));
    all.push(map(8080, Protocol::Tcp, Some("127.0.0.1")));
    all.push(map(8081, Protocol::Tcp, Some("fd77::1")));
    all.push(map(8082, Protocol::Tcp, Some("0.0.0.0")));
    all.push(map(3868, Protocol::Sctp, None));
    all
}

/// What can be seen of pods, node and leases; one text per topic.
type Picture = BTreeMap<String, String>;

/// Replaces what is different in every run: names and addresses of links, indexes.
fn plain(text: &str) -> String {
    let mut lines = Vec::new();
    for line in text.lines() {
        if line.starts_with('#') || line.trim().is_empty() {
            continue;
        }
        let mut words: Vec<String> = Vec::new();
        for word in line.split_whitespace().filter(|word| *word != "\\") {
            let mac = word.len() == 17 && word.matches(':').count() == 5;
            let bare = word.trim_end_matches([':', ',', '\\']);
            let bare = bare.split('@').next().unwrap_or_default();
            let veth = bare.len() == 12 && bare.starts_with("veth");
            words.push(match word {
                _ if mac => "MAC".to_owned(),
                _ if veth => "VETH".to_owned(),
                _ if bare.starts_with("fe80::") => "LINK-LOCAL".to_owned(),
                _ if word.starts_with("eth0@") => "eth0".to_owned(),
                _ if word.starts_with('[') && word.ends_with(']') => "[COUNT]".to_owned(),
                _ => word.to_owned(),
            });
        }
        if words.first().is_some_and(|word| word.trim_end_matches(':').parse::<u32>().is_ok()) {
            words.remove(0);
        }
        // The old plugin leaves links without a queue length, newer ones do not.
        if let Some(at) = words.iter().position(|word| word == "qlen") {
            words.drain(at..(at + 2).min(words.len()));
        }
        lines.push(words.join(" "));
    }
    lines.join("\n")
}

/// Settings that the plugins touch, as they are in the calling thread's namespace.
fn settings(link: &str) -> String {
    [
        "ipv6/conf/LINK/accept_dad",
        "ipv6/conf/LINK/accept_ra",
        "ipv4/conf/LINK/arp_notify",
        "ipv4/conf/LINK/route_localnet",
        "ipv4/ip_forward",
        "ipv6/conf/all/forwarding",
    ]
    .map(|key| {
        let path = format!("/proc/sys/net/{}", key.replace("LINK", link));
        format!("{key}={}", std::fs::read_to_string(path).unwrap_or_default())
    })
    .concat()
}

fn picture(node: &Node, pod: &PodNetwork) -> Picture {
    let ports = |text: &str| plain(text);
    let mut all = Picture::new();
    let mut put = |topic: &str, text: String| all.insert(topic.to_owned(), text);
    for (topic, args) in [
        ("links", &["-d", "-o", "link"][..]),
        ("addresses", &["-o", "addr"]),
        ("routes", &["route"]),
        ("routes of IPv6", &["-6", "route"]),
        ("rules", &["rule"]),
    ] {
        // an address says how it is until its detection is over
        let now = |text: String| plain(&text.replace(" tentative", ""));
        put(&format!("pod {topic}"), now(ip(&pod.netns, args)));
        if topic == "links" {
            let brief = output("ip", &["-br", "link"]);
            put("node links", plain(&brief));
            put("bridge ports", ports(&output("bridge", &["-d", "link"])));
        } else {
            put(&format!("node {topic}"), now(output("ip", args)));
        }
    }
    put("pod settings", within(&pod.netns, || settings("eth0")));
    put("node settings", settings("br0"));
    for command in ["iptables-save", "ip6tables-save"] {
        put(command, plain(&output(command, &["-t", "nat"])));
    }
    let leases = node.leases().join("test");
    let mut files: Vec<_> = std::fs::read_dir(&leases)
        .map(|dir| dir.flatten().map(|entry| entry.file_name().into_string().unwrap()).collect())
        .unwrap_or_default();
    files.sort();
    for file in files {
        let text = std::fs::read_to_string(leases.join(&file)).unwrap();
        put(&format!("lease file {file}"), text);
    }
    all
}

fn result_text(attachment: &Attachment, node: &Node) -> String {
    let text = serde_json::to_string_pretty(&attachment.result).unwrap();
    let root = node.root.path().to_str().unwrap();
    text.replace(root, "ROOT")
        .lines()
        .map(|line| {
            let hidden = ["\"mac\"", "\"name\": \"veth"];
            if hidden.iter().any(|key| line.contains(key)) { "…" } else { line }
        })
        .collect::<Vec<_>>()
        .join("\n")
}

async fn engine(network: &Network) -> Engine {
    network.status().await.engine.unwrap()
}

fn pod(node: &Node, ports: bool) -> PodNetwork {
    let mut pod = node.pod("pod1");
    if ports {
        pod.port_mappings = mappings();
    }
    pod
}

/// Portmap 1.1.1 looks for each family's chains in both families, so that its CHECK fails on
/// what its own ADD has made.
fn can_check(text: &str) -> bool {
    !text.contains("portmap")
}

/// What there is after ADD, and after DEL.
fn run(text: &'static str, native: bool) -> (Picture, Picture, String) {
    let mut pictures = None;
    on_a_node(|| async {
        let node = Node::new();
        node.configure(text);
        let network = node.network.with_native(native);
        assert_eq!(engine(&network).await == Engine::Native, native);
        let pod = pod(&node, text.contains("portmap"));
        let attachment = network.add(&pod).await.unwrap();
        let began = Instant::now();
        while !ip(&pod.netns, &["link", "show", "eth0"]).contains("state UP") {
            assert!(began.elapsed() < Duration::from_secs(5));
            std::thread::sleep(Duration::from_millis(10));
        }
        let attached = picture(&node, &pod);
        let result = result_text(&attachment, &node);
        if native || can_check(text) {
            network.check(&pod).await.unwrap();
        }
        network.del(&pod, None).await.unwrap();
        assert!(gone(&node, &pod), "{}", output("ip", &["link"]));
        std::thread::sleep(Duration::from_millis(1200)); // a bridge notices within a second
        pictures = Some((attached, picture(&node, &pod), result));
    });
    pictures.unwrap()
}

/// Waits until the pod's links are gone: a built-in DEL leaves that to the background.
fn gone(node: &Node, pod: &PodNetwork) -> bool {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(5) {
        let inside = ip(&pod.netns, &["link"]);
        let outside = output("ip", &["link"]);
        if !inside.contains("eth0") && !outside.contains("veth") {
            return node.leased().is_empty() && node.records() == 0;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

fn compare(name: &str, native: &Picture, plugins: &Picture) {
    for (topic, expected) in plugins {
        let found = native.get(topic).map_or("nothing", String::as_str);
        assert_eq!(found, expected, "{name}: {topic} (left: built-in, right: plugins)");
    }
    assert_eq!(native.keys().collect::<Vec<_>>(), plugins.keys().collect::<Vec<_>>(), "{name}");
}

#[test]
fn built_in_chains_leave_what_the_plugins_leave() {
    for (name, text) in ALL {
        let (attached, detached, result) = run(text, true);
        let (by_plugins, detached_by_plugins, expected) = run(text, false);
        assert_eq!(result, expected, "{name}");
        compare(name, &attached, &by_plugins);
        compare(&format!("{name} after DEL"), &detached, &detached_by_plugins);
    }
}

/// The pod's own chains are named after a hash; shared ones are called HOSTPORT.
fn own_rules() -> Vec<String> {
    let save = |command| output(command, &["-t", "nat"]);
    let all = save("iptables-save") + &save("ip6tables-save");
    all.lines()
        .filter(|line| {
            let words = line.split_whitespace();
            let mut chains = words.filter(|word| word.trim_start_matches(':').starts_with("CNI-"));
            chains.any(|chain| !chain.contains("HOSTPORT"))
        })
        .map(str::to_owned)
        .collect()
}

#[test]
fn either_undoes_what_the_other_has_done() {
    for (name, text) in ALL {
        for native_adds in [true, false] {
            on_a_node(|| async {
                let node = Node::new();
                node.configure(text);
                let pod = pod(&node, text.contains("portmap"));
                node.network.with_native(native_adds).add(&pod).await.unwrap();
                assert_eq!(own_rules().is_empty(), name == "plain");
                if !native_adds || can_check(text) {
                    node.network.with_native(!native_adds).check(&pod).await.unwrap();
                }
                node.network.with_native(!native_adds).del(&pod, None).await.unwrap();
                assert!(gone(&node, &pod), "{name}: {}", output("ip", &["link"]));
                assert_eq!(own_rules(), Vec::<String>::new(), "{name}, native: {native_adds}");
            });
        }
    }
}

#[test]
fn they_share_a_pool_of_addresses() {
    on_a_node(|| async {
        let node = Node::new();
        node.configure(&COMMON.replace("10.77.0.0/16", "10.77.0.0/29"));
        let mut ips = Vec::new();
        for (index, native) in [true, false, true, false, true].into_iter().enumerate() {
            let pod = node.pod(&format!("pod{index}"));
            let attachment = node.network.with_native(native).add(&pod).await.unwrap();
            ips.push(attachment.ips[0].to_string());
        }
        assert_eq!(ips, ["10.77.0.2", "10.77.0.3", "10.77.0.4", "10.77.0.5", "10.77.0.6"]);
        let pod = node.pod("late");
        for native in [true, false] {
            let error = node.network.with_native(native).add(&pod).await.unwrap_err();
            let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
            let deep = std::error::Error::source(&error).and_then(std::error::Error::source);
            let text = text + &deep.map(|deep| format!(": {deep}")).unwrap_or_default();
            assert!(text.contains("no IP addresses available in range set"), "{text}");
            assert!(!text.contains("taking it back failed"), "{text}");
            assert!(!ip(&pod.netns, &["link"]).contains("eth0"));
        }
    });
}
