//! Paths inside the container's root, resolved so that nothing in it can lead outside.
//!
//! A symlink of the image or a race in a shared volume may change a path between two looks
//! at it (CVE-2019-16884, CVE-2021-30465). Every path is therefore turned into a descriptor
//! once, by openat2(2) with `RESOLVE_IN_ROOT`, and only the descriptor is used afterwards.
//! Where the kernel lacks openat2, pathrs walks the path component by component.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use pathrs::flags::ResolverFlags;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};

use crate::error::{Doing, Failure};

/// As many symlinks as the kernel follows in one path.
const MAX_LINKS: u32 = 40;

/// A directory that is `/` for every path given to it.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
}

impl Root {
    /// Takes an open directory as the root.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Opens what `path` names, symlinks followed inside the root, as an `O_PATH`
    /// descriptor.
    ///
    /// # Errors
    /// As openat2(2).
    pub fn find(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open(path, OFlags::PATH, ResolveFlags::empty())
    }

    /// As [`Root::find`], but any symlink in the path is `ELOOP`.
    ///
    /// # Errors
    /// As openat2(2).
    pub fn find_without_links(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open(path, OFlags::PATH, ResolveFlags::NO_SYMLINKS)
    }

    fn open(&self, path: &Path, flags: OFlags, resolve: ResolveFlags) -> io::Result<OwnedFd> {
        let resolve_all = resolve | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC;
        loop {
            match rustix::fs::openat2(&self.fd, path, flags, Mode::empty(), resolve_all) {
                // A rename anywhere in the system raced with a `..`; look again.
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) => {
                    return self.open_by_walking(path, resolve);
                }
                other => return Ok(other?),
            }
        }
    }

    fn open_by_walking(&self, path: &Path, resolve: ResolveFlags) -> io::Result<OwnedFd> {
        let mut root = pathrs::Root::from_fd(self.fd.try_clone()?);
        if resolve.contains(ResolveFlags::NO_SYMLINKS) {
            root.set_resolver_flags(ResolverFlags::NO_SYMLINKS);
        }
        match root.resolve(path) {
            Ok(handle) => Ok(handle.into()),
            Err(error) => Err(errno_of(&error)),
        }
    }

    /// Opens the directory `path`, creating what is missing of it with mode 0755.
    ///
    /// # Errors
    /// `ENOTDIR` when something else is in the way.
    pub fn directory(&self, path: &Path) -> Result<OwnedFd, Failure> {
        self.directory_at_depth(path, 0).doing(|| format!("mkdir {} in the root", path.display()))
    }

    /// Opens the file `path`, creating an empty one if there is nothing.
    ///
    /// # Errors
    /// As open(2).
    pub fn file(&self, path: &Path) -> Result<OwnedFd, Failure> {
        self.file_at_depth(path, 0).doing(|| format!("create {} in the root", path.display()))
    }

    fn directory_at_depth(&self, path: &Path, depth: u32) -> io::Result<OwnedFd> {
        // The parent of a relative path's first component is the root itself.
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        match self.open(path, OFlags::PATH | OFlags::DIRECTORY, ResolveFlags::empty()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let (parent_path, name) = split(path)?;
        let parent = self.directory_at_depth(parent_path, depth)?;
        match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&parent, name, flags, Mode::empty()) {
            Ok(directory) => Ok(directory),
            Err(rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {
                let target = dangling_target(&parent, parent_path, name, depth)?;
                self.directory_at_depth(&target, depth + 1)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn file_at_depth(&self, path: &Path, depth: u32) -> io::Result<OwnedFd> {
        match self.find(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let (parent_path, name) = split(path)?;
        let parent = self.directory_at_depth(parent_path, depth)?;
        let create = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&parent, name, create, Mode::from_raw_mode(0o755)) {
            Ok(_) => {}
            Err(rustix::io::Errno::EXIST) => {
                if let Ok(target) = dangling_target(&parent, parent_path, name, depth) {
                    return self.file_at_depth(&target, depth + 1);
                }
            }
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&parent, name, flags, Mode::empty())?)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Where the symlink `name` points, as a path to be resolved in the root once more.
fn dangling_target(parent: &OwnedFd, path: &Path, name: &Path, depth: u32) -> io::Result<PathBuf> {
    if depth >= MAX_LINKS {
        return Err(rustix::io::Errno::LOOP.into());
    }
    let target = rustix::fs::readlinkat(parent, name, Vec::new())
        .map_err(|_not_a_link| io::Error::from(rustix::io::Errno::NOTDIR))?;
    use std::os::unix::ffi::OsStrExt;
    Ok(path.join(std::ffi::OsStr::from_bytes(target.as_bytes())))
}

fn split(path: &Path) -> io::Result<(&Path, &Path)> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if parent.as_os_str().is_empty() => {
            Ok((Path::new("."), Path::new(name)))
        }
        (Some(parent), Some(name)) => Ok((parent, Path::new(name))),
        _ => Err(io::ErrorKind::NotFound.into()),
    }
}

fn errno_of(error: &pathrs::error::Error) -> io::Error {
    match error.kind() {
        pathrs::error::ErrorKind::OsError(Some(errno)) => io::Error::from_raw_os_error(errno),
        _ => io::Error::other(error.to_string()),
    }
}

/// True when the descriptor refers to a directory.
///
/// # Errors
/// As fstat(2).
pub(crate) fn is_directory(fd: impl AsFd) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) == FileType::Directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("root")).unwrap();
        std::fs::create_dir(dir.path().join("outside")).unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let fd = rustix::fs::open(dir.path().join("root"), flags, Mode::empty()).unwrap();
        (dir, Root::new(fd))
    }

    #[test]
    fn relative_paths_start_at_the_root() {
        let (dir, root) = root();
        root.directory(Path::new("a/b")).unwrap();
        root.file(Path::new("c/d")).unwrap();
        assert!(dir.path().join("root/a/b").is_dir());
        assert!(dir.path().join("root/c/d").is_file());
    }

    #[test]
    fn links_that_point_outside_stay_inside() {
        let (dir, root) = root();
        let outside = dir.path().join("outside");
        symlink(&outside, dir.path().join("root/absolute")).unwrap();
        symlink("../../../outside", dir.path().join("root/relative")).unwrap();
        root.directory(Path::new("/absolute/made")).unwrap();
        root.file(Path::new("/relative/file")).unwrap();
        root.directory(Path::new("/../../outside/up")).unwrap();
        root.directory(Path::new("relative/deep")).unwrap();
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
        let inside = dir.path().join("root").join(outside.strip_prefix("/").unwrap());
        assert!(inside.join("made").is_dir());
        assert!(dir.path().join("root/outside/file").is_file());
    }

    #[test]
    fn loops_and_things_in_the_way_are_errors() {
        let (dir, root) = root();
        symlink("loop", dir.path().join("root/loop")).unwrap();
        std::fs::write(dir.path().join("root/file"), "").unwrap();
        assert!(root.directory(Path::new("/loop/x")).is_err());
        assert!(root.directory(Path::new("/file")).is_err());
        assert!(root.directory(Path::new("/file/x")).is_err());
    }

    #[test]
    fn existing_things_are_found_and_links_refused_on_request() {
        let (dir, root) = root();
        std::fs::create_dir(dir.path().join("root/real")).unwrap();
        symlink("real", dir.path().join("root/link")).unwrap();
        assert!(is_directory(root.find(Path::new("/link")).unwrap()).unwrap());
        assert!(root.find_without_links(Path::new("/real")).is_ok());
        let error = root.find_without_links(Path::new("/link")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn walking_without_openat2_agrees() {
        let (dir, root) = root();
        symlink(dir.path().join("outside"), dir.path().join("root/link")).unwrap();
        let walked = root.open_by_walking(Path::new("/link"), ResolveFlags::empty());
        assert_eq!(walked.unwrap_err().kind(), io::ErrorKind::NotFound);
        let refused = root.open_by_walking(Path::new("/link"), ResolveFlags::NO_SYMLINKS);
        assert!(refused.is_err());
        assert!(root.open_by_walking(Path::new("/"), ResolveFlags::empty()).is_ok());
    }
}
