//! Create, start, signal, exit, delete.

use std::fs;

use pinion_monitor_proto::message::{
    Create, Delete, Signal, Start, error::Kind, request::Verb, response::Outcome,
};

use crate::rig::{Rig, alive, logged, wait_until};

#[test]
fn a_container_runs_logs_exits_and_is_deleted() {
    let mut rig = Rig::new();
    let create = rig.bundle("c", &["/bin/sh", "-c", "echo out; echo err >&2; exit 7"], |_| {});
    let pid = rig.create(create);
    assert!(alive(pid));
    let waiting = rig.connect();
    assert!(waiting[0].pid == pid && !waiting[0].started && waiting[0].exited.is_none());
    rig.start("c");
    let exited = rig.exit_of("c");
    assert_eq!((exited.code, exited.signal, exited.oom_killed), (7, 0, false));
    let file = rig.exit_file("c");
    assert_eq!(file["code"], 7);
    assert_eq!(file["finished_at"], exited.finished_at);
    let log = fs::read_to_string(rig.log_path("c")).unwrap();
    assert_eq!(logged(&log, "stdout"), b"out\n");
    assert_eq!(logged(&log, "stderr"), b"err\n");
    let ended = rig.connect();
    assert!(ended[0].pid == 0 && ended[0].started && ended[0].exited == Some(exited));
    rig.delete("c", false);
    assert!(rig.connect().is_empty());
}

#[test]
fn a_signal_ends_a_container_and_is_its_exit() {
    let mut rig = Rig::new();
    rig.run_shell("term", "trap 'exit 9' TERM; while true; do usleep 10000; done");
    rig.run("kill", &["/bin/sleep", "1000"]);
    rig.run("all", &["/bin/sh", "-c", "sleep 1000 & sleep 1000; exit 1"]);
    // The trap may not be set yet; a signal before it has no effect on an init.
    wait_until("the trap works", || {
        rig.kill("term", 15);
        std::thread::sleep(std::time::Duration::from_millis(50));
        rig.exit_file_exists("term")
    });
    assert_eq!(rig.exit_of("term").code, 9);
    rig.kill("kill", 9);
    let killed = rig.exit_of("kill");
    assert_eq!((killed.code, killed.signal), (137, 9));
    rig.done(Verb::Signal(Signal { id: "all".to_owned(), signal: 9, all: true }));
    assert_eq!(rig.exit_of("all").signal, 9);
    let late = rig.error(Verb::Signal(Signal { id: "all".to_owned(), signal: 9, all: false }));
    assert_eq!(late.kind(), Kind::NotRunning);
}

#[test]
fn force_deletes_a_running_container_and_its_exit_is_told_first() {
    let mut rig = Rig::new();
    let pid = rig.run("c", &["/bin/sleep", "1000"]);
    let refused = rig.error(Verb::Delete(Delete { id: "c".to_owned(), force: false }));
    assert_eq!(refused.kind(), Kind::Invalid);
    rig.delete("c", true);
    assert!(!alive(pid));
    assert_eq!(rig.exit_of("c").signal, 9);
    assert_eq!(rig.exit_file("c")["signal"], 9);
    assert!(rig.connect().is_empty());
}

#[test]
fn a_created_container_that_is_never_started_can_be_deleted() {
    let mut rig = Rig::new();
    let create = rig.bundle("c", &["/bin/true"], |_| {});
    let pid = rig.create(create);
    rig.delete("c", true);
    wait_until("its init is gone", || !alive(pid));
    assert!(rig.connect().is_empty());
}

#[test]
fn a_runtime_error_is_told_in_the_runtimes_words_and_leaves_nothing() {
    let mut rig = Rig::new();
    // runc looks for the program at create, others may find out at start.
    let create = rig.bundle("c", &["/bin/no-such-program"], |_| {});
    let error = match rig.call(Verb::Create(create), &[]) {
        Outcome::Error(error) => error,
        _ => rig.error(Verb::Start(Start { id: "c".to_owned() })),
    };
    assert_eq!(error.kind(), Kind::Runtime);
    assert!(error.message.contains("no-such-program"), "{error:?}");
    rig.delete("c", true);

    let mut create = rig.bundle("d", &["/bin/true"], |_| {});
    create.bundle = "/nonexistent".to_owned();
    let error = rig.error(Verb::Create(create.clone()));
    assert_eq!(error.kind(), Kind::Runtime);
    assert!(
        error.message.contains("/nonexistent") || error.message.contains("no such"),
        "{error:?}"
    );
    assert!(rig.connect().is_empty());
    let again = rig.bundle("d", &["/bin/true"], |_| {});
    rig.create(again);
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let mut rig = Rig::new();
    let missing = rig.error(Verb::Start(Start { id: "nope".to_owned() }));
    assert_eq!(missing.kind(), Kind::NotFound);
    let option = Create { id: "--root".to_owned(), ..rig.bundle("x", &["/bin/true"], |_| {}) };
    assert_eq!(rig.error(Verb::Create(option)).kind(), Kind::Invalid);
    let relative = Create { bundle: "b".to_owned(), ..rig.bundle("x", &["/bin/true"], |_| {}) };
    assert_eq!(rig.error(Verb::Create(relative)).kind(), Kind::Invalid);
    rig.run("twice", &["/bin/sleep", "1000"]);
    let twice = rig.bundle("twice", &["/bin/true"], |_| {});
    assert_eq!(rig.error(Verb::Create(twice)).kind(), Kind::AlreadyExists);
    let started = rig.error(Verb::Start(Start { id: "twice".to_owned() }));
    assert_eq!(started.kind(), Kind::Invalid);
    let signal = rig.error(Verb::Signal(Signal { id: "twice".to_owned(), signal: 65, all: false }));
    assert_eq!(signal.kind(), Kind::Invalid);
}

#[test]
fn real_time_signals_are_delivered() {
    let mut rig = Rig::new();
    rig.run_shell("c", "trap 'exit 5' 37; while true; do usleep 10000; done");
    wait_until("the trap works", || {
        rig.kill("c", 37);
        std::thread::sleep(std::time::Duration::from_millis(50));
        rig.exit_file_exists("c")
    });
    assert_eq!(rig.exit_of("c").code, 5);
}

#[test]
fn many_containers_that_end_at_once_are_all_told() {
    let mut rig = Rig::new();
    for number in 0..12 {
        let create = rig.bundle(&format!("c{number}"), &["/bin/sh", "-c", "exit 3"], |_| {});
        rig.create(create);
    }
    let starts: Vec<u64> = (0..12)
        .map(|number| rig.send(Verb::Start(Start { id: format!("c{number}") }), &[]))
        .collect();
    for (number, start) in starts.into_iter().enumerate() {
        rig.answer(start);
        assert_eq!(rig.exit_of(&format!("c{number}")).code, 3);
    }
}
