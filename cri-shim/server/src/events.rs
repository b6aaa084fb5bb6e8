//! The stream of container events, for kubelet's evented PLEG.
//!
//! ```text
//!   tell ──▶ somebody listens? ── yes ──▶ every reader
//!                  └─ no ──▶ backlog ──▶ the next one that listens, first of all
//! ```
//!
//! What happens while nobody listens is kept as notes, without the states that go with it, and
//! told to the next reader with the states of that time. A restart puts what the records show
//! of the last minutes into the backlog, so that nothing a dead server could not tell is lost;
//! some of it may be told twice. A slow reader is disconnected with an error instead of holding
//! anyone up: kubelet falls back to listing and connects again.

use std::collections::{HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pinion_cri_proto::v1::{ContainerEventResponse, ContainerEventType};
use tokio::sync::broadcast;

use crate::registry::Snapshot;
use crate::status;

/// Events kept for a reader that lags.
const LAG: usize = 1024;
/// Notes kept while nobody listens; the oldest go first.
const NOTES: usize = 4096;
/// How far back a restart looks, in nanoseconds: longer than any restart takes.
const WINDOW: i64 = 600 * 1_000_000_000;

/// Something that happened while nobody listened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Note {
    /// The pod.
    pub(crate) pod: String,
    /// The container, or the pod again.
    pub(crate) id: String,
    pub(crate) what: ContainerEventType,
    /// Nanoseconds since the epoch.
    pub(crate) at: i64,
}

/// Readers, and what none of them has been told.
#[derive(Debug)]
pub(crate) struct Events {
    sender: broadcast::Sender<ContainerEventResponse>,
    backlog: Mutex<VecDeque<Note>>,
}

impl Default for Events {
    fn default() -> Self {
        Self { sender: broadcast::channel(LAG).0, backlog: Mutex::default() }
    }
}

impl Events {
    /// Tells everyone who listens, or notes it for the next one. `event` costs a pod status
    /// and is made only for somebody.
    pub(crate) fn tell(&self, note: Note, event: impl FnOnce() -> ContainerEventResponse) {
        // One lock for both, or a reader could come in between and miss it.
        let mut backlog = self.backlog();
        if self.sender.receiver_count() > 0 {
            // An error means that the last one has just left.
            if self.sender.send(event()).is_ok() {
                return;
            }
        }
        if backlog.len() >= NOTES {
            backlog.pop_front();
        }
        backlog.push_back(note);
    }

    /// Listens from now on; what nobody has been told comes first.
    pub(crate) fn subscribe(
        &self,
        snapshot: &Snapshot,
    ) -> (Vec<ContainerEventResponse>, broadcast::Receiver<ContainerEventResponse>) {
        let mut backlog = self.backlog();
        let missed = backlog.drain(..).map(|note| render(&note, snapshot)).collect();
        (missed, self.sender.subscribe())
    }

    /// Notes what the records of a restarted server show of the last minutes.
    pub(crate) fn recall(&self, snapshot: &Snapshot, now: i64) {
        let mut backlog = self.backlog();
        // What recovery has found to be over is told as of now; the records have it too.
        let noted: HashSet<(String, ContainerEventType)> =
            backlog.iter().map(|note| (note.id.clone(), note.what)).collect();
        let mut notes = history(snapshot, now - WINDOW);
        notes.retain(|note| !noted.contains(&(note.id.clone(), note.what)));
        notes.extend(backlog.drain(..));
        let spare = notes.len().saturating_sub(NOTES);
        backlog.extend(notes.into_iter().skip(spare));
    }

    fn backlog(&self) -> MutexGuard<'_, VecDeque<Note>> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn render(note: &Note, snapshot: &Snapshot) -> ContainerEventResponse {
    let pod = snapshot.pod(&note.pod).ok();
    ContainerEventResponse {
        container_id: note.id.clone(),
        container_event_type: note.what.into(),
        created_at: note.at,
        pod_sandbox_status: pod.map(|pod| status::sandbox_status(&pod.sandbox)),
        containers_statuses: pod.map(|pod| status::container_statuses(pod)).unwrap_or_default(),
    }
}

/// The transitions that records show, from `since` on, in the order of their times.
fn history(snapshot: &Snapshot, since: i64) -> Vec<Note> {
    let mut notes = Vec::new();
    let mut note = |pod: &str, id: &str, what, at: i64| {
        if at >= since {
            notes.push(Note { pod: pod.to_owned(), id: id.to_owned(), what, at });
        }
    };
    for pod in snapshot.pods() {
        let id = &pod.sandbox.id;
        note(id, id, ContainerEventType::ContainerCreatedEvent, pod.sandbox.created_at);
        note(id, id, ContainerEventType::ContainerStartedEvent, pod.sandbox.created_at);
        for c in pod.containers.values() {
            note(id, &c.id, ContainerEventType::ContainerCreatedEvent, c.created_at);
            if c.started_at > 0 {
                note(id, &c.id, ContainerEventType::ContainerStartedEvent, c.started_at);
            }
            if let Some(exit) = &c.exit {
                note(id, &c.id, ContainerEventType::ContainerStoppedEvent, exit.finished_at);
            }
        }
    }
    // Stable: what has one time stays in the order of a life.
    notes.sort_by_key(|note| note.at);
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(id: &str) -> Note {
        let what = ContainerEventType::ContainerStoppedEvent;
        Note { pod: "p".into(), id: id.into(), what, at: 1 }
    }

    fn event(id: &str) -> ContainerEventResponse {
        ContainerEventResponse { container_id: id.into(), ..Default::default() }
    }

    #[test]
    fn what_nobody_heard_is_told_to_the_next_one_once() {
        let events = Events::default();
        events.tell(note("a"), || panic!("nobody listens"));
        let (missed, mut live) = events.subscribe(&Snapshot::default());
        assert_eq!(missed.len(), 1);
        assert_eq!(missed[0].container_id, "a");
        events.tell(note("b"), || event("b"));
        assert_eq!(live.try_recv().unwrap().container_id, "b");
        drop(live);
        assert!(events.subscribe(&Snapshot::default()).0.is_empty());
    }

    #[test]
    fn the_backlog_has_an_end() {
        let events = Events::default();
        for n in 0..NOTES + 10 {
            events.tell(note(&n.to_string()), || panic!("nobody listens"));
        }
        let (missed, _) = events.subscribe(&Snapshot::default());
        assert_eq!((missed.len(), missed[0].container_id.as_str()), (NOTES, "10"));
    }
}
