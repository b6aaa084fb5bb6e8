//! ExecSync as probes use it: many in one container, with their wall and CPU time.
//!
//! The CPU time is that of the server, of what keeps the pod, and of every process these have
//! waited for: the runtime's and the command's own.

use std::time::Instant;

use pinion_cri_proto::v1::{ExecSyncRequest, ListContainersRequest};

use crate::cpu;
use crate::cri::{Client, Outcome, PodShape, end_pod, start_pod};

/// Probes of one turn.
const PROBES: usize = 50;
/// The processes that stay with a pod, as the kernel cuts their names.
const KEEPERS: &[&str] = &["pinion-monitor", "containerd-shim"];

/// Milliseconds of each probe, and of CPU time per probe.
pub(crate) async fn run(
    client: &mut Client,
    shape: &PodShape,
    daemon: u32,
    number: usize,
) -> Outcome<(Vec<f64>, f64)> {
    let pod = start_pod(client, shape, number).await?;
    let outcome = probe(client, &pod.0, daemon).await;
    end_pod(client, pod).await?;
    outcome
}

async fn probe(client: &mut Client, pod: &str, daemon: u32) -> Outcome<(Vec<f64>, f64)> {
    let listed = client.list_containers(ListContainersRequest::default()).await?.into_inner();
    let own = listed.containers.into_iter().find(|container| container.pod_sandbox_id == pod);
    let container_id = own.ok_or("the pod has no container")?.id;
    let before = (cpu::spent(daemon)?, cpu::spent_by(KEEPERS)?);
    let mut times = Vec::new();
    for _ in 0..PROBES {
        let request = ExecSyncRequest {
            container_id: container_id.clone(),
            cmd: vec!["/bin/true".to_owned()],
            timeout: 10,
        };
        let began = Instant::now();
        let code = client.exec_sync(request).await?.into_inner().exit_code;
        times.push(began.elapsed().as_secs_f64() * 1000.0);
        if code != 0 {
            return Err(format!("a probe ended with {code}").into());
        }
    }
    let keepers = cpu::since(&before.1, &cpu::spent_by(KEEPERS)?);
    Ok((times, (cpu::spent(daemon)? - before.0 + keepers) / PROBES as f64))
}
