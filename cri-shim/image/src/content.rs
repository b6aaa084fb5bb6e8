//! Blobs by digest under `content/blobs/sha256/`.
//!
//! ```text
//!   ingest ──▶ <hex>.partial-<n> ──write…──▶ finish: size and digest checked ──▶ <hex>
//!                    └── dropped before that: deleted
//! ```
//! A blob is renamed into place unsynced; whoever records it in the store calls
//! [`crate::snapshot::sync`] first, once for everything a pull brought.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use sha2::{Digest as _, Sha256};

use crate::{Digest, Error, error::Result};

const PARTIAL: &str = ".partial-";

/// The content store.
#[derive(Debug)]
pub(crate) struct Content {
    blobs: PathBuf,
    ingests: AtomicU64,
}

impl Content {
    /// Opens the store below `root`, making its directories.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let blobs = root.join("content/blobs/sha256");
        fs::create_dir_all(&blobs).map_err(Error::file("create directory", &blobs))?;
        Ok(Self { blobs, ingests: AtomicU64::new(0) })
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.blobs.join(digest.hex())
    }

    /// Size of a blob, `None` if it is not here.
    pub(crate) fn size(&self, digest: &Digest) -> Option<u64> {
        fs::metadata(self.path(digest)).ok().filter(fs::Metadata::is_file).map(|m| m.len())
    }

    /// A blob's file, unverified: the reader checks the digest as it goes.
    pub(crate) fn reader(&self, digest: &Digest) -> Result<File> {
        let path = self.path(digest);
        File::open(&path).map_err(Error::file("open", path))
    }

    /// A small blob, verified; `None` if it is missing or damaged.
    pub(crate) fn read(&self, digest: &Digest, limit: u64) -> Result<Option<Vec<u8>>> {
        if self.size(digest).is_none() {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        self.reader(digest)?
            .take(limit + 1)
            .read_to_end(&mut bytes)
            .map_err(Error::file("read", self.path(digest)))?;
        Ok((bytes.len() as u64 <= limit && Digest::of(&bytes) == *digest).then_some(bytes))
    }

    /// Stores a small blob.
    pub(crate) fn put(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        let mut ingest = self.ingest(&digest, bytes.len() as u64)?;
        ingest.write(bytes)?;
        ingest.finish(&digest)?;
        Ok(digest)
    }

    /// Begins to store a blob of `size` bytes.
    pub(crate) fn ingest(&self, digest: &Digest, size: u64) -> Result<Ingest> {
        let number = self.ingests.fetch_add(1, Ordering::Relaxed);
        let path = self.blobs.join(format!("{}{PARTIAL}{number}", digest.hex()));
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(Error::file("create", &path))?;
        let target = self.path(digest);
        Ok(Ingest { file, check: Check::new(format!("blob {digest}"), size), path, target })
    }

    /// Deletes a blob; one that is not here is fine.
    pub(crate) fn remove(&self, hex: &str) -> Result<()> {
        let path = self.blobs.join(hex);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::file("delete", path)(e))
            }
            _ => Ok(()),
        }
    }

    /// File names and sizes of everything here, partial blobs included.
    pub(crate) fn list(&self) -> Result<Vec<(String, u64)>> {
        let fail = |e| Error::file("read directory", &self.blobs)(e);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.blobs).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let size = entry.metadata().map_or(0, |m| m.len());
            names.push((entry.file_name().to_string_lossy().into_owned(), size));
        }
        Ok(names)
    }

    pub(crate) fn is_partial(name: &str) -> bool {
        name.contains(PARTIAL)
    }
}

/// Counts and hashes content as it streams by, and compares at the end.
pub(crate) struct Check {
    what: String,
    hasher: Sha256,
    size: u64,
    seen: u64,
}

impl Check {
    pub(crate) fn new(what: String, size: u64) -> Self {
        Self { what, hasher: Sha256::new(), size, seen: 0 }
    }

    /// Takes the next bytes; fails as soon as there are more than announced.
    pub(crate) fn update(&mut self, bytes: &[u8]) -> Result<()> {
        self.seen += bytes.len() as u64;
        if self.seen > self.size {
            return Err(self.wrong_size("more"));
        }
        self.hasher.update(bytes);
        Ok(())
    }

    pub(crate) fn finish(self, expected: &Digest) -> Result<()> {
        if self.seen != self.size {
            return Err(self.wrong_size(&self.seen.to_string()));
        }
        let actual = Digest::of_hasher(self.hasher);
        if actual == *expected {
            return Ok(());
        }
        let (expected, actual) = (expected.to_string(), actual.to_string());
        Err(Error::Mismatch { what: self.what, expected, actual })
    }

    fn wrong_size(&self, actual: &str) -> Error {
        let expected = format!("{} bytes", self.size);
        Error::Mismatch { what: self.what.clone(), expected, actual: format!("{actual} bytes") }
    }
}

/// A blob on its way in.
pub(crate) struct Ingest {
    file: File,
    check: Check,
    path: PathBuf,
    target: PathBuf,
}

impl Ingest {
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.check.update(bytes)?;
        self.file.write_all(bytes).map_err(Error::file("write", &self.path))
    }

    /// Puts the blob in its place if it is what it was announced to be.
    pub(crate) fn finish(mut self, expected: &Digest) -> Result<()> {
        let check = std::mem::replace(&mut self.check, Check::new(String::new(), 0));
        check.finish(expected)?;
        fs::rename(&self.path, &self.target).map_err(Error::file("rename", &self.path))
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        // After `finish` there is nothing left under this name.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn content() -> (tempfile::TempDir, Content) {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(dir.path()).unwrap();
        (dir, content)
    }

    #[test]
    fn a_blob_is_published_only_when_size_and_digest_hold() {
        let (_dir, content) = content();
        let digest = Digest::of(b"hello");
        let attempt = |size, bytes: &[u8]| {
            let mut ingest = content.ingest(&digest, size)?;
            ingest.write(bytes)?;
            ingest.finish(&digest)
        };
        for (size, bytes) in [(5, &b"hellO"[..]), (5, b"hell"), (5, b"hello!"), (6, b"hello")] {
            let error = attempt(size, bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::DataLoss, "{error}");
            assert_eq!(content.list().unwrap(), [], "nothing is left");
        }
        attempt(5, b"hello").unwrap();
        assert_eq!(content.list().unwrap(), [(digest.hex().to_owned(), 5)]);
        assert_eq!(content.read(&digest, 5).unwrap().as_deref(), Some(&b"hello"[..]));
        assert_eq!(content.read(&digest, 4).unwrap(), None, "over the limit");
    }

    #[test]
    fn a_damaged_blob_is_not_returned() {
        let (_dir, content) = content();
        let digest = content.put(b"hello").unwrap();
        fs::write(content.path(&digest), b"jello").unwrap();
        assert_eq!(content.read(&digest, 100).unwrap(), None);
        assert_eq!(content.read(&Digest::of(b"other"), 100).unwrap(), None);
    }
}
