//! Our own processes: every thread of them by the kernel's word on where it may run.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use pinion_topology::CpuSet;

use super::{EXCLUSIVE, ask, start_pinned, term};
use crate::cri::{Container, Cri};
use crate::error::{During, Error, Result, ensure};
use crate::image::catalogue;
use crate::pinned;
use crate::site::Site;

const PROFILE: &str = "/etc/pinion/node.toml";
const RESERVED: &str = "0-1";
/// The server looks every five seconds.
const FOLLOWED: Duration = Duration::from_secs(15);

/// The programs that are ours; the client's are not.
fn is_ours(name: &str) -> bool {
    matches!(name, "piniond" | "pinion-monitor" | "pinion" | "memfd:pinion (deleted)")
}

/// CPU lists of all threads of ours, by process and thread.
fn threads() -> Result<BTreeMap<String, CpuSet>> {
    let mut found = BTreeMap::new();
    let listing = fs::read_dir("/proc").during(|| "list /proc".into())?;
    for process in listing.flatten().map(|entry| entry.path()) {
        let program = fs::read_link(process.join("exe")).unwrap_or_default();
        let program = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !is_ours(&program) {
            continue;
        }
        for task in fs::read_dir(process.join("task")).into_iter().flatten().flatten() {
            let Ok(status) = fs::read_to_string(task.path().join("status")) else { continue };
            let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            let Some(list) = list.map(str::trim) else { continue };
            let cpus = list.parse().map_err(|e| Error::check(format!("{list:?}: {e}")))?;
            let name = task.file_name().to_string_lossy().into_owned();
            found.insert(format!("{program} {name}"), cpus);
        }
    }
    Ok(found)
}

/// Waits until every thread of ours has these CPUs and no others; how many there are.
fn all_on(cpus: &str) -> Result<usize> {
    let wanted: CpuSet = cpus.parse().map_err(|e| Error::check(format!("{cpus:?}: {e}")))?;
    let deadline = Instant::now() + FOLLOWED;
    loop {
        let threads = threads()?;
        let astray: Vec<_> = threads.iter().filter(|(_, own)| **own != wanted).collect();
        if astray.is_empty() && threads.keys().any(|name| name.starts_with("pinion-monitor")) {
            return Ok(threads.len());
        }
        ensure(Instant::now() < deadline, || {
            format!("not on CPUs {wanted}: {astray:?} of {} threads", threads.len())
        })?;
        std::thread::sleep(Duration::from_millis(100));
    }
}

pub(super) fn confined(site: &mut Site) -> Result<()> {
    let outcome = without_reserved(site).and_then(|()| with_reserved(site));
    let _ = fs::remove_file(PROFILE);
    site.server.kill()?;
    site.server.restart()?;
    outcome
}

/// Without reserved CPUs: all but the exclusive ones, as these come and go.
fn without_reserved(site: &Site) -> Result<()> {
    let cri = site.connect()?;
    let id = start_pinned(site, &cri, "exclusive", &ask(0, 8)?)?;
    let count = all_on("0-3,6-7")?;
    println!("  {count} threads on CPUs 0-3,6-7 beside the exclusive 4-5");
    let other = start_shared(site, &cri, "bystander")?;
    executed_on(&cri, &other, "0-3,6-7")?;
    executed_on(&cri, &id, &ask(0, 8)?.cpus)?;
    cri.remove_all()?;
    start_shared(site, &cri, "alone")?;
    all_on("0-7")?;
    cri.remove_all()
}

/// With reserved CPUs: these. What runs in containers has all it may have.
fn with_reserved(site: &mut Site) -> Result<()> {
    fs::create_dir_all("/etc/pinion").during(|| "create /etc/pinion".into())?;
    fs::write(PROFILE, format!("reserved_cpus = {RESERVED:?}\n"))
        .during(|| format!("write {PROFILE}"))?;
    start_shared(site, &site.connect()?, "before")?;
    site.server.kill()?;
    site.server.restart()?;
    let cri = site.connect()?;
    let count = all_on(RESERVED)?;
    println!("  {count} threads on the reserved CPUs {RESERVED}, a monitor of before among them");
    let shared = start_shared(site, &cri, "after")?;
    executed_on(&cri, &shared, "0-7")?;
    let id = start_pinned(site, &cri, "pinned", &ask(0, 8)?)?;
    executed_on(&cri, &id, &ask(0, 8)?.cpus)?;
    all_on(RESERVED)?;
    let info = cri.info()?;
    let infra = &info["infrastructure"];
    println!("  infrastructure: {infra}");
    ensure(infra["cpus"] == RESERVED && infra["astray"] == 0, || format!("it says {infra}"))?;
    let positive = |key: &str| infra[key].as_u64().is_some_and(|value| value > 0);
    ensure(positive("cpuNanoseconds") && positive("memoryBytes"), || format!("it says {infra}"))?;
    cri.remove_all()?;
    both_kinds(site, &cri)
}

/// Shared CPUs beside its own, which costs the isolation and is told.
fn both_kinds(site: &Site, cri: &Cri) -> Result<()> {
    let ask = ask(0, 0)?;
    let mut pod = pinned::kubelet_pod(site, "both", "")?;
    pod.annotations = vec![EXCLUSIVE, ("cpu-shared.crio.io/main", "enable")];
    let mut container = Container::new("main", catalogue::WORKLOAD, &["sleep", "300"]);
    container.resources = Some(ask.resources()?);
    let pod_id = cri.run_pod(&pod)?;
    let id = cri.launch(&pod_id, &pod, &container)?;
    let all = format!("{RESERVED},{}", ask.cpus);
    // Kubelet sends the container's own CPUs again and again.
    for round in 0..2 {
        executed_on(cri, &id, &all)?;
        let receipt = cri.receipt(&id)?;
        let term = term(&receipt, "exclusive-cpus")?;
        let told = term["in_force"] == false && receipt["verdict"] == "degraded";
        let basis = term["evidence"]["basis"].as_str().unwrap_or_default();
        ensure(told && basis.contains("does not isolate"), || format!("it says {receipt}"))?;
        if round == 0 {
            println!("  both kinds: {basis}");
            cri.update(&id, ask.resources()?)?;
        }
    }
    let variables = cri.exec(&id, &["env"])?.stdout;
    for variable in [
        format!("OPENSHIFT_ISOLATED_CPUS={}", ask.cpus),
        format!("OPENSHIFT_SHARED_CPUS={RESERVED}"),
    ] {
        ensure(variables.lines().any(|line| line == variable), || {
            format!("no {variable}: {variables}")
        })?;
    }
    all_on(RESERVED)?;
    let other = start_shared(site, cri, "greedy")?;
    let taken = cri.update(&other, ask.resources()?);
    ensure(taken.is_err(), || "another container was given its CPUs".into())?;
    cri.remove_all()
}

/// Runs a command in the container that tells where it may run.
fn executed_on(cri: &Cri, id: &str, cpus: &str) -> Result<()> {
    let text = cri.exec(id, &["pinion-workload", "where"])?.stdout;
    let list = text.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let list = list.unwrap_or_default().trim();
    ensure(list == cpus, || format!("a command may run on {text:?}, not on {cpus}"))
}

fn start_shared(site: &Site, cri: &Cri, name: &str) -> Result<String> {
    let pod = pinned::kubelet_pod(site, name, "burstable")?;
    let container = Container::new("main", catalogue::WORKLOAD, &["sleep", "300"]);
    let pod_id = cri.run_pod(&pod)?;
    cri.launch(&pod_id, &pod, &container)
}
