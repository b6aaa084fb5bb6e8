//! Device nodes and the rules that let the container use them.
//!
//! The list starts with "deny all"; the runtime adds what every container may use (null,
//! zero, full, random, urandom, tty, the pty devices).

use crate::error::SpecError;
use crate::facts::{DeviceNode, HostPaths};
use oci_spec::OciSpecError;
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
};
use pinion_cri_proto::v1;
use std::path::{Path, PathBuf};

/// Nodes to make and rules to load, in order.
#[derive(Debug)]
pub(crate) struct Devices {
    pub(crate) nodes: Vec<LinuxDevice>,
    pub(crate) rules: Vec<LinuxDeviceCgroup>,
}

/// Devices of a container: all of the host's when privileged, plus what CRI lists.
pub(crate) fn devices(
    asked: &[v1::Device],
    privileged: bool,
    paths: &HostPaths,
) -> Result<Devices, SpecError> {
    let mut nodes: Vec<LinuxDevice> = Vec::new();
    let mut rules = vec![rule(privileged, None, "rwm").map_err(internal)?];
    if privileged {
        for device in &paths.all_devices {
            nodes.push(node(device, device.path.clone()).map_err(internal)?);
        }
    }
    for (index, device) in asked.iter().enumerate() {
        let field = |member: &str| format!("devices[{index}].{member}");
        let access = access(&device.permissions, &field("permissions"))?;
        let root = if device.container_path.is_empty() {
            &device.host_path
        } else {
            &device.container_path
        };
        let root = inside_dev(root, &field("container_path"))?;
        let Some(found) = paths.devices.get(&device.host_path) else {
            let reason = format!("{:?} is not there", device.host_path);
            return Err(SpecError::unavailable(field("host_path"), reason));
        };
        for (below, facts) in found {
            let at = if below.as_os_str().is_empty() { root.clone() } else { root.join(below) };
            nodes.retain(|old| *old.path() != at);
            nodes.push(node(facts, at).map_err(internal)?);
            if !privileged {
                rules.push(rule(true, Some(facts), &access).map_err(internal)?);
            }
        }
    }
    Ok(Devices { nodes, rules })
}

#[allow(clippy::needless_pass_by_value, reason = "used as map_err's function")]
fn internal(error: OciSpecError) -> SpecError {
    SpecError::invalid("devices", error.to_string())
}

/// `r`, `w`, `m` in any order, each once; nothing means all.
fn access(text: &str, field: &str) -> Result<String, SpecError> {
    let ordered: String = "rwm".chars().filter(|letter| text.contains(*letter)).collect();
    match text {
        "" => Ok("rwm".to_owned()),
        _ if ordered.len() == text.len() => Ok(ordered),
        _ => Err(SpecError::invalid(field, format!("{text:?} is not made of r, w and m"))),
    }
}

/// A device's place is a path below `/dev` without detours.
fn inside_dev(path: &str, field: &str) -> Result<PathBuf, SpecError> {
    let below = path.strip_prefix("/dev/").unwrap_or_default().trim_end_matches('/');
    let odd = below.split('/').any(|part| matches!(part, "" | "." | ".."));
    if odd || path.contains('\0') {
        return Err(SpecError::invalid(field, format!("{path:?} is not a path below /dev")));
    }
    Ok(Path::new("/dev").join(below))
}

fn node(device: &DeviceNode, at: PathBuf) -> Result<LinuxDevice, OciSpecError> {
    LinuxDeviceBuilder::default()
        .path(at)
        .typ(device.kind)
        .major(device.major)
        .minor(device.minor)
        .file_mode(device.mode)
        .uid(device.uid)
        .gid(device.gid)
        .build()
}

fn rule(
    allow: bool,
    device: Option<&DeviceNode>,
    access: &str,
) -> Result<LinuxDeviceCgroup, OciSpecError> {
    let rule = LinuxDeviceCgroupBuilder::default().allow(allow).access(access);
    match device {
        None => rule.typ(LinuxDeviceType::A),
        Some(device) => rule.typ(device.kind).major(device.major).minor(device.minor),
    }
    .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vfio(name: &str, minor: u32) -> DeviceNode {
        DeviceNode {
            path: format!("/dev/vfio/{name}").into(),
            kind: LinuxDeviceType::C,
            major: 10,
            minor,
            mode: 0o600,
            uid: 0,
            gid: 0,
        }
    }

    fn paths() -> HostPaths {
        let mut paths = HostPaths::default();
        paths.devices.insert("/dev/vfio/7".into(), vec![(PathBuf::new(), vfio("7", 7))]);
        let all = vec![("7".into(), vfio("7", 7)), ("vfio".into(), vfio("vfio", 196))];
        paths.devices.insert("/dev/vfio".into(), all);
        paths.all_devices = vec![vfio("7", 7)];
        paths
    }

    fn ask(container: &str, host: &str, permissions: &str) -> v1::Device {
        v1::Device {
            container_path: container.into(),
            host_path: host.into(),
            permissions: permissions.into(),
        }
    }

    fn rules(devices: &Devices) -> Vec<String> {
        let line = |rule: &LinuxDeviceCgroup| format!("{} {rule}", rule.allow());
        devices.rules.iter().map(line).collect()
    }

    #[test]
    fn everything_is_denied_except_what_was_asked() {
        let found = devices(&[ask("/dev/mine", "/dev/vfio/7", "wr")], false, &paths()).unwrap();
        assert_eq!(rules(&found), ["false a *:* rwm", "true c 10:7 rw"]);
        assert_eq!(found.nodes[0].path(), Path::new("/dev/mine"));
    }

    #[test]
    fn a_directory_stands_for_all_devices_below_it() {
        let found = devices(&[ask("", "/dev/vfio", "")], false, &paths()).unwrap();
        let at: Vec<_> = found.nodes.iter().map(|node| node.path().to_str().unwrap()).collect();
        assert_eq!(at, ["/dev/vfio/7", "/dev/vfio/vfio"]);
        assert_eq!(found.rules.len(), 3);
    }

    #[test]
    fn privileged_means_every_device_and_one_rule() {
        let found = devices(&[ask("", "/dev/vfio/7", "r")], true, &paths()).unwrap();
        assert_eq!(rules(&found), ["true a *:* rwm"]);
        assert_eq!(found.nodes.len(), 1, "the same place is not listed twice");
    }

    #[test]
    fn odd_places_permissions_and_absent_devices_are_refused() {
        for (container, host, permissions, field) in [
            ("/dev/../etc/x", "/dev/vfio/7", "r", "container_path"),
            ("/devil", "/dev/vfio/7", "r", "container_path"),
            ("/dev", "/dev/vfio/7", "r", "container_path"),
            ("/dev//x", "/dev/vfio/7", "r", "container_path"),
            ("/dev/x", "/dev/vfio/7", "rx", "permissions"),
            ("/dev/x", "/dev/vfio/7", "rr", "permissions"),
            ("/dev/x", "/dev/none", "r", "host_path"),
        ] {
            let error = devices(&[ask(container, host, permissions)], false, &paths()).unwrap_err();
            assert_eq!(error.field, format!("devices[0].{field}"), "{container} {permissions}");
        }
    }
}
