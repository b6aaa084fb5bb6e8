//! Pods with user namespaces of their own: the kernel's word on who they are.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use pinion_cri_proto::v1::{self, NamespaceMode};
use support::{Client, Server, pod, shell};
use tonic::Code;

/// First id on the host of the pods here, and how many they have.
const FIRST: u32 = 200_000;
const COUNT: u32 = 65_536;

fn mapping() -> Vec<v1::IdMapping> {
    vec![v1::IdMapping { host_id: FIRST, container_id: 0, length: COUNT }]
}

fn users() -> v1::UserNamespace {
    v1::UserNamespace { mode: NamespaceMode::Pod.into(), uids: mapping(), gids: mapping() }
}

fn options(config: &mut v1::PodSandboxConfig) -> &mut v1::NamespaceOption {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().namespace_options.get_or_insert_default()
}

/// A pod with users of its own.
fn apart(name: &str) -> v1::PodSandboxConfig {
    let mut config = pod(name);
    options(&mut config).userns_options = Some(users());
    config
}

/// A container with its pod's namespace options, as kubelet sends it.
fn inside(sandbox: &v1::PodSandboxConfig, name: &str, script: &str) -> v1::ContainerConfig {
    let mut container = shell(name, script);
    let linux = container.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().namespace_options =
        Some(options(&mut sandbox.clone()).clone());
    container
}

async fn server() -> (Server, Client) {
    let server = Server::start().await;
    server.load_image().await;
    let client = Client(server.runtime().await);
    (server, client)
}

/// What a script prints in a running container.
async fn says(client: &mut Client, container: &str, script: &str) -> String {
    let done = client.exec(container, &["/bin/sh", "-c", script], 20).await.unwrap();
    assert_eq!(done.exit_code, 0, "{script}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Pids on the host of processes whose command line has a mark.
fn pids(mark: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter(|e| {
            let line = fs::read(e.path().join("cmdline")).unwrap_or_default();
            line.starts_with(b"sleep\0") && String::from_utf8_lossy(&line).contains(mark)
        })
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}

#[tokio::test]
async fn root_of_a_pod_is_nobody_on_the_node() {
    let (server, mut client) = server().await;
    let config = apart("apart");
    let pod = client.run(&config).await.unwrap();
    let id =
        client.launch(&pod, &inside(&config, "app", "exec sleep 71234"), &config).await.unwrap();

    // The shell has yet to become it.
    let deadline = Instant::now() + Duration::from_secs(10);
    while pids("71234").is_empty() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let [pid] = &pids("71234")[..] else { panic!("one process") };
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let uid = status.lines().find_map(|l| l.strip_prefix("Uid:")).unwrap();
    assert!(uid.split_whitespace().all(|id| id == FIRST.to_string()), "{uid}");
    let own = |ns: &str| fs::read_link(format!("/proc/self/ns/{ns}")).unwrap();
    for ns in ["user", "net", "ipc", "uts", "mnt", "pid"] {
        let theirs = fs::read_link(format!("/proc/{pid}/ns/{ns}")).unwrap();
        assert_ne!(theirs, own(ns), "{ns} is the node's");
    }

    assert_eq!(
        says(&mut client, &id, "cat /proc/self/uid_map").await,
        format!("0 {FIRST} {COUNT}")
    );
    assert_eq!(
        says(&mut client, &id, "cat /proc/self/gid_map").await,
        format!("0 {FIRST} {COUNT}")
    );
    assert_eq!(says(&mut client, &id, "id -u; id -g").await, "0 0");
    let owner = "ls -ln /bin/busybox /etc/hosts /etc/resolv.conf | while read m l u g r; do echo $u $g; done";
    assert_eq!(says(&mut client, &id, owner).await, "0 0 0 0 0 0");
    says(&mut client, &id, "touch /made /etc/passwd /dev/shm/x && echo >> /etc/hosts").await;
    says(&mut client, &id, "echo > /dev/null && cat /dev/zero | dd of=/dev/null count=1 bs=1 2>&1")
        .await;
    assert_eq!(says(&mut client, &id, "hostname").await, "apart");

    let upper = server.path("root/snapshots/containers").join(&id).join("upper");
    for name in ["made", "etc/passwd"] {
        let stored = fs::metadata(upper.join(name)).unwrap();
        assert_eq!((stored.uid(), stored.gid()), (FIRST, FIRST), "{name}");
    }
    assert_eq!(fs::metadata(&upper).unwrap().uid(), FIRST);
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn the_shared_layers_keep_their_owners() {
    let (server, mut client) = server().await;
    let config = apart("layers");
    let pod = client.run(&config).await.unwrap();
    let one = inside(&config, "one", "touch /bin/busybox; sleep 1000");
    client.launch(&pod, &one, &config).await.unwrap();
    let plain = support::pod("plain");
    let other = client.run(&plain).await.unwrap();
    let id = client.launch(&other, &shell("two", "sleep 1000"), &plain).await.unwrap();
    assert_eq!(
        says(&mut client, &id, "ls -ln /bin/busybox | while read m l u r; do echo $u; done").await,
        "0"
    );
    for layer in fs::read_dir(server.path("root/snapshots/layers")).unwrap().flatten() {
        assert_eq!(layer.metadata().unwrap().uid(), 0, "{:?}", layer.path());
    }
    client.remove_pod(&pod).await.unwrap();
    client.remove_pod(&other).await.unwrap();
}

#[tokio::test]
async fn a_volume_belongs_to_the_same_id_inside_and_outside() {
    let (server, mut client) = server().await;
    let data = server.path("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("old"), "x").unwrap();
    std::os::unix::fs::chown(data.join("old"), Some(1000), Some(1000)).unwrap();
    let config = apart("volume");
    let pod = client.run(&config).await.unwrap();
    let mut container = inside(&config, "app", "sleep 1000");
    container.mounts = vec![v1::Mount {
        container_path: "/data".into(),
        host_path: data.to_string_lossy().into_owned(),
        uid_mappings: mapping(),
        gid_mappings: mapping(),
        ..Default::default()
    }];
    let id = client.launch(&pod, &container, &config).await.unwrap();
    let owner = "ls -ln /data/old | while read m l u g r; do echo $u $g; done";
    assert_eq!(says(&mut client, &id, owner).await, "1000 1000");
    says(&mut client, &id, "touch /data/new").await;
    assert_eq!(fs::metadata(data.join("new")).unwrap().uid(), 0, "root inside, root's file");
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn namespaces_of_the_node_and_of_the_pod_go_with_it() {
    let (server, mut client) = server().await;
    let mut config = apart("host-network");
    options(&mut config).network = NamespaceMode::Node.into();
    let pod = client.run(&config).await.unwrap();
    let id = client.launch(&pod, &inside(&config, "app", "sleep 1000"), &config).await.unwrap();
    let net = fs::read_link("/proc/self/ns/net").unwrap();
    assert_eq!(
        fs::read_link(format!("/proc/{}/ns/net", first_pid(&server, &pod, &id))).unwrap(),
        net
    );
    assert_eq!(
        says(&mut client, &id, "cat /proc/self/uid_map").await,
        format!("0 {FIRST} {COUNT}")
    );
    says(&mut client, &id, "ls /sys/class > /dev/null").await;
    client.remove_pod(&pod).await.unwrap();

    let mut config = apart("shared-pids");
    options(&mut config).pid = NamespaceMode::Pod.into();
    let pod = client.run(&config).await.unwrap();
    client.launch(&pod, &inside(&config, "one", "exec sleep 72345"), &config).await.unwrap();
    let two = client.launch(&pod, &inside(&config, "two", "sleep 1000"), &config).await.unwrap();
    assert!(says(&mut client, &two, "ps").await.contains("sleep 72345"));
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

fn first_pid(server: &Server, pod: &str, container: &str) -> String {
    let file = server.path("run/pods").join(pod).join("containers").join(container).join("pid");
    fs::read_to_string(file).unwrap().trim().to_owned()
}

#[tokio::test]
async fn it_survives_the_server() {
    let (mut server, mut client) = server().await;
    let config = apart("survivor");
    let pod = client.run(&config).await.unwrap();
    let id = client.launch(&pod, &inside(&config, "app", "sleep 1000"), &config).await.unwrap();
    server.crash();
    server.spawn().await;
    let mut client = Client(server.runtime().await);
    assert_eq!(client.status(&id).await.unwrap().state(), v1::ContainerState::ContainerRunning);
    assert_eq!(says(&mut client, &id, "id -u").await, "0");
    let later =
        client.launch(&pod, &inside(&config, "later", "sleep 1000"), &config).await.unwrap();
    assert_eq!(
        says(&mut client, &later, "cat /proc/self/uid_map").await,
        format!("0 {FIRST} {COUNT}")
    );
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn what_cannot_be_a_user_namespace_is_refused_and_leaves_nothing() {
    let (server, mut client) = server().await;
    let map = |container_id, host_id, length| v1::IdMapping { host_id, container_id, length };
    let mut bad = Vec::new();
    for maps in [vec![], vec![map(1, 1000, 10)], vec![map(0, 1000, 10), map(10, 2000, 10)]] {
        bad.push(v1::UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: maps.clone(),
            gids: maps,
        });
    }
    for mode in [NamespaceMode::Container, NamespaceMode::Target] {
        bad.push(v1::UserNamespace { mode: mode.into(), ..users() });
    }
    for user in bad {
        let mut config = apart("refused");
        options(&mut config).userns_options = Some(user.clone());
        let error = client.run(&config).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{user:?}: {}", error.message());
        assert!(error.message().contains("userns_options"), "{}", error.message());
    }
    let config = apart("agree");
    let pod = client.run(&config).await.unwrap();
    let error = client.create(&pod, &shell("app", "true"), &config).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{}", error.message());
    client.remove_pod(&pod).await.unwrap();
    assert!(!Path::new(&server.path("run/probe")).exists(), "the probe at the start is gone");
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn the_handlers_say_that_it_can_be_had() {
    let (_server, mut client) = server().await;
    let status = client.0.status(v1::StatusRequest { verbose: true }).await.unwrap().into_inner();
    for handler in &status.runtime_handlers {
        let features = handler.features.unwrap();
        assert!(features.user_namespaces && features.recursive_read_only_mounts, "{handler:?}");
    }
    let features = status.features.unwrap();
    assert!(features.supplemental_groups_policy && features.user_namespaces_host_network);
    assert!(features.mount_options);
}
