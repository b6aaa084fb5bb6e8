//! Exclusive CPUs under attack: back within the budget, or the old state and an error.
//!
//! Faults are those a real node knows (an ancestor rewritten, a neighbour that takes the
//! CPUs, the container's own lists rewritten, resizes); the time is from the fault to the
//! kernel's own word that the partition is valid again, seen by this process.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::settings::term;
use super::{ask, check_kernel, holder_pid, start_pinned};
use crate::cri::Cri;
use crate::error::{During, Error, Result, ensure};
use crate::evidence;
use crate::pinned::{self, Ask};
use crate::site::Site;

/// The promise: back within this time, from the fault on.
const PROMISED: Duration = Duration::from_millis(100);
/// What it may take on an emulated machine that others keep busy.
const BUDGET: Duration = Duration::from_millis(2000);
const PAGES: u64 = 8;

/// The cgroup of the container that holds [`PAGES`] pages.
fn group() -> Result<PathBuf> {
    evidence::cgroup_of(holder_pid(PAGES)?)
}

fn write(path: &Path, value: &str) -> Result<()> {
    fs::write(path, value).during(|| format!("write {value:?} to {}", path.display()))
}

/// Whether the partition is valid with these CPUs.
fn in_force(group: &Path, cpus: &str) -> bool {
    let is = |file: &str, wanted: &str| {
        evidence::line(&group.join(file)).is_ok_and(|found| found == wanted)
    };
    is("cpuset.cpus.partition", "isolated") && is("cpuset.cpus.effective", cpus)
}

/// Breaks exclusivity and waits until it is there again.
fn broken(what: &str, group: &Path, cpus: &str, fault: impl FnOnce() -> Result<()>) -> Result<()> {
    let began = Instant::now();
    fault()?;
    let mut seen = false;
    loop {
        let holds = in_force(group, cpus);
        seen |= !holds;
        if holds && (seen || began.elapsed() > Duration::from_millis(500)) {
            break;
        }
        ensure(began.elapsed() < BUDGET, || {
            let partition = evidence::line(&group.join("cpuset.cpus.partition"));
            format!("{what}: {partition:?} after {BUDGET:?}")
        })?;
        std::thread::sleep(Duration::from_millis(1));
    }
    let took = began.elapsed();
    let late = if took > PROMISED { ", more than the 100 ms promised on hardware" } else { "" };
    println!("  {what}: in force again after {} ms{late}", took.as_millis());
    ensure(seen, || format!("{what} did not break anything, so nothing was shown"))
}

/// Waits until an emptied list has the CPUs again.
fn refilled(list: &Path, cpus: &str) -> Result<()> {
    let began = Instant::now();
    while evidence::line(list)? != cpus {
        ensure(began.elapsed() < BUDGET, || format!("{} stays empty", list.display()))?;
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("  {} refilled after {} ms", list.display(), began.elapsed().as_millis());
    Ok(())
}

/// The receipt tells of the loss and of its repair, and is aligned again; the server may still
/// be looking at what it has repaired.
fn told(cri: &Cri, id: &str) -> Result<()> {
    let began = Instant::now();
    loop {
        let receipt = cri.receipt(id)?;
        let lost = term(&receipt, "exclusive-cpus")?["evidence"]["lost"].clone();
        let lost = lost.as_str().unwrap_or_default();
        let repaired = !lost.is_empty() && !lost.contains("repaired 0 times");
        if repaired && receipt["verdict"] == "aligned" {
            println!("  receipt: lost {lost}");
            return Ok(());
        }
        ensure(began.elapsed() < BUDGET, || format!("the receipt says {receipt}"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub(super) fn ancestor(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let ask = ask(0, PAGES)?;
    let id = start_pinned(site, &cri, "below", &ask)?;
    let group = group()?;
    let pod = group.parent().ok_or_else(|| Error::check("no parent"))?.to_owned();
    let top = &pinned::kubelet_group("");
    let list = "cpuset.cpus.exclusive";
    for (what, dir) in [("the pod's list rewritten", pod.as_path()), ("the top's list", top)] {
        broken(what, &group, &ask.cpus, || write(&dir.join(list), "2-3"))?;
    }
    // The kernel keeps the partition, and keeps its CPUs for ever if it were left like this.
    for dir in [pod.as_path(), top] {
        write(&dir.join(list), "\n")?;
        refilled(&dir.join(list), &ask.cpus)?;
    }
    broken("the partition left", &group, &ask.cpus, || {
        write(&group.join("cpuset.cpus.partition"), "member")
    })?;
    check_kernel(&ask)?;
    told(&cri, &id)
}

/// The container's own lists rewritten by somebody else: to other CPUs, to fewer, to none.
pub(super) fn own_lists(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let ask = ask(0, PAGES)?;
    let id = start_pinned(site, &cri, "rewritten", &ask)?;
    let group = group()?;
    let lists = ["cpuset.cpus.exclusive", "cpuset.cpus"];
    for (what, cpus) in [("other CPUs", "2-3"), ("one CPU", "5")] {
        let fault = || lists.iter().try_for_each(|list| write(&group.join(list), cpus));
        broken(&format!("its lists rewritten to {what}"), &group, &ask.cpus, fault)?;
    }
    check_kernel(&ask)?;
    told(&cri, &id)
}

/// A partition that is left while a list above lacks its CPUs would keep them isolated for
/// nobody; the end of a container gives them back all the same, even when the server is not
/// there to repair the list first.
pub(super) fn ends_below_a_rewritten_list(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let ask = ask(0, PAGES)?;
    start_pinned(site, &cri, "ending", &ask)?;
    ensure(evidence::isolated_cpus()? == ask.cpus, || "its CPUs are not isolated".into())?;
    drop(cri);
    site.server.kill()?;
    let pod = group()?.parent().ok_or_else(|| Error::check("no parent"))?.to_owned();
    for dir in [pod, pinned::kubelet_group("")] {
        write(&dir.join("cpuset.cpus.exclusive"), "\n")?;
    }
    site.server.restart()?;
    site.connect()?.remove_all()?;
    let isolated = evidence::isolated_cpus()?;
    ensure(isolated.is_empty(), || format!("CPUs {isolated} are isolated for nobody"))
}

pub(super) fn neighbour(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let ask = ask(0, PAGES)?;
    let id = start_pinned(site, &cri, "beside", &ask)?;
    let group = group()?;
    let beside = group.with_file_name("thief");
    fs::create_dir(&beside).during(|| format!("create {}", beside.display()))?;
    let shown = broken("a neighbour took all CPUs", &group, &ask.cpus, || {
        write(&beside.join("cpuset.cpus"), "0-7")
    });
    let left = evidence::line(&beside.join("cpuset.cpus"));
    fs::remove_dir(&beside).during(|| format!("remove {}", beside.display()))?;
    shown?;
    println!("  the neighbour is left with CPUs {}", left?);
    check_kernel(&ask)?;
    told(&cri, &id)
}

/// What a resize to these CPUs and nodes would send.
fn resize(cri: &Cri, id: &str, to: &Ask) -> Result<()> {
    let mut resources = to.resources()?;
    resources.hugepage_limits.clear();
    cri.update(id, resources)
}

/// Two cores of node 1: all of it.
fn four() -> Result<Ask> {
    Ok(Ask { cpus: "4-7".into(), ..ask(0, PAGES)? })
}

pub(super) fn grows(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let (two, four) = (ask(0, PAGES)?, four()?);
    let id = start_pinned(site, &cri, "growing", &two)?;
    for step in [&four, &two, &four] {
        resize(&cri, &id, step)?;
        check_kernel(step)?;
        let receipt = cri.receipt(&id)?;
        ensure(receipt["verdict"] == "aligned", || format!("the receipt says {receipt}"))?;
    }
    Ok(())
}

pub(super) fn moves(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let here = ask(0, PAGES)?;
    let id = start_pinned(site, &cri, "moving", &here)?;
    let other = Ask { cpus: "2-3".into(), mems: "0".into(), hugepages: PAGES };
    resize(&cri, &id, &other)?;
    let group = group()?;
    ensure(in_force(&group, "2-3"), || "the partition did not move".into())?;
    let mapped = evidence::mapped_hugepages(holder_pid(PAGES)?)?;
    ensure(mapped.get(&0) == Some(&PAGES), || format!("its pages lie on {mapped:?}"))?;
    let receipt = cri.receipt(&id)?;
    ensure(receipt["verdict"] == "aligned", || format!("the receipt says {receipt}"))
}

pub(super) fn cannot(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let here = ask(0, PAGES)?;
    let id = start_pinned(site, &cri, "stubborn", &here)?;
    let cases = [
        ("all CPUs", Ask { cpus: "0-7".into(), mems: "0-1".into(), ..here.clone() }),
        ("half a core", Ask { cpus: "4".into(), ..here.clone() }),
        ("memory elsewhere", Ask { mems: "0".into(), ..here.clone() }),
    ];
    for (what, to) in cases {
        refused(&cri, &id, what, &to)?;
        check_kernel(&here)?;
    }
    // The other node's pool is nearly empty, so its pages could not come along.
    let pool = Path::new("/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages");
    let before = evidence::line(pool)?;
    write(pool, &(PAGES - 1).to_string())?;
    let to = Ask { cpus: "2-3".into(), mems: "0".into(), hugepages: PAGES };
    let outcome = refused(&cri, &id, "no room for its pages", &to);
    write(pool, &before)?;
    outcome?;
    check_kernel(&here)?;
    let receipt = cri.receipt(&id)?;
    ensure(receipt["verdict"] == "aligned", || format!("the receipt says {receipt}"))
}

fn refused(cri: &Cri, id: &str, what: &str, to: &Ask) -> Result<()> {
    match resize(cri, id, to) {
        Err(Error::Rpc { code: tonic::Code::FailedPrecondition, message, .. }) => {
            println!("  {what}: {message}");
            Ok(())
        }
        Err(other) => Err(other),
        Ok(()) => Err(Error::check(format!("{what}: it was resized"))),
    }
}
