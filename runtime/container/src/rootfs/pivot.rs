//! Changing the root of the process and dropping the host's file system.

use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountPropagationFlags, UnmountFlags};

use super::{Root, open_path};
use crate::error::{Doing, Failure};

/// Makes `root` the root directory of the process; afterwards the old one is unreachable.
///
/// `no_pivot` is for roots on the initramfs, which cannot be pivoted away: the mount is
/// moved over `/` instead.
///
/// # Errors
/// Names the call that failed.
pub fn change_root(root: &Root, path: &Path, no_pivot: bool) -> Result<(), Failure> {
    if no_pivot { move_root(root, path) } else { pivot(root) }?;
    rustix::process::chdir("/").doing(|| "chdir /".into())
}

fn pivot(root: &Root) -> Result<(), Failure> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old = rustix::fs::open("/", flags, Mode::empty()).doing(|| "open /".into())?;
    rustix::process::fchdir(root).doing(|| "fchdir to the new root".into())?;
    // The same directory twice: the old root ends up stacked on the new one, and no
    // directory of the image is needed for it.
    rustix::process::pivot_root(".", ".").doing(|| "pivot_root".into())?;
    rustix::process::fchdir(&old).doing(|| "fchdir to the old root".into())?;
    // Unmounting must not travel back to the host.
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change(".", slave).doing(|| "make the old root a slave".into())?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).doing(|| "unmount the old root".into())
}

fn move_root(root: &Root, path: &Path) -> Result<(), Failure> {
    // Hide what a process with CAP_SYS_ADMIN could otherwise find beneath the new root.
    for place in ["/proc", "/sys"] {
        if open_path(Path::new(place)).is_ok() {
            let _ = rustix::mount::unmount(place, UnmountFlags::DETACH);
        }
    }
    rustix::process::fchdir(root.as_fd()).doing(|| "fchdir to the new root".into())?;
    rustix::mount::mount_move(path, "/").doing(|| "move the new root over /".into())?;
    rustix::process::chroot(".").doing(|| "chroot".into())
}
