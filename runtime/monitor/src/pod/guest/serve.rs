//! The channels of a machine: what comes in on them, and what goes out.

use std::io;

use pinion_microvm::driver::threads;
use pinion_microvm::qmp::Outcome as Told;
use pinion_monitor_proto::channel::send_with_fds;
use pinion_monitor_proto::guest::packet::What;
use pinion_monitor_proto::message::Cause;

use super::{Guest, Script, State};
use crate::event::Timer;
use crate::jail;
use crate::link::{LinkError, LinkPart};
use crate::pod::Pod;
use crate::reactor::Ready;

/// Reads of a channel per readiness event.
const READS: usize = 8;

impl Pod {
    /// Something is ready on the channel to the agent, or on a stream of it.
    pub(in crate::pod) fn link_ready(&mut self, part: LinkPart, ready: Ready) {
        let Some(guest) = self.guest.as_deref_mut() else { return };
        if matches!(guest.state, State::Ended(_)) {
            return;
        }
        let mut packets = Vec::new();
        let served = guest.link.ready(part, ready, &mut self.shared.reactor, &mut packets);
        self.hear(packets);
        self.after_link(served);
        self.release_held();
    }

    /// Takes packets of the agent, until one is out of order.
    pub(super) fn hear(&mut self, packets: Vec<What>) {
        for packet in packets {
            let taken = match packet {
                What::Hello(hello) => self.agent_arrived(&hello),
                What::Ready(ready) => self.guest_ready(&ready.error),
                What::Answer(response) => self.answered(response),
                _ => Err("a packet that only a host sends"),
            };
            if let Err(reason) = taken {
                let text = format!("the agent broke the protocol: {reason}");
                self.kill_machine(Cause::GuestBroken, text);
                return;
            }
        }
    }

    /// A link that failed ends the machine, unless the machine's end is what made it fail.
    pub(super) fn after_link(&mut self, served: Result<(), LinkError>) {
        match served {
            Ok(()) => {}
            // QEMU closes it when it ends, which is told by a signal.
            Err(LinkError::Closed) => self.link_closed(),
            Err(error) => {
                let text = format!("the agent's channel: {error}");
                self.kill_machine(Cause::GuestBroken, text);
            }
        }
    }

    /// Says something to the agent.
    pub(super) fn say(&mut self, what: What) {
        let Some(guest) = self.guest.as_deref_mut() else { return };
        let sent = guest.link.send(what, &mut self.shared.reactor);
        self.after_link(sent);
    }

    /// Lets the control session do something and sends what that takes.
    pub(super) fn drive(&mut self, work: impl FnOnce(&mut Guest) -> Vec<Told<Script>>) {
        let Some(guest) = self.guest.as_deref_mut() else { return };
        let outcomes = work(guest);
        let mut failed = None;
        while let Some(outgoing) = guest.session.outgoing() {
            use std::os::fd::AsFd;
            let fds: Vec<_> = outgoing.fd.as_ref().map(AsFd::as_fd).into_iter().collect();
            // Commands are short and one at a time, so the socket has room for each.
            match send_with_fds(&guest.control, &outgoing.bytes, &fds) {
                Ok(sent) if sent == outgoing.bytes.len() => {}
                Ok(_) => failed = Some(io::ErrorKind::WouldBlock.into()),
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = failed {
            self.journal.note(format_args!("control channel: {error}"));
        }
        for outcome in outcomes {
            if let Told::Done(script, result) = outcome {
                self.scripted(script, result);
            }
        }
    }

    /// A script has ended.
    fn scripted(&mut self, script: Script, result: Result<Vec<serde_json::Value>, String>) {
        match script {
            Script::Processors => {
                let answer = self.journal.noted("query processors", result);
                let answer = answer.and_then(|answers| answers.into_iter().next());
                if let (Some(guest), Some(answer)) = (self.guest(), answer) {
                    let told = threads(&answer);
                    guest.about.vcpu_threads = jail::threads_outside(guest.pid, &told);
                }
            }
            Script::Plug(key, creation) => self.plugged(key, *creation, result.map(drop)),
            Script::Unplug(slot) => {
                // A slot whose disk did not leave is not used again.
                let left = self.journal.noted("unplug a disk", result).is_some();
                if let Some(guest) = self.guest().filter(|_| left) {
                    guest.slots.remove(&slot);
                }
            }
        }
    }

    pub(in crate::pod) fn control_ready(&mut self) {
        let mut buffer = vec![0; 16 * 1024];
        for _ in 0..READS {
            let Some(guest) = self.guest.as_deref_mut() else { return };
            match rustix::io::read(&guest.control, buffer.as_mut_slice()) {
                Ok(0) => return guest.control.unwatch(&mut self.shared.reactor),
                Ok(n) => {
                    let bytes = buffer.get(..n).unwrap_or_default();
                    match guest.session.feed(bytes) {
                        Ok(outcomes) => self.drive(|_| outcomes),
                        Err(error) => {
                            self.kill_machine(Cause::VmmGone, error.to_string());
                            return;
                        }
                    }
                }
                Err(_) => return,
            }
        }
    }

    /// Keeps the end of what the kernel and the machine say.
    pub(in crate::pod) fn console_ready(&mut self) {
        let mut buffer = vec![0; 4096];
        for _ in 0..READS {
            let Some(guest) = self.guest.as_deref_mut() else { return };
            let Some(console) = guest.console.as_mut() else { return };
            match rustix::io::read(&*console, buffer.as_mut_slice()) {
                Ok(0) => {
                    console.unwatch(&mut self.shared.reactor);
                    guest.console = None;
                }
                Ok(n) => guest.tail.push(buffer.get(..n).unwrap_or_default()),
                Err(_) => return,
            }
        }
    }

    /// Looks again soon whether what is held can go.
    pub(super) fn look_again(&mut self) {
        let Some(guest) = self.guest.as_deref_mut() else { return };
        if !guest.looking {
            guest.looking = true;
            self.shared.reactor.after(std::time::Duration::from_millis(50), Timer::Held);
        }
    }
}
