//! The server ends at the worst moments and comes back.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use std::fs;
use std::time::Duration;

use pinion_cri_proto::v1;
use support::{Client, Server, pod, shell};

const PODS: usize = 20;

async fn wait_until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    for _ in 0..500 {
        if done().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("never: {what}");
}

#[tokio::test]
async fn a_crash_loses_no_pod_no_exit_code_and_no_log_line() {
    let mut server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let logs = server.path("logs");
    let mut pods = Vec::new();
    for n in 0..PODS {
        let config = v1::PodSandboxConfig {
            log_directory: logs.join(n.to_string()).to_string_lossy().into_owned(),
            ..pod(&format!("crash-{n}"))
        };
        let id = client.run(&config).await.unwrap();
        // Half of them end while nobody listens.
        let script = if n % 2 == 0 {
            format!("sleep 1; echo done; exit {n}")
        } else {
            "sleep 1000".to_string()
        };
        let container = v1::ContainerConfig { log_path: "c.log".into(), ..shell("c", &script) };
        let container = client.launch(&id, &container, &config).await.unwrap();
        pods.push((id, container));
    }
    server.crash();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let took = server.spawn().await;
    println!("{PODS} pods recovered, serving after {took:?}");
    // Ten times as long where the processor is emulated.
    let budget = if std::env::var_os("PINION_TEST_EMULATED").is_some() { 20 } else { 2 };
    assert!(took < Duration::from_secs(budget), "{took:?}");

    let mut client = Client(server.runtime().await);
    let listed = client.0.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap();
    let listed = listed.into_inner().items;
    assert_eq!(listed.len(), PODS);
    assert!(listed.iter().all(|p| p.state() == v1::PodSandboxState::SandboxReady));
    for (n, (_, container)) in pods.iter().enumerate() {
        if n % 2 == 0 {
            let status = client.exited(container).await;
            assert_eq!(status.exit_code, n as i32);
            let log = fs::read_to_string(logs.join(format!("{n}/c.log"))).unwrap();
            assert!(log.contains("done"), "{log}");
        } else {
            let status = client.status(container).await.unwrap();
            assert_eq!(status.state(), v1::ContainerState::ContainerRunning);
            let out = client.exec(container, &["echo", "alive"], 10).await.unwrap();
            assert_eq!(out.stdout, b"alive\n");
        }
    }
    for (pod, _) in &pods {
        client.stop_pod(pod).await.unwrap();
        client.remove_pod(pod).await.unwrap();
    }
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn exits_are_seen_at_once_after_a_restart() {
    let mut server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let config = pod("later");
    let id = client.run(&config).await.unwrap();
    let c = client.launch(&id, &shell("c", "sleep 1000"), &config).await.unwrap();
    server.crash();
    server.spawn().await;
    let mut client = Client(server.runtime().await);
    client.stop(&c, 0).await.unwrap();
    assert_eq!(client.status(&c).await.unwrap().exit_code, 137);
    let other = client.launch(&id, &shell("d", "exit 4"), &config).await.unwrap();
    assert_eq!(client.exited(&other).await.exit_code, 4);
    client.remove_pod(&id).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

fn monitor_pid(server: &Server, pod: &str) -> rustix::process::Pid {
    let file = server.path("run/pods").join(pod).join("monitor.pid");
    let pid: i32 = fs::read_to_string(file).unwrap().trim().parse().unwrap();
    rustix::process::Pid::from_raw(pid).unwrap()
}

#[tokio::test]
async fn a_lost_monitor_ends_its_containers_but_not_its_pod() {
    let server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let config = pod("lost");
    let id = client.run(&config).await.unwrap();
    let c = client.launch(&id, &shell("c", "sleep 1000"), &config).await.unwrap();
    let monitor = monitor_pid(&server, &id);
    rustix::process::kill_process(monitor, rustix::process::Signal::KILL).unwrap();
    let status = client.exited(&c).await;
    assert_eq!(status.reason, "MonitorLost");
    wait_until("another monitor", async || {
        let file = server.path("run/pods").join(&id).join("monitor.pid");
        fs::read_to_string(file).is_ok_and(|t| t.trim() != monitor.as_raw_nonzero().to_string())
    })
    .await;
    let mut again = shell("c", "exit 5");
    again.metadata.as_mut().unwrap().attempt = 1;
    let mut made = client.create(&id, &again, &config).await;
    for _ in 0..50 {
        if made.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        made = client.create(&id, &again, &config).await;
    }
    let d = made.unwrap();
    client.start(&d).await.unwrap();
    assert_eq!(client.exited(&d).await.exit_code, 5);
    client.remove_pod(&id).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn a_monitor_lost_while_the_server_was_down_is_noticed() {
    let mut server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let config = pod("lost-late");
    let id = client.run(&config).await.unwrap();
    let c = client.launch(&id, &shell("c", "sleep 1000"), &config).await.unwrap();
    let monitor = monitor_pid(&server, &id);
    server.crash();
    rustix::process::kill_process(monitor, rustix::process::Signal::KILL).unwrap();
    server.spawn().await;
    let mut client = Client(server.runtime().await);
    let status = client.status(&c).await.unwrap();
    assert_eq!(status.state(), v1::ContainerState::ContainerExited);
    assert_eq!(status.reason, "MonitorLost");
    client.remove_pod(&id).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn a_crash_in_the_middle_of_anything_leaves_nothing() {
    let mut server = Server::start().await;
    server.load_image().await;
    for delay in [0, 3, 8, 15, 30, 60] {
        let mut client = Client(server.runtime().await);
        let config = pod(&format!("middle-{delay}"));
        let task = tokio::spawn(async move {
            let id = client.run(&config).await?;
            client.launch(&id, &shell("c", "sleep 1000"), &config).await
        });
        tokio::time::sleep(Duration::from_millis(delay)).await;
        server.crash();
        // Whatever the client was told, or not told.
        let _ = task.await.unwrap();
        server.spawn().await;
        let mut client = Client(server.runtime().await);
        let pods = client.0.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap();
        for pod in pods.into_inner().items {
            client.stop_pod(&pod.id).await.unwrap();
            client.remove_pod(&pod.id).await.unwrap();
        }
        assert_eq!(server.leftovers(), Vec::<String>::new(), "after {delay} ms");
    }
}

#[tokio::test]
async fn a_second_server_does_not_start_on_the_same_directory() {
    let server = Server::start().await;
    let output = std::process::Command::new(support::piniond())
        .arg("--config")
        .arg(server.path("config.toml"))
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("another piniond"), "{text}");
}
