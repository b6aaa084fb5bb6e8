//! Who runs on exclusive CPUs while pods come and go: every switch of the scheduler there,
//! recorded by the kernel (tracefs, `sched_switch`), with nobody's word but its own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use pinion_topology::CpuSet;

use super::{ask, strict_pod};
use crate::cri::{Container, Cri};
use crate::error::{During, Error, Result, ensure};
use crate::evidence;
use crate::image::catalogue;
use crate::pinned;
use crate::site::Site;

const TRACE: &str = "/sys/kernel/tracing";
/// Pods that come and go in the short form; the long one has fifty.
const PODS: usize = 10;
/// How many of them at once.
const AT_ONCE: usize = 5;
const PROBES: usize = 3;

/// The scheduler's switches on some CPUs, recorded until this value ends.
struct Recorder {
    /// Whether tracefs was mounted for it.
    mounted: bool,
}

impl Recorder {
    fn start(cpus: &CpuSet) -> Result<Self> {
        let mounted = !Path::new(TRACE).join("trace").exists();
        if mounted {
            let none: Option<&str> = None;
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(Some("tracefs"), TRACE, Some("tracefs"), flags, none)
                .map_err(std::io::Error::from)
                .during(|| format!("mount tracefs on {TRACE}"))?;
        }
        let recorder = Self { mounted };
        for (file, value) in [
            ("tracing_on", "0"),
            ("buffer_size_kb", "4096"),
            ("trace", ""),
            ("tracing_cpumask", &cpus.mask()),
            ("events/sched/sched_switch/enable", "1"),
            ("tracing_on", "1"),
        ] {
            write(file, value)?;
        }
        Ok(recorder)
    }

    /// Names of tasks that were switched to, and how often.
    fn tasks(&self) -> Result<BTreeMap<String, (u32, u32)>> {
        write("tracing_on", "0")?;
        let path = PathBuf::from(TRACE).join("trace");
        let text = fs::read_to_string(&path).during(|| format!("read {}", path.display()))?;
        ensure(!text.contains("LOST"), || "the trace has holes".into())?;
        Ok(switched_to(&text))
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        for (file, value) in [
            ("tracing_on", "0"),
            ("events/sched/sched_switch/enable", "0"),
            ("tracing_cpumask", "ff"),
            ("trace", ""),
        ] {
            let _ = write(file, value);
        }
        if self.mounted {
            let _ = nix::mount::umount(TRACE);
        }
    }
}

fn write(file: &str, value: &str) -> Result<()> {
    let path = PathBuf::from(TRACE).join(file);
    fs::write(&path, value).during(|| format!("write {value:?} to {}", path.display()))
}

/// `… next_comm=NAME next_pid=PID …`: by name, the last process id and the count.
fn switched_to(trace: &str) -> BTreeMap<String, (u32, u32)> {
    let mut tasks = BTreeMap::new();
    for line in trace.lines().filter(|line| !line.starts_with('#')) {
        let Some((_, next)) = line.split_once("next_comm=") else { continue };
        let Some((name, rest)) = next.split_once(" next_pid=") else { continue };
        let pid = rest.split(' ').next().and_then(|pid| pid.parse().ok()).unwrap_or(0);
        let entry: &mut (u32, u32) = tasks.entry(name.to_owned()).or_default();
        *entry = (pid, entry.1 + 1);
    }
    tasks
}

pub(super) fn churn(site: &mut Site) -> Result<()> {
    disturb(site, PODS)
}

/// Has `pods` come and go, with image pulls, probes and logs, while a strict pod spins.
pub(super) fn disturb(site: &Site, pods: usize) -> Result<()> {
    let cri = site.connect()?;
    let ask = ask(0, 0)?;
    let pod = strict_pod(site, "spinner")?;
    let mut spinner = Container::new("main", catalogue::WORKLOAD, &["pinion-workload", "spin"]);
    spinner.resources = Some(ask.resources()?);
    let pod_id = cri.run_pod(&pod)?;
    let id = cri.launch(&pod_id, &pod, &spinner)?;
    let cpus: CpuSet = ask.cpus.parse().map_err(|e| Error::check(format!("{e}")))?;
    let recorder = Recorder::start(&cpus)?;
    let before = evidence::cpu_times(&cpus)?;
    let counts = evidence::interrupt_counts(&cpus)?;
    std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..AT_ONCE)
            .map(|lane| {
                scope.spawn(move || {
                    let cri = site.connect()?;
                    (lane..pods).step_by(AT_ONCE).try_for_each(|pod| one_pod(site, &cri, pod))
                })
            })
            .collect();
        let done = |lane: std::thread::ScopedJoinHandle<'_, Result<()>>| {
            lane.join().map_err(|_panic| Error::check("a lane of pods panicked"))?
        };
        lanes.into_iter().try_for_each(done)
    })?;
    let tasks = recorder.tasks()?;
    drop(recorder);
    let used = evidence::cpu_times(&cpus)?;
    println!("  {pods} pods came and went, {AT_ONCE} at a time; on CPUs {cpus} ran {tasks:?}");
    interrupted(&cpus, &counts)?;
    let foreign: Vec<&String> = tasks
        .iter()
        .filter(|(name, _)| !is_own(name) && !is_kernel(name))
        .map(|(n, _)| n)
        .collect();
    ensure(foreign.is_empty(), || format!("tasks of others ran on CPUs {cpus}: {foreign:?}"))?;
    ensure(used.values().sum::<u64>() > before.values().sum(), || "nothing ran there".into())?;
    let receipt = cri.receipt(&id)?;
    let throttling = super::settings::term(&receipt, "no-throttling")?;
    ensure(throttling["evidence"]["nr_throttled"] == "0", || format!("throttled: {throttling}"))
}

/// Only interrupts that the kernel does not let go elsewhere may have occurred, and of the
/// others one that was on its way.
fn interrupted(cpus: &CpuSet, before: &BTreeMap<u32, u64>) -> Result<()> {
    let mut residual = BTreeMap::new();
    for (irq, count) in evidence::interrupt_counts(cpus)? {
        let occurred = count - before.get(&irq).copied().unwrap_or(0);
        if occurred > 0 && super::settings::writes_are_refused(irq) {
            residual.insert(irq, occurred);
        } else {
            ensure(occurred <= 1, || format!("interrupt {irq} occurred {occurred} times there"))?;
        }
    }
    println!("  interrupts there that cannot be elsewhere: {residual:?}");
    Ok(())
}

/// A pod with probes and a log, from pull to removal.
fn one_pod(site: &Site, cri: &Cri, number: usize) -> Result<()> {
    cri.pull(catalogue::WORKLOAD)?;
    let pod = pinned::kubelet_pod(site, &format!("churn-{number}"), "burstable")?;
    let container = Container::new(
        "main",
        catalogue::WORKLOAD,
        &["sh", "-c", "pinion-workload count 2000; sleep 300"],
    );
    let pod_id = cri.run_pod(&pod)?;
    let id = cri.launch(&pod_id, &pod, &container)?;
    for _ in 0..PROBES {
        let executed = cri.exec(&id, &["true"])?;
        ensure(executed.code == 0, || format!("the probe ended with {}", executed.code))?;
    }
    cri.remove_pod(&pod_id)
}

/// The container's process, also before it has its name: until `exec` it is the runtime's init.
fn is_own(name: &str) -> bool {
    name.starts_with("pinion-workload")
}

/// Per-CPU threads of the kernel, which live where their CPU is, and its idle loop.
fn is_kernel(name: &str) -> bool {
    const KERNEL: [&str; 8] = [
        "swapper/",
        "ksoftirqd/",
        "migration/",
        "kworker/",
        "cpuhp/",
        "rcu",
        "idle_inject/",
        "irq_work/",
    ];
    KERNEL.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_are_counted_by_the_task_switched_to() {
        let trace = "# tracer: nop\n\
            <idle>-0 [004] d..2. 9.1: sched_switch: prev_comm=swapper/4 prev_pid=0 prev_prio=120 prev_state=R ==> next_comm=a b next_pid=7 next_prio=120\n\
            a-7 [004] d..2. 9.2: sched_switch: prev_comm=a b prev_pid=7 prev_prio=120 prev_state=S ==> next_comm=swapper/4 next_pid=0 next_prio=120\n\
            <idle>-0 [004] d..2. 9.3: sched_switch: prev_comm=swapper/4 prev_pid=0 prev_prio=120 prev_state=R ==> next_comm=a b next_pid=8 next_prio=120\n";
        let tasks = switched_to(trace);
        assert_eq!(tasks["a b"], (8, 2));
        assert_eq!(tasks["swapper/4"], (0, 1));
    }
}
