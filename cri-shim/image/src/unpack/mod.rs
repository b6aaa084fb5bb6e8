//! From a compressed layer stream to a directory that overlayfs can stack.
//!
//! ```text
//!   bytes ─▶ Verified (count, sha256, keep) ─▶ inflate ─▶ sha256 = diff id ─▶ tar ─▶ directory
//!           └───────────────── one thread ──────────────────────────┘└── the caller's ──┘
//! ```
//! Nothing here trusts the stream: it is applied inside the directory whatever names and links it
//! contains, within bounds on bytes, entries and header sizes, and the result counts only after
//! both digests matched. The directory is the caller's to delete on failure.

mod apply;
mod chunks;
mod in_root;
mod inflate;
mod metadata;
pub(crate) mod tar;

use std::{
    collections::BTreeSet,
    io::{self, Read},
    path::{Path, PathBuf},
};

use sha2::Sha256;

use crate::{
    Digest, Error, ErrorKind,
    content::{Check, Ingest},
    error::{Result, io_kind},
    trash::Trash,
};

pub(crate) use in_root::{InRoot, look, open_directory};
pub(crate) use inflate::{decoder, is_compressed};
pub(crate) use metadata::copy_directory;

/// What is wrong with a layer, or why it cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The layer could not be read.
    #[error("read")]
    Read(#[source] io::Error),
    /// The compressed stream is damaged.
    #[error("decompress")]
    Inflate(#[source] io::Error),
    /// The tar stream is damaged or ambiguous.
    #[error("tar stream at byte {offset}: {reason}")]
    Tar {
        /// Offset of the header.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// An entry asks for something no layer may do.
    #[error("entry {name:?}: {reason}")]
    Entry {
        /// Name as in the archive, cut at 200 characters.
        name: String,
        /// What it asks for.
        reason: &'static str,
    },
    /// The layer is larger than allowed.
    #[error("{what} exceeds the limit of {limit}")]
    TooLarge {
        /// What was counted.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The file system refused an entry.
    #[error("{action} {name:?}")]
    File {
        /// What was attempted.
        action: &'static str,
        /// Name as in the archive.
        name: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl LayerError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Inflate(_) | Self::Tar { .. } | Self::Entry { .. } => ErrorKind::DataLoss,
            Self::TooLarge { .. } => ErrorKind::ResourceExhausted,
            Self::Read(source) | Self::File { source, .. } => io_kind(source),
        }
    }
}

/// A layer as its manifest and configuration announce it.
#[derive(Debug, Clone)]
pub(crate) struct Announced {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) diff_id: Digest,
    /// Bytes the layer may expand to.
    pub(crate) max_bytes: u64,
    /// Entries it may have.
    pub(crate) max_entries: u64,
}

/// What unpacking produced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Unpacked {
    /// Disk space, rounded up to blocks.
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// Directories the layer uses without describing them: their owner and mode come from below.
    pub(crate) implied: BTreeSet<PathBuf>,
    pub(crate) opaque_root: bool,
}

/// Unpacks `source` into the empty directory `dir`, storing the compressed bytes in `keep`.
pub(crate) fn unpack(
    source: impl Read + Send,
    keep: Option<Ingest>,
    layer: &Announced,
    dir: &Path,
    trash: &Trash,
) -> Result<Unpacked> {
    let failed = |source| Error::Layer { digest: layer.digest.clone(), source };
    let check = Check::new(format!("layer {}", layer.digest), layer.size);
    let mut compressed = Verified { source, check, keep, fault: None, layer };
    let (filled, chunks) = chunks::channel();

    let (inflated, applied) = std::thread::scope(|scope| {
        let reader = &mut compressed;
        let limit = layer.max_bytes;
        let inflater = std::thread::Builder::new()
            .name("inflate".to_owned())
            .spawn_scoped(scope, move || inflate::run(reader, &filled, limit));
        let mut chunks = chunks;
        let applied = apply::apply(&mut chunks, dir, trash, layer.max_entries);
        if applied.is_ok() {
            chunks.drain(); // what follows the archive's end still counts for the diff id
        }
        drop(chunks);
        let inflated = inflater.map(|thread| thread.join());
        (inflated, applied)
    });
    let inflated: Result<Sha256, LayerError> = match inflated {
        Ok(Ok(inflated)) => inflated,
        Ok(Err(_panic)) => {
            return Err(Error::Abandoned { what: format!("layer {}", layer.digest) });
        }
        Err(e) => return Err(Error::file("start a thread for", dir)(e)),
    };
    // The cause nearest to the source explains the others: a broken download looks like a
    // truncated archive, a wrong blob like a damaged one.
    if let Some(fault) = compressed.fault.take() {
        return Err(fault);
    }
    let content_fault = |e: &LayerError| e.kind() == ErrorKind::DataLoss;
    let (hasher, unpacked) = match (inflated, applied) {
        (Ok(hasher), Ok(unpacked)) => (hasher, unpacked),
        (Err(e), _) if !content_fault(&e) => return Err(failed(e)),
        (_, Err(e)) if !content_fault(&e) => return Err(failed(e)),
        (Err(e), _) | (_, Err(e)) => {
            compressed.finish(&layer.digest)?;
            return Err(failed(e));
        }
    };
    compressed.finish(&layer.digest)?;
    let diff_id = Digest::of_hasher(hasher);
    if diff_id != layer.diff_id {
        let (expected, actual) = (layer.diff_id.to_string(), diff_id.to_string());
        let what = format!("uncompressed layer {}", layer.digest);
        return Err(Error::Mismatch { what, expected, actual });
    }
    Ok(unpacked)
}

/// The compressed bytes on their way through: counted, hashed, stored.
struct Verified<'a, R> {
    source: R,
    check: Check,
    keep: Option<Ingest>,
    /// The first failure that is not the layer's own.
    fault: Option<Error>,
    layer: &'a Announced,
}

impl<R: Read> Verified<'_, R> {
    /// Reads on to the end, checks the digest and publishes the blob.
    fn finish(mut self, digest: &Digest) -> Result<()> {
        let mut rest = vec![0; 64 << 10];
        while self.fault.is_none() && self.read(&mut rest).is_ok_and(|count| count > 0) {}
        match self.fault {
            Some(fault) => Err(fault),
            None => {
                self.check.finish(digest)?;
                self.keep.map_or(Ok(()), |keep| keep.finish(digest))
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) -> Result<()> {
        self.check.update(bytes)?;
        self.keep.as_mut().map_or(Ok(()), |keep| keep.write(bytes))
    }
}

impl<R: Read> Read for Verified<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = loop {
            match self.source.read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    // A download's own error travels inside the io::Error.
                    let layer = |e| Error::Layer {
                        digest: self.layer.digest.clone(),
                        source: LayerError::Read(e),
                    };
                    let fault = e.downcast::<Error>().unwrap_or_else(layer);
                    self.fault.get_or_insert(fault);
                    return Err(io::Error::other("the source failed"));
                }
                Ok(count) => break count,
            }
        };
        if let Err(fault) = self.take(&buffer[..count]) {
            self.fault.get_or_insert(fault);
            return Err(io::Error::other("the stream is not what was announced"));
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
