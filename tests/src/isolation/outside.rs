//! What an operator does and sees: pools resized by hand, the node profile, CPUs chosen by
//! the server for `pinctl run`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use super::{CLAIM, NODE, ask, strict_pod, term};
use crate::assets;
use crate::cri::Container;
use crate::error::{During, Error, Result, ensure};
use crate::evidence;
use crate::image::catalogue;
use crate::leaks;
use crate::site::Site;

const PROFILE: &str = "/etc/pinion/node.toml";
/// The server looks every two seconds.
const FOLLOWED: Duration = Duration::from_secs(15);

fn pool(node: u32) -> String {
    format!("/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/nr_hugepages")
}

fn write(path: &str, value: &str) -> Result<()> {
    fs::write(path, value).during(|| format!("write {value:?} to {path}"))
}

/// Waits until something holds; what was found instead is in the error.
fn until(what: &str, mut look: impl FnMut() -> Result<(bool, String)>) -> Result<String> {
    let deadline = Instant::now() + FOLLOWED;
    loop {
        let (holds, found) = look()?;
        if holds {
            return Ok(found);
        }
        ensure(Instant::now() < deadline, || format!("{what}: {found}"))?;
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn pinctl(site: &Site, arguments: &[&str]) -> Result<Output> {
    let program = assets::binary("pinctl")?;
    let mut command = Command::new(&program);
    command.arg("--socket").arg(&site.server.socket).args(arguments);
    command.output().during(|| format!("run {}", program.display()))
}

fn said(output: &Output) -> String {
    let text = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    String::from_utf8_lossy(&text).trim().to_owned()
}

/// A container that has touched none of its pages loses them to whoever shrinks the pool.
pub(super) fn drift(site: &mut Site) -> Result<()> {
    let cri = site.connect()?;
    let mut container = Container::new("main", catalogue::WORKLOAD, &["sleep", "300"]);
    container.resources = Some(ask(0, CLAIM)?.resources()?);
    let pod = strict_pod(site, "granted")?;
    let pod_id = cri.run_pod(&pod)?;
    let id = cri.launch(&pod_id, &pod, &container)?;
    let whole = evidence::line(Path::new(&pool(NODE)))?;
    write(&pool(NODE), "32")?;
    let told = until("the receipt does not tell of the short pool", || {
        let receipt = cri.receipt(&id)?;
        let hugepages = term(&receipt, "hugepages")?;
        let told = hugepages["in_force"] == false && receipt["verdict"] == "violated";
        Ok((told, hugepages["reason"].to_string()))
    });
    let words = cri.info()?["hugepageDrift"].to_string();
    write(&pool(NODE), &whole)?;
    println!("  {}", told?);
    ensure(words.contains("node 1 has 32 pages"), || format!("Status says {words}"))?;
    until("the receipt is not aligned again", || {
        let receipt = cri.receipt(&id)?;
        Ok((receipt["verdict"] == "aligned", receipt.to_string()))
    })?;
    ensure(cri.info()?["hugepageDrift"] == serde_json::json!([]), || "drift stays".into())
}

pub(super) fn profile(site: &mut Site) -> Result<()> {
    fs::create_dir_all("/etc/pinion").during(|| "create /etc/pinion".into())?;
    let pools = "[[hugepages]]\nnode = 0\nsize = \"2MB\"\npages = 128\n";
    let before = evidence::line(Path::new(&pool(0)))?;
    let outcome = compared(site, pools).and_then(|()| repaired(site, pools));
    write(&pool(0), &before)?;
    let _ = fs::remove_file(PROFILE);
    site.server.kill()?;
    site.server.restart()?;
    outcome
}

/// Reported, and left alone.
fn compared(site: &mut Site, pools: &str) -> Result<()> {
    with_profile(site, pools)?;
    let calm = pinctl(site, &["node", "check"])?;
    ensure(calm.status.success(), || format!("before any drift: {}", said(&calm)))?;
    write(&pool(0), "100")?;
    let found = pinctl(site, &["node", "check"])?;
    let text = said(&found);
    println!("  {}", text.replace('\n', "\n  "));
    let named = ["hugepages", "128", "100"].iter().all(|word| text.contains(word));
    ensure(found.status.code() == Some(1) && named, || format!("{}: {text}", found.status))?;
    std::thread::sleep(Duration::from_secs(5));
    let left = evidence::line(Path::new(&pool(0)))?;
    ensure(left == "100", || format!("it was changed to {left} without being asked"))
}

/// Put right, by the kernel's word.
fn repaired(site: &mut Site, pools: &str) -> Result<()> {
    with_profile(site, &format!("repair = [\"hugepages\"]\n{pools}"))?;
    for drifted in ["100", "90"] {
        write(&pool(0), drifted)?;
        until("the pool is not put right", || {
            let pages = evidence::line(Path::new(&pool(0)))?;
            Ok((pages == "128", pages))
        })?;
    }
    let calm = pinctl(site, &["node", "check"])?;
    ensure(calm.status.success(), || format!("after the repair: {}", said(&calm)))
}

fn with_profile(site: &mut Site, text: &str) -> Result<()> {
    write(PROFILE, text)?;
    site.server.kill()?;
    site.server.restart().map(drop)
}

pub(super) fn chosen(site: &mut Site) -> Result<()> {
    let run = |count: &str, seconds: &str| {
        let (cpus, strict) = (["--cpus-exclusive", count, "--numa", "1"], "pinion-strict");
        let words = ["run", "--detach", "--handler", strict];
        let command = [catalogue::WORKLOAD, "sleep", seconds];
        pinctl(site, &[&words[..], &cpus, &command].concat())
    };
    let four = run("4", "3001")?;
    ensure(four.status.success(), || format!("four CPUs: {}", said(&four)))?;
    let pid = leaks::process_with("sleep 3001").ok_or_else(|| Error::check("no process"))?;
    let cpus = evidence::allowed_cpus(pid)?.to_string();
    let isolated = evidence::isolated_cpus()?;
    let nodes = evidence::status_list(pid, "Mems_allowed_list")?;
    println!("  --cpus-exclusive 4 --numa 1: CPUs {cpus}, isolated {isolated}, memory of {nodes}");
    ensure(cpus == "4-7" && isolated == "4-7" && nodes == "1", || "those are not node 1's".into())?;
    let more = run("2", "3002")?;
    let text = said(&more);
    println!("  two more: {text}");
    ensure(!more.status.success() && text.contains("node 1"), || text.clone())?;
    ensure(leaks::process_with("sleep 3002").is_none(), || "it was started".into())
}
