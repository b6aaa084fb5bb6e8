//! Who our children are, and the exits of those we do not know yet.
//!
//! A container's init or an exec may be dead before the runtime's pid file tells us its
//! pid. Its exit is kept until the invocation that names it has ended, and given only to
//! an invocation that began before the exit: a pid that was recycled since is no match.

use std::collections::{BTreeMap, VecDeque};

use rustix::process::{WaitOptions, WaitStatus};

/// Unclaimed exits kept at most; more are orphans nobody will ask for.
const KEPT: usize = 1024;

/// A moment in the order of exits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

/// Children by pid, each with what it is to the caller.
#[derive(Debug)]
pub struct Children<T> {
    known: BTreeMap<i32, T>,
    unclaimed: VecDeque<(i32, Moment, WaitStatus)>,
    exits: u64,
}

impl<T> Default for Children<T> {
    fn default() -> Self {
        Self { known: BTreeMap::new(), unclaimed: VecDeque::new(), exits: 0 }
    }
}

impl<T> Children<T> {
    /// Collects every child that has ended; the pids are free from now on.
    pub fn collect() -> Vec<(i32, WaitStatus)> {
        let mut ended = Vec::new();
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            ended.push((pid.as_raw_nonzero().get(), status));
        }
        ended
    }

    /// Adds a child.
    pub fn insert(&mut self, pid: i32, child: T) {
        self.known.insert(pid, child);
    }

    /// Takes a child that has ended; remembers the exit of one that is not known.
    pub fn ended(&mut self, pid: i32, status: WaitStatus) -> Option<T> {
        self.exits += 1;
        let child = self.known.remove(&pid);
        if child.is_none() {
            if self.unclaimed.len() == KEPT {
                self.unclaimed.pop_front();
            }
            self.unclaimed.push_back((pid, Moment(self.exits), status));
        }
        child
    }

    /// The moment before every exit still to come.
    #[must_use]
    pub fn now(&self) -> Moment {
        Moment(self.exits)
    }

    /// How `pid` ended, if it did after `since` while it was not known.
    pub fn claim(&mut self, pid: i32, since: Moment) -> Option<WaitStatus> {
        let found = self
            .unclaimed
            .iter()
            .rposition(|(ended, moment, _)| *ended == pid && *moment > since)?;
        self.unclaimed.remove(found).map(|(_, _, status)| status)
    }

    /// Forgets unclaimed exits; call when no invocation will name a pid any more.
    pub fn forget_unclaimed(&mut self) {
        self.unclaimed = VecDeque::new();
    }

    /// The children that have not ended.
    pub fn iter(&self) -> impl Iterator<Item = (i32, &T)> {
        self.known.iter().map(|(pid, child)| (*pid, child))
    }

    /// A child that has not ended.
    pub fn get_mut(&mut self, pid: i32) -> Option<&mut T> {
        self.known.get_mut(&pid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, waitpid};

    /// A status as wait(2) reports it: there is no other way to make one.
    #[allow(clippy::zombie_processes)]
    fn status(code: i32) -> WaitStatus {
        let script = format!("exit {code}");
        let child = std::process::Command::new("sh").args(["-c", &script]).spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        waitpid(pid, WaitOptions::empty()).unwrap().unwrap().1
    }

    #[test]
    fn an_exit_seen_before_its_pid_is_known_can_be_claimed_once() {
        let mut children = Children::<()>::default();
        let began = children.now();
        assert_eq!(children.ended(10, status(3)), None);
        let claimed = children.claim(10, began).unwrap();
        assert_eq!(claimed.exit_status(), Some(3));
        assert!(children.claim(10, began).is_none());
    }

    #[test]
    fn an_exit_from_before_the_invocation_belongs_to_someone_else() {
        let mut children = Children::<()>::default();
        children.ended(10, status(0));
        let began = children.now();
        assert!(children.claim(10, began).is_none());
        children.ended(10, status(5));
        assert_eq!(children.claim(10, began).unwrap().exit_status(), Some(5));
    }

    #[test]
    fn the_table_of_unclaimed_exits_is_bounded() {
        let mut children = Children::<()>::default();
        let (began, status) = (children.now(), status(0));
        for pid in 2..5000 {
            children.ended(pid, status);
        }
        assert!(children.unclaimed.len() <= KEPT);
        assert!(children.claim(4999, began).is_some());
        children.insert(7, ());
        assert_eq!(children.ended(7, status), Some(()));
    }
}
