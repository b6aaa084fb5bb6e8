//! kubelet dies, the server dies, the node dies; then everything is deleted.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pinion_cri_proto::v1::ContainerState;

use super::manifest;
use super::placement;
use super::stage::Stage;
use crate::error::{During, Error, Result, ensure};
use crate::{evidence, leaks, pinned};

/// All pods of the suite.
const PODS: [&str; 5] = ["strict", "plain", "web", "flaky", "chatty"];
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const CLEANUP: Duration = Duration::from_secs(60);

/// The running containers by id.
fn running(stage: &Stage) -> Result<Vec<String>> {
    let containers = stage.cri()?.containers()?;
    let mut ids: Vec<String> = containers
        .into_iter()
        .filter(|container| container.state() == ContainerState::ContainerRunning)
        .map(|container| container.id)
        .collect();
    ids.sort();
    Ok(ids)
}

/// Nothing was started or ended and every exclusive CPU is where it was.
fn undisturbed(stage: &Stage, ids: &[String], was: &[placement::Exclusive; 2]) -> Result<()> {
    let now = running(stage)?;
    ensure(now == ids, || format!("{ids:?} ran, now {now:?} do"))?;
    let is = placement::both()?;
    ensure(is == *was, || format!("{was:?} became {is:?}"))
}

/// kubelet is killed and comes back to the pods it left.
pub(super) fn kubelet_restart(stage: &mut Stage) -> Result<()> {
    let (ids, was) = (running(stage)?, placement::both()?);
    stage.kubelet.kill()?;
    undisturbed(stage, &ids, &was)?;
    stage.kubelet.believe_the_server()?;
    stage.kubelet.restart()?;
    for pod in PODS {
        stage.wait_ready(pod)?;
    }
    undisturbed(stage, &ids, &was)
}

/// The server is killed under a working kubelet.
pub(super) fn server_restart(stage: &mut Stage) -> Result<()> {
    let (ids, was) = (running(stage)?, placement::both()?);
    stage.site.server.kill()?;
    // long enough for kubelet to notice
    std::thread::sleep(Duration::from_secs(4));
    stage.site.server.restart()?;
    undisturbed(stage, &ids, &was)?;
    // kubelet works with it again: probes, and a new pod
    let wait = manifest::container("main", &["pinion-workload", "wait", "late"]);
    manifest::place(&stage.kubelet.manifests, &manifest::pod("late", &[wait]))?;
    stage.wait_ready("late")?;
    manifest::withdraw(&stage.kubelet.manifests, "late")?;
    stage.wait_gone("late")?;
    for pod in PODS {
        stage.wait_ready(pod)?;
    }
    undisturbed(stage, &ids, &was)
}

/// Power is cut: every process of pods and servers is gone, so are mounts, namespaces and
/// groups, and the kernel has a new boot id. What lies in files is still there, and so is
/// `/run`, which on this node is no tmpfs that a boot would empty.
pub(super) fn reboot(stage: &mut Stage) -> Result<()> {
    let old = running(stage)?;
    stage.kubelet.kill()?;
    stage.site.server.kill()?;
    cut_power(stage)?;
    let boot_id = stage.site.scratch.path("boot-id");
    let fresh =
        fs::read_to_string("/proc/sys/kernel/random/uuid").during(|| "make a uuid".into())?;
    fs::write(&boot_id, fresh).during(|| format!("write {}", boot_id.display()))?;
    mount(Some(&boot_id), BOOT_ID, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .during(|| format!("bind a new {BOOT_ID}"))?;
    let outcome = boot(stage, &old);
    umount2(BOOT_ID, MntFlags::MNT_DETACH).during(|| format!("unmount {BOOT_ID}"))?;
    outcome
}

fn boot(stage: &mut Stage, old: &[String]) -> Result<()> {
    stage.site.server.restart()?;
    let left = running(stage)?;
    ensure(left.is_empty(), || format!("the server believes that {left:?} still run"))?;
    stage.kubelet.restart()?;
    for pod in PODS {
        stage.wait_ready(pod)?;
    }
    let again = running(stage)?;
    ensure(again.iter().all(|id| !old.contains(id)), || format!("{again:?} ran before"))?;
    settled_both()
}

/// Ready comes before the workload's last page.
fn settled_both() -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match placement::both() {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// Does to the machine what a reboot does to it, below the suite's own processes.
fn cut_power(stage: &Stage) -> Result<()> {
    let deadline = Instant::now() + CLEANUP;
    loop {
        let left = leaks::Snapshot::take().since(&stage.before);
        let processes: Vec<i32> = left
            .iter()
            .filter_map(|line| line.strip_prefix("process ")?.split(' ').next()?.parse().ok())
            .collect();
        for pid in &processes {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        let mounts: Vec<PathBuf> =
            left.iter().filter_map(|line| line.strip_prefix("mount ")).map(PathBuf::from).collect();
        for mount in mounts.iter().rev() {
            let _ = umount2(mount, MntFlags::MNT_DETACH);
        }
        let groups: Vec<&str> =
            left.iter().filter_map(|line| line.strip_prefix("cgroup ")).collect();
        for group in groups.iter().rev() {
            let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(group.trim_start_matches('/')));
        }
        if processes.is_empty() && mounts.is_empty() && groups.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Error::check(format!("could not cut the power: {left:?}")));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Every manifest is taken away: kubelet and server end with nothing, and so does the
/// machine.
pub(super) fn deletion(stage: &mut Stage) -> Result<()> {
    manifest::withdraw_all(&stage.kubelet.manifests)?;
    for pod in PODS {
        stage.wait_gone(pod)?;
    }
    leaks::nothing_since(&stage.before, CLEANUP)?;
    let isolated = evidence::isolated_cpus()?;
    ensure(isolated.is_empty(), || format!("CPUs {isolated} are still isolated"))?;
    for node in evidence::topology()?.nodes {
        let pool = evidence::hugepages(node.id)?;
        ensure(pool.free == pool.total, || {
            format!("node {}: {} of {} hugepages are free", node.id, pool.free, pool.total)
        })?;
    }
    let containers = stage.cri()?.containers()?;
    ensure(containers.is_empty(), || format!("the server keeps {containers:?}"))
}

/// After a failure: what is left goes, so that the machine is as it was.
pub(super) fn tidy(stage: &Stage) {
    let _ = manifest::withdraw_all(&stage.kubelet.manifests);
    for pod in PODS {
        if let Err(error) = stage.wait_gone(pod) {
            eprintln!("{}", error.chain());
        }
    }
    pinned::remove_kubelet_cgroups();
}
