//! Taking lost CPUs back, fast: the same writes as at the start, from as few facts as they
//! need.
//!
//! ```text
//!   lock ─▶ the groups around the container ─▶ plan (pure) ─▶ journal, once ─▶ write, read back
//! ```
//!
//! Every moment of a loss somebody else may run on the CPUs, so nothing is read here that the
//! writes do not depend on: no topology but the list of online CPUs, no group but those on the
//! way down and those directly beside them. What those do not show, the kernel refuses.
//!
//! Invariants: the caller keeps resizes of the same container away; undo steps are in the
//! journal before the first write; what fails is left to the thorough way ([`crate::enforce`]),
//! which starts from what is in force by then.

use std::io;

use crate::plan::repair;
use crate::step::apply_step;
use crate::{ApplyError, EnforceError, Facts, Host, Request, Target, UndoStep};

/// Takes the container's CPUs back. `record` gets the undo of every write at once, before the
/// first of them; it may have some of it already.
///
/// # Errors
/// [`EnforceError::Refused`] if somebody else holds the CPUs or the kernel does not give them.
pub fn heal(
    host: &Host,
    target: &Target,
    request: &Request,
    record: &mut dyn FnMut(&[UndoStep]) -> io::Result<()>,
) -> Result<(), EnforceError> {
    let refused = |refusal| EnforceError::Refused { refusal, failures: Vec::new() };
    let _lock = host.lock().map_err(EnforceError::Lock)?;
    let facts = Facts::around(host, target).map_err(EnforceError::Facts)?;
    let plan = repair(&facts, target, request).map_err(refused)?;
    let undo: Vec<UndoStep> = plan.steps.iter().map(|step| step.undo.clone()).collect();
    if !undo.is_empty() {
        record(&undo).map_err(EnforceError::Journal)?;
    }
    let applied = plan.steps.iter().try_for_each(|step| apply_step(step, &mut |_| Ok(())));
    applied.map_err(|error: ApplyError| refused(error.refusal(&plan.hint)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testtree::{Tree, relative};
    use crate::{PartitionKind, Reason};

    fn target() -> Target {
        Target {
            cgroup: relative("k/b/p1/c1"),
            cpus: Some("2-3".parse().unwrap()),
            ..Target::default()
        }
    }

    fn request() -> Request {
        Request { partition: Some(PartitionKind::Isolated), strict: true, ..Request::default() }
    }

    fn lost() -> Tree {
        let tree = Tree::with_groups();
        tree.file("cgroup/k/cpuset.cpus.exclusive", "6");
        tree.file("cgroup/k/b/cpuset.cpus.exclusive", "2-3");
        tree.file("cgroup/k/b/p1/cpuset.cpus.exclusive", "");
        tree.file("cgroup/k/b/p1/c1/cpuset.cpus", "2-3");
        tree.file("cgroup/k/b/p1/c1/cpuset.cpus.exclusive", "2-3");
        tree.file("cgroup/k/b/p1/c1/cpuset.cpus.partition", "member");
        tree.file("cgroup/k/b/p1/c2/cpuset.cpus", "0-7");
        tree
    }

    #[test]
    fn lists_are_widened_neighbours_trimmed_and_the_partition_asked_for() {
        let tree = lost();
        let mut journal = Vec::new();
        let mut record = |steps: &[UndoStep]| {
            assert!(journal.is_empty(), "one entry for all");
            assert_eq!(tree.text("cgroup/k/cpuset.cpus.exclusive"), "6", "nothing written yet");
            journal.extend_from_slice(steps);
            Ok(())
        };
        heal(&tree.host("6.12"), &target(), &request(), &mut record).unwrap();
        assert_eq!(tree.text("cgroup/k/cpuset.cpus.exclusive"), "2-3,6");
        assert_eq!(tree.text("cgroup/k/b/p1/cpuset.cpus.exclusive"), "2-3");
        assert_eq!(tree.text("cgroup/k/b/p1/c1/cpuset.cpus.partition"), "isolated");
        assert_eq!(tree.text("cgroup/k/b/p1/c2/cpuset.cpus"), "0-1,4-7");
        assert_eq!(journal.len(), 4);
        crate::undo(&tree.host("6.12"), &journal).unwrap();
        assert_eq!(tree.text("cgroup/k/b/p1/c2/cpuset.cpus"), "0-7");
    }

    #[test]
    fn without_a_journal_nothing_is_written() {
        let tree = lost();
        let mut record = |_: &[UndoStep]| Err(io::Error::other("disk full"));
        let failed = heal(&tree.host("6.12"), &target(), &request(), &mut record);
        assert!(matches!(failed, Err(EnforceError::Journal(_))));
        assert_eq!(tree.text("cgroup/k/cpuset.cpus.exclusive"), "6");
    }

    #[test]
    fn what_somebody_beside_the_way_down_holds_is_not_taken() {
        let tree = lost();
        tree.file("cgroup/k/b/p2/cpuset.cpus.exclusive", "3");
        let mut record = |_: &[UndoStep]| Ok(());
        match heal(&tree.host("6.12"), &target(), &request(), &mut record) {
            Err(EnforceError::Refused { refusal, .. }) => {
                assert_eq!(refusal.reason, Reason::CpusHeld);
                assert!(refusal.detail.contains("k/b/p2"), "{refusal}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(tree.text("cgroup/k/b/p1/c1/cpuset.cpus.partition"), "member");
    }
}
