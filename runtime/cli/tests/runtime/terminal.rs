use std::io::{IoSliceMut, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::bundle::Bundle;

/// Accepts one connection and takes the terminal out of its message.
fn receive_master(listener: &UnixListener) -> std::fs::File {
    let (socket, _) = listener.accept().unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 256];
    let mut slices = [IoSliceMut::new(&mut bytes)];
    rustix::net::recvmsg(&socket, &mut slices, &mut ancillary, RecvFlags::empty()).unwrap();
    let mut fds: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    assert_eq!(fds.len(), 1);
    fds.pop().unwrap().into()
}

fn read_until(master: &mut std::fs::File, text: &str) -> String {
    let mut seen = String::new();
    let mut buffer = [0; 1024];
    while !seen.contains(text) {
        match master.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(length) => seen.push_str(&String::from_utf8_lossy(&buffer[..length])),
        }
    }
    seen
}

#[test]
fn the_console_socket_gets_the_master_of_the_programs_terminal() {
    let mut bundle = Bundle::new(
        "tty; stty size; test -c /dev/console && echo console; read x; echo got-$x; exit 0",
    );
    bundle.config["process"]["terminal"] = true.into();
    bundle.config["process"]["consoleSize"] = serde_json::json!({ "height": 33, "width": 111 });
    bundle.write_config();
    let socket = bundle.path().join("console.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let path = socket.to_str().unwrap();
    bundle.verb(&["create", "--console-socket", path, &bundle.id]).ok();
    let mut master = receive_master(&listener);
    bundle.start();
    let text = read_until(&mut master, "console\r\n");
    assert!(text.contains("/dev/pts/0") || text.contains("/dev/console"), "{text}");
    assert!(text.contains("33 111"), "{text}");
    master.write_all(b"hello\n").unwrap();
    assert!(read_until(&mut master, "got-hello").contains("got-hello"));
    bundle.wait_for("stopped");
}

#[test]
fn exec_with_a_terminal_hands_it_over_too() {
    let bundle = Bundle::new("sleep 100");
    bundle.launch();
    let socket = bundle.path().join("console.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let path = socket.to_str().unwrap();
    bundle
        .verb(&[
            "exec",
            "--tty",
            "--detach",
            "--console-socket",
            path,
            &bundle.id,
            "/bin/sh",
            "-c",
            "tty; sleep 0.2",
        ])
        .ok();
    let mut master = receive_master(&listener);
    assert!(read_until(&mut master, "/dev/pts/").contains("/dev/pts/"));
}

#[test]
fn a_terminal_needs_a_console_socket_when_nobody_waits() {
    let mut bundle = Bundle::new("true");
    bundle.config["process"]["terminal"] = true.into();
    bundle.write_config();
    bundle.verb(&["create", &bundle.id]).fails_with("cannot allocate tty");
    bundle.assert_nothing_left();
    bundle.config["process"]["terminal"] = false.into();
    bundle.write_config();
    let socket = bundle.path().join("console.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    bundle
        .verb(&["create", "--console-socket", socket.to_str().unwrap(), &bundle.id])
        .fails_with("cannot use console socket");
    bundle.assert_nothing_left();
}

#[test]
fn run_in_the_foreground_relays_the_terminal() {
    let mut bundle = Bundle::new("tty; echo from the terminal");
    bundle.config["process"]["terminal"] = true.into();
    bundle.write_config();
    let outcome = bundle.verb(&["run", &bundle.id]);
    if !crate::bundle::is_pinion() {
        // runc wants its own standard input to be a terminal.
        return;
    }
    assert!(outcome.ok().contains("from the terminal"));
}

#[test]
fn what_a_terminal_prints_into_a_file_has_no_carriage_returns() {
    let mut bundle = Bundle::new("echo one; echo two; sleep 100");
    bundle.config["process"]["terminal"] = true.into();
    bundle.config["process"]["args"] = serde_json::json!(["/bin/sh", "-c", "echo one; echo two"]);
    assert_eq!(bundle.run().ok(), "one\ntwo\n");
}
