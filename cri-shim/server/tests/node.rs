//! What the server tells of pods and of the node: statistics, metrics, events, receipts.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use std::collections::HashSet;
use std::fs;
use std::time::Duration;

use pinion_cri_proto::{admin, v1};
use support::{Client, Server, pod, shell};
use tokio_stream::StreamExt;
use tonic::Code;

#[tokio::test]
async fn statistics_and_metrics_are_those_of_the_kernel() {
    let server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let config = pod("stats");
    let pod = client.run(&config).await.unwrap();
    let c = client.launch(&pod, &shell("c", "while :; do :; done"), &config).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;

    let list = client.0.list_container_stats(v1::ListContainerStatsRequest::default()).await;
    let stats = list.unwrap().into_inner().stats;
    assert_eq!(stats[0].attributes.as_ref().unwrap().id, c);
    let used = stats[0].cpu.as_ref().unwrap().usage_core_nano_seconds.unwrap().value;
    assert!(used > 50_000_000, "{used}");
    tokio::time::sleep(Duration::from_millis(600)).await;
    let one = client.0.container_stats(v1::ContainerStatsRequest { container_id: c.clone() });
    let cpu = one.await.unwrap().into_inner().stats.unwrap().cpu.unwrap();
    assert!(cpu.usage_nano_cores.is_some());

    let request = v1::PodSandboxStatsRequest { pod_sandbox_id: pod.clone() };
    let stats = client.0.pod_sandbox_stats(request).await.unwrap().into_inner().stats.unwrap();
    let linux = stats.linux.unwrap();
    assert_eq!(linux.containers.len(), 1);
    assert!(linux.network.is_some());

    let described = client.0.list_metric_descriptors(v1::ListMetricDescriptorsRequest::default());
    let described = described.await.unwrap().into_inner().descriptors;
    let metrics = client.0.list_pod_sandbox_metrics(v1::ListPodSandboxMetricsRequest::default());
    let metrics = metrics.await.unwrap().into_inner().pod_metrics;
    let names: HashSet<String> =
        metrics[0].container_metrics[0].metrics.iter().map(|m| m.name.clone()).collect();
    assert!(names.contains("container_cpu_usage_seconds_total"));
    assert!(names.contains("container_processes"));
    for metric in &metrics[0].container_metrics[0].metrics {
        let family = described.iter().find(|d| d.name == metric.name).unwrap();
        assert_eq!(family.label_keys.len(), metric.label_values.len(), "{}", metric.name);
    }
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn events_tell_a_container_s_life_in_order() {
    let server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let mut events =
        client.0.get_container_events(v1::GetEventsRequest::default()).await.unwrap().into_inner();
    let config = pod("events");
    let pod = client.run(&config).await.unwrap();
    let c = client.launch(&pod, &shell("c", "sleep 0.2; exit 3"), &config).await.unwrap();
    client.exited(&c).await;
    client.remove(&c).await.unwrap();
    client.stop_pod(&pod).await.unwrap();
    client.remove_pod(&pod).await.unwrap();
    let mut seen = Vec::new();
    while let Ok(Some(event)) = tokio::time::timeout(Duration::from_secs(2), events.next()).await {
        let event = event.unwrap();
        let who = if event.container_id == c { "container" } else { "pod" };
        seen.push((who, event.container_event_type()));
        if seen.len() == 8 {
            break;
        }
    }
    use v1::ContainerEventType::*;
    let expected = vec![
        ("pod", ContainerCreatedEvent),
        ("pod", ContainerStartedEvent),
        ("container", ContainerCreatedEvent),
        ("container", ContainerStartedEvent),
        ("container", ContainerStoppedEvent),
        ("container", ContainerDeletedEvent),
        ("pod", ContainerStoppedEvent),
        ("pod", ContainerDeletedEvent),
    ];
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn containers_share_a_pid_namespace_when_the_pod_says_so() {
    let server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let mut config = pod("shared");
    config.linux.as_mut().unwrap().security_context = None;
    let pod = client.run(&config).await.unwrap();
    let mut a = shell("a", "sleep 1111");
    let mut b = shell("b", "sleep 2222");
    a.linux = None;
    b.linux = None;
    client.launch(&pod, &a, &config).await.unwrap();
    let b = client.launch(&pod, &b, &config).await.unwrap();
    let out = client.exec(&b, &["ps"], 10).await.unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(text.contains("sleep 1111") && text.contains("/init"), "{text}");
    client.stop_pod(&pod).await.unwrap();
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn pods_get_addresses_from_real_plugins_and_give_them_back() {
    let server = Server::start().await;
    server.load_image().await;
    let name = server.path("").file_name().unwrap().to_string_lossy().into_owned();
    let bridge = format!("b{}", name.to_lowercase());
    let leases = server.path("leases");
    let conflist = serde_json::json!({
        "cniVersion": "1.0.0", "name": name,
        "plugins": [{
            "type": "bridge", "bridge": bridge, "isGateway": true,
            "ipam": { "type": "host-local", "dataDir": leases, "ranges": [[{ "subnet": "10.213.0.0/24" }]] },
        }],
    });
    fs::write(server.path("cni/10-test.conflist"), conflist.to_string()).unwrap();
    let mut client = Client(server.runtime().await);
    let config = pod("net");
    let pod = client.run(&config).await.unwrap();
    let request = v1::PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: true };
    let status = client.0.pod_sandbox_status(request).await.unwrap().into_inner().status.unwrap();
    let ip = status.network.unwrap().ip;
    assert!(ip.starts_with("10.213.0."), "{ip}");
    let c = client.launch(&pod, &shell("c", "sleep 1000"), &config).await.unwrap();
    let hosts = client.exec(&c, &["cat", "/etc/hosts"], 10).await.unwrap();
    assert!(String::from_utf8_lossy(&hosts.stdout).contains(&ip));
    client.stop_pod(&pod).await.unwrap();
    assert!(!leases.join(&name).join(&ip).exists());
    client.remove_pod(&pod).await.unwrap();
    std::process::Command::new("ip").args(["link", "del", &bridge]).status().unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn receipts_are_honest_and_a_strict_pod_is_refused_with_the_reason() {
    let server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let v2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();

    let config = pod("plain");
    let plain = client.run_with(&config, "pinion").await.unwrap();
    let mut exclusive = shell("c", "sleep 1000");
    exclusive.linux.as_mut().unwrap().resources = Some(v1::LinuxContainerResources {
        cpu_shares: 1024,
        cpuset_cpus: "1".into(),
        cpuset_mems: "0".into(),
        ..Default::default()
    });
    let c = client.launch(&plain, &exclusive, &config).await.unwrap();
    let request = admin::ReceiptsRequest { id: c.clone() };
    let receipts = server.admin().await.receipts(request).await.unwrap().into_inner().receipts;
    let receipt: serde_json::Value = serde_json::from_str(&receipts[0].json).unwrap();
    println!("{receipt:#}");
    if !v2 {
        assert_eq!(receipt["verdict"], "degraded");
    }
    let owners = server.admin().await.topology(admin::TopologyRequest {}).await.unwrap();
    let owners = owners.into_inner().owners;
    assert_eq!((owners[0].cpus.as_str(), owners[0].exclusive), ("1", true));
    client.remove_pod(&plain).await.unwrap();

    let config = pod("strict");
    let strict = client.run_with(&config, "pinion-strict").await.unwrap();
    let outcome = async {
        let id = client.create(&strict, &exclusive, &config).await?;
        client.start(&id).await
    }
    .await;
    if v2 {
        println!("strict on cgroup v2: {outcome:?}");
    } else {
        println!("not possible here: cpuset partitions need cgroup v2");
        let error = outcome.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition);
        assert!(error.message().contains("exclusive-cpus"), "{error}");
    }
    client.remove_pod(&strict).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn hugepages_nobody_can_have_are_refused_at_create() {
    let server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let config = pod("huge");
    let pod = client.run(&config).await.unwrap();
    let mut greedy = shell("c", "sleep 1000");
    greedy.linux.as_mut().unwrap().resources = Some(v1::LinuxContainerResources {
        hugepage_limits: vec![v1::HugepageLimit { page_size: "2MB".into(), limit: 1 << 50 }],
        ..Default::default()
    });
    let error = client.create(&pod, &greedy, &config).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("hugepages"), "{error}");
    client.remove_pod(&pod).await.unwrap();
}
