//! The pod's user namespace, as far as CRI lets a pod choose one (KEP-127).

use crate::error::SpecError;
use pinion_cri_proto::v1::{IdMapping, NamespaceMode, PodSandboxConfig};

const FIELD: &str = "linux.security_context.namespace_options";

/// A run of ids on the host that stands for the ids from 0 inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRun {
    /// First id on the host.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// The ids of a pod with a user namespace of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserIds {
    /// User ids.
    pub uids: IdRun,
    /// Group ids.
    pub gids: IdRun,
}

/// Checks `userns_options`; `None` for a pod that shares the node's users.
///
/// As kubelet's contract has it, a pod has one run of ids that starts with root. Its IPC and
/// PID namespaces must not be the node's: the pod's root would have no right over them, and
/// `/proc` and `/dev/mqueue` could not be mounted. The node's network is allowed.
pub fn user_namespace(pod: &PodSandboxConfig) -> Result<Option<UserIds>, SpecError> {
    let options = pod
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|security| security.namespace_options.as_ref());
    let Some((options, user)) = options.and_then(|o| Some((o, o.userns_options.as_ref()?))) else {
        return Ok(None);
    };
    match NamespaceMode::try_from(user.mode) {
        Ok(NamespaceMode::Node) if user.uids.is_empty() && user.gids.is_empty() => return Ok(None),
        Ok(NamespaceMode::Node) => {
            let reason = "id mappings without a user namespace of the pod (mode is NODE)";
            return Err(SpecError::invalid(format!("{FIELD}.userns_options"), reason));
        }
        Ok(NamespaceMode::Pod) => {}
        Ok(NamespaceMode::Container | NamespaceMode::Target) | Err(_) => {
            let field = format!("{FIELD}.userns_options.mode");
            return Err(SpecError::invalid(field, "must be POD or NODE"));
        }
    }
    for (value, member) in [(options.ipc, "ipc"), (options.pid, "pid")] {
        if value == i32::from(NamespaceMode::Node) {
            let reason = "the node's cannot be shared by a pod with a user namespace of its own";
            return Err(SpecError::invalid(format!("{FIELD}.{member}"), reason));
        }
    }
    Ok(Some(UserIds { uids: run(&user.uids, "uids")?, gids: run(&user.gids, "gids")? }))
}

fn run(mappings: &[IdMapping], member: &str) -> Result<IdRun, SpecError> {
    let refuse = |reason: String| {
        Err(SpecError::invalid(format!("{FIELD}.userns_options.{member}"), reason))
    };
    let [mapping] = mappings else {
        return refuse(format!("{} mappings, and there must be exactly one", mappings.len()));
    };
    if mapping.container_id != 0 {
        return refuse(format!("the mapping starts at {}, not at root", mapping.container_id));
    }
    // 2^32 - 1 is "no id" and can be mapped on neither side (user_namespaces(7)).
    if mapping.length == 0 || mapping.host_id.checked_add(mapping.length).is_none() {
        let IdMapping { host_id, length, .. } = mapping;
        return refuse(format!("{length} ids from {host_id} wrap or are none"));
    }
    Ok(IdRun { first: mapping.host_id, count: mapping.length })
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_cri_proto::v1::{
        LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption, UserNamespace,
    };

    fn pod(mode: NamespaceMode, maps: &[(u32, u32, u32)]) -> PodSandboxConfig {
        let maps: Vec<_> = maps
            .iter()
            .map(|&(container_id, host_id, length)| IdMapping { host_id, container_id, length })
            .collect();
        let user = UserNamespace { mode: mode.into(), uids: maps.clone(), gids: maps };
        with(NamespaceOption {
            pid: NamespaceMode::Container.into(),
            userns_options: Some(user),
            ..Default::default()
        })
    }

    fn with(options: NamespaceOption) -> PodSandboxConfig {
        let security =
            LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        let linux =
            LinuxPodSandboxConfig { security_context: Some(security), ..Default::default() };
        PodSandboxConfig { linux: Some(linux), ..Default::default() }
    }

    #[test]
    fn one_run_from_root_is_a_user_namespace() {
        let ids = user_namespace(&pod(NamespaceMode::Pod, &[(0, 65536, 65536)])).unwrap().unwrap();
        assert_eq!(ids.uids, IdRun { first: 65536, count: 65536 });
        assert_eq!(user_namespace(&pod(NamespaceMode::Node, &[])).unwrap(), None);
        assert_eq!(user_namespace(&PodSandboxConfig::default()).unwrap(), None);
    }

    #[test]
    fn what_kubelet_never_sends_is_refused() {
        for maps in [
            vec![],
            vec![(0, 1000, 10), (10, 5000, 10)],
            vec![(1, 1000, 10)],
            vec![(0, 1000, 0)],
            vec![(0, u32::MAX, 1)],
            vec![(0, 1, u32::MAX)],
        ] {
            let error = user_namespace(&pod(NamespaceMode::Pod, &maps)).unwrap_err();
            assert!(error.field.contains("userns_options"), "{maps:?}: {error}");
        }
        for mode in [NamespaceMode::Container, NamespaceMode::Target] {
            assert!(user_namespace(&pod(mode, &[(0, 1000, 10)])).is_err());
        }
        assert!(user_namespace(&pod(NamespaceMode::Node, &[(0, 1000, 10)])).is_err());
    }

    #[test]
    fn the_node_s_ipc_and_pids_are_out_of_reach_its_network_is_not() {
        let base = pod(NamespaceMode::Pod, &[(0, 1000, 10)]);
        let options = base.linux.unwrap().security_context.unwrap().namespace_options.unwrap();
        let node = i32::from(NamespaceMode::Node);
        for options in [
            NamespaceOption { ipc: node, ..options.clone() },
            NamespaceOption { pid: node, ..options.clone() },
        ] {
            assert!(user_namespace(&with(options)).is_err());
        }
        let network = NamespaceOption { network: node, ..options };
        assert!(user_namespace(&with(network)).unwrap().is_some());
    }
}
