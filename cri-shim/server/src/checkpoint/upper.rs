//! A container's writable layer as a layer archive, read while the container may change it.
//!
//! Every directory is opened by its own name in the directory above, never through a link, and
//! every file likewise: whatever is swapped in between, nothing outside the layer is read.
//! overlayfs's marks become those of image layers: a 0:0 device a `.wh.` file, an opaque
//! directory one with `.wh..wh..opq` in it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use tar::{Builder, EntryType, Header};

use crate::error::{Context, Result};

/// Directories in directories that are followed.
const MAX_DEPTH: usize = 512;
/// Bytes of all files together.
const MAX_BYTES: u64 = 64 << 30;

/// Writes the archive of the layer at `upper`.
pub(super) fn write(upper: &Path, archive: &Path) -> Result<()> {
    let what = || format!("archive the changes in {}", upper.display());
    let root = rustix::fs::open(upper, directory_flags(), Mode::empty()).context(what)?;
    let file = File::create_new(archive).context(what)?;
    let mut walk = Walk { builder: Builder::new(BufWriter::new(file)), left: MAX_BYTES };
    walk.directory(&root, Path::new(""), 0).context(what)?;
    let writer = walk.builder.into_inner().context(what)?;
    writer.into_inner().map_err(io::Error::from).and_then(|f| f.sync_all()).context(what)
}

fn directory_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

struct Walk<W: Write> {
    builder: Builder<W>,
    left: u64,
}

impl<W: Write> Walk<W> {
    fn directory(&mut self, dir: &OwnedFd, path: &Path, depth: usize) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(io::Error::other(format!("{} is too deep", path.display())));
        }
        let mut names = Vec::new();
        for entry in Dir::read_from(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
        }
        names.sort();
        for name in names {
            let name = OsStr::from_bytes(&name);
            let below = path.join(name);
            match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => self.entry(dir, name, &below, &stat, depth)?,
                // Removed meanwhile.
                Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        dir: &OwnedFd,
        name: &OsStr,
        path: &Path,
        stat: &Stat,
        depth: usize,
    ) -> io::Result<()> {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let opened = rustix::fs::openat(dir, name, directory_flags(), Mode::empty())?;
                self.plain(path, stat, EntryType::Directory)?;
                if is_opaque(&opened) {
                    self.mark(&path.join(".wh..wh..opq"))?;
                }
                self.directory(&opened, path, depth + 1)
            }
            FileType::RegularFile => self.file(dir, name, path),
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(dir, name, Vec::new())?;
                let mut header = header(stat, EntryType::Symlink);
                self.builder.append_link(&mut header, path, OsStr::from_bytes(target.to_bytes()))
            }
            FileType::CharacterDevice if stat.st_rdev == 0 => {
                let mut hidden = OsStr::new(".wh.").to_os_string();
                hidden.push(name);
                self.mark(&path.with_file_name(hidden))
            }
            FileType::Fifo => self.plain(path, stat, EntryType::Fifo),
            // Nodes and sockets have no content that a restored container could use.
            _ => Ok(()),
        }
    }

    fn file(&mut self, dir: &OwnedFd, name: &OsStr, path: &Path) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(dir, name, flags, Mode::empty())?);
        let stat = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Ok(());
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        self.left = self
            .left
            .checked_sub(size)
            .ok_or_else(|| io::Error::other(format!("more than {MAX_BYTES} bytes of changes")))?;
        let mut header = header(&stat, EntryType::Regular);
        header.set_size(size);
        // As long as the header says, whatever happens to the file meanwhile.
        let content = file.chain(io::repeat(0)).take(size);
        self.builder.append_data(&mut header, path, content)
    }

    fn plain(&mut self, path: &Path, stat: &Stat, kind: EntryType) -> io::Result<()> {
        let mut header = header(stat, kind);
        self.builder.append_data(&mut header, path, io::empty())
    }

    fn mark(&mut self, path: &PathBuf) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o600);
        header.set_size(0);
        self.builder.append_data(&mut header, path, io::empty())
    }
}

fn header(stat: &Stat, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(stat.st_uid.into());
    header.set_gid(stat.st_gid.into());
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
    header.set_size(0);
    header
}

fn is_opaque(dir: impl AsFd) -> bool {
    let mut value = [0_u8; 1];
    let read = rustix::fs::fgetxattr(dir, "trusted.overlay.opaque", &mut value[..]);
    read == Ok(1) && value == *b"y"
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::fs;

    fn archive(upper: &Path, out: &Path) -> BTreeMap<String, (EntryType, Vec<u8>)> {
        write(upper, out).unwrap();
        let mut read = tar::Archive::new(File::open(out).unwrap());
        let entries = read.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            let path = entry.path().unwrap().to_string_lossy().into_owned();
            (path, (entry.header().entry_type(), bytes))
        });
        entries.collect()
    }

    #[test]
    fn changes_deletions_and_links_are_kept_as_layers_have_them() {
        let dir = tempfile::tempdir().unwrap();
        let upper = dir.path().join("upper");
        fs::create_dir_all(upper.join("etc/opaque")).unwrap();
        fs::write(upper.join("etc/file"), "content").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", upper.join("link")).unwrap();
        let node = Mode::from_raw_mode(0);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            upper.join("etc/gone"),
            FileType::CharacterDevice,
            node,
            0,
        )
        .unwrap();
        let mut set = rustix::fs::XattrFlags::empty();
        set |= rustix::fs::XattrFlags::CREATE;
        rustix::fs::setxattr(upper.join("etc/opaque"), "trusted.overlay.opaque", b"y", set)
            .unwrap();
        let found = archive(&upper, &dir.path().join("out.tar"));
        assert_eq!(found["etc/file"], (EntryType::Regular, b"content".to_vec()));
        assert_eq!(found["link"].0, EntryType::Symlink);
        assert_eq!(found["etc/.wh.gone"].0, EntryType::Regular);
        assert!(found.contains_key("etc/opaque/.wh..wh..opq"));
        assert!(!found.contains_key("etc/gone"));
    }

    #[test]
    fn a_directory_that_becomes_a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (upper, outside) = (dir.path().join("upper"), dir.path().join("outside"));
        fs::create_dir_all(upper.join("d")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), "host").unwrap();
        let swapping = std::sync::atomic::AtomicBool::new(true);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (d, aside) = (upper.join("d"), dir.path().join("aside"));
                while swapping.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = fs::rename(&d, &aside);
                    let _ = std::os::unix::fs::symlink(&outside, &d);
                    let _ = fs::remove_file(&d);
                    let _ = fs::rename(&aside, &d);
                }
            });
            for round in 0..200 {
                let out = dir.path().join(format!("out{round}.tar"));
                // A race that is lost is an error or a link, never the host's file.
                let _ = write(&upper, &out);
                let bytes = fs::read(&out).unwrap_or_default();
                assert!(!bytes.windows(4).any(|w| w == b"host"));
            }
            swapping.store(false, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
