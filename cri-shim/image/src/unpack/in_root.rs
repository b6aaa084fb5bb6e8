//! Opening directories of a tree as if its root were `/`, and throwing parts of it away.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};

/// Open directories remembered at once.
const REMEMBERED: usize = 128;

/// A directory whose content is not trusted. Symbolic links in it, absolute or with `..`, lead
/// nowhere but inside it, also while somebody changes it (openat2, or pathrs' emulation of it).
pub(crate) struct InRoot {
    root: pathrs::Root,
    open: HashMap<PathBuf, Arc<OwnedFd>>,
}

impl InRoot {
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        let root = pathrs::Root::open(dir).map_err(os_error)?;
        Ok(Self { root, open: HashMap::new() })
    }

    /// The directory at `path`; the empty path is the root itself.
    pub(crate) fn directory(&mut self, path: &Path) -> io::Result<Arc<OwnedFd>> {
        if let Some(fd) = self.open.get(path) {
            return Ok(fd.clone());
        }
        let at = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let handle = self.root.resolve(at).map_err(os_error)?;
        let fd = OwnedFd::from(handle);
        let stat = rustix::fs::fstat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        let fd = Arc::new(fd);
        self.remember(path, fd.clone());
        Ok(fd)
    }

    /// Saves a later [`InRoot::directory`] the look-up.
    pub(crate) fn remember(&mut self, path: &Path, fd: Arc<OwnedFd>) {
        if self.open.len() >= REMEMBERED {
            self.open.clear();
        }
        self.open.insert(path.to_owned(), fd);
    }

    /// Must follow every change of what a directory's name means.
    pub(crate) fn forget(&mut self) {
        self.open.clear();
    }
}

/// Opens a directory by its own name, never through a link.
pub(crate) fn open_directory(parent: impl AsFd, name: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

/// What `name` itself is, `None` if it does not exist.
pub(crate) fn look(parent: impl AsFd, name: &Path) -> io::Result<Option<rustix::fs::Stat>> {
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// The error as the system gave it, so that a full disk stays recognisable.
fn os_error(error: pathrs::error::Error) -> io::Error {
    match error.kind() {
        pathrs::error::ErrorKind::OsError(Some(errno)) => io::Error::from_raw_os_error(errno),
        _ => io::Error::other(error),
    }
}
