//! Kernel writes as data: a step with its check and its undo, and the two loops over them.
//!
//! Undo steps are idempotent and look before they write: a value that somebody else has
//! changed since is left alone, and CPUs are taken out of a shared list only if no group
//! below still holds them. A group that is gone needs no undo.

use std::io;
use std::path::{Path, PathBuf};

use pinion_topology::{CpuSet, Cpus};
use serde::{Deserialize, Serialize};

use crate::facts::PartitionState;
use crate::{Host, PartitionKind, Plan, Reason, Refusal, TermName, files};

/// One write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The guarantee it serves.
    pub term: TermName,
    /// The file.
    pub path: PathBuf,
    /// What to write.
    pub value: String,
    /// What the file must say afterwards.
    pub check: Check,
    /// How to take it back.
    pub undo: UndoStep,
}

/// What a file must say after a write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// Exactly this text.
    Text(String),
    /// A valid partition of this kind.
    Partition(PartitionKind),
}

/// Takes one write back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum UndoStep {
    /// Make the group an ordinary one again.
    LeavePartition {
        /// The group.
        dir: PathBuf,
    },
    /// Take CPUs out of the group's `cpuset.cpus.exclusive`, except those that groups below
    /// hold.
    ReleaseCpus {
        /// The group.
        dir: PathBuf,
        /// The CPUs.
        cpus: CpuSet,
    },
    /// Write the old value unless somebody else has changed it.
    Restore {
        /// The file.
        path: PathBuf,
        /// What it said before.
        old: String,
        /// What it says if nobody else has changed it.
        new: String,
    },
    /// As `Restore`, and not while the group or one below it is a partition in force.
    RestoreQuota {
        /// The file.
        path: PathBuf,
        /// What it said before.
        old: String,
        /// What it says if nobody else has changed it.
        new: String,
    },
}

/// Why a plan could not be applied; the steps before the failing one are in force.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The journal refused the undo step, so nothing was written.
    #[error("journal the undo of a write to {path}")]
    Journal {
        /// The file that would have been written.
        path: PathBuf,
        /// What the journal answered.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a write.
    #[error("write {value:?} to {path}")]
    Write {
        /// The guarantee the write serves.
        term: TermName,
        /// The file.
        path: PathBuf,
        /// The value.
        value: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The kernel took a write and says something else.
    #[error("{path} says {found:?} after {value:?} was written")]
    Check {
        /// The guarantee the write serves.
        term: TermName,
        /// The file.
        path: PathBuf,
        /// The value.
        value: String,
        /// What it says.
        found: String,
    },
}

impl ApplyError {
    /// The refusal for a person; `hint` is appended when it is not empty.
    #[must_use]
    pub fn refusal(&self, hint: &str) -> Refusal {
        let (term, reason, detail) = match self {
            Self::Journal { path, source } => (
                TermName::ExclusiveCpus,
                Reason::WriteFailed,
                format!("nothing was written to {}: the journal failed: {source}", path.display()),
            ),
            Self::Write { term, path, value, source } => (
                *term,
                Reason::WriteFailed,
                format!("the kernel refused {value:?} in {}: {source}", path.display()),
            ),
            Self::Check { term, path, value, found } => {
                let partition = path.ends_with("cpuset.cpus.partition");
                let reason = if partition { Reason::PartitionInvalid } else { Reason::WriteFailed };
                let said =
                    format!("the kernel took {value:?} in {} and says {found:?}", path.display());
                (*term, reason, said)
            }
        };
        let hint = if hint.is_empty() { String::new() } else { format!("; {hint}") };
        Refusal { term, reason, detail: detail + &hint }
    }
}

/// Writes the plan's steps in order. `record` gets the undo of each step before its write and
/// must have it on disk when it returns.
pub fn apply(
    plan: &Plan,
    record: &mut dyn FnMut(&UndoStep) -> io::Result<()>,
) -> Result<(), ApplyError> {
    plan.steps.iter().try_for_each(|step| apply_step(step, record))
}

pub(crate) fn apply_step(
    step: &Step,
    record: &mut dyn FnMut(&UndoStep) -> io::Result<()>,
) -> Result<(), ApplyError> {
    let Step { term, path, value, .. } = step;
    let path = || path.clone();
    record(&step.undo).map_err(|source| ApplyError::Journal { path: path(), source })?;
    let failed =
        |source| ApplyError::Write { term: *term, path: path(), value: value.clone(), source };
    files::write(&step.path, value).map_err(failed)?;
    let found = files::read(&step.path).map_err(|error| failed(error.source))?;
    let found = found.unwrap_or_default();
    let holds = match &step.check {
        Check::Text(text) => found == *text,
        Check::Partition(kind) => PartitionState::parse(&found) == PartitionState::Valid(*kind),
    };
    if holds {
        return Ok(());
    }
    Err(ApplyError::Check { term: *term, path: path(), value: value.clone(), found })
}

/// An undo step that failed; the others ran all the same.
#[derive(Debug, thiserror::Error)]
#[error("undo {step:?}")]
pub struct UndoFailure {
    /// The step, to be tried again.
    pub step: UndoStep,
    /// What the kernel answered.
    #[source]
    pub source: io::Error,
}

/// Takes the steps back, last first, every one of them; fails with those that failed, in the
/// order given, so that they can be handed in again.
pub fn undo(host: &Host, steps: &[UndoStep]) -> Result<(), Vec<UndoFailure>> {
    // Without the lock a neighbour's concurrent widening could be lost; but undo must go on.
    let _lock = host.lock();
    undo_locked(steps)
}

pub(crate) fn undo_locked(steps: &[UndoStep]) -> Result<(), Vec<UndoFailure>> {
    let mut failures = Vec::new();
    for step in steps.iter().rev() {
        match step.run() {
            Ok(()) => {}
            Err(source) if files::gone(&source) => {}
            Err(source) => failures.push(UndoFailure { step: step.clone(), source }),
        }
    }
    failures.reverse();
    if failures.is_empty() { Ok(()) } else { Err(failures) }
}

impl UndoStep {
    fn run(&self) -> io::Result<()> {
        match self {
            Self::LeavePartition { dir } => leave(dir),
            Self::ReleaseCpus { dir, cpus } => release(dir, cpus),
            Self::Restore { path, old, new } => restore(path, old, new),
            Self::RestoreQuota { path, old, new } => {
                let group = path.parent().unwrap_or(path);
                if holds_partition(group) { Ok(()) } else { restore(path, old, new) }
            }
        }
    }
}

fn current(path: &Path) -> io::Result<String> {
    let text = files::read(path).map_err(|error| error.source)?;
    text.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
}

fn restore(path: &Path, old: &str, new: &str) -> io::Result<()> {
    if current(path)? == new { files::write(path, old) } else { Ok(()) }
}

/// Leaves a partition. If the CPUs are missing from a list above, Linux 6.12 lets the group
/// leave and keeps the CPUs isolated for nobody until the next boot; so they are put back
/// there for as long as the write takes.
fn leave(dir: &Path) -> io::Result<()> {
    let path = dir.join("cpuset.cpus.partition");
    if current(&path)? == "member" {
        return Ok(());
    }
    let set = |path: PathBuf| files::read_set::<Cpus>(&path).map_err(|error| error.source);
    let cpus = set(dir.join("cpuset.cpus.exclusive.effective"))?.unwrap_or_default();
    let mut widened = Vec::new();
    for above in dir.ancestors().skip(1) {
        // The root group has no such file.
        let Some(exclusive) = set(above.join(EXCLUSIVE))? else { break };
        if !cpus.is_subset(&exclusive) {
            widened.push((above.join(EXCLUSIVE), exclusive));
        }
    }
    for (path, exclusive) in widened.iter().rev() {
        files::write(path, &exclusive.union(&cpus).to_string())?;
    }
    let left = files::write(&path, "member");
    for (path, exclusive) in &widened {
        files::write(path, &exclusive.to_string())?;
    }
    left
}

const EXCLUSIVE: &str = "cpuset.cpus.exclusive";

fn release(dir: &Path, cpus: &CpuSet) -> io::Result<()> {
    let read = |dir: &Path| -> io::Result<CpuSet> {
        let set = files::read_set::<Cpus>(&dir.join(EXCLUSIVE)).map_err(|error| error.source)?;
        set.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    };
    let held = read(dir)?;
    let mut below = CpuSet::new();
    for child in std::fs::read_dir(dir)?.flatten() {
        if child.file_type().is_ok_and(|kind| kind.is_dir()) {
            // A child that goes away meanwhile holds nothing.
            below = below.union(&read(&child.path()).unwrap_or_default());
        }
    }
    let kept = held.difference(&cpus.difference(&below));
    if kept == held { Ok(()) } else { files::write(&dir.join(EXCLUSIVE), &kept.to_string()) }
}

fn holds_partition(group: &Path) -> bool {
    let valid = |dir: &Path| {
        let text = files::read(&dir.join("cpuset.cpus.partition")).ok().flatten();
        matches!(PartitionState::parse(&text.unwrap_or_default()), PartitionState::Valid(_))
    };
    valid(group) || files::directories(group).iter().any(|dir| valid(dir))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testtree::Tree;

    fn cpus(list: &str) -> CpuSet {
        list.parse().unwrap()
    }

    #[test]
    fn releasing_keeps_what_groups_below_hold() {
        let tree = Tree::new();
        tree.file("k/cpuset.cpus.exclusive", "2-7");
        tree.file("k/other/cpuset.cpus.exclusive", "3,6-7");
        let step = UndoStep::ReleaseCpus { dir: tree.path("k"), cpus: cpus("2-5") };
        undo_locked(std::slice::from_ref(&step)).unwrap();
        assert_eq!(tree.text("k/cpuset.cpus.exclusive"), "3,6-7");
        undo_locked(&[step]).unwrap();
        assert_eq!(tree.text("k/cpuset.cpus.exclusive"), "3,6-7", "undo is idempotent");
    }

    #[test]
    fn a_value_that_somebody_else_changed_is_left_alone() {
        let tree = Tree::new();
        tree.file("p/cpu.max", "300000 100000");
        let restore = UndoStep::Restore {
            path: tree.path("p/cpu.max"),
            old: "200000 100000".to_owned(),
            new: "max 100000".to_owned(),
        };
        undo_locked(std::slice::from_ref(&restore)).unwrap();
        assert_eq!(tree.text("p/cpu.max"), "300000 100000");
        tree.file("p/cpu.max", "max 100000");
        undo_locked(&[restore]).unwrap();
        assert_eq!(tree.text("p/cpu.max"), "200000 100000");
    }

    #[test]
    fn a_quota_returns_only_when_no_partition_below_needs_its_absence() {
        let tree = Tree::new();
        tree.file("p/cpu.max", "max 100000");
        tree.file("p/c2/cpuset.cpus.partition", "isolated");
        let step = UndoStep::RestoreQuota {
            path: tree.path("p/cpu.max"),
            old: "200000 100000".to_owned(),
            new: "max 100000".to_owned(),
        };
        undo_locked(std::slice::from_ref(&step)).unwrap();
        assert_eq!(tree.text("p/cpu.max"), "max 100000");
        tree.file("p/c2/cpuset.cpus.partition", "member");
        undo_locked(&[step]).unwrap();
        assert_eq!(tree.text("p/cpu.max"), "200000 100000");
    }

    #[test]
    fn every_step_runs_though_one_fails_and_absent_groups_need_none() {
        let tree = Tree::new();
        tree.file("a/cpuset.cpus.partition", "isolated");
        tree.file("b/cpuset.cpus.exclusive", "nonsense");
        let failing = UndoStep::ReleaseCpus { dir: tree.path("b"), cpus: cpus("1") };
        let also_failing = UndoStep::ReleaseCpus { dir: tree.path("b"), cpus: cpus("2") };
        let steps = [
            UndoStep::LeavePartition { dir: tree.path("a") },
            UndoStep::LeavePartition { dir: tree.path("gone") },
            failing.clone(),
            also_failing.clone(),
        ];
        let failures = undo_locked(&steps).unwrap_err();
        let failed: Vec<UndoStep> = failures.into_iter().map(|failure| failure.step).collect();
        assert_eq!(failed, [failing, also_failing]);
        assert_eq!(tree.text("a/cpuset.cpus.partition"), "member");
    }

    #[test]
    fn leaving_with_a_list_above_overwritten_leaves_that_as_it_is() {
        let tree = Tree::new();
        tree.file("k/cpuset.cpus.exclusive", "6");
        tree.file("k/p/cpuset.cpus.exclusive", "");
        tree.file("k/p/c/cpuset.cpus.exclusive.effective", "2-3");
        tree.file("k/p/c/cpuset.cpus.partition", "isolated");
        undo_locked(&[UndoStep::LeavePartition { dir: tree.path("k/p/c") }]).unwrap();
        assert_eq!(tree.text("k/p/c/cpuset.cpus.partition"), "member");
        assert_eq!(
            (tree.text("k/cpuset.cpus.exclusive"), tree.text("k/p/cpuset.cpus.exclusive")),
            ("6".into(), String::new())
        );
    }

    #[test]
    fn a_refused_journal_entry_prevents_the_write() {
        let tree = Tree::new();
        tree.file("a/cpuset.cpus", "0-1");
        let step = Step {
            term: TermName::ExclusiveCpus,
            path: tree.path("a/cpuset.cpus"),
            value: "2".to_owned(),
            check: Check::Text("2".to_owned()),
            undo: UndoStep::LeavePartition { dir: tree.path("a") },
        };
        let error = apply_step(&step, &mut |_| Err(io::Error::other("disk full"))).unwrap_err();
        assert!(matches!(error, ApplyError::Journal { .. }));
        assert_eq!(tree.text("a/cpuset.cpus"), "0-1");
        apply_step(&step, &mut |_| Ok(())).unwrap();
        assert_eq!(tree.text("a/cpuset.cpus"), "2");
    }

    #[test]
    fn a_silently_invalid_partition_fails_with_the_kernels_reason() {
        let error = ApplyError::Check {
            term: TermName::ExclusiveCpus,
            path: "/sys/fs/cgroup/c/cpuset.cpus.partition".into(),
            value: "isolated".to_owned(),
            found: "isolated invalid (Parent is not a partition root)".to_owned(),
        };
        let refusal = error.refusal("beside it, d has CPUs 2-3");
        assert_eq!(refusal.reason, Reason::PartitionInvalid);
        assert!(refusal.detail.contains("Parent is not a partition root"));
        assert!(refusal.detail.ends_with("; beside it, d has CPUs 2-3"));
    }

    #[test]
    fn undo_steps_survive_the_journal() {
        let step = UndoStep::ReleaseCpus { dir: "/k".into(), cpus: cpus("2-3") };
        let json = serde_json::to_string(&step).unwrap();
        assert_eq!(json, r#"{"do":"release-cpus","dir":"/k","cpus":"2-3"}"#);
        assert_eq!(serde_json::from_str::<UndoStep>(&json).unwrap(), step);
    }
}
