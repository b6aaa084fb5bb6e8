//! Loading images from files.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use flate2::{Compression, write::GzEncoder};
use pinion_image::{Digest, ErrorKind};
use serde_json::{Value, json};

use crate::{
    content::{INDEX, Image, Layer, MANIFEST, descriptor, index, tar},
    node::{Node, chain},
    registry::Registry,
};

/// Files of an OCI layout with these images and the names their annotations give them.
fn layout(images: &[(&Image, Value)]) -> Vec<(String, Vec<u8>)> {
    let mut files = vec![("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec())];
    let mut entries = Vec::new();
    for (image, annotations) in images {
        let mut entry = descriptor(MANIFEST, &image.manifest);
        entry["annotations"] = annotations.clone();
        entries.push(entry);
        for blob in image.blobs().chain([image.manifest.as_slice()]) {
            files.push((format!("blobs/sha256/{}", Digest::of(blob).hex()), blob.to_vec()));
        }
    }
    let index = json!({"schemaVersion": 2, "manifests": entries});
    files.push(("index.json".to_owned(), index.to_string().into_bytes()));
    files
}

fn in_directory(dir: &Path, files: &[(String, Vec<u8>)]) -> PathBuf {
    let path = dir.join("layout");
    for (name, data) in files {
        let file = path.join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, data).unwrap();
    }
    path
}

fn in_archive(dir: &Path, files: &[(String, Vec<u8>)]) -> PathBuf {
    let files: Vec<(&str, &[u8])> = files.iter().map(|(n, d)| (n.as_str(), d.as_slice())).collect();
    let path = dir.join("archive.tar");
    fs::write(&path, tar(&files)).unwrap();
    path
}

fn compressed(archive: &Path) -> PathBuf {
    let path = archive.with_extension("tar.gz");
    let mut encoder = GzEncoder::new(fs::File::create(&path).unwrap(), Compression::fast());
    encoder.write_all(&fs::read(archive).unwrap()).unwrap();
    encoder.finish().unwrap();
    path
}

/// What `docker save` wrote before it knew OCI layouts, links between layers included.
fn docker_save(image: &Image, tags: &Value) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str, data: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(data.len() as u64);
        builder.append_data(&mut header, name, data).unwrap();
    };
    let mut layers = Vec::new();
    for (n, layer) in image.layers.iter().enumerate() {
        add(&format!("{n}/layer.tar"), &layer.blob);
        layers.push(format!("{n}/layer.tar"));
    }
    let config = format!("{}.json", image.id().hex());
    add(&config, &image.config);
    layers.push("linked/layer.tar".to_owned());
    layers.remove(0);
    layers.rotate_right(1);
    let manifest = json!([{"Config": config, "RepoTags": tags, "Layers": layers}]);
    add("manifest.json", manifest.to_string().as_bytes());
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    builder.append_link(&mut link, "linked/layer.tar", "../0/layer.tar").unwrap();
    builder.into_inner().unwrap()
}

#[test]
fn an_oci_layout_is_loaded_from_a_directory_an_archive_and_a_compressed_archive() {
    let dir = tempfile::tempdir().unwrap();
    let image = Image::busybox();
    let name = json!({"io.containerd.image.name": "example.org/app:2", "org.opencontainers.image.ref.name": "2"});
    let files = layout(&[(&image, name)]);
    let archive = in_archive(dir.path(), &files);
    for path in [in_directory(dir.path(), &files), compressed(&archive), archive] {
        let mut node = Node::new();
        let loaded = node.images.load(&path, None).unwrap_or_else(|e| panic!("{}", chain(&e)));
        assert_eq!(loaded.len(), 1);
        assert_eq!(loaded[0].id, image.id().as_str());
        assert_eq!(loaded[0].repo_tags, ["example.org/app:2"]);
        assert!(loaded[0].repo_digests.is_empty(), "no registry vouched for it");
        node.restart();
        let rootfs = node.mount("c", "example.org/app:2");
        assert_eq!(fs::read_to_string(rootfs.join("etc/motd")).unwrap(), "hello\n");
    }
}

#[test]
fn a_docker_archive_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let part = |name: &'static str| tar(&[(name, b"x")]);
    let image = Image::new(vec![Layer::plain(&part("a")), Layer::plain(&part("b"))]);
    let path = dir.path().join("saved.tar");
    fs::write(&path, docker_save(&image, &json!(["app:1", "example.org/app:1"]))).unwrap();
    let node = Node::new();
    let loaded = node.images.load(&path, None).unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert_eq!(loaded[0].repo_tags, ["docker.io/library/app:1", "example.org/app:1"]);
    assert_eq!(loaded[0].id, image.id().as_str());
    let rootfs = node.mount("c", "app:1");
    assert!(rootfs.join("a").exists() && rootfs.join("b").exists());

    fs::write(&path, docker_save(&Image::small("gz"), &json!(null))).unwrap();
    let loaded = node.images.load(&path, Some("named")).unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert_eq!(loaded[0].repo_tags, ["docker.io/library/named:latest"]);
}

#[test]
fn a_name_given_replaces_the_names_in_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (Image::small("1"), Image::small("2"));
    let named = |name: &str| json!({"org.opencontainers.image.ref.name": name});
    let path =
        in_archive(dir.path(), &layout(&[(&one, named("a.b/one:1")), (&two, named("latest"))]));
    let node = Node::new();
    let loaded = node.images.load(&path, None).unwrap();
    assert_eq!(loaded[0].repo_tags, ["a.b/one:1"]);
    assert!(loaded[1].repo_tags.is_empty(), "a bare tag is no name");
    let error = node.images.load(&path, Some("x")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(chain(&error).contains("2 images"), "{}", chain(&error));
    let single = in_archive(dir.path(), &layout(&[(&one, named("a.b/one:1"))]));
    let loaded = node.images.load(&single, Some("c.d/x:y")).unwrap();
    assert_eq!(loaded[0].repo_tags, ["a.b/one:1", "c.d/x:y"]);
}

#[test]
fn the_variant_for_this_machine_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let (mine, other) = (Image::small("mine"), Image::small("other"));
    let here = if cfg!(target_arch = "aarch64") { "linux/arm64" } else { "linux/amd64" };
    let inner =
        index(&[("linux/s390x", MANIFEST, &other.manifest), (here, MANIFEST, &mine.manifest)]);
    let mut files = layout(&[(&mine, json!({}))]);
    files.retain(|(name, _)| name != "index.json");
    files.push((format!("blobs/sha256/{}", Digest::of(&inner).hex()), inner.clone()));
    files.push(("index.json".to_owned(), index(&[("", INDEX, &inner)])));
    let node = Node::new();
    let loaded = node.images.load(&in_directory(dir.path(), &files), Some("x")).unwrap();
    assert_eq!(loaded[0].id, mine.id().as_str());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_does_not_take_over_a_tag_of_a_registry_unless_told_to() {
    let registry = Registry::start().await;
    let node = Node::new();
    let (pulled, loaded) = (Image::small("pulled"), Image::small("loaded"));
    let reference = registry.push("x:1", &pulled).await;
    node.pull(&reference).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let claim = json!({"io.containerd.image.name": reference});
    let path = in_archive(dir.path(), &layout(&[(&loaded, claim)]));
    let error = node.images.load(&path, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition, "{}", chain(&error));
    assert_eq!(node.images.resolve(&reference).unwrap().id, pulled.id().as_str());
    node.images.load(&path, Some(&reference)).unwrap();
    assert_eq!(node.images.resolve(&reference).unwrap().id, loaded.id().as_str());
}

#[test]
fn what_is_no_image_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::new();
    let image = Image::small("x");
    let good = layout(&[(&image, json!({}))]);
    let layer = format!("blobs/sha256/{}", image.layers[0].digest().hex());
    let without =
        |name: &str| -> Vec<_> { good.iter().filter(|(n, _)| n != name).cloned().collect() };
    let mut flipped = good.clone();
    flipped.iter_mut().find(|(n, _)| *n == layer).unwrap().1[12] ^= 1;
    let mut swapped = good.clone();
    let manifest = format!("blobs/sha256/{}", image.digest().hex());
    swapped.iter_mut().find(|(n, _)| *n == manifest).unwrap().1.push(b' ');
    let save = |text: &str| vec![("manifest.json".to_owned(), text.as_bytes().to_vec())];
    let cases = [
        (without("index.json"), ErrorKind::InvalidArgument, "neither"),
        (without(&layer), ErrorKind::InvalidArgument, "lacks"),
        (flipped, ErrorKind::DataLoss, "expected"),
        (swapped, ErrorKind::DataLoss, "expected"),
        (save("[]"), ErrorKind::InvalidArgument, "no image"),
        (save("{}"), ErrorKind::InvalidArgument, "manifest.json"),
        (save(r#"[{"Config":"../../etc/passwd"}]"#), ErrorKind::InvalidArgument, "lacks"),
    ];
    for (files, kind, word) in cases {
        let error = node.images.load(&in_archive(dir.path(), &files), None).unwrap_err();
        let text = chain(&error);
        assert_eq!(error.kind(), kind, "{text}");
        assert!(text.contains(word), "{text:?} lacks {word:?}");
        node.assert_empty();
    }
    for path in ["missing", "garbage"] {
        let path = dir.path().join(path);
        if path.ends_with("garbage") {
            fs::write(&path, [7; 5000]).unwrap();
        }
        assert!(node.images.load(&path, None).is_err());
    }
}
