//! The device nodes of a container, decided.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};

use crate::error::{Error, Result};
use crate::process::clean;

/// One node to create below `/dev`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceNode {
    /// Relative to `/dev`.
    pub path: PathBuf,
    /// `S_IFCHR`, `S_IFBLK` or `S_IFIFO`.
    pub file_type: u32,
    /// Device numbers; zero for a FIFO.
    pub major: u32,
    /// See `major`.
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner inside the container.
    pub uid: u32,
    /// Group inside the container.
    pub gid: u32,
}

/// runtime-spec, "Default Devices": name and minor number; all are major 1 but tty.
const DEFAULT: &[(&str, u32, u32)] = &[
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// Symlinks every container gets in `/dev`: name, target.
pub const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// The default nodes followed by those of the configuration, which win.
///
/// # Errors
/// [`Error::Invalid`] for a path outside `/dev` or impossible numbers.
pub fn nodes(asked: &[LinuxDevice]) -> Result<Vec<DeviceNode>> {
    let mut nodes: Vec<DeviceNode> = DEFAULT
        .iter()
        .map(|(name, major, minor)| DeviceNode {
            path: name.into(),
            file_type: libc::S_IFCHR,
            major: *major,
            minor: *minor,
            mode: 0o666,
            uid: 0,
            gid: 0,
        })
        .collect();
    for device in asked {
        let node = node(device)?;
        nodes.retain(|existing| existing.path != node.path);
        nodes.push(node);
    }
    Ok(nodes)
}

fn node(device: &LinuxDevice) -> Result<DeviceNode> {
    let bad = |why: &str| Error::Invalid(format!("device {}: {why}", device.path().display()));
    let path = clean(device.path());
    let below = match path.strip_prefix("/dev") {
        Ok(below) if device.path().is_absolute() && !below.as_os_str().is_empty() => below,
        _ => return Err(bad("its path must be below /dev")),
    };
    let file_type = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => libc::S_IFCHR,
        LinuxDeviceType::B => libc::S_IFBLK,
        LinuxDeviceType::P => libc::S_IFIFO,
        LinuxDeviceType::A => return Err(bad("type \"a\" is only for cgroup rules")),
    };
    let number = |n: i64, bits: u32| match u32::try_from(n) {
        Ok(n) if file_type == libc::S_IFIFO || n < 1 << bits => Ok(n),
        _ => Err(bad("its numbers are out of range")),
    };
    Ok(DeviceNode {
        path: below.to_owned(),
        file_type,
        major: number(device.major(), 12)?,
        minor: number(device.minor(), 20)?,
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

/// True when the container's `/dev` comes from the host and must be left alone.
#[must_use]
pub fn dev_is_foreign(mounts: &[crate::mounts::MountPlan]) -> bool {
    mounts.iter().any(|mount| {
        mount.destination == Path::new("/dev")
            && matches!(mount.kind, crate::mounts::MountKind::Bind { .. })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(path: &str, typ: &str, major: i64, minor: i64) -> Result<DeviceNode> {
        let json = serde_json::json!({"path": path, "type": typ, "major": major, "minor": minor});
        node(&serde_json::from_value(json).unwrap())
    }

    #[test]
    fn nodes_outside_dev_and_impossible_numbers_are_refused() {
        for (path, typ, major, minor) in [
            ("/dev/../etc/x", "c", 1, 3),
            ("/devil", "c", 1, 3),
            ("/dev", "c", 1, 3),
            ("dev/x", "c", 1, 3),
            ("/dev/x", "a", 1, 3),
            ("/dev/x", "c", 1, 1 << 33),
            ("/dev/x", "c", -1, 3),
        ] {
            assert!(device(path, typ, major, minor).is_err(), "{path} {typ} {major} {minor}");
        }
        assert_eq!(device("/dev/bus//usb/1", "b", 8, 0).unwrap().path, Path::new("bus/usb/1"));
    }

    #[test]
    fn a_configured_device_replaces_the_default_of_that_name() {
        let json = r#"{"path":"/dev/null","type":"c","major":1,"minor":3,"fileMode":384}"#;
        let nodes = nodes(&[serde_json::from_str(json).unwrap()]).unwrap();
        let nulls: Vec<_> = nodes.iter().filter(|n| n.path == Path::new("null")).collect();
        assert_eq!((nulls.len(), nulls[0].mode), (1, 0o600));
    }
}
