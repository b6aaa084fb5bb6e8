//! Processes run in a container by clients.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use pinion_monitor_proto::message::{
    Exec, KillExec, Resize, error::Kind, request::Verb, response::Outcome,
};

use crate::rig::{Rig, alive, pipe, process, read_all, read_until, wait_until, write};

fn with_container() -> Rig {
    let mut rig = Rig::new();
    rig.run("c", &["/bin/sleep", "1000"]);
    rig
}

#[test]
fn output_and_exit_code_come_back() {
    let mut rig = with_container();
    let running = rig.exec_shell("c", "e", "echo out; echo err >&2; exit 42");
    assert_eq!(running.output(), "out\n");
    assert_eq!(read_all(&running.err), "err\n");
    let exited = rig.exec_exit(&running);
    assert_eq!((exited.code, exited.signal, exited.timed_out), (42, 0, false));
    let killed = rig.exec_shell("c", "e", "kill -9 $$");
    assert_eq!(rig.exec_exit(&killed).code, 137);
}

#[test]
fn input_reaches_the_process_and_its_end_too() {
    let mut rig = with_container();
    let ((their_in, input), (out, their_out)) = (pipe(), pipe());
    let request = Exec { stdin: true, stderr: false, ..rig.exec_request("c", "e", &["/bin/cat"]) };
    let id = rig.send(Verb::Exec(request), &[their_in.as_fd(), their_out.as_fd()]);
    drop((their_in, their_out));
    assert!(matches!(rig.answer(id), Outcome::ExecStarted(_)));
    write(&input, b"hello");
    drop(input);
    assert_eq!(read_all(&out), "hello");
    assert!(matches!(rig.answer(id), Outcome::ExecExited(exited) if exited.code == 0));
}

#[test]
fn a_missing_program_is_an_error_and_leaves_nothing() {
    let mut rig = with_container();
    let ((out, their_out), (_err, their_err)) = (pipe(), pipe());
    let request = rig.exec_request("c", "e", &["/bin/no-such-program"]);
    let id = rig.send(Verb::Exec(request), &[their_out.as_fd(), their_err.as_fd()]);
    drop((their_out, their_err));
    let Outcome::Error(error) = rig.answer(id) else { panic!() };
    assert_eq!(error.kind(), Kind::Runtime);
    assert!(error.message.contains("no-such-program"), "{error:?}");
    read_all(&out);
    let left: Vec<_> = std::fs::read_dir(rig.directory("c"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("exec-"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_deadline_kills_the_process_with_all_it_started() {
    let mut rig = with_container();
    let script = "echo begun; (setsid sleep 1000 &); (sleep 1001 &); sh -c 'sleep 1002; true' & setsid sleep 1003 & sleep 1004";
    let request = rig.exec_request("c", "e", &["/bin/sh", "-c", script]);
    let begun = Instant::now();
    let running = rig.exec(Exec { timeout_ms: 1000, ..request });
    read_until(&running.out, "begun");
    let exited = rig.exec_exit(&running);
    let took = begun.elapsed();
    assert!(exited.timed_out && exited.signal == 9, "{exited:?}");
    assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(5), "{took:?}");
    // Nobody is left to hold the pipes.
    assert_eq!(read_all(&running.out), "");
    assert!(!alive(running.pid));
    assert_eq!(rig.connect()[0].exited, None);
}

#[test]
fn a_process_left_behind_does_not_keep_an_exec_from_ending() {
    let mut rig = with_container();
    let begun = Instant::now();
    let running = rig.exec_shell("c", "e", "sleep 1000 & echo done");
    let exited = rig.exec_exit(&running);
    assert_eq!(exited.code, 0);
    assert!(begun.elapsed() < Duration::from_secs(20));
    // What it wrote is there although the pipe stays open.
    assert_eq!(read_until(&running.out, "done"), "done\n");
}

#[test]
fn a_client_can_kill_an_exec_whole() {
    let mut rig = with_container();
    let running = rig.exec_shell("c", "e", "sleep 1000 & echo begun; wait");
    read_until(&running.out, "begun");
    let kill = |signal| KillExec { id: "c".to_owned(), exec_id: "e".to_owned(), signal };
    rig.done(Verb::KillExec(kill(0)));
    assert_eq!(rig.exec_exit(&running).signal, 9);
    assert_eq!(read_all(&running.out), "");
    let gone = rig.error(Verb::KillExec(kill(0)));
    assert_eq!(gone.kind(), Kind::NotFound);
}

#[test]
fn an_exec_ends_with_its_container() {
    let mut rig = with_container();
    let running = rig.exec_shell("c", "e", "echo begun; sleep 1000");
    read_until(&running.out, "begun");
    rig.kill("c", 9);
    assert_eq!(rig.exec_exit(&running).signal, 9);
    assert_eq!(rig.exit_of("c").signal, 9);
    let ((_out, their_out), (_err, their_err)) = (pipe(), pipe());
    let late = rig.exec_request("c", "late", &["/bin/true"]);
    let outcome = rig.call(Verb::Exec(late), &[their_out.as_fd(), their_err.as_fd()]);
    assert!(matches!(outcome, Outcome::Error(e) if e.kind() == Kind::NotRunning));
}

#[test]
fn a_terminal_is_relayed_and_resized() {
    let mut rig = with_container();
    let ((their_in, input), (out, their_out)) = (pipe(), pipe());
    let mut spec = process(&["/bin/sh", "-c", "tty; echo ready; read x; stty size; echo got $x"]);
    spec["terminal"] = true.into();
    let path = rig.dir.path().join("tty.json");
    std::fs::write(&path, spec.to_string()).unwrap();
    let request = Exec {
        terminal: true,
        stdin: true,
        stderr: false,
        process: path.to_str().unwrap().to_owned(),
        ..rig.exec_request("c", "e", &[])
    };
    let id = rig.send(Verb::Exec(request), &[their_in.as_fd(), their_out.as_fd()]);
    drop((their_in, their_out));
    let started = rig.answer(id);
    assert!(matches!(started, Outcome::ExecStarted(_)), "{started:?}");
    assert!(read_until(&out, "ready").contains("/dev/pts/"));
    let size = Resize { id: "c".to_owned(), exec_id: "e".to_owned(), width: 123, height: 45 };
    rig.done(Verb::Resize(size));
    write(&input, b"word\n");
    let rest = read_all(&out);
    assert!(rest.contains("45 123") && rest.contains("got word"), "{rest}");
    assert!(matches!(rig.answer(id), Outcome::ExecExited(exited) if exited.code == 0));
}

#[test]
fn a_terminal_is_hung_up_when_its_client_is_gone() {
    let mut rig = with_container();
    let (out, their_out) = pipe();
    let mut spec =
        process(&["/bin/sh", "-c", "echo ready; while true; do echo x; usleep 1000; done"]);
    spec["terminal"] = true.into();
    let path = rig.dir.path().join("tty.json");
    std::fs::write(&path, spec.to_string()).unwrap();
    let request = Exec {
        terminal: true,
        stderr: false,
        process: path.to_str().unwrap().to_owned(),
        ..rig.exec_request("c", "e", &[])
    };
    let id = rig.send(Verb::Exec(request), &[their_out.as_fd()]);
    drop(their_out);
    assert!(matches!(rig.answer(id), Outcome::ExecStarted(_)));
    read_until(&out, "ready");
    drop(out);
    let Outcome::ExecExited(exited) = rig.answer(id) else { panic!() };
    assert_ne!(exited.code, 0);
}

#[test]
fn a_hundred_execs_at_once_all_come_back() {
    let mut rig = with_container();
    let mut sent = Vec::new();
    for number in 0..100 {
        let ((out, their_out), (_err, their_err)) = (pipe(), pipe());
        let script = format!("echo {number}; exit {number}");
        let request = rig.exec_request("c", &format!("e{number}"), &["/bin/sh", "-c", &script]);
        let id = rig.send(Verb::Exec(request), &[their_out.as_fd(), their_err.as_fd()]);
        sent.push((number, id, out));
    }
    for (number, id, out) in sent {
        let started = rig.answer(id);
        assert!(matches!(started, Outcome::ExecStarted(_)), "{number}: {started:?}");
        let Outcome::ExecExited(exited) = rig.answer(id) else { panic!() };
        assert_eq!(exited.code, number);
        assert_eq!(read_all(&out), format!("{number}\n"));
    }
    let pid = rig.monitor_pid();
    let descriptors = || std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    wait_until("no descriptor is left over", || descriptors() < 16);
}

#[test]
fn an_exec_id_is_unique_while_it_runs() {
    let mut rig = with_container();
    let first = rig.exec_shell("c", "e", "echo begun; sleep 1000");
    read_until(&first.out, "begun");
    let ((_out, their_out), (_err, their_err)) = (pipe(), pipe());
    let second = rig.exec_request("c", "e", &["/bin/true"]);
    let outcome = rig.call(Verb::Exec(second), &[their_out.as_fd(), their_err.as_fd()]);
    assert!(matches!(outcome, Outcome::Error(e) if e.kind() == Kind::AlreadyExists));
}
