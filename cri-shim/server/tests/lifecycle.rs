//! A pod from RunPodSandbox to RemovePodSandbox, on this host, with every part real.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use std::fs;
use std::time::{Duration, Instant};

use pinion_cri_proto::v1;
use support::{Client, Server, pod, shell};
use tonic::Code;

async fn server() -> (Server, Client) {
    let server = Server::start().await;
    server.load_image().await;
    let client = Client(server.runtime().await);
    (server, client)
}

#[tokio::test]
async fn a_pod_lives_and_leaves_nothing_behind() {
    let (server, mut client) = server().await;
    let logs = server.path("logs");
    let config =
        v1::PodSandboxConfig { log_directory: logs.to_string_lossy().into_owned(), ..pod("life") };
    let pod = client.run(&config).await.unwrap();
    let script = "echo hello; echo oops >&2; trap 'exit 7' TERM; while :; do sleep 0.1; done";
    let container = v1::ContainerConfig { log_path: "app.log".into(), ..shell("app", script) };
    let id = client.create(&pod, &container, &config).await.unwrap();
    assert_eq!(client.status(&id).await.unwrap().state(), v1::ContainerState::ContainerCreated);
    client.start(&id).await.unwrap();
    assert_eq!(client.status(&id).await.unwrap().state(), v1::ContainerState::ContainerRunning);

    let out =
        client.exec(&id, &["/bin/sh", "-c", "echo out; echo err >&2; exit 3"], 10).await.unwrap();
    assert_eq!((out.stdout.as_slice(), out.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(out.exit_code, 3);
    let out = client.exec(&id, &["hostname"], 10).await.unwrap();
    assert_eq!(out.stdout, b"life\n");

    let log = fs::read_to_string(logs.join("app.log")).unwrap();
    assert!(log.contains(" stdout F hello\n") && log.contains(" stderr F oops\n"), "{log}");

    client.stop(&id, 10).await.unwrap();
    let status = client.status(&id).await.unwrap();
    assert_eq!(status.state(), v1::ContainerState::ContainerExited);
    assert_eq!((status.exit_code, status.reason.as_str()), (7, "Error"));
    client.remove(&id).await.unwrap();
    assert_eq!(client.status(&id).await.unwrap_err().code(), Code::NotFound);
    client.stop_pod(&pod).await.unwrap();
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn an_exec_past_its_time_is_killed_whole() {
    let (_server, mut client) = server().await;
    let config = pod("deadline");
    let pod = client.run(&config).await.unwrap();
    let id = client.launch(&pod, &shell("app", "sleep 1000"), &config).await.unwrap();
    let began = Instant::now();
    let error =
        client.exec(&id, &["/bin/sh", "-c", "sleep 4321 & sleep 4321"], 1).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!(error.message().contains("timed out"), "{}", error.message());
    assert!(began.elapsed() < Duration::from_secs(5));
    let left = client
        .exec(&id, &["/bin/sh", "-c", "ps | grep 4321 | grep -v grep; true"], 5)
        .await
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&left.stdout), "");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn repeated_requests_are_harmless() {
    let (server, mut client) = server().await;
    let config = pod("again");
    let mut second = Client(server.runtime().await);
    let (a, b) = tokio::join!(client.run(&config), second.run(&config));
    let pod = a.unwrap();
    assert_eq!(pod, b.unwrap());
    assert_eq!(client.run(&config).await.unwrap(), pod);

    let app = shell("app", "sleep 1000");
    let (a, b) =
        tokio::join!(client.create(&pod, &app, &config), second.create(&pod, &app, &config));
    let id = a.unwrap();
    assert_eq!(id, b.unwrap());
    let other = client.create(&pod, &shell("app", "true"), &config).await.unwrap_err();
    assert_eq!(other.code(), Code::AlreadyExists);

    client.start(&id).await.unwrap();
    for _ in 0..2 {
        client.stop(&id, 0).await.unwrap();
    }
    for _ in 0..2 {
        client.remove(&id).await.unwrap();
    }
    for _ in 0..2 {
        client.stop_pod(&pod).await.unwrap();
    }
    for _ in 0..2 {
        client.remove_pod(&pod).await.unwrap();
    }
    client.stop("no-such-container", 0).await.unwrap();
    client.stop_pod("no-such-pod").await.unwrap();
}

#[tokio::test]
async fn a_container_that_ignores_its_stop_signal_is_killed() {
    let (_server, mut client) = server().await;
    let config = pod("deaf");
    let pod = client.run(&config).await.unwrap();
    let id = client
        .launch(&pod, &shell("app", "trap '' TERM; while :; do sleep 0.1; done"), &config)
        .await
        .unwrap();
    let began = Instant::now();
    client.stop(&id, 1).await.unwrap();
    assert!((1..4).contains(&began.elapsed().as_secs()));
    assert_eq!(client.status(&id).await.unwrap().exit_code, 137);
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn output_without_end_is_cut_at_the_limit() {
    let (server, mut client) = server().await;
    let config = pod("flood");
    let pod = client.run(&config).await.unwrap();
    let id = client.launch(&pod, &shell("app", "sleep 1000"), &config).await.unwrap();
    let flood = ["/bin/sh", "-c", "dd if=/dev/zero bs=1M count=40 2>/dev/null"];
    let out = client.exec(&id, &flood, 20).await.unwrap();
    assert!(out.stdout.len() <= 16 << 20 && out.stdout.len() > 15 << 20, "{}", out.stdout.len());
    assert_eq!(out.exit_code, 0);
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    println!("{}", status.lines().find(|l| l.starts_with("VmRSS")).unwrap());
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn a_failed_create_leaves_nothing() {
    let (server, mut client) = server().await;
    let config = pod("broken");
    let pod = client.run(&config).await.unwrap();
    let mut bad = shell("app", "true");
    bad.command = vec!["/no/such/program".into()];
    match client.create(&pod, &bad, &config).await {
        Err(error) => assert!(error.message().contains("no/such/program"), "{error}"),
        // Runtimes look for the program in create or in start.
        Ok(id) => {
            let error = client.start(&id).await.unwrap_err();
            assert!(error.message().contains("no/such/program"), "{error}");
            client.remove(&id).await.unwrap();
        }
    }
    let missing = v1::ContainerConfig {
        image: Some(v1::ImageSpec { image: "localhost/nothing".into(), ..Default::default() }),
        ..shell("other", "true")
    };
    assert_eq!(client.create(&pod, &missing, &config).await.unwrap_err().code(), Code::NotFound);
    // The name is free again.
    let id = client.launch(&pod, &shell("app", "true"), &config).await.unwrap();
    let status = client.exited(&id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn an_unknown_handler_is_refused_with_the_known_ones() {
    let (_server, mut client) = server().await;
    let error = client.run_with(&pod("odd"), "kata").await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("pinion-strict"), "{error}");
}

#[tokio::test]
async fn every_call_of_the_api_is_answered() {
    let (server, client) = server().await;
    let mut api = client.0;
    let mut calls = 0;
    let mut refused: Vec<&str> = Vec::new();
    let mut note = |name: &'static str, code: Option<Code>| {
        calls += 1;
        if code == Some(Code::Unimplemented) {
            refused.push(name);
        }
    };
    macro_rules! call {
        ($name:literal, $method:ident, $request:ident) => {
            note($name, api.$method(v1::$request::default()).await.err().map(|e| e.code()));
        };
    }
    call!("Attach", attach, AttachRequest);
    call!("CheckpointContainer", checkpoint_container, CheckpointContainerRequest);
    call!("CheckpointPod", checkpoint_pod, CheckpointPodRequest);
    call!("ContainerStats", container_stats, ContainerStatsRequest);
    call!("ContainerStatus", container_status, ContainerStatusRequest);
    call!("CreateContainer", create_container, CreateContainerRequest);
    call!("Exec", exec, ExecRequest);
    call!("ExecSync", exec_sync, ExecSyncRequest);
    call!("GetContainerEvents", get_container_events, GetEventsRequest);
    call!("ListContainerStats", list_container_stats, ListContainerStatsRequest);
    call!("ListContainers", list_containers, ListContainersRequest);
    call!("ListMetricDescriptors", list_metric_descriptors, ListMetricDescriptorsRequest);
    call!("ListPodSandbox", list_pod_sandbox, ListPodSandboxRequest);
    call!("ListPodSandboxMetrics", list_pod_sandbox_metrics, ListPodSandboxMetricsRequest);
    call!("ListPodSandboxStats", list_pod_sandbox_stats, ListPodSandboxStatsRequest);
    call!("PodSandboxStats", pod_sandbox_stats, PodSandboxStatsRequest);
    call!("PodSandboxStatus", pod_sandbox_status, PodSandboxStatusRequest);
    call!("PortForward", port_forward, PortForwardRequest);
    call!("RemoveContainer", remove_container, RemoveContainerRequest);
    call!("RemovePodSandbox", remove_pod_sandbox, RemovePodSandboxRequest);
    call!("ReopenContainerLog", reopen_container_log, ReopenContainerLogRequest);
    call!("RestorePod", restore_pod, RestorePodRequest);
    call!("RunPodSandbox", run_pod_sandbox, RunPodSandboxRequest);
    call!("RuntimeConfig", runtime_config, RuntimeConfigRequest);
    call!("StartContainer", start_container, StartContainerRequest);
    call!("Status", status, StatusRequest);
    call!("StopContainer", stop_container, StopContainerRequest);
    call!("StopPodSandbox", stop_pod_sandbox, StopPodSandboxRequest);
    call!("StreamContainerStats", stream_container_stats, StreamContainerStatsRequest);
    call!("StreamContainers", stream_containers, StreamContainersRequest);
    call!("StreamPodSandboxMetrics", stream_pod_sandbox_metrics, StreamPodSandboxMetricsRequest);
    call!("StreamPodSandboxStats", stream_pod_sandbox_stats, StreamPodSandboxStatsRequest);
    call!("StreamPodSandboxes", stream_pod_sandboxes, StreamPodSandboxesRequest);
    call!("UpdateContainerResources", update_container_resources, UpdateContainerResourcesRequest);
    call!(
        "UpdatePodSandboxResources",
        update_pod_sandbox_resources,
        UpdatePodSandboxResourcesRequest
    );
    call!("UpdateRuntimeConfig", update_runtime_config, UpdateRuntimeConfigRequest);
    call!("Version", version, VersionRequest);
    let mut api = server.images().await;
    macro_rules! call {
        ($name:literal, $method:ident, $request:ident) => {
            note($name, api.$method(v1::$request::default()).await.err().map(|e| e.code()));
        };
    }
    call!("ImageFsInfo", image_fs_info, ImageFsInfoRequest);
    call!("ImageStatus", image_status, ImageStatusRequest);
    call!("ListImages", list_images, ListImagesRequest);
    call!("PullImage", pull_image, PullImageRequest);
    call!("RemoveImage", remove_image, RemoveImageRequest);
    call!("StreamImages", stream_images, StreamImagesRequest);
    assert_eq!(refused, Vec::<&str>::new());
    assert_eq!(calls, 43);
}

#[tokio::test]
async fn limits_change_in_place() {
    let (server, mut client) = server().await;
    let config = pod("resize");
    let pod = client.run(&config).await.unwrap();
    let id = client.launch(&pod, &shell("app", "sleep 1000"), &config).await.unwrap();
    let change = v1::LinuxContainerResources { cpu_shares: 512, ..Default::default() };
    let request = v1::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(change),
        ..Default::default()
    };
    client.0.update_container_resources(request).await.unwrap();
    let resources = client.status(&id).await.unwrap().resources.unwrap().linux.unwrap();
    assert_eq!(resources.cpu_shares, 512);
    let group = format!("{}/{pod}/{id}", server.cgroup);
    let v1_file = format!("/sys/fs/cgroup/cpu{group}/cpu.shares");
    match fs::read_to_string(v1_file) {
        Ok(shares) => assert_eq!(shares.trim(), "512"),
        Err(_) => {
            let weight = fs::read_to_string(format!("/sys/fs/cgroup{group}/cpu.weight")).unwrap();
            assert!((10..60).contains(&weight.trim().parse::<u32>().unwrap()), "{weight}");
        }
    }
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn the_socket_and_the_state_are_root_s_alone() {
    use std::os::unix::fs::PermissionsExt;
    let server = Server::start().await;
    let mode = |name: &str| fs::metadata(server.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("run/piniond.sock"), 0o600);
    assert_eq!((mode("run"), mode("root")), (0o700, 0o700));
}
