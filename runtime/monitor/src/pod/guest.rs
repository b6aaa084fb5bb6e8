//! A pod whose containers run in a virtual machine.
//!
//! ```text
//!   start ──▶ Booting ──agent's hello──▶ SettingUp ──ready──▶ Up
//!                │                           │                │  process gone, channel gone,
//!                └───────────────────────────┴────────────────┤  protocol broken
//!                                                             ▼
//!                                                           Ended: containers exited, with a cause
//! ```
//!
//! What a monitor does by starting the runtime is done here by calls to the agent; stdio,
//! logs, phases and clients are the pod's own. The guest is not trusted: its answers must be
//! of a kind that fits a call of ours, ids are ours, times are the host's, texts are cut, and
//! whatever breaks the protocol ends the machine.

mod boot;
mod calls;
mod ending;
mod serve;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::time::Instant;

use pinion_microvm::driver::SLOTS;
use pinion_microvm::plan::Plan;
use pinion_microvm::qmp::Session;
use pinion_monitor_proto::guest::{File, Interface};
use pinion_monitor_proto::message::{self, Create, Exited, GuestEnded};

use super::{Pod, Reply};
use crate::event::{Key, Source};
use crate::link::Link;
use crate::reactor::{TimerId, Watched};
use crate::share::SharedFiles;
use crate::stdio::{Ends, Manner};

/// The end of what the guest's kernel and its machine said.
#[derive(Debug, Default)]
pub(super) struct Tail(Vec<u8>);

/// Bytes of it that are kept.
const KEPT: usize = 8 * 1024;

impl Tail {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        let excess = self.0.len().saturating_sub(KEPT);
        self.0.drain(..excess);
    }

    /// As printable text.
    pub(super) fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.0);
        text.chars().filter(|c| !c.is_control() || matches!(c, '\n')).collect()
    }
}

/// How far a guest has come.
#[derive(Debug, PartialEq)]
pub(super) enum State {
    /// The agent has not spoken yet.
    Booting,
    /// The agent is making the guest what it was asked to be.
    SettingUp,
    /// It takes calls.
    Up,
    /// It is gone.
    Ended(GuestEnded),
}

/// A call that the agent has not answered (to the end).
#[derive(Debug)]
pub(super) enum Pending {
    Create(Key, Box<Creation>),
    Start(Key, Reply),
    /// Anything that is answered with done and changes nothing here.
    Plain(Reply),
    Delete(Key, Reply),
    Exec {
        reply: Reply,
        streams: Vec<u32>,
        started: bool,
    },
    Usage(Reply),
    Dial {
        reply: Reply,
        streams: Vec<u32>,
    },
}

/// A container on its way into the guest.
#[derive(Debug)]
pub(super) struct Creation {
    pub(super) reply: Reply,
    pub(super) create: Create,
    pub(super) document: Vec<u8>,
    pub(super) ends: Ends,
    /// The guest's ends of the same pipes: what it reads, and what it writes.
    pub(super) theirs: (Option<OwnedFd>, Vec<OwnedFd>),
    pub(super) manner: Manner,
    pub(super) log: crate::log::Log,
}

/// What a script on the control channel is for.
#[derive(Debug)]
pub(super) enum Script {
    Processors,
    Plug(Key, Box<Creation>),
    Unplug(u8),
}

/// What is kept for a container in a guest.
#[derive(Debug, Default)]
pub(super) struct Inside {
    pub(super) slot: u8,
    /// Names of what is lent to it of the host's files.
    pub(super) shares: Vec<String>,
    pub(super) outputs: Vec<u32>,
    /// It has ended; told once its output is here.
    pub(super) ended: Option<(Exited, Instant)>,
    pub(super) oom_told: Option<Instant>,
    pub(super) oom_count: u64,
}

/// An answer that waits for output to reach its client.
#[derive(Debug)]
pub(super) struct HeldAnswer {
    pub(super) reply: Reply,
    pub(super) exited: Exited,
    pub(super) streams: Vec<u32>,
    pub(super) since: Instant,
}

/// A virtual machine and the conversation with it.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) plan: Plan,
    pub(super) pid: i32,
    pub(super) state: State,
    pub(super) link: Link<Source>,
    pub(super) control: Watched,
    pub(super) session: Session<Script>,
    pub(super) console: Option<Watched>,
    pub(super) tail: Tail,
    pub(super) interfaces: Vec<Interface>,
    pub(super) files: Vec<File>,
    /// What of the host's files is lent to it.
    pub(super) files_shared: Option<SharedFiles>,
    pub(super) about: message::Guest,
    /// Hellos to answer once it is up.
    pub(super) waiting: Vec<Reply>,
    pub(super) calls: BTreeMap<u64, Pending>,
    pub(super) last_call: u64,
    pub(super) last_stream: u32,
    pub(super) inside: BTreeMap<Key, Inside>,
    pub(super) held: Vec<HeldAnswer>,
    pub(super) slots: BTreeSet<u8>,
    pub(super) phase_began: Instant,
    pub(super) boot: Option<TimerId>,
    pub(super) looking: bool,
    /// Why it was killed, if it was.
    pub(super) verdict: Option<GuestEnded>,
}

impl Guest {
    pub(super) fn new_stream(&mut self) -> u32 {
        self.last_stream += 1;
        self.last_stream
    }

    pub(super) fn free_slot(&mut self) -> Option<u8> {
        let slot = (1..=SLOTS).find(|slot| !self.slots.contains(slot))?;
        self.slots.insert(slot);
        Some(slot)
    }

    /// Notes that a phase of the start is over.
    pub(super) fn phase(&mut self, name: &str) {
        let microseconds = u64::try_from(self.phase_began.elapsed().as_micros()).unwrap_or(0);
        self.about.phases.push(message::Phase { name: name.into(), microseconds });
        self.phase_began = Instant::now();
    }
}

/// Words of a guest, for clients: printable, and not long.
pub(super) fn tamed(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(2048).collect()
}

impl Pod {
    /// The guest, in places that are reached only where there is one.
    pub(super) fn guest(&mut self) -> Option<&mut Guest> {
        self.guest.as_deref_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_the_console_is_kept() {
        let mut tail = Tail::default();
        for _ in 0..10_000 {
            tail.push(b"noise\x1b[31m\n");
        }
        tail.push(b"Kernel panic");
        assert_eq!(tail.0.len(), KEPT);
        assert!(tail.text().ends_with("Kernel panic") && !tail.text().contains('\x1b'));
    }

    #[test]
    fn a_guest_s_words_are_short_and_printable() {
        assert_eq!(tamed("a\nb\0c"), "abc");
        assert_eq!(tamed(&"x".repeat(10_000)).len(), 2048);
    }
}
