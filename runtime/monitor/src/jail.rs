//! What is left of the host for a machine's process: namespaces of its own, in which there is
//! nothing but what it needs to start.
//!
//! ```text
//!   PID namespace       it is the first process, and sees no other
//!   network namespace   no interface; taps come as descriptors of the pod's
//!   mount namespace     a tmpfs, read-only once it is made, with read-only binds of programs,
//!                       libraries, firmware, kernel and initramfs, and three device nodes
//!   IPC, UTS            its own
//! ```
//!
//! The tree is made in the step between, before the process gives up the user that can.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, symlink};
use std::path::{Component, Path};

use pinion_sys::mount::{MountAttributes, set_attributes};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
    mount_change, unmount,
};

/// What went wrong, and at what.
type Failure = (String, io::Error);

/// Namespaces that the step between makes; that of processes is there when it starts.
const NAMESPACES: u64 =
    (libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS) as u64;

/// Runs `work`, whose children are the first processes of PID namespaces of their own.
///
/// # Errors
/// Those of unshare(2), setns(2), and of the work.
pub(crate) fn in_new_pid_namespace<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let processes = libc::CLONE_NEWPID as u64;
    let home = File::open("/proc/self/ns/pid")?;
    pinion_sys::clone::unshare(processes)?;
    let done = work();
    pinion_sys::clone::setns(home.as_fd(), processes)?;
    done
}

/// Threads of process `pid`, by the numbers that they have in its own PID namespace, as they
/// are called here; 0 for one that is gone.
pub(crate) fn threads_outside(pid: i32, inside: &[i32]) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let pairs: Vec<(i32, i32)> = tasks
        .filter_map(|task| pair(&fs::read_to_string(task.path().join("status")).ok()?))
        .collect();
    let outside = |thread: &i32| pairs.iter().find(|(inner, _)| inner == thread);
    inside.iter().map(|thread| outside(thread).map_or(0, |(_, outer)| *outer)).collect()
}

/// The innermost and the outermost number of a thread, from its status (proc_pid_status(5)).
fn pair(status: &str) -> Option<(i32, i32)> {
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    let mut numbers = line.split_whitespace();
    let outer = numbers.next()?.parse().ok()?;
    Some((numbers.last().map_or(Ok(outer), str::parse).ok()?, outer))
}

/// Whether the other end of the socket that is our standard error is still there: in a PID
/// namespace of one's own a parent cannot be asked for.
pub(crate) fn monitor_lives() -> bool {
    let Some(errors) = pinion_sys::fd::borrow(2) else { return false };
    let mut watched = [PollFd::from_borrowed_fd(errors, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut watched, Some(&now)).is_ok()
        && watched.iter().all(|fd| !fd.revents().contains(PollFlags::HUP))
}

/// Enters a root made at `root`, an empty directory, with these paths of the host.
pub(crate) fn enter<'a>(
    root: &Path,
    visible: impl Iterator<Item = &'a Path>,
) -> Result<(), Failure> {
    let at = |what: &str, path: &Path| {
        let what = format!("{what} {}", path.display());
        move |error: io::Error| (what, error)
    };
    pinion_sys::clone::unshare(NAMESPACES).map_err(at("make namespaces for", root))?;
    // What is made here is for another user to walk through.
    rustix::process::umask(Mode::from_raw_mode(0o022));
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|error| at("make private", Path::new("/"))(error.into()))?;
    mount("jail", root, "tmpfs", MountFlags::NOSUID, c"size=1m,mode=0755")
        .map_err(|error| at("mount a tmpfs at", root)(error.into()))?;
    for path in visible {
        show(root, path).map_err(at("show", path))?;
    }
    let processes = root.join("proc");
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    make_directory(&processes)
        .and_then(|()| Ok(mount("proc", &processes, "proc", flags, c"")?))
        .map_err(at("mount proc at", &processes))?;
    std::env::set_current_dir(root).map_err(at("enter", root))?;
    rustix::process::pivot_root(".", ".").map_err(|error| at("pivot to", root)(error.into()))?;
    unmount(".", UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
        .map_err(|error| at("leave the host's root for", root)(error.into()))?;
    let here = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    here.map_err(io::Error::from)
        .and_then(|here| {
            let set = libc::MOUNT_ATTR_RDONLY;
            let attributes = MountAttributes { set, ..MountAttributes::default() };
            set_attributes(here.as_fd(), c"", false, &attributes)
        })
        .map_err(at("make read-only", root))
}

/// Binds a path of the host below `root`; links are made anew, what is not there is left out.
fn show(root: &Path, path: &Path) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let plain = path.components().all(|part| !matches!(part, Component::ParentDir));
    let Some(inside) = path.strip_prefix("/").ok().filter(|_| plain) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not an absolute plain path"));
    };
    let target = root.join(inside);
    if let Some(parent) = target.parent() {
        make_directory(parent)?;
    }
    if metadata.is_symlink() {
        let link = symlink(fs::read_link(path)?, &target);
        return link.or_else(|error| found_is_fine(&error).then_some(()).ok_or(error));
    }
    if metadata.is_dir() {
        make_directory(&target)?;
    } else if !target.exists() {
        File::create_new(&target)?;
    }
    let copy = rustix::mount::open_tree(
        CWD,
        path,
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE,
    )?;
    let device = metadata.file_type().is_char_device();
    let mut set = libc::MOUNT_ATTR_NOSUID;
    if !device {
        set |= libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV;
    }
    set_attributes(copy.as_fd(), c"", true, &MountAttributes { set, ..Default::default() })?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rustix::mount::move_mount(&copy, "", CWD, target.as_path(), flags)?)
}

fn found_is_fine(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AlreadyExists
}

fn make_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_have_a_number_in_each_namespace() {
        assert_eq!(pair("Name:\tx\nNSpid:\t300\t7\t4\n"), Some((4, 300)));
        assert_eq!(pair("NSpid:\t300\n"), Some((300, 300)));
        assert_eq!(pair("NSpid:\n"), None);
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(threads_outside(own, &[own, -5]), [own, 0]);
    }
}
