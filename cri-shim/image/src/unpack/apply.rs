//! Applies the entries of a layer to a directory.
//!
//! Every entry is made by its own name in a parent directory resolved inside the root, and never
//! through a link at the last step. A name that exists is replaced, except that a directory over
//! a directory keeps its content. Deletions of the layers below become overlayfs' own marks:
//!
//! | in the archive        | in the directory                                             |
//! |-----------------------|--------------------------------------------------------------|
//! | `d/.wh.name`          | `d/name`, a character device 0:0                             |
//! | `d/.wh..wh..opq`      | `trusted.overlay.opaque=y` on `d`                            |
//! | `.wh.d`, then `d/…`   | `d`, opaque                                                  |

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};

use super::{
    LayerError, Unpacked,
    chunks::Chunks,
    in_root::{InRoot, look, open_directory},
    metadata,
    tar::{Entry, Kind, Reader},
};
use crate::trash::Trash;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other names so begun are aufs' bookkeeping.
const AUFS: &[u8] = b".wh..wh.";

const MAX_PATH: usize = 4096;
const MAX_NAME: usize = 255;
const MAX_DEPTH: usize = 512;
/// Links followed to find where a missing directory belongs, as the kernel's own limit.
const MAX_LINKS: usize = 40;
/// The unit of disk space charged.
const BLOCK: u64 = 4096;

/// Applies all entries of the tar stream to `dir`; replaced trees go to `trash`.
pub(super) fn apply(
    chunks: &mut Chunks,
    dir: &Path,
    trash: &Trash,
    max_entries: u64,
) -> Result<Unpacked, LayerError> {
    let root = InRoot::open(dir).map_err(failed("open", b"/"))?;
    let mut layer =
        Layer { root, trash, done: Unpacked::default(), times: Vec::new(), root_time: None };
    let mut reader = Reader::new(chunks);
    let mut entries = 0;
    while let Some(entry) = reader.next()? {
        entries += 1;
        if entries > max_entries {
            return Err(LayerError::TooLarge { what: "number of entries", limit: max_entries });
        }
        layer.add(&entry, &mut reader)?;
    }
    layer.finish()
}

struct Layer<'a> {
    root: InRoot,
    trash: &'a Trash,
    done: Unpacked,
    /// Directory times, set last because filling a directory changes them.
    times: Vec<(PathBuf, (i64, u32))>,
    root_time: Option<(i64, u32)>,
}

impl Layer<'_> {
    fn add(&mut self, entry: &Entry, reader: &mut Reader<'_, Chunks>) -> Result<(), LayerError> {
        let path = clean(&entry.path).map_err(refused(&entry.path))?;
        let Some(name) = path.file_name() else {
            return self.add_root(entry);
        };
        let name = Path::new(name);
        let parent_path = path.parent().unwrap_or(Path::new(""));
        let parent = self.parent(parent_path, entry)?;
        if name.as_os_str().as_bytes().starts_with(WHITEOUT) {
            return self.white_out(&parent, parent_path, name, entry);
        }
        match entry.kind {
            Kind::Directory => return self.add_directory(&parent, &path, name, entry),
            Kind::File => self.add_file(&parent, name, entry, reader)?,
            Kind::Hardlink => return self.add_hardlink(&parent, name, entry),
            Kind::Symlink => self.add_symlink(&parent, name, entry)?,
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {
                self.add_node(&parent, name, entry)?;
            }
        }
        self.done.inodes += 1;
        Ok(())
    }

    fn add_root(&mut self, entry: &Entry) -> Result<(), LayerError> {
        if entry.kind != Kind::Directory {
            return Err(refused(&entry.path)("only a directory may stand for the root"));
        }
        let root = self.root.directory(Path::new("")).map_err(failed("open", &entry.path))?;
        let root = open_directory(root, Path::new(".")).map_err(failed("open", &entry.path))?;
        metadata::set_on_open(&root, entry).map_err(failed("set attributes of", &entry.path))?;
        self.root_time = Some(entry.mtime);
        Ok(())
    }

    /// The open parent directory, made if the layer does not describe it.
    fn parent(&mut self, path: &Path, entry: &Entry) -> Result<Arc<OwnedFd>, LayerError> {
        match self.root.directory(path) {
            Ok(fd) => return Ok(fd),
            Err(e)
                if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(e) => return Err(failed("open the parent of", &entry.path)(e)),
        }
        let mut links = 0;
        self.imply(path, &mut links, entry)
    }

    fn imply(
        &mut self,
        path: &Path,
        links: &mut usize,
        entry: &Entry,
    ) -> Result<Arc<OwnedFd>, LayerError> {
        if let Ok(fd) = self.root.directory(path) {
            return Ok(fd);
        }
        let fail = || failed("make the parent of", &entry.path);
        let Some(name) = path.file_name() else {
            return Err(refused(&entry.path)("the root is not a directory"));
        };
        let name = Path::new(name);
        let above_path = path.parent().unwrap_or(Path::new(""));
        let above = self.imply(above_path, links, entry)?;
        let stat = look(&above, name).map_err(fail())?;
        if stat.is_some_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Symlink) {
            // A link whose target does not exist yet: the target is what has to be made.
            *links += 1;
            if *links > MAX_LINKS {
                return Err(refused(&entry.path)("too many symbolic links above it"));
            }
            let link =
                rustix::fs::readlinkat(&above, name, Vec::new()).map_err(|e| fail()(e.into()))?;
            let target = follow(above_path, Path::new(OsStr::from_bytes(link.as_bytes())));
            return self.imply(&target, links, entry);
        }
        if stat.is_some_and(|s| !metadata::is_whiteout(&s)) {
            return Err(refused(&entry.path)("lies below something that is no directory"));
        }
        let fd = self.make_directory(&above, name).map_err(fail())?;
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755)).map_err(|e| fail()(e.into()))?;
        self.done.implied.insert(path.to_owned());
        let fd = Arc::new(fd);
        self.root.remember(path, fd.clone());
        Ok(fd)
    }

    /// A directory under this name, whatever was there; an existing one keeps its content.
    fn make_directory(&mut self, parent: &OwnedFd, name: &Path) -> io::Result<OwnedFd> {
        let mut hides = false;
        match rustix::fs::mkdirat(parent, name, Mode::RWXU) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => {
                let stat = look(parent, name)?;
                if stat.is_some_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory) {
                    return open_directory(parent, name);
                }
                hides = stat.is_some_and(|s| metadata::is_whiteout(&s));
                self.replace(parent, name)?;
                rustix::fs::mkdirat(parent, name, Mode::RWXU)?;
            }
            Err(e) => return Err(e.into()),
        }
        self.done.inodes += 1;
        self.done.bytes += BLOCK;
        let fd = open_directory(parent, name)?;
        if hides {
            metadata::set_opaque(&fd)?;
        }
        Ok(fd)
    }

    fn add_directory(
        &mut self,
        parent: &OwnedFd,
        path: &Path,
        name: &Path,
        entry: &Entry,
    ) -> Result<(), LayerError> {
        let fd =
            self.make_directory(parent, name).map_err(failed("make directory", &entry.path))?;
        metadata::set_on_open(&fd, entry).map_err(failed("set attributes of", &entry.path))?;
        self.times.push((path.to_owned(), entry.mtime));
        self.done.implied.remove(path);
        self.root.remember(path, Arc::new(fd));
        Ok(())
    }

    fn add_file(
        &mut self,
        parent: &OwnedFd,
        name: &Path,
        entry: &Entry,
        reader: &mut Reader<'_, Chunks>,
    ) -> Result<(), LayerError> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open =
            |parent: &OwnedFd| rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR);
        let fd = self.create(parent, name, open).map_err(failed("create", &entry.path))?;
        let mut file = File::from(fd);
        reader.copy_to(&mut file).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => reader.bad("ends within the data of an entry"),
            _ => failed("write", &entry.path)(e),
        })?;
        metadata::set_on_open(&file, entry).map_err(failed("set attributes of", &entry.path))?;
        metadata::set_open_time(&file, entry).map_err(failed("set times of", &entry.path))?;
        self.done.bytes += entry.size.next_multiple_of(BLOCK);
        Ok(())
    }

    fn add_hardlink(
        &mut self,
        parent: &OwnedFd,
        name: &Path,
        entry: &Entry,
    ) -> Result<(), LayerError> {
        let target = clean(&entry.link).map_err(refused(&entry.path))?;
        let Some(target_name) = target.file_name() else {
            return Err(refused(&entry.path)("links to the root"));
        };
        let target_name = Path::new(target_name);
        let beside = target.parent().unwrap_or(Path::new(""));
        let beside =
            self.root.directory(beside).map_err(failed("find the link target of", &entry.path))?;
        let same = look(parent, name)
            .and_then(|here| Ok((here, look(&beside, target_name)?)))
            .map_err(failed("look at", &entry.path))?;
        match same {
            (_, None) => return Err(refused(&entry.path)("links to a name not in this layer")),
            (_, Some(there)) if FileType::from_raw_mode(there.st_mode) == FileType::Directory => {
                return Err(refused(&entry.path)("links to a directory"));
            }
            (_, Some(there)) if metadata::is_whiteout(&there) => {
                return Err(refused(&entry.path)("links to a deleted name"));
            }
            // Replacing would remove the only copy.
            (Some(here), Some(there)) if here.st_ino == there.st_ino => return Ok(()),
            _ => {}
        }
        let link = |parent: &OwnedFd| {
            rustix::fs::linkat(&beside, target_name, parent, name, AtFlags::empty())
        };
        self.create(parent, name, link).map_err(failed("link", &entry.path))
    }

    fn add_symlink(
        &mut self,
        parent: &OwnedFd,
        name: &Path,
        entry: &Entry,
    ) -> Result<(), LayerError> {
        let target = OsStr::from_bytes(&entry.link);
        let link = |parent: &OwnedFd| rustix::fs::symlinkat(target, parent, name);
        self.create(parent, name, link).map_err(failed("make symbolic link", &entry.path))?;
        metadata::set_by_name(parent.as_fd(), name, entry, true)
            .map_err(failed("set attributes of", &entry.path))
    }

    fn add_node(&mut self, parent: &OwnedFd, name: &Path, entry: &Entry) -> Result<(), LayerError> {
        let kind = match entry.kind {
            Kind::CharDevice => FileType::CharacterDevice,
            Kind::BlockDevice => FileType::BlockDevice,
            _ => FileType::Fifo,
        };
        if kind == FileType::CharacterDevice && entry.device == (0, 0) {
            return Err(refused(&entry.path)("is a device that overlayfs takes for a deletion"));
        }
        let device = rustix::fs::makedev(entry.device.0, entry.device.1);
        let make = |parent: &OwnedFd| {
            rustix::fs::mknodat(parent, name, kind, Mode::RUSR | Mode::WUSR, device)
        };
        self.create(parent, name, make).map_err(failed("make node", &entry.path))?;
        metadata::set_by_name(parent.as_fd(), name, entry, false)
            .map_err(failed("set attributes of", &entry.path))
    }

    /// Deletions speak of the layers below only: what this layer itself put there stays.
    fn white_out(
        &mut self,
        parent: &OwnedFd,
        parent_path: &Path,
        name: &Path,
        entry: &Entry,
    ) -> Result<(), LayerError> {
        let name = name.as_os_str().as_bytes();
        let fail = || failed("mark the deletion", &entry.path);
        if name == OPAQUE {
            if parent_path.as_os_str().is_empty() {
                self.done.opaque_root = true;
            }
            return metadata::set_opaque(parent).map_err(fail());
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        let hidden = &name[WHITEOUT.len()..];
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(refused(&entry.path)("deletes no name"));
        }
        let hidden = Path::new(OsStr::from_bytes(hidden));
        match rustix::fs::mknodat(
            parent,
            hidden,
            FileType::CharacterDevice,
            Mode::empty(),
            rustix::fs::makedev(0, 0),
        ) {
            Ok(()) => {
                self.done.inodes += 1;
                Ok(())
            }
            Err(rustix::io::Errno::EXIST) => {
                let stat = look(parent, hidden).map_err(fail())?;
                if stat.is_some_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory) {
                    let dir = open_directory(parent, hidden).map_err(fail())?;
                    metadata::set_opaque(dir).map_err(fail())?;
                }
                Ok(())
            }
            Err(e) => Err(fail()(e.into())),
        }
    }

    /// Runs `make`, first taking away what already has the name.
    fn create<T>(
        &mut self,
        parent: &OwnedFd,
        name: &Path,
        make: impl Fn(&OwnedFd) -> rustix::io::Result<T>,
    ) -> io::Result<T> {
        match make(parent) {
            Err(rustix::io::Errno::EXIST) => {
                self.replace(parent, name)?;
                Ok(make(parent)?)
            }
            result => Ok(result?),
        }
    }

    fn replace(&mut self, parent: &OwnedFd, name: &Path) -> io::Result<()> {
        self.root.forget();
        self.trash.take(parent, name)
    }

    fn finish(mut self) -> Result<Unpacked, LayerError> {
        self.times.sort_unstable(); // neighbours share their parent directory
        for (path, mtime) in std::mem::take(&mut self.times) {
            let (Some(name), Some(parent)) = (path.file_name(), path.parent()) else { continue };
            let fail = || failed("set times of", path.as_os_str().as_bytes());
            match self.root.directory(parent) {
                Ok(parent) => match metadata::set_time(parent, Path::new(name), mtime) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail()(e)),
                    _ => {}
                },
                // A later entry replaced it.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) if e.kind() == io::ErrorKind::NotADirectory => {}
                Err(e) => return Err(fail()(e)),
            }
        }
        if let Some(mtime) = self.root_time {
            let root = self.root.directory(Path::new("")).map_err(failed("open", b"/"))?;
            metadata::set_time(root, Path::new("."), mtime)
                .map_err(failed("set times of", b"/"))?;
        }
        Ok(self.done)
    }
}

/// The path inside the root that an entry's name means. `..` is refused rather than interpreted:
/// no tool writes it, and tools disagree on what it means behind a symbolic link.
fn clean(name: &[u8]) -> Result<PathBuf, &'static str> {
    if name.len() > MAX_PATH {
        return Err("its name is longer than 4096 bytes");
    }
    let mut path = PathBuf::new();
    let mut depth = 0;
    for part in name.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err("its name contains \"..\""),
            part if part.len() > MAX_NAME => {
                return Err("a part of its name is longer than 255 bytes");
            }
            part => {
                depth += 1;
                path.push(OsStr::from_bytes(part));
            }
        }
    }
    if depth > MAX_DEPTH {
        return Err("it lies more than 512 directories deep");
    }
    Ok(path)
}

/// Where a symbolic link in `dir` leads, with the root as `/`.
fn follow(dir: &Path, link: &Path) -> PathBuf {
    let mut path = if link.is_absolute() { PathBuf::new() } else { dir.to_owned() };
    for part in link.components() {
        match part {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => {
                path.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    path
}

fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).chars().take(200).collect()
}

fn refused(name: &[u8]) -> impl FnOnce(&'static str) -> LayerError + use<'_> {
    move |reason| LayerError::Entry { name: shown(name), reason }
}

fn failed<'a>(
    action: &'static str,
    name: &'a [u8],
) -> impl FnOnce(io::Error) -> LayerError + use<'a> {
    move |source| LayerError::File { action, name: shown(name), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside_the_root() {
        let clean = |name: &str| clean(name.as_bytes()).map(|p| p.display().to_string());
        assert_eq!(clean("./a//b/").as_deref(), Ok("a/b"));
        assert_eq!(clean("/etc/passwd").as_deref(), Ok("etc/passwd"));
        assert_eq!(clean("./").as_deref(), Ok(""));
        for bad in ["..", "../x", "a/../../x", "a/..", &"x".repeat(256), &"a/".repeat(600)] {
            assert!(clean(bad).is_err(), "{bad}");
        }
        assert!(clean(&"a".repeat(64 << 10)).is_err());
    }

    #[test]
    fn links_are_followed_with_the_root_as_the_top() {
        let follow = |dir: &str, link: &str| follow(Path::new(dir), Path::new(link));
        assert_eq!(follow("var", "../run"), Path::new("run"));
        assert_eq!(follow("var", "/run"), Path::new("run"));
        assert_eq!(follow("a/b", "../../../../etc"), Path::new("etc"));
    }
}
