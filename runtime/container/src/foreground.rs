//! Staying with a process in the foreground: signals forwarded, terminal relayed, exit code
//! returned.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use pinion_sys::clone::{Child, Exit};
use pinion_sys::tty::RawMode;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::WaitOptions;

use crate::error::{Doing, Failure, Result};

/// Signals that concern this process alone, or that the kernel raises for its own faults.
const NOT_FORWARDED: [i32; 6] =
    [libc::SIGCHLD, libc::SIGURG, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE];

/// Begins to collect signals instead of dying of them. To be made before the process starts,
/// so that its end is not missed.
#[derive(Debug)]
pub struct Signals {
    watch: OwnedFd,
}

impl Signals {
    /// Blocks all signals.
    ///
    /// # Errors
    /// As signalfd(2).
    pub fn collect() -> Result<Self> {
        Ok(Self { watch: pinion_sys::signal::block_and_watch(&[]).doing(|| "signalfd".into())? })
    }
}

/// A pair of sockets over which a process can hand its terminal to this one.
///
/// # Errors
/// As socketpair(2).
pub fn console_pair() -> Result<(OwnedFd, OwnedFd)> {
    let kind = (AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC);
    Ok(rustix::net::socketpair(kind.0, kind.1, kind.2, None).doing(|| "socketpair".into())?)
}

/// Receives the terminal's master.
///
/// # Errors
/// When the process did not send exactly one descriptor.
pub fn receive_console(socket: &OwnedFd) -> Result<OwnedFd> {
    let (_, mut fds) =
        pinion_sys::scm::receive(socket, &mut [0; 128]).doing(|| "receive the terminal".into())?;
    match (fds.pop(), fds.is_empty()) {
        (Some(master), true) => Ok(master),
        _ => Err(Failure::refused("the process did not hand over its terminal").into()),
    }
}

/// Waits for `child`, forwarding signals and, with a terminal, bytes both ways.
///
/// # Errors
/// As poll(2) and waitid(2).
pub fn attend(child: &Child, signals: &Signals, terminal: Option<OwnedFd>) -> Result<Exit> {
    let stdin = rustix::stdio::stdin();
    let _raw = terminal.as_ref().and_then(|_| RawMode::enter(stdin).ok());
    let mut relay = terminal.map(Relay::new);
    if let Some(relay) = &relay {
        relay.resize();
    }
    loop {
        let watched = Watched::poll(signals, relay.as_ref()).doing(|| "poll".into())?;
        if let Some(relay) = &mut relay {
            relay.pump(&watched);
        }
        if watched.signals
            && let Some(exit) = handle_signals(child, signals, relay.as_ref())?
        {
            if let Some(relay) = &mut relay {
                relay.drain();
            }
            return Ok(exit);
        }
    }
}

fn handle_signals(child: &Child, signals: &Signals, relay: Option<&Relay>) -> Result<Option<Exit>> {
    while let Some((signal, _)) =
        pinion_sys::signal::read_pending(&signals.watch).doing(|| "read signals".into())?
    {
        match signal {
            libc::SIGCHLD => {
                if let Some(exit) = reap(child)? {
                    return Ok(Some(exit));
                }
            }
            libc::SIGWINCH if relay.is_some() => relay.iter().for_each(|relay| relay.resize()),
            other if NOT_FORWARDED.contains(&other) => {}
            other => {
                // It may have ended a moment ago, which SIGCHLD will tell.
                let _ = pinion_sys::signal::send(child.pidfd.as_fd(), other);
            }
        }
    }
    Ok(None)
}

/// Reaps whoever has ended: `child`, whose end is the answer, and every orphan this process
/// inherited as a subreaper. One call for both: the child may end between any two.
fn reap(child: &Child) -> Result<Option<Exit>> {
    let mut ended = None;
    loop {
        match rustix::io::retry_on_intr(|| rustix::process::wait(WaitOptions::NOHANG)) {
            Ok(Some((pid, status))) if pid == child.pid => ended = Some(Exit::from(status)),
            Ok(Some(_orphan)) => {}
            Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(ended),
            Err(error) => return Err(error).doing(|| "wait".into())?,
        }
    }
}

fn poll_once(fd: BorrowedFd<'_>) -> rustix::io::Result<bool> {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&now)))? > 0)
}

/// What poll(2) reported.
#[derive(Debug, Default)]
struct Watched {
    signals: bool,
    input: bool,
    output: bool,
}

impl Watched {
    fn poll(signals: &Signals, relay: Option<&Relay>) -> rustix::io::Result<Self> {
        let stdin = rustix::stdio::stdin();
        let mut fds = vec![PollFd::new(&signals.watch, PollFlags::IN)];
        if let Some(relay) = relay {
            let output = if relay.open { PollFlags::IN } else { PollFlags::empty() };
            fds.push(PollFd::new(&relay.master, output));
            if relay.reads_input {
                fds.push(PollFd::from_borrowed_fd(stdin, PollFlags::IN));
            }
        }
        let timeout = None;
        match rustix::event::poll(&mut fds, timeout) {
            Err(Errno::INTR) => return Ok(Self::default()),
            other => other?,
        };
        let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        Ok(Self { signals: ready(0), output: ready(1), input: ready(2) })
    }
}

/// Copies between the caller's standard descriptors and a terminal.
#[derive(Debug)]
struct Relay {
    master: OwnedFd,
    open: bool,
    reads_input: bool,
}

impl Relay {
    fn new(master: OwnedFd) -> Self {
        Self { master, open: true, reads_input: true }
    }

    fn resize(&self) {
        // Standard input may be no terminal; then the size stays as it is.
        let _ = pinion_sys::tty::copy_size(rustix::stdio::stdin(), &self.master);
    }

    fn pump(&mut self, watched: &Watched) {
        if watched.output && self.open {
            self.open = copy_some(self.master.as_fd(), rustix::stdio::stdout());
        }
        if watched.input && self.reads_input {
            self.reads_input = copy_some(rustix::stdio::stdin(), self.master.as_fd());
        }
    }

    /// What the program wrote last, after its end.
    fn drain(&mut self) {
        while self.open && poll_once(self.master.as_fd()).unwrap_or(false) {
            self.open = copy_some(self.master.as_fd(), rustix::stdio::stdout());
        }
    }
}

/// Copies what is there; false at the end. A terminal whose last user is gone reports EIO.
fn copy_some(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> bool {
    let mut buffer = [0; 16 << 10];
    match rustix::io::read(from, &mut buffer) {
        Ok(0) => false,
        Ok(length) => write_all(to, &buffer[..length]).is_ok(),
        Err(Errno::INTR | Errno::AGAIN) => true,
        Err(_) => false,
    }
}

fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let mut fds = [PollFd::from_borrowed_fd(to, PollFlags::OUT)];
                rustix::event::poll(&mut fds, None)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
