//! What kubelet's CPU, memory and topology managers decide is in force, by the kernel's word,
//! and stays so while kubelet keeps writing cpusets.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pinion_topology::CpuSet;
use serde_json::json;

use super::agent::{RECONCILE, RESERVED_CPUS};
use super::manifest::{self, IN_FILE, MAPPED};
use super::stage::{self, Stage};
use crate::error::{During, Error, Result, ensure};
use crate::{evidence, leaks, pinned};

/// A container's process that has CPUs of its own, as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Exclusive {
    pub(super) pid: u32,
    pub(super) cpus: CpuSet,
    /// The NUMA node all of them are on.
    pub(super) node: u32,
    cgroup: PathBuf,
}

/// Reads the process with this command line and checks all that exclusivity means: whole
/// cores of one node, a valid partition below kubelet's own groups, no scheduling domain.
pub(super) fn exclusive(command: &str) -> Result<Exclusive> {
    let pid = leaks::process_with(command)
        .ok_or_else(|| Error::check(format!("no process runs `{command}`")))?;
    let cpus = evidence::allowed_cpus(pid)?;
    let cgroup = evidence::cgroup_of(pid)?;
    ensure(cgroup.starts_with(pinned::kubelet_group("")), || {
        format!("it is in {}, not in kubelet's tree", cgroup.display())
    })?;
    let line = |file: &str| evidence::line(&cgroup.join(file));
    let partition = line("cpuset.cpus.partition")?;
    ensure(partition == "isolated", || {
        format!("the partition of `{command}` on CPUs {cpus} is {partition:?}")
    })?;
    let effective = line("cpuset.cpus.effective")?;
    ensure(effective == cpus.to_string(), || format!("it may use {effective}, runs on {cpus}"))?;
    let topology = evidence::topology()?;
    ensure(topology.siblings(&cpus) == cpus && cpus.len() == 2, || {
        format!("CPUs {cpus} are not one whole core")
    })?;
    let domains = evidence::scheduling_domains()?;
    let balanced = cpus.iter().any(|cpu| domains.get(&cpu).is_none_or(|count| *count > 0));
    ensure(!balanced, || format!("CPUs {cpus} are load-balanced: {domains:?}"))?;
    let quota = line("cpu.max")?;
    ensure(quota.starts_with("max"), || format!("it is throttled: cpu.max is {quota:?}"))?;
    let node = topology.nodes.iter().find(|node| cpus.is_subset(&node.cpus));
    let node = node.ok_or_else(|| Error::check(format!("CPUs {cpus} are on two nodes")))?.id;
    let mems = line("cpuset.mems.effective")?;
    ensure(mems == node.to_string(), || format!("its memory is on {mems}, its CPUs on {node}"))?;
    Ok(Exclusive { pid, cpus, node, cgroup })
}

/// The strict pod's process, checked, hugepages included.
pub(super) fn strict() -> Result<Exclusive> {
    let found = exclusive(&manifest::strict_command())?;
    let mapped = evidence::mapped_hugepages(found.pid)?;
    ensure(mapped.get(&found.node) == Some(&MAPPED) && mapped.len() == 1, || {
        format!("its pages lie on {mapped:?}, its CPUs on node {}", found.node)
    })?;
    for (file, wanted) in [("hugetlb.2MB.max", 32 << 21), ("hugetlb.2MB.rsvd.max", 32 << 21)] {
        let value = evidence::line(&found.cgroup.join(file))?;
        ensure(value == u64::to_string(&wanted), || format!("{file} is {value}, not {wanted}"))?;
    }
    // the file's pages stay charged to the pod when the container that made it is gone
    let pod = found.cgroup.parent().unwrap_or(&found.cgroup).join("hugetlb.2MB.current");
    let current = evidence::line(&pod)?;
    ensure(current == u64::to_string(&((MAPPED + IN_FILE) << 21)), || {
        format!("{} is {current}", pod.display())
    })?;
    let pool = evidence::hugepages(found.node)?;
    ensure(pool.total - pool.free == MAPPED + IN_FILE, || {
        format!("node {} has {} of {} pages free", found.node, pool.free, pool.total)
    })?;
    Ok(found)
}

/// Guaranteed pods: one strict, one that says nothing. Both are started into a shared pool
/// that kubelet shrinks only at its next reconcile.
pub(super) fn guaranteed(stage: &mut Stage) -> Result<()> {
    for pod in [manifest::strict(), manifest::plain()] {
        manifest::place(&stage.kubelet.manifests, &pod)?;
    }
    let pod = stage.wait_ready("strict")?;
    let first = settled(strict)?;
    aligned_by_record(stage, &pod)?;
    let pod = stage.wait_ready("plain")?;
    let second = exclusive("pinion-workload wait plain")?;
    ensure(second.cpus.is_disjoint(&first.cpus), || format!("{first:?} and {second:?}"))?;
    aligned_by_record(stage, &pod)
}

/// The receipt says that all is in force, and that the CPUs are the container's own because
/// kubelet says so, not because of what the numbers look like.
fn aligned_by_record(stage: &Stage, pod: &serde_json::Value) -> Result<()> {
    let receipt = stage.receipt(&stage::container(pod, "main")?.id())?;
    ensure(receipt["verdict"] == "aligned", || format!("pinctl receipt says {receipt}"))?;
    let terms = receipt["terms"].as_array().into_iter().flatten();
    let basis = terms.filter_map(|term| term["evidence"]["basis"].as_str()).next();
    ensure(basis.is_some_and(|basis| basis.starts_with("kubelet's ")), || {
        format!("the ground for exclusive CPUs is {basis:?}: {receipt}")
    })
}

/// The workload needs a moment between its start and its last page.
fn settled<T>(check: impl Fn() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match check() {
            Err(_) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(200));
            }
            outcome => return outcome,
        }
    }
}

/// The pods with CPUs of their own, checked.
pub(super) fn both() -> Result<[Exclusive; 2]> {
    Ok([strict()?, exclusive("pinion-workload wait plain")?])
}

/// Burstable and best-effort containers share what is left, and no exclusive CPU.
pub(super) fn shared_pool(_: &mut Stage) -> Result<()> {
    let taken = both()?.iter().fold(CpuSet::default(), |all, one| all.union(&one.cpus));
    let left = evidence::topology()?.online.difference(&taken);
    let commands = [
        "pinion-workload serve 8080 8081 8082",
        "pinion-workload wait sidecar",
        "pinion-workload count 3000",
    ];
    for command in commands {
        // kubelet's list follows at its next reconcile; the kernel's own never lags behind
        let allowed = pool_of(command)?;
        ensure(allowed.is_disjoint(&taken), || format!("`{command}` may run on {allowed}"))?;
        settled(|| {
            let allowed = pool_of(command)?;
            ensure(allowed == left, || format!("`{command}` has {allowed}, left are {left}"))
        })?;
    }
    Ok(())
}

fn pool_of(command: &str) -> Result<CpuSet> {
    let pid = leaks::process_with(command)
        .ok_or_else(|| Error::check(format!("no process runs `{command}`")))?;
    evidence::allowed_cpus(pid)
}

/// Two and a half reconcile periods, looking all the time.
pub(super) fn reconcile(stage: &mut Stage) -> Result<()> {
    let begin = both()?;
    let end = Instant::now() + RECONCILE * 5 / 2;
    while Instant::now() < end {
        for one in &begin {
            let state = evidence::line(&one.cgroup.join("cpuset.cpus.partition"))?;
            let effective = evidence::line(&one.cgroup.join("cpuset.cpus.effective"))?;
            ensure(state == "isolated" && effective == one.cpus.to_string(), || {
                format!("{} is {state:?} with CPUs {effective}", one.cgroup.display())
            })?;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let after = both()?;
    ensure(after == begin, || format!("{begin:?} became {after:?}"))?;
    // kubelet does not tell its pods, only its log
    let log = stage.kubelet.log();
    let refused = log.lines().find(|line| line.contains("ailed to update container"));
    ensure(refused.is_none(), || format!("kubelet's log says {refused:?}"))
}

/// What kubelet itself refuses: CPUs of two nodes, and half a core.
pub(super) fn kubelet_refuses(stage: &mut Stage) -> Result<()> {
    for (name, cpus, reason) in
        [("wide", "4", "TopologyAffinityError"), ("half", "1", "SMTAlignmentError")]
    {
        let wait = manifest::container("main", &["pinion-workload", "wait", name]);
        let pod = manifest::pod(name, &[manifest::guaranteed(wait, cpus)]);
        manifest::place(&stage.kubelet.manifests, &pod)?;
        let refused = |pod: &serde_json::Value| pod["status"]["reason"] == reason;
        stage.wait_pod(name, reason, refused)?;
        manifest::withdraw(&stage.kubelet.manifests, name)?;
        stage.wait_gone(name)?;
    }
    both().map(drop)
}

/// What Pinion refuses is what a person reads in the pod's status: a burstable pod that
/// wants the shared pool for itself.
pub(super) fn pinion_refuses(stage: &mut Stage) -> Result<()> {
    let mut greedy = manifest::container("main", &["pinion-workload", "wait", "greedy"]);
    greedy["resources"] = json!({ "requests": { "cpu": "100m" } });
    let mut pod = manifest::pod("greedy", &[greedy]);
    pod["metadata"]["annotations"] = json!({
        "isolation.pinion.dev/strict": "true", "cpu.pinion.dev/exclusive": "true",
    });
    manifest::place(&stage.kubelet.manifests, &pod)?;
    let waiting =
        |pod: &serde_json::Value| pod["status"]["containerStatuses"][0]["state"]["waiting"].clone();
    let pod = stage
        .wait_pod("greedy", "refused", |pod| waiting(pod)["reason"] == "CreateContainerError")?;
    let message = waiting(&pod)["message"].as_str().unwrap_or_default().to_owned();
    ensure(message.contains("exclusive-cpus: the CPUs are shared: kubelet's CPU manager"), || {
        format!("the pod's status says {message:?}")
    })?;
    manifest::withdraw(&stage.kubelet.manifests, "greedy")?;
    stage.wait_gone("greedy")?;
    both().map(drop)
}

/// A container that dies is started again, as another one, on the CPUs it had.
pub(super) fn started_again(stage: &mut Stage) -> Result<()> {
    let old = strict()?;
    kill(Pid::from_raw(old.pid.cast_signed()), Signal::SIGKILL)
        .during(|| format!("kill {}", old.pid))?;
    let pod = stage.wait_pod("strict", "started again", |pod| {
        stage::ready(pod) && stage::container(pod, "main").is_ok_and(|main| main.restarts() == 1)
    })?;
    let new = settled(strict)?;
    ensure(new.cpus == old.cpus && new.pid != old.pid, || format!("{old:?} became {new:?}"))?;
    let receipt = stage.receipt(&stage::container(&pod, "main")?.id())?;
    ensure(receipt["verdict"] == "aligned", || format!("pinctl receipt says {receipt}"))
}

/// A core first for a pod that completes, then for the next one, while the first is still
/// listed. The plain pod makes room, since kubelet admits no more than the node has.
pub(super) fn successor(stage: &mut Stage) -> Result<()> {
    let place = |name: &str, command: &[&str]| -> Result<()> {
        let main = manifest::guaranteed(manifest::container("main", command), "2");
        let mut pod = manifest::pod(name, &[main]);
        pod["metadata"]["annotations"]["isolation.pinion.dev/strict"] = json!("true");
        pod["spec"]["restartPolicy"] = json!("Never");
        manifest::place(&stage.kubelet.manifests, &pod)
    };
    manifest::withdraw(&stage.kubelet.manifests, "plain")?;
    stage.wait_gone("plain")?;
    place("first", &["grep", "Cpus_allowed_list", "/proc/self/status"])?;
    stage.wait_pod("first", "complete", |pod| pod["status"]["phase"] == "Succeeded")?;
    // kubelet judges a static pod once: it must have taken back the CPUs of the first by then
    settled(|| {
        let state = evidence::line(Path::new("/var/lib/kubelet/cpu_manager_state"))?;
        ensure(!state.contains("first-0"), || format!("the CPU manager still has {state}"))
    })?;
    place("next", &["pinion-workload", "wait", "next"])?;
    stage.wait_ready("next")?;
    let next = exclusive("pinion-workload wait next")?;
    let log = stage.log_dir("first", "main").join("0.log");
    let log = evidence::line(&log)?;
    ensure(log.ends_with(&format!("Cpus_allowed_list:\t{}", next.cpus)), || {
        format!("the first said {log:?}, the next has {}", next.cpus)
    })?;
    // kubelet clears away what ended once a minute
    for name in ["first", "next"] {
        manifest::withdraw(&stage.kubelet.manifests, name)?;
    }
    for name in ["first", "next"] {
        stage.wait_gone(name)?;
    }
    manifest::place(&stage.kubelet.manifests, &manifest::plain())?;
    stage.wait_ready("plain")?;
    both().map(drop)
}

/// The reserved CPUs are nobody's own.
pub(super) fn reserved(_: &mut Stage) -> Result<()> {
    let reserved: CpuSet =
        RESERVED_CPUS.parse().map_err(|error| Error::check(format!("{RESERVED_CPUS}: {error}")))?;
    let isolated = evidence::isolated_cpus()?;
    let expected = both()?.iter().fold(CpuSet::default(), |all, one| all.union(&one.cpus));
    ensure(isolated == expected.to_string() && expected.is_disjoint(&reserved), || {
        format!("isolated are {isolated}, exclusive {expected}, reserved {reserved}")
    })
}
