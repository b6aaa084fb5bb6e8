//! Where the harness keeps what it fetched and built: `$PINION_CACHE`, else
//! `~/.cache/pinion`.
//!
//! Everything below it can be deleted at any time and is made again. Two harnesses may run
//! at once: whoever makes an entry holds its lock.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::error::{During, Error, Result};

/// The cache directory.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens the cache, creating the directory.
    pub(crate) fn open() -> Result<Self> {
        let root = match std::env::var_os("PINION_CACHE") {
            Some(path) => PathBuf::from(path),
            None => PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into()))
                .join(".cache/pinion"),
        };
        fs::create_dir_all(&root).during(|| format!("create {}", root.display()))?;
        Ok(Self { root })
    }

    /// A path below the cache.
    pub(crate) fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.root.join(relative)
    }

    /// Takes the lock of one entry; held until the guard is dropped.
    pub(crate) fn lock(&self, entry: &str) -> Result<Flock<File>> {
        let dir = self.path("locks");
        fs::create_dir_all(&dir).during(|| format!("create {}", dir.display()))?;
        let path = dir.join(entry);
        let file = File::create(&path).during(|| format!("create {}", path.display()))?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| Error::Io {
            what: format!("lock {}", path.display()),
            source: errno.into(),
        })
    }

    /// Makes an entry once per `key`: `make` fills a fresh directory, which replaces the
    /// entry only when it is complete. Returns the entry's path.
    pub(crate) fn entry(
        &self,
        name: &str,
        key: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let done = self.path(name);
        let _lock = self.lock(&name.replace('/', "-"))?;
        let stamp = done.join(".key");
        if fs::read_to_string(&stamp).is_ok_and(|have| have == key) {
            return Ok(done);
        }
        let fresh = self.path(format!("{name}.new"));
        remove_tree(&fresh)?;
        fs::create_dir_all(&fresh).during(|| format!("create {}", fresh.display()))?;
        make(&fresh)?;
        fs::write(fresh.join(".key"), key).during(|| format!("write {}", stamp.display()))?;
        remove_tree(&done)?;
        fs::rename(&fresh, &done).during(|| format!("rename to {}", done.display()))?;
        Ok(done)
    }
}

/// Removes a directory tree; absent is fine.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).during(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_made_once_per_key_and_never_left_half_made() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache { root: dir.path().into() };
        let mut made = 0;
        for key in ["a", "a", "b"] {
            cache
                .entry("thing", key, |path| {
                    made += 1;
                    fs::write(path.join("file"), key).during(String::new)
                })
                .unwrap();
        }
        assert_eq!(made, 2);
        cache.entry("thing", "c", |_| Err(Error::check("no"))).unwrap_err();
        assert_eq!(fs::read_to_string(cache.path("thing/file")).unwrap(), "b");
    }
}
