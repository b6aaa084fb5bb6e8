//! Who may take a name: pure bookkeeping of create requests.
//!
//! Kubelet gives up on a slow request and sends it again. The retry must neither start the
//! work a second time nor fail because the name is taken: it joins the operation in
//! progress, or learns the id of what that operation made.
//!
//! ```text
//!            admit                 settle(Made)
//!   (free) ────────▶ in progress ──────────────▶ made
//!      ▲                  │                        │ release
//!      ├──────────────────┘ settle(Undone)         │
//!      └───────────────────────────────────────────┘
//! ```
//!
//! A name is free again only when nothing of its holder is left: a failed operation whose
//! undo also failed settles as `Made`, because there is something to remove.
//! No synchronisation and no I/O here; the owner holds a lock or is an actor.

use std::collections::HashMap;
use std::hash::Hash;

/// Names, what was asked for under each, and the ticket with which a retry joins.
#[derive(Debug)]
pub(crate) struct Admission<Name, Request, Ticket> {
    entries: HashMap<Name, Entry<Request, Ticket>>,
}

#[derive(Debug)]
struct Entry<Request, Ticket> {
    id: String,
    request: Request,
    /// There while the operation runs.
    ticket: Option<Ticket>,
}

/// The answer to a request for a name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Admit<Ticket> {
    /// The name is now the caller's: start the work.
    Start,
    /// The same request is in progress: wait for it.
    Join(Ticket),
    /// The same request has been done, this is its result.
    Made(String),
    /// The name belongs to something else, in progress or done.
    Taken {
        /// Id of the holder.
        id: String,
        /// Whether it is still being made.
        in_progress: bool,
    },
}

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Settled {
    /// Something exists under the name.
    Made,
    /// Nothing is left of it.
    Undone,
}

impl<Name, Request, Ticket> Default for Admission<Name, Request, Ticket> {
    fn default() -> Self {
        Self { entries: HashMap::new() }
    }
}

impl<Name: Eq + Hash, Request: PartialEq, Ticket: Clone> Admission<Name, Request, Ticket> {
    /// Asks for `name`; `id` and `ticket` are kept if the answer is `Start`.
    pub(crate) fn admit(
        &mut self,
        name: Name,
        request: Request,
        id: &str,
        ticket: Ticket,
    ) -> Admit<Ticket> {
        let Some(entry) = self.entries.get(&name) else {
            let entry = Entry { id: id.to_string(), request, ticket: Some(ticket) };
            self.entries.insert(name, entry);
            return Admit::Start;
        };
        let same = entry.request == request;
        match &entry.ticket {
            Some(ticket) if same => Admit::Join(ticket.clone()),
            None if same => Admit::Made(entry.id.clone()),
            ticket => Admit::Taken { id: entry.id.clone(), in_progress: ticket.is_some() },
        }
    }

    /// Ends the operation that holds `name`.
    pub(crate) fn settle(&mut self, name: &Name, settled: Settled) {
        match settled {
            Settled::Made => {
                if let Some(entry) = self.entries.get_mut(name) {
                    entry.ticket = None;
                }
            }
            Settled::Undone => {
                self.entries.remove(name);
            }
        }
    }

    /// Enters what exists already, as recovery finds it.
    pub(crate) fn restore(&mut self, name: Name, request: Request, id: &str) {
        let entry = Entry { id: id.to_string(), request, ticket: None };
        self.entries.insert(name, entry);
    }

    /// Frees a name because its holder `id` is removed; someone else's is left alone.
    pub(crate) fn release(&mut self, name: &Name, id: &str) {
        if self.entries.get(name).is_some_and(|e| e.id == id) {
            self.entries.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Subject = Admission<u8, u8, u32>;

    #[test]
    fn a_retry_joins_the_running_operation() {
        let mut a = Subject::default();
        assert_eq!(a.admit(1, 7, "x", 10), Admit::Start);
        assert_eq!(a.admit(1, 7, "y", 11), Admit::Join(10));
    }

    #[test]
    fn a_retry_after_success_gets_the_same_id() {
        let mut a = Subject::default();
        a.admit(1, 7, "x", 10);
        a.settle(&1, Settled::Made);
        assert_eq!(a.admit(1, 7, "y", 11), Admit::Made("x".into()));
    }

    #[test]
    fn a_different_request_for_the_same_name_is_told_who_holds_it() {
        let mut a = Subject::default();
        a.admit(1, 7, "x", 10);
        assert_eq!(a.admit(1, 8, "y", 11), Admit::Taken { id: "x".into(), in_progress: true });
        a.settle(&1, Settled::Made);
        assert_eq!(a.admit(1, 8, "y", 11), Admit::Taken { id: "x".into(), in_progress: false });
    }

    #[test]
    fn a_failed_operation_frees_its_name() {
        let mut a = Subject::default();
        a.admit(1, 7, "x", 10);
        a.settle(&1, Settled::Undone);
        assert_eq!(a.admit(1, 8, "y", 11), Admit::Start);
    }

    #[test]
    fn releasing_with_a_stale_id_changes_nothing() {
        let mut a = Subject::default();
        a.restore(1, 7, "x");
        a.release(&1, "old");
        assert_eq!(a.admit(1, 7, "y", 11), Admit::Made("x".into()));
        a.release(&1, "x");
        assert_eq!(a.admit(1, 7, "y", 11), Admit::Start);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Admit(u8, u8),
        Settle(u8, bool),
        Release(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..3u8, 0..2u8).prop_map(|(n, r)| Step::Admit(n, r)),
            (0..3u8, any::<bool>()).prop_map(|(n, made)| Step::Settle(n, made)),
            (0..3u8).prop_map(Step::Release),
        ]
    }

    proptest! {
        /// Against a model: at any time at most one operation runs under a name, and an id
        /// is handed out only for the request that made it.
        #[test]
        fn no_name_is_ever_held_twice(steps in prop::collection::vec(step(), 0..60)) {
            let mut subject = Subject::default();
            let mut model: HashMap<u8, (u8, String, bool)> = HashMap::new();
            for (number, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Admit(name, request) => {
                        let id = format!("id{number}");
                        let answer = subject.admit(name, request, &id, number as u32);
                        match (model.get(&name), answer) {
                            (None, Admit::Start) => { model.insert(name, (request, id, true)); }
                            (Some((r, _, true)), Admit::Join(_)) => prop_assert_eq!(*r, request),
                            (Some((r, held, false)), Admit::Made(id)) => {
                                prop_assert_eq!(*r, request);
                                prop_assert_eq!(held, &id);
                            }
                            (Some((r, held, running)), Admit::Taken { id, in_progress }) => {
                                prop_assert_ne!(*r, request);
                                prop_assert_eq!(held, &id);
                                prop_assert_eq!(*running, in_progress);
                            }
                            (held, answer) => prop_assert!(false, "{:?} {:?}", held, answer),
                        }
                    }
                    Step::Settle(name, made) => {
                        // Only a running operation settles.
                        let Some((_, _, running)) = model.get_mut(&name).filter(|e| e.2) else {
                            continue;
                        };
                        *running = false;
                        let how = if made { Settled::Made } else { Settled::Undone };
                        subject.settle(&name, how);
                        if !made { model.remove(&name); }
                    }
                    Step::Release(name) => {
                        if let Some((_, id, _)) = model.remove(&name) {
                            subject.release(&name, &id);
                        }
                    }
                }
            }
        }
    }
}
