//! `/dev`: nodes, links and the console.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use pinion_sys::tty::Pty;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::{Rootfs, attach, resolve::Root};
use crate::devices::{DeviceNode, LINKS};
use crate::error::{Doing, Failure};
use crate::mount_options::MountOptions;

impl Rootfs<'_> {
    /// Creates the nodes, the standard links and `ptmx`. Expects a umask of 0.
    ///
    /// # Errors
    /// Names the node; also when `/dev` is a symlink, which could lead to a directory whose
    /// content the container shares (CVE-2026-41579).
    pub fn fill_dev(&self, nodes: &[DeviceNode]) -> Result<(), Failure> {
        let dev = self.dev()?;
        for node in nodes {
            create(&dev, node).map_err(|failure| Failure {
                what: format!(
                    "error creating device node {:?}: {}",
                    Path::new("/dev").join(&node.path).display().to_string(),
                    failure.what
                ),
                ..failure
            })?;
        }
        for (name, target) in LINKS {
            link(&dev, name, target)?;
        }
        if Path::new("/proc/kcore").exists() {
            link(&dev, "core", "/proc/kcore")?;
        }
        replace_with_link(&dev, "ptmx", "pts/ptmx")
    }

    fn dev(&self) -> Result<Root, Failure> {
        let path = Path::new("/dev");
        match self.root().find_without_links(path) {
            Ok(dev) => Ok(Root::new(dev)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.root().directory(path).map(Root::new)
            }
            Err(error) => {
                Err(error).doing(|| "open /dev, which must be an ordinary directory".into())
            }
        }
    }

    /// Opens a terminal of the container's own devpts, or the host's if it has none.
    ///
    /// # Errors
    /// As open(2).
    pub fn open_terminal(&self) -> Result<Pty, Failure> {
        match &self.devpts {
            Some(devpts) => pinion_sys::tty::open_in(devpts.as_fd(), c"ptmx"),
            None => pinion_sys::tty::open(),
        }
        .doing(|| "open a pseudo terminal".into())
    }
}

/// Makes the terminal `slave` the container's `/dev/console`.
///
/// # Errors
/// Names the call that failed.
pub fn attach_console(root: &Root, slave: BorrowedFd<'_>) -> Result<(), Failure> {
    let dev = root.find_without_links(Path::new("/dev")).doing(|| "open /dev".into())?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(&dev, "console", flags, Mode::from_raw_mode(0o666)) {
        Ok(_) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error).doing(|| "create /dev/console".into()),
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let console = rustix::fs::openat(&dev, "console", flags, Mode::empty())
        .doing(|| "open /dev/console".into())?;
    let kind = FileType::from_raw_mode(
        rustix::fs::fstat(&console).doing(|| "fstat /dev/console".into())?.st_mode,
    );
    if !matches!(kind, FileType::RegularFile | FileType::CharacterDevice) {
        return Err(Failure::refused("/dev/console is neither a file nor a device"));
    }
    attach::bind(slave, console.as_fd(), false, &MountOptions::default())
        .map(drop)
        .map_err(|f| Failure { what: format!("mount /dev/console: {}", f.what), ..f })
}

fn create(dev: &Root, node: &DeviceNode) -> Result<(), Failure> {
    let (parent, name) = match (node.path.parent(), node.path.file_name()) {
        (Some(parent), Some(name)) if !parent.as_os_str().is_empty() => {
            (dev.directory(parent)?, name)
        }
        _ => (dev.as_fd().try_clone_to_owned().doing(|| "dup".into())?, node.path.as_os_str()),
    };
    let name = Path::new(name);
    let kind = FileType::from_raw_mode(node.file_type);
    let device = rustix::fs::makedev(node.major, node.minor);
    match rustix::fs::mknodat(&parent, name, kind, Mode::from_raw_mode(node.mode), device) {
        Ok(()) => {
            if node.uid != 0 || node.gid != 0 {
                let (uid, gid) = (Some(Uid::from_raw(node.uid)), Some(Gid::from_raw(node.gid)));
                rustix::fs::chownat(&parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
                    .doing(|| "chown".into())?;
            }
            Ok(())
        }
        Err(Errno::EXIST) => {
            let found = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW)
                .doing(|| "stat".into())?;
            check(&found, node)
        }
        // A user namespace may not make nodes; the host's is bound instead.
        Err(Errno::PERM) => bind_host_node(&parent, name, node),
        Err(error) => Err(error).doing(|| "mknod".into()),
    }
}

fn check(found: &rustix::fs::Stat, node: &DeviceNode) -> Result<(), Failure> {
    let same_kind = found.st_mode & libc::S_IFMT == node.file_type;
    let numbers_matter = node.file_type != libc::S_IFIFO;
    if same_kind
        && (!numbers_matter || found.st_rdev == rustix::fs::makedev(node.major, node.minor))
    {
        Ok(())
    } else {
        Err(Failure::refused("something else is in its place"))
    }
}

fn bind_host_node(parent: &OwnedFd, name: &Path, node: &DeviceNode) -> Result<(), Failure> {
    let host = attach::open_path(&Path::new("/dev").join(&node.path))?;
    check(&rustix::fs::fstat(&host).doing(|| "fstat".into())?, node)?;
    let create = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(parent, name, create, Mode::from_raw_mode(0o666)) {
        Ok(_) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error).doing(|| "create".into()),
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let target = rustix::fs::openat(parent, name, flags, Mode::empty()).doing(|| "open".into())?;
    attach::bind(host.as_fd(), target.as_fd(), false, &MountOptions::default()).map(drop)
}

fn link(dev: &Root, name: &str, target: &str) -> Result<(), Failure> {
    match rustix::fs::symlinkat(target, dev, name) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).doing(|| format!("symlink /dev/{name} to {target}")),
    }
}

fn replace_with_link(dev: &Root, name: &str, target: &str) -> Result<(), Failure> {
    match rustix::fs::symlinkat(target, dev, name) {
        Ok(()) => return Ok(()),
        Err(Errno::EXIST) => {}
        Err(error) => return Err(error).doing(|| format!("symlink /dev/{name} to {target}")),
    }
    rustix::fs::unlinkat(dev, name, AtFlags::empty()).doing(|| format!("unlink /dev/{name}"))?;
    link(dev, name, target)
}
