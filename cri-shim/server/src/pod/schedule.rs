//! Which commands of a pod may run at the same time: pure rules.
//!
//! | command | runs beside |
//! |---|---|
//! | work on a container (create, start, update, remove …) | anything on other containers |
//! | giving back what an ended container held | the same; a creation begun later waits for it, since it may want the same CPUs or hugepages |
//! | stop of a container | also other stops of the same container, and its removal, but not before work begun earlier on it is done |
//! | work on the pod (stop, remove) | stops only: a stop in its grace period must not hold up the pod's end |
//!
//! Commands that may not run yet wait in the order they came; none overtakes an earlier one
//! on the same container.

use std::collections::{HashSet, VecDeque};

/// What a command touches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Makes one container.
    Create(String),
    /// Changes one container.
    Container(String),
    /// Gives back what a container that has ended held.
    Settle(String),
    /// Signals one container and waits.
    Stop(String),
    /// Changes the pod as a whole.
    Pod,
}

/// Commands in progress and those that wait. `C` is the command.
#[derive(Debug)]
pub(crate) struct Schedule<C> {
    working: HashSet<String>,
    /// Those of `working` that give back.
    settling: HashSet<String>,
    pod: bool,
    waiting: VecDeque<(Scope, C)>,
}

impl<C> Default for Schedule<C> {
    fn default() -> Self {
        let (working, settling) = (HashSet::new(), HashSet::new());
        Self { working, settling, pod: false, waiting: VecDeque::new() }
    }
}

impl<C> Schedule<C> {
    /// Takes a command in.
    pub(crate) fn push(&mut self, scope: Scope, command: C) {
        self.waiting.push_back((scope, command));
    }

    /// The next command that may begin, if any; its scope is held until [`Self::done`].
    pub(crate) fn next(&mut self) -> Option<(Scope, C)> {
        let index = (0..self.waiting.len()).find(|&i| self.may_begin(i))?;
        let (scope, command) = self.waiting.remove(index)?;
        match &scope {
            Scope::Create(id) | Scope::Container(id) => {
                self.working.insert(id.clone());
            }
            Scope::Settle(id) => {
                self.working.insert(id.clone());
                self.settling.insert(id.clone());
            }
            Scope::Stop(_) => {}
            Scope::Pod => self.pod = true,
        }
        Some((scope, command))
    }

    /// Gives a scope back.
    pub(crate) fn done(&mut self, scope: &Scope) {
        match scope {
            Scope::Create(id) | Scope::Container(id) | Scope::Settle(id) => {
                self.working.remove(id);
                self.settling.remove(id);
            }
            Scope::Stop(_) => {}
            Scope::Pod => self.pod = false,
        }
    }

    /// The commands that have not begun yet, in the order they came.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = &C> {
        self.waiting.iter().map(|(_, command)| command)
    }

    fn may_begin(&self, index: usize) -> bool {
        let earlier = || self.waiting.iter().take(index).map(|(scope, _)| scope);
        if self.pod || earlier().any(|s| *s == Scope::Pod) {
            return false;
        }
        match &self.waiting[index].0 {
            Scope::Pod => self.working.is_empty() && earlier().all(|s| matches!(s, Scope::Stop(_))),
            scope @ (Scope::Create(id)
            | Scope::Container(id)
            | Scope::Settle(id)
            | Scope::Stop(id)) => {
                let making = matches!(scope, Scope::Create(_));
                let before = |s: &Scope| match s {
                    Scope::Create(other) | Scope::Container(other) => other == id,
                    Scope::Settle(other) => making || other == id,
                    Scope::Stop(_) | Scope::Pod => false,
                };
                let settled = !making || self.settling.is_empty();
                settled && !self.working.contains(id) && !earlier().any(before)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn work(id: &str) -> Scope {
        Scope::Container(id.into())
    }

    fn stop(id: &str) -> Scope {
        Scope::Stop(id.into())
    }

    #[test]
    fn work_on_one_container_is_one_at_a_time_and_in_order() {
        let mut s = Schedule::default();
        s.push(work("a"), 1);
        s.push(work("a"), 2);
        s.push(work("b"), 3);
        assert_eq!(s.next().unwrap().1, 1);
        assert_eq!(s.next().unwrap().1, 3);
        assert!(s.next().is_none());
        s.done(&work("a"));
        assert_eq!(s.next().unwrap().1, 2);
    }

    #[test]
    fn a_removal_does_not_wait_for_a_stop_in_its_grace_period() {
        let mut s = Schedule::default();
        s.push(stop("a"), 1);
        assert_eq!(s.next().unwrap().1, 1);
        s.push(work("a"), 2);
        assert_eq!(s.next().unwrap().1, 2);
    }

    #[test]
    fn a_creation_waits_until_what_ended_before_it_has_given_back() {
        let mut s = Schedule::default();
        let (settle, create) = (Scope::Settle("old".into()), Scope::Create("new".into()));
        s.push(settle.clone(), 1);
        s.push(create.clone(), 2);
        s.push(work("other"), 3);
        assert_eq!(s.next().unwrap().1, 1);
        assert_eq!(s.next().unwrap().1, 3);
        assert!(s.next().is_none());
        s.done(&settle);
        assert_eq!(s.next().unwrap().1, 2);
        s.push(settle, 4);
        assert_eq!(s.next().unwrap().1, 4, "and holds up nothing that came later");
    }

    #[test]
    fn a_stop_waits_for_the_start_before_it() {
        let mut s = Schedule::default();
        s.push(work("a"), 1);
        s.push(stop("a"), 2);
        assert_eq!(s.next().unwrap().1, 1);
        assert!(s.next().is_none());
        s.done(&work("a"));
        assert_eq!(s.next().unwrap().1, 2);
    }

    #[test]
    fn the_pod_s_end_waits_for_work_and_holds_up_what_comes_later() {
        let mut s = Schedule::default();
        s.push(work("a"), 1);
        s.next();
        s.push(Scope::Pod, 2);
        s.push(work("b"), 3);
        assert!(s.next().is_none());
        s.done(&work("a"));
        assert_eq!(s.next().unwrap().1, 2);
        assert!(s.next().is_none());
        s.done(&Scope::Pod);
        assert_eq!(s.next().unwrap().1, 3);
    }

    fn scope() -> impl Strategy<Value = Scope> {
        prop_oneof![
            3 => (0..3u8).prop_map(|n| work(&n.to_string())),
            2 => (0..3u8).prop_map(|n| stop(&n.to_string())),
            1 => (0..3u8).prop_map(|n| Scope::Settle(n.to_string())),
            1 => (0..3u8).prop_map(|n| Scope::Create(n.to_string())),
            1 => Just(Scope::Pod),
        ]
    }

    fn container(scope: &Scope) -> Option<&str> {
        match scope {
            Scope::Create(id) | Scope::Container(id) | Scope::Settle(id) | Scope::Stop(id) => {
                Some(id)
            }
            Scope::Pod => None,
        }
    }

    proptest! {
        /// Whatever comes in, everything is run once, and never two exclusive things at once.
        #[test]
        fn everything_runs_once_and_nothing_clashes(
            pushes in prop::collection::vec(scope(), 0..40),
            picks in prop::collection::vec(any::<prop::sample::Index>(), 0..80),
        ) {
            let mut s = Schedule::default();
            let mut running: Vec<(Scope, usize)> = Vec::new();
            let mut ran = Vec::new();
            let total = pushes.len();
            for (n, scope) in pushes.into_iter().enumerate() {
                s.push(scope, n);
            }
            let mut picks = picks.into_iter();
            loop {
                while let Some((scope, n)) = s.next() {
                    for (other, _) in &running {
                        let clash = match (&scope, other) {
                            (Scope::Stop(_), _) | (_, Scope::Stop(_)) => false,
                            (Scope::Pod, _) | (_, Scope::Pod) => true,
                            (Scope::Create(_), Scope::Settle(_)) => true,
                            (a, b) => container(a) == container(b),
                        };
                        prop_assert!(!clash, "{:?} beside {:?}", scope, other);
                    }
                    ran.push(n);
                    running.push((scope, n));
                }
                if running.is_empty() { break; }
                let at = picks.next().map_or(0, |p| p.index(running.len()));
                let (scope, _) = running.remove(at);
                s.done(&scope);
            }
            ran.sort_unstable();
            prop_assert_eq!(ran, (0..total).collect::<Vec<_>>());
        }
    }
}
