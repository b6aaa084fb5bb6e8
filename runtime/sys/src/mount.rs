//! The parts of the descriptor-based mount API that rustix lacks.
//!
//! `fsopen`, `fsmount`, `open_tree` and `move_mount` come from [`rustix::mount`].

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Attributes for [`set_attributes`]; bits are `MOUNT_ATTR_*` and `MS_SHARED` and its kin.
#[derive(Debug, Default)]
pub struct MountAttributes<'a> {
    /// `MOUNT_ATTR_*` bits to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` bits to clear (to change an atime mode, clear `MOUNT_ATTR__ATIME`).
    pub clear: u64,
    /// One of `MS_SHARED`, `MS_PRIVATE`, `MS_SLAVE`, `MS_UNBINDABLE`, or 0.
    pub propagation: u64,
    /// The user namespace whose mapping the mount shall apply (`MOUNT_ATTR_IDMAP`).
    pub idmap: Option<BorrowedFd<'a>>,
}

#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Changes the attributes of the mount `path` names (or of `directory` itself when `path`
/// is empty), and of all mounts below it when `recursive`.
///
/// # Errors
/// As mount_setattr(2): `ENOSYS` before Linux 5.12.
pub fn set_attributes(
    directory: BorrowedFd<'_>,
    path: &CStr,
    recursive: bool,
    attributes: &MountAttributes<'_>,
) -> io::Result<()> {
    let mut flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    let mut set = attributes.set;
    if attributes.idmap.is_some() {
        set |= libc::MOUNT_ATTR_IDMAP;
    }
    let block = MountAttr {
        attr_set: set,
        attr_clr: attributes.clear,
        propagation: attributes.propagation,
        userns_fd: attributes.idmap.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    // SAFETY: `path` is a valid C string and `block` has the size that is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            directory.as_raw_fd(),
            path.as_ptr(),
            flags,
            &raw const block,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
