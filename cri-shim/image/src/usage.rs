//! How much disk a tree occupies.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    io,
    os::{fd::AsFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustix::fs::{AtFlags, Dir, FileType};

use crate::unpack::{InRoot, open_directory};

/// A figure younger than this is handed out again; kubelet asks about every container every 10 s.
const FRESH: Duration = Duration::from_secs(10);
/// Directories nested deeper than this are counted but not entered.
const MAX_DEPTH: usize = 256;

/// Disk space and files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes allocated on disk.
    pub bytes: u64,
    /// Files, directories and links.
    pub inodes: u64,
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.inodes += other.inodes;
    }
}

/// Figures of trees walked recently.
#[derive(Debug, Default)]
pub(crate) struct UsageCache {
    known: Mutex<HashMap<PathBuf, (Instant, Usage)>>,
}

impl UsageCache {
    /// Usage of `dir`, at most ten seconds old.
    pub(crate) fn of(&self, dir: &Path) -> io::Result<Usage> {
        let recent = |(at, usage): &(Instant, Usage)| (at.elapsed() < FRESH).then_some(*usage);
        if let Some(usage) = self.lock().get(dir).and_then(recent) {
            return Ok(usage);
        }
        let usage = walk(dir)?;
        self.lock().insert(dir.to_owned(), (Instant::now(), usage));
        Ok(usage)
    }

    pub(crate) fn forget(&self, dir: &Path) {
        self.lock().remove(dir);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, (Instant, Usage)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a tree that may be changing meanwhile; a file with several names counts once.
fn walk(dir: &Path) -> io::Result<Usage> {
    let root = InRoot::open(dir)?.directory(Path::new(""))?;
    let mut walker = Walker { usage: Usage::default(), linked: HashSet::new() };
    walker.enter(open_directory(root, Path::new("."))?, 0)?;
    Ok(walker.usage)
}

struct Walker {
    usage: Usage,
    linked: HashSet<(u64, u64)>,
}

impl Walker {
    fn enter(&mut self, dir: impl AsFd, depth: usize) -> io::Result<()> {
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let Ok(stat) = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue; // deleted meanwhile
            };
            let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if !is_dir && stat.st_nlink > 1 && !self.linked.insert((stat.st_dev, stat.st_ino)) {
                continue;
            }
            self.usage.inodes += 1;
            self.usage.bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
            if is_dir && depth < MAX_DEPTH {
                let name = Path::new(OsStr::from_bytes(name.to_bytes()));
                if let Ok(child) = open_directory(&dir, name) {
                    self.enter(child, depth + 1)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_two_names_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        std::fs::write(dir.path().join("d/a"), vec![1; 10_000]).unwrap();
        std::fs::hard_link(dir.path().join("d/a"), dir.path().join("b")).unwrap();
        let usage = walk(dir.path()).unwrap();
        assert_eq!(usage.inodes, 2);
        assert!((10_000..60_000).contains(&usage.bytes), "{usage:?}");
    }

    #[test]
    fn a_fresh_figure_is_not_measured_again() {
        let dir = tempfile::tempdir().unwrap();
        let cache = UsageCache::default();
        assert_eq!(cache.of(dir.path()).unwrap().inodes, 0);
        std::fs::write(dir.path().join("new"), b"x").unwrap();
        assert_eq!(cache.of(dir.path()).unwrap().inodes, 0);
        cache.forget(dir.path());
        assert_eq!(cache.of(dir.path()).unwrap().inodes, 1);
    }
}
