//! Damaged files, foreign files, newer files and full disks.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed test panics")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use pinion_store::{Error, Store, Table};
use proptest::prelude::*;

const NOTES: Table<String> = Table::new("notes");

fn filled(path: &Path) {
    let store = Store::open(path).unwrap().store;
    for n in 0..40 {
        store.write(|tx| tx.put(NOTES, &format!("{n:03}"), &"x".repeat(500))).unwrap();
    }
}

/// Opens a file that may be damaged and proves that the result is usable and honest.
fn opens_whatever_it_holds(path: &Path) -> Option<PathBuf> {
    let opened = Store::open(path).unwrap();
    let listing = opened.store.list(NOTES).unwrap();
    if let Some(aside) = &opened.quarantined {
        assert!(aside.exists() && listing.records.is_empty());
    }
    opened.store.write(|tx| tx.put(NOTES, "after", &"y".to_owned())).unwrap();
    assert_eq!(opened.store.get(NOTES, "after").unwrap().as_deref(), Some("y"));
    opened.quarantined
}

#[test]
fn garbage_is_moved_aside_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    for length in [1, 100, 4096, 100_000] {
        let garbage = vec![0xa5; length];
        fs::write(&path, &garbage).unwrap();
        let aside = opens_whatever_it_holds(&path).expect("quarantined");
        assert_eq!(fs::read(&aside).unwrap(), garbage);
        let name = aside.file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("store.redb.quarantined-"), "{name}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 5, "none overwrote another");
}

#[test]
fn an_empty_file_is_a_new_store() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sub/store.redb");
    fs::create_dir(dir.path().join("sub")).unwrap();
    fs::write(&path, b"").unwrap();
    assert_eq!(opens_whatever_it_holds(&path), None);
}

#[test]
fn a_creation_cut_short_is_started_over_without_alarm() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    for remains in [&b""[..], &[0; 4096], &[0xa5; 100_000]] {
        fs::write(dir.path().join("store.redb.new"), remains).unwrap();
        assert_eq!(opens_whatever_it_holds(&path), None);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_file_cut_anywhere_never_stops_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole.redb");
    filled(&whole);
    let bytes = fs::read(&whole).unwrap();
    for (n, length) in (512..bytes.len()).step_by(bytes.len() / 30).enumerate() {
        let path = dir.path().join(format!("cut-{n}.redb"));
        fs::write(&path, &bytes[..length]).unwrap();
        opens_whatever_it_holds(&path);
    }
}

#[test]
fn a_redb_file_of_another_program_is_moved_aside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let foreign = redb::Database::create(&path).unwrap();
    let tx = foreign.begin_write().unwrap();
    tx.open_table(redb::TableDefinition::<u64, u64>::new("meta")).unwrap().insert(1, 2).unwrap();
    tx.commit().unwrap();
    drop(foreign);
    assert!(opens_whatever_it_holds(&path).is_some());
}

#[test]
fn a_file_of_a_newer_build_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    filled(&path);
    let store = Store::open(&path).unwrap().store;
    store.write(|tx| tx.put(Table::new("meta"), "schema", &99_u32)).unwrap();
    drop(store);

    for _ in 0..2 {
        match Store::open(&path) {
            Err(Error::NewerSchema { found: 99, supported, .. }) => assert!(supported < 99),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_store_in_use_is_refused_not_moved_aside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let _first = Store::open(&path).unwrap();
    assert!(matches!(Store::open(&path), Err(Error::Busy { .. })));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_directory_in_place_of_the_file_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    fs::create_dir(&path).unwrap();
    let error = Store::open(&path).unwrap_err();
    assert_eq!(error.to_string(), format!("open {}", path.display()));
    assert!(path.is_dir());
}

#[test]
fn the_file_is_private_to_root() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    filled(&path);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn a_flipped_byte_is_harmless_or_detected(position in any::<prop::sample::Index>(), flip in 1_u8..) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.redb");
        filled(&path);
        let mut bytes = fs::read(&path).unwrap();
        let at = position.index(bytes.len());
        bytes[at] ^= flip;
        fs::write(&path, &bytes).unwrap();
        if Store::open(&path).unwrap().quarantined.is_none() {
            let store = Store::open(&path).unwrap().store;
            let listing = store.list(NOTES).unwrap();
            prop_assert_eq!(listing.records.len(), 40);
            prop_assert!(listing.records.iter().all(|(_, note)| *note == "x".repeat(500)));
        }
    }
}

/// A tmpfs of a given size, unmounted on drop.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(size: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "pinion-test"])
            .arg(dir.path())
            .status()
            .unwrap();
        assert!(status.success(), "this test needs root to mount a tmpfs");
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.0.path()).status();
        assert!(std::thread::panicking() || unmounted.is_ok_and(|status| status.success()));
    }
}

#[test]
fn a_full_disk_fails_the_write_and_the_store_keeps_working() {
    let disk = SmallDisk::new("4m");
    let path = disk.0.path().join("store.redb");
    let store = Store::open(&path).unwrap().store;
    store.write(|tx| tx.put(NOTES, "first", &"kept".to_owned())).unwrap();

    let mut stored = 0;
    let refused = loop {
        match store.write(|tx| tx.put(NOTES, &format!("{stored:05}"), &"z".repeat(100_000))) {
            Ok(()) => stored += 1,
            Err(error) => break error,
        }
        assert!(stored < 1000, "the disk never filled up");
    };
    assert!(matches!(refused, Error::Transaction { .. } | Error::Table { .. }), "{refused:?}");

    let listing = store.list(NOTES).unwrap();
    assert_eq!(listing.records.len(), stored + 1, "exactly what was acknowledged");
    for n in 0..stored {
        // Deleting needs a few pages of its own; it must work as soon as something is freed.
        store.write(|tx| tx.delete(NOTES, &format!("{n:05}"))).unwrap();
    }
    store.write(|tx| tx.put(NOTES, "last", &"fits".to_owned())).unwrap();
    assert_eq!(store.get(NOTES, "first").unwrap().as_deref(), Some("kept"));
    drop(store);
    assert_eq!(Store::open(&path).unwrap().quarantined, None);
}
