//! QEMU's machine protocol (docs/interop/qmp-spec.rst): one JSON object a line, a greeting,
//! then commands that are answered in order, and events between.
//!
//! Pure: bytes in, bytes and outcomes out. Scripts run one after the other; a script whose
//! step fails is over. `T` is what the caller knows a script by.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use serde_json::{Value, json};

use crate::driver::{Script, Step};

/// Longest line accepted, in bytes.
const MAX_LINE: usize = 1 << 20;

/// The other side is no QEMU, or not in its right mind.
#[derive(Debug, thiserror::Error)]
#[error("control channel: {0}")]
pub struct Broken(String);

/// Something that came to an end.
#[derive(Debug)]
pub enum Outcome<T> {
    /// A script, with the answers to its commands, or why one failed.
    Done(T, Result<Vec<Value>, String>),
    /// The machine tells of something, by name.
    Event(String),
}

/// Bytes to send, with a descriptor that goes with the first of them.
#[derive(Debug)]
pub struct Outgoing {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The descriptor.
    pub fd: Option<OwnedFd>,
}

#[derive(Debug)]
struct Running<T> {
    tag: T,
    steps: VecDeque<Step>,
    answers: Vec<Value>,
    /// The step under way waits for this device to leave, or for an answer.
    waits: Option<String>,
}

/// One conversation.
#[derive(Debug)]
pub struct Session<T> {
    greeted: bool,
    buffer: Vec<u8>,
    queue: VecDeque<(T, Script)>,
    running: Option<Running<T>>,
    /// Devices that left before anyone waited for it.
    left: Vec<String>,
    outgoing: VecDeque<Outgoing>,
}

impl<T> Default for Session<T> {
    fn default() -> Self {
        Self {
            greeted: false,
            buffer: Vec::new(),
            queue: VecDeque::new(),
            running: None,
            left: Vec::new(),
            outgoing: VecDeque::new(),
        }
    }
}

impl<T> Session<T> {
    /// Queues a script.
    pub fn push(&mut self, tag: T, script: Script) -> Vec<Outcome<T>> {
        self.queue.push_back((tag, script));
        let mut outcomes = Vec::new();
        self.advance(&mut outcomes);
        outcomes
    }

    /// What to send next.
    pub fn outgoing(&mut self) -> Option<Outgoing> {
        self.outgoing.pop_front()
    }

    /// Takes bytes as they came.
    ///
    /// # Errors
    /// When they are not the protocol; the session is of no use any more.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Vec<Outcome<T>>, Broken> {
        self.buffer.extend_from_slice(bytes);
        let mut outcomes = Vec::new();
        while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.buffer.drain(..=end).collect();
            let text = line.trim_ascii();
            if !text.is_empty() {
                let value = serde_json::from_slice(text)
                    .map_err(|error| Broken(format!("not JSON: {error}")))?;
                self.take(&value, &mut outcomes)?;
            }
        }
        if self.buffer.len() > MAX_LINE {
            return Err(Broken(format!("a line of more than {MAX_LINE} bytes")));
        }
        Ok(outcomes)
    }

    fn take(&mut self, value: &Value, outcomes: &mut Vec<Outcome<T>>) -> Result<(), Broken> {
        if let Some(event) = value["event"].as_str() {
            if event == "DEVICE_DELETED"
                && let Some(device) = value["data"]["device"].as_str()
            {
                self.gone(device.to_owned(), outcomes);
            }
            outcomes.push(Outcome::Event(event.to_owned()));
            return Ok(());
        }
        if value["QMP"].is_object() {
            let bytes = line(&json!({ "execute": "qmp_capabilities", "id": "hello" }));
            self.outgoing.push_back(Outgoing { bytes, fd: None });
            return Ok(());
        }
        if value["id"] == "hello" {
            self.greeted = true;
            self.advance(outcomes);
            return Ok(());
        }
        let Some(running) = self.running.as_mut().filter(|running| running.waits.is_none()) else {
            return Err(Broken(format!("an answer to nothing: {value}")));
        };
        if let Some(error) = value["error"].as_object() {
            let text = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
            self.finish(Some(text.to_owned()), outcomes);
            return Ok(());
        }
        running.answers.push(value["return"].clone());
        self.step(outcomes);
        Ok(())
    }

    fn gone(&mut self, device: String, outcomes: &mut Vec<Outcome<T>>) {
        let waited = |running: &Running<T>| running.waits.as_deref() == Some(device.as_str());
        if self.running.as_ref().is_some_and(waited) {
            self.step(outcomes);
        } else {
            self.left.push(device);
            if self.left.len() > 64 {
                self.left.remove(0);
            }
        }
    }

    fn advance(&mut self, outcomes: &mut Vec<Outcome<T>>) {
        if !self.greeted || self.running.is_some() {
            return;
        }
        if let Some((tag, script)) = self.queue.pop_front() {
            let steps = script.into();
            self.running = Some(Running { tag, steps, answers: Vec::new(), waits: None });
            self.step(outcomes);
        }
    }

    /// Goes on with the running script.
    fn step(&mut self, outcomes: &mut Vec<Outcome<T>>) {
        loop {
            let Some(running) = &mut self.running else { return };
            running.waits = None;
            match running.steps.pop_front() {
                None => return self.finish(None, outcomes),
                Some(Step::Command { name, arguments, fd }) => {
                    let bytes = line(&json!({ "execute": name, "arguments": arguments }));
                    self.outgoing.push_back(Outgoing { bytes, fd });
                    return;
                }
                Some(Step::Gone(device)) => {
                    match self.left.iter().position(|left| *left == device) {
                        Some(at) => drop(self.left.remove(at)),
                        None => {
                            running.waits = Some(device);
                            return;
                        }
                    }
                }
            }
        }
    }

    fn finish(&mut self, error: Option<String>, outcomes: &mut Vec<Outcome<T>>) {
        if let Some(Running { tag, answers, .. }) = self.running.take() {
            outcomes.push(Outcome::Done(tag, error.map_or(Ok(answers), Err)));
        }
        self.advance(outcomes);
    }
}

fn line(value: &Value) -> Vec<u8> {
    format!("{value}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn command(name: &'static str) -> Step {
        Step::Command { name, arguments: json!({}), fd: None }
    }

    fn sent(session: &mut Session<u8>) -> Vec<String> {
        std::iter::from_fn(|| session.outgoing())
            .map(|out| serde_json::from_slice::<Value>(&out.bytes).unwrap()["execute"].to_string())
            .collect()
    }

    fn greeted() -> Session<u8> {
        let mut session = Session::default();
        session.feed(b"{\"QMP\": {}}\n{\"return\": {}, \"id\": \"hello\"}\n").unwrap();
        assert_eq!(sent(&mut session), ["\"qmp_capabilities\""]);
        session
    }

    #[test]
    fn nothing_is_sent_before_the_greeting() {
        let mut session = Session::default();
        session.push(1, vec![command("a")]);
        assert!(sent(&mut session).is_empty());
        session.feed(b"{\"QMP\": {}}\r\n").unwrap();
        session.feed(b"{\"return\": {}, \"id\": \"hello\"}\r\n").unwrap();
        assert_eq!(sent(&mut session), ["\"qmp_capabilities\"", "\"a\""]);
    }

    #[test]
    fn scripts_follow_each_other_and_a_failed_step_ends_its_own() {
        let mut session = greeted();
        session.push(1, vec![command("a"), command("b")]);
        session.push(2, vec![command("c")]);
        assert_eq!(sent(&mut session), ["\"a\""]);
        let outcomes = session.feed(b"{\"error\": {\"desc\": \"no\"}}\n").unwrap();
        assert!(matches!(&outcomes[..], [Outcome::Done(1, Err(why))] if why == "no"));
        assert_eq!(sent(&mut session), ["\"c\""]);
        let outcomes = session.feed(b"{\"return\": 7}\n").unwrap();
        assert!(matches!(&outcomes[..], [Outcome::Done(2, Ok(answers))] if answers[0] == 7));
    }

    #[test]
    fn a_device_is_waited_for_even_if_it_left_early() {
        let deleted = b"{\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": \"x\"}}\n";
        for early in [true, false] {
            let mut session = greeted();
            session.push(1, vec![command("del"), Step::Gone("x".into()), command("after")]);
            let parts: [&[u8]; 2] = if early {
                [deleted, b"{\"return\": {}}\n"]
            } else {
                [b"{\"return\": {}}\n", deleted]
            };
            for part in parts {
                session.feed(part).unwrap();
            }
            assert_eq!(sent(&mut session), ["\"del\"", "\"after\""], "early: {early}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_no_harm(chunks in prop::collection::vec(
            prop::collection::vec(any::<u8>(), 0..64), 0..16)) {
            let mut session = Session::<u8>::default();
            for chunk in chunks {
                if session.feed(&chunk).is_err() {
                    break;
                }
            }
        }
    }
}
