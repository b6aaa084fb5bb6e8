//! Records as CRI messages, and the filters of list calls. Pure.

use std::collections::HashMap;
use std::sync::Arc;

use pinion_cri_proto::v1;

use crate::record::{Container, Exit, Phase, Sandbox};
use crate::registry::{PodView, Snapshot};

/// CRI's state of a container.
pub(crate) fn container_state(container: &Container) -> v1::ContainerState {
    match container.phase() {
        Phase::Created => v1::ContainerState::ContainerCreated,
        Phase::Running => v1::ContainerState::ContainerRunning,
        Phase::Exited => v1::ContainerState::ContainerExited,
    }
}

/// CRI's state of a pod.
pub(crate) fn sandbox_state(sandbox: &Sandbox) -> v1::PodSandboxState {
    if sandbox.ready {
        v1::PodSandboxState::SandboxReady
    } else {
        v1::PodSandboxState::SandboxNotready
    }
}

/// A pod for `ListPodSandbox`.
pub(crate) fn sandbox_item(sandbox: &Sandbox) -> v1::PodSandbox {
    v1::PodSandbox {
        id: sandbox.id.clone(),
        metadata: sandbox.config.metadata.clone(),
        state: sandbox_state(sandbox).into(),
        created_at: sandbox.created_at,
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
        runtime_handler: sandbox.handler.clone(),
    }
}

/// A pod for `PodSandboxStatus`.
pub(crate) fn sandbox_status(sandbox: &Sandbox) -> v1::PodSandboxStatus {
    let mut ips = sandbox.ips.iter().cloned();
    let network = v1::PodSandboxNetworkStatus {
        ip: ips.next().unwrap_or_default(),
        additional_ips: ips.map(|ip| v1::PodIp { ip }).collect(),
    };
    v1::PodSandboxStatus {
        id: sandbox.id.clone(),
        metadata: sandbox.config.metadata.clone(),
        state: sandbox_state(sandbox).into(),
        created_at: sandbox.created_at,
        network: Some(network),
        linux: Some(v1::LinuxPodSandboxStatus {
            namespaces: Some(v1::Namespace { options: Some(sandbox.namespaces()) }),
        }),
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
        runtime_handler: sandbox.handler.clone(),
    }
}

/// A container for `ListContainers`.
pub(crate) fn container_item(container: &Container) -> v1::Container {
    v1::Container {
        id: container.id.clone(),
        pod_sandbox_id: container.pod.clone(),
        metadata: container.config.metadata.clone(),
        image: Some(image_spec(container)),
        image_ref: container.image_id.clone(),
        state: container_state(container).into(),
        created_at: container.created_at,
        labels: container.config.labels.clone(),
        annotations: container.config.annotations.clone(),
        image_id: container.image_id.clone(),
    }
}

/// A container for `ContainerStatus`.
pub(crate) fn container_status(container: &Container) -> v1::ContainerStatus {
    let exit = container.exit.as_ref();
    v1::ContainerStatus {
        id: container.id.clone(),
        metadata: container.config.metadata.clone(),
        state: container_state(container).into(),
        created_at: container.created_at,
        started_at: container.started_at,
        finished_at: exit.map_or(0, |e| e.finished_at),
        exit_code: exit.map_or(0, |e| e.code),
        image: Some(image_spec(container)),
        image_ref: container.image_id.clone(),
        reason: exit.map(Exit::reason).unwrap_or_default().to_string(),
        message: exit.map(|e| e.message.clone()).unwrap_or_default(),
        labels: container.config.labels.clone(),
        annotations: container.config.annotations.clone(),
        mounts: mounts(container),
        log_path: container.log_path.to_string_lossy().into_owned(),
        resources: Some(v1::ContainerResources {
            linux: Some(container.resources.0.clone()),
            windows: None,
        }),
        image_id: container.image_id.clone(),
        user: Some(v1::ContainerUser { linux: Some(container.user.0.clone()) }),
        stop_signal: stop_signal(container).into(),
    }
}

/// The mounts as asked for, image volumes with the image that is mounted.
fn mounts(container: &Container) -> Vec<v1::Mount> {
    let mut mounts = container.config.mounts.clone();
    for volume in &container.image_volumes {
        if let Some(image) = mounts.get_mut(volume.mount).and_then(|m| m.image.as_mut()) {
            image.image_ref.clone_from(&volume.image_id);
        }
    }
    mounts
}

/// The image as the user named it, so that kubelet shows a name and not a digest.
fn image_spec(container: &Container) -> v1::ImageSpec {
    let mut image = container.config.image.clone().unwrap_or_default();
    if !image.user_specified_image.is_empty() {
        image.image.clone_from(&image.user_specified_image);
    }
    image
}

/// The signal in force, which may come from the image, as CRI numbers it.
fn stop_signal(container: &Container) -> v1::Signal {
    let asked = v1::Signal::try_from(container.config.stop_signal).unwrap_or_default();
    if asked != v1::Signal::RuntimeDefault {
        return asked;
    }
    crate::signals::to_cri(container.stop_signal)
}

/// A pod with all its containers, as event streams and status calls give them.
pub(crate) fn container_statuses(pod: &PodView) -> Vec<v1::ContainerStatus> {
    pod.containers.values().map(|c| container_status(c)).collect()
}

/// The pods that pass a filter. An id may be a prefix.
pub(crate) fn list_sandboxes(
    snapshot: &Snapshot,
    filter: Option<&v1::PodSandboxFilter>,
) -> Vec<v1::PodSandbox> {
    let Some(filter) = filter else {
        return snapshot.pods().map(|p| sandbox_item(&p.sandbox)).collect();
    };
    snapshot
        .pods()
        .map(|pod| &pod.sandbox)
        .filter(|s| s.id.starts_with(&filter.id))
        .filter(|s| filter.state.is_none_or(|want| want.state == sandbox_state(s) as i32))
        .filter(|s| has_labels(&s.config.labels, &filter.label_selector))
        .map(|s| sandbox_item(s))
        .collect()
}

/// The containers that pass a filter. Ids may be prefixes.
pub(crate) fn list_containers(
    snapshot: &Snapshot,
    filter: Option<&v1::ContainerFilter>,
) -> Vec<v1::Container> {
    let Some(filter) = filter else {
        return snapshot.containers().map(|(_, c)| container_item(c)).collect();
    };
    snapshot
        .containers()
        .map(|(_, container)| container)
        .filter(|c| c.id.starts_with(&filter.id) && c.pod.starts_with(&filter.pod_sandbox_id))
        .filter(|c| filter.state.is_none_or(|want| want.state == container_state(c) as i32))
        .filter(|c| has_labels(&c.config.labels, &filter.label_selector))
        .map(|c| container_item(c))
        .collect()
}

/// The containers that pass a statistics filter, with their pods.
pub(crate) fn select_containers(
    snapshot: &Snapshot,
    filter: Option<&v1::ContainerStatsFilter>,
) -> Vec<(Arc<PodView>, Arc<Container>)> {
    snapshot
        .containers()
        .filter(|(_, c)| {
            filter.is_none_or(|f| {
                c.id.starts_with(&f.id)
                    && c.pod.starts_with(&f.pod_sandbox_id)
                    && has_labels(&c.config.labels, &f.label_selector)
            })
        })
        .map(|(pod, container)| (pod.clone(), container.clone()))
        .collect()
}

/// The pods that pass a statistics filter.
pub(crate) fn select_pods(
    snapshot: &Snapshot,
    filter: Option<&v1::PodSandboxStatsFilter>,
) -> Vec<Arc<PodView>> {
    snapshot
        .pods()
        .filter(|pod| {
            filter.is_none_or(|f| {
                pod.sandbox.id.starts_with(&f.id)
                    && has_labels(&pod.sandbox.config.labels, &f.label_selector)
            })
        })
        .cloned()
        .collect()
}

/// Whether all wanted labels are there with the wanted values.
pub(crate) fn has_labels(
    labels: &HashMap<String, String>,
    wanted: &HashMap<String, String>,
) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Wire;

    #[test]
    fn a_finished_container_says_when_how_and_why() {
        let container = Container {
            created_at: 1,
            started_at: 2,
            exit: Some(Exit { code: 137, finished_at: 3, oom_killed: true, ..Default::default() }),
            image_id: "sha256:aa".into(),
            ..Default::default()
        };
        let status = container_status(&container);
        assert_eq!(status.state(), v1::ContainerState::ContainerExited);
        assert_eq!((status.exit_code, status.finished_at), (137, 3));
        assert_eq!(status.reason, "OOMKilled");
        assert_eq!(status.image_id, status.image_ref);
    }

    #[test]
    fn the_name_the_user_gave_is_shown_not_the_digest_kubelet_sent() {
        let image = v1::ImageSpec {
            image: "sha256:aa".into(),
            user_specified_image: "busybox".into(),
            ..Default::default()
        };
        let config = v1::ContainerConfig { image: Some(image), ..Default::default() };
        let container = Container { config: Wire(config), ..Default::default() };
        assert_eq!(container_item(&container).image.unwrap().image, "busybox");
    }

    #[test]
    fn the_primary_address_comes_first() {
        let sandbox =
            Sandbox { ips: vec!["10.0.0.2".into(), "fd00::2".into()], ..Default::default() };
        let network = sandbox_status(&sandbox).network.unwrap();
        assert_eq!(network.ip, "10.0.0.2");
        assert_eq!(network.additional_ips[0].ip, "fd00::2");
    }

    #[test]
    fn all_wanted_labels_must_match() {
        let map = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
        };
        let labels = map(&[("a", "1"), ("b", "2")]);
        assert!(has_labels(&labels, &map(&[])));
        assert!(has_labels(&labels, &map(&[("a", "1")])));
        assert!(!has_labels(&labels, &map(&[("a", "2")])));
        assert!(!has_labels(&labels, &map(&[("c", "1")])));
    }
}
