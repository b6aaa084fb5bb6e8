//! Reading and writing one-value kernel files, with the path in every error.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use pinion_topology::{IdSet, Kind};

/// A kernel file that could not be read or understood.
#[derive(Debug, thiserror::Error)]
#[error("read {path}")]
pub(crate) struct ReadFileError {
    pub(crate) path: PathBuf,
    #[source]
    pub(crate) source: io::Error,
}

/// The trimmed text of a file, or `None` where the kernel has no such file. A group or task
/// that vanishes while it is read (ENODEV, ESRCH) counts as absent too.
pub(crate) fn read(path: &Path) -> Result<Option<String>, ReadFileError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if gone(&error) => Ok(None),
        Err(source) => Err(ReadFileError { path: path.to_owned(), source }),
    }
}

/// Whether an error says that the object is not there.
pub(crate) fn gone(error: &io::Error) -> bool {
    const ESRCH: i32 = 3;
    const ENODEV: i32 = 19;
    error.kind() == io::ErrorKind::NotFound || matches!(error.raw_os_error(), Some(ESRCH | ENODEV))
}

/// A list file as a set; `None` where there is no such file.
pub(crate) fn read_set<K: Kind>(path: &Path) -> Result<Option<IdSet<K>>, ReadFileError> {
    let Some(text) = read(path)? else { return Ok(None) };
    let invalid = |error| ReadFileError {
        path: path.to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidData, error),
    };
    text.parse().map(Some).map_err(invalid)
}

/// Writes one value with one write(2). An empty value is written as a newline, since a write
/// of no bytes changes nothing.
pub(crate) fn write(path: &Path, value: &str) -> io::Result<()> {
    let value = if value.is_empty() { "\n" } else { value };
    fs::OpenOptions::new().write(true).truncate(true).open(path)?.write_all(value.as_bytes())
}

/// Directories below `dir`, `dir` itself not included, parents before children. What cannot
/// be listed is left out: groups vanish at any time.
pub(crate) fn directories(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        let children = children(&dir);
        found.extend(children.iter().cloned());
        pending.extend(children);
    }
    found
}

/// Directories directly in `dir`, sorted.
pub(crate) fn children(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    let mut children: Vec<PathBuf> = entries.filter(is_dir).map(|entry| entry.path()).collect();
    children.sort();
    children
}
