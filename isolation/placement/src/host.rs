//! Where this machine keeps what placement reads and writes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::files;

/// The kernel's release and what it starts with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// Its first two numbers.
    pub version: (u32, u32),
}

impl Kernel {
    /// Parses a release such as `6.12.95+deb12-amd64`; unreadable numbers count as 0.
    #[must_use]
    pub fn parse(release: &str) -> Self {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit());
        let mut next = || numbers.next().and_then(|text| text.parse().ok()).unwrap_or(0);
        Self { version: (next(), next()), release: release.to_owned() }
    }
}

/// Mount points and roots; a directory of files can stand in for a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Mount point of cgroup v2, if mounted.
    pub v2: Option<PathBuf>,
    /// Mount points of cgroup v1 controllers.
    pub v1: BTreeMap<String, PathBuf>,
    /// The directory that has `proc` and `sys` in it.
    pub root: PathBuf,
    /// The running kernel.
    pub kernel: Kernel,
}

impl Host {
    /// Looks at the machine this process runs on.
    pub fn detect() -> io::Result<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let kernel = Kernel::parse(&rustix::system::uname().release().to_string_lossy());
        Ok(Self::from_mounts(&mounts, kernel))
    }

    fn from_mounts(mounts: &str, kernel: Kernel) -> Self {
        let mut host = Self { v2: None, v1: BTreeMap::new(), root: PathBuf::from("/"), kernel };
        for line in mounts.lines() {
            // 36 35 0:31 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw
            let Some((mount, filesystem)) = line.split_once(" - ") else { continue };
            let mut filesystem = filesystem.split(' ');
            let (kind, options) = (filesystem.next(), filesystem.nth(1).unwrap_or_default());
            let mut mount = mount.split(' ').skip(3);
            let (Some(subtree), Some(point)) = (mount.next(), mount.next()) else { continue };
            if subtree.starts_with("/..") {
                continue; // a bind mount of somebody else's groups
            }
            let point = PathBuf::from(point.replace("\\040", " "));
            match kind {
                Some("cgroup2") if host.v2.is_none() => host.v2 = Some(point),
                Some("cgroup") => {
                    for option in options.split(',') {
                        host.v1.entry(option.to_owned()).or_insert_with(|| point.clone());
                    }
                }
                _ => {}
            }
        }
        host.v1.retain(|name, _| !matches!(name.as_str(), "rw" | "ro" | "xattr" | "noprefix"));
        host
    }

    /// The v2 mount point if the cpuset controller lives there.
    #[must_use]
    pub fn v2_with_cpuset(&self) -> Option<&Path> {
        let root = self.v2.as_deref()?;
        let controllers = files::read(&root.join("cgroup.controllers")).ok()??;
        controllers.split(' ').any(|name| name == "cpuset").then_some(root)
    }

    pub(crate) fn proc(&self) -> PathBuf {
        self.root.join("proc")
    }

    /// Keeps other placements on this machine out while CPU lists of shared ancestors are
    /// read and rewritten. `None` without cgroup v2, where nothing shared is written.
    pub fn lock(&self) -> io::Result<Option<TreeLock>> {
        self.v2.as_deref().map(TreeLock::take).transpose()
    }
}

/// An exclusive lock on the cgroup v2 tree, held until dropped; the lock is `flock(2)` on the
/// mount point, so that it needs no file of its own and dies with its holder.
#[derive(Debug)]
pub struct TreeLock(#[expect(dead_code, reason = "held for its lock")] File);

impl TreeLock {
    /// Waits for the lock.
    pub fn take(v2: &Path) -> io::Result<Self> {
        let root = File::open(v2)?;
        flock(&root, FlockOperation::LockExclusive)?;
        Ok(Self(root))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_parsed_as_far_as_they_go() {
        assert_eq!(Kernel::parse("6.12.95+deb12-amd64").version, (6, 12));
        assert_eq!(Kernel::parse("7.0-rc1").version, (7, 0));
        assert_eq!(Kernel::parse("nonsense").version, (0, 0));
    }

    #[test]
    fn hybrid_mounts_give_both_versions() {
        let mounts = "\
30 29 0:26 / /sys/fs/cgroup ro shared:4 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw shared:5 - cgroup2 cgroup rw,nsdelegate
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
33 30 0:29 /../x /mnt/foreign rw - cgroup cgroup rw,cpuset
34 30 0:29 / /sys/fs/cgroup/cpuset rw shared:7 - cgroup cgroup rw,cpuset";
        let host = Host::from_mounts(mounts, Kernel::parse("6.1.0"));
        assert_eq!(host.v2, Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(host.v1["cpuset"], Path::new("/sys/fs/cgroup/cpuset"));
        assert_eq!(host.v1["cpuacct"], Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert!(!host.v1.contains_key("rw"));
    }

    #[test]
    fn the_lock_keeps_a_second_holder_out_until_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let first = TreeLock::take(dir.path()).unwrap();
        let other = File::open(dir.path()).unwrap();
        assert!(flock(&other, FlockOperation::NonBlockingLockExclusive).is_err());
        drop(first);
        flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
    }
}
