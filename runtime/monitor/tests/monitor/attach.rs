//! Clients joined to a container's stdio.

use std::fs;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use pinion_monitor_proto::message::{
    Attach, Resize, error::Kind, request::Verb, response::Outcome,
};

use crate::rig::{Rig, logged, read_all, read_until, wait_until, write};

#[test]
fn output_goes_to_every_client_and_to_the_log() {
    let mut rig = Rig::new();
    let create = rig.bundle("c", &["/bin/sh", "-c", "echo out; echo err >&2"], |_| {});
    rig.create(create);
    let (first, second) = (rig.attach("c", false), rig.attach("c", false));
    rig.start("c");
    rig.exit_of("c");
    for client in [first, second] {
        assert_eq!(read_all(&client.out), "out\n");
        assert_eq!(read_all(&client.err), "err\n");
    }
    let log = fs::read_to_string(rig.log_path("c")).unwrap();
    assert_eq!(logged(&log, "stdout"), b"out\n");
}

#[test]
fn input_reaches_the_container_from_one_client_after_another() {
    let mut rig = Rig::new();
    let mut create = rig.bundle("c", &["/bin/cat"], |_| {});
    create.stdin = true;
    rig.create(create);
    rig.start("c");
    for word in ["first", "second"] {
        let client = rig.attach("c", true);
        write(client.input.as_ref().unwrap(), word.as_bytes());
        assert_eq!(read_until(&client.out, word), word);
    }
    assert!(rig.connect()[0].exited.is_none());
}

#[test]
fn stdin_once_ends_the_input_with_the_first_client() {
    let mut rig = Rig::new();
    let mut create = rig.bundle("c", &["/bin/cat"], |_| {});
    (create.stdin, create.stdin_once) = (true, true);
    rig.create(create);
    rig.start("c");
    let mut client = rig.attach("c", true);
    let input = client.input.take().unwrap();
    let data = "x".repeat(300_000);
    let writer = std::thread::spawn({
        let data = data.clone();
        move || write(&input, data.as_bytes())
    });
    assert_eq!(read_all(&client.out).len(), data.len());
    writer.join().unwrap();
    assert_eq!(rig.exit_of("c").code, 0);
    let log = fs::read_to_string(rig.log_path("c")).unwrap();
    assert!(logged(&log, "stdout") == data.as_bytes());
}

#[test]
fn a_terminal_echoes_resizes_and_is_logged() {
    let mut rig = Rig::new();
    let script = "echo ready; read x; stty size; echo got $x";
    let mut create = rig.bundle("c", &["/bin/sh", "-c", script], |config| {
        config["process"]["terminal"] = true.into();
    });
    create.stdin = true;
    rig.create(create);
    let client = rig.attach("c", true);
    rig.start("c");
    read_until(&client.out, "ready");
    let size = Resize { id: "c".to_owned(), width: 99, height: 33, ..Resize::default() };
    rig.done(Verb::Resize(size.clone()));
    write(client.input.as_ref().unwrap(), b"word\n");
    let text = read_all(&client.out);
    assert!(text.contains("33 99") && text.contains("got word"), "{text}");
    assert_eq!(rig.exit_of("c").code, 0);
    let log = fs::read_to_string(rig.log_path("c")).unwrap();
    assert!(String::from_utf8_lossy(&logged(&log, "stdout")).contains("got word\r\n"));
    assert_eq!(rig.error(Verb::Resize(size)).kind(), Kind::NotRunning);
}

#[test]
fn a_client_that_does_not_read_is_cut_off_and_the_container_goes_on() {
    let mut rig = Rig::new();
    let mut create = rig.bundle("c", &["/bin/sh", "-c", "seq 1 500000"], |_| {});
    create.log_path = String::new();
    rig.create(create);
    let (stuck, reader) = (rig.attach("c", false), rig.attach("c", false));
    let begun = Instant::now();
    rig.start("c");
    let all = read_all(&reader.out);
    assert_eq!(all.lines().count(), 500_000);
    assert_eq!(rig.exit_of("c").code, 0);
    assert!(begun.elapsed() < Duration::from_secs(30));
    let beginning = read_all(&stuck.out);
    assert!(all.starts_with(&beginning) && beginning.len() < all.len());
}

#[test]
fn a_slow_client_gets_everything() {
    let mut rig = Rig::new();
    let create = rig.bundle("c", &["/bin/sh", "-c", "seq 1 300000"], |_| {});
    rig.create(create);
    let client = rig.attach("c", false);
    rig.start("c");
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(read_all(&client.out).lines().count(), 300_000);
    assert_eq!(rig.exit_of("c").code, 0);
}

#[test]
fn a_client_that_leaves_is_forgotten() {
    let mut rig = Rig::new();
    rig.run_shell("c", "while true; do echo line; usleep 1000; done");
    let pid = rig.monitor_pid();
    let descriptors = || fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let before = descriptors();
    for _ in 0..50 {
        drop(rig.attach("c", false));
    }
    wait_until("their descriptors are closed", || descriptors() <= before);
}

#[test]
fn only_pipes_and_sockets_can_be_attached() {
    let mut rig = Rig::new();
    rig.run("c", &["/bin/sleep", "1000"]);
    let null = fs::File::open("/dev/null").unwrap();
    let verb = Attach { id: "c".to_owned(), stdout: true, ..Attach::default() };
    let outcome = rig.call(Verb::Attach(verb), &[null.as_fd()]);
    assert!(matches!(outcome, Outcome::Error(error) if error.kind() == Kind::Invalid));
}
