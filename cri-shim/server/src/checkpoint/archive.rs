//! A tar archive that appears complete or not at all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use tar::{Builder, EntryType, Header};

use crate::error::{Context, Result};
use crate::ids;

/// Most of CRIU's log that is looked at.
const LOG_END: u64 = 64 << 10;

/// An archive that is being written, beside its place.
pub(super) struct Archive {
    place: PathBuf,
    draft: PathBuf,
    builder: Option<Builder<BufWriter<File>>>,
}

impl Archive {
    /// Begins an archive for `place`, readable by root alone.
    pub(super) fn create(place: &Path) -> Result<Self> {
        let mut name = OsString::from(".");
        name.push(place.file_name().unwrap_or_default());
        name.push(format!(".{}", &ids::random_id()?[..12]));
        let draft = place.with_file_name(name);
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&draft)
            .context(|| format!("create {}", draft.display()))?;
        let builder = Some(Builder::new(BufWriter::new(file)));
        Ok(Self { place: place.to_path_buf(), draft, builder })
    }

    fn what(&self, name: &str) -> String {
        format!("write {name} to {}", self.place.display())
    }

    fn append(&mut self, name: &str, header: &mut Header, from: impl Read) -> Result<()> {
        header.set_mtime(0);
        let Some(builder) = &mut self.builder else { return Ok(()) };
        let written = builder.append_data(header, name, from);
        written.context(|| self.what(name))
    }

    /// Adds a file with these bytes.
    pub(super) fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o600);
        header.set_size(bytes.len() as u64);
        self.append(name, &mut header, bytes)
    }

    /// Adds a file of ours.
    pub(super) fn file(&mut self, name: &str, path: &Path) -> Result<()> {
        let what = || format!("read {}", path.display());
        let file = File::open(path).context(what)?;
        let size = file.metadata().context(what)?.len();
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o600);
        header.set_size(size);
        self.append(name, &mut header, file.take(size))
    }

    /// Adds a directory of ours with the files in it.
    pub(super) fn directory(&mut self, name: &str, path: &Path) -> Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Directory);
        header.set_mode(0o700);
        header.set_size(0);
        self.append(&format!("{name}/"), &mut header, std::io::empty())?;
        let what = || format!("read directory {}", path.display());
        let mut files = Vec::new();
        for entry in fs::read_dir(path).context(what)? {
            let entry = entry.context(what)?;
            if entry.file_type().context(what)?.is_file() {
                files.push(entry.file_name());
            }
        }
        files.sort();
        for file in files {
            let name = format!("{name}/{}", file.to_string_lossy());
            self.file(&name, &path.join(file))?;
        }
        Ok(())
    }

    /// Makes it durable and puts it in its place.
    pub(super) fn publish(mut self) -> Result<()> {
        let what = |archive: &Self| format!("write {}", archive.place.display());
        let Some(builder) = self.builder.take() else { return Ok(()) };
        let file = builder.into_inner().and_then(|writer| Ok(writer.into_inner()?));
        file.and_then(|file| file.sync_all()).context(|| what(&self))?;
        fs::rename(&self.draft, &self.place).context(|| what(&self))?;
        let parent = self.place.parent().unwrap_or(Path::new("/"));
        File::open(parent).and_then(|dir| dir.sync_all()).context(|| what(&self))
    }
}

impl Drop for Archive {
    /// One that was not published leaves nothing.
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.draft);
    }
}

/// The last error in CRIU's log, as one plain line.
pub(super) fn last_error(log: &Path) -> Option<String> {
    let mut file = File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_END))).ok()?;
    let mut bytes = Vec::new();
    file.take(LOG_END).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().rev().find(|line| line.contains("Error"))?;
    Some(line.chars().filter(|c| !c.is_control()).take(300).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_whole_or_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("x.tar");
        let images = dir.path().join("images");
        fs::create_dir(&images).unwrap();
        fs::write(images.join("core-1.img"), "memory").unwrap();
        let mut dropped = Archive::create(&place).unwrap();
        dropped.bytes("config.dump", b"{}").unwrap();
        drop(dropped);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only the images");

        let mut archive = Archive::create(&place).unwrap();
        archive.bytes("config.dump", b"{}").unwrap();
        archive.directory("checkpoint", &images).unwrap();
        assert!(!place.exists());
        archive.publish().unwrap();
        let mut read = tar::Archive::new(File::open(&place).unwrap());
        let names: Vec<_> = read
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, ["config.dump", "checkpoint/", "checkpoint/core-1.img"]);
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(&place).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn the_reason_is_taken_from_criu_s_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("dump.log");
        fs::write(&log, "(0.1) fine\n(0.2) Error (criu/x.c:1): no\x1b[31m\n(0.3) end\n").unwrap();
        assert_eq!(last_error(&log).unwrap(), "(0.2) Error (criu/x.c:1): no[31m");
        assert_eq!(last_error(&dir.path().join("none")), None);
    }
}
