//! Giving a process its terminal and standard descriptors.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{Gid, Mode, OFlags, Uid};

use crate::error::{Doing, Failure};
use crate::process::ProcessPlan;
use crate::rootfs::Root;

/// Hands the master to whoever listens on the console socket. `line_feeds` are kept as they
/// are for a runtime that copies what is printed itself.
///
/// # Errors
/// Names the call that failed.
pub(crate) fn offer(
    master: BorrowedFd<'_>,
    socket: BorrowedFd<'_>,
    plan: &ProcessPlan,
    line_feeds: bool,
) -> Result<(), Failure> {
    if line_feeds {
        pinion_sys::tty::keep_line_feeds(master).doing(|| "tcsetattr".into())?;
    }
    if let Some((rows, columns)) = plan.console_size {
        pinion_sys::tty::set_size(master, rows, columns)
            .doing(|| "set the terminal's size".into())?;
    }
    pinion_sys::scm::send(socket, b"/dev/ptmx", &[master])
        .doing(|| "send the terminal to the console socket".into())
        .map(drop)
}

/// Makes the slave the controlling terminal and standard descriptors of this (session
/// leading) process.
///
/// # Errors
/// Names the call that failed.
pub(crate) fn take(slave: BorrowedFd<'_>) -> Result<(), Failure> {
    pinion_sys::process::set_controlling_terminal(slave)
        .doing(|| "set the controlling terminal".into())?;
    pinion_sys::fd::become_stdio(slave).doing(|| "dup2".into())
}

/// Exchanges the host's null device on a standard descriptor for the container's: otherwise
/// the process would hold a file of a mount it cannot reach, which no checkpoint can name.
///
/// # Errors
/// As open(2); a `/dev/null` of the image that is something else is left alone.
pub(crate) fn own_null(root: &Root) -> Result<(), Failure> {
    let mut null = None;
    for number in 0..=2 {
        let Some(fd) = pinion_sys::fd::borrow(number) else { continue };
        if rustix::fs::fstat(fd).doing(|| "fstat".into())?.st_rdev != NULL_DEVICE {
            continue;
        }
        if null.is_none() {
            let Ok(place) = root.find_without_links(Path::new("/dev/null")) else { return Ok(()) };
            let stat = rustix::fs::fstat(&place).doing(|| "fstat /dev/null".into())?;
            if stat.st_rdev != NULL_DEVICE {
                return Ok(());
            }
            let path = pinion_sys::fd::proc_path(place.as_fd());
            let flags = OFlags::RDWR | OFlags::CLOEXEC;
            null = rustix::fs::open(&path, flags, Mode::empty()).ok();
        }
        if let Some(null) = &null {
            pinion_sys::fd::replace_stdio(null.as_fd(), number).doing(|| "dup2".into())?;
        }
    }
    Ok(())
}

/// `makedev(1, 3)`.
const NULL_DEVICE: u64 = 0x103;

/// Lets the process's user reopen its standard descriptors through `/proc/self/fd`.
///
/// # Errors
/// As fchown(2), except where the descriptor has no owner to change.
pub(crate) fn own_stdio(uid: u32) -> Result<(), Failure> {
    for number in 0..=2 {
        let Some(fd) = pinion_sys::fd::borrow(number) else { continue };
        let stat = rustix::fs::fstat(fd).doing(|| "fstat".into())?;
        if stat.st_uid == uid || stat.st_rdev == NULL_DEVICE {
            continue;
        }
        let (owner, group) = (Uid::from_raw(uid), Gid::from_raw(stat.st_gid));
        match rustix::fs::fchown(fd, Some(owner), Some(group)) {
            // Read-only file systems and ids without a mapping: opening anew will not work,
            // using the descriptor will.
            Ok(())
            | Err(rustix::io::Errno::INVAL | rustix::io::Errno::PERM | rustix::io::Errno::ROFS) => {
            }
            Err(error) => return Err(error).doing(|| format!("chown descriptor {number}")),
        }
    }
    Ok(())
}
