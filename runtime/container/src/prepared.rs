//! Mount sources that are opened and copied on the host, before the process is in a user
//! namespace that may not go there.
//!
//! Such a copy is made in the host's mount namespace, so it starts as a peer of what it was
//! copied from. It is cut off before the container sees it: else the container's own mounts
//! below it (its cgroups below a bound `/sys`) would appear on the host.

use std::os::fd::{AsFd, OwnedFd};

use oci_spec::runtime::LinuxNamespaceType;
use pinion_sys::mount::{MountAttributes, set_attributes};

use crate::error::{Doing, Error, Failure, Result};
use crate::launch;
use crate::mounts::MountKind;
use crate::namespaces::{Mappings, Namespaces};
use crate::plan::Plan;

/// A detached copy of the root for a process that will be root in a user namespace only: the
/// directories above it are closed to such a one.
pub(crate) fn root(plan: &Plan) -> Result<Option<OwnedFd>> {
    if !plan.namespaces.has(LinuxNamespaceType::User) {
        return Ok(None);
    }
    let path = &plan.root.path;
    let opened = crate::rootfs::open_source(path)?;
    match crate::rootfs::copy_of(opened.as_fd(), true) {
        Ok(tree) => Ok(cut_off(tree)?),
        // Without the right to mount here, or without the call, the process tries itself.
        Err(rustix::io::Errno::PERM | rustix::io::Errno::NOSYS) => Ok(None),
        Err(error) => Ok(Err(error).doing(|| format!("open_tree {}", path.display()))?),
    }
}

/// Cuts a tree copied here off from the host: a copy of a shared mount is its peer, and what
/// the container mounts on one would appear on the other. The kernel does the same with
/// everything that a new user namespace gets to see. `None` before Linux 5.12, where the
/// process has to open what it can.
fn cut_off(tree: OwnedFd) -> Result<Option<OwnedFd>, Failure> {
    let slave = MountAttributes { propagation: libc::MS_SLAVE, ..Default::default() };
    match set_attributes(tree.as_fd(), c"", true, &slave) {
        Ok(()) => Ok(Some(tree)),
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(None),
        Err(error) => Err(error).doing(|| "cut the tree off from the host".into()),
    }
}

/// Opens the sources of bind mounts that the process itself could not open or change: those
/// with an id mapping, and all of them where it will be root in a user namespace only.
pub(crate) fn sources(plan: &Plan) -> Result<Vec<Option<OwnedFd>>> {
    let in_user_namespace = plan.namespaces.has(LinuxNamespaceType::User);
    plan.mounts
        .iter()
        .map(|mount| {
            let MountKind::Bind { source } = &mount.kind else { return Ok(None) };
            if !in_user_namespace && mount.options.idmap.is_none() && mount.mappings.is_none() {
                return Ok(None);
            }
            let what = |failure: Failure| Failure {
                what: format!("prepare the mount source {}: {}", source.display(), failure.what),
                ..failure
            };
            let opened = crate::rootfs::open_source(source).map_err(what)?;
            let recursive = mount.options.bind.unwrap_or(true);
            let mapped = mount.options.idmap.is_some() || mount.mappings.is_some();
            let tree = match crate::rootfs::copy_of(opened.as_fd(), recursive) {
                // A plain user, who can open inside whatever can be opened here.
                Err(rustix::io::Errno::PERM) if !plan.privileged && !mapped => return Ok(None),
                other => other.doing(|| "open_tree".into()).map_err(what)?,
            };
            let tree = if in_user_namespace || !plan.root.reaches_host() {
                let Some(tree) = cut_off(tree).map_err(what)? else { return Ok(None) };
                tree
            } else {
                tree
            };
            if mapped {
                let mappings = mapping_of(mount.mappings.as_ref(), &plan.namespaces)?;
                let recursive = mount.options.idmap == Some(true);
                map_tree(&tree, mappings, recursive).map_err(what)?;
            }
            Ok(Some(tree))
        })
        .collect()
}

fn mapping_of<'a>(own: Option<&'a Mappings>, namespaces: &'a Namespaces) -> Result<&'a Mappings> {
    own.or(namespaces.mappings.as_ref()).ok_or_else(|| {
        Error::Invalid(
            "an id-mapped mount needs mappings of its own or a new user namespace".into(),
        )
    })
}

fn map_tree(tree: &OwnedFd, mappings: &Mappings, recursive: bool) -> Result<(), Failure> {
    let namespace = launch::user_namespace(mappings)?;
    let request = MountAttributes { idmap: Some(namespace.as_fd()), ..Default::default() };
    set_attributes(tree.as_fd(), c"", recursive, &request)
        .doing(|| "map ids (MOUNT_ATTR_IDMAP)".into())
}
