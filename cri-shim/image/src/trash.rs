//! Deleting trees of any shape: a tree is renamed away at once and taken apart later.
//!
//! A container may leave a tree deeper than any stack or descriptor limit; what lies too deep is
//! moved up into the trash and taken apart from there.

use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};

use crate::{Error, error::Result, unpack::open_directory};

/// Directories open at once while deleting.
const MAX_DEPTH: usize = 64;

/// A directory of condemned trees, on the same file system as what it takes.
#[derive(Debug)]
pub(crate) struct Trash {
    path: PathBuf,
    dir: OwnedFd,
    next: AtomicU64,
    /// One thread deletes at a time.
    emptying: Mutex<()>,
    request: Mutex<Request>,
}

/// Whether somebody empties the trash for all who asked.
#[derive(Debug, Default)]
struct Request {
    served: bool,
    /// Something was taken while it was being emptied, perhaps too late to be seen.
    again: bool,
}

impl Trash {
    pub(crate) fn open(path: PathBuf) -> Result<Self> {
        fs::create_dir_all(&path).map_err(Error::file("create directory", &path))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(&path, flags, Mode::empty())
            .map_err(|e| Error::file("open", &path)(e.into()))?;
        // Names left by an earlier run must not be met again.
        let next = fs::read_dir(&path)
            .map_err(Error::file("read directory", &path))?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u64>().ok())
            .max()
            .map_or(0, |last| last + 1);
        Ok(Self {
            path,
            dir,
            next: AtomicU64::new(next),
            emptying: Mutex::default(),
            request: Mutex::default(),
        })
    }

    /// Moves `name` out of `parent`; one that is not there is fine.
    pub(crate) fn take(&self, parent: impl AsFd, name: &Path) -> io::Result<()> {
        let number = self.next.fetch_add(1, Ordering::Relaxed).to_string();
        match rustix::fs::renameat(parent, name, &self.dir, number.as_str()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// [`Trash::take`] by path.
    pub(crate) fn take_path(&self, path: &Path) -> Result<()> {
        self.take(CWD, path).map_err(Error::file("move to the trash", path))
    }

    /// Deletes everything taken so far.
    pub(crate) fn empty(&self) -> Result<()> {
        let _one = self.emptying.lock().unwrap_or_else(PoisonError::into_inner);
        // Taking a deep tree apart puts its depths back into the trash.
        while self.remove_children(self.dir.as_fd(), 0).map_err(Error::file("empty", &self.path))? {
        }
        Ok(())
    }

    /// [`Trash::empty`], by whoever is at it already if somebody is: returns at once then, so
    /// that a large tree holds up one thread and not all that come after it.
    pub(crate) fn empty_once(&self) -> Result<()> {
        let request = || self.request.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut request = request();
            if request.served {
                request.again = true;
                return Ok(());
            }
            request.served = true;
        }
        loop {
            let outcome = self.empty();
            let mut request = request();
            if !request.again || outcome.is_err() {
                *request = Request::default();
                return outcome;
            }
            request.again = false;
        }
    }

    /// Deletes what is in `dir`; true if there was anything. Goes on after a failure and then
    /// reports the first one, so that one stubborn file keeps no other alive.
    fn remove_children(&self, dir: impl AsFd, depth: usize) -> io::Result<bool> {
        let (mut any, mut failure) = (false, None);
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            any = true;
            let name = Path::new(OsStr::from_bytes(name.to_bytes()));
            let is_dir = match entry.file_type() {
                FileType::Directory => true,
                FileType::Unknown => {
                    let stat = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
                    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
                }
                _ => false,
            };
            let removed = if !is_dir {
                gone(rustix::fs::unlinkat(&dir, name, AtFlags::empty()))
            } else if depth >= MAX_DEPTH {
                self.take(&dir, name)
            } else {
                open_directory(&dir, name)
                    .and_then(|child| self.remove_children(child, depth + 1))
                    .and_then(|_any| gone(rustix::fs::unlinkat(&dir, name, AtFlags::REMOVEDIR)))
            };
            if let Err(e) = removed {
                failure.get_or_insert(e);
            }
        }
        failure.map_or(Ok(any), Err)
    }
}

fn gone(result: rustix::io::Result<()>) -> io::Result<()> {
    match result {
        Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_deeper_than_any_path_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let trash = Trash::open(dir.path().join("trash")).unwrap();
        // 3000 levels make a path far beyond what one system call takes.
        let mut parent = rustix::fs::open(dir.path(), OFlags::DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&parent, "deeper", Mode::RWXU).unwrap();
            parent = open_directory(&parent, Path::new("deeper")).unwrap();
        }
        fs::write(dir.path().join("deeper/file"), "x").unwrap();
        drop(parent);
        trash.take_path(&dir.path().join("deeper")).unwrap();
        trash.take_path(&dir.path().join("missing")).unwrap();
        trash.empty().unwrap();
        assert_eq!(fs::read_dir(dir.path().join("trash")).unwrap().count(), 0);
    }

    #[test]
    fn what_many_throw_away_at_once_is_gone_when_the_last_returns() {
        let dir = tempfile::tempdir().unwrap();
        let trash = Trash::open(dir.path().join("trash")).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (trash, dir) = (&trash, dir.path());
                scope.spawn(move || {
                    for n in 0..50 {
                        let tree = dir.join(format!("{thread}-{n}"));
                        fs::create_dir_all(tree.join("a/b")).unwrap();
                        trash.take_path(&tree).unwrap();
                        trash.empty_once().unwrap();
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(dir.path().join("trash")).unwrap().count(), 0);
    }

    #[test]
    fn names_of_an_earlier_run_are_not_met_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trash");
        fs::create_dir_all(path.join("7/sub")).unwrap();
        let trash = Trash::open(path.clone()).unwrap();
        fs::create_dir(dir.path().join("x")).unwrap();
        trash.take_path(&dir.path().join("x")).unwrap();
        assert!(path.join("8").is_dir());
        trash.empty().unwrap();
        assert_eq!(fs::read_dir(path).unwrap().count(), 0);
    }
}
