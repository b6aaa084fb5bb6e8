//! Real CNI plugins on the real kernel, executed: bridge, host-local, portmap, ptp.

use pinion_network::{NetworkError, PortMapping, Protocol};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use crate::support::{Node, ip, on_a_node, output, within};

const BRIDGE: &str = r#"{"cniVersion":"1.0.0","name":"test","plugins":[
  {"type":"bridge","bridge":"BRIDGE","isGateway":true,"ipMasq":true,
   "ipam":{"type":"host-local","dataDir":"LEASES","ranges":[[{"subnet":"SUBNET"}]],
           "routes":[{"dst":"0.0.0.0/0"}]}},
  {"type":"portmap","capabilities":{"portMappings":true}}]}"#;

const PTP: &str = r#"{"cniVersion":"0.4.0","name":"test","plugins":[
  {"type":"ptp","mtu":1400,
   "ipam":{"type":"host-local","dataDir":"LEASES","ranges":[[{"subnet":"SUBNET"}]]}}]}"#;

fn host_port(host_port: u16) -> PortMapping {
    PortMapping { host_port, container_port: 80, protocol: Protocol::Tcp, host_ip: None }
}

fn nat_rules_of(id: &str) -> usize {
    output("iptables", &["-w", "-t", "nat", "-S"]).lines().filter(|line| line.contains(id)).count()
}

#[test]
fn a_pod_gets_an_address_a_route_and_a_host_port_and_gives_all_back() {
    on_a_node(|| async {
        let node = Node::executing();
        node.configure(BRIDGE);
        assert_eq!(node.network.status().await.message, "", "the network is ready");
        let mut pod = node.pod("bridged");
        pod.port_mappings = vec![host_port(18080)];
        let attachment = node.network.add(&pod).await.unwrap();
        assert_eq!((attachment.network.as_str(), attachment.interface.as_str()), ("test", "eth0"));
        let address = attachment.ips[0];
        assert!(address.to_string().starts_with(&node.subnet));
        assert!(ip(&pod.netns, &["-br", "addr"]).contains(&address.to_string()));
        assert!(ip(&pod.netns, &["route"]).contains("default via"));
        assert_eq!(node.leased(), [address.to_string()]);
        assert!(nat_rules_of("bridged") > 0);

        // The port of the host leads into the pod.
        let listener = within(&pod.netns, || TcpListener::bind("0.0.0.0:80").unwrap());
        let served = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"from the pod").unwrap();
        });
        let gateway = format!("{}.0.1:18080", node.subnet);
        let mut stream =
            TcpStream::connect_timeout(&gateway.parse().unwrap(), Duration::from_secs(5)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "from the pod");
        served.join().unwrap();

        node.network.del(&pod, Some(&attachment)).await.unwrap();
        node.network.del(&pod, Some(&attachment)).await.unwrap();
        assert!(node.leased().is_empty() && node.records() == 0);
        assert_eq!(nat_rules_of("bridged"), 0);
        assert!(!ip(&pod.netns, &["link"]).contains("eth0"));
    });
}

#[test]
fn a_point_to_point_pod_can_be_attached_again_and_again() {
    on_a_node(|| async {
        let node = Node::executing();
        node.configure(PTP);
        let pod = node.pod("ptp");
        for _ in 0..3 {
            let attachment = node.network.add(&pod).await.unwrap();
            assert!(ip(&pod.netns, &["link", "show", "eth0"]).contains("mtu 1400"));
            assert_eq!(node.leased().len(), 1);
            node.network.check(&pod).await.unwrap();
            assert_eq!(node.network.attachment("ptp").unwrap(), Some(attachment));
            node.network.del(&pod, None).await.unwrap();
            assert!(node.leased().is_empty());
        }
    });
}

#[test]
fn an_add_after_a_crash_first_takes_the_old_attachment_back() {
    on_a_node(|| async {
        let node = Node::executing();
        node.configure(PTP);
        let pod = node.pod("twice");
        node.network.add(&pod).await.unwrap();
        let second = node.network.add(&pod).await.unwrap();
        assert_eq!(node.leased(), [second.ips[0].to_string()]);
        node.network.del(&pod, None).await.unwrap();
        assert!(node.leased().is_empty());
    });
}

#[test]
fn a_pod_is_detached_after_its_namespace_and_its_configuration_are_gone() {
    on_a_node(|| async {
        let node = Node::executing();
        // Without masquerading: the bridge plugin finds its rules through the interface only.
        node.configure(&BRIDGE.replace(r#""ipMasq":true"#, r#""ipMasq":false"#));
        let mut pod = node.pod("gone");
        pod.port_mappings = vec![host_port(18081)];
        let attachment = node.network.add(&pod).await.unwrap();
        assert!(nat_rules_of("gone") > 0);
        pinion_network::namespaces::remove(&node.ns_dir("gone")).unwrap();
        std::fs::remove_file(node.root.path().join("net.d/10-test.conflist")).unwrap();
        node.network.del(&pod, Some(&attachment)).await.unwrap();
        assert!(node.leased().is_empty() && node.records() == 0);
        assert_eq!(nat_rules_of("gone"), 0);
    });
}

#[test]
fn a_damaged_or_lost_record_is_replaced_by_the_configuration_in_force() {
    on_a_node(|| async {
        let node = Node::executing();
        node.configure(PTP);
        let pod = node.pod("lost");
        let record = node.root.path().join("records/lost.json");
        node.network.add(&pod).await.unwrap();
        std::fs::write(&record, "{\"net").unwrap();
        node.network.del(&pod, None).await.unwrap();
        assert!(node.leased().is_empty() && !record.exists());

        let attachment = node.network.add(&pod).await.unwrap();
        std::fs::remove_file(&record).unwrap();
        node.network.del(&pod, Some(&attachment)).await.unwrap();
        assert!(node.leased().is_empty());
    });
}

#[test]
fn twenty_pods_at_once_get_twenty_addresses_and_leave_nothing() {
    on_a_node(|| async {
        let node = Node::executing();
        node.configure(BRIDGE);
        let pods: Vec<_> = (0..20).map(|number| node.pod(&format!("p{number}"))).collect();
        let tasks: Vec<_> = pods
            .iter()
            .cloned()
            .map(|pod| {
                let network = node.network.clone();
                tokio::spawn(async move { network.add(&pod).await.unwrap().ips[0] })
            })
            .collect();
        let mut addresses = BTreeSet::new();
        for task in tasks {
            addresses.insert(task.await.unwrap());
        }
        assert_eq!(addresses.len(), 20);
        assert_eq!(node.leased().len(), 20);
        let tasks: Vec<_> = pods
            .into_iter()
            .map(|pod| {
                let network = node.network.clone();
                tokio::spawn(async move { network.del(&pod, None).await.unwrap() })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert!(node.leased().is_empty(), "{:?}", node.leased());
        assert_eq!(node.records(), 0);
        let links = output("ip", &["-o", "link", "show", "master", &node.bridge]);
        assert_eq!(links.lines().count(), 0, "{links}");
    });
}

#[test]
fn pods_the_server_forgot_are_collected() {
    on_a_node(|| async {
        let node = Node::executing();
        node.configure(PTP);
        let (kept, forgotten) = (node.pod("kept"), node.pod("forgotten"));
        node.network.add(&kept).await.unwrap();
        node.network.add(&forgotten).await.unwrap();
        pinion_network::namespaces::remove(&node.ns_dir("forgotten")).unwrap();
        let failures = node.network.collect(&["kept".to_owned()].into()).await;
        assert!(failures.is_empty(), "{failures:?}");
        assert_eq!((node.leased().len(), node.records()), (1, 1));
        node.network.del(&kept, None).await.unwrap();
        assert!(node.leased().is_empty());
    });
}

#[test]
fn a_full_subnet_is_an_error_that_names_the_plugin_and_leaves_nothing() {
    on_a_node(|| async {
        let node = Node::executing();
        node.configure(&PTP.replace(r#"{"subnet":"SUBNET"}"#, r#"{"subnet":"10.250.251.0/30"}"#));
        let (first, second) = (node.pod("first"), node.pod("second"));
        node.network.add(&first).await.unwrap();
        let error = node.network.add(&second).await.unwrap_err();
        let NetworkError::Add { source, cleanup, .. } = &error else { panic!("{error}") };
        assert!(cleanup.is_none(), "{error}");
        assert!(source.to_string().contains("\"ptp\" ADD"), "{source}");
        assert_eq!(node.leased().len(), 1);
        node.network.del(&first, None).await.unwrap();
        assert!(node.leased().is_empty() && node.records() == 0);
    });
}
