//! Root filesystems as disks: one read-only ext4 image per container image.
//!
//! `mke2fs -d` writes it from the mounted layers, so the guest sees what a container on the
//! host would, and nothing else of the host. It is made at the first container of an image
//! and kept; what a container writes stays in the guest.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::PoisonError;

use crate::error::{Context, Error, Result};
use crate::node::Node;
use crate::programs::find;

/// The disk of an image whose layers are mounted at `rootfs`; made if it is not there.
/// Blocks.
pub(crate) fn ensure(node: &Node, image: &str, rootfs: &Path) -> Result<PathBuf> {
    let _one = node.machines.making.lock().unwrap_or_else(PoisonError::into_inner);
    sweep(node);
    let directory = directory(node);
    let disk = directory.join(format!("{}.ext4", name(image)?));
    if disk.exists() {
        return Ok(disk);
    }
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(&directory).context(|| format!("create {}", directory.display()))?;
    let part = disk.with_extension("part");
    drop(fs::remove_file(&part));
    let made = make(node, rootfs, &part).and_then(|()| {
        let file = fs::File::open(&part).and_then(|file| file.sync_all());
        file.and_then(|()| fs::rename(&part, &disk)).context(|| format!("keep {}", disk.display()))
    });
    if made.is_err() {
        drop(fs::remove_file(&part));
    }
    made.map(|()| disk)
}

/// Removes disks of images that are gone. A machine that has one open keeps it.
fn sweep(node: &Node) {
    let known: Vec<String> =
        node.images.list().iter().filter_map(|image| name(&image.id).ok()).collect();
    for entry in fs::read_dir(directory(node)).into_iter().flatten().flatten() {
        let path = entry.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        if !known.iter().any(|name| name == stem)
            && let Err(error) = fs::remove_file(&path)
        {
            tracing::warn!(path = %path.display(), %error, "a disk of no image stays");
        }
    }
}

fn directory(node: &Node) -> PathBuf {
    node.paths.root().join("vm/disks")
}

/// An image's id as a file name.
fn name(image: &str) -> Result<String> {
    let hex = image.rsplit(':').next().unwrap_or(image);
    if hex.len() >= 32 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        Ok(hex.to_owned())
    } else {
        Err(Error::internal(format!("image id {image:?} has no digest")))
    }
}

fn make(node: &Node, rootfs: &Path, disk: &Path) -> Result<()> {
    let program = find(&node.config.vm.mke2fs, "mke2fs", "vm.mke2fs")?;
    let mut content = Content::default();
    measure(rootfs, &mut content).context(|| format!("measure {}", rootfs.display()))?;
    let (kilobytes, inodes) = content.room();
    let output = Command::new(&program)
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0"])
        .args(["-O", "^has_journal,^resize_inode,^metadata_csum", "-N", &inodes.to_string(), "-d"])
        .arg(rootfs)
        .arg(disk)
        .arg(format!("{kilobytes}k"))
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .output()
        .context(|| format!("start {}", program.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(Error::internal(format!(
        "{} -d {} ({kilobytes} KiB, {inodes} inodes): {}: {}",
        program.display(),
        rootfs.display(),
        output.status,
        words.trim()
    )))
}

/// How much there is.
#[derive(Debug, Default, PartialEq, Eq)]
struct Content {
    /// In blocks of 4 KiB, each file rounded up.
    blocks: u64,
    inodes: u64,
}

impl Content {
    /// KiB and inodes of a filesystem that holds it, its own tables included.
    fn room(&self) -> (u64, u64) {
        let inodes = self.inodes + self.inodes / 8 + 64;
        let tables = inodes.div_ceil(16);
        let blocks = self.blocks + self.blocks / 16 + tables + 1024;
        (blocks * 4, inodes)
    }
}

fn measure(directory: &Path, content: &mut Content) -> std::io::Result<()> {
    content.inodes += 1;
    content.blocks += 1;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            measure(&entry.path(), content)?;
        } else {
            content.inodes += 1;
            content.blocks += metadata.size().div_ceil(4096) + 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_images_become_plain_names() {
        let digest = "a".repeat(64);
        assert_eq!(name(&format!("sha256:{digest}")).unwrap(), digest);
        for bad in ["", "sha256:", "sha256:../../etc", "latest"] {
            assert!(name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn small_files_need_room_too() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..100 {
            fs::write(dir.path().join(number.to_string()), "x").unwrap();
        }
        let mut content = Content::default();
        measure(dir.path(), &mut content).unwrap();
        assert_eq!(content, Content { blocks: 201, inodes: 101 });
        let (kilobytes, inodes) = content.room();
        assert!(kilobytes > 4096 && inodes > 101);
    }
}
