//! Exclusive CPUs and whole cores.

use std::path::Path;

use pinion_topology::{CpuSet, Cpus, Topology};

use super::{Subject, schedstat, tasks};
use crate::facts::PartitionState;
use crate::refusal::NO_PARTITIONS_ON_V1;
use crate::{Host, PartitionKind, Reason, Term, TermName, files};

/// Examples shown of what shares the CPUs.
const EXAMPLES: usize = 5;

pub(super) fn exclusive(host: &Host, subject: &Subject, topology: &Topology) -> Term {
    let cpus = subject.cpus.clone().unwrap_or_default();
    let asked = subject.partition.map(|kind| format!("CPUs {cpus}, {kind} partition"));
    let mut term = Term::new(TermName::ExclusiveCpus, asked);
    match (subject.v2(host), subject.v1.get("cpuset"), subject.partition) {
        (Some(dir), _, Some(kind)) => v2(&mut term, host, &dir, &cpus, kind),
        (None, Some(dir), _) => v1(&mut term, dir, &cpus, topology),
        (Some(dir), _, None) => {
            note(&mut term, &dir, "cpuset.cpus.effective");
            note(&mut term, &dir, "cpuset.cpus.partition");
            term.fail(Reason::CpusShared, "the CPUs are shared");
        }
        (None, None, _) => {
            let reason = "no cpuset controller reaches the container's group";
            term.fail(Reason::NoCpusetController, reason);
        }
    }
    if subject.partition.is_some() {
        foreign_tasks(&mut term, host, subject, &cpus);
    }
    term
}

fn note(term: &mut Term, dir: &Path, file: &str) -> Option<String> {
    match files::read(&dir.join(file)) {
        Ok(Some(text)) => {
            term.note(file, &text);
            Some(text)
        }
        Ok(None) => None,
        Err(error) => {
            term.fail(Reason::Unreadable, format!("{error}: {}", error.source));
            None
        }
    }
}

fn v2(term: &mut Term, host: &Host, dir: &Path, cpus: &CpuSet, kind: PartitionKind) {
    for file in ["cpuset.cpus", "cpuset.cpus.exclusive", "cpuset.cpus.exclusive.effective"] {
        note(term, dir, file);
    }
    let partition = note(term, dir, "cpuset.cpus.partition");
    match PartitionState::parse(partition.as_deref().unwrap_or_default()) {
        PartitionState::Valid(found) if found == kind => {}
        PartitionState::Invalid(_, reason) => {
            let reason = if reason.is_empty() { "no reason given".to_owned() } else { reason };
            let detail = format!("the kernel declares the partition invalid: {reason}");
            term.fail(Reason::PartitionInvalid, detail);
        }
        PartitionState::Valid(_) | PartitionState::Member => {
            let found = partition.unwrap_or_else(|| "not supported by this kernel".to_owned());
            term.fail(Reason::PartitionInvalid, format!("the partition is {found:?}, not {kind}"));
        }
    }
    let effective = note(term, dir, "cpuset.cpus.effective").unwrap_or_default();
    if effective != cpus.to_string() {
        let detail = format!("the container runs on CPUs {effective:?}, asked were {cpus}");
        term.fail(Reason::EffectiveDiffers, detail);
    }
    let Some(root) = host.v2.as_deref() else { return };
    if kind == PartitionKind::Isolated {
        let isolated: Option<CpuSet> =
            files::read_set(&root.join("cpuset.cpus.isolated")).ok().flatten();
        if let Some(isolated) = isolated {
            term.note("root cpuset.cpus.isolated", isolated.to_string());
            let missing = cpus.difference(&isolated);
            if !missing.is_empty() {
                let detail = format!("the kernel does not count CPUs {missing} as isolated");
                term.fail(Reason::PartitionInvalid, detail);
            }
        }
        domains(term, host, cpus);
    }
    overlapping_groups(term, root, dir, cpus);
}

/// An isolated CPU belongs to no scheduling domain, so no load is ever balanced onto it.
fn domains(term: &mut Term, host: &Host, cpus: &CpuSet) {
    let Ok(Some(text)) = files::read(&host.proc().join("schedstat")) else { return };
    let domains = schedstat::domains(&text);
    let of = |cpu| domains.get(&cpu).copied().unwrap_or(0);
    let shown: Vec<String> = cpus.iter().map(|cpu| format!("cpu{cpu}={}", of(cpu))).collect();
    term.note("schedstat domains", shown.join(" "));
    let balanced: Vec<String> =
        cpus.iter().filter(|cpu| of(*cpu) > 0).map(|cpu| cpu.to_string()).collect();
    if !balanced.is_empty() {
        let detail = format!("the scheduler still balances load onto CPUs {}", balanced.join(","));
        term.fail(Reason::CpusShared, detail);
    }
}

/// No group outside the container's subtree may have the CPUs among its effective ones, the
/// root and the ancestors included.
fn overlapping_groups(term: &mut Term, root: &Path, dir: &Path, cpus: &CpuSet) {
    let mut overlapping = Vec::new();
    let groups = files::directories(root);
    let everywhere = std::iter::once(root).chain(groups.iter().map(AsRef::as_ref));
    let mut looked_at = 0;
    for group in everywhere.filter(|group: &&Path| !group.starts_with(dir)) {
        let effective: Option<CpuSet> =
            files::read_set::<Cpus>(&group.join("cpuset.cpus.effective")).ok().flatten();
        let Some(effective) = effective else { continue };
        looked_at += 1;
        if !effective.is_disjoint(cpus) {
            let name = group.strip_prefix(root).unwrap_or(group);
            overlapping.push(format!("/{} ({effective})", name.display()));
        }
    }
    term.note("other groups", format!("{looked_at} read, {} overlap", overlapping.len()));
    if !overlapping.is_empty() {
        let count = overlapping.len();
        overlapping.truncate(EXAMPLES);
        let detail = format!("{count} other groups have the CPUs: {}", overlapping.join(", "));
        term.fail(Reason::CpusShared, detail);
    }
}

/// v1 can keep CPU lists apart, but not the tasks of the root group away.
fn v1(term: &mut Term, dir: &Path, cpus: &CpuSet, topology: &Topology) {
    let asked = term.asked.is_some();
    for file in ["cpuset.cpus", "cpuset.cpu_exclusive", "cpuset.sched_load_balance"] {
        note(term, dir, file);
    }
    let effective = note(term, dir, "cpuset.effective_cpus").unwrap_or_default();
    if !asked {
        term.fail(Reason::CpusShared, "the CPUs are shared");
        return;
    }
    term.fail(Reason::CgroupV1, NO_PARTITIONS_ON_V1);
    if effective != cpus.to_string() {
        let detail = format!(
            "the container runs on CPUs {effective:?}, asked were {cpus} (online: {})",
            topology.online
        );
        term.fail(Reason::EffectiveDiffers, detail);
    }
}

fn foreign_tasks(term: &mut Term, host: &Host, subject: &Subject, cpus: &CpuSet) {
    let foreign = tasks::foreign(&host.proc(), &tasks::Own::of(host, subject), cpus);
    term.note("foreign tasks", foreign.count.to_string());
    if foreign.count > 0 {
        let detail = format!(
            "{} tasks of others may run on the CPUs, such as {}",
            foreign.count,
            foreign.examples.join(", ")
        );
        term.fail(Reason::CpusShared, detail);
    }
}

/// In force if the cores are whole, or if no task may run on the threads outside the set.
pub(super) fn whole_cores(host: &Host, subject: &Subject, topology: &Topology) -> Term {
    let cpus = subject.cpus.clone().unwrap_or_default();
    let asked = subject.partition.map(|_| format!("whole cores for CPUs {cpus}"));
    let mut term = Term::new(TermName::WholeCores, asked);
    let siblings = topology.siblings(&cpus);
    let outside = siblings.difference(&cpus);
    term.note("siblings", siblings.to_string());
    if outside.is_empty() {
        if cpus.is_empty() {
            term.fail(Reason::NoCpus, "the container has no CPU list");
        }
        return term;
    }
    term.note("threads outside the set", outside.to_string());
    let foreign = tasks::foreign(&host.proc(), &tasks::Own::nobody(), &outside);
    term.note("tasks allowed there", foreign.count.to_string());
    if foreign.count > 0 {
        let detail = format!(
            "CPUs {cpus} share cores with CPUs {outside}, where {} tasks may run, such as {}",
            foreign.count,
            foreign.examples.join(", ")
        );
        term.fail(Reason::NotWholeCores, detail);
    }
    term
}
