//! Which namespaces the container joins, makes or shares with the host.
//!
//! A namespace the pod should own but whose file is not at hand is an error: leaving the
//! entry out would put the container into the host's namespace.

use crate::error::SpecError;
use crate::inputs::PodNamespaces;
use oci_spec::OciSpecError;
use oci_spec::runtime::{
    LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespace, LinuxNamespaceBuilder,
    LinuxNamespaceType as Type,
};
use pinion_cri_proto::v1::{IdMapping, NamespaceMode, NamespaceOption};
use std::path::{Path, PathBuf};

const FIELD: &str = "linux.security_context.namespace_options";
const POD_FIELD: &str = "sandbox.linux.security_context.namespace_options";

/// The modes of one request, checked against the pod's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Modes {
    pub(crate) host_network: bool,
    pub(crate) host_ipc: bool,
    pub(crate) pid: NamespaceMode,
    /// The pod has its own user namespace.
    pub(crate) user: bool,
}

/// Reads the modes. Network, IPC and user namespaces are the pod's, PID is the container's
/// choice; kubelet sends the same options in both.
pub(crate) fn modes(
    container: Option<&NamespaceOption>,
    pod: Option<&NamespaceOption>,
) -> Result<Modes, SpecError> {
    let none = NamespaceOption::default();
    let pod_options = pod.unwrap_or(&none);
    let own = container.unwrap_or(pod_options);
    let host = |value: i32, member: &str| match NamespaceMode::try_from(value) {
        Ok(NamespaceMode::Pod) => Ok(false),
        Ok(NamespaceMode::Node) => Ok(true),
        // containerd reads CONTAINER as POD here, and clients rely on it.
        Ok(NamespaceMode::Container) => Ok(false),
        Ok(NamespaceMode::Target) | Err(_) => {
            Err(SpecError::invalid(format!("{POD_FIELD}.{member}"), "must be POD or NODE"))
        }
    };
    let pid = NamespaceMode::try_from(own.pid)
        .map_err(|_unknown| SpecError::invalid(format!("{FIELD}.pid"), "unknown mode"))?;
    let user_mode = |options: &NamespaceOption| {
        let mode = options.userns_options.as_ref().map_or(NamespaceMode::Node.into(), |u| u.mode);
        match NamespaceMode::try_from(mode) {
            Ok(NamespaceMode::Node) => Ok(false),
            Ok(NamespaceMode::Pod) => Ok(true),
            _ => Err(SpecError::invalid(
                format!("{FIELD}.userns_options.mode"),
                "must be POD or NODE",
            )),
        }
    };
    let user = user_mode(pod_options)?;
    if container.is_some() && user_mode(own)? != user {
        let reason = "differs from the pod's user namespace";
        return Err(SpecError::invalid(format!("{FIELD}.userns_options"), reason));
    }
    let ids = |options: &NamespaceOption| {
        let user = options.userns_options.clone().unwrap_or_default();
        (user.uids, user.gids)
    };
    if user && ids(own) != ids(pod_options) {
        let reason = "the ids differ from those of the pod's user namespace";
        return Err(SpecError::invalid(format!("{FIELD}.userns_options"), reason));
    }
    Ok(Modes {
        host_network: host(pod_options.network, "network")?,
        host_ipc: host(pod_options.ipc, "ipc")?,
        pid,
        user,
    })
}

/// The namespace list, in the order OCI documents them.
pub(crate) fn namespaces(
    modes: Modes,
    pod: &PodNamespaces,
    target_pid: Option<&Path>,
    cgroup: bool,
) -> Result<Vec<LinuxNamespace>, SpecError> {
    let lost = |member: &str, what: &str| {
        SpecError::unavailable(format!("{FIELD}.{member}"), format!("the {what} is gone"))
    };
    let mut list = vec![(Type::Mount, None)];
    match modes.pid {
        NamespaceMode::Container => list.push((Type::Pid, None)),
        NamespaceMode::Pod => {
            let path = pod.pid.clone().ok_or_else(|| lost("pid", "pod's PID namespace"))?;
            list.push((Type::Pid, Some(path)));
        }
        NamespaceMode::Target => {
            let path = target_pid.ok_or_else(|| lost("target_id", "target container"))?;
            list.push((Type::Pid, Some(path.to_owned())));
        }
        NamespaceMode::Node => {}
    }
    if !modes.host_network {
        let path = pod.net.clone().ok_or_else(|| lost("network", "pod's network namespace"))?;
        list.push((Type::Network, Some(path)));
        let path = pod.uts.clone().ok_or_else(|| lost("network", "pod's UTS namespace"))?;
        list.push((Type::Uts, Some(path)));
    }
    if !modes.host_ipc {
        let path = pod.ipc.clone().ok_or_else(|| lost("ipc", "pod's IPC namespace"))?;
        list.push((Type::Ipc, Some(path)));
    }
    if cgroup {
        list.push((Type::Cgroup, None));
    }
    if modes.user {
        let path = pod.user.clone().ok_or_else(|| {
            SpecError::unavailable(
                format!("{FIELD}.userns_options"),
                "this pod has no user namespace of its own",
            )
        })?;
        list.push((Type::User, Some(path)));
    }
    list.into_iter()
        .map(|(kind, path)| entry(kind, path))
        .collect::<Result<_, _>>()
        .map_err(|error| SpecError::invalid(FIELD, error.to_string()))
}

fn entry(kind: Type, path: Option<PathBuf>) -> Result<LinuxNamespace, OciSpecError> {
    let mut namespace = LinuxNamespaceBuilder::default().typ(kind);
    if let Some(path) = path {
        namespace = namespace.path(path);
    }
    namespace.build()
}

/// CRI id mappings in OCI form; refuses empty, wrapping and overlapping ranges.
pub(crate) fn mappings(list: &[IdMapping], field: &str) -> Result<Vec<LinuxIdMapping>, SpecError> {
    let mut ranges = Vec::with_capacity(list.len());
    for (index, map) in list.iter().enumerate() {
        let end = |start: u32| start.checked_add(map.length).filter(|_| map.length > 0);
        let (Some(inside), Some(outside)) = (end(map.container_id), end(map.host_id)) else {
            let reason = format!("{} ids from {} wrap or are none", map.length, map.host_id);
            return Err(SpecError::invalid(format!("{field}[{index}]"), reason));
        };
        let (inside, outside) = (map.container_id..inside, map.host_id..outside);
        let overlaps = ranges.iter().any(|(other_in, other_out)| {
            crosses(&inside, other_in) || crosses(&outside, other_out)
        });
        if overlaps {
            return Err(SpecError::invalid(format!("{field}[{index}]"), "overlaps another range"));
        }
        ranges.push((inside, outside));
    }
    list.iter()
        .map(|map| {
            LinuxIdMappingBuilder::default()
                .host_id(map.host_id)
                .container_id(map.container_id)
                .size(map.length)
                .build()
        })
        .collect::<Result<_, _>>()
        .map_err(|error: OciSpecError| SpecError::invalid(field, error.to_string()))
}

fn crosses(a: &std::ops::Range<u32>, b: &std::ops::Range<u32>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_cri_proto::v1::UserNamespace;

    fn pod() -> PodNamespaces {
        let at = |name: &str| Some(PathBuf::from(format!("/pod/ns/{name}")));
        PodNamespaces { net: at("net"), ipc: at("ipc"), uts: at("uts"), pid: at("pid"), user: None }
    }

    fn options(network: NamespaceMode, pid: NamespaceMode, ipc: NamespaceMode) -> NamespaceOption {
        NamespaceOption {
            network: network.into(),
            pid: pid.into(),
            ipc: ipc.into(),
            ..Default::default()
        }
    }

    fn kinds(options: &NamespaceOption, target: Option<&Path>) -> Vec<(String, Option<PathBuf>)> {
        let modes = modes(Some(options), Some(options)).unwrap();
        let list = namespaces(modes, &pod(), target, false).unwrap();
        list.iter().map(|ns| (ns.typ().to_string(), ns.path().clone())).collect()
    }

    #[test]
    fn a_plain_pod_joins_the_pod_s_and_makes_mount_and_pid() {
        let list =
            kinds(&options(NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Pod), None);
        let names: Vec<_> =
            list.iter().map(|(kind, path)| (kind.as_str(), path.is_some())).collect();
        let expected =
            [("mnt", false), ("pid", false), ("net", true), ("uts", true), ("ipc", true)];
        assert_eq!(names, expected);
    }

    #[test]
    fn host_modes_leave_the_entry_out() {
        let list =
            kinds(&options(NamespaceMode::Node, NamespaceMode::Node, NamespaceMode::Node), None);
        assert_eq!(list.len(), 1, "only the mount namespace is left: {list:?}");
    }

    #[test]
    fn pid_can_be_the_pod_s_or_a_target_s() {
        let path = |mode, target| {
            kinds(&options(NamespaceMode::Pod, mode, NamespaceMode::Pod), target)[1].1.clone()
        };
        assert_eq!(path(NamespaceMode::Pod, None), pod().pid);
        let target = Path::new("/proc/7/ns/pid");
        assert_eq!(path(NamespaceMode::Target, Some(target)).as_deref(), Some(target));
    }

    #[test]
    fn a_lost_namespace_never_becomes_the_host_s() {
        let asked = options(NamespaceMode::Pod, NamespaceMode::Pod, NamespaceMode::Pod);
        let modes = modes(Some(&asked), Some(&asked)).unwrap();
        for lose in [
            (|pod: &mut PodNamespaces| pod.net = None) as fn(&mut PodNamespaces),
            |pod| pod.ipc = None,
            |pod| pod.uts = None,
            |pod| pod.pid = None,
        ] {
            let mut pod = pod();
            lose(&mut pod);
            assert!(namespaces(modes, &pod, None, false).is_err(), "{pod:?}");
        }
        let target = options(NamespaceMode::Pod, NamespaceMode::Target, NamespaceMode::Pod);
        let target = super::modes(Some(&target), Some(&target)).unwrap();
        assert!(namespaces(target, &pod(), None, false).is_err());
    }

    #[test]
    fn the_pod_decides_about_the_network_and_absent_options_are_the_pod_s() {
        let pod = options(NamespaceMode::Node, NamespaceMode::Container, NamespaceMode::Pod);
        let container = options(NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Pod);
        assert!(modes(Some(&container), Some(&pod)).unwrap().host_network);
        assert_eq!(modes(None, Some(&pod)).unwrap().pid, NamespaceMode::Container);
        assert_eq!(modes(None, None).unwrap().pid, NamespaceMode::Pod);
    }

    #[test]
    fn user_namespaces_must_agree_and_exist() {
        let mut own = options(NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Pod);
        let plain = own.clone();
        own.userns_options =
            Some(UserNamespace { mode: NamespaceMode::Pod.into(), ..Default::default() });
        assert!(modes(Some(&own), Some(&plain)).is_err());
        let agreed = modes(Some(&own), Some(&own)).unwrap();
        assert!(namespaces(agreed, &pod(), None, false).unwrap_err().field.contains("userns"));
        own.userns_options.as_mut().unwrap().mode = NamespaceMode::Target.into();
        assert!(modes(Some(&own), Some(&own)).is_err());
    }

    #[test]
    fn id_mappings_are_checked() {
        let map = |container_id, host_id, length| IdMapping { host_id, container_id, length };
        assert_eq!(mappings(&[map(0, 65536, 65536)], "f").unwrap()[0].size(), 65536);
        for bad in [
            vec![map(0, 1, 0)],
            vec![map(0, u32::MAX, 2)],
            vec![map(0, 100, 10), map(5, 200, 10)],
            vec![map(0, 100, 10), map(10, 105, 10)],
        ] {
            assert!(mappings(&bad, "f").is_err(), "{bad:?}");
        }
    }
}
