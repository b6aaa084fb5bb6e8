//! The seccomp notify listener, handed to an agent that answers.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

use pinion_sys::seccomp_notify;
use serde_json::{Value, json};

use crate::bundle::{Bundle, is_runc_since};

/// The error the agent gives to every mkdir: no program comes upon it by itself.
const ANSWER: i32 = libc::EXDEV;

/// An agent for `connections` processes: takes the state and the descriptor, answers
/// `calls` system calls of each, and returns the states.
fn agent(socket: UnixListener, connections: usize, calls: usize) -> JoinHandle<Vec<Value>> {
    std::thread::spawn(move || {
        let serve = |_| {
            let (connection, _) = socket.accept().unwrap();
            let mut buffer = vec![0; 64 << 10];
            let (length, fds) = pinion_sys::scm::receive(&connection, &mut buffer).unwrap();
            let listener: OwnedFd = fds.into_iter().next().unwrap();
            let state = serde_json::from_slice(&buffer[..length]).unwrap();
            for _ in 0..calls {
                let call = seccomp_notify::receive(listener.as_fd()).unwrap();
                assert!([libc::SYS_mkdir, libc::SYS_mkdirat].contains(&i64::from(call.number)));
                seccomp_notify::answer(listener.as_fd(), call.id, 0, ANSWER).unwrap();
            }
            state
        };
        (0..connections).map(serve).collect()
    })
}

fn profile(socket: &std::path::Path) -> Value {
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "listenerPath": socket.to_str().unwrap(),
        "listenerMetadata": "what the agent needs to know",
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY" }],
    })
}

#[test]
fn an_agent_answers_for_the_program_and_for_exec() {
    // Debian's runc 1.1 does it too; both must agree on what the agent is told.
    for no_new_privileges in [true, false] {
        let mut bundle = Bundle::new("mkdir /tmp/x 2>/tmp/said; sleep 100");
        let path = bundle.path().join("agent.sock");
        let socket = UnixListener::bind(&path).unwrap();
        bundle.config["linux"]["seccomp"] = profile(&path);
        bundle.config["process"]["noNewPrivileges"] = json!(no_new_privileges);
        let agent = agent(socket, 2, 1);
        bundle.launch();
        let said = bundle.rootfs().join("tmp/said");
        crate::bundle::eventually(|| {
            std::fs::read_to_string(&said).is_ok_and(|text| text.contains("ross-device"))
        });
        assert!(!bundle.rootfs().join("tmp/x").exists());
        let exec = bundle.exec("mkdir /tmp/y 2>&1; echo $?");
        assert!(exec.ok().contains("ross-device"), "the agent's errno reaches exec");
        let states = agent.join().unwrap();
        for (state, fds) in states.iter().zip(["seccompFd", "seccompFd"]) {
            assert_eq!(state["fds"], json!([fds]), "{state}");
            assert_eq!(state["metadata"], "what the agent needs to know");
            assert_eq!(state["state"]["id"], bundle.id.as_str());
            assert_eq!(state["state"]["bundle"], bundle.path().to_str().unwrap());
        }
        assert_eq!(states[0]["pid"], bundle.pid());
        assert_eq!(states[0]["state"]["pid"], bundle.pid());
        // The exec'd process asked for the second one.
        assert_ne!(states[1]["pid"], bundle.pid());
    }
}

#[test]
fn an_agent_that_is_not_there_fails_the_start() {
    let mut bundle = Bundle::new("true");
    bundle.config["linux"]["seccomp"] = profile(&bundle.path().join("nobody.sock"));
    let outcome = bundle.run();
    assert!(outcome.code.is_some_and(|code| code != 0), "{outcome:?}");
    if is_runc_since(1) {
        outcome.fails_with("nobody.sock");
    }
    bundle.assert_nothing_left();
}
