//! Settings of the whole node, by their own files: changed while a container needs them, and
//! the same as before afterwards, however it came to an end.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pinion_topology::CpuSet;

use super::{EXCLUSIVE, ask, start_pinned, strict_pod};
use crate::cri::{Container, Cri};
use crate::error::{During, Error, Result, ensure};
use crate::evidence;
use crate::image::catalogue;
use crate::pinned;
use crate::site::Site;

/// The server looks once a second.
const FOLLOWED: Duration = Duration::from_secs(8);
const RNG_DRIVER: &str = "/sys/bus/virtio/drivers/virtio_rng";

type Dump = BTreeMap<PathBuf, String>;

/// Every node-wide setting that a container can change.
pub(super) fn dump() -> Dump {
    let mut dump = Dump::new();
    let mut keep = |path: PathBuf| {
        if let Ok(text) = fs::read_to_string(&path) {
            dump.insert(path, text.trim().to_owned());
        }
    };
    for irq in evidence::interrupts() {
        keep(format!("/proc/irq/{irq}/smp_affinity_list").into());
    }
    keep("/proc/irq/default_smp_affinity".into());
    for cpu in 0..64 {
        let dir = PathBuf::from(format!("/sys/devices/system/cpu/cpu{cpu}"));
        keep(dir.join("power/pm_qos_resume_latency_us"));
        keep(dir.join("cpufreq/scaling_governor"));
    }
    for file in ["cpuset.cpus.isolated", "cpuset.cpus.effective"] {
        keep(Path::new("/sys/fs/cgroup").join(file));
    }
    dump
}

/// Waits until everything is as it was.
pub(super) fn same_as(before: &Dump) -> Result<()> {
    let deadline = Instant::now() + FOLLOWED;
    loop {
        let now = dump();
        let differs: Vec<String> = before
            .iter()
            .filter(|(path, text)| now.get(*path) != Some(text))
            .map(|(path, text)| format!("{} was {text:?}, is {:?}", path.display(), now.get(path)))
            .collect();
        if differs.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Error::check(format!("not given back: {}", differs.join("; "))));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn cpus(list: &str) -> Result<CpuSet> {
    list.parse().map_err(|error| Error::check(format!("{list:?}: {error}")))
}

/// Interrupts that may be served on the CPUs.
fn allowed_on(cpus: &CpuSet) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for irq in evidence::interrupts() {
        let path = format!("/proc/irq/{irq}/smp_affinity_list");
        // An interrupt can go away meanwhile.
        let Ok(list) = fs::read_to_string(&path) else { continue };
        if !self::cpus(&list)?.is_disjoint(cpus) {
            found.push(irq);
        }
    }
    Ok(found)
}

pub(super) fn interrupts(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let before = dump();
    let ask = ask(0, 8)?;
    let own = cpus(&ask.cpus)?;
    let steerable = allowed_on(&own)?;
    ensure(steerable.len() > 2, || format!("before, only {steerable:?} may be served there"))?;
    let id = start_pinned(site, &cri, "quiet", &ask)?;
    let receipt = cri.receipt(&id)?;
    let term = term(&receipt, "irq-quiet")?;
    ensure(term["in_force"] == true && !term["asked"].is_null(), || format!("it says {term}"))?;
    let left = allowed_on(&own)?;
    let refuses = |irq: &u32| writes_are_refused(*irq);
    let movable: Vec<&u32> = left.iter().filter(|irq| !refuses(irq)).collect();
    ensure(movable.is_empty(), || format!("interrupts {movable:?} could go elsewhere: {term}"))?;
    println!(
        "  {} of {} interrupts moved, {left:?} refuse",
        steerable.len() - left.len(),
        steerable.len()
    );
    let default = evidence::line(Path::new("/proc/irq/default_smp_affinity"))?;
    let mask = CpuSet::from_mask(&default).map_err(|e| Error::check(e.to_string()))?;
    ensure(mask.is_disjoint(&own), || format!("the default mask is {default}"))?;
    served_elsewhere(&own)?;
    new_interrupt(&own)?;
    cri.remove_all()?;
    same_as(&before)
}

/// Device interrupts that occur on the CPUs while their owner runs, but for one each that was
/// on its way when it was sent elsewhere.
fn served_elsewhere(own: &CpuSet) -> Result<()> {
    let first = evidence::interrupt_counts(own)?;
    std::thread::sleep(Duration::from_secs(3));
    let second = evidence::interrupt_counts(own)?;
    for (irq, count) in &second {
        let occurred = count - first.get(irq).copied().unwrap_or(0);
        ensure(occurred <= 1, || {
            format!("interrupt {irq} occurred {occurred} times on CPUs {own}")
        })?;
    }
    Ok(())
}

/// A device that comes back gets new interrupts, and these keep away too.
fn new_interrupt(own: &CpuSet) -> Result<()> {
    crate::command::run(Command::new("modprobe").arg("virtio-rng"))?;
    let devices = fs::read_dir(RNG_DRIVER).during(|| format!("list {RNG_DRIVER}"))?;
    let names = devices.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let device = names.into_iter().find(|name| name.starts_with("virtio"));
    let device =
        device.ok_or_else(|| Error::check("no virtio device to take away and give back"))?;
    let known = evidence::interrupts();
    let write = |file: &str| {
        let path = format!("{RNG_DRIVER}/{file}");
        fs::write(&path, &device).during(|| format!("write {device} to {path}"))
    };
    write("unbind")?;
    let without = evidence::interrupts();
    write("bind")?;
    let born: Vec<u32> =
        evidence::interrupts().into_iter().filter(|irq| !without.contains(irq)).collect();
    ensure(!born.is_empty(), || format!("rebinding {device} made no interrupt: {known:?}"))?;
    let deadline = Instant::now() + FOLLOWED;
    loop {
        let on = allowed_on(own)?;
        if born.iter().all(|irq| !on.contains(irq)) {
            println!("  new interrupts {born:?} keep away");
            return Ok(());
        }
        ensure(Instant::now() < deadline, || format!("new interrupts {born:?} may be on {own}"))?;
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Whether the kernel refuses to take the value an interrupt has already.
pub(super) fn writes_are_refused(irq: u32) -> bool {
    let path = format!("/proc/irq/{irq}/smp_affinity_list");
    fs::read_to_string(&path).is_ok_and(|list| fs::write(&path, list.trim()).is_err())
}

/// A term of a receipt.
pub(super) fn term<'a>(
    receipt: &'a serde_json::Value,
    name: &str,
) -> Result<&'a serde_json::Value> {
    let terms = receipt["terms"].as_array().into_iter().flatten();
    let mut found = terms.filter(|term| term["name"] == name);
    found.next().ok_or_else(|| Error::check(format!("no term {name} in {receipt}")))
}

/// A strict container that ends by itself after some seconds.
fn start_mortal(site: &Site, cri: &Cri, name: &str, seconds: u32) -> Result<()> {
    let pod = strict_pod(site, name)?;
    let seconds = seconds.to_string();
    let mut container = Container::new("main", catalogue::WORKLOAD, &["sleep", &seconds]);
    container.resources = Some(ask(0, 0)?.resources()?);
    let pod_id = cri.run_pod(&pod)?;
    cri.launch(&pod_id, &pod, &container)?;
    Ok(())
}

pub(super) fn ends_by_itself(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let before = irqs_only(dump());
    start_mortal(site, &cri, "mortal", 2)?;
    ensure(irqs_only(dump()) != before, || "no interrupt was moved".into())?;
    std::thread::sleep(Duration::from_secs(2));
    same_as(&before)?;
    cri.remove_all()?;
    // The same while nobody is there to see it.
    start_mortal(site, &cri, "lonely", 4)?;
    drop(cri);
    site.server.kill()?;
    ensure(irqs_only(dump()) != before, || "the container ended too early".into())?;
    std::thread::sleep(Duration::from_secs(5));
    site.server.restart()?;
    same_as(&before)
}

/// Without the cgroup files: those are given back when the container is removed.
fn irqs_only(dump: Dump) -> Dump {
    dump.into_iter().filter(|(path, _)| !path.starts_with("/sys/fs/cgroup")).collect()
}

pub(super) fn latency(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let before = dump();
    let mut pod = strict_pod(site, "awake")?;
    pod.annotations = vec![EXCLUSIVE, ("cpu-c-states.crio.io", "disable")];
    let ask = ask(0, 8)?;
    let container = pinned::holder("main", &ask)?;
    let pod_id = cri.run_pod(&pod)?;
    let id = cri.launch(&pod_id, &pod, &container)?;
    for cpu in 0..8 {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/power/pm_qos_resume_latency_us");
        let found = evidence::line(Path::new(&path))?;
        let wanted = if cpus(&ask.cpus)?.contains(cpu) { "n/a" } else { "0" };
        ensure(found == wanted, || format!("{path} is {found}, not {wanted}"))?;
    }
    let receipt = cri.receipt(&id)?;
    let power = term(&receipt, "power")?;
    ensure(power["in_force"] == true, || format!("it says {power}"))?;
    cri.remove_all()?;
    same_as(&before)
}

/// When the server is killed.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// So long after the call.
    AfterCall(u64),
    /// So long after the first setting was seen to change.
    AfterChange(u64),
}

/// SIGKILL to the server on its way into a creation and out of it.
pub(super) fn killed_on_the_way(site: &mut Site) -> Result<()> {
    use Moment::{AfterCall, AfterChange};
    let before = dump();
    let moments = [AfterCall(50), AfterChange(0), AfterChange(5), AfterChange(200)];
    let mut caught = 0;
    for removal in [false, true] {
        for (round, moment) in moments.into_iter().enumerate() {
            let name = format!("victim-{removal}-{round}");
            caught += u32::from(kill_at(site, &name, removal, moment, &before)?);
            site.server.restart()?;
            site.connect()?.remove_all()?;
            same_as(&before)?;
        }
    }
    println!("  {caught} of {} deaths came while settings were changed", 2 * moments.len());
    ensure(caught >= 3, || "too few deaths came while a setting was changed".into())
}

/// Kills the server in a creation or a removal; whether settings were changed at that moment.
fn kill_at(
    site: &mut Site,
    name: &str,
    removal: bool,
    moment: Moment,
    before: &Dump,
) -> Result<bool> {
    let pod = strict_pod(site, name)?;
    let mut container = Container::new("main", catalogue::WORKLOAD, &["sleep", "300"]);
    container.resources = Some(ask(0, 0)?.resources()?);
    if removal {
        start_mortal(site, &site.connect()?, name, 300)?;
    }
    let start = irqs_only(dump());
    let socket = site.server.socket.clone();
    let worker = std::thread::spawn(move || {
        // It is meant to fail: the server dies under it.
        let _ = Cri::connect(&socket).and_then(|cri| match removal {
            true => cri.remove_all(),
            false => cri.run_pod(&pod).and_then(|id| cri.launch(&id, &pod, &container).map(drop)),
        });
    });
    let wait = match moment {
        Moment::AfterCall(millis) => millis,
        Moment::AfterChange(millis) => {
            let deadline = Instant::now() + FOLLOWED;
            while irqs_only(dump()) == start && Instant::now() < deadline {
                std::thread::yield_now();
            }
            millis
        }
    };
    std::thread::sleep(Duration::from_millis(wait));
    site.server.kill()?;
    let _ = worker.join();
    Ok(irqs_only(dump()) != irqs_only(before.clone()))
}
