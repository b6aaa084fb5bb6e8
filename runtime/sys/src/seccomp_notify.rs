//! The agent's side of `SECCOMP_RET_USER_NOTIF`, see seccomp_unotify(2).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `SECCOMP_IOCTL_NOTIF_RECV`: `_IOWR('!', 0, struct seccomp_notif)`.
const RECEIVE: libc::c_ulong = 0xc050_2100;
/// `SECCOMP_IOCTL_NOTIF_SEND`: `_IOWR('!', 1, struct seccomp_notif_resp)`.
const SEND: libc::c_ulong = 0xc018_2101;

/// A system call that waits for an answer: `struct seccomp_notif`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Notification {
    /// Names it in the answer.
    pub id: u64,
    /// The calling thread, in the PID namespace of the listener's opener.
    pub pid: u32,
    /// Always zero.
    pub flags: u32,
    /// Number of the system call.
    pub number: i32,
    /// `AUDIT_ARCH_*`.
    pub architecture: u32,
    /// Address of the instruction.
    pub instruction: u64,
    /// Its arguments.
    pub arguments: [u64; 6],
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
struct Response {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

/// Waits for a system call.
///
/// # Errors
/// As ioctl(2): `ENOENT` when the caller was killed meanwhile.
pub fn receive(listener: BorrowedFd<'_>) -> io::Result<Notification> {
    let mut notification = Notification::default();
    // SAFETY: the structure has the size encoded in the request and is zeroed as demanded.
    let result = unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE as _, &raw mut notification) };
    if result == 0 { Ok(notification) } else { Err(io::Error::last_os_error()) }
}

/// Answers a system call: it returns `value`, or fails with `errno` if that is not 0.
///
/// # Errors
/// As ioctl(2): `ENOENT` when the caller is gone.
pub fn answer(listener: BorrowedFd<'_>, id: u64, value: i64, errno: i32) -> io::Result<()> {
    let mut response = Response { id, value, error: -errno, flags: 0 };
    // SAFETY: the structure has the size encoded in the request.
    let result = unsafe { libc::ioctl(listener.as_raw_fd(), SEND as _, &raw mut response) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
