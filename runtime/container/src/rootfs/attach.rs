//! Making mounts and putting them in place, descriptors only.
//!
//! A mount is made detached, gets its attributes while nobody can see it, and is then moved
//! onto a descriptor of its mountpoint. Kernels or sandboxes without these calls (`ENOSYS`)
//! are served by mount(2) on `/proc/self/fd/N`, which names the same descriptor.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use pinion_sys::fd::proc_path;
use pinion_sys::mount::{MountAttributes, set_attributes};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags,
};

use crate::error::{Doing, Failure};
use crate::mount_options::{ATIME_MASK, Attributes, MountOptions};

/// A new mount, in place. The descriptor is its root, whatever is mounted over it later.
pub(crate) type Mounted = OwnedFd;

/// A detached copy of the mount at `source`, with everything below when `recursive`.
///
/// # Errors
/// As open_tree(2).
pub fn copy_of(source: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(source, "", flags)
}

/// Moves a detached mount onto `target`.
///
/// # Errors
/// As move_mount(2).
pub(crate) fn place(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, "", target, "", flags)
}

/// Bind-mounts `source` onto `target` with these options.
///
/// # Errors
/// Names the call that failed.
pub fn bind(
    source: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    recursive: bool,
    options: &MountOptions,
) -> Result<Mounted, Failure> {
    match copy_of(source, recursive) {
        Ok(tree) => place_with_options(tree, target, options),
        Err(Errno::NOSYS) => bind_by_path(source, target, recursive, options),
        Err(error) => Err(error).doing(|| "open_tree".into()),
    }
}

/// Gives a detached tree its attributes, places it and sets its propagation.
///
/// # Errors
/// Names the call that failed.
pub(crate) fn place_with_options(
    tree: OwnedFd,
    target: BorrowedFd<'_>,
    options: &MountOptions,
) -> Result<Mounted, Failure> {
    match set(tree.as_fd(), options.attributes, false)
        .and_then(|()| set(tree.as_fd(), options.recursive, true))
    {
        Ok(()) => place(tree.as_fd(), target).doing(|| "move_mount".into())?,
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
            place(tree.as_fd(), target).doing(|| "move_mount".into())?;
            remount_by_path(tree.as_fd(), options)?;
        }
        Err(error) => return Err(error).doing(|| "mount_setattr".into()),
    }
    set_propagation(tree.as_fd(), &options.propagation)?;
    Ok(tree)
}

fn set(mount: BorrowedFd<'_>, attributes: Attributes, recursive: bool) -> std::io::Result<()> {
    if attributes.is_empty() {
        return Ok(());
    }
    let request =
        MountAttributes { set: attributes.set, clear: attributes.clear, ..Default::default() };
    set_attributes(mount, c"", recursive, &request)
}

/// Makes an attached mount read-only, and keeps its other attributes.
///
/// # Errors
/// Names the call that failed.
pub(crate) fn protect(mount: BorrowedFd<'_>) -> Result<(), Failure> {
    let read_only = Attributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0 };
    match set(mount, read_only, false) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
            let options = MountOptions { attributes: read_only, ..MountOptions::default() };
            remount_by_path(mount, &options)
        }
        other => other.doing(|| "mount_setattr".into()),
    }
}

/// Sets the propagation of an attached mount.
///
/// # Errors
/// Names the call that failed.
pub(crate) fn set_propagation(mount: BorrowedFd<'_>, flags: &[(u64, bool)]) -> Result<(), Failure> {
    for (propagation, recursive) in flags {
        let request = MountAttributes { propagation: *propagation, ..Default::default() };
        match set_attributes(mount, c"", *recursive, &request) {
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
                let recursive = if *recursive { MountFlags::REC } else { MountFlags::empty() };
                let flags = MountFlags::from_bits_retain(*propagation as u32) | recursive;
                rustix::mount::mount("none", proc_path(mount), "", flags, None)
                    .doing(|| "set the mount's propagation".into())?;
            }
            other => other.doing(|| "set the mount's propagation".into())?,
        }
    }
    Ok(())
}

/// Mounts a new file system onto `target`, or only prepares it when `target` is `None`.
///
/// # Errors
/// Names the call and the option that failed, with the kernel's own explanation if any.
pub(crate) fn detached_filesystem(
    name: &str,
    source: &str,
    options: &MountOptions,
) -> Result<OwnedFd, Failure> {
    let context = rustix::mount::fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC)
        .doing(|| format!("fsopen {name}"))?;
    rustix::mount::fsconfig_set_string(context.as_fd(), "source", source)
        .doing(|| format!("set the source of {name} to {source:?}"))?;
    for flag in &options.superblock {
        rustix::mount::fsconfig_set_flag(context.as_fd(), *flag)
            .doing(|| format!("set {flag} on {name}"))?;
    }
    for option in &options.data {
        let set = match option.split_once('=') {
            Some((key, value)) => {
                rustix::mount::fsconfig_set_string(context.as_fd(), key, value.trim_matches('"'))
            }
            None => rustix::mount::fsconfig_set_flag(context.as_fd(), option.as_str()),
        };
        set.doing(|| format!("set option {option:?} of {name}{}", explanation(&context)))?;
    }
    rustix::mount::fsconfig_create(context.as_fd())
        .doing(|| format!("create a {name} file system{}", explanation(&context)))?;
    let attributes = (options.attributes.set | options.recursive.set) as u32;
    rustix::mount::fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::from_bits_retain(attributes),
    )
    .doing(|| format!("fsmount {name}"))
}

/// What the kernel wrote about the last error into the file system context.
fn explanation(context: &OwnedFd) -> String {
    let mut text = [0; 512];
    match rustix::io::read(context, &mut text) {
        Ok(length) => format!(" ({})", String::from_utf8_lossy(&text[..length]).trim()),
        Err(_) => String::new(),
    }
}

/// The whole of a file system mount by mount(2); the caller reopens the mountpoint.
///
/// # Errors
/// As mount(2).
pub(crate) fn filesystem_by_path(
    name: &str,
    source: &str,
    options: &MountOptions,
    target: BorrowedFd<'_>,
) -> Result<(), Failure> {
    let flags = legacy_flags(options.attributes.set | options.recursive.set);
    let data = CString::new(options.data.join(",")).unwrap_or_default();
    rustix::mount::mount(source, proc_path(target), name, flags, Some(data.as_c_str()))
        .doing(|| format!("mount {name}"))?;
    Ok(())
}

fn bind_by_path(
    source: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    recursive: bool,
    options: &MountOptions,
) -> Result<Mounted, Failure> {
    let (from, onto) = (proc_path(source), proc_path(target));
    let bound = match recursive {
        true => rustix::mount::mount_bind_recursive(&from, &onto),
        false => rustix::mount::mount_bind(&from, &onto),
    };
    bound.doing(|| "bind mount".into())?;
    // The descriptor still names what is underneath; its real path leads to the mount.
    let path = std::fs::read_link(&onto).doing(|| "readlink".into())?;
    let mounted = open_path(&path)?;
    remount_by_path(mounted.as_fd(), options)?;
    set_propagation(mounted.as_fd(), &options.propagation)?;
    Ok(mounted)
}

/// Opens `path` as the caller sees it, without following a final symlink.
///
/// # Errors
/// As open(2).
pub fn open_path(path: &Path) -> Result<OwnedFd, Failure> {
    use rustix::fs::{Mode, OFlags};
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())
        .doing(|| format!("open {}", path.display()))
}

fn remount_by_path(mount: BorrowedFd<'_>, options: &MountOptions) -> Result<(), Failure> {
    if !options.recursive.is_empty() {
        return Err(Failure::refused("recursive mount attributes need Linux 5.12"));
    }
    if options.attributes.is_empty() {
        return Ok(());
    }
    // A remount replaces all flags: keep those the source has and nobody cleared.
    let present = rustix::fs::fstatvfs(mount).doing(|| "statvfs".into())?.f_flag.bits();
    let kept =
        MountFlags::from_bits_truncate(present as u32) - legacy_flags(options.attributes.clear);
    let flags = kept | legacy_flags(options.attributes.set) | MountFlags::BIND;
    rustix::mount::mount_remount(proc_path(mount), flags, c"").doing(|| "remount".into())
}

fn legacy_flags(attributes: u64) -> MountFlags {
    const TABLE: [(u64, MountFlags); 6] = [
        (libc::MOUNT_ATTR_RDONLY, MountFlags::RDONLY),
        (libc::MOUNT_ATTR_NOSUID, MountFlags::NOSUID),
        (libc::MOUNT_ATTR_NODEV, MountFlags::NODEV),
        (libc::MOUNT_ATTR_NOEXEC, MountFlags::NOEXEC),
        (libc::MOUNT_ATTR_NODIRATIME, MountFlags::NODIRATIME),
        (libc::MOUNT_ATTR_NOSYMFOLLOW, MountFlags::from_bits_retain(256)),
    ];
    let atime = match attributes & ATIME_MASK {
        libc::MOUNT_ATTR_NOATIME => MountFlags::NOATIME,
        libc::MOUNT_ATTR_STRICTATIME => MountFlags::STRICTATIME,
        _ => MountFlags::empty(),
    };
    let set = TABLE.iter().filter(|(bit, _)| attributes & bit != 0);
    set.fold(atime, |flags, (_, flag)| flags | *flag)
}
