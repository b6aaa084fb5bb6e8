//! `pinctl stop` and `pinctl rm`.

use crate::connect::Node;
use crate::error::Error;
use crate::lookup::{self, Target};
use crate::output;
use pinion_cri_proto::v1::{
    ContainerState, PodSandboxState, RemoveContainerRequest, RemovePodSandboxRequest,
    StopContainerRequest, StopPodSandboxRequest,
};

/// Stops pods or containers.
pub(crate) async fn stop(node: &mut Node, ids: &[String], grace: i64) -> Result<(), Error> {
    for given in ids {
        match lookup::target(node, given).await? {
            Target::Pod(pod) => stop_pod(node, &pod.id).await?,
            Target::Container(container) => {
                let request = StopContainerRequest { container_id: container.id, timeout: grace };
                let answer = node.runtime.stop_container(request).await;
                answer.map_err(Error::call(format!("stopping {given}")))?;
            }
        }
        output::print(given)?;
    }
    Ok(())
}

/// Removes pods or containers; running ones only when forced.
pub(crate) async fn remove(node: &mut Node, ids: &[String], force: bool) -> Result<(), Error> {
    for given in ids {
        match lookup::target(node, given).await? {
            Target::Pod(pod) => {
                if pod.state() == PodSandboxState::SandboxReady && !force {
                    return Err(running("pod", given));
                }
                remove_pod(node, &pod.id).await?;
            }
            Target::Container(container) => {
                if container.state() == ContainerState::ContainerRunning && !force {
                    return Err(running("container", given));
                }
                let request = RemoveContainerRequest { container_id: container.id };
                let answer = node.runtime.remove_container(request).await;
                answer.map_err(Error::call(format!("removing {given}")))?;
            }
        }
        output::print(given)?;
    }
    Ok(())
}

/// Stops and removes a pod with all it holds.
pub(crate) async fn remove_pod(node: &mut Node, id: &str) -> Result<(), Error> {
    stop_pod(node, id).await?;
    let request = RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
    let answer = node.runtime.remove_pod_sandbox(request).await;
    answer.map_err(Error::call(format!("removing pod {}", output::short(id))))?;
    Ok(())
}

async fn stop_pod(node: &mut Node, id: &str) -> Result<(), Error> {
    let request = StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
    let answer = node.runtime.stop_pod_sandbox(request).await;
    answer.map_err(Error::call(format!("stopping pod {}", output::short(id))))?;
    Ok(())
}

fn running(what: &str, given: &str) -> Error {
    Error::Invalid(format!("{what} {given} runs; stop it first, or remove it with --force"))
}
