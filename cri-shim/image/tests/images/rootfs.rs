//! Root file systems made from images.

use std::{fs, os::unix::fs::MetadataExt, process::Command};

use pinion_image::ErrorKind;

use crate::{
    content::{Image, Layer, tar},
    node::Node,
    registry::Registry,
};

async fn node_with(layers: Vec<Layer>) -> (Registry, Node, String) {
    let (registry, node) = (Registry::start().await, Node::new());
    let reference = registry.push("x:1", &Image::new(layers)).await;
    node.pull(&reference).await.unwrap();
    (registry, node, reference)
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_run_in_a_root_file_system() {
    let (registry, node) = (Registry::start().await, Node::new());
    let reference = registry.push("busybox:1", &Image::busybox()).await;
    node.pull(&reference).await.unwrap();
    let (one, two) = (node.mount("one", &reference), node.mount("two", &reference));
    let output = Command::new("chroot")
        .arg(&one)
        .args(["/bin/busybox", "sh", "-c", "echo changed > /etc/motd; /bin/busybox cat /etc/motd"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "changed\n");
    assert_eq!(fs::read_to_string(two.join("etc/motd")).unwrap(), "hello\n", "each has its own");
}

#[tokio::test(flavor = "multi_thread")]
async fn deletions_and_replacements_of_upper_layers_hold() {
    let layers = vec![
        Layer::gzip(&tar(&[
            ("gone", b"1"),
            ("kept", b"1"),
            ("d/", b""),
            ("d/old", b"1"),
            ("r/", b""),
            ("r/old", b"1"),
        ])),
        Layer::gzip(&tar(&[
            (".wh.gone", b""),
            ("d/.wh..wh..opq", b""),
            ("d/new", b"2"),
            (".wh.r", b""),
            ("r/", b""),
            ("r/new", b"2"),
        ])),
        Layer::gzip(&tar(&[("kept", b"3")])),
    ];
    let (_registry, node, reference) = node_with(layers).await;
    let rootfs = node.mount("c", &reference);
    assert!(!rootfs.join("gone").exists());
    assert_eq!(fs::read_to_string(rootfs.join("kept")).unwrap(), "3");
    for dir in ["d", "r"] {
        let names: Vec<_> =
            fs::read_dir(rootfs.join(dir)).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["new"], "{dir}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_may_hide_everything_below_it() {
    let layers = vec![
        Layer::gzip(&tar(&[("old", b"1")])),
        Layer::gzip(&tar(&[(".wh..wh..opq", b""), ("new", b"2")])),
    ];
    let (_registry, node, reference) = node_with(layers).await;
    let rootfs = node.mount("c", &reference);
    assert!(!rootfs.join("old").exists() && rootfs.join("new").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_root_directory_looks_as_the_image_says() {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_mode(0o711);
    header.set_uid(3);
    header.set_size(0);
    builder.append_data(&mut header, "./", &b""[..]).unwrap();
    let layers = vec![Layer::gzip(&builder.into_inner().unwrap())];
    let (_registry, node, reference) = node_with(layers).await;
    let root = fs::metadata(node.mount("c", &reference)).unwrap();
    assert_eq!((root.mode() & 0o7777, root.uid()), (0o711, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_and_twenty_eight_layers_are_stacked() {
    let layer = |n: usize| {
        Layer::plain(&tar(&[(&format!("f{n}"), b"x"), ("last", n.to_string().as_bytes())]))
    };
    let (_registry, node, reference) = node_with((0..128).map(layer).collect()).await;
    let rootfs = node.mount("c", &reference);
    assert_eq!(fs::read_to_string(rootfs.join("last")).unwrap(), "127");
    assert_eq!(fs::read_dir(&rootfs).unwrap().count(), 129);
}

#[tokio::test(flavor = "multi_thread")]
async fn preparing_and_removing_may_be_repeated() {
    let layers = vec![Layer::gzip(&tar(&[("f", b"x")]))];
    let (_registry, mut node, reference) = node_with(layers).await;
    let rootfs = node.mount("c", &reference);
    fs::write(rootfs.join("written"), "x").unwrap();
    node.mount("c", &reference);
    assert!(rootfs.join("written").exists(), "a mounted file system is left as it is");
    node.restart();
    node.mount("c", &reference);
    assert!(rootfs.join("written").exists(), "also after a restart");

    // As after a reboot: the record and the upper directory are there, the mount is not.
    assert!(Command::new("umount").arg(&rootfs).status().unwrap().success());
    node.mount("c", &reference);
    assert!(!rootfs.join("written").exists(), "what an interrupted attempt left is made anew");

    for _ in 0..2 {
        node.images.remove_rootfs("c", &rootfs).unwrap();
        assert!(fs::read_dir(&rootfs).unwrap().next().is_none());
        assert!(node.images.rootfs_list().unwrap().is_empty());
    }
    assert_eq!(fs::read_dir(node.root.join("snapshots/containers")).unwrap().count(), 0);
    let error = node.images.rootfs_usage("c").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_that_cannot_be_made_leaves_nothing() {
    let layers = vec![Layer::gzip(&tar(&[("f", b"x")]))];
    let (_registry, node, reference) = node_with(layers).await;
    let file = node.root.join("file");
    fs::write(&file, "x").unwrap();
    let under_file = file.join("rootfs");
    node.images.prepare_rootfs("c", &reference, &under_file).unwrap_err();
    assert!(node.images.rootfs_list().unwrap().is_empty());
    assert_eq!(fs::read_dir(node.root.join("snapshots/containers")).unwrap().count(), 0);
    let missing = node.images.prepare_rootfs("c", "no-such-image", &node.root.join("m"));
    assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
    for id in ["", ".", "..", "../x", "a/b", ".hidden", "a b", &"x".repeat(200)] {
        let error = node.images.prepare_rootfs(id, &reference, &node.root.join("m")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{id:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_counts_what_was_written_and_what_is_stored() {
    let layers = vec![Layer::gzip(&tar(&[("f", &[7; 100_000]), ("d/", b"")]))];
    let (_registry, node, reference) = node_with(layers).await;
    let rootfs = node.mount("c", &reference);
    assert_eq!(node.images.rootfs_usage("c").unwrap().inodes, 0);
    let other = node.mount("other", &reference);
    fs::write(other.join("written"), vec![1; 50_000]).unwrap();
    let usage = node.images.rootfs_usage("other").unwrap();
    assert_eq!(usage.inodes, 1);
    assert!((50_000..100_000).contains(&usage.bytes), "{usage:?}");
    let info = node.images.fs_info().unwrap();
    assert_eq!(info.path, node.root);
    assert_eq!(info.containers, usage);
    assert!((100_000..200_000).contains(&info.images.bytes), "{info:?}");
    assert_eq!(info.images.inodes, 2 + 3, "two in the layer, three blobs");
    drop(rootfs);
}
