//! procfs through a handle that no mount in the container can redirect.
//!
//! A racing bind mount over `/proc/self/attr/exec` or `/proc/sys/…` would send a write of
//! the runtime to another file (CVE-2025-52881). All writes go through the root of a procfs
//! mount held open since before anything else was mounted, and must not cross into another
//! mount.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::error::{Doing, Failure};
use crate::mount_options::MountOptions;
use crate::rootfs::attach;

/// A procfs of the container's PID namespace.
#[derive(Debug)]
pub struct Proc {
    root: OwnedFd,
}

impl Proc {
    /// Uses the root of an attached mount.
    ///
    /// # Errors
    /// When it is not procfs.
    pub fn on(root: OwnedFd) -> Result<Self, Failure> {
        let kind = rustix::fs::fstatfs(&root).doing(|| "statfs procfs".into())?.f_type;
        if kind != rustix::fs::PROC_SUPER_MAGIC {
            return Err(Failure::refused("/proc is not procfs"));
        }
        Ok(Self { root })
    }

    /// Makes a procfs that is mounted nowhere.
    ///
    /// # Errors
    /// As fsmount(2).
    pub fn detached() -> Result<Self, Failure> {
        match attach::detached_filesystem("proc", "proc", &MountOptions::default()) {
            Ok(root) => Self::on(root),
            // Without the new mount API (or the right to a private instance) the visible
            // one serves, if it is one.
            Err(_) => Self::on(attach::open_path(std::path::Path::new("/proc"))?),
        }
    }

    /// Writes `value` to the file `path` below the root, in one write.
    ///
    /// # Errors
    /// `EXDEV` when something is mounted over any part of the path.
    pub fn write(&self, path: &str, value: &str) -> Result<(), Failure> {
        let what = || format!("write {value:?} to /proc/{path}");
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve);
        let file = match file {
            Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) => {
                let file =
                    rustix::fs::openat(&self.root, path, flags | OFlags::NOFOLLOW, Mode::empty())
                        .doing(what)?;
                self.check_same_mount(&file)?;
                file
            }
            other => other.doing(what)?,
        };
        let written = rustix::io::write(&file, value.as_bytes()).doing(what)?;
        if written != value.len() {
            return Err(Failure::refused(format!("{}: only {written} bytes were taken", what())));
        }
        Ok(())
    }

    fn check_same_mount(&self, file: &OwnedFd) -> Result<(), Failure> {
        let device =
            |fd: &OwnedFd| rustix::fs::fstat(fd).map(|s| s.st_dev).doing(|| "fstat".into());
        if device(file)? == device(&self.root)? {
            Ok(())
        } else {
            Err(Failure::refused("a part of /proc is covered by another file system"))
        }
    }
}
