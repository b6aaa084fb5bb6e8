//! Plugins that misbehave, and networks that are not ready.

use pinion_network::NetworkError;
use std::time::{Duration, Instant};

use crate::support::Node;

const FAKE: &str = r#"{"cniVersion":"1.1.0","name":"test","plugins":[
    {"type":"good"},{"type":"fake"}]}"#;

/// Answers ADD with an address, everything else with nothing, and notes each call.
const GOOD: &str = r#"cat >/dev/null; echo "good $CNI_COMMAND $CNI_NETNS" >> $(dirname $0)/calls
case $CNI_COMMAND in
ADD) echo '{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"/x"}],
    "ips":[{"address":"10.9.8.7/24","interface":0}]}';;
VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0"]}';;
esac"#;

fn calls(node: &Node) -> Vec<String> {
    let text = std::fs::read_to_string(node.root.path().join("bin/calls")).unwrap_or_default();
    text.lines().map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect()
}

#[tokio::test]
async fn a_failing_plugin_has_the_whole_chain_taken_back_in_reverse() {
    let node = Node::new();
    node.configure(FAKE);
    node.plugin("good", GOOD);
    node.plugin(
        "fake",
        r#"echo "fake $CNI_COMMAND" >> $(dirname $0)/calls
        [ $CNI_COMMAND = ADD ] && { echo '{"code":7,"msg":"no such luck"}'; exit 1; }; exit 0"#,
    );
    let pod = node.pod("a");
    let error = node.network.add(&pod).await.unwrap_err();
    let NetworkError::Add { source, cleanup, .. } = &error else { panic!("{error}") };
    assert_eq!(source.to_string(), r#"CNI plugin "fake" ADD: no such luck (code 7)"#);
    assert!(cleanup.is_none());
    assert_eq!(calls(&node), ["good ADD", "fake ADD", "fake DEL", "good DEL"]);
    assert_eq!(node.records(), 0);
}

#[tokio::test]
async fn garbage_silence_and_missing_addresses_are_errors() {
    for (script, part) in [
        ("[ $CNI_COMMAND = DEL ] || echo hello", "printed no JSON"),
        (r#"[ $CNI_COMMAND = DEL ] || echo '{"cniVersion":"1.1.0"}'"#, "no address"),
        (r#"[ $CNI_COMMAND = DEL ] || echo '{"ips":[]}'"#, "no cniVersion"),
        (r#"[ $CNI_COMMAND = DEL ] || echo '{"cniVersion":"0.0.7"}'"#, "0.0.7"),
        ("[ $CNI_COMMAND = DEL ] || exit 1", "exit status: 1"),
        ("[ $CNI_COMMAND = DEL ] || { yes | head -c 4000000; }", "more than"),
    ] {
        let node = Node::new();
        node.configure(FAKE);
        node.plugin("good", GOOD);
        node.plugin("fake", script);
        let pod = node.pod("a");
        let error = node.network.add(&pod).await.unwrap_err();
        let NetworkError::Add { source, cleanup, .. } = &error else { panic!("{error}") };
        assert!(source.to_string().contains(part), "{source} should name {part}");
        assert!(cleanup.is_none(), "{error}");
        assert_eq!(node.records(), 0);
    }
}

#[tokio::test]
async fn a_hanging_plugin_is_killed_and_del_can_be_repeated() {
    let node = Node::new();
    node.configure(FAKE);
    node.plugin("good", GOOD);
    node.plugin("fake", "sleep 600");
    let network = node.network.with_timeout(Duration::from_millis(300));
    let pod = node.pod("a");
    let began = Instant::now();
    let error = network.add(&pod).await.unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(10));
    let NetworkError::Add { source, cleanup, .. } = &error else { panic!("{error}") };
    assert!(matches!(**source, NetworkError::Timeout { .. }), "{source}");
    assert!(cleanup.is_some(), "DEL hung as well");
    assert_eq!(node.records(), 1, "what could not be taken back is remembered");
    assert!(calls(&node).contains(&"good DEL".to_owned()), "the other plugin was called");

    let error = network.del(&pod, None).await.unwrap_err();
    assert!(matches!(error, NetworkError::Del { .. }), "{error}");
    node.plugin("fake", "exit 0");
    network.del(&pod, None).await.unwrap();
    assert_eq!(node.records(), 0);
}

#[tokio::test]
async fn a_namespace_that_was_replaced_is_not_handed_to_plugins() {
    let node = Node::new();
    node.configure(FAKE);
    node.plugin("good", GOOD);
    node.plugin(
        "fake",
        r#"[ $CNI_COMMAND = ADD ] && exec sed 's/.*"prevResult"://; s/,"type":.*//'; exit 0"#,
    );
    let pod = node.pod("a");
    let attachment = node.network.add(&pod).await.unwrap();
    assert_eq!(attachment.ips, ["10.9.8.7".parse::<std::net::IpAddr>().unwrap()]);
    pinion_network::namespaces::remove(&node.ns_dir("a")).unwrap();
    std::fs::write(&pod.netns, "an ordinary file").unwrap();
    node.network.del(&pod, Some(&attachment)).await.unwrap();
    let text = std::fs::read_to_string(node.root.path().join("bin/calls")).unwrap();
    assert!(text.ends_with("good DEL \n"), "DEL got no namespace: {text}");
    let error = node.network.add(&pod).await.unwrap_err();
    assert!(error.to_string().contains("not a pinned namespace"), "{error}");
}

#[tokio::test]
async fn a_missing_plugin_stops_add_before_anything_is_done() {
    let node = Node::new();
    node.configure(FAKE);
    node.plugin("good", GOOD);
    let pod = node.pod("a");
    let error = node.network.add(&pod).await.unwrap_err();
    assert!(matches!(error, NetworkError::PluginMissing { .. }), "{error}");
    assert!(calls(&node).is_empty() && node.records() == 0);
}

#[tokio::test]
async fn status_says_what_is_wrong_and_where() {
    let node = Node::new();
    let status = node.network.status().await;
    assert!(status.ready && status.loopback_only, "{status:?}");
    assert!(status.message.contains("net.d"), "{status:?}");
    let strict = node.network.require_configuration();
    assert!(!strict.status().await.ready);
    assert!(matches!(strict.add(&node.pod("s")).await, Err(NetworkError::NotConfigured { .. })));

    node.configure("{\"cniVersion\": \"1.0.0\",");
    let status = node.network.status().await;
    assert_eq!((status.ready, status.reason.as_str()), (false, "NetworkConfigInvalid"));
    assert!(status.message.contains("10-test.conflist") && status.message.contains("line 1"));

    node.configure(FAKE);
    node.plugin("good", GOOD);
    let status = node.network.status().await;
    assert_eq!((status.ready, status.reason.as_str()), (false, "NetworkPluginMissing"));
    assert!(status.message.contains("\"fake\""), "{status:?}");

    node.plugin("fake", r#"echo '{"supportedVersions":["0.4.0"]}'"#);
    let status = node.network.status().await;
    assert_eq!(status.reason, "NetworkPluginVersion", "{status:?}");
    assert!(status.message.contains("0.4.0") && status.message.contains("1.1.0"), "{status:?}");

    std::thread::sleep(Duration::from_millis(20)); // a new modification time
    node.plugin(
        "fake",
        r#"[ $CNI_COMMAND = VERSION ] && { echo '{"supportedVersions":["1.1.0"]}'; exit; }
        echo '{"code":50,"msg":"the switch is on fire"}'; exit 1"#,
    );
    let status = node.network.status().await;
    assert_eq!(status.reason, "NetworkPluginNotReady", "{status:?}");
    assert!(status.message.contains("the switch is on fire"), "{status:?}");

    std::thread::sleep(Duration::from_millis(20));
    node.plugin("fake", GOOD);
    assert!(node.network.status().await.ready);
}

#[tokio::test]
async fn without_configuration_a_pod_has_loopback_and_nothing_to_give_back() {
    let node = Node::new();
    let pod = node.pod("lo");
    let attachment = node.network.add(&pod).await.unwrap();
    assert!(attachment.is_loopback_only() && attachment.ips.is_empty());
    node.network.del(&pod, Some(&attachment)).await.unwrap();
    assert_eq!(node.records(), 0);
}
