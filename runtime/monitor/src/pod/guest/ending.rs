//! Ends: of containers whose output is still on its way, and of the machine under them all.

use std::time::Duration;

use pinion_monitor_proto::message::response::Outcome;
use pinion_monitor_proto::message::{Cause, Exited, GuestEnded, event::What as News};
use rustix::process::WaitStatus;

use super::boot::last_words;
use super::{Pending, State, tamed};
use crate::error::Error;
use crate::event::Key;
use crate::exit;
use crate::pod::Pod;
use crate::pod::lifecycle::send_signal;

/// Output that a client does not take holds up news for so long at most.
const HOLD: Duration = Duration::from_secs(5);

/// A machine whose agent has left is given so long to end by itself.
const CLOSED: Duration = Duration::from_secs(1);

impl Pod {
    /// Tells what was held back for output, as far as that has gone by now.
    pub(in crate::pod) fn release_held(&mut self) {
        let Some(guest) = self.guest.as_deref_mut() else { return };
        let mut over: Vec<(Key, Exited)> = Vec::new();
        for (key, inside) in &mut guest.inside {
            let gone = inside.outputs.iter().all(|stream| !guest.link.is_open(*stream));
            let Some((_, since)) = inside.ended else { continue };
            if (gone || since.elapsed() > HOLD)
                && let Some((exited, _)) = inside.ended.take()
            {
                over.push((*key, exited));
            }
        }
        let link = &guest.link;
        let (now, later): (Vec<_>, Vec<_>) = guest.held.drain(..).partition(|held| {
            held.since.elapsed() > HOLD || held.streams.iter().all(|s| !link.is_behind(*s))
        });
        guest.held = later;
        let waiting =
            !guest.held.is_empty() || guest.inside.values().any(|inside| inside.ended.is_some());
        for (key, exited) in over {
            let outputs = self.guest().and_then(|g| g.inside.get(&key)).map(|i| i.outputs.clone());
            self.close_streams(&outputs.unwrap_or_default());
            self.init_ended(key, exited);
        }
        for held in now {
            self.close_streams(&held.streams);
            self.reply(held.reply, Outcome::ExecExited(held.exited));
        }
        if waiting {
            self.look_again();
        }
    }

    /// It is time to look again.
    pub(in crate::pod) fn look(&mut self) {
        if let Some(guest) = self.guest() {
            guest.looking = false;
        }
        self.release_held();
    }

    /// Ends the machine, because of something that is said to be the cause.
    pub(super) fn kill_machine(&mut self, cause: Cause, text: String) {
        let Some(guest) = self.guest() else { return };
        if guest.verdict.is_none() && !matches!(guest.state, State::Ended(_)) {
            guest.verdict = Some(GuestEnded { cause: cause.into(), message: text });
            let pid = guest.pid;
            let killed = send_signal(pid, libc::SIGKILL);
            self.journal.noted("kill the machine", killed);
        }
    }

    /// The channel is closed: the machine is about to end, or lives on without its agent.
    pub(super) fn link_closed(&mut self) {
        let Some(guest) = self.guest() else { return };
        if guest.boot.is_none() && guest.verdict.is_none() {
            let timer = self.shared.reactor.after(CLOSED, crate::event::Timer::Boot);
            if let Some(guest) = self.guest() {
                guest.boot = Some(timer);
            }
        }
    }

    /// Whether the machine's process is there.
    pub(in crate::pod) fn has_machine(&self) -> bool {
        self.guest.as_ref().is_some_and(|guest| !matches!(guest.state, State::Ended(_)))
    }

    /// Ends the machine at once: there is nothing in it that could be lost.
    pub(in crate::pod) fn quit_machine(&mut self) {
        self.kill_machine(Cause::VmmGone, "the pod was stopped".to_owned());
    }

    /// Nobody serves the guest's volumes any more.
    pub(in crate::pod) fn share_ended(&mut self, status: WaitStatus) {
        let Some(guest) = self.guest() else { return };
        guest.files_shared = None;
        if !matches!(guest.state, State::Ended(_)) {
            let how = how(status);
            let words = last_words(&guest.tail);
            let text = format!("the process that serves volumes ended {how}; last words: {words}");
            self.kill_machine(Cause::VmmGone, text);
        }
    }

    /// The machine's process has ended, and with it all there was in it.
    pub(in crate::pod) fn machine_ended(&mut self, status: WaitStatus) {
        self.console_ready();
        let Some(guest) = self.guest.as_deref_mut() else { return };
        // What the guest said before is still in the channel.
        let mut packets = Vec::new();
        for _ in 0..64 {
            let ready = crate::reactor::Ready::to_read();
            let part = crate::link::LinkPart::Channel;
            let before = packets.len();
            let read = guest.link.ready(part, ready, &mut self.shared.reactor, &mut packets);
            if read.is_err() || packets.len() == before {
                break;
            }
        }
        self.hear(packets);
        let Some(guest) = self.guest.as_deref_mut() else { return };
        let ended = guest.verdict.take().unwrap_or_else(|| verdict(status, &guest.tail));
        let (cause, told) = (ended.cause(), tamed(&ended.message));
        guest.state = State::Ended(ended.clone());
        guest.about.ended = Some(ended.clone());
        guest.link.abandon(&mut self.shared.reactor);
        guest.control.unwatch(&mut self.shared.reactor);
        if let Some(timer) = guest.boot.take() {
            self.shared.reactor.cancel(timer);
        }
        let calls = std::mem::take(&mut guest.calls);
        let held = std::mem::take(&mut guest.held);
        let waiting = std::mem::take(&mut guest.waiting);
        self.journal.note(format_args!("the machine has ended: {}", ended.message));
        for answer in held {
            self.reply(answer.reply, Outcome::ExecExited(answer.exited));
        }
        self.bury_containers(cause);
        let error = Error::Invalid(format!("the pod's virtual machine has ended: {told}"));
        for pending in calls.into_values() {
            self.fail(reply_of(&pending), &error);
        }
        for reply in waiting {
            self.fail(reply, &Error::Invalid(told.clone()));
        }
        self.tell(News::GuestEnded(ended));
    }

    /// Marks every container that was alive as ended, with the cause.
    fn bury_containers(&mut self, cause: Cause) {
        let keys: Vec<Key> = self.containers.keys().copied().collect();
        for key in keys {
            let Some(container) = self.containers.get(&key) else { continue };
            if !container.phase.is_alive() {
                continue;
            }
            let told = self.guest().and_then(|g| g.inside.get_mut(&key)?.ended.take());
            let exited = told.map_or_else(
                || Exited {
                    code: 137,
                    signal: libc::SIGKILL,
                    finished_at: exit::now(),
                    cause: cause.into(),
                    ..Exited::default()
                },
                |(exited, _)| exited,
            );
            self.init_ended(key, exited);
        }
    }
}

/// Why a machine ended, from its exit status and its last words.
fn verdict(status: WaitStatus, tail: &super::Tail) -> GuestEnded {
    let words = last_words(tail);
    if tail.text().contains("Kernel panic") {
        let message = format!("the guest kernel panicked: {words}");
        return GuestEnded { cause: Cause::GuestPanic.into(), message };
    }
    let how = how(status);
    let message = format!("the virtual machine's process ended {how}; last words: {words}");
    GuestEnded { cause: Cause::VmmGone.into(), message }
}

fn how(status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("with exit code {code}"),
        (_, Some(signal)) => format!("by signal {signal}"),
        _ => "in an unknown way".to_owned(),
    }
}

fn reply_of(pending: &Pending) -> crate::pod::Reply {
    match pending {
        Pending::Create(_, creation) => creation.reply,
        Pending::Start(_, reply)
        | Pending::Plain(reply)
        | Pending::Delete(_, reply)
        | Pending::Exec { reply, .. }
        | Pending::Usage(reply)
        | Pending::Dial { reply, .. } => *reply,
    }
}
