//! What Pinion is for, shown in two minutes: a pod whose CPUs and hugepages are its own,
//! with the kernel's word for it, and a pod that is refused because they are gone.

use std::path::Path;
use std::process::Command;

use pinion_topology::Topology;

use crate::assets::{self, Assets};
use crate::cri::{Container, Cri, Pod};
use crate::error::{During, Error, Result, ensure};
use crate::evidence;
use crate::image::catalogue;
use crate::leaks;
use crate::pinned::{self, Ask, STRICT};
use crate::server::Kind;
use crate::site::Site;

/// The NUMA node of the pinned pod.
const NODE: u32 = 1;
/// What the pinned pod gets, and what the second one wants.
const PAGES: u64 = 64;
const TOO_MANY: u64 = 100;
const EXCLUSIVE: (&str, &str) = ("cpu.pinion.dev/exclusive", "true");

fn heading(text: &str) {
    println!("\n── {text}");
}

/// Prints a fact that the kernel confirmed, or fails.
fn confirm(what: &str, holds: bool, found: impl std::fmt::Display) -> Result<()> {
    println!("  {} {what}: {found}", if holds { '✓' } else { '✗' });
    ensure(holds, || format!("{what}: {found}"))
}

/// The demo where everything can be given: inside the virtual node.
pub(crate) fn in_node(assets: &Assets) -> Result<()> {
    let topology = evidence::topology()?;
    heading("piniond starts; the image comes from a registry on this node");
    let site = Site::open(assets, Kind::Piniond)?;
    let mut cri = site.connect()?;
    cri.trace = true;
    println!("  {}", cri.version()?);
    cri.pull(catalogue::WORKLOAD)?;

    heading("a noisy pod: one busy process per CPU, on every CPU it is given");
    let noisy = start_noise(&site, &cri, &topology)?;

    heading("a pinned pod: two CPUs of one core of its own, 64 hugepages of 2 MiB, node 1");
    let cpus = pinned::whole_core(&topology, NODE, 0)?;
    let ask = Ask { cpus: cpus.to_string(), mems: NODE.to_string(), hugepages: PAGES };
    let mut pod = pinned::kubelet_pod(&site, "pinned", "")?;
    pod.handler = STRICT.into();
    pod.annotations = vec![EXCLUSIVE];
    let container = pinned::holder("main", &ask)?;
    let pod_id = cri.run_pod(&pod)?;
    let id = cri.launch(&pod_id, &pod, &container)?;
    let log = pinned::wait_for_line(&site, &cri, (&pod, &container, &id), "numa_maps")?;
    println!("  the workload says:");
    log.lines().for_each(|line| println!("    {line}"));

    heading("who owns what");
    pinctl(&site, &["topology"])?;
    heading("the receipts");
    pinctl(&site, &["receipt"])?;

    heading("the kernel's word for it");
    check_evidence(&cri, &id, &ask, noisy)?;

    heading("a second strict pod wants 100 hugepages of node 1, where 64 are left");
    refuse_second(&site, &cri, &topology)?;

    heading("the pods go, and everything comes back");
    cri.trace = false;
    cri.remove_all()?;
    pinned::remove_kubelet_cgroups();
    let isolated = evidence::isolated_cpus()?;
    confirm("isolated CPUs", isolated.is_empty(), format!("{isolated:?}"))?;
    let free = evidence::free_hugepages(NODE)?;
    confirm("free hugepages on node 1", free == total_hugepages(&topology), free)?;
    println!("\nEvery step happened.");
    Ok(())
}

fn total_hugepages(topology: &Topology) -> u64 {
    let pools = topology.node(NODE).map(|node| node.hugepages.as_slice()).unwrap_or_default();
    pools.iter().filter(|pool| pool.size.bytes() == 2 << 20).map(|pool| pool.total).sum()
}

/// Starts the noisy pod; the pid of its first process.
fn start_noise(site: &Site, cri: &Cri, topology: &Topology) -> Result<u32> {
    let pod = pinned::kubelet_pod(site, "noisy", "burstable")?;
    let spin = "pinion-workload spin & ".repeat(topology.cpus.len());
    let script = format!("{spin}echo spinning; wait");
    let mut container = Container::new("main", catalogue::WORKLOAD, &["sh", "-c", &script]);
    container.resources = Some(Ask::default().resources()?);
    let id = cri.run_pod(&pod)?;
    let id = cri.launch(&id, &pod, &container)?;
    pinned::wait_for_line(site, cri, (&pod, &container, &id), "spinning")?;
    leaks::process_with("pinion-workload spin")
        .ok_or_else(|| Error::check("the noisy pod makes no noise"))
}

/// Compares what was promised with what the kernel says, file by file.
fn check_evidence(cri: &Cri, id: &str, ask: &Ask, noisy: u32) -> Result<()> {
    let receipt = cri.receipt(id)?;
    confirm("the receipt's verdict", receipt["verdict"] == "aligned", &receipt["verdict"])?;
    let command = format!("pinion-workload hugepages 2M {PAGES} hold");
    let pid = leaks::process_with(&command)
        .ok_or_else(|| Error::check("the pinned container has no process"))?;
    let cgroup = evidence::cgroup_of(pid)?;
    let partition = evidence::line(&cgroup.join("cpuset.cpus.partition"))?;
    confirm("cpuset.cpus.partition", partition == "isolated", &partition)?;
    let effective = evidence::line(&cgroup.join("cpuset.cpus.effective"))?;
    confirm("cpuset.cpus.effective", effective == ask.cpus, &effective)?;
    let inside = cri.exec(id, &["grep", "Cpus_allowed_list", "/proc/1/status"])?;
    let allowed = inside.stdout.split_whitespace().nth(1).unwrap_or_default();
    confirm("Cpus_allowed_list inside", allowed == ask.cpus, allowed)?;

    let own = evidence::allowed_cpus(pid)?;
    let domains = evidence::scheduling_domains()?;
    let balanced: Vec<u32> =
        own.iter().filter(|cpu| domains.get(cpu).copied().unwrap_or_default() > 0).collect();
    confirm(
        "/proc/schedstat: no scheduling domain on its CPUs",
        balanced.is_empty() && domains.values().any(|count| *count > 0),
        format!("{domains:?}"),
    )?;
    let others = evidence::allowed_cpus(noisy)?;
    confirm("CPUs of the noisy pod", own.is_disjoint(&others), &others)?;

    let mapped = evidence::mapped_hugepages(pid)?;
    let local = mapped.len() == 1 && mapped.get(&NODE) == Some(&PAGES);
    confirm("numa_maps: hugepages by node", local, format!("{mapped:?}"))?;
    let free = evidence::free_hugepages(NODE)?;
    let total = total_hugepages(&evidence::topology()?);
    confirm("free hugepages on node 1", free == total - PAGES, format!("{free} of {total}"))
}

fn refuse_second(site: &Site, cri: &Cri, topology: &Topology) -> Result<()> {
    let cpus = pinned::whole_core(topology, NODE, 1)?;
    let ask = Ask { cpus: cpus.to_string(), mems: NODE.to_string(), hugepages: TOO_MANY };
    let mut pod = pinned::kubelet_pod(site, "late", "")?;
    pod.handler = STRICT.into();
    pod.annotations = vec![EXCLUSIVE];
    let pod_id = cri.run_pod(&pod)?;
    match cri.launch(&pod_id, &pod, &pinned::holder("main", &ask)?) {
        Ok(_) => Err(Error::check("the second pod was started on pages that are not there")),
        Err(Error::Rpc { code: tonic::Code::FailedPrecondition, message, .. }) => {
            println!("\n  refused: {message}\n");
            ensure(message.to_lowercase().contains("hugepages"), || {
                format!("the reason does not name hugepages: {message}")
            })?;
            cri.remove_pod(&pod_id)
        }
        Err(other) => Err(other),
    }
}

/// The demo on a machine as it is: an honest receipt of what it cannot give, and a refusal
/// where that is not good enough.
pub(crate) fn on_host(assets: &Assets) -> Result<()> {
    let topology = evidence::topology()?;
    heading("piniond starts; the image is loaded from an OCI layout");
    let site = Site::open(assets, Kind::Piniond)?;
    let mut cri = site.connect()?;
    cri.trace = true;
    println!("  {}", cri.version()?);
    pinctl(&site, &["image", "load", &assets.layout()?.display().to_string()])?;

    let node = topology.nodes.last().map_or(0, |node| node.id);
    let cpu = topology.online.last().unwrap_or_default().to_string();
    let ask = Ask { cpus: cpu, mems: node.to_string(), hugepages: 0 };
    heading(&format!("a pod that would like CPU {} for itself", ask.cpus));
    let mut pod = pinned::kubelet_pod(&site, "wish", "")?;
    pod.annotations = vec![EXCLUSIVE];
    let container = place_reporter(&ask)?;
    let pod_id = cri.run_pod(&pod)?;
    let id = cri.launch(&pod_id, &pod, &container)?;
    let log = pinned::wait_for_line(&site, &cri, (&pod, &container, &id), "Cpus_allowed_list")?;
    log.lines().for_each(|line| println!("    {line}"));
    heading("its receipt");
    pinctl(&site, &["receipt"])?;
    let receipt = cri.receipt(&id)?;
    let given = receipt["verdict"] == "aligned";
    check_honesty(&receipt)?;
    cri.remove_pod(&pod_id)?;

    heading("the same pod under the strict handler: all of it, or nothing");
    let mut pod: Pod = pinned::kubelet_pod(&site, "demand", "")?;
    pod.annotations = vec![EXCLUSIVE];
    pod.handler = STRICT.into();
    let pod_id = cri.run_pod(&pod)?;
    match cri.launch(&pod_id, &pod, &container) {
        Ok(_) if given => println!("  started: this machine gives all of it"),
        Ok(_) => return Err(Error::check("a strict container started without its guarantees")),
        Err(Error::Rpc { code: tonic::Code::FailedPrecondition, message, .. }) if !given => {
            println!("\n  refused: {message}\n");
        }
        Err(other) => return Err(other),
    }
    cri.trace = false;
    cri.remove_all()?;
    pinned::remove_kubelet_cgroups();
    println!("Every step happened.");
    Ok(())
}

fn place_reporter(ask: &Ask) -> Result<Container> {
    let script = "pinion-workload where; exec pinion-workload wait";
    let mut container = Container::new("main", catalogue::WORKLOAD, &["sh", "-c", script]);
    container.resources = Some(ask.resources()?);
    Ok(container)
}

/// A term that is not in force says why.
fn check_honesty(receipt: &serde_json::Value) -> Result<()> {
    for term in receipt["terms"].as_array().into_iter().flatten() {
        let missing = !term["asked"].is_null() && term["in_force"] == false;
        ensure(!missing || term["reason"].is_string(), || {
            format!("{} is not in force and no reason is given", term["name"])
        })?;
    }
    Ok(())
}

fn pinctl(site: &Site, arguments: &[&str]) -> Result<()> {
    let program = assets::binary("pinctl")?;
    run_shown(&program, &site.server.socket, arguments)
}

fn run_shown(program: &Path, socket: &Path, arguments: &[&str]) -> Result<()> {
    let status = Command::new(program)
        .arg("--socket")
        .arg(socket)
        .args(arguments)
        .status()
        .during(|| format!("run {}", program.display()))?;
    ensure(status.success(), || format!("pinctl {} ended with {status}", arguments.join(" ")))
}
