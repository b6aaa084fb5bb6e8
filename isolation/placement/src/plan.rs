//! Pure planning: from facts, target and request to the exact, ordered kernel writes.
//!
//! A partition below ordinary groups ("remote", Linux 6.7) needs the CPUs in
//! `cpuset.cpus.exclusive` of every group on the way. They are widened from the top, the
//! partition is asked for last, and undo runs the other way:
//!
//! ```text
//!   /k                 exclusive ∪= cpus        ▲ release
//!   /k/b               exclusive ∪= cpus        │ release
//!   /k/b/pod           exclusive ∪= cpus        │ release
//!   /k/b/pod/ctr       exclusive  = cpus        │ restore
//!                      cpus       = cpus        │ restore
//!                      [partition = member]     │    only to clear an invalid one
//!                      partition  = isolated    │ member
//! ```
//!
//! A group beside the container's whose CPU list overlaps would make the partition invalid
//! (Linux 6.12; later kernels leave the CPUs out of that group by themselves). Its list loses
//! them for as long as the partition lasts, unless nothing else is in it.
//!
//! The container's own group gets `cpuset.cpus.exclusive` too although the kernel would do
//! without: with it, a later rewrite of `cpuset.cpus` by somebody else cannot invalidate the
//! partition or move it to other CPUs. An invalid partition is left before it is asked for
//! again, because Linux 6.12 otherwise keeps its CPUs isolated for nobody.
//!
//! Known limit of that kernel: when a partition over boot-isolated CPUs (`isolcpus=`) ends,
//! the CPUs stay without load balancing, but every task's affinity is widened to them. Nothing
//! here can restore that.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pinion_topology::{CpuSet, NodeSet, PageSize};
use serde::{Deserialize, Serialize};

use crate::facts::{Facts, Group, Holder, PartitionState, Support};
use crate::refusal::NO_PARTITIONS_ON_V1;
use crate::{
    Check, Host, PartitionKind, Reason, Refusal, Request, Step, Subject, Term, TermName, UndoStep,
    audit,
};

/// The container as its OCI configuration describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Its cgroup v2 directory, relative to the mount point.
    pub cgroup: Option<PathBuf>,
    /// Its cgroup v1 directories, absolute, by controller.
    pub v1: BTreeMap<String, PathBuf>,
    /// Its `cpuset.cpus`.
    pub cpus: Option<CpuSet>,
    /// Its `cpuset.mems`.
    pub mems: Option<NodeSet>,
    /// Its hugetlb limits in bytes.
    pub hugepages: BTreeMap<PageSize, u64>,
}

/// What will be done, and what cannot be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The writes, in order.
    pub steps: Vec<Step>,
    /// Clean-up of CPUs that the container held before and no longer needs; after success.
    pub release: Vec<UndoStep>,
    /// Terms that cannot be had. Always empty under a strict request.
    pub shortfalls: Vec<Refusal>,
    /// What to audit afterwards.
    pub subject: Subject,
    /// For a failed partition: groups beside the container's that overlap it.
    pub hint: String,
}

/// Plans the request, or refuses the first term that cannot be had if the request is strict.
pub fn plan(facts: &Facts, target: &Target, request: &Request) -> Result<Plan, Refusal> {
    let mut plan = Plan {
        steps: Vec::new(),
        release: Vec::new(),
        shortfalls: Vec::new(),
        subject: Subject::new(target, request),
        hint: hint(facts),
    };
    // Quotas first: undo runs backwards and gives a quota back only once the partition that
    // did without it is gone.
    let (lifted, throttled) = if request.partition.is_some() || request.unthrottled {
        no_throttling(facts, request.owned_levels)
    } else {
        (Vec::new(), Vec::new())
    };
    plan.steps.extend(lifted);
    if let Some(kind) = request.partition {
        match exclusive_cpus(facts, target, kind) {
            Ok((steps, release)) => {
                plan.steps.extend(steps);
                plan.release = release;
            }
            Err(refusal) => plan.shortfalls.push(refusal),
        }
        plan.shortfalls.extend(whole_cores(facts, target));
    }
    plan.shortfalls.extend(throttled);
    plan.shortfalls.extend(hugepages(facts, target, request));
    if request.strict && !plan.shortfalls.is_empty() {
        return Err(plan.shortfalls.swap_remove(0));
    }
    Ok(plan)
}

/// Plans only what exclusivity needs, from facts that may be as few as [`Facts::around`] has.
pub(crate) fn repair(facts: &Facts, target: &Target, request: &Request) -> Result<Plan, Refusal> {
    let (mut steps, _others_quotas) = no_throttling(facts, request.owned_levels);
    if let Some(kind) = request.partition {
        steps.extend(exclusive_cpus(facts, target, kind)?.0);
    }
    let (subject, hint) = (Subject::new(target, request), hint(facts));
    Ok(Plan { steps, release: Vec::new(), shortfalls: Vec::new(), subject, hint })
}

/// Reads back whether the plan's terms are in force.
#[must_use]
pub fn verify(host: &Host, plan: &Plan) -> Vec<Term> {
    audit(host, &plan.subject).terms
}

fn exclusive_cpus(
    facts: &Facts,
    target: &Target,
    kind: PartitionKind,
) -> Result<(Vec<Step>, Vec<UndoStep>), Refusal> {
    let refuse = |reason, detail: String| Refusal::new(TermName::ExclusiveCpus, reason, detail);
    supported(facts, kind)?;
    let none = || "an exclusive container needs a CPU list (linux.resources.cpu.cpus)".to_owned();
    let cpus = target.cpus.as_ref().filter(|cpus| !cpus.is_empty());
    let cpus = cpus.ok_or_else(|| refuse(Reason::NoCpus, none()))?;
    let missing = cpus.difference(&facts.topology.online);
    if !missing.is_empty() {
        let online = &facts.topology.online;
        let detail = format!("CPUs {missing} of {cpus} are not online (online: {online})");
        return Err(refuse(Reason::CpusOffline, detail));
    }
    // The deepest holder is the one a person can do something about.
    let holders = facts.holders.iter().filter(|holder| !holder.cpus.is_disjoint(cpus));
    if let Some(holder) = holders.max_by_key(|holder| holder.dir.components().count()) {
        let taken = holder.cpus.intersection(cpus);
        let detail = format!(
            "CPUs {taken} of {cpus} are held exclusively by {}; choose others or stop its owner",
            holder.dir.display()
        );
        return Err(refuse(Reason::CpusHeld, detail));
    }
    if facts.root_effective.is_subset(cpus) {
        let detail = format!(
            "CPUs {cpus} are all that is left of the machine ({}); at least one must stay for \
             everything else",
            facts.root_effective
        );
        return Err(refuse(Reason::NoCpusLeft, detail));
    }
    let Some((leaf, ancestors)) = facts.chain.split_last() else {
        let detail = "the container's group is the root of the tree".to_owned();
        return Err(refuse(Reason::NoCpusetController, detail));
    };
    let mut steps = Vec::new();
    let mut release = Vec::new();
    if facts.support == Support::Remote {
        steps.extend(ancestors.iter().filter_map(|group| widen(group, cpus)));
        steps.extend(rewrite(leaf, "cpuset.cpus.exclusive", &leaf.exclusive, cpus));
        let unneeded = leaf.exclusive.difference(cpus);
        if !unneeded.is_empty() {
            let shrink = |group: &Group| UndoStep::ReleaseCpus {
                dir: group.dir.clone(),
                cpus: unneeded.clone(),
            };
            // Undo runs from the last to the first, so bottom-up.
            release.extend(ancestors.iter().map(shrink));
        }
    }
    steps.extend(facts.overlapping.iter().filter_map(|beside| trim(beside, cpus)));
    steps.extend(rewrite(leaf, "cpuset.cpus", &leaf.cpus, cpus));
    if let Some(mems) = target.mems.as_ref().filter(|mems| !mems.is_empty()) {
        let rewritten = rewrite(leaf, "cpuset.mems", &leaf.mems, mems);
        steps.extend(rewritten.map(|step| Step { term: TermName::MemoryLocality, ..step }));
    }
    steps.extend(partition(leaf, kind));
    Ok((steps, release))
}

fn supported(facts: &Facts, kind: PartitionKind) -> Result<(), Refusal> {
    let release = &facts.kernel.release;
    let (reason, detail) = match facts.support {
        Support::Remote => return Ok(()),
        Support::Local if facts.below_root() => return Ok(()),
        Support::LocalRoot if facts.below_root() && kind == PartitionKind::Root => return Ok(()),
        Support::V1 => (Reason::CgroupV1, NO_PARTITIONS_ON_V1.to_owned()),
        Support::Absent => (
            Reason::NoCpusetController,
            "no cpuset controller reaches the container's group; enable it in \
             cgroup.subtree_control of its ancestors"
                .to_owned(),
        ),
        Support::LocalRoot => {
            (Reason::NoPartitions, format!("isolated partitions need Linux 6.1, this is {release}"))
        }
        Support::Disjoint => (
            Reason::NoPartitions,
            format!("cpuset partitions need Linux 5.2 with cgroup v2, this is {release}"),
        ),
        Support::Local => (
            Reason::NoRemotePartitions,
            format!(
                "a partition below other groups needs Linux 6.7, this is {release}; the CPU \
                 lists are at best disjoint, and other tasks of the machine may run on the CPUs"
            ),
        ),
    };
    Err(Refusal::new(TermName::ExclusiveCpus, reason, detail))
}

/// Adds the CPUs to an ancestor's exclusive list, which others may share.
fn widen(group: &Group, cpus: &CpuSet) -> Option<Step> {
    let added = cpus.difference(&group.exclusive);
    let value = group.exclusive.union(cpus).to_string();
    (!added.is_empty()).then(|| Step {
        term: TermName::ExclusiveCpus,
        path: group.dir.join("cpuset.cpus.exclusive"),
        check: Check::Text(value.clone()),
        value,
        undo: UndoStep::ReleaseCpus { dir: group.dir.clone(), cpus: added },
    })
}

/// Replaces a list of the container's own group.
fn rewrite<T: ToString + PartialEq>(group: &Group, file: &str, old: &T, new: &T) -> Option<Step> {
    let path = group.dir.join(file);
    let value = new.to_string();
    (old != new).then(|| Step {
        term: TermName::ExclusiveCpus,
        path: path.clone(),
        check: Check::Text(value.clone()),
        value: value.clone(),
        undo: UndoStep::Restore { path, old: old.to_string(), new: value },
    })
}

/// Takes the CPUs out of the list of a group beside the container's. An empty list would mean
/// all CPUs, so a group that has no others is left to the audit.
fn trim(beside: &Holder, cpus: &CpuSet) -> Option<Step> {
    let rest = beside.cpus.difference(cpus);
    let group = Group { dir: beside.dir.clone(), ..Group::default() };
    if rest.is_empty() { None } else { rewrite(&group, "cpuset.cpus", &beside.cpus, &rest) }
}

fn partition(leaf: &Group, kind: PartitionKind) -> Vec<Step> {
    let step = |value: String, check| Step {
        term: TermName::ExclusiveCpus,
        path: leaf.dir.join("cpuset.cpus.partition"),
        value,
        check,
        undo: UndoStep::LeavePartition { dir: leaf.dir.clone() },
    };
    let ask = || step(kind.to_string(), Check::Partition(kind));
    match leaf.partition {
        PartitionState::Valid(current) if current == kind => Vec::new(),
        PartitionState::Member | PartitionState::Valid(_) => vec![ask()],
        PartitionState::Invalid(..) => {
            vec![step("member".to_owned(), Check::Text("member".to_owned())), ask()]
        }
    }
}

/// Siblings outside the set are bearable only if nothing is scheduled there: offline ones are
/// not siblings, boot-isolated ones are presumed idle until the audit looks.
fn whole_cores(facts: &Facts, target: &Target) -> Option<Refusal> {
    let cpus = target.cpus.as_ref().filter(|cpus| !cpus.is_empty())?;
    let foreign = facts.topology.siblings(cpus).difference(cpus);
    let busy = foreign.difference(&facts.topology.isolated);
    (!busy.is_empty()).then(|| {
        let detail = format!(
            "CPUs {cpus} share cores with CPUs {busy}, which others may use; ask for whole \
             cores (a CPU manager's full-pcpus-only option) or take the siblings offline"
        );
        Refusal::new(TermName::WholeCores, Reason::NotWholeCores, detail)
    })
}

fn no_throttling(facts: &Facts, owned_levels: usize) -> (Vec<Step>, Vec<Refusal>) {
    let (groups, file) = if facts.quotas_v1.is_empty() {
        (&facts.chain, "cpu.max")
    } else {
        (&facts.quotas_v1, "cpu.cfs_quota_us")
    };
    let first_owned = groups.len().saturating_sub(1 + owned_levels);
    let mut steps = Vec::new();
    let mut shortfalls = Vec::new();
    for (level, group) in groups.iter().enumerate() {
        let Some(old) = group.quota.clone().filter(|quota| is_quota(quota)) else { continue };
        let path = group.dir.join(file);
        if level < first_owned {
            shortfalls.push(Refusal::new(
                TermName::NoThrottling,
                Reason::Quota,
                format!(
                    "{} limits the CPU time of everything below to {old:?} and is not the \
                     container's to change; remove the limit there",
                    path.display()
                ),
            ));
            continue;
        }
        let (value, new) = unlimited(&old);
        let undo = if level + 1 == groups.len() {
            UndoStep::Restore { path: path.clone(), old, new: new.clone() }
        } else {
            UndoStep::RestoreQuota { path: path.clone(), old, new: new.clone() }
        };
        let check = Check::Text(new);
        steps.push(Step { term: TermName::NoThrottling, path, value, check, undo });
    }
    (steps, shortfalls)
}

/// Whether a `cpu.max` or a `cpu.cfs_quota_us` limits anything.
pub(crate) fn is_quota(text: &str) -> bool {
    !text.starts_with("max") && !text.starts_with('-')
}

/// What to write to lift a quota, and what the file says then.
fn unlimited(quota: &str) -> (String, String) {
    match quota.split_once(' ') {
        Some((_, period)) => ("max".to_owned(), format!("max {period}")),
        None => ("-1".to_owned(), "-1".to_owned()),
    }
}

/// What no proof needs to be run for.
fn hugepages(facts: &Facts, target: &Target, request: &Request) -> Option<Refusal> {
    let refuse = |reason, detail| Some(Refusal::new(TermName::Hugepages, reason, detail));
    for grant in &request.prefault {
        let (node, size, pages) = (grant.node, grant.size, grant.pages);
        let Some(pool) = facts.topology.pool(node, size) else {
            let nodes = facts.topology.node_ids();
            let detail = format!(
                "{pages} pages of {size} on node {node}: the machine has no such pool (nodes: \
                 {nodes})"
            );
            return refuse(Reason::NoSuchPool, detail);
        };
        if pool.total == 0 {
            let file = Path::new("/sys/devices/system/node")
                .join(format!("node{node}/hugepages/{}/nr_hugepages", size.sysfs_name()));
            let detail = format!(
                "node {node} has no pages of {size}, {pages} asked; reserve some in {}",
                file.display()
            );
            return refuse(Reason::PoolExhausted, detail);
        }
        let mems = target.mems.as_ref().filter(|mems| !mems.is_empty());
        if let Some(mems) = mems.filter(|mems| !mems.contains(node)) {
            let detail = format!(
                "{pages} pages of {size} were granted on node {node}, and the container's \
                 memory nodes are {mems}"
            );
            return refuse(Reason::NodeNotAllowed, detail);
        }
        let granted: u64 = request
            .prefault
            .iter()
            .filter(|other| other.size == size)
            .map(|other| other.pages.saturating_mul(size.bytes()))
            .fold(0, u64::saturating_add);
        if let Some(limit) = target.hugepages.get(&size).filter(|limit| **limit < granted) {
            let detail = format!(
                "{granted} bytes of {size} pages were granted, and the container's limit is \
                 {limit}"
            );
            return refuse(Reason::HugepageLimit, detail);
        }
    }
    None
}

fn hint(facts: &Facts) -> String {
    let beside = |holder: &Holder| format!("{} ({})", holder.dir.display(), holder.cpus);
    let overlapping: Vec<String> = facts.overlapping.iter().map(beside).collect();
    if overlapping.is_empty() {
        return String::new();
    }
    format!("groups beside it have the same CPUs in cpuset.cpus: {}", overlapping.join(", "))
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
