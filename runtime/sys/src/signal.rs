//! Signal masks, dispositions and names.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Restores what a program may expect at its start: every signal at its default action and
/// none blocked. (The Rust runtime ignores `SIGPIPE`; that must not reach containers.)
pub fn reset_for_exec() {
    // SAFETY: an all-zero sigaction is SIG_DFL with no flags; signals that cannot be
    // changed are skipped or answered with an error that does not matter here.
    unsafe {
        let default: libc::sigaction = std::mem::zeroed();
        for signal in 1..=64 {
            if signal != libc::SIGKILL && signal != libc::SIGSTOP {
                raw_sigaction(signal, &default);
            }
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// rt_sigaction(2) past libc, which hides the signals it uses itself (32 to 34).
///
/// # Safety
/// `action` must be zeroed: only then do the layouts of libc and kernel agree.
unsafe fn raw_sigaction(signal: libc::c_int, action: &libc::sigaction) {
    const KERNEL_SIGSET_BYTES: usize = 8;
    // SAFETY: the kernel reads a prefix of the zeroed structure.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            std::ptr::from_ref(action),
            std::ptr::null_mut::<libc::sigaction>(),
            KERNEL_SIGSET_BYTES,
        );
    }
}

/// Blocks `signals` (all of them when empty) and returns a descriptor that reports them;
/// each read yields one `signalfd_siginfo` of 128 bytes.
///
/// # Errors
/// As signalfd(2).
pub fn block_and_watch(signals: &[i32]) -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised before use; the calls read it only.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        if signals.is_empty() {
            libc::sigfillset(&raw mut set);
        } else {
            libc::sigemptyset(&raw mut set);
            for signal in signals {
                libc::sigaddset(&raw mut set, *signal);
            }
        }
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// Reads one pending signal from a descriptor of [`block_and_watch`]: its number and the
/// process that sent it; `None` when nothing is pending.
///
/// # Errors
/// As read(2), except `EAGAIN`.
pub fn read_pending(watch: &OwnedFd) -> io::Result<Option<(i32, i32)>> {
    let mut info = [0u8; 128];
    match rustix::io::read(watch, &mut info) {
        Ok(_) => {
            let field = |at: usize| {
                i32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]])
            };
            Ok(Some((field(0), field(12))))
        }
        Err(rustix::io::Errno::AGAIN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Sends any signal number, real-time ones included, to the process behind a pidfd.
///
/// # Errors
/// As pidfd_send_signal(2): `ESRCH` when it is gone.
pub fn send(pidfd: std::os::fd::BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: a null siginfo means that of kill(2); the rest are integers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The number of a signal given as `9`, `KILL`, `SIGKILL`, `kill`, `RTMIN+3`.
#[must_use]
pub fn parse(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (0..=64).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |rest: &str| if rest.is_empty() { Some(0) } else { rest.parse::<i32>().ok() };
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return offset(rest).map(|n| 34 + n).filter(|n| (34..=64).contains(n));
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return offset(rest).map(|n| 64 + n).filter(|n| (34..=64).contains(n));
    }
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

/// signal(7), x86-64, aarch64 and riscv64.
const NAMES: &[(&str, i32)] = &[
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_known_by_number_and_by_every_usual_name() {
        for text in ["9", "KILL", "SIGKILL", "kill", "sigkill"] {
            assert_eq!(parse(text), Some(9), "{text}");
        }
        assert_eq!(parse("SIGRTMIN+3"), Some(37));
        assert_eq!(parse("RTMAX-1"), Some(63));
        for text in ["", "65", "-1", "SIGFOO", "RTMIN+99", "9x"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
