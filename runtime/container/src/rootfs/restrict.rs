//! Masked and read-only paths, after the root has changed.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use super::{Root, attach, resolve};
use crate::error::{Doing, Failure};
use crate::mount_options::{Attributes, MountOptions};

/// Hides `paths`: directories behind one shared, empty, read-only tmpfs, anything else
/// behind the null device. What does not exist needs no hiding.
///
/// # Errors
/// Names the path that could not be hidden; a bent or missing `/dev/null` is an error, for
/// otherwise a mask would silently show something (CVE-2025-31133).
pub fn mask(root: &Root, paths: &[PathBuf]) -> Result<(), Failure> {
    let mut null = None;
    let mut empty: Option<OwnedFd> = None;
    for path in paths {
        let context = |failure: Failure| Failure {
            what: format!("can't mask path {:?}: {}", path.display().to_string(), failure.what),
            ..failure
        };
        let Some(target) = existing(root, path).map_err(context)? else { continue };
        if resolve::is_directory(&target).doing(|| "fstat".into()).map_err(context)? {
            match &empty {
                None => empty = Some(mount_empty(&target).map_err(context)?),
                Some(first) => drop(
                    attach::bind(first.as_fd(), target.as_fd(), false, &MountOptions::default())
                        .map_err(context)?,
                ),
            }
        } else {
            if null.is_none() {
                null = Some(null_device(root).map_err(context)?);
            }
            if let Some(null) = &null {
                attach::bind(null.as_fd(), target.as_fd(), false, &MountOptions::default())
                    .map_err(context)?;
            }
        }
    }
    Ok(())
}

/// Makes `paths` read-only, each with all mounts below it as they are.
///
/// # Errors
/// Names the path; what does not exist is skipped.
pub fn protect(root: &Root, paths: &[PathBuf]) -> Result<(), Failure> {
    let read_only = MountOptions {
        attributes: Attributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0 },
        ..MountOptions::default()
    };
    for path in paths {
        let context = |failure: Failure| Failure {
            what: format!(
                "can't make {:?} read-only: {}",
                path.display().to_string(),
                failure.what
            ),
            ..failure
        };
        if let Some(target) = existing(root, path).map_err(context)? {
            attach::bind(target.as_fd(), target.as_fd(), true, &read_only).map_err(context)?;
        }
    }
    Ok(())
}

fn existing(root: &Root, path: &Path) -> Result<Option<OwnedFd>, Failure> {
    match root.find(path) {
        Ok(target) => Ok(Some(target)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            Ok(None)
        }
        Err(error) => Err(error).doing(|| "open".into()),
    }
}

fn mount_empty(target: &OwnedFd) -> Result<OwnedFd, Failure> {
    let options = MountOptions {
        attributes: Attributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0 },
        data: vec!["nr_blocks=1".into(), "nr_inodes=1".into()],
        ..MountOptions::default()
    };
    match attach::detached_filesystem("tmpfs", "tmpfs", &options) {
        Ok(mount) => {
            attach::place(mount.as_fd(), target.as_fd()).doing(|| "move_mount".into())?;
            Ok(mount)
        }
        Err(failure) if failure.errno() == Some(libc::ENOSYS) => {
            attach::filesystem_by_path("tmpfs", "tmpfs", &options, target.as_fd())?;
            let path = std::fs::read_link(pinion_sys::fd::proc_path(target.as_fd()))
                .doing(|| "readlink".into())?;
            attach::open_path(&path)
        }
        Err(failure) => Err(failure),
    }
}

/// `/dev/null`, verified to be the null device.
fn null_device(root: &Root) -> Result<OwnedFd, Failure> {
    let null = root.find_without_links(Path::new("/dev/null")).doing(|| "open /dev/null".into())?;
    let stat = rustix::fs::fstat(&null).doing(|| "fstat /dev/null".into())?;
    let is_null = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && stat.st_rdev == rustix::fs::makedev(1, 3);
    if is_null { Ok(null) } else { Err(Failure::refused("/dev/null is not the null device")) }
}
