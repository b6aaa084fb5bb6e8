//! What a container has of the outside: CRIU neither writes nor makes it, but is told by
//! which name a dump refers to it and what that name stands for at the restore.

use std::os::fd::OwnedFd;
use std::path::Path;

use oci_spec::runtime::LinuxNamespaceType;
use pinion_cgroup::{CgroupPaths, Hierarchies, Mode};

use crate::config::Spec;
use crate::error::{Failure, Result};
use crate::mounts::{MountKind, MountPlan};
use crate::plan::Plan;
use crate::rootfs::{Root, open_path};

/// Namespaces CRIU takes from descriptors: the type, the word in the dump's `external`
/// option, and runc's name for the descriptor.
pub(super) const BY_DESCRIPTOR: [(LinuxNamespaceType, &str, &str); 2] = [
    (LinuxNamespaceType::Network, "net", "extRootNetNS"),
    (LinuxNamespaceType::Pid, "pid", "extRootPidNS"),
];

/// Namespaces CRIU joins by path: the type and CRIU's word.
pub(super) const BY_PATH: [(LinuxNamespaceType, &str); 5] = [
    (LinuxNamespaceType::Mount, "mnt"),
    (LinuxNamespaceType::Ipc, "ipc"),
    (LinuxNamespaceType::Uts, "uts"),
    (LinuxNamespaceType::User, "user"),
    (LinuxNamespaceType::Time, "time"),
];

/// The root file system as the host sees it, to resolve mountpoints in.
pub(super) struct Outside {
    root: Root,
    prefix: String,
}

impl Outside {
    pub(super) fn of(rootfs: &Path) -> Result<Self, Failure> {
        let real = rootfs.canonicalize().unwrap_or_else(|_gone| rootfs.to_owned());
        Ok(Self { root: Root::new(open_path(&real)?), prefix: real.to_string_lossy().into_owned() })
    }

    /// Where `destination` really is, links of the image followed: the mountpoint's path in
    /// the container.
    fn resolve(&self, destination: &Path) -> String {
        let place = self.root.find(destination).ok().and_then(|fd| self.path_of(&fd));
        place.unwrap_or_else(|| destination.to_string_lossy().into_owned())
    }

    fn path_of(&self, fd: &OwnedFd) -> Option<String> {
        use std::os::fd::AsFd;
        let path = std::fs::read_link(pinion_sys::fd::proc_path(fd.as_fd())).ok()?;
        let path = path.to_string_lossy().into_owned();
        let inside = path.strip_prefix(&self.prefix)?;
        inside.starts_with('/').then(|| inside.to_owned())
    }
}

/// The external mounts at the dump: each stands for itself.
pub(super) fn at_dump(
    plan: &Plan,
    spec: &Spec,
    outside: &Outside,
    cgroups: (&Hierarchies, &CgroupPaths),
    pid: i32,
) -> Vec<(String, String)> {
    let mut mounts: Vec<_> = bound(plan, outside)
        .map(|(place, _)| (place.clone(), place))
        .chain(cgroup_binds(plan, outside, cgroups).into_iter().map(|(key, _)| (key.clone(), key)))
        .collect();
    for path in &plan.masked {
        let seen = format!("/proc/{pid}/root{}", path.display());
        let masked_file = std::fs::metadata(seen).is_ok_and(|meta| !meta.is_dir());
        if masked_file {
            mounts.push((path.to_string_lossy().into_owned(), "/dev/null".into()));
        }
    }
    mounts.extend(devices(spec));
    mounts
}

/// The external mounts at the restore: what each name of the dump stands for now.
pub(super) fn at_restore(
    plan: &Plan,
    spec: &Spec,
    outside: &Outside,
    cgroups: (&Hierarchies, &CgroupPaths),
) -> Vec<(String, String)> {
    let mut mounts: Vec<_> =
        bound(plan, outside).chain(cgroup_binds(plan, outside, cgroups)).collect();
    if !plan.masked.is_empty() {
        mounts.push(("/dev/null".into(), "/dev/null".into()));
    }
    mounts.extend(devices(spec));
    mounts
}

fn bound<'a>(plan: &'a Plan, outside: &'a Outside) -> impl Iterator<Item = (String, String)> + 'a {
    plan.mounts.iter().filter_map(|mount| match &mount.kind {
        MountKind::Bind { source } => {
            let source = source.to_string_lossy().into_owned();
            Some((outside.resolve(&mount.destination), source))
        }
        _ => None,
    })
}

/// In a user namespace device nodes are bind mounts of the host's.
fn devices(spec: &Spec) -> Vec<(String, String)> {
    let asked = spec.linux.as_ref().and_then(|linux| linux.devices().clone()).unwrap_or_default();
    let asked = asked.iter().map(|device| device.path().to_string_lossy().into_owned());
    let standard = ["null", "zero", "full", "random", "urandom", "tty"];
    let standard = standard.iter().map(|name| format!("/dev/{name}"));
    asked.chain(standard).map(|path| (path.clone(), path)).collect()
}

/// Without a cgroup namespace, and on v1, the container sees its own directories through
/// bind mounts below the mountpoint.
fn cgroup_binds(
    plan: &Plan,
    outside: &Outside,
    (hierarchies, paths): (&Hierarchies, &CgroupPaths),
) -> Vec<(String, String)> {
    if hierarchies.mode() == Mode::V2 || plan.namespaces.has(LinuxNamespaceType::Cgroup) {
        return Vec::new();
    }
    let mounts = plan.mounts.iter().filter(|mount| mount.kind == MountKind::Cgroup);
    let below = |mount: &MountPlan| {
        let place = outside.resolve(&mount.destination);
        paths.v1.iter().filter_map(move |(controller, own)| {
            let root = hierarchies.v1_root(controller)?;
            let name = root.file_name()?.to_string_lossy().into_owned();
            Some((format!("{place}/{name}"), own.to_string_lossy().into_owned()))
        })
    };
    let mut binds: Vec<_> = mounts.flat_map(below).collect();
    // Controllers that share a hierarchy share its mount.
    binds.dedup_by(|a, b| a.0 == b.0);
    binds.sort();
    binds.dedup_by(|a, b| a.0 == b.0);
    binds
}
