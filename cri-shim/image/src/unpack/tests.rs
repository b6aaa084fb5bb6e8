//! Layers applied to real directories, hostile ones among them. Needs root.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs,
    io::Write,
    os::unix::fs::{FileTypeExt, MetadataExt},
};

use ::tar::{Builder, EntryType, Header};
use proptest::prelude::*;
use sha2::Digest as _;

use super::*;

/// A layer under construction.
struct Tarball(Builder<Vec<u8>>);

impl Tarball {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    /// Adds an entry under any name whatsoever.
    fn raw(mut self, kind: EntryType, name: &str, link: &str, mode: u32, data: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(1);
        header.set_gid(2);
        header.set_mtime(1_000_000_000);
        header.set_size(data.len() as u64);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            let (major, minor) = link.split_once(',').unwrap();
            header.set_device_major(major.parse().unwrap()).unwrap();
            header.set_device_minor(minor.parse().unwrap()).unwrap();
        } else {
            header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        }
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    fn file(self, name: &str, data: &str) -> Self {
        self.raw(EntryType::Regular, name, "", 0o644, data.as_bytes())
    }

    fn dir(self, name: &str, mode: u32) -> Self {
        self.raw(EntryType::Directory, name, "", mode, b"")
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.raw(EntryType::Symlink, name, target, 0o777, b"")
    }

    fn hardlink(self, name: &str, target: &str) -> Self {
        self.raw(EntryType::Link, name, target, 0o644, b"")
    }

    /// Gives the next entry an extended attribute.
    fn xattr(mut self, name: &str, value: &str) -> Self {
        let key = format!("SCHILY.xattr.{name}");
        self.0.append_pax_extensions([(key.as_str(), value.as_bytes())]).unwrap();
        self
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// A layer's directory beside a host directory that must stay as it is.
struct Place {
    dir: tempfile::TempDir,
    sentinel: BTreeMap<PathBuf, String>,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for sub in ["layer", "trash", "host/sub"] {
            fs::create_dir_all(dir.path().join(sub)).unwrap();
        }
        fs::write(dir.path().join("host/secret"), "host content").unwrap();
        fs::write(dir.path().join("host/sub/deep"), "host content").unwrap();
        let sentinel = describe(&dir.path().join("host"));
        Self { dir, sentinel }
    }

    fn layer(&self) -> PathBuf {
        self.dir.path().join("layer")
    }

    fn host(&self) -> String {
        self.dir.path().join("host").display().to_string()
    }

    fn unpack_limited(&self, bytes: &[u8], entries: u64) -> Result<Unpacked> {
        let announced = Announced {
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
            diff_id: Digest::of(bytes),
            max_bytes: 1 << 20,
            max_entries: entries,
        };
        let trash = Trash::open(self.dir.path().join("trash")).unwrap();
        let result = unpack(bytes, None, &announced, &self.layer(), &trash);
        trash.empty().unwrap();
        assert_eq!(describe(&self.dir.path().join("host")), self.sentinel, "the host changed");
        result
    }

    fn unpack(&self, tarball: Tarball) -> Result<Unpacked> {
        self.unpack_limited(&tarball.bytes(), 100)
    }

    /// Applies a layer that must be refused, and returns the reason.
    fn refused(&self, tarball: Tarball) -> String {
        match self.unpack(tarball) {
            Err(e) => e.chain(),
            Ok(_) => panic!("accepted: {:?}", describe(&self.layer())),
        }
    }
}

/// Path, type, mode, owner, links, content and time of everything in a tree.
fn describe(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    let mut open = vec![dir.to_owned()];
    while let Some(path) = open.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let content = if meta.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            String::new()
        } else if meta.is_symlink() {
            fs::read_link(&path).unwrap().display().to_string()
        } else if meta.is_file() {
            fs::read_to_string(&path).unwrap()
        } else {
            format!("{:?} {}", meta.file_type(), meta.rdev())
        };
        let text = format!(
            "{:o} {}:{} {} {} {content}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            if meta.is_dir() { 0 } else { meta.nlink() },
            meta.mtime()
        );
        all.insert(path.strip_prefix(dir).unwrap().to_owned(), text);
    }
    all
}

fn xattr(path: &Path, name: &str) -> Option<String> {
    let mut value = vec![0; 256];
    let count = rustix::fs::lgetxattr(path, name, &mut value[..]).ok()?;
    Some(String::from_utf8_lossy(&value[..count]).into_owned())
}

#[test]
fn an_ordinary_layer_arrives_with_all_its_attributes() {
    let place = Place::new();
    let done = place
        .unpack(
            Tarball::new()
                .dir("./", 0o700)
                .dir("d", 0o1777)
                .xattr("user.note", "hello")
                .raw(EntryType::Regular, "d/setuid", "", 0o4755, b"program")
                .hardlink("d/again", "d/setuid")
                .symlink("d/link", "/absolute/elsewhere")
                .raw(EntryType::Fifo, "d/pipe", "", 0o600, b"")
                .raw(EntryType::Char, "d/null", "1,3", 0o666, b"")
                .raw(EntryType::Block, "d/disk", "8,0", 0o660, b""),
        )
        .unwrap();
    let at = |name: &str| fs::symlink_metadata(place.layer().join(name)).unwrap();
    assert_eq!(at("").mode() & 0o7777, 0o700);
    assert_eq!((at("d").mode() & 0o7777, at("d").mtime()), (0o1777, 1_000_000_000));
    let file = at("d/setuid");
    assert_eq!((file.mode() & 0o7777, file.uid(), file.gid()), (0o4755, 1, 2));
    assert_eq!((file.nlink(), file.mtime()), (2, 1_000_000_000));
    assert_eq!(file.ino(), at("d/again").ino());
    assert_eq!(xattr(&place.layer().join("d/setuid"), "user.note").as_deref(), Some("hello"));
    assert_eq!((at("d/link").uid(), at("d/link").mtime()), (1, 1_000_000_000));
    assert!(at("d/pipe").file_type().is_fifo());
    assert_eq!(at("d/null").rdev(), rustix::fs::makedev(1, 3));
    assert_eq!(at("d/null").mode() & 0o7777, 0o666);
    assert!(at("d/disk").file_type().is_block_device());
    assert_eq!((done.inodes, done.implied.len()), (6, 0));
}

#[test]
fn compressed_layers_are_verified_on_both_sides() {
    let tar = Tarball::new().file("a", "content").bytes();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let gzip = gzip.finish().unwrap();
    let place = Place::new();
    let trash = Trash::open(place.dir.path().join("trash")).unwrap();
    let attempt = |bytes: &[u8], digest: &Digest, size: usize, diff_id: &Digest| {
        let _ = fs::remove_file(place.layer().join("a"));
        let announced = Announced {
            digest: digest.clone(),
            size: size as u64,
            diff_id: diff_id.clone(),
            max_bytes: 1 << 20,
            max_entries: 10,
        };
        unpack(bytes, None, &announced, &place.layer(), &trash).map_err(|e| e.chain())
    };
    let (digest, diff_id) = (Digest::of(&gzip), Digest::of(&tar));
    attempt(&gzip, &digest, gzip.len(), &diff_id).unwrap();
    let wrong = attempt(&gzip, &digest, gzip.len(), &digest).unwrap_err();
    assert!(wrong.starts_with("uncompressed layer"), "{wrong}");
    let wrong = attempt(&gzip, &diff_id, gzip.len(), &diff_id).unwrap_err();
    assert!(wrong.contains("expected") && wrong.contains(digest.as_str()), "{wrong}");
    for size in [gzip.len() - 1, gzip.len() + 1] {
        let wrong = attempt(&gzip, &digest, size, &diff_id).unwrap_err();
        assert!(wrong.contains("bytes"), "{wrong}");
    }
    // A flipped byte is reported as what it is, not as a broken archive.
    let mut flipped = gzip.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x10;
    let wrong = attempt(&flipped, &digest, gzip.len(), &diff_id).unwrap_err();
    assert!(wrong.contains("expected") && wrong.contains(digest.as_str()), "{wrong}");
}

#[test]
fn names_that_climb_out_are_refused_whatever_they_name() {
    use EntryType::{Block, Char, Directory, Fifo, Link, Regular, Symlink};
    for kind in [Regular, Directory, Symlink, Link, Fifo, Char, Block] {
        for name in ["../x", "a/../../x", "..", "a/.."] {
            let place = Place::new();
            let link = if matches!(kind, Char | Block) { "1,3" } else { "t" };
            let reason = place.refused(Tarball::new().raw(kind, name, link, 0o644, b""));
            assert!(reason.contains("\"..\""), "{kind:?} {name}: {reason}");
        }
    }
}

#[test]
fn absolute_names_are_taken_inside_the_layer() {
    let place = Place::new();
    let name = format!("{}/planted", place.host());
    place.unpack(Tarball::new().file(&name, "x")).unwrap();
    assert!(place.layer().join(name.trim_start_matches('/')).exists());
}

#[test]
fn entries_behind_a_link_to_the_host_stay_in_the_layer() {
    let place = Place::new();
    let host = place.host();
    for target in [host.as_str(), "../host"] {
        let name = if target.starts_with('/') { "abs" } else { "rel" };
        let inside = format!("{name}/planted");
        let tarball = Tarball::new().symlink(name, target).file(&inside, "x");
        place.unpack(tarball).unwrap();
    }
    let absolute = place.layer().join(host.trim_start_matches('/')).join("planted");
    assert!(absolute.exists() && place.layer().join("host/planted").exists());
}

#[test]
fn a_directory_over_a_link_replaces_the_link_and_spares_its_target() {
    let place = Place::new();
    let host = place.host();
    place
        .unpack(
            Tarball::new()
                .symlink("d", &host)
                .xattr("user.x", "y")
                .dir("d", 0o777)
                .file("d/secret", "not the host's"),
        )
        .unwrap();
    let dir = fs::symlink_metadata(place.layer().join("d")).unwrap();
    assert!(dir.is_dir());
    assert_eq!(fs::read_to_string(place.layer().join("d/secret")).unwrap(), "not the host's");
}

#[test]
fn a_file_over_a_link_replaces_the_link() {
    let place = Place::new();
    let secret = format!("{}/secret", place.host());
    place.unpack(Tarball::new().symlink("f", &secret).file("f", "new")).unwrap();
    assert!(fs::symlink_metadata(place.layer().join("f")).unwrap().is_file());
}

#[test]
fn hard_links_reach_nothing_outside_the_layer() {
    let place = Place::new();
    let secret = format!("{}/secret", place.host());
    for target in [secret.as_str(), "../host/secret", "missing", "/", "."] {
        place.refused(Tarball::new().hardlink("h", target));
    }
    // Through a link in the layer, and to a link as such.
    let reason =
        place.refused(Tarball::new().symlink("out", &place.host()).hardlink("h", "out/secret"));
    assert!(reason.contains("\"h\""), "{reason}");
    place.unpack(Tarball::new().symlink("l", &secret).hardlink("h2", "l")).unwrap();
    assert!(fs::symlink_metadata(place.layer().join("h2")).unwrap().is_symlink());
    place.refused(Tarball::new().dir("dir", 0o755).hardlink("h3", "dir"));
    place.unpack(Tarball::new().file("self", "kept").hardlink("self", "self")).unwrap();
    assert_eq!(fs::read_to_string(place.layer().join("self")).unwrap(), "kept");
}

#[test]
fn deletions_become_overlay_marks() {
    let place = Place::new();
    let done = place
        .unpack(
            Tarball::new()
                .file("d/.wh.gone", "")
                .file("o/.wh..wh..opq", "")
                .file(".wh..wh.plnk", "")
                .file("kept", "x")
                .file(".wh.kept", "")
                .file(".wh.rebuilt", "")
                .dir("rebuilt", 0o755)
                .file(".wh.implied", "")
                .file("implied/f", "x"),
        )
        .unwrap();
    let gone = fs::symlink_metadata(place.layer().join("d/gone")).unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    let opaque = |name: &str| xattr(&place.layer().join(name), "trusted.overlay.opaque");
    assert_eq!(opaque("o").as_deref(), Some("y"));
    assert_eq!(opaque("rebuilt").as_deref(), Some("y"));
    assert_eq!(opaque("implied").as_deref(), Some("y"));
    assert_eq!(fs::read_to_string(place.layer().join("kept")).unwrap(), "x");
    assert!(!place.layer().join(".wh..wh.plnk").exists());
    let implied: Vec<_> = done.implied.iter().map(|p| p.display().to_string()).collect();
    assert_eq!(implied, ["d", "implied", "o"]);
    assert!(!done.opaque_root);
    assert!(Place::new().unpack(Tarball::new().file(".wh..wh..opq", "")).unwrap().opaque_root);
}

#[test]
fn deletions_of_no_name_or_through_a_link_do_no_harm() {
    for name in [".wh.", ".wh..", ".wh...", "d/.wh..", "d/.wh..."] {
        let reason = Place::new().refused(Tarball::new().file(name, ""));
        assert!(reason.contains("deletes no name"), "{name}: {reason}");
    }
    let place = Place::new();
    let host = place.host();
    let links = || Tarball::new().symlink("l", &host);
    place.unpack(links().file("l/.wh.secret", "").file("l/.wh..wh..opq", "")).unwrap();
    // Only the name "..": refused before anything is looked at.
    place.refused(Tarball::new().file("../.wh.secret", ""));
}

#[test]
fn overlay_marks_in_disguise_are_refused_or_dropped() {
    let place = Place::new();
    let reason = place.refused(Tarball::new().raw(EntryType::Char, "n", "0,0", 0o600, b""));
    assert!(reason.contains("takes for a deletion"), "{reason}");
    let marks = [
        "trusted.overlay.redirect",
        "trusted.overlay.metacopy",
        "trusted.overlay.opaque",
        "user.overlay.redirect",
        "trusted.other",
        "security.selinux",
    ];
    let place = Place::new();
    for (n, mark) in marks.iter().enumerate() {
        place
            .unpack(Tarball::new().xattr(mark, "/../../etc").dir(&format!("d{n}"), 0o755))
            .unwrap();
        assert_eq!(xattr(&place.layer().join(format!("d{n}")), mark), None, "{mark}");
    }
}

#[test]
fn missing_parents_behind_a_dangling_link_are_made_at_its_target() {
    let place = Place::new();
    place
        .unpack(Tarball::new().dir("var", 0o755).symlink("var/run", "../run").file("var/run/x", ""))
        .unwrap();
    assert!(place.layer().join("run/x").exists());
    let reason = place.refused(Tarball::new().symlink("a", "b").symlink("b", "a").file("a/x", ""));
    assert!(reason.contains("symbolic links") || reason.contains("parent"), "{reason}");
    let reason = place.refused(Tarball::new().file("f", "").file("f/x", ""));
    assert!(reason.contains("no directory"), "{reason}");
}

#[test]
fn bounds_on_entries_bytes_names_and_depth_hold() {
    let place = Place::new();
    let many = (0..101).fold(Tarball::new(), |t, n| t.file(&format!("f{n}"), ""));
    let error = place.unpack(many).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{}", error.chain());

    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let big = Tarball::new().file("big", &"0".repeat(3 << 20)).bytes();
    gzip.write_all(&big).unwrap();
    let error = place.unpack_limited(&gzip.finish().unwrap(), 100).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{}", error.chain());

    let long = |name: &str| {
        let mut builder = Builder::new(Vec::new());
        let mut header = Header::new_gnu();
        header.set_size(0);
        builder.append_data(&mut header, name, &b""[..]).unwrap();
        place.unpack_limited(&builder.into_inner().unwrap(), 10).map_err(|e| e.chain())
    };
    assert!(long(&"n".repeat(255)).is_ok());
    assert!(long(&"n".repeat(256)).unwrap_err().contains("255 bytes"));
    assert!(long(&"n/".repeat(600)).unwrap_err().contains("512 directories"));
    assert!(long(&"nnnnnnnn/".repeat(500)).unwrap_err().contains("4096 bytes"));
}

#[test]
fn a_full_disk_is_reported_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let target = CString::new(dir.path().to_str().unwrap()).unwrap();
    let options = CString::new("size=256k").unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("pinion-test", &*target, "tmpfs", flags, &*options).unwrap();
    let result = std::panic::catch_unwind(|| {
        for sub in ["layer", "trash"] {
            fs::create_dir(dir.path().join(sub)).unwrap();
        }
        let bytes = Tarball::new().file("big", &"0".repeat(900 << 10)).bytes();
        let announced = Announced {
            digest: Digest::of(&bytes),
            size: bytes.len() as u64,
            diff_id: Digest::of(&bytes),
            max_bytes: 1 << 20,
            max_entries: 10,
        };
        let trash = Trash::open(dir.path().join("trash")).unwrap();
        let layer = dir.path().join("layer");
        unpack(bytes.as_slice(), None, &announced, &layer, &trash).unwrap_err()
    });
    rustix::mount::unmount(dir.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    let error = result.unwrap();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{}", error.chain());
}

/// Replaces parents by links between the entries of parallel unpackings of one directory.
#[test]
fn links_swapped_in_while_unpacking_lead_nowhere() {
    let place = Place::new();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let layer = place.layer();
    fs::create_dir(layer.join("real")).unwrap();
    std::os::unix::fs::symlink(place.host(), layer.join("evil")).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = rustix::fs::renameat_with(
                    rustix::fs::CWD,
                    layer.join("real"),
                    rustix::fs::CWD,
                    layer.join("evil"),
                    rustix::fs::RenameFlags::EXCHANGE,
                );
            }
        });
        for round in 0..200 {
            let name = format!("real/planted{round}");
            let inner = format!("real/sub{round}/x");
            // Whether a round succeeds depends on the race; the host staying whole does not.
            let _ = place.unpack(Tarball::new().file(&name, "x").file(&inner, "x"));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_entries_reaches_the_host(
        entries in prop::collection::vec((0_usize..6, 0_usize..9, 0_usize..9), 1..12)
    ) {
        let place = Place::new();
        let host = place.host();
        let secret = format!("{host}/secret");
        let names = ["a", "a/b", "a/b/c", "l", "l/x", "../host/secret", "/a", ".wh.a", "a/.wh..wh..opq"];
        let links = [host.as_str(), secret.as_str(), "../host", "a", "l", "..", "/", "a/b", "."];
        let mut tarball = Tarball::new();
        for (kind, name, link) in entries {
            let (name, link) = (names[name], links[link]);
            tarball = match kind {
                0 => tarball.file(name, "planted"),
                1 => tarball.dir(name, 0o777),
                2 => tarball.symlink(name, link),
                3 => tarball.hardlink(name, link),
                4 => tarball.raw(EntryType::Fifo, name, "", 0o666, b""),
                _ => tarball.xattr("user.x", "y").dir(name, 0o700),
            };
        }
        let _ = place.unpack(tarball); // checks the host either way
    }
}

#[test]
fn a_hash_covers_what_follows_the_archive() {
    let tar = Tarball::new().file("a", "x").bytes();
    let trailing = [tar.clone(), vec![0; 100_000]].concat();
    let place = Place::new();
    place.unpack_limited(&trailing, 10).unwrap();
    let mut hasher = sha2::Sha256::new();
    hasher.update(&trailing);
    assert_eq!(Digest::of_hasher(hasher), Digest::of(&trailing));
}
