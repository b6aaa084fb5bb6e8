//! A pod's life under kubelet: probes, restarts, volumes, logs, statistics, resize, change.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::agent::{LOG_FILES, LOG_SIZE};
use super::manifest::{self, LINES};
use super::placement;
use super::stage::{self, PATIENCE, Stage};
use crate::error::{During, Error, Result, ensure};
use crate::{evidence, leaks, pinned};

/// kubelet asks the server for its cgroup driver and believes it.
pub(super) fn cgroup_driver(stage: &mut Stage) -> Result<()> {
    for class in ["", "burstable", "besteffort"] {
        let dir = pinned::kubelet_group(class);
        ensure(dir.is_dir(), || format!("kubelet did not make {}", dir.display()))?;
    }
    let log = stage.kubelet.log();
    ensure(log.contains("Using cgroup driver setting received from the CRI runtime"), || {
        "kubelet's log does not say that it asked the server".into()
    })
}

/// The pods that share CPUs come up, init container and sidecar before the main one.
pub(super) fn shared_pods(stage: &mut Stage) -> Result<()> {
    for pod in [manifest::web(), manifest::flaky(), manifest::chatty()] {
        manifest::place(&stage.kubelet.manifests, &pod)?;
    }
    // ready: the HTTP probe said so, after the TCP one and the sidecar's exec did
    let pod = stage.wait_ready("web")?;
    let first = stage::container(&pod, "first")?;
    ensure(first.text()["state"]["terminated"]["exitCode"] == 0, || {
        format!("the init container: {}", first.text())
    })?;
    for name in ["sidecar", "main"] {
        let status = stage::container(&pod, name)?;
        ensure(status.restarts() == 0 && status.text()["started"] == true, || {
            format!("{name}: {}", status.text())
        })?;
    }
    ensure(pod["status"]["qosClass"] == "Burstable", || format!("it is {}", pod["status"]))
}

/// What ends is started again with its volume kept; what fails its liveness probe is ended
/// first.
pub(super) fn restarts(stage: &mut Stage) -> Result<()> {
    let pod = stage.wait_pod("flaky", "restarted twice", |pod| {
        ["exits", "sick"]
            .iter()
            .all(|name| stage::container(pod, name).is_ok_and(|status| status.restarts() >= 1))
    })?;
    let exits = stage::container(&pod, "exits")?;
    ensure(exits.last_exit() == Some(7), || format!("exits: {}", exits.text()))?;
    let sick = stage::container(&pod, "sick")?;
    ensure(sick.last_exit() == Some(137) || sick.last_exit() == Some(143), || {
        format!("sick: {}", sick.text())
    })
}

/// kubelet rotates what grew too large, and not a line is lost or torn.
pub(super) fn log_rotation(stage: &mut Stage) -> Result<()> {
    let dir = stage.log_dir("chatty", "main");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let files = log_files(&dir)?;
        let lines = files.iter().try_fold(BTreeSet::new(), |mut all, path| -> Result<_> {
            all.extend(numbers(path)?);
            Ok(all)
        })?;
        let complete = lines.len() == LINES as usize;
        // the newest file and one that is not compressed yet
        if complete && files.len() > 2 && files.iter().any(|path| is_gzip(path)) {
            return ensure(files.len() <= LOG_FILES as usize, || format!("{files:?}"));
        }
        if Instant::now() > deadline {
            let missing = (0..LINES).find(|number| !lines.contains(number));
            return Err(Error::check(format!(
                "{} of {LINES} lines in {files:?}, of {LOG_SIZE} bytes each; first missing: {missing:?}",
                lines.len()
            )));
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn log_files(dir: &Path) -> Result<Vec<std::path::PathBuf>> {
    let listing = fs::read_dir(dir).during(|| format!("list {}", dir.display()))?;
    let mut files: Vec<_> = listing.flatten().map(|entry| entry.path()).collect();
    // `.tmp` is a file that is being compressed; its source is still there
    files.retain(|path| path.extension().is_none_or(|extension| extension != "tmp"));
    files.sort();
    Ok(files)
}

fn is_gzip(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "gz")
}

/// The numbers in one log file; a line that is not a whole one is an error.
fn numbers(path: &Path) -> Result<Vec<u32>> {
    let what = || format!("read {}", path.display());
    let file = match File::open(path) {
        // compressed or removed since it was listed
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        file => file.during(what)?,
    };
    let mut text = String::new();
    if is_gzip(path) {
        flate2::read::GzDecoder::new(file).read_to_string(&mut text).during(what)?;
    } else {
        (&file).read_to_string(&mut text).during(what)?;
    }
    text.split_inclusive('\n')
        // the last line may be in the middle of its write
        .filter(|line| line.ends_with('\n'))
        .map(|line| {
            let number = line.splitn(4, ' ').nth(3).and_then(|rest| rest.trim().parse().ok());
            number.ok_or_else(|| Error::check(format!("{}: torn line {line:?}", path.display())))
        })
        .collect()
}

/// kubelet's own summary has every container with what it uses, and nobody was evicted.
pub(super) fn statistics(stage: &mut Stage) -> Result<()> {
    summary(stage, false)
}

/// The same with every number from the server, and its metrics on kubelet's page for them.
/// Only so does kubelet count a pod's network: its cAdvisor knows that of a pause process,
/// which these pods do not have.
pub(super) fn server_statistics(stage: &mut Stage) -> Result<()> {
    summary(stage, true)?;
    let page = stage.kubelet.get("/metrics/cadvisor")?;
    for name in [
        "container_cpu_usage_seconds_total",
        "container_memory_working_set_bytes",
        "container_network_receive_bytes_total",
    ] {
        let has = |line: &str| line.starts_with(name) && line.contains("web-node");
        ensure(page.lines().any(has), || {
            format!("/metrics/cadvisor has no {name} of the web pod")
        })?;
    }
    Ok(())
}

fn summary(stage: &Stage, network: bool) -> Result<()> {
    let text = stage.kubelet.get("/stats/summary")?;
    let summary: serde_json::Value =
        serde_json::from_str(&text).during(|| "decode /stats/summary".into())?;
    let image_fs = &summary["node"]["runtime"]["imageFs"];
    ensure(
        image_fs["usedBytes"].as_u64() > Some(0) && image_fs["capacityBytes"].as_u64() > Some(0),
        || format!("the image file system: {image_fs}"),
    )?;
    for name in ["strict", "plain", "web", "flaky", "chatty"] {
        let pods = summary["pods"].as_array().cloned().unwrap_or_default();
        let full = format!("{name}-{}", super::agent::NODE_NAME);
        let pod = pods.into_iter().find(|pod| pod["podRef"]["name"] == full.as_str());
        let pod = pod.ok_or_else(|| Error::check(format!("{name} has no statistics")))?;
        let used = |part: &serde_json::Value, kind: &str, value: &str| {
            part[kind][value].as_u64() > Some(0)
        };
        let containers = pod["containers"].as_array().cloned().unwrap_or_default();
        let complete = !containers.is_empty()
            && containers.iter().all(|container| {
                used(container, "cpu", "usageCoreNanoSeconds")
                    && used(container, "memory", "workingSetBytes")
                    && container["rootfs"]["usedBytes"].is_u64()
            });
        ensure(complete && used(&pod, "memory", "workingSetBytes"), || format!("{name}: {pod}"))?;
        ensure(!network || name != "web" || used(&pod, "network", "rxBytes"), || {
            format!("{name}: {pod}")
        })?;
    }
    let pods = stage.kubelet.pods()?;
    let evicted = pods.iter().find(|pod| pod["status"]["reason"] == "Evicted");
    ensure(evicted.is_none(), || format!("evicted: {evicted:?}"))
}

/// A burstable pod gets more without a restart; for an exclusive one kubelet itself refuses.
pub(super) fn resize(stage: &mut Stage) -> Result<()> {
    let pid = web_pid()?;
    let cgroup = evidence::cgroup_of(pid)?;
    let before = stage::container(&stage.wait_ready("web")?, "main")?;
    let mut pod = manifest::web();
    let resources = &mut pod["spec"]["containers"][0]["resources"];
    *resources = json!({
        "requests": { "cpu": "400m", "memory": "40Mi" },
        "limits": { "cpu": "1500m", "memory": "96Mi" },
    });
    manifest::place(&stage.kubelet.manifests, &pod)?;
    let resized = |pod: &serde_json::Value| {
        stage::container(pod, "main").is_ok_and(|status| {
            status.text()["resources"]["limits"] == json!({ "cpu": "1500m", "memory": "96Mi" })
        })
    };
    let pod = stage.wait_pod("web", "resized", resized)?;
    for (dir, file, wanted) in [
        (cgroup.as_path(), "memory.max", (96_u64 << 20).to_string()),
        (&cgroup, "cpu.max", "150000 100000".into()),
        (cgroup.parent().unwrap_or(&cgroup), "memory.max", "max".into()),
    ] {
        let value = evidence::line(&dir.join(file))?;
        // the sidecar has no limit, so the pod as a whole has none
        ensure(value == wanted, || format!("{}/{file} is {value}, not {wanted}", dir.display()))?;
    }
    let after = stage::container(&pod, "main")?;
    ensure(after.id() == before.id() && web_pid()? == pid, || {
        "the container was restarted".into()
    })?;

    let mut pod = manifest::plain();
    for kind in ["requests", "limits"] {
        pod["spec"]["containers"][0]["resources"][kind]["cpu"] = json!("4");
    }
    manifest::place(&stage.kubelet.manifests, &pod)?;
    stage.wait_pod("plain", "refused its resize", |pod| {
        let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.iter().any(|entry| {
            entry["type"] == "PodResizePending"
                && entry["message"].as_str().is_some_and(|text| text.contains("CPU Manager policy"))
        })
    })?;
    manifest::place(&stage.kubelet.manifests, &manifest::plain())?;
    placement::both().map(drop)
}

fn web_pid() -> Result<u32> {
    leaks::process_with("pinion-workload serve 8080 8081 8082")
        .ok_or_else(|| Error::check("the web pod serves nothing"))
}

/// A manifest that changed becomes another pod, and its CPUs are exclusive again.
pub(super) fn changed_manifest(stage: &mut Stage) -> Result<()> {
    let old = placement::exclusive("pinion-workload wait plain")?;
    let words = ["pinion-workload", "wait", "changed"];
    let mut pod =
        manifest::pod("plain", &[manifest::guaranteed(manifest::container("main", &words), "2")]);
    pod["metadata"]["uid"] = json!("plain-1");
    manifest::place(&stage.kubelet.manifests, &pod)?;
    let renewed = stage.wait_pod("plain", "renewed", |pod| {
        pod["metadata"]["uid"] == "plain-1" && stage::ready(pod)
    })?;
    let new = placement::exclusive("pinion-workload wait changed")?;
    ensure(leaks::process_with("pinion-workload wait plain").is_none(), || {
        format!("{} still runs beside {new:?}", old.pid)
    })?;
    let receipt = stage.receipt(&stage::container(&renewed, "main")?.id())?;
    ensure(receipt["verdict"] == "aligned", || format!("pinctl receipt says {receipt}"))?;
    manifest::place(&stage.kubelet.manifests, &manifest::plain())?;
    stage.wait_pod("plain", "as before", |pod| {
        pod["metadata"]["uid"] == "plain-0" && stage::ready(pod)
    })?;
    placement::both().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torn_lines_are_found_and_the_last_may_be_unfinished() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        fs::write(&path, "t stdout F 0   \nt stdout F 1   \nt stdout F 2").unwrap();
        assert_eq!(numbers(&path).unwrap(), [0, 1]);
        fs::write(&path, "t stdout F 0\nout F 1\n").unwrap();
        assert!(numbers(&path).is_err());
        assert_eq!(numbers(&dir.path().join("gone")).unwrap(), Vec::<u32>::new());
    }
}
