//! Mirrors, tags, removal, restarts.

use std::{collections::BTreeSet, fs};

use pinion_image::ErrorKind;

use crate::{
    content::{Image, Layer, tar},
    hostile::{Answer, Hostile, honest},
    node::{Node, chain},
    registry::Registry,
};

fn hosts(node: &Node, registry: &str, text: &str) {
    let dir = node.root.join("certs.d").join(registry);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("hosts.toml"), text).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_serves_an_image_under_its_own_name() {
    let (registry, node) = (Registry::start().await, Node::new());
    let (pause, busybox) = (Image::small("pause"), Image::busybox());
    registry.push("pause:3.9", &pause).await;
    registry.push("library/busybox:latest", &busybox).await;
    let mirror =
        format!("[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]", registry.host);
    hosts(&node, "registry.k8s.io", &format!("server = \"https://registry.k8s.io\"\n{mirror}"));
    let record = node.pull("registry.k8s.io/pause:3.9").await.unwrap();
    assert_eq!(record.repo_tags, ["registry.k8s.io/pause:3.9"]);
    let digest = format!("registry.k8s.io/pause@{}", pause.digest());
    assert_eq!(record.repo_digests, std::slice::from_ref(&digest));
    node.pull(&digest).await.unwrap();

    hosts(&node, "_default", &mirror);
    let record = node.pull("busybox").await.unwrap();
    assert_eq!(record.repo_tags, ["docker.io/library/busybox:latest"]);
    assert_eq!(node.images.resolve("busybox").unwrap().id, busybox.id().as_str());
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_are_tried_in_order_and_told_the_namespace() {
    let node = Node::new();
    let image = Image::small("x");
    let served = image.clone();
    let empty = Hostile::start(|_| Answer::status(404)).await;
    let good = Hostile::start(move |request| honest(&served, request)).await;
    let text = format!(
        "server = \"http://127.0.0.1:1\"\n[host.\"http://127.0.0.1:1\"]\n[host.\"http://{}\"]\n\
         [host.\"http://{}/proxy\"]\n[host.\"http://{}/proxy\".header]\nx-team = \"core\"\n",
        empty.host, good.host, good.host
    );
    hosts(&node, "quay.io", &text);
    node.pull_as("quay.io/a/b:1", "secret").await.unwrap();
    assert_eq!(empty.seen()[0].path, "/v2/a/b/manifests/1?ns=quay.io");
    let first = &good.seen()[0];
    assert_eq!(first.path, "/proxy/v2/a/b/manifests/1?ns=quay.io");
    assert_eq!(first.header("x-team"), Some("core"));
    for request in good.seen().iter().chain(&empty.seen()) {
        assert_eq!(request.header("authorization"), None, "credentials are not for mirrors");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn when_every_host_fails_each_is_named() {
    let node = Node::new();
    let empty = Hostile::start(|_| Answer::status(404)).await;
    let text = format!("server = \"http://127.0.0.1:1\"\n[host.\"http://{}\"]", empty.host);
    hosts(&node, "quay.io", &text);
    let error = node.pull("quay.io/a/b:1").await.unwrap_err();
    let text = chain(&error);
    assert!(text.contains(&empty.host) && text.contains("127.0.0.1:1"), "{text}");
    assert!(text.contains("404") && text.contains("refused"), "{text}");
    hosts(&node, "quay.io", "server = 3");
    let error = node.pull("quay.io/a/b:1").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(chain(&error).contains("quay.io/hosts.toml"), "{}", chain(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_moves_to_the_image_pulled_last() {
    let (registry, node) = (Registry::start().await, Node::new());
    let (old, new) = (Image::small("old"), Image::small("new"));
    let reference = registry.push("x:latest", &old).await;
    let also = registry.push("x:stable", &old).await;
    node.pull(&reference).await.unwrap();
    let record = node.pull(&also).await.unwrap();
    assert_eq!(record.repo_tags, [reference.clone(), also.clone()]);
    registry.push("x:latest", &new).await;
    node.pull(&reference).await.unwrap();
    assert_eq!(node.images.resolve(&reference).unwrap().id, new.id().as_str());
    let left = node.images.resolve(old.id().as_str()).unwrap();
    assert_eq!((left.repo_tags, left.repo_digests.len()), (vec![also.clone()], 1));
    registry.push("x:stable", &new).await;
    node.pull(&also).await.unwrap();
    let dangling = node.images.resolve(old.id().as_str()).unwrap();
    assert!(dangling.repo_tags.is_empty(), "it stays until somebody removes it");
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_an_image_removes_all_its_names_and_content() {
    let (registry, node) = (Registry::start().await, Node::new());
    let image = Image::busybox();
    let one = registry.push("x:1", &image).await;
    let two = registry.push("y:2", &image).await;
    node.pull(&one).await.unwrap();
    node.pull(&two).await.unwrap();
    assert_eq!(node.images.list().len(), 1);
    assert_eq!(node.images.remove(&two).unwrap().unwrap().repo_tags.len(), 2);
    assert_eq!(node.images.remove(&two).unwrap(), None, "removing again is fine");
    node.assert_empty();
    node.pull(&one).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_keep_the_layers_of_a_removed_image() {
    let (registry, mut node) = (Registry::start().await, Node::new());
    let reference = registry.push("x:1", &Image::busybox()).await;
    node.pull(&reference).await.unwrap();
    let rootfs = node.mount("c", &reference);
    node.images.remove(&reference).unwrap();
    assert!(rootfs.join("etc/motd").exists());
    node.restart();
    node.images.gc().unwrap();
    assert_eq!(fs::read_to_string(rootfs.join("etc/motd")).unwrap(), "hello\n");
    // The image comes back without its layer being fetched, and is complete.
    node.pull(&reference).await.unwrap();
    node.images.remove(&reference).unwrap();
    node.images.remove_rootfs("c", &rootfs).unwrap();
    node.images.gc().unwrap();
    node.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn images_survive_a_restart_and_rubbish_does_not() {
    let (registry, mut node) =
        (Registry::start().await, Node::with(|c| c.pinned = vec!["*".into()]));
    let reference = registry.push("x:1", &Image::busybox()).await;
    let before = node.pull(&reference).await.unwrap();
    assert!(before.pinned);
    let (blobs, layers) = (node.blobs(), node.layers());
    let name = "0".repeat(64);
    fs::write(node.root.join(format!("content/blobs/sha256/{name}.partial-3")), "x").unwrap();
    fs::write(node.root.join(format!("content/blobs/sha256/{name}")), "x").unwrap();
    for dir in [
        "layers/0123456789abcdef01234567.tmp-1/d",
        "layers/0123456789abcdef01234567",
        "containers/lost/upper",
        "trash/1/x",
    ] {
        fs::create_dir_all(node.root.join("snapshots").join(dir)).unwrap();
    }
    node.restart();
    assert_eq!((node.blobs(), node.layers()), (blobs, layers));
    assert_eq!(node.images.list(), [before]);
    for dir in ["containers", "trash"] {
        assert_eq!(
            fs::read_dir(node.root.join("snapshots").join(dir)).unwrap().count(),
            0,
            "{dir}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_lost_a_layer_or_its_configuration_is_forgotten_and_pulled_anew() {
    let (registry, mut node) = (Registry::start().await, Node::new());
    let image = Image::busybox();
    let reference = registry.push("x:1", &image).await;
    let other = registry.push("y:1", &Image::small("other")).await;
    node.pull(&reference).await.unwrap();
    let kept = node.pull(&other).await.unwrap();
    let config = node.root.join("content/blobs/sha256").join(image.id().hex());
    let layer = node.root.join("snapshots/layers").join(&image.layers[0].diff_id.hex()[..24]);
    assert!(layer.join("bin/busybox").exists());
    for damage in 0..3 {
        match damage {
            0 => fs::remove_dir_all(&layer).unwrap(),
            1 => fs::remove_file(&config).unwrap(),
            _ => fs::write(&config, "{}").unwrap(),
        }
        node.restart();
        assert_eq!(node.images.list(), std::slice::from_ref(&kept), "damage {damage}");
        node.pull(&reference).await.unwrap();
        assert!(layer.join("bin/busybox").exists() && config.exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_a_layer_does_not_describe_look_as_below() {
    let (registry, node) = (Registry::start().await, Node::new());
    let mut base = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_mode(0o1777);
    header.set_uid(7);
    header.set_gid(8);
    header.set_size(0);
    header.set_mtime(1_500_000_000);
    base.append_data(&mut header, "tmp/", &b""[..]).unwrap();
    let base = base.into_inner().unwrap();
    // The second layer brings tmp/file but says nothing about tmp.
    let layers = vec![Layer::gzip(&base), Layer::gzip(&tar(&[("tmp/file", b"x")]))];
    let reference = registry.push("x:1", &Image::new(layers)).await;
    node.pull(&reference).await.unwrap();
    let rootfs = node.mount("c", &reference);
    use std::os::unix::fs::MetadataExt;
    let tmp = fs::metadata(rootfs.join("tmp")).unwrap();
    assert_eq!((tmp.mode() & 0o7777, tmp.uid(), tmp.gid()), (0o1777, 7, 8));
    assert_eq!(tmp.mtime(), 1_500_000_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn collecting_while_pulling_takes_nothing_that_is_needed() {
    let (registry, node) = (Registry::start().await, Node::new());
    let mut references = BTreeSet::new();
    for n in 0..12 {
        let layers = (0..3).map(|l| Layer::gzip(&tar(&[(&format!("f{n}-{l}"), b"x")]))).collect();
        references.insert(registry.push(&format!("x{n}:1"), &Image::new(layers)).await);
    }
    let collector = {
        let images = node.images.clone();
        tokio::task::spawn_blocking(move || {
            for _ in 0..150 {
                images.gc().unwrap();
            }
        })
    };
    let pulls = references.iter().map(|reference| node.pull(reference));
    for result in futures::future::join_all(pulls).await {
        result.unwrap();
    }
    collector.await.unwrap();
    for (n, reference) in references.iter().enumerate() {
        let rootfs = node.mount(&format!("c{n}"), reference);
        assert_eq!(fs::read_dir(&rootfs).unwrap().count(), 3, "{reference}");
    }
    assert_eq!(node.layers().len(), 36);
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_verified_unless_the_configuration_says_otherwise() {
    let ((registry, certificate), node) = (Registry::with_tls().await, Node::new());
    let reference = registry.push("x:1", &Image::small("tls")).await;
    let server = format!("server = \"https://{}\"", registry.host);
    hosts(&node, &registry.host, &server);
    let error = node.pull(&reference).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", chain(&error));
    assert!(chain(&error).contains("certificate"), "{}", chain(&error));
    node.assert_empty();
    for trust in [format!("ca = {certificate:?}"), "skip_verify = true".to_owned()] {
        hosts(&node, &registry.host, &format!("{server}\n{trust}"));
        node.pull(&reference).await.unwrap_or_else(|e| panic!("{trust}: {}", chain(&e)));
        node.images.remove(&reference).unwrap();
    }
    hosts(&node, &registry.host, &format!("{server}\nca = \"missing.pem\""));
    let error = node.pull(&reference).await.unwrap_err();
    assert!(chain(&error).contains("missing.pem"), "{}", chain(&error));
}
