//! `tmpcopyup`: what the image has at a place, copied into the tmpfs mounted there.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Timestamps};

/// Copies everything below `from` into `to`. Descriptors only, no symlink is followed.
///
/// # Errors
/// As the calls it makes; what was copied so far stays.
pub(crate) fn copy_tree(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let readable = reopen_directory(from)?;
    copy_metadata(&rustix::fs::fstat(&readable)?, to)?;
    for entry in Dir::read_from(&readable)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            copy_entry(readable.as_fd(), to, name)?;
        }
    }
    Ok(())
}

fn reopen_directory(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(fd, c".", flags, Mode::empty())?)
}

fn copy_entry(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<()> {
    let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            rustix::fs::mkdirat(to, name, Mode::from_raw_mode(0o700))?;
            let source = rustix::fs::openat(from, name, flags | OFlags::DIRECTORY, Mode::empty())?;
            let target = rustix::fs::openat(to, name, flags | OFlags::DIRECTORY, Mode::empty())?;
            copy_tree(source.as_fd(), target.as_fd())
        }
        FileType::RegularFile => {
            let source = rustix::fs::openat(from, name, flags | OFlags::NONBLOCK, Mode::empty())?;
            let create = flags | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
            let target = rustix::fs::openat(to, name, create, Mode::from_raw_mode(0o600))?;
            let (mut source, mut target) =
                (std::fs::File::from(source), std::fs::File::from(target));
            io::copy(&mut source, &mut target)?;
            copy_metadata(&stat, target.as_fd())
        }
        FileType::Symlink => {
            let link = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(link, to, name)?;
            Ok(chown(to, name, &stat)?)
        }
        FileType::Socket => Ok(()),
        other => {
            let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
            rustix::fs::mknodat(to, name, other, mode, stat.st_rdev)?;
            Ok(chown(to, name, &stat)?)
        }
    }
}

fn chown(
    at: BorrowedFd<'_>,
    name: &std::ffi::CStr,
    stat: &rustix::fs::Stat,
) -> rustix::io::Result<()> {
    let (uid, gid) = owner(stat);
    rustix::fs::chownat(at, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
}

fn owner(stat: &rustix::fs::Stat) -> (Option<rustix::fs::Uid>, Option<rustix::fs::Gid>) {
    (Some(rustix::fs::Uid::from_raw(stat.st_uid)), Some(rustix::fs::Gid::from_raw(stat.st_gid)))
}

fn copy_metadata(stat: &rustix::fs::Stat, to: BorrowedFd<'_>) -> io::Result<()> {
    let (uid, gid) = owner(stat);
    let target = reopen_or_same(to)?;
    rustix::fs::fchown(&target, uid, gid)?;
    rustix::fs::fchmod(&target, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    let time = |sec, nsec: u64| rustix::fs::Timespec { tv_sec: sec, tv_nsec: nsec.cast_signed() };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    Ok(rustix::fs::futimens(&target, &times)?)
}

/// The descriptor itself if it allows changes, else (a mount root is `O_PATH`) a second one.
fn reopen_or_same(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    if rustix::fs::fcntl_getfl(fd)?.contains(OFlags::PATH) {
        return reopen_directory(fd);
    }
    fd.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn files_modes_and_links_are_copied_and_links_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::create_dir_all(from.join("sub")).unwrap();
        std::fs::create_dir(&to).unwrap();
        std::fs::write(from.join("sub/file"), "text").unwrap();
        std::fs::set_permissions(from.join("sub/file"), PermissionsExt::from_mode(0o4711)).unwrap();
        symlink("/etc/passwd", from.join("link")).unwrap();
        let open = |path| std::fs::File::open(path).unwrap();
        copy_tree(open(&from).as_fd(), open(&to).as_fd()).unwrap();
        assert_eq!(std::fs::read(to.join("sub/file")).unwrap(), b"text");
        let mode = std::fs::metadata(to.join("sub/file")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o4711);
        assert!(std::fs::symlink_metadata(to.join("link")).unwrap().is_symlink());
    }
}
