//! `pinctl logs`: reads the CRI log file of a container on this machine.
//!
//! A line of the file is `TIME STREAM TAG TEXT`, where the tag is F for a whole line and P
//! for a part of one whose rest follows.

use crate::cli::LogArgs;
use crate::connect::Node;
use crate::error::Error;
use crate::lookup;
use pinion_cri_proto::v1::{ContainerState, ContainerStatus, ContainerStatusRequest};
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One entry of a CRI log.
#[derive(Debug, PartialEq, Eq)]
struct Entry<'a> {
    time: &'a [u8],
    error: bool,
    partial: bool,
    text: &'a [u8],
}

/// Takes a line of the log apart; `None` for what is no CRI log line.
fn parse(line: &[u8]) -> Option<Entry<'_>> {
    let mut fields = line.splitn(4, |b| *b == b' ');
    let (time, stream, tag) = (fields.next()?, fields.next()?, fields.next()?);
    let text = fields.next().unwrap_or_default();
    let error = match stream {
        b"stdout" => false,
        b"stderr" => true,
        _ => return None,
    };
    Some(Entry { time, error, partial: tag == b"P", text })
}

/// Prints a container's log.
pub(crate) async fn show(node: &mut Node, args: &LogArgs) -> Result<(), Error> {
    let container = lookup::container(node, &args.id).await?;
    let status = status(node, &container.id).await?;
    if status.log_path.is_empty() {
        return Err(Error::Invalid(format!("container {} keeps no log", args.id)));
    }
    let mut reader = Tail::open(Path::new(&status.log_path), args.tail)?;
    loop {
        reader.print(args.timestamps)?;
        if !args.follow {
            return Ok(());
        }
        let running = is_running(node, &container.id).await?;
        tokio::time::sleep(Duration::from_millis(100)).await;
        if !running {
            return reader.print(args.timestamps);
        }
    }
}

/// Follows a container's log until it ends; used by `pinctl run`.
pub(crate) async fn follow(node: &mut Node, id: &str, path: &Path) -> Result<(), Error> {
    let mut reader: Option<Tail> = None;
    loop {
        let running = is_running(node, id).await?;
        if reader.is_none() {
            reader = Tail::open(path, None).ok();
        }
        if let Some(reader) = &mut reader {
            reader.print(false)?;
        }
        if !running {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The status of a container.
pub(crate) async fn status(node: &mut Node, id: &str) -> Result<ContainerStatus, Error> {
    let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
    let answer = node.runtime.container_status(request).await;
    Ok(answer
        .map_err(Error::call("asking for its status"))?
        .into_inner()
        .status
        .unwrap_or_default())
}

async fn is_running(node: &mut Node, id: &str) -> Result<bool, Error> {
    let state = status(node, id).await?.state();
    Ok(matches!(state, ContainerState::ContainerRunning | ContainerState::ContainerCreated))
}

/// A log file and how far it was printed.
#[derive(Debug)]
struct Tail {
    path: PathBuf,
    file: BufReader<File>,
    line: Vec<u8>,
    skip: usize,
}

impl Tail {
    fn open(path: &Path, last: Option<usize>) -> Result<Self, Error> {
        let failed = |source| Error::File { action: "read", path: path.to_owned(), source };
        let mut skip = 0;
        if let Some(last) = last {
            let count = BufReader::new(File::open(path).map_err(failed)?).split(b'\n').count();
            skip = count.saturating_sub(last);
        }
        let file = BufReader::new(File::open(path).map_err(failed)?);
        Ok(Self { path: path.to_owned(), file, line: Vec::new(), skip })
    }

    /// Prints the whole lines that are there and not printed yet.
    fn print(&mut self, timestamps: bool) -> Result<(), Error> {
        loop {
            let read = self.file.read_until(b'\n', &mut self.line);
            let read = read.map_err(|source| Error::File {
                action: "read",
                path: self.path.clone(),
                source,
            })?;
            if read == 0 || self.line.last() != Some(&b'\n') {
                return Ok(()); // the rest of the line is still to be written
            }
            let line = std::mem::take(&mut self.line);
            if self.skip > 0 {
                self.skip -= 1;
                continue;
            }
            match print_line(&line[..line.len() - 1], timestamps) {
                Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
                    return Err(Error::Print(e));
                }
                _ => {}
            }
        }
    }
}

fn print_line(line: &[u8], timestamps: bool) -> std::io::Result<()> {
    let mut text = Vec::with_capacity(line.len() + 1);
    let mut error = false;
    match parse(line) {
        Some(entry) => {
            if timestamps {
                text.extend_from_slice(entry.time);
                text.push(b' ');
            }
            text.extend_from_slice(entry.text);
            if !entry.partial {
                text.push(b'\n');
            }
            error = entry.error;
        }
        None => {
            text.extend_from_slice(line);
            text.push(b'\n');
        }
    }
    if error { std::io::stderr().write_all(&text) } else { std::io::stdout().write_all(&text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_line_and_a_part_are_told_apart() {
        let whole = parse(b"2026-01-02T03:04:05.6Z stdout F hello world").unwrap();
        assert_eq!((whole.text, whole.partial, whole.error), (&b"hello world"[..], false, false));
        let part = parse(b"2026-01-02T03:04:05.6Z stderr P hel").unwrap();
        assert_eq!((part.text, part.partial, part.error), (&b"hel"[..], true, true));
    }

    #[test]
    fn an_empty_line_is_a_line() {
        assert_eq!(parse(b"t stdout F ").unwrap().text, b"");
        assert_eq!(parse(b"t stdout F").unwrap().text, b"");
    }

    #[test]
    fn what_is_no_cri_line_is_not_guessed_at() {
        assert_eq!(parse(b"hello"), None);
        assert_eq!(parse(b"a b c d"), None);
    }
}
