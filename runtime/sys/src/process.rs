//! Attributes of processes that have no safe wrapper elsewhere.

use std::io;

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The argument of sched_setattr(2), version 1 (with utilisation clamps).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SchedulerAttributes {
    /// Filled in by [`set_scheduler`].
    pub size: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// For `SCHED_OTHER` and `SCHED_BATCH`: −20 to 19.
    pub nice: i32,
    /// For `SCHED_FIFO` and `SCHED_RR`: 1 to 99.
    pub priority: u32,
    /// For `SCHED_DEADLINE`, nanoseconds.
    pub runtime: u64,
    /// For `SCHED_DEADLINE`, nanoseconds.
    pub deadline: u64,
    /// For `SCHED_DEADLINE`, nanoseconds.
    pub period: u64,
    /// Lower utilisation clamp, 0 to 1024.
    pub util_min: u32,
    /// Upper utilisation clamp, 0 to 1024.
    pub util_max: u32,
}

/// Sets the scheduling policy of the calling thread.
///
/// # Errors
/// As sched_setattr(2).
pub fn set_scheduler(mut attributes: SchedulerAttributes) -> io::Result<()> {
    attributes.size = size_of::<SchedulerAttributes>() as u32;
    // SAFETY: the structure is as large as its `size` field says and only read.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) })
}

/// Sets the I/O priority of the calling thread: class 1 (real time), 2 (best effort) or
/// 3 (idle) and a level of 0 (highest) to 7; see ioprio_set(2).
///
/// # Errors
/// As ioprio_set(2).
pub fn set_io_priority(class: u16, level: u16) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    let value = (libc::c_int::from(class) << 13) | libc::c_int::from(level);
    // SAFETY: integers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) })
}

/// Sets the execution domain (`PER_LINUX`, `PER_LINUX32`); see personality(2).
///
/// # Errors
/// As personality(2).
pub fn set_personality(domain: u64) -> io::Result<()> {
    // SAFETY: integers only.
    check(libc::c_long::from(unsafe { libc::personality(domain as libc::c_ulong) }))
}

/// Binds the calling thread to the processors of `mask`: bit `n % 64` of word `n / 64` is
/// processor `n`.
///
/// # Errors
/// As sched_setaffinity(2): `EINVAL` when no processor of the mask may be used.
pub fn set_affinity(mask: &[u64]) -> io::Result<()> {
    let bytes = size_of_val(mask);
    // SAFETY: the kernel reads `bytes` bytes of the slice.
    check(unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, bytes, mask.as_ptr()) })
}

/// Sets the NUMA policy of the calling thread: `MPOL_*` with its flags, and one bit per node.
///
/// # Errors
/// As set_mempolicy(2).
pub fn set_memory_policy(mode: i32, nodes: &[u64]) -> io::Result<()> {
    let bits = if nodes.is_empty() { 0 } else { nodes.len() * 64 + 1 };
    let pointer = if nodes.is_empty() { std::ptr::null() } else { nodes.as_ptr() };
    // SAFETY: the kernel reads `bits - 1` bits, which is the slice, or nothing at null.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, pointer, bits) })
}

/// Adopts `groups` as the supplementary groups of the calling thread.
///
/// # Errors
/// As setgroups(2).
pub fn set_groups(groups: &[u32]) -> io::Result<()> {
    // The system call itself: libc's wrapper would signal threads that a copied process
    // does not have.
    // SAFETY: the kernel reads `groups.len()` integers.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })
}

/// Sets the real, effective and saved group id, then user id, of the calling thread.
///
/// # Errors
/// As setresgid(2) and setresuid(2).
pub fn set_ids(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: integers only, in both calls.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })
}

/// Moves `fd`'s terminal under the calling session: it becomes the controlling terminal.
///
/// # Errors
/// As ioctl(2) with `TIOCSCTTY`.
pub fn set_controlling_terminal(fd: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: TIOCSCTTY takes an integer argument.
    check(libc::c_long::from(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSCTTY as _, 0) }))
}
