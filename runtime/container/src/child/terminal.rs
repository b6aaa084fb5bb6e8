//! Giving a process its terminal and standard descriptors.

use std::os::fd::{AsFd, BorrowedFd};

use pinion_sys::tty::Pty;
use rustix::fs::{Gid, Uid};

use crate::error::{Doing, Failure};
use crate::process::ProcessPlan;

/// Hands the master to whoever listens on the console socket, and makes the slave the
/// controlling terminal and standard descriptors of this (session leading) process.
///
/// # Errors
/// Names the call that failed.
pub(crate) fn install(
    pty: &Pty,
    socket: BorrowedFd<'_>,
    plan: &ProcessPlan,
) -> Result<(), Failure> {
    if let Some((rows, columns)) = plan.console_size {
        pinion_sys::tty::set_size(&pty.master, rows, columns)
            .doing(|| "set the terminal's size".into())?;
    }
    pinion_sys::scm::send(socket, b"/dev/ptmx", &[pty.master.as_fd()])
        .doing(|| "send the terminal to the console socket".into())?;
    pinion_sys::process::set_controlling_terminal(pty.slave.as_fd())
        .doing(|| "set the controlling terminal".into())?;
    pinion_sys::fd::become_stdio(pty.slave.as_fd()).doing(|| "dup2".into())
}

/// Lets the process's user reopen its standard descriptors through `/proc/self/fd`.
///
/// # Errors
/// As fchown(2), except where the descriptor has no owner to change.
pub(crate) fn own_stdio(uid: u32) -> Result<(), Failure> {
    for number in 0..=2 {
        let Some(fd) = pinion_sys::fd::borrow(number) else { continue };
        let stat = rustix::fs::fstat(fd).doing(|| "fstat".into())?;
        if stat.st_uid == uid || stat.st_rdev == rustix::fs::makedev(1, 3) {
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
