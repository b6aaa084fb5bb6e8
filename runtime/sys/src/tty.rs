//! Pseudo terminals.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::{OptionalActions, OutputModes, Termios, Winsize};

/// Both ends of a pseudo terminal.
#[derive(Debug)]
pub struct Pty {
    /// The end a terminal emulator holds.
    pub master: OwnedFd,
    /// The end programs use as their terminal.
    pub slave: OwnedFd,
}

/// Opens a new pseudo terminal of the devpts instance that contains the `ptmx` node
/// `directory`/`name`.
///
/// The slave comes from the master (`TIOCGPTPEER`), never from a path, so nothing in the
/// file system can stand in for it.
///
/// # Errors
/// As open(2) and ioctl(2).
pub fn open_in(directory: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<Pty> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let master = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    finish(master)
}

/// Opens a new pseudo terminal of the caller's `/dev/ptmx`.
///
/// # Errors
/// As open(2) and ioctl(2).
pub fn open() -> io::Result<Pty> {
    finish(rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?)
}

fn finish(master: OwnedFd) -> io::Result<Pty> {
    rustix::pty::unlockpt(&master)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    Ok(Pty { master, slave })
}

/// Sets the size of a terminal in characters.
///
/// # Errors
/// As ioctl(2) with `TIOCSWINSZ`.
pub fn set_size(terminal: impl AsFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

/// Copies the window size of one terminal to another.
///
/// # Errors
/// `ENOTTY` when `from` is no terminal.
pub fn copy_size(from: impl AsFd, to: impl AsFd) -> io::Result<()> {
    let size = rustix::termios::tcgetwinsize(from)?;
    Ok(rustix::termios::tcsetwinsize(to, size)?)
}

/// Has the terminal of a program pass line feeds on as they are. Whoever shows them adds the
/// carriage return: a terminal does, a file must not have it.
///
/// # Errors
/// As tcsetattr(3).
pub fn keep_line_feeds(terminal: impl AsFd) -> io::Result<()> {
    let mut settings = rustix::termios::tcgetattr(&terminal)?;
    settings.output_modes.remove(OutputModes::ONLCR);
    Ok(rustix::termios::tcsetattr(&terminal, OptionalActions::Now, &settings)?)
}

/// A terminal in raw mode, but for what happens to output; the former settings come back on drop.
#[derive(Debug)]
pub struct RawMode {
    terminal: OwnedFd,
    saved: Termios,
}

impl RawMode {
    /// Switches `terminal` to raw mode.
    ///
    /// # Errors
    /// `ENOTTY` when it is no terminal.
    pub fn enter(terminal: BorrowedFd<'_>) -> io::Result<Self> {
        let terminal = terminal.try_clone_to_owned()?;
        let saved = rustix::termios::tcgetattr(&terminal)?;
        let mut raw = saved.clone();
        raw.make_raw();
        raw.output_modes = saved.output_modes;
        rustix::termios::tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(Self { terminal, saved })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that is gone.
        let _ = rustix::termios::tcsetattr(&self.terminal, OptionalActions::Now, &self.saved);
    }
}
