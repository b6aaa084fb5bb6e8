//! Each guarantee broken on purpose, one by one: as many refusals, each with its own reason,
//! and not one start.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use pinion_cri_proto::v1::HugepageLimit;

use super::settings::{dump, same_as};
use super::{EXCLUSIVE, ask, refusal, start_pinned, strict_pod};
use crate::cri::{Container, Cri, Pod};
use crate::error::{During, Error, Result, ensure};
use crate::evidence;
use crate::image::catalogue;
use crate::pinned::{self, Ask};
use crate::site::Site;

/// A case: its name, the term and the reason the refusal must carry, and how it comes about.
struct Broken {
    name: &'static str,
    term: &'static str,
    reason: &'static str,
    ask: Ask,
    annotations: &'static [(&'static str, &'static str)],
    /// Files of the node that are changed for the case: path and value.
    files: Vec<(PathBuf, &'static str)>,
}

const NODE0: &str = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages";

fn cases() -> Result<Vec<Broken>> {
    let whole = ask(0, 0)?;
    let broken = |name, term, reason, ask: &Ask| Broken {
        name,
        term,
        reason,
        ask: ask.clone(),
        annotations: &[EXCLUSIVE],
        files: Vec::new(),
    };
    let on = |cpus: &str, mems: &str, hugepages| Ask {
        cpus: cpus.to_owned(),
        mems: mems.to_owned(),
        hugepages,
    };
    let with = |case: Broken, annotations| Broken { annotations, ..case };
    let after = |case: Broken, path: PathBuf, value| Broken { files: vec![(path, value)], ..case };
    Ok(vec![
        broken("half a core", "whole-cores", "not-whole-cores", &on("4", "1", 0)),
        broken("CPUs of another container", "exclusive-cpus", "cpus-held", &on("6-7", "1", 0)),
        broken("every CPU there is", "exclusive-cpus", "no-cpus-left", &on("0-5", "0-1", 0)),
        after(
            broken("a CPU that is offline", "exclusive-cpus", "cpus-offline", &on("2-3", "0", 0)),
            "/sys/devices/system/cpu/cpu3/online".into(),
            "0",
        ),
        broken("no CPU list at all", "exclusive-cpus", "no-cpus", &on("", "1", 0)),
        after(
            broken("a quota far above", "no-throttling", "quota", &whole),
            pinned::kubelet_group("").join("cpu.max"),
            "700000 100000",
        ),
        broken("memory of both nodes", "memory-locality", "memory-not-local", &on("4-5", "0-1", 0)),
        broken("more pages than there are", "hugepages", "pool-exhausted", &on("4-5", "1", 1000)),
        after(
            broken("a pool that was emptied", "hugepages", "pool-exhausted", &on("2-3", "0", 8)),
            NODE0.into(),
            "0",
        ),
        with(
            broken(
                "an interrupt that cannot leave",
                "irq-quiet",
                "irqs-unsteerable",
                &on("0-1", "0", 0),
            ),
            &[EXCLUSIVE, ("irq.pinion.dev/quiet", "all")],
        ),
        with(
            broken("quiet CPUs that are shared", "irq-quiet", "cpus-shared", &whole),
            &[("cpu-load-balancing.crio.io", "enable"), ("irq-load-balancing.crio.io", "disable")],
        ),
        with(
            broken("a governor this machine has not", "power", "no-power-control", &whole),
            &[EXCLUSIVE, ("cpu-freq-governor.crio.io", "performance")],
        ),
        with(
            broken("shared CPUs beside exclusive ones", "exclusive-cpus", "cpus-shared", &whole),
            &[EXCLUSIVE, ("cpu-shared.crio.io/main", "enable")],
        ),
    ])
}

/// Files of the node that say what they said before when this value ends.
struct Changed(Vec<(PathBuf, String)>);

impl Changed {
    fn make(files: &[(PathBuf, &'static str)]) -> Result<Self> {
        let mut changed = Self(Vec::new());
        for (path, value) in files {
            let old = evidence::line(path)?;
            fs::write(path, value).during(|| format!("write {value:?} to {}", path.display()))?;
            changed.0.push((path.clone(), old));
        }
        Ok(changed)
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        for (path, old) in self.0.iter().rev() {
            if let Err(error) = fs::write(path, old) {
                eprintln!("{} is not {old:?} again: {error}", path.display());
            }
        }
    }
}

pub(super) fn all(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    // Somebody whose CPUs are taken, and who must not notice anything.
    let held = ask(1, 8)?;
    start_pinned(site, &cri, "holder", &held)?;
    let before = dump();
    let running = cri.containers()?.len();
    let mut refused = 0;
    for case in cases()? {
        let changed = Changed::make(&case.files)?;
        let message = attempt(site, &cri, &case);
        drop(changed);
        let message = message?;
        println!("  {}: {message}", case.name);
        let says = |word: &str| message.contains(word);
        ensure(says(case.term) && says(case.reason), || {
            format!("{}: neither {} nor {} in: {message}", case.name, case.term, case.reason)
        })?;
        refused += 1;
        ensure(cri.containers()?.len() == running, || format!("{}: something is left", case.name))?;
        same_as(&before)?;
    }
    missing_controller(site, &cri)?;
    refused += 1;
    println!("  {refused} refusals, 0 starts");
    super::check_kernel(&held)
}

fn attempt(site: &Site, cri: &Cri, case: &Broken) -> Result<String> {
    let mut pod = strict_pod(site, "broken")?;
    pod.annotations = case.annotations.to_vec();
    refusal(cri, &pod, &container(&case.ask)?)
}

fn container(ask: &Ask) -> Result<Container> {
    let mut container = Container::new("main", catalogue::WORKLOAD, &["sleep", "300"]);
    let mut resources = ask.resources()?;
    if ask.cpus.is_empty() {
        resources.cpu_shares = 2048;
    }
    resources.hugepage_limits.retain(|limit: &HugepageLimit| limit.limit > 0);
    container.resources = Some(resources);
    Ok(container)
}

/// A pod's group with a process in it cannot hand controllers down.
fn missing_controller(site: &Site, cri: &Cri) -> Result<()> {
    let mut pod = strict_pod(site, "uncontrolled")?;
    let parent = &pinned::kubelet_group("uncontrolled");
    fs::create_dir_all(parent).during(|| format!("create {}", parent.display()))?;
    pod.cgroup_parent = match pinned::is_systemd() {
        true => "kubepods-uncontrolled.slice".into(),
        false => "/kubepods/uncontrolled".into(),
    };
    pod.annotations = vec![EXCLUSIVE];
    let squatter = Squatter::in_group(parent)?;
    let outcome = uncontrolled(cri, &pod);
    drop(squatter);
    let message = outcome?;
    println!("  a controller that is missing: {message}");
    let says = |word: &str| message.contains(word);
    ensure(says("cgroup controller") && says("is not available"), || message.clone())
}

fn uncontrolled(cri: &Cri, pod: &Pod) -> Result<String> {
    let pod_id = cri.run_pod(pod)?;
    let outcome = cri.launch(&pod_id, pod, &container(&ask(0, 0)?)?);
    cri.remove_pod(&pod_id)?;
    match outcome {
        Err(Error::Rpc { message, .. }) => Ok(message),
        Err(other) => Err(other),
        Ok(_) => Err(Error::check("it was started")),
    }
}

/// A process in a group of its own, until this value ends; then the group is removed.
struct Squatter {
    child: Child,
    group: std::path::PathBuf,
}

impl Squatter {
    fn in_group(group: &Path) -> Result<Self> {
        let child = Command::new("sleep")
            .arg("300")
            .stdin(Stdio::null())
            .spawn()
            .during(|| "start sleep".into())?;
        let squatter = Self { child, group: group.to_owned() };
        let procs = group.join("cgroup.procs");
        fs::write(&procs, squatter.child.id().to_string())
            .during(|| format!("join {}", group.display()))?;
        Ok(squatter)
    }
}

impl Drop for Squatter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir(&self.group);
    }
}
