//! The log file: appended to in whole records, whatever the disk does.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::OFlags;

use super::timestamp;

/// Permission bits of a log that did not exist.
const MODE: u32 = 0o640;

/// Why a log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be opened or created.
    #[error("open log {path:?}")]
    Open {
        /// Path of the log.
        path: PathBuf,
        /// The failure; `ELOOP` if the last component is a symbolic link.
        #[source]
        source: io::Error,
    },
    /// Someone has put something else in its place.
    #[error("log {path:?} is not a regular file with one name that belongs to us")]
    NotPlain {
        /// Path of the log.
        path: PathBuf,
    },
}

/// What could not be written since the last write that succeeded.
#[derive(Debug, Default)]
struct Gap {
    records: u64,
    bytes: u64,
    reason: String,
}

/// An open log file.
#[derive(Debug)]
pub struct LogFile {
    file: File,
    gap: Option<Gap>,
    dropped: u64,
}

impl LogFile {
    /// Opens or creates `path` for appending. Symbolic links, other kinds of files, files of
    /// other users and files with further names are refused: a pod may own the directory.
    ///
    /// # Errors
    /// As described; nothing is created or changed then.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        // NONBLOCK: opening a FIFO must not wait for its reader.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let open = |source| OpenError::Open { path: path.to_owned(), source };
        let flags = i32::try_from(flags.bits()).unwrap_or(0);
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(MODE)
            .custom_flags(flags)
            .open(path)
            .map_err(open)?;
        let metadata = file.metadata().map_err(open)?;
        let ours = metadata.uid() == rustix::process::geteuid().as_raw();
        if metadata.is_file() && metadata.nlink() <= 1 && ours {
            Ok(Self { file, gap: None, dropped: 0 })
        } else {
            Err(OpenError::NotPlain { path: path.to_owned() })
        }
    }

    /// Goes on in `new`; what was lost before is noted there.
    pub fn replace(&mut self, new: Self) {
        self.file = new.file;
    }

    /// Bytes dropped over the life of the log.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Appends whole records, each ended by a newline, or drops those that do not fit.
    pub fn write(&mut self, records: &[u8]) {
        if records.is_empty() || (self.gap.is_some() && !self.note_gap()) {
            self.lose(records, None);
            return;
        }
        if let Err((written, error)) = self.append(records) {
            let lost = records.get(written..).unwrap_or_default();
            self.lose(lost, Some(&error));
        }
    }

    /// Writes the note about what is missing; whether that worked.
    fn note_gap(&mut self) -> bool {
        let Some(gap) = &self.gap else { return true };
        let time = timestamp::format(SystemTime::now());
        let note = format!(
            "{} stderr F [pinion-monitor: {} log records ({} bytes) were lost here: {}]\n",
            String::from_utf8_lossy(&time),
            gap.records,
            gap.bytes,
            gap.reason
        );
        let written = self.append(note.as_bytes()).is_ok();
        if written {
            self.gap = None;
        }
        written
    }

    fn lose(&mut self, records: &[u8], error: Option<&io::Error>) {
        if records.is_empty() {
            return;
        }
        let gap = self.gap.get_or_insert_default();
        gap.records += records.iter().filter(|byte| **byte == b'\n').count() as u64;
        gap.bytes += records.len() as u64;
        self.dropped += records.len() as u64;
        if let Some(error) = error {
            gap.reason = error.to_string();
        }
    }

    /// Appends `records`, or says how many bytes of whole records are in the file.
    fn append(&mut self, records: &[u8]) -> Result<(), (usize, io::Error)> {
        let mut written = 0;
        while let Some(rest) = records.get(written..).filter(|rest| !rest.is_empty()) {
            match self.file.write(rest) {
                Ok(0) => return Err((self.cut(records, written), io::ErrorKind::WriteZero.into())),
                Ok(n) => written += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err((self.cut(records, written), error)),
            }
        }
        Ok(())
    }

    /// Takes a record that was written in part out of the file again.
    fn cut(&mut self, records: &[u8], written: usize) -> usize {
        let done = records.get(..written).unwrap_or_default();
        let whole = done.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        let torn = (written - whole) as u64;
        if torn > 0 {
            // If even this fails, the note that follows begins in the middle of a line.
            let shortened = self.file.metadata().map(|m| m.len().saturating_sub(torn));
            drop(shortened.and_then(|length| self.file.set_len(length)));
        }
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn anything_but_a_plain_file_of_ours_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::write(at("victim"), "untouched").unwrap();
        symlink(at("victim"), at("link")).unwrap();
        std::fs::hard_link(at("victim"), at("second-name")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, at("fifo"), 0o600.into()).unwrap();
        for name in ["link", "second-name", "fifo", "."] {
            assert!(LogFile::open(&at(name)).is_err(), "{name}");
        }
        assert_eq!(std::fs::read_to_string(at("victim")).unwrap(), "untouched");
    }

    /// A file system of three pages, gone with the guard.
    struct SmallDisk(tempfile::TempDir);

    impl SmallDisk {
        fn mount() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let options = Some(c"size=12k");
            rustix::mount::mount(
                "pinion-test",
                directory.path(),
                "tmpfs",
                rustix::mount::MountFlags::empty(),
                options,
            )
            .expect("this test mounts a tmpfs and needs root");
            Self(directory)
        }
    }

    impl Drop for SmallDisk {
        fn drop(&mut self) {
            rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
        }
    }

    #[test]
    fn a_full_disk_loses_whole_records_and_says_so_when_there_is_room() {
        let disk = SmallDisk::mount();
        let (path, ballast) = (disk.0.path().join("log"), disk.0.path().join("ballast"));
        std::fs::write(&ballast, vec![0; 4096]).unwrap();
        let mut log = LogFile::open(&path).unwrap();
        let line = [&[b'x'; 99][..], b"\n"].concat();
        for _ in 0..100 {
            log.write(&line.repeat(3));
        }
        let full = std::fs::read(&path).unwrap();
        assert_eq!(full.len() % line.len(), 0, "a torn record is in the file");
        assert_eq!(full.len() as u64 + log.dropped(), 30_000);
        std::fs::remove_file(ballast).unwrap();
        log.write(b"later\n");
        let text = String::from_utf8(std::fs::read(&path).unwrap()).unwrap();
        let lost = (30_000 - full.len()) / line.len();
        let note = format!("{lost} log records ({} bytes) were lost here", lost * line.len());
        assert!(text.lines().rev().nth(1).unwrap().contains(&note), "{note}");
        assert_eq!(text.lines().last(), Some("later"));
    }
}
