//! Files of the host for a guest: what the pod's containers were given, and nothing else.
//!
//! ```text
//!   host's mount namespace            virtiofsd's own (its root is a read-only tmpfs)
//!     /var/lib/…/configmap ──clone──▶  /C-0    read-only, no devices, no set-user-id
//!     /var/lib/…/emptydir  ──clone──▶  /C-1
//!                                        ▲ vhost-user ── QEMU ── guest's /run/pinion/share
//! ```
//!
//! The tree is a tmpfs that only this process can write to, through a descriptor; each thing
//! lent is a detached copy of its mount, moved into the namespace that virtiofsd made and
//! pivoted into. A link or `..` of the guest is resolved in that namespace, so the host's
//! other files are not out of reach but not there. All of it goes with virtiofsd: nothing is
//! ever mounted where the host could see it, and nothing can be left behind.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use pinion_microvm::driver::Launch;
use pinion_microvm::plan;
use pinion_sys::mount::{MountAttributes, set_attributes};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};

use crate::error::{Context, Error};

/// Most descriptors that virtiofsd may have: one for each file that a guest knows of.
const FILES: u64 = 65_536;

/// The number that the tree's mount has in the step between.
pub(crate) const TREE: i32 = 3;
/// The number that the listening socket has in virtiofsd.
const LISTENER: i32 = 4;

/// A tree of things lent to a guest, and who serves it.
#[derive(Debug)]
pub(crate) struct SharedFiles {
    /// The tree's root, where it can be written to.
    tree: OwnedFd,
    /// virtiofsd's process, our child.
    pub(crate) pid: i32,
    lent: BTreeSet<String>,
}

/// What virtiofsd is started with, and the socket that the machine speaks to it on.
#[derive(Debug)]
pub(crate) struct Beginning {
    pub(crate) launch: Launch,
    /// Its descriptors, from 3 on.
    pub(crate) ends: Vec<OwnedFd>,
    /// For the machine.
    pub(crate) socket: OwnedFd,
    tree: OwnedFd,
}

impl Beginning {
    /// Makes the tree and the socket of a share.
    pub(crate) fn new(share: &plan::Share) -> Result<Self, Error> {
        let directory = &share.directory;
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(directory).context(|| format!("create {directory:?}"))?;
        let tree = tree().context(|| "make a tmpfs for what is shared".to_owned())?;
        let (socket, listener) = sockets(directory)?;
        let copy = tree.try_clone().context(|| "duplicate a descriptor".to_owned())?;
        let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
            .context(|| "getrlimit(RLIMIT_NOFILE)".to_owned())?;
        Ok(Self {
            launch: Launch {
                program: share.program.clone(),
                arguments: arguments(directory, FILES.min(hard)),
                environment: Vec::new(),
            },
            ends: vec![copy, listener],
            socket,
            tree,
        })
    }

    /// virtiofsd runs as `pid`.
    pub(crate) fn begun(self, pid: i32) -> (SharedFiles, OwnedFd) {
        (SharedFiles { tree: self.tree, pid, lent: BTreeSet::new() }, self.socket)
    }
}

fn arguments(directory: &Path, files: u64) -> Vec<std::ffi::OsString> {
    let mut words: Vec<std::ffi::OsString> = Vec::new();
    words.push("--shared-dir".into());
    words.push(directory.into());
    words.push(format!("--fd={LISTENER}").into());
    words.push(format!("--rlimit-nofile={files}").into());
    for word in [
        "--sandbox=namespace",
        "--seccomp=kill",
        // What the host changes is seen within a second, and at the next open.
        "--cache=auto",
        "--announce-submounts",
        "--xattr",
        // A guest has no business making device nodes on the host, nor files that gain rights.
        "--modcaps=-mknod:-setfcap",
        "--log-level=error",
    ] {
        words.push(word.into());
    }
    words
}

/// A tmpfs that is mounted nowhere.
fn tree() -> rustix::io::Result<OwnedFd> {
    use rustix::mount::{fsconfig_create, fsconfig_set_string, fsmount, fsopen};
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("size", "1m"), ("nr_inodes", "4096"), ("mode", "0755")] {
        fsconfig_set_string(context.as_fd(), key, value)?;
    }
    fsconfig_create(context.as_fd())?;
    fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID,
    )
}

/// A connection, and the listener that has yet to accept it; its name is gone by then.
fn sockets(directory: &Path) -> Result<(OwnedFd, OwnedFd), Error> {
    let path = directory.with_extension("sock");
    let what = || format!("listen at {path:?}");
    drop(fs::remove_file(&path));
    let listener = UnixListener::bind(&path).context(what)?;
    let socket = UnixStream::connect(&path).context(what);
    fs::remove_file(&path).context(|| format!("remove {path:?}"))?;
    Ok((socket?.into(), listener.into()))
}

/// In the step between, in a mount namespace of its own: puts the tree where virtiofsd looks
/// for it, read-only.
pub(crate) fn place_tree(directory: &Path) -> std::io::Result<()> {
    let tree = pinion_sys::fd::borrow(TREE).ok_or(std::io::ErrorKind::InvalidInput)?;
    rustix::mount::move_mount(tree, "", CWD, directory, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    // virtiofsd has no use for where the tree can be written to.
    pinion_sys::fd::set_cloexec(TREE, true)?;
    rustix::mount::mount_bind(directory, directory)?;
    let place = rustix::fs::open(directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    restrict(place.as_fd(), true)
}

fn restrict(mount: std::os::fd::BorrowedFd<'_>, read_only: bool) -> std::io::Result<()> {
    let mut set = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;
    if read_only {
        set |= libc::MOUNT_ATTR_RDONLY;
    }
    let propagation = libc::MS_PRIVATE;
    let attributes = MountAttributes { set, propagation, ..MountAttributes::default() };
    set_attributes(mount, c"", true, &attributes)
}

impl SharedFiles {
    /// Lends the file or directory `source` under `name`.
    pub(crate) fn lend(&mut self, name: &str, source: &Path, ro: bool) -> Result<(), Error> {
        let what = || format!("share {source:?} with the guest");
        let original = rustix::fs::open(source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let original = original.context(|| format!("open {source:?}"))?;
        let kind = rustix::fs::fstat(&original).context(what)?.st_mode;
        let copy = rustix::mount::open_tree(
            &original,
            "",
            OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_EMPTY_PATH
                | OpenTreeFlags::AT_RECURSIVE,
        );
        let copy = copy.context(|| format!("copy the mount of {source:?}"))?;
        restrict(copy.as_fd(), ro).context(what)?;
        if rustix::fs::FileType::from_raw_mode(kind).is_dir() {
            rustix::fs::mkdirat(&self.tree, name, Mode::from_raw_mode(0o755)).context(what)?;
        } else {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&self.tree, name, flags, Mode::from_raw_mode(0o644))
                .context(what)?;
        }
        self.lent.insert(name.to_owned());
        let place = format!("/{name}");
        let moved = self.inside(|| {
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            Ok(rustix::mount::move_mount(&copy, "", CWD, place.as_str(), flags)?)
        });
        if moved.is_err() {
            drop(self.take_back(name));
        }
        moved.context(what)
    }

    /// Takes back what was lent as `name`.
    pub(crate) fn take_back(&mut self, name: &str) -> Result<(), Error> {
        if !self.lent.remove(name) {
            return Ok(());
        }
        let what = || format!("take {name} back from the guest");
        let place = format!("/{name}");
        let gone = self.inside(|| {
            let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
            match rustix::mount::unmount(place.as_str(), flags) {
                // Never mounted.
                Err(rustix::io::Errno::INVAL) => Ok(()),
                other => Ok(other?),
            }
        });
        gone.context(what)?;
        let flags = if rustix::fs::statat(&self.tree, name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir())
        {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        rustix::fs::unlinkat(&self.tree, name, flags).context(what)
    }

    /// Does something in virtiofsd's mount namespace, of which the root must be the tree.
    fn inside<T>(&self, work: impl FnOnce() -> std::io::Result<T>) -> std::io::Result<T> {
        let home = File::open("/proc/self/ns/mnt")?;
        let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        // Our child, not reaped yet: the number is still its own.
        let there = File::open(format!("/proc/{}/ns/mnt", self.pid))?;
        let mounts = libc::CLONE_NEWNS as u64;
        pinion_sys::clone::setns(there.as_fd(), mounts)?;
        let tree = rustix::fs::fstat(&self.tree);
        let done = match (tree, fs::metadata("/")) {
            (Ok(tree), Ok(here)) if (tree.st_dev, tree.st_ino) == (here.dev(), here.ino()) => {
                work()
            }
            _ => Err(std::io::Error::other("virtiofsd is not in its tree")),
        };
        let back = pinion_sys::clone::setns(home.as_fd(), mounts)
            .and_then(|()| Ok(rustix::process::fchdir(&root)?))
            .and_then(|()| Ok(rustix::process::chroot(".")?));
        if back.is_err() {
            // With another's files under its paths this process must not go on; the machine
            // ends with it.
            std::process::abort();
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtiofsd_is_never_started_without_its_own_confinement() {
        let words = arguments(Path::new("/run/x"), 1024);
        let line: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        for word in ["--sandbox=namespace", "--seccomp=kill", "--modcaps=-mknod:-setfcap"] {
            assert!(line.iter().any(|given| given == word), "{word} in {line:?}");
        }
        assert!(line.iter().all(|word| !word.contains("none")), "{line:?}");
    }
}
