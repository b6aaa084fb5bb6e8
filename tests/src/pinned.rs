//! The pods that demo and isolation suite are about: one pinned to whole cores and
//! hugepages of one NUMA node, and neighbours that want the same.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pinion_cri_proto::v1::{HugepageLimit, LinuxContainerResources};
use pinion_topology::{CpuSet, Topology};

use crate::cri::{Container, Cri, Pod};
use crate::error::{During, Error, Result};
use crate::image::catalogue;
use crate::site::Site;

/// Bytes of a 2 MiB page.
const PAGE: u64 = 2 << 20;
/// The handler under which a container starts only if every guarantee holds.
pub(crate) const STRICT: &str = "pinion-strict";
/// How long a workload may take to map and touch its pages.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a container asks for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ask {
    /// CPU list; empty for all.
    pub(crate) cpus: String,
    /// NUMA nodes; empty for all.
    pub(crate) mems: String,
    /// 2 MiB pages it may use.
    pub(crate) hugepages: u64,
}

impl Ask {
    /// As kubelet's static CPU and memory managers would send it.
    pub(crate) fn resources(&self) -> Result<LinuxContainerResources> {
        let cpus: CpuSet = self
            .cpus
            .parse()
            .map_err(|error| Error::check(format!("CPU list {:?}: {error}", self.cpus)))?;
        let limits = if self.hugepages == 0 {
            Vec::new()
        } else {
            vec![HugepageLimit { page_size: "2MB".into(), limit: self.hugepages * PAGE }]
        };
        Ok(LinuxContainerResources {
            cpuset_cpus: self.cpus.clone(),
            cpuset_mems: self.mems.clone(),
            cpu_shares: 1024 * i64::try_from(cpus.len().max(1)).unwrap_or(1),
            cpu_period: 100_000,
            memory_limit_in_bytes: 256 << 20,
            hugepage_limits: limits,
            ..Default::default()
        })
    }
}

/// The threads of one whole core of a node. With SMT that is two CPUs; without, two cores
/// are taken, so that the set always has two CPUs where the node has them.
pub(crate) fn whole_core(topology: &Topology, node: u32, skip: usize) -> Result<CpuSet> {
    let place =
        topology.node(node).ok_or_else(|| Error::check(format!("there is no NUMA node {node}")))?;
    let mut cores: Vec<&CpuSet> = topology
        .cores()
        .into_iter()
        .filter(|core| core.first().is_some_and(|cpu| place.cpus.contains(cpu)))
        .collect();
    cores.sort_by_key(|core| core.first());
    let per_set = if topology.has_smt() { 1 } else { 2 };
    let mut set = CpuSet::default();
    for core in cores.iter().skip(skip * per_set).take(per_set) {
        set = set.union(core);
    }
    if set.is_empty() {
        Err(Error::check(format!("node {node} has too few cores")))
    } else {
        Ok(set)
    }
}

/// Whether systemd owns this machine's cgroups: sd_booted(3).
pub(crate) fn is_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Where kubelet has the pods of a class, `""` for the guaranteed ones, under either driver.
pub(crate) fn kubelet_group(class: &str) -> PathBuf {
    let root = Path::new("/sys/fs/cgroup");
    match (is_systemd(), class) {
        (true, "") => root.join("kubepods.slice"),
        (true, class) => root.join("kubepods.slice").join(format!("kubepods-{class}.slice")),
        (false, class) => root.join("kubepods").join(class),
    }
}

/// A pod in kubelet's tree of cgroups, which is made as kubelet makes it.
pub(crate) fn kubelet_pod(site: &Site, name: &str, class: &str) -> Result<Pod> {
    let mut pod = site.pod(name)?;
    let root = Path::new("/sys/fs/cgroup");
    if is_systemd() {
        let class = if class.is_empty() { String::new() } else { format!("-{class}") };
        pod.cgroup_parent = format!("kubepods{class}-pod{}.slice", name.replace('-', "_"));
    } else if root.join("cgroup.subtree_control").exists() {
        let parent = Path::new("kubepods").join(class).join(format!("pod-{name}"));
        make_cgroups(root, &parent)?;
        pod.cgroup_parent = format!("/{}", parent.display());
    }
    Ok(pod)
}

/// Makes the directories and turns on every controller on the way down.
fn make_cgroups(root: &Path, relative: &Path) -> Result<()> {
    let mut dir: PathBuf = root.into();
    for part in relative.components() {
        let controllers = crate::evidence::line(&dir.join("cgroup.controllers"))?;
        for controller in controllers.split_whitespace() {
            let file = dir.join("cgroup.subtree_control");
            fs::write(&file, format!("+{controller}"))
                .during(|| format!("write +{controller} to {}", file.display()))?;
        }
        dir.push(part);
        if !dir.exists() {
            fs::create_dir(&dir).during(|| format!("create {}", dir.display()))?;
        }
    }
    Ok(())
}

/// Removes the pod cgroups that [`kubelet_pod`] made, as kubelet does when a pod is gone.
pub(crate) fn remove_kubelet_cgroups() {
    let mut dirs = Vec::new();
    if is_systemd() {
        let _ = std::process::Command::new("systemctl").args(["stop", "kubepods.slice"]).status();
    }
    collect_dirs(&kubelet_group(""), &mut dirs);
    for dir in dirs.iter().rev() {
        let _ = fs::remove_dir(dir);
    }
}

fn collect_dirs(dir: &Path, found: &mut Vec<PathBuf>) {
    let Ok(listing) = fs::read_dir(dir) else { return };
    found.push(dir.into());
    for entry in listing.flatten().filter(|entry| entry.path().is_dir()) {
        collect_dirs(&entry.path(), found);
    }
}

/// A container that maps, touches and holds hugepages. The marker makes its command line
/// its own, so that its process is found.
pub(crate) fn holder(name: &str, ask: &Ask) -> Result<Container> {
    let pages = ask.hugepages.to_string();
    let command = ["pinion-workload", "hugepages", "2M", &pages, "hold"];
    let mut container = Container::new(name, catalogue::WORKLOAD, &command);
    container.resources = Some(ask.resources()?);
    Ok(container)
}

/// Waits until the container's log has a line that starts with `start`.
pub(crate) fn wait_for_line(
    site: &Site,
    cri: &Cri,
    (pod, container, id): (&Pod, &Container, &str),
    start: &str,
) -> Result<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let log = site.log(pod, container);
        if log.lines().any(|line| line.starts_with(start)) {
            return Ok(log);
        }
        if Instant::now() > deadline {
            let status = cri.status(id)?;
            return Err(Error::check(format!(
                "{} never said {start:?}; it is {:?} with exit code {} and said {log:?}",
                container.name,
                status.state(),
                status.exit_code
            )));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
