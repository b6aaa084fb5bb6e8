//! Resource use of containers and pods, read from the kernel in one pass per request.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pinion_cgroup::stats::{Pressure, PressureLine};
use pinion_cgroup::{Cgroup, Usage};
use pinion_cri_proto::v1::*;
use pinion_image::Usage as DiskUsage;

use crate::error::Result;
use crate::ids;
use crate::netdev::{self, Interface};
use crate::node::Node;
use crate::record::{Container, Phase};
use crate::registry::PodView;
use crate::services::blocking;
use crate::vm::{Usages, read_usages};

/// The shortest time over which a rate means something.
const RATE_SPAN: Duration = Duration::from_millis(500);

/// What is remembered between requests, by container id.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    cpu: Mutex<HashMap<String, CpuSample>>,
}

#[derive(Debug, Clone, Copy)]
struct CpuSample {
    at: Instant,
    nanoseconds: u64,
    rate: Option<u64>,
}

impl Samples {
    /// Nanoseconds of CPU time per second since the last look, once there was one.
    fn rate(&self, id: &str, nanoseconds: u64) -> Option<u64> {
        let mut cpu = self.cpu.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let Some(last) = cpu.get(id).copied() else {
            cpu.insert(id.to_string(), CpuSample { at: now, nanoseconds, rate: None });
            return None;
        };
        let span = now - last.at;
        if span < RATE_SPAN {
            return last.rate;
        }
        let used = u128::from(nanoseconds.saturating_sub(last.nanoseconds));
        let rate = used * 1_000_000_000 / span.as_nanos().max(1);
        let rate = Some(u64::try_from(rate).unwrap_or(u64::MAX));
        cpu.insert(id.to_string(), CpuSample { at: now, nanoseconds, rate });
        rate
    }

    /// Forgets what no longer exists.
    pub(crate) fn forget(&self, id: &str) {
        self.cpu.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }
}

/// Use of a container's writable layer; one that is being removed uses nothing.
pub(crate) fn disk(node: &Node, id: &str) -> DiskUsage {
    node.images.rootfs_usage(id).unwrap_or_default()
}

/// Statistics of containers, in the order given. Those without a cgroup have none of CPU
/// and memory.
pub(crate) async fn containers(
    node: &Arc<Node>,
    chosen: Vec<(Arc<PodView>, Arc<Container>)>,
) -> Result<Vec<ContainerStats>> {
    let node = node.clone();
    let guests = read_usages(distinct(chosen.iter().map(|(pod, _)| pod))).await;
    blocking(move || Ok(chosen.iter().map(|(_, c)| container(&node, c, &guests)).collect())).await
}

/// Each pod once.
fn distinct<'a>(
    pods: impl Iterator<Item = &'a Arc<PodView>>,
) -> impl Iterator<Item = &'a Arc<PodView>> {
    let mut seen = std::collections::HashSet::new();
    pods.filter(move |pod| seen.insert(pod.sandbox.id.clone()))
}

fn container(node: &Node, record: &Container, guests: &Usages) -> ContainerStats {
    let cgroup = (record.phase() != Phase::Exited)
        .then(|| node.cgroups.container(&record.cgroups_path, &record.id).ok())
        .flatten();
    let usage = guests.get(&record.id).copied().or_else(|| cgroup.as_ref().and_then(usage));
    let psi = psi(cgroup.as_ref().filter(|_| usage.is_some()));
    let disk = disk(node, &record.id);
    let now = ids::now();
    ContainerStats {
        attributes: Some(ContainerAttributes {
            id: record.id.clone(),
            metadata: record.config.metadata.clone(),
            labels: record.config.labels.clone(),
            annotations: record.config.annotations.clone(),
        }),
        cpu: usage.map(|u| CpuUsage { psi: psi.cpu, ..cpu(node, &record.id, &u) }),
        memory: usage.map(|u| MemoryUsage { psi: psi.memory, ..memory(&u) }),
        writable_layer: Some(FilesystemUsage {
            timestamp: now,
            fs_id: Some(FilesystemIdentifier {
                mountpoint: node.paths.root().to_string_lossy().into_owned(),
            }),
            used_bytes: value(disk.bytes),
            inodes_used: value(disk.inodes),
        }),
        swap: usage.map(|u| SwapUsage {
            timestamp: now,
            swap_available_bytes: None,
            swap_usage_bytes: value(u.swap_bytes),
        }),
        io: io(psi.io, now),
    }
}

/// Pressure stall information as CRI has it; `None` where the kernel gives none.
#[derive(Debug, Clone, Copy, Default)]
struct Psi {
    cpu: Option<PsiStats>,
    memory: Option<PsiStats>,
    io: Option<PsiStats>,
}

fn psi(cgroup: Option<&Cgroup>) -> Psi {
    let read = |cgroup: &Cgroup| {
        let read = cgroup.pressures();
        read.inspect_err(|error| tracing::debug!(%error, "pressure not read")).ok()
    };
    let found = cgroup.and_then(read).unwrap_or_default();
    // CRI counts stalls in nanoseconds, the kernel in microseconds.
    let data = |line: &PressureLine| PsiData {
        total: line.total.saturating_mul(1000),
        avg10: line.avg10,
        avg60: line.avg60,
        avg300: line.avg300,
    };
    let stats = |pressure: Pressure| PsiStats {
        full: Some(data(&pressure.full)),
        some: Some(data(&pressure.some)),
    };
    Psi { cpu: found.cpu.map(stats), memory: found.memory.map(stats), io: found.io.map(stats) }
}

fn io(psi: Option<PsiStats>, timestamp: i64) -> Option<IoUsage> {
    psi.map(|psi| IoUsage { timestamp, psi: Some(psi) })
}

/// The numbers of a cgroup that exists.
fn usage(cgroup: &Cgroup) -> Option<Usage> {
    if !cgroup.exists() {
        return None;
    }
    cgroup.usage().inspect_err(|error| tracing::debug!(%error, "cgroup not read")).ok()
}

fn value(value: u64) -> Option<UInt64Value> {
    Some(UInt64Value { value })
}

fn cpu(node: &Node, id: &str, usage: &Usage) -> CpuUsage {
    CpuUsage {
        timestamp: ids::now(),
        usage_core_nano_seconds: value(usage.cpu_nanoseconds),
        usage_nano_cores: node
            .samples
            .rate(id, usage.cpu_nanoseconds)
            .map(|value| UInt64Value { value }),
        psi: None,
    }
}

fn memory(usage: &Usage) -> MemoryUsage {
    let limit = usage.memory_limit_bytes;
    // v1 spells "no limit" as the largest number of whole pages.
    let available = (limit < 1 << 62).then(|| limit.saturating_sub(usage.working_set_bytes));
    MemoryUsage {
        timestamp: ids::now(),
        working_set_bytes: value(usage.working_set_bytes),
        available_bytes: available.map(|value| UInt64Value { value }),
        usage_bytes: value(usage.memory_bytes),
        rss_bytes: value(usage.rss_bytes),
        page_faults: value(usage.page_faults),
        major_page_faults: value(usage.major_page_faults),
        psi: None,
    }
}

/// Statistics of pods: of the cgroup their containers share, their network, and each
/// container.
pub(crate) async fn pods(
    node: &Arc<Node>,
    chosen: Vec<Arc<PodView>>,
) -> Result<Vec<PodSandboxStats>> {
    let node = node.clone();
    let guests = read_usages(chosen.iter()).await;
    blocking(move || Ok(chosen.iter().map(|pod| one_pod(&node, pod, &guests)).collect())).await
}

fn one_pod(node: &Node, pod: &PodView, guests: &Usages) -> PodSandboxStats {
    let sandbox = &pod.sandbox;
    let cgroup = node.cgroups.parent(&sandbox.cgroup_parent).ok().map(Cgroup::open);
    let usage = cgroup.as_ref().and_then(usage);
    let psi = psi(cgroup.as_ref().filter(|_| usage.is_some()));
    let now = ids::now();
    let linux = LinuxPodSandboxStats {
        cpu: usage.map(|u| CpuUsage { psi: psi.cpu, ..cpu(node, &sandbox.id, &u) }),
        memory: usage.map(|u| MemoryUsage { psi: psi.memory, ..memory(&u) }),
        network: netdev::of_pod(node, sandbox).map(|list| network(&list, now)),
        process: usage.map(|u| ProcessUsage { timestamp: now, process_count: value(u.pids) }),
        containers: pod
            .containers
            .values()
            .filter(|c| c.phase() == Phase::Running)
            .map(|c| container(node, c, guests))
            .collect(),
        io: io(psi.io, now),
    };
    PodSandboxStats {
        attributes: Some(PodSandboxAttributes {
            id: sandbox.id.clone(),
            metadata: sandbox.config.metadata.clone(),
            labels: sandbox.config.labels.clone(),
            annotations: sandbox.config.annotations.clone(),
        }),
        linux: Some(linux),
        windows: None,
    }
}

fn network(interfaces: &[Interface], timestamp: i64) -> NetworkUsage {
    let to_cri = |i: &Interface| NetworkInterfaceUsage {
        name: i.name.clone(),
        rx_bytes: value(i.rx.bytes),
        rx_errors: value(i.rx.errors),
        tx_bytes: value(i.tx.bytes),
        tx_errors: value(i.tx.errors),
    };
    let (default, others): (Vec<_>, Vec<_>) =
        interfaces.iter().partition(|i| i.name == netdev::DEFAULT);
    NetworkUsage {
        timestamp,
        default_interface: default.first().map(|i| to_cri(i)),
        interfaces: others.into_iter().map(to_cri).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_needs_two_looks() {
        let samples = Samples::default();
        assert_eq!(samples.rate("a", 0), None);
        assert_eq!(samples.rate("a", 5), None);
        std::thread::sleep(RATE_SPAN);
        // Half a second of CPU time in half a second is about one core.
        let rate = samples.rate("a", 500_000_000).unwrap();
        assert!((500_000_000..=1_000_000_000).contains(&rate), "{rate}");
        samples.forget("a");
        assert_eq!(samples.rate("a", 5), None);
    }

    #[test]
    fn memory_without_a_limit_has_no_amount_available() {
        let usage = Usage { memory_limit_bytes: u64::MAX, ..Default::default() };
        assert_eq!(memory(&usage).available_bytes, None);
        let v1 = Usage { memory_limit_bytes: 0x7fff_ffff_ffff_f000, ..Default::default() };
        assert_eq!(memory(&v1).available_bytes, None);
        let limited =
            Usage { memory_limit_bytes: 100, working_set_bytes: 30, ..Default::default() };
        assert_eq!(memory(&limited).available_bytes.unwrap().value, 70);
    }
}
