//! Starting processes with clone3(2).
//!
//! A child made here is a copy of its single-threaded parent: it may allocate, print and
//! run any Rust code, because no other thread can have held a lock at the moment of the
//! copy. [`spawn`] verifies that there is no other thread; that is what makes it safe.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::Dir;
use rustix::process::{Pid, PidfdFlags, WaitIdOptions, WaitIdStatus};

/// What the child shares with its parent and where it starts.
#[derive(Debug, Default)]
pub struct Clone<'a> {
    /// `CLONE_NEW*` bits and `CLONE_PARENT`; see clone(2).
    pub flags: u64,
    /// The cgroup v2 directory in which the child is born (Linux 5.7).
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// A process started by [`spawn`]. Dropping it neither kills nor reaps the process.
#[derive(Debug)]
pub struct Child {
    /// The process id in the caller's PID namespace.
    pub pid: Pid,
    /// Refers to this very process, however often the number is reused.
    pub pidfd: OwnedFd,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It called exit(2) with this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl Exit {
    /// The number a shell reports: the code, or 128 plus the signal.
    #[must_use]
    pub fn shell_code(self) -> i32 {
        match self {
            Exit::Code(code) => code,
            Exit::Signal(signal) => 128 + signal,
        }
    }
}

impl Child {
    /// Waits until the process has ended and reaps it.
    ///
    /// # Errors
    /// As waitid(2), `ECHILD` when the process is not a child of the caller.
    pub fn wait(&self) -> io::Result<Exit> {
        loop {
            let waited = rustix::process::waitid(
                rustix::process::WaitId::PidFd(self.pidfd.as_fd()),
                WaitIdOptions::EXITED,
            );
            match waited {
                Err(rustix::io::Errno::INTR) | Ok(None) => {}
                Err(error) => return Err(error.into()),
                Ok(Some(status)) => return Ok(exit_of(&status)),
            }
        }
    }

    /// Sends SIGKILL; a process that is gone already is not an error.
    ///
    /// # Errors
    /// As pidfd_send_signal(2), except `ESRCH`.
    pub fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl From<rustix::process::WaitStatus> for Exit {
    fn from(status: rustix::process::WaitStatus) -> Self {
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Self::Code(code),
            (None, Some(signal)) => Self::Signal(signal),
            (None, None) => Self::Code(255),
        }
    }
}

fn exit_of(status: &WaitIdStatus) -> Exit {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Code(255),
    }
}

/// Bit 33 of clone3's flags, which libc's 32-bit constants cannot hold.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// The layout of clone3(2)'s argument up to `cgroup` (`CLONE_ARGS_SIZE_VER2`).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Runs `body` in a new process, which exits with the code `body` returns.
///
/// Descriptors are inherited as with fork(2). A panic in `body` ends the child with 101.
///
/// # Errors
/// `ResourceBusy` when the caller has more than one thread; else as clone3(2), with
/// clone(2) as the fallback on kernels or sandboxes that lack clone3 (then a `cgroup` is
/// answered with `Unsupported`).
pub fn spawn(clone: &Clone<'_>, body: impl FnOnce() -> i32) -> io::Result<Child> {
    if !is_alone()? {
        return Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "a process with several threads cannot be copied safely",
        ));
    }
    let mut pidfd: libc::c_int = -1;
    let pid = match clone3(clone, &mut pidfd) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => clone2(clone, &mut pidfd)?,
        other => other?,
    };
    let Some(pid) = Pid::from_raw(pid) else {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        exit_now(outcome.unwrap_or(101));
    };
    // SAFETY: the kernel stored a fresh descriptor there, which nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Child { pid, pidfd })
}

fn clone3(clone: &Clone<'_>, pidfd: &mut libc::c_int) -> io::Result<libc::pid_t> {
    let mut flags = clone.flags | libc::CLONE_PIDFD as u64;
    // CLONE_PARENT takes over the exit signal of the caller and forbids another one.
    let exit_signal = if flags & libc::CLONE_PARENT as u64 != 0 { 0 } else { libc::SIGCHLD as u64 };
    if clone.cgroup.is_some() {
        flags |= CLONE_INTO_CGROUP;
    }
    let arguments = CloneArgs {
        flags,
        pidfd: std::ptr::from_mut(pidfd) as u64,
        exit_signal,
        cgroup: clone.cgroup.map_or(0, |fd| fd.as_raw_fd() as u64),
        ..CloneArgs::default()
    };
    // SAFETY: without CLONE_VM and with a zero stack this behaves as fork(2); the argument
    // block outlives the call and `pidfd` points to a live integer.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<CloneArgs>()) };
    if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid as libc::pid_t) }
}

fn clone2(clone: &Clone<'_>, pidfd: &mut libc::c_int) -> io::Result<libc::pid_t> {
    if clone.cgroup.is_some() || clone.flags & libc::CLONE_NEWTIME as u64 != 0 {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel has no clone3"));
    }
    let flags = clone.flags | libc::CLONE_PIDFD as u64 | libc::SIGCHLD as u64;
    // SAFETY: a null stack without CLONE_VM behaves as fork(2); with CLONE_PIDFD the third
    // argument (parent_tid) receives the descriptor and points to a live integer.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, std::ptr::from_mut(pidfd), 0, 0) };
    if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid as libc::pid_t) }
}

/// Ends the process at once: no destructors, no `atexit` handlers.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// True when the calling thread is the only one of its process.
///
/// # Errors
/// When neither the kernel can be asked nor `/proc` is mounted.
pub fn is_alone() -> io::Result<bool> {
    // unshare(2): allowed for a process with a single thread, for which it does nothing.
    // Needs no `/proc`, which in a container is not this process's own.
    // SAFETY: no memory, descriptor or namespace is changed, whatever the answer.
    if unsafe { libc::unshare(libc::CLONE_THREAD) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error().raw_os_error() {
        Some(libc::EINVAL) => Ok(false),
        // A sandbox forbids the call.
        _ => Ok(thread_count()? == 1),
    }
}

/// The number of threads of this process.
///
/// # Errors
/// When `/proc` is not mounted.
pub fn thread_count() -> io::Result<u64> {
    // The kernel keeps the link count of `task` at the number of threads plus two.
    let links = rustix::fs::stat("/proc/self/task")?.st_nlink as u64;
    if links > 2 {
        return Ok(links - 2);
    }
    let tasks = Dir::read_from(rustix::fs::open(
        "/proc/self/task",
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?)?;
    Ok(tasks.flatten().filter(|entry| entry.file_name().to_bytes()[0] != b'.').count() as u64)
}

/// Moves the calling process into new namespaces (`CLONE_NEW*` bits only).
///
/// # Errors
/// `InvalidInput` for bits that are not namespaces; else as unshare(2).
pub fn unshare(flags: u64) -> io::Result<()> {
    if flags & !NAMESPACES != 0 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: unsharing namespaces changes no memory and no descriptor of the process.
    let result = unsafe { libc::unshare(flags as libc::c_int) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Every bit that stands for a namespace.
pub const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWTIME) as u64;

/// Moves the calling process into the namespaces behind `fd`: one namespace file, or a
/// pidfd with several `CLONE_NEW*` bits (Linux 5.8).
///
/// # Errors
/// As setns(2).
pub fn setns(fd: BorrowedFd<'_>, flags: u64) -> io::Result<()> {
    // SAFETY: setns takes a live descriptor and a flag word and touches no memory.
    let result = unsafe { libc::setns(fd.as_raw_fd(), flags as libc::c_int) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A descriptor that a signal can be sent to: a pidfd, or before Linux 5.3 the process's
/// directory in procfs, which pidfd_send_signal(2) takes as well. Nothing can be waited for
/// with the latter.
///
/// # Errors
/// `ESRCH` when the process is gone.
pub fn open_for_signals(pid: Pid) -> io::Result<OwnedFd> {
    match pidfd_open(pid) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {}
        other => return other,
    }
    let flags =
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let path = format!("/proc/{}", pid.as_raw_nonzero());
    match rustix::fs::open(path, flags, rustix::fs::Mode::empty()) {
        Err(rustix::io::Errno::NOENT) => Err(rustix::io::Errno::SRCH.into()),
        other => Ok(other?),
    }
}

/// A descriptor for a running process.
///
/// # Errors
/// As pidfd_open(2): `ESRCH` when it is gone.
pub fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}
