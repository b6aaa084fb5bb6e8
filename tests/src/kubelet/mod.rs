//! A real kubelet, standalone, drives the server: static pods of each QoS class under its
//! static CPU manager, static memory manager and the single-numa-node topology manager.
//!
//! A standalone kubelet has no API server and so no RuntimeClass: every pod runs under the
//! default handler, and what is strict says so with `isolation.pinion.dev/strict`.
//!
//! The cases run in order, over pods that stay: the later ones see a node at work. What is
//! said of CPUs, memory and hugepages is read from the kernel.

mod agent;
mod http;
mod lifecycle;
mod manifest;
mod placement;
mod resilience;
mod stage;

use std::path::Path;
use std::time::Instant;

use crate::assets::Assets;
use crate::error::{Result, ensure};
use stage::Stage;

type Case = (&'static str, fn(&mut Stage) -> Result<()>);

const CASES: [Case; 19] = [
    ("kubelet takes its cgroup driver from the server", lifecycle::cgroup_driver),
    ("init, sidecar and exec, http, tcp and grpc probes", lifecycle::shared_pods),
    ("guaranteed pods, strict and plain, have whole cores and pages", placement::guaranteed),
    ("burstable and best-effort pods share what is left", placement::shared_pool),
    ("kubelet's reconcile leaves partitions alone", placement::reconcile),
    ("only exclusive CPUs are isolated, reserved ones are not", placement::reserved),
    ("a strict container that dies is started again on its CPUs", placement::started_again),
    ("the CPUs of a pod that completed go to the next", placement::successor),
    ("kubelet refuses two nodes and half a core", placement::kubelet_refuses),
    ("what Pinion refuses is in the pod's status", placement::pinion_refuses),
    ("what exits or fails its liveness probe is restarted", lifecycle::restarts),
    ("logs are rotated without losing a line", lifecycle::log_rotation),
    ("kubelet's summary has every pod, and none is evicted", lifecycle::statistics),
    ("a burstable pod is resized in place", lifecycle::resize),
    ("a changed manifest is a new pod", lifecycle::changed_manifest),
    ("kubelet dies and comes back", resilience::kubelet_restart),
    ("with statistics from the server alone it has them all too", lifecycle::server_statistics),
    ("the server dies under kubelet and comes back", resilience::server_restart),
    ("power is cut, and the node comes back with stale state", resilience::reboot),
];

/// Cases that start what the others look at.
const FIRST: [&str; 2] = [CASES[1].0, CASES[2].0];

/// What outlives a suite that failed, in a node with a shared directory.
const SHARE: &str = "/mnt/share";

/// Runs every case, or the first ones and those whose name contains `only`, in the virtual
/// node, which is the suite's alone; elsewhere that is an error.
pub(crate) fn run(assets: &Assets, only: Option<&str>) -> Result<()> {
    ensure(assets.in_node(), || {
        "kubelet changes sysctls and owns a part of the cgroup tree: only in the virtual node \
         (pinion-tests node run --kubelet -- pinion-tests kubelet)"
            .into()
    })?;
    let started = Instant::now();
    let mut stage = Stage::open(assets)?;
    println!("kubelet and server answer after {:.0} s", started.elapsed().as_secs_f32());
    let mut failed = 0;
    let last: Case = ("deleted pods leave nothing", resilience::deletion);
    let mut cases: Vec<Case> = CASES.into_iter().chain([last]).collect();
    cases.retain(|(name, _)| {
        only.is_none_or(|only| FIRST.contains(name) || *name == last.0 || name.contains(only))
    });
    for &(name, case) in &cases {
        let began = Instant::now();
        let outcome = case(&mut stage);
        let took = began.elapsed().as_secs_f32();
        match outcome {
            Ok(()) => println!("ok      {took:>5.1} s  {name}"),
            Err(error) => {
                println!("FAILED  {took:>5.1} s  {name}: {}", error.chain());
                failed += 1;
            }
        }
    }
    println!("{} passed, {failed} failed", cases.len() - failed);
    if failed > 0 {
        resilience::tidy(&stage);
        for log in ["kubelet.log", "server.log"].map(|name| stage.site.scratch.path(name)) {
            let name = log.file_name().unwrap_or_default();
            // only a node that was given one has the directory
            let _ = std::fs::copy(&log, Path::new(SHARE).join(name));
        }
    }
    ensure(failed == 0, || {
        let server = stage.site.server.log_tail(20);
        format!("{failed} kubelet cases failed\n{}\n{server}", stage.kubelet.complaints(20))
    })
}
