//! Images as volumes: the files of an image, or some of them, shown to a container read-only.
//!
//! A path below the image's root is resolved as if that root were `/`, so that no link of the
//! image leads out of it, and what it names is mounted by descriptor.

use std::{
    ffi::OsString,
    fs,
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::FileType,
    mount::{OpenTreeFlags, open_tree},
};

use crate::{
    Error, IdMap, Images,
    error::Result,
    overlay::{failed, place, unmount_all},
    rootfs::Make,
};

impl Images {
    /// Mounts an image read-only at `target`, and what it has at `sub_path` beside it; the
    /// place of what was asked for. `id` is the volume's own, unlike that of any container.
    /// Repeating it is fine.
    ///
    /// # Errors
    /// An image that is not here; a path that is not one, or that the image does not have.
    pub fn prepare_volume(
        &self,
        id: &str,
        image_id: &str,
        target: &Path,
        sub_path: &str,
        ids: Option<&IdMap>,
    ) -> Result<PathBuf> {
        let below = check_sub_path(image_id, sub_path)?;
        self.prepare(id, image_id, target, Make::Volume, ids)?;
        let Some(below) = below else { return Ok(target.to_owned()) };
        let shown = beside(target);
        let result = show(image_id, target, below, &shown);
        if result.is_err() {
            // The failure to show it is the one to report; the record lets a retry clean up.
            let _ = self.remove_volume(id, target);
        }
        result.map(|()| shown)
    }

    /// Unmounts a volume. Repeating it is fine.
    pub fn remove_volume(&self, id: &str, target: &Path) -> Result<()> {
        unmount_all(&beside(target))?;
        self.remove_rootfs(id, target)
    }
}

/// Where a part of a volume is mounted.
fn beside(target: &Path) -> PathBuf {
    let mut name = OsString::from(target);
    name.push(".part");
    name.into()
}

/// `None` for the whole image.
fn check_sub_path<'a>(image: &str, path: &'a str) -> Result<Option<&'a Path>> {
    let refuse = |reason: &str| {
        let path = path.chars().take(200).collect();
        Err(Error::SubPath { image: image.to_owned(), path, reason: reason.to_owned() })
    };
    let parsed = Path::new(path);
    if path.contains('\0') || path.len() > 4095 {
        return refuse("is not a path");
    }
    for part in parsed.components() {
        match part {
            Component::Normal(_) | Component::CurDir => {}
            Component::ParentDir => return refuse("must not contain \"..\""),
            Component::RootDir | Component::Prefix(_) => return refuse("must be relative"),
        }
    }
    let whole = !parsed.components().any(|part| matches!(part, Component::Normal(_)));
    Ok((!whole).then_some(parsed))
}

/// Mounts `below` of the volume at `target` at `shown`.
fn show(image: &str, target: &Path, below: &Path, shown: &Path) -> Result<()> {
    let found = resolve(target, below).map_err(|reason| Error::SubPath {
        image: image.to_owned(),
        path: below.display().to_string(),
        reason,
    })?;
    let stat = rustix::fs::fstat(&found).map_err(|e| Error::file("look at", below)(e.into()))?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    unmount_all(shown)?;
    let made = match kind {
        FileType::Directory => fs::create_dir_all(shown),
        _ => fs::File::create(shown).map(drop),
    };
    made.map_err(Error::file("create", shown))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(found.as_fd(), "", flags)
        .map_err(|e| failed(shown, "open_tree".to_owned())(e.into()))?;
    place(&tree, shown).map_err(|(step, e)| failed(shown, step)(e.into()))
}

fn resolve(root: &Path, below: &Path) -> Result<OwnedFd, String> {
    let handle = pathrs::Root::open(root).and_then(|root| root.resolve(below));
    let found = OwnedFd::from(handle.map_err(|error| error.to_string())?);
    let stat = rustix::fs::fstat(&found).map_err(|errno| errno.to_string())?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory | FileType::RegularFile => Ok(found),
        _ => Err("is neither a directory nor a regular file".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_leave_the_image_are_refused_before_anything_is_mounted() {
        for path in ["..", "a/../../b", "/etc", "a/..", "x\0y", &"a/".repeat(3000)] {
            let error = check_sub_path("sha256:1", path).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::InvalidArgument, "{path:?}");
        }
        for whole in ["", ".", "./."] {
            assert_eq!(check_sub_path("i", whole).unwrap(), None);
        }
        assert_eq!(check_sub_path("i", "etc/ssl").unwrap(), Some(Path::new("etc/ssl")));
    }

    #[test]
    fn links_of_the_image_lead_nowhere_but_into_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(root.join("etc/kept"), "inside").unwrap();
        fs::write(dir.path().join("secret"), "outside").unwrap();
        std::os::unix::fs::symlink("/etc", root.join("abs")).unwrap();
        std::os::unix::fs::symlink("../../secret", root.join("out")).unwrap();
        std::os::unix::fs::symlink("loop", root.join("loop")).unwrap();
        let read = |fd: OwnedFd| {
            use std::io::Read as _;
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
            let mut text = String::new();
            fs::File::open(path).unwrap().read_to_string(&mut text).unwrap();
            text
        };
        assert_eq!(read(resolve(&root, Path::new("abs/kept")).unwrap()), "inside");
        for path in ["out", "loop", "missing", "etc/kept/x"] {
            assert!(resolve(&root, Path::new(path)).is_err(), "{path}");
        }
    }
}
