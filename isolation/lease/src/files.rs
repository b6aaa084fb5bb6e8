//! Reading and writing one-value kernel files.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

/// The trimmed text; `None` where the file or what it belongs to is not there.
pub(crate) fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether an error says that the object is not there (any more).
pub(crate) fn gone(error: &io::Error) -> bool {
    const ENODEV: i32 = 19;
    const ENXIO: i32 = 6;
    error.kind() == io::ErrorKind::NotFound || matches!(error.raw_os_error(), Some(ENODEV | ENXIO))
}

/// Writes one value with one write(2); an empty one as a newline, since a write of no bytes
/// changes nothing.
pub(crate) fn write(path: &Path, value: &str) -> io::Result<()> {
    let value = if value.is_empty() { "\n" } else { value };
    fs::OpenOptions::new().write(true).truncate(true).open(path)?.write_all(value.as_bytes())
}
