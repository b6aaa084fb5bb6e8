//! Registries, networks, disks and images that fail or lie. After each failure the node is as
//! before, and the next pull works.

use std::{
    fs,
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use pinion_image::{Digest, ErrorKind, Limits};
use serde_json::json;

use crate::{
    content::{Image, Layer, MANIFEST, descriptor, index, noise, tar},
    hostile::{Answer, Hostile, honest},
    node::{Node, chain},
    registry::Registry,
};

/// Pulls what must fail, and proves that nothing is left of it.
async fn fails(node: &Node, reference: &str, kind: ErrorKind, words: &[&str]) -> String {
    let error = match node.pull(reference).await {
        Err(error) => error,
        Ok(record) => panic!("{reference} was pulled: {record:?}"),
    };
    let text = chain(&error);
    assert_eq!(error.kind(), kind, "{text}");
    for word in words {
        assert!(text.contains(word), "{text:?} lacks {word:?}");
    }
    // Layers of the same image that were still under way end within the second.
    for _ in 0..40 {
        if node.layers().is_empty() && node.blobs().is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    node.assert_empty();
    text
}

fn large() -> Image {
    Image::new(vec![Layer::plain(&tar(&[("noise", &noise(2 << 20, 7))]))])
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_registry_is_unavailable_and_named() {
    let mut registry = Registry::start().await;
    let node = Node::new();
    let reference = registry.push("x:1", &Image::small("x")).await;
    registry.stop();
    fails(&node, &reference, ErrorKind::Unavailable, &[&registry.host, "refused"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_tag_repository_or_digest_is_not_found() {
    let (registry, node) = (Registry::start().await, Node::new());
    let reference = registry.push("x:1", &Image::small("x")).await;
    let digest = Digest::of(b"nothing");
    for missing in ["x:2".to_owned(), "y:1".to_owned(), format!("x@{digest}")] {
        let missing = format!("{}/{missing}", registry.host);
        fails(&node, &missing, ErrorKind::NotFound, &["404", "MANIFEST_UNKNOWN"]).await;
    }
    node.pull(&reference).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_byte_in_a_layer_is_noticed_and_healed_by_the_next_pull() {
    let (registry, node) = (Registry::start().await, Node::new());
    let image = large();
    let reference = registry.push("x:1", &image).await;
    let digest = image.layers[0].digest();
    let file = registry.blob_file(&digest);
    let whole = fs::read(&file).unwrap();
    for at in [0, 300, 1 << 20, whole.len() - 1] {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        fs::write(&file, flipped).unwrap();
        fails(&node, &reference, ErrorKind::DataLoss, &["expected", digest.as_str()]).await;
    }
    fs::write(&file, whole).unwrap();
    node.pull(&reference).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_blob_or_configuration_is_noticed() {
    let (registry, node) = (Registry::start().await, Node::new());
    let image = large();
    let reference = registry.push("x:1", &image).await;
    for digest in [image.layers[0].digest(), image.id()] {
        let file = registry.blob_file(&digest);
        let whole = fs::read(&file).unwrap();
        fs::write(&file, &whole[..whole.len() / 2]).unwrap();
        fails(&node, &reference, ErrorKind::DataLoss, &["bytes", digest.as_str()]).await;
        fs::write(&file, [&whole[..], b"more"].concat()).unwrap();
        fails(&node, &reference, ErrorKind::DataLoss, &["bytes"]).await;
        fs::write(&file, whole).unwrap();
    }
    node.pull(&reference).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_layer_among_good_ones_fails_the_whole_image() {
    let (registry, node) = (Registry::start().await, Node::new());
    let layer = |n: u64| Layer::gzip(&tar(&[(&format!("f{n}"), &noise(300_000, n))]));
    let image = Image::new((0..6).map(layer).collect());
    let reference = registry.push("x:1", &image).await;
    let file = registry.blob_file(&image.layers[3].digest());
    let whole = fs::read(&file).unwrap();
    fs::remove_file(&file).unwrap();
    fails(&node, &reference, ErrorKind::NotFound, &["404"]).await;
    fs::write(&file, whole).unwrap();
    node.pull(&reference).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lie_about_the_uncompressed_layer_is_noticed() {
    let (registry, node) = (Registry::start().await, Node::new());
    let mut layer = Layer::gzip(&tar(&[("f", b"x")]));
    layer.diff_id = Digest::of(b"something else");
    let reference = registry.push("x:1", &Image::new(vec![layer])).await;
    fails(&node, &reference, ErrorKind::DataLoss, &["uncompressed layer"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_climb_out_are_refused() {
    let (registry, node) = (Registry::start().await, Node::new());
    let mut bytes = tar(&[("xx/planted", b"x")]);
    bytes[..2].copy_from_slice(b"..");
    let mut header = tar::Header::from_byte_slice(&bytes[..512]).clone();
    header.set_cksum();
    bytes[..512].copy_from_slice(header.as_bytes());
    let reference = registry.push("x:1", &Image::new(vec![Layer::gzip(&bytes)])).await;
    fails(&node, &reference, ErrorKind::DataLoss, &["../planted", "\"..\""]).await;
    assert!(!node.root.join("snapshots/layers/planted").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_fails_the_pull_and_gives_the_space_back() {
    let registry = Registry::start().await;
    let big = registry.push("big:1", &large_image(24 << 20)).await;
    let small = registry.push("small:1", &Image::small("s")).await;
    let dir = tempfile::tempdir().unwrap();
    let mount = |args: &[&str]| {
        assert!(Command::new(args[0]).args(&args[1..]).arg(dir.path()).status().unwrap().success());
    };
    mount(&["mount", "-t", "tmpfs", "-o", "size=16m", "pinion-test"]);
    {
        let node = Node::at(dir.path().join("node"), None, |_| {});
        let free = || rustix::fs::statvfs(dir.path()).unwrap().f_bfree;
        fails(&node, &big, ErrorKind::ResourceExhausted, &["No space left"]).await;
        let before = free();
        for _ in 0..3 {
            fails(&node, &big, ErrorKind::ResourceExhausted, &["No space left"]).await;
        }
        assert_eq!(free(), before);
        node.pull(&small).await.unwrap();
    }
    mount(&["umount"]);
}

fn large_image(bytes: usize) -> Image {
    Image::new(vec![Layer::gzip(&tar(&[("noise", &noise(bytes, 3))]))])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bomb_is_stopped_and_other_pulls_go_on() {
    let registry = Registry::start().await;
    let limits = Limits { free_expansion_bytes: 8 << 20, ..Limits::default() };
    let node = Node::with(|config| config.limits = limits);
    let image = Image::new(vec![Layer::gzip(&tar(&[("zeros", &vec![0; 64 << 20])]))]);
    let bomb = registry.push("bomb:1", &image).await;
    let good = registry.push("good:1", &Image::small("good")).await;
    fails(&node, &bomb, ErrorKind::ResourceExhausted, &["uncompressed size"]).await;
    let started = Instant::now();
    let bombs = (0..20).map(|_| node.pull(&bomb));
    let (bombs, good) = futures::join!(futures::future::join_all(bombs), node.pull(&good));
    assert!(bombs.iter().all(Result::is_err));
    good.unwrap();
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_layers_or_entries_are_refused() {
    let registry = Registry::start().await;
    let limits = Limits { layers: 3, layer_entries: 10, ..Limits::default() };
    let node = Node::with(|config| config.limits = limits);
    let layer = |n: usize| Layer::gzip(&tar(&[(&format!("f{n}"), b"x")]));
    let many = registry.push("many:1", &Image::new((0..4).map(layer).collect())).await;
    fails(&node, &many, ErrorKind::ResourceExhausted, &["4 layers", "3 layers"]).await;
    let names: Vec<String> = (0..11).map(|n| format!("f{n}")).collect();
    let files: Vec<(&str, &[u8])> = names.iter().map(|n| (n.as_str(), &b""[..])).collect();
    let full = registry.push("full:1", &Image::new(vec![Layer::gzip(&tar(&files))])).await;
    fails(&node, &full, ErrorKind::ResourceExhausted, &["entries", "10"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_beyond_their_bounds_are_not_read() {
    let node = Node::new();
    let huge = Hostile::start(|_| Answer::ok(&vec![b' '; 5 << 20])).await;
    fails(&node, &huge.reference(), ErrorKind::ResourceExhausted, &["manifest", "limit"]).await;

    let image = Image::small("x");
    let text = String::from_utf8(image.manifest.clone()).unwrap();
    let size = format!("\"size\":{}", image.config.len());
    let claims = text.replacen(&size, &format!("\"size\":{}", 9 << 20), 1);
    assert_ne!(text, claims);
    let server = Hostile::start(move |_| Answer::ok(claims.as_bytes())).await;
    fails(&node, &server.reference(), ErrorKind::ResourceExhausted, &["configuration"]).await;
    assert_eq!(server.seen().len(), 1, "the configuration was not even asked for");
}

#[tokio::test(flavor = "multi_thread")]
async fn ambiguous_and_endless_documents_are_refused() {
    let node = Node::new();
    let image = Image::small("x");
    let both =
        String::from_utf8(image.manifest.clone()).unwrap().replacen('{', "{\"manifests\":[],", 1);
    let wrong_type = ("application/vnd.oci.image.index.v1+json", image.manifest.clone());
    let artifact = json!({
        "schemaVersion": 2, "layers": [],
        "config": descriptor("application/vnd.cncf.helm.config.v1+json", b"{}"),
    });
    let squashfs = String::from_utf8(image.manifest.clone())
        .unwrap()
        .replace("layer.v1.tar+gzip", "layer.v1.squashfs");
    let cases = [
        (MANIFEST, both.into_bytes(), ErrorKind::DataLoss),
        (wrong_type.0, wrong_type.1, ErrorKind::DataLoss),
        (MANIFEST, artifact.to_string().into_bytes(), ErrorKind::Unsupported),
        (MANIFEST, squashfs.into_bytes(), ErrorKind::Unsupported),
        (MANIFEST, br#"{"schemaVersion":1,"fsLayers":[]}"#.to_vec(), ErrorKind::Unsupported),
        (MANIFEST, b"<html>".to_vec(), ErrorKind::DataLoss),
    ];
    for (media_type, body, kind) in cases {
        let server =
            Hostile::start(move |_| Answer::ok(&body).with("content-type", media_type)).await;
        fails(&node, &server.reference(), kind, &[]).await;
    }
    // An index in an index in an index …
    let mut documents = vec![image.manifest.clone()];
    for _ in 0..6 {
        let inner = documents.last().unwrap().clone();
        documents.push(index(&[("", "", &inner)]));
    }
    let server = Hostile::start(move |request| {
        let by_digest = documents.iter().find(|d| request.path.contains(Digest::of(d).as_str()));
        Answer::ok(by_digest.unwrap_or(documents.last().unwrap()))
    })
    .await;
    fails(&node, &server.reference(), ErrorKind::DataLoss, &["nested"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_does_not_match_its_digest_is_refused() {
    let node = Node::new();
    let image = Image::small("x");
    let manifest = image.manifest.clone();
    let server = Hostile::start(move |_| Answer::ok(&manifest)).await;
    let other = Digest::of(b"other");
    let reference = format!("{}/x@{other}", server.host);
    fails(&node, &reference, ErrorKind::DataLoss, &[other.as_str()]).await;
    let manifest = image.manifest.clone();
    let header = other.to_string();
    let server =
        Hostile::start(move |_| Answer::ok(&manifest).with("docker-content-digest", &header)).await;
    fails(&node, &server.reference(), ErrorKind::DataLoss, &[other.as_str()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_breaks_off_is_resumed_where_it_stopped() {
    let image = large();
    let (layer, size) = (image.layers[0].digest(), image.layers[0].blob.len());
    let tries = AtomicUsize::new(0);
    let server = Hostile::start(move |request| {
        if !request.path.contains(layer.as_str()) {
            return honest(&image, request);
        }
        let blob = &image.layers[0].blob;
        let from: usize = request
            .header("range")
            .and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok())
            .unwrap_or(0);
        let mut answer = Answer::ok(&blob[from..]);
        if from > 0 {
            answer.status = 206;
            answer = answer.with("content-range", &format!("bytes {from}-{}/{size}", size - 1));
        }
        if tries.fetch_add(1, Ordering::SeqCst) < 4 {
            answer.cut = Some(300_000.min(answer.body.len()));
        }
        answer
    })
    .await;
    let node = Node::new();
    node.pull(&server.reference()).await.unwrap();
    let ranges = server.seen().iter().filter(|r| r.header("range").is_some()).count();
    assert!(ranges >= 4, "{ranges} ranges");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ignores_ranges_sends_the_rest_all_the_same() {
    let image = large();
    let (layer, tries) = (image.layers[0].digest(), AtomicUsize::new(0));
    let server = Hostile::start(move |request| {
        let mut answer = honest(&image, request);
        if request.path.contains(layer.as_str()) && tries.fetch_add(1, Ordering::SeqCst) == 0 {
            answer.cut = Some(1 << 20);
        }
        answer
    })
    .await;
    Node::new().pull(&server.reference()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_range_and_an_endless_break_are_errors() {
    let node = Node::new();
    for lie in [true, false] {
        let image = large();
        let layer = image.layers[0].digest();
        let server = Hostile::start(move |request| {
            let mut answer = honest(&image, request);
            if request.path.contains(layer.as_str()) {
                if lie && request.header("range").is_some() {
                    answer.status = 206;
                    answer = answer.with("content-range", "bytes 5-9/10");
                } else {
                    answer.cut = Some(1000);
                }
            }
            answer
        })
        .await;
        let kind = if lie { ErrorKind::DataLoss } else { ErrorKind::Unavailable };
        fails(&node, &server.reference(), kind, &[&server.host]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_falls_silent_is_given_up() {
    let image = large();
    let layer = image.layers[0].digest();
    let server = Hostile::start(move |request| {
        let mut answer = honest(&image, request);
        if request.path.contains(layer.as_str()) {
            answer.stall = Some(100_000.min(answer.body.len()));
            answer.status = 200;
        }
        answer
    })
    .await;
    let node = Node::with(|config| config.stall_seconds = 1);
    let started = Instant::now();
    fails(&node, &server.reference(), ErrorKind::Unavailable, &[&server.host]).await;
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overloaded_registry_is_asked_again_as_it_says() {
    let image = Image::small("busy");
    let tries = AtomicUsize::new(0);
    let server = Hostile::start(move |request| match tries.fetch_add(1, Ordering::SeqCst) {
        0 => Answer::status(429).with("retry-after", "0"),
        1 => Answer::status(503),
        _ => honest(&image, request),
    })
    .await;
    Node::new().pull(&server.reference()).await.unwrap();
    let always = Hostile::start(|_| Answer::status(503)).await;
    let node = Node::new();
    fails(&node, &always.reference(), ErrorKind::Unavailable, &["503"]).await;
    assert_eq!(always.seen().len(), 3, "attempts are bounded");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_do_not_follow_redirects_foreign_urls_or_foreign_realms() {
    let image = Image::small("secret");
    let elsewhere = {
        let image = image.clone();
        Hostile::start(move |request| match request.path.as_str() {
            "/ask" => Answer::status(401).with("www-authenticate", "Basic realm=\"x\""),
            _ => honest(&image, request),
        })
        .await
    };
    let layer = image.layers[0].digest();
    // A host of its own, reached by another name than the registry's address.
    let foreign = elsewhere.host.replace("127.0.0.1", "localhost");
    let location = format!("http://{foreign}/v2/image/blobs/{layer}");
    let (served, wanted) = (image.clone(), layer.clone());
    let server = Hostile::start(move |request| {
        if request.header("authorization").is_none() {
            return Answer::status(401).with("www-authenticate", "Basic realm=\"x\"");
        }
        if request.path.contains(wanted.as_str()) {
            return Answer::status(307).with("location", &location);
        }
        honest(&served, request)
    })
    .await;
    let node = Node::new();
    node.pull_as(&server.reference(), "secret").await.unwrap();
    assert!(elsewhere.seen().iter().all(|request| request.header("authorization").is_none()));
    assert!(!elsewhere.seen().is_empty());

    // A 401 from a host it redirected to is not answered.
    let asks = format!("http://{foreign}/ask");
    let server = Hostile::start(move |_| Answer::status(307).with("location", &asks)).await;
    let node = Node::new();
    let error = node.pull_as(&server.reference(), "secret").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{}", chain(&error));
    assert!(elsewhere.seen().iter().all(|request| request.header("authorization").is_none()));

    for realm in
        [&format!("http://{foreign}/token"), "file:///etc/passwd", "http://169.254.169.254/"]
    {
        let challenge = format!("Bearer realm=\"{realm}\"");
        let server =
            Hostile::start(move |_| Answer::status(401).with("www-authenticate", &challenge)).await;
        let before = elsewhere.seen().len();
        let error = node.pull_as(&server.reference(), "secret").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{}", chain(&error));
        assert!(chain(&error).contains(realm), "{}", chain(&error));
        assert_eq!(elsewhere.seen().len(), before, "the realm was not asked");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_without_end_are_given_up() {
    let server =
        Hostile::start(|request| Answer::status(302).with("location", &request.path)).await;
    let node = Node::new();
    fails(&node, &server.reference(), ErrorKind::Unavailable, &["redirect"]).await;
    assert!(server.seen().len() < 15);
}
