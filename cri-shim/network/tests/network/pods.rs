//! Built-in chains in the life of a node: traffic, many pods at once, crashes, meta-plugins.

use pinion_network::{Engine, NetworkError, PodNetwork, PortMapping, Protocol};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::support::{Node, ip, on_a_node, output, within};

const COMMON: &str = r#"{"cniVersion":"1.0.0","name":"test","plugins":[
  {"type":"bridge","bridge":"br0","isGateway":true,"ipMasq":true,"hairpinMode":true,
   "ipam":{"type":"host-local","dataDir":"LEASES","ranges":[[{"subnet":"10.77.0.0/16"}]],
           "routes":[{"dst":"0.0.0.0/0"}]}},
  {"type":"portmap","snat":true,"capabilities":{"portMappings":true}}]}"#;

/// The variable that makes a test binary one that only attaches.
const VICTIM: &str = "PINION_TEST_VICTIM";

fn map(host_port: u16, host_ip: Option<&str>) -> PortMapping {
    PortMapping {
        host_port,
        container_port: 80,
        protocol: Protocol::Tcp,
        host_ip: host_ip.map(|ip| ip.parse().unwrap()),
    }
}

/// Answers one connection in a pod with a greeting.
fn serve(pod: &PodNetwork, connections: usize) -> std::thread::JoinHandle<()> {
    let listener = within(&pod.netns, || TcpListener::bind("0.0.0.0:80").unwrap());
    let name = pod.sandbox_id.clone();
    std::thread::spawn(move || {
        for _ in 0..connections {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(name.as_bytes()).unwrap();
        }
    })
}

fn greeting(address: &str) -> String {
    let address: SocketAddr = address.parse().unwrap();
    let mut text = String::new();
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5));
    stream.unwrap().read_to_string(&mut text).unwrap();
    text
}

#[test]
fn pods_reach_each_other_and_are_reached_by_ports_of_the_node() {
    on_a_node(|| async {
        let node = Node::new();
        node.configure(COMMON);
        let mut server = node.pod("server");
        server.port_mappings = vec![map(18080, None), map(18081, Some("127.0.0.1"))];
        let client = node.pod("client");
        let attachment = node.network.add(&server).await.unwrap();
        node.network.add(&client).await.unwrap();
        let ip = attachment.ips[0];
        let served = serve(&server, 5);
        assert_eq!(within(&client.netns, || greeting(&format!("{ip}:80"))), "server");
        assert_eq!(greeting("10.77.0.1:18080"), "server", "by the node's address");
        assert_eq!(greeting("127.0.0.1:18081"), "server", "by localhost");
        assert_eq!(within(&client.netns, || greeting("10.77.0.1:18080")), "server");
        assert_eq!(within(&server.netns, || greeting("10.77.0.1:18080")), "server", "hairpin");
        served.join().unwrap();

        node.network.del(&server, None).await.unwrap();
        let refused = TcpStream::connect_timeout(
            &"10.77.0.1:18080".parse().unwrap(),
            Duration::from_millis(300),
        );
        assert!(refused.is_err(), "the port led to a pod that is gone");
        node.network.del(&client, None).await.unwrap();
        assert!(node.leased().is_empty() && node.records() == 0);
    });
}

fn nat_rules() -> usize {
    output("iptables-save", &["-t", "nat"]).lines().filter(|line| line.starts_with("-A")).count()
}

#[test]
fn fifty_pods_at_once_have_addresses_of_their_own_and_leave_nothing() {
    on_a_node(|| async {
        let node = Node::new();
        node.configure(COMMON);
        assert_eq!(node.network.status().await.engine, Some(Engine::Native));
        let pods: Vec<_> = (0..50u16)
            .map(|number| {
                let mut pod = node.pod(&format!("pod{number}"));
                pod.port_mappings = vec![map(20000 + number, None)];
                pod
            })
            .collect();
        let mut tasks = tokio::task::JoinSet::new();
        for pod in pods.clone() {
            let network = node.network.clone();
            tasks.spawn(async move { network.add(&pod).await.unwrap().ips[0] });
        }
        let ips: BTreeSet<_> = tasks.join_all().await.into_iter().collect();
        assert_eq!(ips.len(), 50);
        assert_eq!(node.leased().len(), 50);
        // three rules of each pod's own in each of two chains, one leading to each
        assert_eq!(nat_rules(), 5 + 50 * (3 + 4));
        for pod in pods.iter().step_by(7) {
            node.network.check(pod).await.unwrap();
        }
        let mut tasks = tokio::task::JoinSet::new();
        for pod in pods.clone() {
            let network = node.network.clone();
            tasks.spawn(async move { network.del(&pod, None).await.unwrap() });
        }
        tasks.join_all().await;
        assert_eq!(nat_rules(), 5, "only what pods share is left");
        assert!(node.leased().is_empty() && node.records() == 0);
        let began = Instant::now();
        while output("ip", &["link"]).contains("veth") {
            assert!(began.elapsed() < Duration::from_secs(20), "{}", output("ip", &["link"]));
            std::thread::sleep(Duration::from_millis(50));
        }
    });
}

#[test]
fn check_names_what_has_changed() {
    on_a_node(|| async {
        let node = Node::new();
        node.configure(COMMON);
        let mut pod = node.pod("a");
        pod.port_mappings = vec![map(18080, None)];
        let attachment = node.network.add(&pod).await.unwrap();
        node.network.check(&pod).await.unwrap();
        let address = format!("{}/16", attachment.ips[0]);
        let veth = attachment.result.interfaces[1].name.clone();
        let lease = node.leases().join("test").join(attachment.ips[0].to_string());
        let held = std::fs::read(&lease).unwrap();
        let dnat = output("iptables", &["-t", "nat", "-S", "CNI-HOSTPORT-DNAT"]);
        let rule = dnat.lines().nth(1).unwrap().replace("\\\"", "").replace("-A ", "");
        let chain = rule.rsplit(' ').next().unwrap().to_owned();
        for (harm, repair, part) in [
            (
                ("ip", vec!["link", "set", &veth, "nomaster"]),
                vec![("ip", vec!["link", "set", &veth, "master", "br0"])],
                "br0",
            ),
            (("iptables", vec!["-t", "nat", "-F", &chain]), vec![], &chain),
        ] {
            output(harm.0, &harm.1);
            let error = node.network.check(&pod).await.unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
            for (command, args) in repair {
                output(command, &args);
            }
        }
        std::fs::remove_file(&lease).unwrap();
        ip(&pod.netns, &["addr", "del", &address, "dev", "eth0"]);
        let error = node.network.check(&pod).await.unwrap_err();
        assert!(matches!(error, NetworkError::Changed { .. }), "{error}");
        assert!(error.to_string().contains("lost the address"), "{error}");
        std::fs::write(&lease, held).unwrap();
        node.network.del(&pod, None).await.unwrap();
    });
}

/// Not a test of its own: the process that the next one kills.
#[test]
fn victim() {
    let Ok(root) = std::env::var(VICTIM) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let network = Node::network(root.as_ref());
    let mut pod = Node::describe(root.as_ref(), "victim");
    pod.port_mappings = vec![map(18080, None)];
    loop {
        runtime.block_on(network.add(&pod)).unwrap();
    }
}

#[test]
fn whatever_a_killed_process_has_left_is_undone() {
    on_a_node(|| async {
        let node = Node::new();
        node.configure(COMMON);
        let root = node.root.path();
        let mut pod = node.pod("victim");
        pod.port_mappings = vec![map(18080, None)];
        node.network.add(&pod).await.unwrap(); // what pods share is there
        node.network.del(&pod, None).await.unwrap();
        let shared = nat_rules();
        let mut unfinished = 0;
        for round in 0..30u64 {
            let mut victim = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "pods::victim", "--nocapture"])
                .env(VICTIM, root)
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .spawn()
                .unwrap();
            // it attaches and detaches over and over; it is hit somewhere
            while node.records() == 0 {
                std::thread::sleep(Duration::from_micros(50));
            }
            std::thread::sleep(Duration::from_micros(round * 331));
            victim.kill().unwrap();
            victim.wait().unwrap();
            let attached = node.network.attachment("victim").unwrap();
            unfinished += usize::from(attached.is_none());
            if round % 3 == 2 {
                // the power has gone too: namespace and record with it
                pinion_network::namespaces::remove(&node.ns_dir("victim")).unwrap();
                let _ = std::fs::remove_file(root.join("records/victim.json"));
            }
            node.network.del(&pod, None).await.unwrap();
            assert_eq!(nat_rules(), shared, "round {round}");
            assert_eq!((node.leased(), node.records()), (Vec::new(), 0), "round {round}");
            if round % 3 == 2 {
                pod = PodNetwork { port_mappings: pod.port_mappings, ..node.pod("victim") };
            }
            let attachment = node.network.add(&pod).await.unwrap();
            assert!(ip(&pod.netns, &["addr"]).contains(&attachment.ips[0].to_string()));
            node.network.del(&pod, None).await.unwrap();
        }
        assert!(unfinished > 0, "no process was hit in the middle");
        let began = Instant::now();
        while output("ip", &["link"]).contains("veth") {
            assert!(began.elapsed() < Duration::from_secs(20), "{}", output("ip", &["link"]));
            std::thread::sleep(Duration::from_millis(50));
        }
    });
}

#[test]
fn leases_of_pods_that_are_gone_are_collected() {
    on_a_node(|| async {
        let node = Node::new();
        node.configure(&COMMON.replace("1.0.0", "1.1.0"));
        let (kept, lost) = (node.pod("kept"), node.pod("lost"));
        node.network.add(&kept).await.unwrap();
        node.network.add(&lost).await.unwrap();
        std::fs::write(node.leases().join("test/10.77.9.9"), "nobody\r\neth0").unwrap();
        let failures = node.network.collect(&BTreeSet::from(["kept".to_owned()])).await;
        assert!(failures.is_empty(), "{failures:?}");
        assert_eq!(node.leased().len(), 1);
        node.network.check(&kept).await.unwrap();
        node.network.del(&kept, None).await.unwrap();
    });
}

#[test]
fn the_result_is_cached_where_libcni_keeps_it() {
    on_a_node(|| async {
        let node = Node::new();
        node.configure(COMMON);
        let cached = node.root.path().join("records/results/test-a-eth0");
        for native in [true, false] {
            let network = node.network.with_native(native);
            let pod = node.pod("a");
            let attachment = network.add(&pod).await.unwrap();
            let text = std::fs::read_to_string(&cached).unwrap();
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(value["kind"], "cniCacheV1");
            assert_eq!(value["containerId"], "a");
            assert_eq!(value["networkName"], "test");
            assert_eq!(value["cniArgs"][1][0], "K8S_POD_NAMESPACE");
            let address = value["result"]["ips"][0]["address"].as_str().unwrap();
            assert_eq!(address, format!("{}/16", attachment.ips[0]));
            network.del(&pod, None).await.unwrap();
            assert!(!cached.exists());
            pinion_network::namespaces::remove(&node.ns_dir("a")).unwrap();
        }
    });
}

#[test]
fn a_meta_plugin_adds_a_macvlan_beside_the_bridge() {
    // What Multus does, in a shell: the default network's plugin, then a second interface.
    const META: &str = r#"input=$(cat)
    default='{"cniVersion":"1.0.0","name":"test","type":"bridge","bridge":"br0","isGateway":true,
      "ipam":{"type":"host-local","dataDir":"LEASES","subnet":"10.77.0.0/16"}}'
    second='{"cniVersion":"1.0.0","name":"second","type":"macvlan","master":"uplink",
      "ipam":{"type":"host-local","dataDir":"LEASES","subnet":"10.78.0.0/16"}}'
    call() { echo "$2" | "/usr/lib/cni/$1"; }
    case $CNI_COMMAND in
    VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}';;
    ADD) answer=$(call bridge "$default") || { echo "$answer"; exit 1; }
      CNI_IFNAME=net1 call macvlan "$second" > /dev/null || exit 1
      echo "$answer";;
    DEL) CNI_IFNAME=net1 call macvlan "$second" && call bridge "$default";;
    esac"#;
    on_a_node(|| async {
        let node = Node::new();
        output("ip", &["link", "add", "uplink", "type", "veth", "peer", "name", "switch"]);
        output("ip", &["link", "set", "uplink", "up"]);
        node.plugin("meta", &META.replace("LEASES", node.leases().to_str().unwrap()));
        node.configure(r#"{"cniVersion":"1.0.0","name":"test","plugins":[{"type":"meta"}]}"#);
        let status = node.network.status().await;
        let Some(Engine::Plugins { reason }) = status.engine else { panic!("{status:?}") };
        assert_eq!(reason, "plugin \"meta\": is not built in");
        let pod = node.pod("a");
        let attachment = node.network.add(&pod).await.unwrap();
        assert_eq!(attachment.ips.len(), 1, "the pod's address is eth0's: {attachment:?}");
        let addresses = ip(&pod.netns, &["-br", "addr"]);
        assert!(addresses.contains("10.77.0.") && addresses.contains("10.78.0."), "{addresses}");
        assert!(ip(&pod.netns, &["-d", "link", "show", "net1"]).contains("macvlan"));
        node.network.del(&pod, None).await.unwrap();
        let links = ip(&pod.netns, &["link"]);
        assert!(!links.contains("net1") && !links.contains("eth0"), "{links}");
        for network in ["test", "second"] {
            let dir = std::fs::read_dir(node.leases().join(network)).unwrap();
            let mut names = dir.flatten().map(|entry| entry.file_name().into_string().unwrap());
            assert!(!names.any(|name| name.starts_with("10.")), "leases of {network}");
        }
    });
}
