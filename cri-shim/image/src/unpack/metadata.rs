//! Owners, modes, times and extended attributes.

use std::{
    ffi::OsStr,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, Stat, Timespec, Timestamps, Uid, XattrFlags},
    io::Errno,
};

use super::{in_root::open_directory, tar::Entry};

/// Marks a directory that hides what lies below it (kernel: overlayfs, "whiteouts and opaque
/// directories").
const OPAQUE: &str = "trusted.overlay.opaque";

/// Attributes an image may not bring along: overlayfs' own, which could redirect look-ups out of
/// the layer, other `trusted.` ones, which only the host may set, and labels of another host.
fn is_forbidden(name: &[u8]) -> bool {
    name.starts_with(b"trusted.")
        || name.starts_with(b"user.overlay.")
        || name == b"security.selinux"
        || name == b"security.ima"
        || name == b"security.evm"
}

fn times(seconds: i64, nanos: u32) -> Timestamps {
    let at = Timespec { tv_sec: seconds, tv_nsec: nanos.into() };
    Timestamps { last_access: at, last_modification: at }
}

/// Owner, mode and attributes of an open file or directory. Owner first: changing it drops
/// setuid bits and file capabilities.
pub(super) fn set_on_open(fd: impl AsFd, entry: &Entry) -> io::Result<()> {
    let fd = fd.as_fd();
    rustix::fs::fchown(fd, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))?;
    rustix::fs::fchmod(fd, Mode::from_raw_mode(entry.mode))?;
    for (name, value) in &entry.xattrs {
        if !is_forbidden(name) {
            supported(rustix::fs::fsetxattr(
                fd,
                OsStr::from_bytes(name),
                value,
                XattrFlags::empty(),
            ))?;
        }
    }
    Ok(())
}

/// The modification time of an open file.
pub(super) fn set_open_time(fd: impl AsFd, entry: &Entry) -> io::Result<()> {
    Ok(rustix::fs::futimens(fd, &times(entry.mtime.0, entry.mtime.1))?)
}

/// Owner, mode, attributes and time of what cannot be opened: links, devices, pipes.
pub(super) fn set_by_name(
    parent: BorrowedFd<'_>,
    name: &Path,
    entry: &Entry,
    is_link: bool,
) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if !is_link {
        // Just created by us and no symbolic link, so following is harmless.
        rustix::fs::chmodat(parent, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())?;
    }
    for (xattr, value) in &entry.xattrs {
        if !is_forbidden(xattr) {
            // There is no lsetxattrat; the magic link names the very directory we hold.
            let path: PathBuf = format!("/proc/self/fd/{}", parent.as_raw_fd()).into();
            let xattr = OsStr::from_bytes(xattr);
            supported(rustix::fs::lsetxattr(path.join(name), xattr, value, XattrFlags::empty()))?;
        }
    }
    set_time(parent, name, entry.mtime)
}

/// The modification time of `name` itself.
pub(super) fn set_time(parent: impl AsFd, name: &Path, mtime: (i64, u32)) -> io::Result<()> {
    let times = times(mtime.0, mtime.1);
    Ok(rustix::fs::utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Makes an open directory hide what lies below it.
pub(super) fn set_opaque(dir: impl AsFd) -> io::Result<()> {
    let dir = open_directory(dir, Path::new("."))?;
    Ok(rustix::fs::fsetxattr(dir, OPAQUE, b"y", XattrFlags::empty())?)
}

/// A whiteout: how overlayfs marks a deleted name.
pub(super) fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Gives the directory `to` the owner, mode, time and attributes of `from`.
pub(crate) fn copy_directory(from: impl AsFd, to: impl AsFd) -> io::Result<()> {
    let from = open_directory(from, Path::new("."))?;
    let to = open_directory(to, Path::new("."))?;
    let stat = rustix::fs::fstat(&from)?;
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::fchown(&to, Some(uid), Some(gid))?;
    rustix::fs::fchmod(&to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    let mut names = vec![0; rustix::fs::flistxattr(&from, &mut [0_u8; 0][..]).map_or(0, |n| n)];
    let count = supported_or(rustix::fs::flistxattr(&from, &mut names[..]), 0)?;
    for name in names[..count].split(|&b| b == 0).filter(|name| !name.is_empty()) {
        if is_forbidden(name) {
            continue;
        }
        let name = OsStr::from_bytes(name);
        let mut value = vec![0; 64 << 10];
        let count = supported_or(rustix::fs::fgetxattr(&from, name, &mut value[..]), 0)?;
        supported(rustix::fs::fsetxattr(&to, name, &value[..count], XattrFlags::empty()))?;
    }
    let nanos = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
    Ok(rustix::fs::futimens(&to, &times(stat.st_mtime, nanos))?)
}

/// File systems without an attribute class are no reason to refuse an image.
fn supported(result: rustix::io::Result<()>) -> io::Result<()> {
    supported_or(result, ())
}

fn supported_or<T>(result: rustix::io::Result<T>, otherwise: T) -> io::Result<T> {
    match result {
        Err(Errno::OPNOTSUPP | Errno::NODATA) => Ok(otherwise),
        result => Ok(result?),
    }
}
