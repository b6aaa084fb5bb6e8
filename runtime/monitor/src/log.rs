//! A container's log in the format kubelet reads: one record a line,
//! `2024-05-06T07:08:09.000000001Z stdout F text`, where `P` marks a line that goes on in
//! the next record of its stream.
//!
//! As containerd does, a line is cut when it is longer than the limit, and what a stream
//! leaves unterminated at its end becomes a `P` record. Every byte but the newlines is kept,
//! carriage returns of terminals included (as CRI-O keeps them).
//!
//! A record is written whole or not at all. While the file cannot be written the output is
//! counted and dropped, never held back, and the first record that fits again is a note of
//! how much was lost.

pub mod file;
pub mod line;
pub mod timestamp;

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use self::file::{LogFile, OpenError};
use self::line::{Splitter, Tag};

/// Longest line in one record unless asked otherwise, in bytes.
pub const DEFAULT_MAX_LINE: usize = 16 * 1024;

/// Records are written out when this many bytes have been collected.
const FLUSH_AT: usize = 16 * 1024;

/// Which of a process's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or all output of a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// Position in a pair.
    #[must_use]
    pub fn index(self) -> usize {
        match self {
            Self::Stdout => 0,
            Self::Stderr => 1,
        }
    }

    fn name(self) -> &'static [u8] {
        match self {
            Self::Stdout => b"stdout",
            Self::Stderr => b"stderr",
        }
    }
}

/// Where a process's output goes for good.
#[derive(Debug, Default)]
pub struct Log(Option<Open>);

#[derive(Debug)]
struct Open {
    path: PathBuf,
    file: LogFile,
    splitters: [Splitter; 2],
}

impl Log {
    /// A log that keeps nothing.
    #[must_use]
    pub fn discard() -> Self {
        Self(None)
    }

    /// Opens or creates the log at `path`, with lines cut at `max_line` bytes.
    ///
    /// # Errors
    /// When the file cannot be opened or is not a plain file of ours.
    pub fn open(path: &Path, max_line: usize) -> Result<Self, OpenError> {
        let splitters = [Splitter::new(max_line), Splitter::new(max_line)];
        let file = LogFile::open(path)?;
        Ok(Self(Some(Open { path: path.to_owned(), file, splitters })))
    }

    /// Opens the path again after someone has renamed the file. Output that came before
    /// this call is in the old file, all later output in the new one.
    ///
    /// # Errors
    /// As [`Log::open`]; the log then goes on in the old file.
    pub fn reopen(&mut self) -> Result<(), OpenError> {
        if let Self(Some(open)) = self {
            open.file.replace(LogFile::open(&open.path)?);
        }
        Ok(())
    }

    /// Logs bytes as they were read from a stream. `records` is scratch space.
    pub fn append(&mut self, stream: Stream, bytes: &[u8], records: &mut Vec<u8>) {
        let Self(Some(open)) = self else { return };
        let Open { file, splitters, .. } = open;
        let Some(splitter) = splitters.get_mut(stream.index()) else { return };
        let time = timestamp::format(SystemTime::now());
        splitter.push(bytes, |tag, head, tail| {
            record(records, &time, stream, tag, head, tail);
            if records.len() >= FLUSH_AT {
                file.write(records);
                records.clear();
            }
        });
        file.write(records);
        records.clear();
    }

    /// Logs what a stream has left unterminated at its end.
    pub fn finish(&mut self, stream: Stream, records: &mut Vec<u8>) {
        let Self(Some(open)) = self else { return };
        let time = timestamp::format(SystemTime::now());
        if let Some(rest) = open.splitters.get_mut(stream.index()).and_then(Splitter::finish) {
            record(records, &time, stream, Tag::Partial, &rest, &[]);
            open.file.write(records);
            records.clear();
        }
    }

    /// Bytes of records dropped because they could not be written.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.0.as_ref().map_or(0, |open| open.file.dropped())
    }
}

fn record(
    out: &mut Vec<u8>,
    time: &[u8; timestamp::LENGTH],
    stream: Stream,
    tag: Tag,
    head: &[u8],
    tail: &[u8],
) {
    out.extend_from_slice(time);
    out.push(b' ');
    out.extend_from_slice(stream.name());
    out.extend_from_slice(match tag {
        Tag::Full => b" F ",
        Tag::Partial => b" P ",
    });
    out.extend_from_slice(head);
    out.extend_from_slice(tail);
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(path: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(path).unwrap();
        let lines = text.split_terminator('\n');
        lines.map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
    }

    #[test]
    fn lines_of_both_streams_are_records() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let (mut log, mut scratch) = (Log::open(&path, 4).unwrap(), Vec::new());
        log.append(Stream::Stdout, b"one\n\nlo", &mut scratch);
        log.append(Stream::Stderr, b"err\r\n", &mut scratch);
        log.append(Stream::Stdout, b"nger\nend", &mut scratch);
        log.finish(Stream::Stdout, &mut scratch);
        log.finish(Stream::Stderr, &mut scratch);
        let expected = [
            "stdout F one",
            "stdout F ",
            "stderr F err\r",
            "stdout P long",
            "stdout F er",
            "stdout P end",
        ];
        assert_eq!(contents(&path), expected);
    }

    #[test]
    fn a_renamed_file_keeps_the_past_and_the_new_one_gets_the_future() {
        let directory = tempfile::tempdir().unwrap();
        let (path, old) = (directory.path().join("log"), directory.path().join("log.1"));
        let (mut log, mut scratch) = (Log::open(&path, 64).unwrap(), Vec::new());
        log.append(Stream::Stdout, b"a\nb", &mut scratch);
        std::fs::rename(&path, &old).unwrap();
        log.append(Stream::Stdout, b"c\n", &mut scratch);
        log.reopen().unwrap();
        log.append(Stream::Stdout, b"d\n", &mut scratch);
        assert_eq!(contents(&old), ["stdout F a", "stdout F bc"]);
        assert_eq!(contents(&path), ["stdout F d"]);
    }

    #[test]
    fn a_failed_reopen_keeps_the_old_file() {
        let directory = tempfile::tempdir().unwrap();
        let (path, old) = (directory.path().join("log"), directory.path().join("log.1"));
        let (mut log, mut scratch) = (Log::open(&path, 64).unwrap(), Vec::new());
        std::fs::rename(&path, &old).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(log.reopen().is_err());
        log.append(Stream::Stdout, b"kept\n", &mut scratch);
        assert_eq!(contents(&old), ["stdout F kept"]);
    }
}
