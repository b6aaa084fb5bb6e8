//! Session keyrings.

use std::ffi::CStr;
use std::io;

/// Gives the calling process a session keyring of its own, named `name`, which its user may
/// search (keyctl(2), `KEYCTL_JOIN_SESSION_KEYRING`).
///
/// # Errors
/// As keyctl(2): `ENOSYS` without `CONFIG_KEYS`, `EDQUOT` when the quota is used up.
pub fn join_session_keyring(name: &CStr) -> io::Result<()> {
    const USER_SEARCH: libc::c_ulong = 0x0008_0000;
    const POSSESSOR_ALL: libc::c_ulong = 0x3f00_0000;
    const USER_VIEW: libc::c_ulong = 0x0001_0000;
    // SAFETY: the name is a valid C string; keyctl touches no other memory.
    let ring = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_JOIN_SESSION_KEYRING as libc::c_ulong,
            name.as_ptr(),
        )
    };
    if ring < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: integers only.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_SETPERM as libc::c_ulong,
            ring,
            POSSESSOR_ALL | USER_VIEW | USER_SEARCH,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
