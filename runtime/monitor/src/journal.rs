//! The monitor's own log, `monitor.log` in the pod's directory: what no client is told.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::SystemTime;

use crate::log::timestamp;

/// The file starts afresh when it is longer than this: it lives in memory, on tmpfs.
const MAX_LENGTH: u64 = 64 * 1024;

/// Appends lines to `monitor.log`.
#[derive(Debug)]
pub struct Journal(File);

impl Journal {
    /// Opens or creates the log at `path`.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(OpenOptions::new().append(true).create(true).mode(0o600).open(path)?))
    }

    /// Writes one line. A log that cannot be written stops nothing.
    pub fn note(&mut self, text: impl fmt::Display) {
        let time = timestamp::format(SystemTime::now());
        let text = text.to_string().replace(|c: char| c.is_control(), " ");
        let line = format!("{} {text}\n", String::from_utf8_lossy(&time));
        if self.0.metadata().is_ok_and(|metadata| metadata.len() > MAX_LENGTH) {
            drop(self.0.set_len(0));
        }
        drop(self.0.write_all(line.as_bytes()));
    }

    /// Notes a failure that stops nothing; gives the value where there is none.
    pub fn noted<T, E: fmt::Display>(&mut self, what: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.note(format_args!("{what}: {error}"))).ok()
    }
}
