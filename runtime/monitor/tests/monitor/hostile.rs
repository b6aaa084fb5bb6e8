//! A machine whose agent is an enemy: a script in QEMU's place says on the agent's channel
//! what no agent should. The monitor ends it, says why in words of its own, stays small, and
//! goes on answering.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use pinion_monitor_proto::channel::Channel;
use pinion_monitor_proto::frame::encode;
use pinion_monitor_proto::guest::{
    AgentHello, Credit, Data, End, Packet, Ready, Setup, packet::What,
};
use pinion_monitor_proto::message::{
    ContainerExited, Done, Event, Exited, GuestEnded, Hello, HelloReply, Request, Response, event,
    request::Verb, response::Outcome,
};
use serde_json::json;

use crate::rig::Rig;

/// No scenario may take longer: a machine that breaks the protocol is killed at once.
const LIMIT: Duration = Duration::from_secs(5);

/// Growth of the monitor that is no leak, in KiB.
const GROWTH: u64 = 4096;

fn frame(what: What) -> Vec<u8> {
    encode(&Packet { what: Some(what) }).unwrap()
}

fn hello() -> AgentHello {
    AgentHello {
        version: 1,
        boot_id: "0".repeat(36),
        release: "6.12.0".into(),
        ..AgentHello::default()
    }
}

fn answer(request: u64, outcome: Option<Outcome>) -> Vec<u8> {
    frame(What::Answer(Response { request, outcome }))
}

fn event(what: event::What) -> Option<Outcome> {
    Some(Outcome::Event(Event { what: Some(what) }))
}

/// A greeting that is in order, and what follows it.
fn after_hello(packets: &[Vec<u8>]) -> Vec<u8> {
    [frame(What::Hello(hello())), packets.concat()].concat()
}

/// The same for an agent that was taken for a good one.
fn after_ready(packets: &[Vec<u8>]) -> Vec<u8> {
    after_hello(&[frame(What::Ready(Ready::default())), packets.concat()])
}

/// Starts a monitor over a machine that is this script.
fn rig(script: &str) -> Rig {
    let rig = Rig::without_monitor();
    let program = rig.dir.path().join("machine");
    fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let plan = json!({
        "machine": {
            "emulator": { "program": program }, "accelerator": "tcg", "kernel": "/k",
            "initramfs": "/i", "processors": { "count": 1, "threads": 1 }, "memory": 128,
        },
        "hostname": "x", "shm_bytes": 0, "boot_limit": 20_000,
    });
    let file = rig.dir.path().join("plan.json");
    fs::write(&file, plan.to_string()).unwrap();
    let launched = rig.launcher().arg("--machine").arg(&file).status().unwrap();
    assert!(launched.success(), "the monitor did not come up");
    rig
}

fn resident(rig: &Rig) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", rig.monitor_pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

fn greet(rig: &Rig) -> HelloReply {
    let mut channel = Channel::connect(&rig.pod.join("monitor.sock")).unwrap();
    channel.stream().set_read_timeout(Some(LIMIT)).unwrap();
    let hello = Hello { version: 1, subscribe: false };
    channel.send(&Request { id: 1, verb: Some(Verb::Hello(hello)) }, &[]).unwrap();
    let response: Response = channel.receive().unwrap().expect("the monitor is gone");
    match response.outcome {
        Some(Outcome::Hello(reply)) => reply,
        // It waited for the guest, which has ended since.
        Some(Outcome::Error(_)) => HelloReply::default(),
        other => panic!("{other:?}"),
    }
}

/// Asks until the monitor says that the guest is gone, and why.
fn ended(rig: &Rig) -> GuestEnded {
    let began = Instant::now();
    loop {
        if let Some(ended) = greet(rig).guest.and_then(|guest| guest.ended) {
            return ended;
        }
        assert!(began.elapsed() < LIMIT, "the machine lives on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The agent's words end the machine for this reason.
fn ends(name: &str, words: &[u8], reason: &str) {
    let said = tempfile::NamedTempFile::new().unwrap();
    fs::write(said.path(), words).unwrap();
    let rig = rig(&format!("cat {} >&3\nexec sleep 1000", said.path().display()));
    let message = ended(&rig).message;
    assert!(message.contains(reason), "{name}: {message:?}");
    assert!(message.chars().all(|c| !c.is_control()) && message.len() < 4096, "{name}");
    let resident = resident(&rig);
    assert!(resident < 3 * GROWTH, "{name}: the monitor needed {resident} KiB");
}

#[test]
fn an_agent_that_breaks_the_protocol_ends_its_machine() {
    let exit = |id: &str| {
        let exited = Some(Exited { code: 1 << 20, signal: -7, ..Exited::default() });
        event(event::What::Exited(ContainerExited { id: id.into(), exited }))
    };
    let over = GuestEnded { cause: 0, message: "\x1b[31mmine\n".into() };
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("garbage", vec![0xff; 4096], "over the limit"),
        ("a length of 4 GiB", vec![0xff, 0xff, 0xff, 0xff, 1], "over the limit"),
        ("a frame that is no message", b"\x04\0\0\0\xff\xff\xff\xff".to_vec(), "not a valid"),
        ("no greeting", frame(What::Ready(Ready::default())), "ready out of turn"),
        ("a second greeting", after_hello(&[frame(What::Hello(hello()))]), "a second hello"),
        (
            "another version",
            frame(What::Hello(AgentHello { version: 99, ..hello() })),
            "another version",
        ),
        (
            "a boot id with terminal codes",
            frame(What::Hello(AgentHello { boot_id: "\x1b".repeat(36), ..hello() })),
            "a boot id that is none",
        ),
        (
            "a release of a kilobyte",
            frame(What::Hello(AgentHello { release: "6".repeat(1024), ..hello() })),
            "a kernel release that is none",
        ),
        ("words of a host", after_ready(&[frame(What::Setup(Setup::default()))]), "only a host"),
        (
            "an answer to no call",
            after_ready(&[answer(7, Some(Outcome::Done(Done {})))]),
            "no call",
        ),
        ("an answer of nothing", after_ready(&[answer(1, None)]), "says nothing"),
        (
            "its own end",
            after_ready(&[answer(0, event(event::What::GuestEnded(over)))]),
            "news of its own end",
        ),
        (
            "data of a stream that nobody opened",
            after_ready(&[
                answer(0, exit("no-such-container")),
                frame(What::Data(Data { stream: 9, bytes: vec![0; 65_536] })),
                frame(What::Credit(Credit { stream: u32::MAX, bytes: u32::MAX })),
                frame(What::End(End { stream: 9 })),
                vec![0xff; 8],
            ]),
            "the protocol",
        ),
    ];
    for (name, words, reason) in &cases {
        ends(name, words, reason);
    }
}

/// The words of [`flooding_agent`].
fn flood() -> Vec<u8> {
    let news = ContainerExited { id: "x".repeat(200), exited: Some(Exited::default()) };
    answer(0, event(event::What::Exited(news))).repeat(256)
}

#[test]
#[ignore = "it is the agent of another test"]
fn flooding_agent() {
    use rustix::event::{PollFd, PollFlags, poll};
    let channel = pinion_sys::fd::borrow(3).expect("run as a machine");
    let (mut words, flood) = (after_ready(&[]), flood());
    loop {
        match rustix::io::write(channel, &words) {
            Ok(n) => drop(words.drain(..n)),
            Err(rustix::io::Errno::AGAIN) => {
                let mut writable = [PollFd::new(&channel, PollFlags::OUT)];
                poll(&mut writable, None).unwrap();
            }
            Err(_) => return,
        }
        if words.is_empty() {
            words.extend_from_slice(&flood);
        }
    }
}

#[test]
fn a_flood_of_news_neither_grows_nor_stops_the_monitor() {
    let this = std::env::current_exe().unwrap();
    let name = "hostile::flooding_agent";
    let rig = rig(&format!("exec {} --exact {name} --ignored --nocapture", this.display()));
    std::thread::sleep(Duration::from_millis(500));
    let before = resident(&rig);
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        let asked = Instant::now();
        let reply = greet(&rig);
        assert!(asked.elapsed() < Duration::from_secs(1), "a client waited {:?}", asked.elapsed());
        let ended = reply.guest.and_then(|guest| guest.ended);
        assert!(ended.is_none(), "the flood is not one: {ended:?}");
    }
    let grown = resident(&rig).saturating_sub(before);
    assert!(grown < GROWTH, "the monitor grew by {grown} KiB");
}
