//! Images mounted into containers as volumes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use std::fs;

use pinion_cri_proto::v1;
use support::{Client, IMAGE, Server, pod, shell};
use tonic::Code;

fn volume(at: &str, sub_path: &str) -> v1::Mount {
    v1::Mount {
        container_path: at.into(),
        readonly: true,
        image: Some(v1::ImageSpec { image: IMAGE.into(), ..Default::default() }),
        image_sub_path: sub_path.into(),
        ..Default::default()
    }
}

fn with(mounts: Vec<v1::Mount>) -> v1::ContainerConfig {
    v1::ContainerConfig { mounts, ..shell("app", "sleep 1000") }
}

async fn start() -> (Server, Client, v1::PodSandboxConfig, String) {
    let server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let config = pod("volumes");
    let pod = client.run(&config).await.unwrap();
    (server, client, config, pod)
}

#[tokio::test]
async fn an_image_and_parts_of_it_are_shown_read_only() {
    let (server, mut client, config, pod) = start().await;
    let mounts = vec![
        volume("/whole", ""),
        volume("/part", "etc"),
        volume("/file", "bin/ls"),
        v1::Mount { mount_options: vec!["noexec".into()], ..volume("/data", "bin") },
    ];
    let id = client.launch(&pod, &with(mounts), &config).await.unwrap();
    let mut sh =
        async |script: &str| client.exec(&id, &["/bin/sh", "-c", script], 10).await.unwrap();
    let good = "cat /whole/etc/passwd /part/passwd && /whole/bin/busybox true && test -f /file";
    assert_eq!(sh(good).await.exit_code, 0);
    assert_ne!(sh("test -e /part/etc").await.exit_code, 0, "the part, not the whole");
    for place in ["/whole/x", "/part/x"] {
        let written = sh(&format!("touch {place}")).await;
        assert!(String::from_utf8_lossy(&written.stderr).contains("Read-only"), "{written:?}");
    }
    assert_ne!(sh("echo x > /file").await.exit_code, 0);
    assert_ne!(sh("/data/busybox true").await.exit_code, 0, "noexec");

    let status = client.status(&id).await.unwrap();
    for mount in &status.mounts {
        let image = mount.image.clone().unwrap();
        assert_eq!(image.image_ref, status.image_id, "{}", mount.container_path);
        assert_eq!(image.image, IMAGE);
    }
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
    assert_eq!(fs::read_dir(server.path("root/snapshots/containers")).unwrap().count(), 0);
}

#[tokio::test]
async fn what_is_not_in_the_image_is_refused_and_leaves_nothing() {
    let (server, mut client, config, pod) = start().await;
    for (mounts, code) in [
        (vec![volume("/a", ""), volume("/v", "missing")], Code::InvalidArgument),
        (vec![volume("/v", "../../etc")], Code::InvalidArgument),
        (vec![volume("/v", "/etc")], Code::InvalidArgument),
        (vec![volume("/v", "etc/passwd/x")], Code::InvalidArgument),
        (vec![v1::Mount { readonly: false, ..volume("/v", "") }], Code::InvalidArgument),
        (vec![v1::Mount { host_path: "/tmp".into(), ..volume("/v", "") }], Code::InvalidArgument),
    ] {
        let error = client.create(&pod, &with(mounts.clone()), &config).await.unwrap_err();
        assert_eq!(error.code(), code, "{mounts:?}: {}", error.message());
    }
    let mut absent = volume("/v", "");
    absent.image.as_mut().unwrap().image = "localhost/absent:1".into();
    let error = client.create(&pod, &with(vec![absent]), &config).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    assert!(error.message().contains("ImageVolumeMountFailed"), "{}", error.message());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let marker = server.path("run").join("pods").join(&pod).join("containers");
    assert!(!mounts.contains(&*marker.to_string_lossy()), "{mounts}");
    assert_eq!(fs::read_dir(server.path("root/snapshots/containers")).unwrap().count(), 0);
    client.remove_pod(&pod).await.unwrap();
}

#[tokio::test]
async fn an_image_in_use_as_a_volume_stays_on_disk() {
    let (mut server, mut client, config, pod) = start().await;
    let id = client.launch(&pod, &with(vec![volume("/v", "")]), &config).await.unwrap();
    let image = v1::ImageSpec { image: IMAGE.into(), ..Default::default() };
    server
        .images()
        .await
        .remove_image(v1::RemoveImageRequest { image: Some(image) })
        .await
        .unwrap();
    server.crash();
    server.spawn().await;
    let mut client = Client(server.runtime().await);
    let read = client.exec(&id, &["cat", "/v/etc/passwd"], 10).await.unwrap();
    assert!(read.stdout.starts_with(b"root:"));
    client.remove_pod(&pod).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
    assert_eq!(fs::read_dir(server.path("root/snapshots/containers")).unwrap().count(), 0);
}
