//! The log: every byte, partial lines, rotation, disks that fill up.

use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::time::Duration;

use pinion_monitor_proto::message::{ReopenLog, error::Kind, request::Verb, response::Outcome};

use crate::rig::{Rig, logged, wait_until};

fn reopen(id: &str) -> Verb {
    Verb::ReopenLog(ReopenLog { id: id.to_owned() })
}

#[test]
fn long_and_unterminated_lines_become_partial_records() {
    let mut rig = Rig::new();
    let script = "head -c 40000 /dev/zero | tr '\\000' x; echo; printf end";
    let create = rig.bundle("c", &["/bin/busybox", "sh", "-c", script], |_| {});
    rig.create(create);
    rig.start("c");
    rig.exit_of("c");
    let text = fs::read_to_string(rig.log_path("c")).unwrap();
    let shape: Vec<(&str, usize)> = text
        .lines()
        .map(|line| {
            let (head, content) = line.split_at(40);
            (&head[31..39], content.len())
        })
        .collect();
    let expected = [("stdout P", 16384), ("stdout P", 16384), ("stdout F", 7232), ("stdout P", 3)];
    assert_eq!(shape, expected);
    let mut whole = vec![b'x'; 40_000];
    whole.extend_from_slice(b"\nend");
    assert_eq!(logged(&text, "stdout"), whole);
}

#[test]
fn a_shorter_limit_is_kept_and_binary_output_survives() {
    let mut rig = Rig::new();
    let script = r"printf '123456789\n\000\001\002\r\n'";
    let mut create = rig.bundle("c", &["/bin/sh", "-c", script], |_| {});
    create.max_log_line = 4;
    rig.create(create);
    rig.start("c");
    rig.exit_of("c");
    let text = fs::read_to_string(rig.log_path("c")).unwrap();
    assert_eq!(logged(&text, "stdout"), b"123456789\n\0\x01\x02\r\n");
    assert_eq!(text.matches(" P ").count(), 2);
}

#[test]
fn no_byte_is_lost_or_split_while_the_log_is_rotated_under_load() {
    let mut rig = Rig::new();
    rig.run_shell("c", "seq 1 400000; seq 1 1000 >&2");
    let mut rotated = Vec::new();
    while !rig.exit_file_exists("c") {
        let old = rig.dir.path().join(format!("c.log.{}", rotated.len()));
        fs::rename(rig.log_path("c"), &old).unwrap();
        rig.done(reopen("c"));
        rotated.push(old);
        std::thread::sleep(Duration::from_millis(2));
    }
    rig.exit_of("c");
    assert!(rotated.len() > 3, "only {} rotations", rotated.len());
    rotated.push(rig.log_path("c"));
    let text: String = rotated.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    let numbers = |to: u32| (1..=to).map(|n| format!("{n}\n")).collect::<String>();
    assert!(logged(&text, "stdout") == numbers(400_000).as_bytes());
    assert!(logged(&text, "stderr") == numbers(1000).as_bytes());
}

#[test]
fn a_log_that_is_no_plain_file_is_refused() {
    let mut rig = Rig::new();
    let victim = rig.dir.path().join("victim");
    fs::write(&victim, "untouched").unwrap();
    let create = rig.bundle("c", &["/bin/true"], |_| {});
    symlink(&victim, rig.log_path("c")).unwrap();
    assert!(matches!(rig.call(Verb::Create(create), &[]), Outcome::Error(_)));
    assert!(rig.connect().is_empty());

    rig.run_shell("d", "while true; do echo line; usleep 1000; done");
    fs::rename(rig.log_path("d"), rig.dir.path().join("d.old")).unwrap();
    symlink(&victim, rig.log_path("d")).unwrap();
    assert_eq!(rig.error(reopen("d")).kind(), Kind::Internal);
    fs::remove_file(rig.log_path("d")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, rig.log_path("d"), 0o600.into()).unwrap();
    rig.error(reopen("d"));
    assert!(fs::metadata(rig.log_path("d")).unwrap().file_type().is_fifo());
    fs::remove_file(rig.log_path("d")).unwrap();
    rig.done(reopen("d"));
    wait_until("the log goes on", || fs::metadata(rig.log_path("d")).unwrap().len() > 0);
    assert_eq!(fs::read_to_string(victim).unwrap(), "untouched");
}

/// A tmpfs of 1 MiB; the mount is gone with the guard.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(path: std::path::PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("test", &path, "tmpfs", flags, Some(c"size=1m")).unwrap();
        Self(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_full_disk_stops_no_container_and_the_log_tells_what_is_missing() {
    let mut rig = Rig::new();
    let disk = SmallDisk::mount(rig.dir.path().join("disk"));
    let log = disk.0.join("c.log");
    let script =
        "seq 1 200000; : >/tmp/said; while ! [ -e /tmp/room ]; do usleep 10000; done; echo later";
    let mut create = rig.bundle("c", &["/bin/sh", "-c", script], |_| {});
    create.log_path = log.to_str().unwrap().to_owned();
    rig.create(create);
    rig.start("c");
    // 200000 records are far more than the disk holds; the container is not held up.
    let said = rig.dir.path().join("rootfs/tmp/said");
    wait_until("the container said it all", || said.exists());
    assert!(fs::metadata(&log).unwrap().len() > 1_000_000, "the disk is not full");
    std::thread::sleep(Duration::from_millis(300));
    let full = fs::read_to_string(&log).unwrap();
    assert!(full.ends_with('\n'), "a torn record is in the log");
    let moved = rig.dir.path().join("c.log.1");
    fs::copy(&log, &moved).unwrap();
    fs::remove_file(&log).unwrap();
    rig.done(reopen("c"));
    fs::write(rig.dir.path().join("rootfs/tmp/room"), "").unwrap();
    rig.exit_of("c");
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains("log records") && text.contains("were lost here"), "{text}");
    // On a slow machine the end of what the pipe held may come after the reopening.
    let after = String::from_utf8(logged(&text, "stdout")).unwrap();
    let tail = after.strip_suffix("later\n").expect("the last record is missing");
    for (expected, line) in (1..=200_000).rev().zip(tail.lines().rev()) {
        assert_eq!(line, expected.to_string());
    }
    let kept = logged(&full, "stdout");
    let kept = String::from_utf8(kept).unwrap();
    for (expected, line) in (1..).zip(kept.lines()) {
        assert_eq!(line, expected.to_string());
    }
}

#[test]
fn output_without_a_log_is_discarded_and_blocks_nobody() {
    let mut rig = Rig::new();
    let mut create = rig.bundle("c", &["/bin/sh", "-c", "seq 1 100000"], |_| {});
    create.log_path = String::new();
    rig.create(create);
    rig.start("c");
    assert_eq!(rig.exit_of("c").code, 0);
}
