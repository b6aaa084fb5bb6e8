//! Checkpoints: off by default, and what an archive holds. CRIU's part is played by a script,
//! because it does not work on every kernel that this runs on.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use pinion_cri_proto::v1;
use support::{Client, Server, pod, runtime, shell};
use tonic::Code;

/// A server with checkpoints on, whose runtime writes `memory` where CRIU would write images.
async fn server(fails: bool) -> (Server, Client) {
    let mut server = Server::start_with("[checkpoint]\nenabled = true").await;
    server.crash();
    let wrapper = server.path("runtime.sh");
    let end = if fails {
        "echo 'Error (criu): no' > $work/dump.log; echo bad >&2; exit 1"
    } else {
        "exit 0"
    };
    let script = format!(
        "#!/bin/sh\nfor a; do [ \"$p\" = --image-path ] && images=$a; [ \"$p\" = --work-path ] && work=$a; \
         [ \"$a\" = checkpoint ] && yes=1; p=$a; done\n\
         [ -n \"$yes\" ] && {{ echo memory > $images/core-1.img; echo log > $work/dump.log; {end}; }}\n\
         exec {} \"$@\"\n",
        runtime().display()
    );
    fs::write(&wrapper, script).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir_all(server.path("config.d")).unwrap();
    let drop_in = format!("[runtime]\npath = '{}'\n", wrapper.display());
    fs::write(server.path("config.d/runtime.toml"), drop_in).unwrap();
    server.spawn().await;
    server.load_image().await;
    let client = Client(server.runtime().await);
    (server, client)
}

fn request(id: &str, place: &Path) -> v1::CheckpointContainerRequest {
    v1::CheckpointContainerRequest {
        container_id: id.into(),
        location: place.to_string_lossy().into_owned(),
        timeout: 30,
    }
}

fn entries(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(bytes);
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().to_string_lossy().into_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        (path, bytes)
    });
    entries.collect()
}

#[tokio::test]
async fn without_being_asked_for_there_are_none_and_the_way_is_said() {
    let server = Server::start().await;
    let mut api = server.runtime().await;
    let errors = [
        api.checkpoint_container(v1::CheckpointContainerRequest::default()).await.unwrap_err(),
        api.checkpoint_pod(v1::CheckpointPodRequest::default()).await.unwrap_err(),
        api.restore_pod(v1::RestorePodRequest::default()).await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.code(), Code::FailedPrecondition);
        let words = error.message();
        assert!(words.contains("`[checkpoint]`") && words.contains("enabled = true"), "{words}");
    }
}

#[tokio::test]
async fn an_archive_has_what_kubelet_s_tools_look_for() {
    let (server, mut client) = server(false).await;
    let config = pod("memory");
    let pod = client.run(&config).await.unwrap();
    let script = "echo changed > /etc/new; touch /etc/group; sleep 1000";
    let id = client.launch(&pod, &shell("app", script), &config).await.unwrap();
    while client.exec(&id, &["cat", "/etc/new"], 5).await.unwrap().exit_code != 0 {}
    let place = server.path("checkpoint.tar");
    client.0.checkpoint_container(request(&id, &place)).await.unwrap();

    assert_eq!(fs::metadata(&place).unwrap().permissions().mode() & 0o777, 0o600);
    let mut bytes = Vec::new();
    File::open(&place).unwrap().read_to_end(&mut bytes).unwrap();
    let found = entries(&bytes);
    assert_eq!(found["checkpoint/core-1.img"], b"memory\n");
    assert_eq!(found["dump.log"], b"log\n");
    let dumped: serde_json::Value = serde_json::from_slice(&found["config.dump"]).unwrap();
    assert_eq!((&dumped["id"], &dumped["name"]), (&id.as_str().into(), &"app".into()));
    let spec: serde_json::Value = serde_json::from_slice(&found["spec.dump"]).unwrap();
    assert!(spec["process"]["args"].is_array());
    assert_eq!(entries(&found["rootfs-diff.tar"])["etc/new"], b"changed\n");
    assert_eq!(client.status(&id).await.unwrap().state(), v1::ContainerState::ContainerRunning);

    let whole = server.path("pod.tar");
    let request = v1::CheckpointPodRequest {
        pod_sandbox_id: pod.clone(),
        output_path: whole.to_string_lossy().into_owned(),
        ..Default::default()
    };
    client.0.checkpoint_pod(request).await.unwrap();
    let found = entries(&fs::read(&whole).unwrap());
    let inner = entries(&found[&format!("containers/{id}.tar")]);
    assert!(inner.contains_key("config.dump") && found.contains_key("pod.dump"));
    assert!(no_work_left(&server));
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn a_failure_gives_criu_s_reason_and_leaves_nothing() {
    let (server, mut client) = server(true).await;
    let config = pod("fails");
    let pod = client.run(&config).await.unwrap();
    let id = client.launch(&pod, &shell("app", "sleep 1000"), &config).await.unwrap();
    let place = server.path("checkpoint.tar");
    let error = client.0.checkpoint_container(request(&id, &place)).await.unwrap_err();
    assert!(error.message().contains("CRIU: Error (criu): no"), "{}", error.message());
    assert!(!place.exists() && no_work_left(&server));

    let outside = server.path("kept");
    fs::write(&outside, "x").unwrap();
    std::os::unix::fs::symlink(&outside, server.path("link.tar")).unwrap();
    for bad in [server.path("link.tar"), server.path("none/x.tar"), "relative.tar".into()] {
        let error = client.0.checkpoint_container(request(&id, &bad)).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{bad:?}");
    }
    assert_eq!(fs::read_to_string(&outside).unwrap(), "x");
    client.stop(&id, 0).await.unwrap();
    let error = client.0.checkpoint_container(request(&id, &place)).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    client.remove_pod(&pod).await.unwrap();
}

fn no_work_left(server: &Server) -> bool {
    fs::read_dir(server.path("root/checkpoints"))
        .map_or(true, |mut entries| entries.next().is_none())
}
