//! File descriptors: inheritance and names.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;

/// Marks every descriptor from `first` on close-on-exec, so that none of them, whoever
/// opened it, survives into the next program.
///
/// # Errors
/// As close_range(2); where the kernel lacks it, `/proc/self/fd` is walked instead.
pub fn cloexec_from(first: RawFd) -> io::Result<()> {
    // SAFETY: the flag only changes the close-on-exec bit; no descriptor is closed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first as libc::c_uint,
            libc::c_uint::MAX,
            CLOSE_RANGE_CLOEXEC,
        )
    };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // EINVAL: Linux 5.9 and 5.10 know the call but not the flag.
        Some(libc::ENOSYS | libc::EINVAL | libc::EPERM) => cloexec_by_listing(first),
        _ => Err(error),
    }
}

fn cloexec_by_listing(first: RawFd) -> io::Result<()> {
    for fd in open_descriptors()? {
        if fd >= first {
            // SAFETY: F_SETFD changes one bit; EBADF for a descriptor closed since is fine.
            unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
    Ok(())
}

/// Closes every descriptor that is not in `keep`.
///
/// For a process that was just copied and will never run the destructors of the values it
/// was copied with: what they own in the copy is closed here, so that neither locks nor the
/// far ends of sockets nor directories of the host live on in it.
///
/// # Errors
/// When neither close_range(2) works nor `/proc/self/fd` can be listed.
pub fn close_all_except(keep: &[RawFd]) -> io::Result<()> {
    let mut keep = keep.to_vec();
    keep.sort_unstable();
    keep.dedup();
    let mut next: libc::c_uint = 0;
    for end in keep.into_iter().filter_map(|fd| libc::c_uint::try_from(fd).ok()) {
        if end > next {
            close_span(next, end - 1)?;
        }
        next = end + 1;
    }
    close_span(next, libc::c_uint::MAX)
}

fn close_span(first: libc::c_uint, last: libc::c_uint) -> io::Result<()> {
    // SAFETY: the documented contract: nothing in this process uses these descriptors again.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if !matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) {
        return Err(error);
    }
    for fd in open_descriptors()? {
        if libc::c_uint::try_from(fd).is_ok_and(|number| (first..=last).contains(&number)) {
            // SAFETY: as above; the listing's own descriptor is closed already.
            unsafe { libc::close(fd) };
        }
    }
    Ok(())
}

/// The numbers of all descriptors that are open in this process.
///
/// # Errors
/// When `/proc` is not mounted.
pub fn open_descriptors() -> io::Result<Vec<RawFd>> {
    let entries = std::fs::read_dir("/proc/self/fd")?;
    Ok(entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
}

/// True when `fd` is an open descriptor of this process.
#[must_use]
pub fn is_open(fd: RawFd) -> bool {
    // SAFETY: F_GETFD only reads the descriptor's flags.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

/// Sets or clears close-on-exec on the descriptor with this number.
///
/// # Errors
/// `EBADF` when it is not open.
pub fn set_cloexec(fd: RawFd, cloexec: bool) -> io::Result<()> {
    let flag = if cloexec { libc::FD_CLOEXEC } else { 0 };
    // SAFETY: F_SETFD changes one bit of the descriptor table entry.
    let result = unsafe { libc::fcntl(fd, libc::F_SETFD, flag) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes `fd` the standard input, output and error of this process.
///
/// # Errors
/// As dup2(2).
pub fn become_stdio(fd: BorrowedFd<'_>) -> io::Result<()> {
    for target in 0..=2 {
        // SAFETY: the standard descriptors are process-wide and never owned by a Rust value
        // that would close them; replacing what they refer to is their purpose.
        if unsafe { libc::dup2(fd.as_raw_fd(), target) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Makes the standard descriptor `target` (0 to 2) refer to what `fd` does.
///
/// # Errors
/// `EINVAL` for another number; else as dup2(2).
pub fn replace_stdio(fd: BorrowedFd<'_>, target: RawFd) -> io::Result<()> {
    if !(0..=2).contains(&target) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: as in `become_stdio`.
    let result = unsafe { libc::dup2(fd.as_raw_fd(), target) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Borrows a descriptor by its number, when it is open.
///
/// The number must stay open for as long as the result is used: meant for the standard
/// descriptors and for those a caller passed by number.
#[must_use]
pub fn borrow(fd: RawFd) -> Option<BorrowedFd<'static>> {
    // SAFETY: the descriptor is open now; the documented contract keeps it open.
    is_open(fd).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
}

/// The path by which the kernel reaches an open descriptor: `/proc/self/fd/N`.
#[must_use]
pub fn proc_path(fd: BorrowedFd<'_>) -> std::path::PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}
