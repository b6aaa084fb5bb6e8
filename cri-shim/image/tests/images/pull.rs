//! Pulling what a registry has.

use std::{sync::Arc, time::Duration};

use pinion_image::{Digest, Error, ErrorKind, Stage};
use serde_json::json;

use crate::{
    content::{INDEX, Image, Layer, MANIFEST, index, noise, tar},
    hostile::{Answer, Hostile, honest},
    node::{Node, Recorder, chain},
    registry::Registry,
};

fn here() -> &'static str {
    if cfg!(target_arch = "aarch64") { "linux/arm64" } else { "linux/amd64" }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_by_tag_and_described() {
    let (registry, node) = (Registry::start().await, Node::new());
    let image = Image::busybox();
    let reference = registry.push("library/busybox:1.36", &image).await;
    let recorder = Recorder::default();
    let record = node.images.pull(&reference, &None, recorder.listener()).await.unwrap();
    assert_eq!(record.id, image.id().as_str());
    assert_eq!(record.repo_tags, std::slice::from_ref(&reference));
    let name = format!("{}/library/busybox", registry.host);
    assert_eq!(record.repo_digests, [format!("{name}@{}", image.digest())]);
    assert_eq!((record.user.uid, record.user.username.as_str()), (Some(1000), ""));
    let size = image.manifest.len() + image.config.len() + image.layers[0].blob.len();
    assert_eq!(record.size, size as u64);
    assert_eq!(node.images.list(), std::slice::from_ref(&record));
    let config = node.images.config(&record.id).unwrap();
    assert_eq!(config.config().as_ref().unwrap().env().as_deref().unwrap(), ["PATH=/bin"]);

    let reports = recorder.reports();
    assert_eq!(reports[0].stage, Stage::Resolving);
    assert!(recorder.saw(Stage::Downloading, true) && recorder.saw(Stage::Done, true));
    let last = reports.last().unwrap();
    assert_eq!((last.stage, last.layer.clone()), (Stage::Done, None));

    let again = Recorder::default();
    node.images.pull(&reference, &None, again.listener()).await.unwrap();
    assert!(again.saw(Stage::AlreadyPresent, true) && again.saw(Stage::AlreadyPresent, false));
    assert!(!again.saw(Stage::Downloading, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_by_digest_without_gaining_a_tag() {
    let (registry, node) = (Registry::start().await, Node::new());
    let image = Image::small("a");
    registry.push("a/b:tag", &image).await;
    for suffix in ["", ":tag", ":no-such-tag"] {
        let reference = format!("{}/a/b{suffix}@{}", registry.host, image.digest());
        let record = node.pull(&reference).await.unwrap();
        assert!(record.repo_tags.is_empty(), "the tag is not verified by the digest");
        assert_eq!(node.images.resolve(&reference).unwrap().id, record.id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_variant_for_this_machine_is_taken_from_an_index() {
    let (registry, node) = (Registry::start().await, Node::new());
    let (mine, other) = (Image::small("mine"), Image::small("other"));
    registry.push("x:mine", &mine).await;
    registry.push("x:other", &other).await;
    let inner =
        index(&[("linux/s390x", MANIFEST, &other.manifest), (here(), MANIFEST, &mine.manifest)]);
    registry.push_manifest("x:inner", INDEX, &inner).await;
    let outer = index(&[("", INDEX, &inner)]);
    registry.push_manifest("x:outer", INDEX, &outer).await;
    for (tag, top) in [("inner", &inner), ("outer", &outer)] {
        let record = node.pull(&format!("{}/x:{tag}", registry.host)).await.unwrap();
        assert_eq!(record.id, mine.id().as_str());
        let by_index = format!("{}/x@{}", registry.host, Digest::of(top));
        assert!(record.repo_digests.contains(&by_index), "{:?}", record.repo_digests);
    }
    let foreign = index(&[("linux/s390x", MANIFEST, &other.manifest)]);
    registry.push_manifest("x:foreign", INDEX, &foreign).await;
    let error = node.pull(&format!("{}/x:foreign", registry.host)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(chain(&error).contains("linux/s390x"), "{}", chain(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_for_another_machine_is_refused() {
    let (registry, node) = (Registry::start().await, Node::new());
    let layers = vec![Layer::plain(&tar(&[("f", b"x")]))];
    let diff_id = layers[0].diff_id.to_string();
    let config = json!({
        "architecture": "s390x", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    });
    let reference = registry.push("x:1", &Image::from_config(layers, &config)).await;
    let error = node.pull(&reference).await.unwrap_err();
    assert!(chain(&error).contains("linux/s390x"), "{}", chain(&error));
    node.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_compression_and_both_dialects_work() {
    let (registry, node) = (Registry::start().await, Node::new());
    let part = |name: &'static str| tar(&[(name, name.as_bytes())]);
    let layers =
        vec![Layer::gzip(&part("gzip")), Layer::zstd(&part("zstd")), Layer::plain(&part("plain"))];
    let mixed = registry.push("mixed:1", &Image::new(layers)).await;
    let docker = registry.push("docker:1", &Image::docker(vec![Layer::gzip(&part("d"))])).await;
    node.pull(&mixed).await.unwrap();
    let rootfs = node.mount("c", &mixed);
    for name in ["gzip", "zstd", "plain"] {
        assert_eq!(std::fs::read_to_string(rootfs.join(name)).unwrap(), name);
    }
    node.pull(&docker).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_layers_is_an_empty_directory() {
    let (registry, node) = (Registry::start().await, Node::new());
    let reference = registry.push("scratch:1", &Image::new(Vec::new())).await;
    node.pull(&reference).await.unwrap();
    let rootfs = node.mount("c", &reference);
    node.images.gc().unwrap();
    assert_eq!(std::fs::read_dir(&rootfs).unwrap().count(), 0);
    std::fs::write(rootfs.join("f"), "x").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_at_the_same_time_share_one_download() {
    let image = Image::new(vec![Layer::plain(&tar(&[("noise", &noise(3 << 20, 1))]))]);
    let layer = image.layers[0].digest();
    let server = Hostile::start(move |request| honest(&image, request)).await;
    let node = Node::new();
    let same = server.reference();
    let other = format!("{}/image:other", server.host);
    let pulls = (0..8).map(|n| {
        let (images, name) = (node.images.clone(), if n % 2 == 0 { &same } else { &other });
        async move { images.pull(name, &None, Arc::new(|_| {})).await }
    });
    for result in futures::future::join_all(pulls).await {
        result.unwrap();
    }
    let downloads = server.seen().iter().filter(|r| r.path.contains(layer.hex())).count();
    assert_eq!(downloads, 1);
    let manifests = server.seen().iter().filter(|r| r.path.contains("/manifests/")).count();
    assert_eq!(manifests, 2);
    assert_eq!(node.images.list()[0].repo_tags, {
        let mut tags = [same.clone(), other.clone()];
        tags.sort();
        tags
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_goes_on_when_its_caller_leaves() {
    let (registry, node) = (Registry::start().await, Node::new());
    let image = Image::new(vec![Layer::gzip(&tar(&[("noise", &noise(2 << 20, 2))]))]);
    let reference = registry.push("x:1", &image).await;
    let impatient = tokio::time::timeout(Duration::from_millis(1), node.pull(&reference)).await;
    assert!(impatient.is_err(), "the pull was too fast to be abandoned");
    for _ in 0..200 {
        if node.images.resolve(&reference).is_some() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the pull ended with its caller");
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_layers_are_stored_and_fetched_once() {
    let (registry, node) = (Registry::start().await, Node::new());
    let base = Layer::gzip(&tar(&[("base", b"base")]));
    let top = |name: &'static str| Layer::gzip(&tar(&[(name, b"top")]));
    let one = registry.push("one:1", &Image::new(vec![base.clone(), top("a")])).await;
    let two = registry.push("two:1", &Image::new(vec![base.clone(), top("b")])).await;
    let swapped = registry.push("swapped:1", &Image::new(vec![top("a"), base])).await;
    node.pull(&one).await.unwrap();
    let recorder = Recorder::default();
    node.images.pull(&two, &None, recorder.listener()).await.unwrap();
    assert!(recorder.saw(Stage::AlreadyPresent, true));
    assert_eq!(node.layers().len(), 3);
    // The same layers in another order mean other directories, but need no other bytes.
    let recorder = Recorder::default();
    node.images.pull(&swapped, &None, recorder.listener()).await.unwrap();
    assert!(recorder.saw(Stage::Unpacking, true) && !recorder.saw(Stage::Downloading, true));
    assert_eq!(node.layers().len(), 5);
    node.images.remove(&one).unwrap();
    assert_eq!(node.layers().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_stored_blobs_an_image_works_all_the_same() {
    let (registry, mut node) =
        (Registry::start().await, Node::with(|c| c.keep_layer_blobs = false));
    let image = Image::busybox();
    let reference = registry.push("busybox:1", &image).await;
    node.pull(&reference).await.unwrap();
    let kept: Vec<_> = [image.id(), image.digest()].iter().map(|d| d.hex().to_owned()).collect();
    assert!(node.blobs().iter().all(|blob| kept.contains(blob)), "{:?}", node.blobs());
    node.restart();
    assert!(node.mount("c", &reference).join("bin/busybox").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_are_used_when_the_registry_asks() {
    let (registry, node) = (Registry::with_password().await, Node::new());
    let reference = registry.push("private:1", &Image::small("private")).await;
    let anonymous = node.pull(&reference).await.unwrap_err();
    assert_eq!(anonymous.kind(), ErrorKind::PermissionDenied);
    assert!(chain(&anonymous).contains("401"), "{}", chain(&anonymous));
    let wrong = node.pull_as(&reference, "wrong").await.unwrap_err();
    assert_eq!(wrong.kind(), ErrorKind::PermissionDenied);
    node.assert_empty();
    node.pull_as(&reference, "secret").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_fetched_where_the_registry_says() {
    let image = Image::small("token");
    let served = image.clone();
    let tokens = Hostile::start(|request| {
        let basic = request.header("authorization") == Some("Basic dXNlcjpzZWNyZXQ=");
        let refresh = request.method == "POST" && request.body.contains("refresh_token=identity");
        match basic || refresh {
            true => Answer::ok(br#"{"access_token": "good"}"#),
            false => Answer::status(401),
        }
    })
    .await;
    let realm = format!("Bearer realm=\"http://{}/token\",service=\"reg\"", tokens.host);
    let server = Hostile::start(move |request| match request.header("authorization") {
        Some("Bearer good") => honest(&served, request),
        _ => Answer::status(401).with("www-authenticate", &realm),
    })
    .await;
    let node = Node::new();
    let reference = server.reference();
    assert_eq!(
        node.pull_as(&reference, "wrong").await.unwrap_err().kind(),
        ErrorKind::PermissionDenied
    );
    node.pull_as(&reference, "secret").await.unwrap();
    let request = tokens.seen().pop().unwrap();
    assert!(request.path.contains("scope=repository%3Aimage%3Apull"), "{}", request.path);
    assert!(request.path.contains("service=reg"), "{}", request.path);

    let node = Node::new();
    let identity = pinion_image::Auth { identity_token: "identity".into(), ..Default::default() };
    node.images.pull(&reference, &Some(identity), Arc::new(|_| {})).await.unwrap();
    let node = Node::new();
    let token = pinion_image::Auth { registry_token: "good".into(), ..Default::default() };
    node.images.pull(&reference, &Some(token), Arc::new(|_| {})).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_references_fail_before_any_request() {
    let node = Node::new();
    for bad in ["", "Busybox", "x:", "x@sha256:zz", "http://x/y"] {
        let error = node.pull(bad).await.unwrap_err();
        assert!(matches!(error, Error::Reference(_)), "{bad}: {error}");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
}
