//! Files by name, from a directory or from a tar archive, without unpacking the archive.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};

use crate::{
    Digest, Error,
    error::Result,
    unpack::{
        decoder, is_compressed,
        tar::{Kind, Reader, Source as TarSource},
    },
};

/// Members of an archive looked at.
const MAX_MEMBERS: usize = 100_000;
/// Links from one member to another followed.
const MAX_LINKS: usize = 8;

/// Where an image is loaded from.
pub(super) struct Source {
    path: PathBuf,
    kind: SourceKind,
    /// Blobs that are not stored under `blobs/sha256/`.
    aliases: HashMap<Digest, String>,
}

enum SourceKind {
    Directory,
    Archive { file: File, members: HashMap<String, Member> },
}

enum Member {
    File { offset: u64, size: u64 },
    Link(String),
}

impl Source {
    /// Opens a directory or archive. A compressed archive is decompressed into an unnamed file
    /// below `scratch`, up to `limit` bytes.
    pub(super) fn open(path: &Path, scratch: &Path, limit: u64) -> Result<Self> {
        let open = |e| Error::file("open", path)(e);
        let file = File::open(path).map_err(open)?;
        let kind = if file.metadata().map_err(open)?.is_dir() {
            SourceKind::Directory
        } else {
            let mut file = plain(file, path, scratch, limit)?;
            let members = members(&mut file, path)?;
            SourceKind::Archive { file, members }
        };
        Ok(Self { path: path.to_owned(), kind, aliases: HashMap::new() })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Says under which name a blob is found.
    pub(super) fn alias(&mut self, digest: Digest, name: String) {
        self.aliases.insert(digest, name);
    }

    /// A file's content, `None` if there is no such file.
    pub(super) fn read(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let Some((reader, _)) = self.file(name)? else { return Ok(None) };
        let mut bytes = Vec::new();
        reader.take(limit + 1).read_to_end(&mut bytes).map_err(Error::file("read", &self.path))?;
        if bytes.len() as u64 > limit {
            let what = format!("{name} of {}", self.path.display());
            return Err(Error::TooLarge { what, limit: format!("{limit} bytes") });
        }
        Ok(Some(bytes))
    }

    /// A blob, unverified.
    pub(super) fn blob(&self, digest: &Digest) -> Result<Box<dyn Read + Send>> {
        let standard = format!("blobs/sha256/{}", digest.hex());
        let name = self.aliases.get(digest).unwrap_or(&standard);
        let found = self.file(name)?.map(|(reader, _)| reader);
        found.ok_or_else(|| Error::Archive {
            path: self.path.clone(),
            reason: format!("lacks {name}"),
        })
    }

    /// A file and its size.
    pub(super) fn file(&self, name: &str) -> Result<Option<(Box<dyn Read + Send>, u64)>> {
        match &self.kind {
            SourceKind::Directory => {
                let path = self.path.join(name);
                match File::open(&path) {
                    Ok(file) => {
                        let size = file.metadata().map_or(0, |m| m.len());
                        Ok(Some((Box::new(file), size)))
                    }
                    Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(e) => Err(Error::file("open", path)(e)),
                }
            }
            SourceKind::Archive { file, members } => {
                let Some((offset, size)) = locate(members, name) else { return Ok(None) };
                let file = file.try_clone().map_err(Error::file("open", &self.path))?;
                Ok(Some((Box::new(Section { file, offset, end: offset + size }), size)))
            }
        }
    }
}

fn locate(members: &HashMap<String, Member>, name: &str) -> Option<(u64, u64)> {
    let mut name = name.to_owned();
    for _ in 0..MAX_LINKS {
        match members.get(&name)? {
            Member::File { offset, size } => return Some((*offset, *size)),
            Member::Link(target) => name.clone_from(target),
        }
    }
    None
}

/// A part of a file, read at its own position.
struct Section {
    file: File,
    offset: u64,
    end: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.offset).unwrap_or(usize::MAX);
        let length = buffer.len().min(left);
        let count = self.file.read_at(&mut buffer[..length], self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}

/// The archive itself, or its decompressed content.
fn plain(mut file: File, path: &Path, scratch: &Path, limit: u64) -> Result<File> {
    let read = |e| Error::file("read", path)(e);
    let mut start = [0; 4];
    let count = file.read_at(&mut start, 0).map_err(read)?;
    if !is_compressed(&start[..count]) {
        return Ok(file);
    }
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let unnamed = rustix::fs::open(scratch, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|e| Error::file("make a temporary file in", scratch)(e.into()))?;
    let mut unnamed = File::from(unnamed);
    let mut reader = decoder(&mut file).map_err(read)?.take(limit + 1);
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        let count = reader.read(&mut buffer).map_err(read)?;
        if count == 0 {
            break;
        }
        total += count as u64;
        if total > limit {
            let what = format!("{}, decompressed,", path.display());
            return Err(Error::TooLarge { what, limit: format!("{limit} bytes") });
        }
        unnamed
            .write_all(&buffer[..count])
            .map_err(Error::file("write a temporary file in", scratch))?;
    }
    Ok(unnamed)
}

/// Where each member of an archive lies.
fn members(file: &mut File, path: &Path) -> Result<HashMap<String, Member>> {
    let refuse = |reason: String| Error::Archive { path: path.to_owned(), reason };
    let length = file.metadata().map_err(Error::file("look at", path))?.len();
    file.seek(SeekFrom::Start(0)).map_err(Error::file("read", path))?;
    let mut stream = Seeking { reader: BufReader::new(file), position: 0, length };
    let mut reader = Reader::new(&mut stream);
    let mut members = HashMap::new();
    while let Some(entry) = reader.next().map_err(|e| refuse(e.to_string()))? {
        if members.len() >= MAX_MEMBERS {
            let what = format!("number of files in {}", path.display());
            return Err(Error::TooLarge { what, limit: MAX_MEMBERS.to_string() });
        }
        let name = String::from_utf8_lossy(&entry.path).into_owned();
        let link = String::from_utf8_lossy(&entry.link).into_owned();
        let member = match entry.kind {
            Kind::File => Member::File { offset: reader.data_offset(), size: entry.size },
            Kind::Symlink => {
                let dir = name.rsplit_once('/').map_or("", |(dir, _)| dir);
                Member::Link(normal(&format!("{dir}/{link}")))
            }
            Kind::Hardlink => Member::Link(normal(&link)),
            _ => continue,
        };
        members.insert(normal(&name), member);
    }
    Ok(members)
}

/// `./a//b/../c` is `a/c`. Only a key of the map of members, never a path on disk.
fn normal(name: &str) -> String {
    let mut parts = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// A file as a tar stream that skips by seeking.
struct Seeking<'a> {
    reader: BufReader<&'a mut File>,
    position: u64,
    length: u64,
}

impl Read for Seeking<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl TarSource for Seeking<'_> {
    fn position(&self) -> u64 {
        self.position
    }

    fn copy_to(&mut self, out: &mut dyn Write, count: u64) -> io::Result<()> {
        let copied = io::copy(&mut (&mut *self).take(count), out)?;
        if copied < count { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    fn skip(&mut self, count: u64) -> io::Result<()> {
        let end = self.position.checked_add(count).filter(|end| *end <= self.length);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let step = i64::try_from(count).map_err(io::Error::other)?;
        self.reader.seek_relative(step)?;
        self.position = end;
        Ok(())
    }
}
