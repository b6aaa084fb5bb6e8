//! The container's view of its cgroups, for mounts of type `cgroup`.
//!
//! With a cgroup namespace the kernel shows the container's cgroup as the root; without one
//! the container's own directories are bound, so that it never sees those of others.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use pinion_cgroup::Mode;
use rustix::fs::Mode as Permissions;

use super::{CgroupSource, attach};
use crate::error::{Doing, Failure};
use crate::mount_options::MountOptions;

/// Mounts the view onto `target`.
///
/// # Errors
/// Names the hierarchy and the call that failed.
pub(crate) fn mount(
    cgroups: &CgroupSource<'_>,
    target: BorrowedFd<'_>,
    options: &MountOptions,
) -> Result<(), Failure> {
    let options = MountOptions { data: Vec::new(), superblock: Vec::new(), ..options.clone() };
    match cgroups.hierarchies.mode() {
        Mode::V2 => mount_v2(cgroups, target, &options),
        Mode::Hybrid | Mode::V1 => mount_v1(cgroups, target, &options),
    }
}

fn mount_v2(
    cgroups: &CgroupSource<'_>,
    target: BorrowedFd<'_>,
    options: &MountOptions,
) -> Result<(), Failure> {
    if cgroups.namespaced {
        match attach::detached_filesystem("cgroup2", "cgroup", options) {
            Ok(mount) => {
                attach::place(mount.as_fd(), target).doing(|| "move_mount".into())?;
                return attach::set_propagation(mount.as_fd(), &options.propagation);
            }
            Err(failure) if failure.errno() == Some(libc::ENOSYS) => {
                return attach::filesystem_by_path("cgroup2", "cgroup", options, target);
            }
            // A user namespace that does not own the cgroup namespace; bind instead.
            Err(failure) if failure.errno() == Some(libc::EPERM) => {}
            Err(failure) => return Err(failure),
        }
    }
    let own = cgroups.paths.unified.as_deref();
    let own = own.ok_or_else(|| Failure::refused("the container has no cgroup to show"))?;
    bind_directory(own, target, options)
}

fn mount_v1(
    cgroups: &CgroupSource<'_>,
    target: BorrowedFd<'_>,
    options: &MountOptions,
) -> Result<(), Failure> {
    let mut shell = options.clone();
    shell.attributes.set &= !libc::MOUNT_ATTR_RDONLY;
    shell.recursive = Default::default();
    shell.data = vec!["mode=755".into()];
    let tmpfs = attach::detached_filesystem("tmpfs", "tmpfs", &shell)?;
    attach::place(tmpfs.as_fd(), target).doing(|| "move_mount".into())?;
    for (name, (controllers, own)) in by_hierarchy(cgroups) {
        let path = Path::new(&name);
        rustix::fs::mkdirat(&tmpfs, path, Permissions::from_raw_mode(0o755))
            .doing(|| format!("mkdir {name}"))?;
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let place = rustix::fs::openat(&tmpfs, path, flags, Permissions::empty())
            .doing(|| format!("open {name}"))?;
        if cgroups.namespaced {
            mount_controllers(&controllers, place.as_fd(), options)?;
        } else {
            bind_directory(&own, place.as_fd(), options)?;
        }
        for alias in controllers.iter().filter(|c| controllers.len() > 1 && **c != name) {
            rustix::fs::symlinkat(path, &tmpfs, Path::new(alias))
                .doing(|| format!("symlink {alias}"))?;
        }
    }
    let whole = MountOptions { attributes: options.attributes, ..MountOptions::default() };
    let request = pinion_sys::mount::MountAttributes {
        set: whole.attributes.set,
        clear: whole.attributes.clear,
        ..Default::default()
    };
    pinion_sys::mount::set_attributes(tmpfs.as_fd(), c"", false, &request)
        .doing(|| "mount_setattr".into())?;
    attach::set_propagation(tmpfs.as_fd(), &options.propagation)
}

/// Directory name of each v1 hierarchy → its controllers and the container's directory.
fn by_hierarchy(cgroups: &CgroupSource<'_>) -> BTreeMap<String, (Vec<String>, PathBuf)> {
    let mut hierarchies = BTreeMap::new();
    for (controller, own) in &cgroups.paths.v1 {
        let root = cgroups.hierarchies.v1_root(controller);
        let Some(name) = root.as_deref().and_then(Path::file_name) else { continue };
        hierarchies
            .entry(name.to_string_lossy().into_owned())
            .or_insert_with(|| (Vec::new(), own.clone()))
            .0
            .push(controller.clone());
    }
    hierarchies
}

fn mount_controllers(
    controllers: &[String],
    target: BorrowedFd<'_>,
    options: &MountOptions,
) -> Result<(), Failure> {
    let mut options = options.clone();
    options.data = controllers.to_vec();
    if controllers.iter().any(|controller| controller.starts_with("name=")) {
        options.data.push("none".into());
    }
    let mount = attach::detached_filesystem("cgroup", "cgroup", &options)?;
    attach::place(mount.as_fd(), target).doing(|| "move_mount".into())
}

fn bind_directory(
    source: &Path,
    target: BorrowedFd<'_>,
    options: &MountOptions,
) -> Result<(), Failure> {
    let source = attach::open_path(source)?;
    attach::bind(source.as_fd(), target, true, options).map(drop)
}
