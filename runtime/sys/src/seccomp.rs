//! `seccomp(2)`: loading a filter and asking the kernel what it can do.
//!
//! The filter is loaded for the calling thread only, unless `TSYNC` is among the flags.
//! The caller needs `no_new_privs` or `CAP_SYS_ADMIN` in its user namespace.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Loads `filter` with the given `SECCOMP_FILTER_FLAG_*` bits.
///
/// Returns the notification listener (close-on-exec) when `SECCOMP_FILTER_FLAG_NEW_LISTENER`
/// is set, otherwise `None`. With `TSYNC` a thread that could not be synchronised is `ESRCH`.
pub fn load(filter: &[libc::sock_filter], flags: u64) -> io::Result<Option<OwnedFd>> {
    let length = u16::try_from(filter.len())
        .map_err(|_too_long| io::Error::from_raw_os_error(libc::E2BIG))?;
    let flags = checked(flags)?;
    let program = libc::sock_fprog { len: length, filter: filter.as_ptr().cast_mut() };
    // SAFETY: `program` points at `length` initialised instructions that outlive the call;
    // the kernel copies them and never writes through the pointer.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::c_ulong::from(libc::SECCOMP_SET_MODE_FILTER),
            flags,
            &raw const program,
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    if flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER != 0 {
        // SAFETY: with NEW_LISTENER a non-negative answer is a descriptor that nobody else owns.
        return Ok(Some(unsafe { OwnedFd::from_raw_fd(answer as RawFd) }));
    }
    if answer != 0 {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(None)
}

/// The kernel's parameter has 32 bits; more would be dropped silently.
fn checked(flags: u64) -> io::Result<u64> {
    u32::try_from(flags)
        .map(u64::from)
        .map_err(|_too_wide| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Whether this kernel knows a `SECCOMP_RET_*` action (`SECCOMP_GET_ACTION_AVAIL`).
#[must_use]
pub fn action_available(action: u32) -> bool {
    // SAFETY: the kernel reads four bytes from a live local.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::c_ulong::from(libc::SECCOMP_GET_ACTION_AVAIL),
            0u64,
            &raw const action,
        )
    };
    answer == 0
}

/// Whether this kernel knows all of the `SECCOMP_FILTER_FLAG_*` bits in `flags`.
///
/// A filter at the null address is refused with `EFAULT` only after the flags were accepted.
#[must_use]
pub fn flags_available(flags: u64) -> bool {
    let Ok(flags) = checked(flags) else {
        return false;
    };
    // SAFETY: a null program is never dereferenced by us, and the kernel answers EFAULT.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::c_ulong::from(libc::SECCOMP_SET_MODE_FILTER),
            flags,
            std::ptr::null::<libc::sock_fprog>(),
        )
    };
    answer < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_knows_the_errno_action_and_refuses_an_invented_one() {
        assert!(action_available(libc::SECCOMP_RET_ERRNO));
        assert!(!action_available(0x1234_0000));
    }

    #[test]
    fn unknown_flags_are_reported_as_unavailable() {
        assert!(flags_available(libc::SECCOMP_FILTER_FLAG_LOG));
        assert!(!flags_available(1 << 30));
        assert!(!flags_available(1 << 40));
    }

    #[test]
    fn a_filter_longer_than_the_length_field_is_refused_before_the_call() {
        let nop = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
        let error = load(&vec![nop; 70_000], 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::E2BIG));
    }
}
