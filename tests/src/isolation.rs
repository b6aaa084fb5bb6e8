//! The isolation contract against a real kernel: what is promised is in force, what cannot
//! be promised is refused, and no neighbour can break it.
//!
//! | case | on a plain runtime |
//! |---|---|
//! | a second claimant of a node's pages | both start, one dies with SIGBUS at first touch |
//! | more pages mapped than granted | SIGBUS where only `.max` is set |
//! | a neighbour that takes pages first | its pages come from the pinned one's node |
//! | a restart of the server | grants are forgotten |

mod healing;
mod infra;
mod outside;
mod refusals;
mod settings;
mod undisturbed;

use std::fs;
use std::time::Duration;

use crate::assets::Assets;
use crate::cri::{Container, Cri, Pod};
use crate::error::{During, Error, Result, ensure};
use crate::evidence;
use crate::image::catalogue;
use crate::leaks::{self, Snapshot};
use crate::pinned::{self, Ask, STRICT};
use crate::server::Kind;
use crate::site::Site;

const NODE: u32 = 1;
/// More than half of the node's pool: two such claims cannot both be kept.
const CLAIM: u64 = 96;
const EXCLUSIVE: (&str, &str) = ("cpu.pinion.dev/exclusive", "true");
const CLEANUP: Duration = Duration::from_secs(20);

type Case = (&'static str, fn(&mut Site) -> Result<()>);

const CASES: &[Case] = &[
    ("a strict container has its CPUs, memory and hugepages, by the kernel's word", aligned),
    ("the second claimant of a node's hugepages is refused at create", second_claimant),
    ("a neighbour that maps first cannot make the pinned container SIGBUS", early_neighbour),
    ("mapping more hugepages than granted is a clean refusal", over_limit),
    ("exclusive CPUs that another container owns are refused", taken_cpus),
    ("a strict container with half a core is refused", half_core),
    ("grants and partitions survive the death of the server", survives_restart),
    ("kubelet's state file says whose CPUs are exclusive", recorded),
    ("interrupts leave exclusive CPUs, new ones too, and come back", settings::interrupts),
    ("settings of a container that ends by itself are given back", settings::ends_by_itself),
    ("a wake-up latency limit holds while the container does", settings::latency),
    ("the server's death at any moment leaves no setting behind", settings::killed_on_the_way),
    ("a rewritten ancestor does not end exclusivity", healing::ancestor),
    ("the container's own lists rewritten do not end exclusivity", healing::own_lists),
    (
        "a list above rewritten keeps no CPUs isolated for nobody",
        healing::ends_below_a_rewritten_list,
    ),
    ("a neighbour that takes the CPUs does not end exclusivity", healing::neighbour),
    ("a resize from two CPUs to four has four, all exclusive", healing::grows),
    ("a move to other CPUs and memory arrives whole", healing::moves),
    ("a resize that cannot be leaves the old state and an error", healing::cannot),
    ("each guarantee broken on purpose is refused by its name", refusals::all),
    ("a pool that shrinks under its grants is told, and told to be well again", outside::drift),
    ("the node profile is compared, and what it may repair is put right", outside::profile),
    ("pinctl chooses exclusive CPUs of one node, and refuses what is not there", outside::chosen),
    ("every thread of ours stays on the CPUs for infrastructure", infra::confined),
    ("no task of others runs on exclusive CPUs while pods come and go", undisturbed::churn),
];

/// Only the last case, in its long form: fifty pods that come and go.
pub(crate) fn churn(assets: &Assets, pods: usize) -> Result<()> {
    let site = Site::open(assets, Kind::Piniond)?;
    site.warm_up(&site.connect()?)?;
    let before = Snapshot::take();
    undisturbed::disturb(&site, pods)?;
    clean(&site, &before)
}

/// Runs every case, or those whose name contains `only`, on a machine that can give all of it; elsewhere that is an error.
pub(crate) fn run(assets: &Assets, only: Option<&str>) -> Result<()> {
    let topology = evidence::topology()?;
    ensure(topology.nodes.len() > 1, || "not possible here: one NUMA node only".into())?;
    let mut site = Site::open(assets, Kind::Piniond)?;
    {
        let cri = site.connect()?;
        site.warm_up(&cri)?;
    }
    let before = Snapshot::take();
    let mut failed = 0;
    let chosen: Vec<&Case> =
        CASES.iter().filter(|(name, _)| only.is_none_or(|only| name.contains(only))).collect();
    ensure(!chosen.is_empty(), || format!("no case is called like {only:?}"))?;
    for (name, case) in &chosen {
        let outcome = case(&mut site).and_then(|()| clean(&site, &before));
        match outcome {
            Ok(()) => println!("ok      {name}"),
            Err(error) => {
                println!("FAILED  {name}: {}", error.chain());
                failed += 1;
                // the next case gets a tidy machine or says itself that it did not
                let _ = clean(&site, &before);
            }
        }
    }
    println!("{} passed, {failed} failed", chosen.len() - failed);
    ensure(failed == 0, || format!("{failed} isolation cases failed"))
}

fn clean(site: &Site, before: &Snapshot) -> Result<()> {
    site.connect()?.remove_all()?;
    pinned::remove_kubelet_cgroups();
    leaks::nothing_since(before, CLEANUP)?;
    let isolated = evidence::isolated_cpus()?;
    ensure(isolated.is_empty(), || format!("CPUs {isolated} are still isolated"))
}

/// A core of node 1, and what kubelet would send for it.
fn ask(core: usize, hugepages: u64) -> Result<Ask> {
    let cpus = pinned::whole_core(&evidence::topology()?, NODE, core)?;
    Ok(Ask { cpus: cpus.to_string(), mems: NODE.to_string(), hugepages })
}

fn strict_pod(site: &Site, name: &str) -> Result<Pod> {
    let mut pod = pinned::kubelet_pod(site, name, "")?;
    pod.handler = STRICT.into();
    pod.annotations = vec![EXCLUSIVE];
    Ok(pod)
}

/// Starts a strict container that holds its pages; its id.
fn start_pinned(site: &Site, cri: &Cri, name: &str, ask: &Ask) -> Result<String> {
    let pod = strict_pod(site, name)?;
    let container = pinned::holder("main", ask)?;
    let pod_id = cri.run_pod(&pod)?;
    let id = cri.launch(&pod_id, &pod, &container)?;
    pinned::wait_for_line(site, cri, (&pod, &container, &id), "numa_maps")?;
    Ok(id)
}

/// The refusal of a container; a start is a failure.
pub(crate) fn refusal(cri: &Cri, pod: &Pod, container: &Container) -> Result<String> {
    let pod_id = cri.run_pod(pod)?;
    let outcome = cri.launch(&pod_id, pod, container);
    cri.remove_pod(&pod_id)?;
    match outcome {
        Err(Error::Rpc { code: tonic::Code::FailedPrecondition, message, .. }) => Ok(message),
        Err(other) => Err(other),
        Ok(_) => Err(Error::check("it was started")),
    }
}

/// Whether a refusal has this word.
pub(crate) fn names(text: &str, word: &str) -> Result<()> {
    ensure(text.contains(word), || format!("the refusal does not say {word:?}: {text}"))
}

/// A receipt's term.
pub(crate) fn term<'a>(
    receipt: &'a serde_json::Value,
    name: &str,
) -> Result<&'a serde_json::Value> {
    let terms = receipt["terms"].as_array().into_iter().flatten();
    terms
        .into_iter()
        .find(|term| term["name"] == name)
        .ok_or_else(|| Error::check(format!("no term {name} in {receipt:#}")))
}

/// The process that holds this many pages.
fn holder_pid(pages: u64) -> Result<u32> {
    leaks::process_with(&format!("pinion-workload hugepages 2M {pages} hold"))
        .ok_or_else(|| Error::check("the container has no process"))
}

fn aligned(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let ask = ask(0, CLAIM)?;
    let free = evidence::free_hugepages(NODE)?;
    let id = start_pinned(site, &cri, "aligned", &ask)?;
    let receipt = cri.receipt(&id)?;
    ensure(receipt["verdict"] == "aligned", || format!("the receipt says {receipt}"))?;
    check_kernel(&ask)?;
    let left = evidence::free_hugepages(NODE)?;
    ensure(left == free - CLAIM, || format!("{left} pages are free, were {free}"))
}

/// CPUs, memory and pages of the holder by the kernel's files.
fn check_kernel(ask: &Ask) -> Result<()> {
    let pid = holder_pid(ask.hugepages)?;
    let cgroup = evidence::cgroup_of(pid)?;
    for (file, wanted) in [
        ("cpuset.cpus.partition", "isolated"),
        ("cpuset.cpus.effective", ask.cpus.as_str()),
        ("cpuset.mems.effective", ask.mems.as_str()),
    ] {
        let found = evidence::line(&cgroup.join(file))?;
        ensure(found == wanted, || format!("{file} is {found:?}, not {wanted:?}"))?;
    }
    for file in ["hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"] {
        let found = evidence::line(&cgroup.join(file))?;
        let wanted = (ask.hugepages << 21).to_string();
        ensure(found == wanted, || format!("{file} is {found}, not {wanted}"))?;
    }
    let own = evidence::allowed_cpus(pid)?;
    ensure(own.to_string() == ask.cpus, || format!("its process may run on {own}"))?;
    let domains = evidence::scheduling_domains()?;
    let balanced = own.iter().any(|cpu| domains.get(&cpu).is_none_or(|count| *count > 0));
    ensure(!balanced, || format!("its CPUs are load-balanced: {domains:?}"))?;
    let mapped = evidence::mapped_hugepages(pid)?;
    ensure(mapped.get(&NODE) == Some(&ask.hugepages) && mapped.len() == 1, || {
        format!("its pages lie on {mapped:?}")
    })
}

fn second_claimant(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    start_pinned(site, &cri, "first", &ask(0, CLAIM)?)?;
    let second =
        refusal(&cri, &strict_pod(site, "second")?, &pinned::holder("main", &ask(1, CLAIM)?)?)?;
    names(&second.to_lowercase(), "hugepages")?;
    // not strict, not exclusive: it would meet SIGBUS all the same, so it is refused too
    let pod = pinned::kubelet_pod(site, "third", "burstable")?;
    let claim = Ask { mems: NODE.to_string(), hugepages: CLAIM, ..Ask::default() };
    refusal(&cri, &pod, &pinned::holder("main", &claim)?)?;
    check_kernel(&ask(0, CLAIM)?)
}

/// The pinned container maps and waits; an unpinned neighbour on the same node's CPUs maps
/// and touches all it may; then the pinned one touches.
fn early_neighbour(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let gate = site.scratch.path("isolation-gate");
    let _ = fs::remove_dir_all(&gate);
    fs::create_dir_all(&gate).during(|| format!("create {}", gate.display()))?;
    let wanted = ask(0, CLAIM)?;
    let pod = strict_pod(site, "patient")?;
    let pages = CLAIM.to_string();
    let command = ["pinion-workload", "hugepages", "2M", &pages, "map-then", "/gate/open", "hold"];
    let mut container = Container::new("main", catalogue::WORKLOAD, &command);
    container.resources = Some(wanted.resources()?);
    container.mounts.push((gate.clone(), "/gate".into()));
    let pod_id = cri.run_pod(&pod)?;
    let id = cri.launch(&pod_id, &pod, &container)?;
    pinned::wait_for_line(site, &cri, (&pod, &container, &id), "mapped")?;

    let hungry = pinned::kubelet_pod(site, "hungry", "burstable")?;
    let claim = Ask { cpus: ask(1, 0)?.cpus, mems: String::new(), hugepages: CLAIM };
    let eater = pinned::holder("main", &claim)?;
    let hungry_id = cri.run_pod(&hungry)?;
    match cri.launch(&hungry_id, &hungry, &eater) {
        // granted: it must then get every page without touching the pinned one's
        Ok(eater_id) => {
            pinned::wait_for_line(site, &cri, (&hungry, &eater, &eater_id), "touched")?;
        }
        Err(Error::Rpc { code: tonic::Code::FailedPrecondition, .. }) => {}
        Err(other) => return Err(other),
    }
    fs::write(gate.join("open"), "").during(|| "open the gate".into())?;
    let log = pinned::wait_for_line(site, &cri, (&pod, &container, &id), "numa_maps")?;
    ensure(log.contains(&format!("N{NODE}={CLAIM}")), || format!("the pinned one says {log}"))
}

fn over_limit(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let pod = pinned::kubelet_pod(site, "greedy", "burstable")?;
    let one = Ask { mems: NODE.to_string(), hugepages: 1, ..Ask::default() };
    let command = ["pinion-workload", "hugepages", "2M", "3"];
    let mut container = Container::new("main", catalogue::WORKLOAD, &command);
    container.resources = Some(one.resources()?);
    let pod_id = cri.run_pod(&pod)?;
    let id = cri.launch(&pod_id, &pod, &container)?;
    let status = cri.wait_exited(&id, Duration::from_secs(30))?;
    let log = site.log(&pod, &container);
    ensure(status.exit_code == 1 && log.contains("mmap:"), || {
        format!("it ended with {} and said {log:?}", status.exit_code)
    })
}

fn taken_cpus(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    start_pinned(site, &cri, "owner", &ask(0, 8)?)?;
    let text = refusal(&cri, &strict_pod(site, "thief")?, &pinned::holder("main", &ask(0, 8)?)?)?;
    names(&text.to_lowercase(), "cpu")?;
    check_kernel(&ask(0, 8)?)
}

fn half_core(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let mut half = ask(0, 0)?;
    half.cpus = half.cpus.split(['-', ',']).next().unwrap_or_default().to_owned();
    let pod = strict_pod(site, "half")?;
    let mut container = Container::new("main", catalogue::WORKLOAD, &["sleep", "60"]);
    container.resources = Some(half.resources()?);
    let text = refusal(&cri, &pod, &container)?;
    names(&text.to_lowercase(), "core")
}

const KUBELET_STATE: &str = "/var/lib/kubelet/cpu_manager_state";

/// Shares that no guess would take for exclusive CPUs, and no annotation: only the file says
/// it. A file that cannot be read is passed over.
fn recorded(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let dir = std::path::Path::new(KUBELET_STATE).parent().map(std::path::Path::to_owned);
    dir.map_or(Ok(()), fs::create_dir_all).during(|| "create kubelet's directory".into())?;
    let wanted = ask(0, 8)?;
    let state = format!(
        r#"{{"policyName":"static","entries":{{"uid-recorded":{{"main":"{}"}}}}}}"#,
        wanted.cpus
    );
    let run = |name: &str, text: &str| {
        fs::write(KUBELET_STATE, text).during(|| format!("write {KUBELET_STATE}"))?;
        let pod = pinned::kubelet_pod(site, name, "")?;
        let mut container = pinned::holder("main", &wanted)?;
        container.resources.get_or_insert_default().cpu_shares = 1500;
        let pod_id = cri.run_pod(&pod)?;
        let id = cri.launch(&pod_id, &pod, &container)?;
        pinned::wait_for_line(site, &cri, (&pod, &container, &id), "numa_maps")?;
        let receipt = cri.receipt(&id)?;
        let term = settings::term(&receipt, "exclusive-cpus")?.clone();
        Ok((pod_id, term))
    };
    let outcome = run("recorded", &state).and_then(|(pod_id, term)| {
        let basis = term["evidence"]["basis"].as_str().unwrap_or_default().to_owned();
        ensure(basis.contains("cpu_manager_state"), || format!("the basis is {term}"))?;
        check_kernel(&wanted)?;
        cri.remove_pod(&pod_id)?;
        let (_, term) = run("unrecorded", "{")?;
        ensure(term["asked"].is_null(), || format!("a broken file made it exclusive: {term}"))
    });
    let _ = fs::remove_file(KUBELET_STATE);
    outcome
}

fn survives_restart(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let wanted = ask(0, CLAIM)?;
    let id = start_pinned(site, &cri, "durable", &wanted)?;
    drop(cri);
    site.server.kill()?;
    site.server.restart()?;
    let cri = site.connect()?;
    check_kernel(&wanted)?;
    let receipt = cri.receipt(&id)?;
    ensure(receipt["verdict"] == "aligned", || format!("the receipt says {receipt}"))?;
    let late =
        refusal(&cri, &strict_pod(site, "late")?, &pinned::holder("main", &ask(1, CLAIM)?)?)?;
    names(&late.to_lowercase(), "hugepages")
}
