//! The socket on which a runtime hands over the master of a container's terminal
//! (runc's `--console-socket`: one message with one descriptor).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use pinion_monitor_proto::channel::{Descriptors, recv_with_fds};
use rustix::fs::FileType;
use rustix::net::SocketFlags;

use crate::socket::{check_peer, listen, set_nonblocking};

/// Device number of `/dev/ptmx` and of every pty master.
const PTMX: (u32, u32) = (5, 2);

/// A listening console socket; its file is gone with it.
#[derive(Debug)]
pub struct ConsoleSocket {
    listener: OwnedFd,
    path: PathBuf,
}

impl ConsoleSocket {
    /// Listens at `path`, which must not exist.
    ///
    /// # Errors
    /// Those of bind(2) and listen(2); a path must fit in 107 bytes.
    pub fn bind(path: &Path) -> io::Result<Self> {
        Ok(Self { listener: listen(path, 1)?, path: path.to_owned() })
    }

    /// Where the runtime connects to.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The terminal's master, sent by a runtime that has finished; non-blocking.
    ///
    /// # Errors
    /// `WouldBlock` if nobody sent anything, `InvalidData` if it is not one pty master.
    pub fn take_master(&self) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let peer = rustix::net::accept_with(&self.listener, flags)?;
        check_peer(&peer)?;
        let mut descriptors = Descriptors::default();
        recv_with_fds(&peer, &mut [0; 512], &mut descriptors)?;
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        let master = descriptors.claim(1).map_err(invalid)?.pop();
        let master = master.ok_or(io::ErrorKind::InvalidData)?;
        if !is_master(&master) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not the master of a pty"));
        }
        rustix::io::fcntl_setfd(&master, rustix::io::FdFlags::CLOEXEC)?;
        set_nonblocking(&master)?;
        Ok(master)
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.path));
    }
}

fn is_master(fd: impl AsFd) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|stat| {
        let device = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && device == PTMX
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_monitor_proto::channel::send_with_fds;
    use rustix::pty::{OpenptFlags, openpt};
    use std::os::fd::BorrowedFd;
    use std::os::unix::net::UnixStream;

    fn handed_over(fds: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
        let directory = tempfile::tempdir().unwrap();
        let console = ConsoleSocket::bind(&directory.path().join("c")).unwrap();
        let peer = UnixStream::connect(console.path()).unwrap();
        send_with_fds(&peer, b"/dev/ptmx", fds).unwrap();
        console.take_master()
    }

    #[test]
    fn one_pty_master_is_taken_and_nothing_else() {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(handed_over(&[master.as_fd()]).is_ok());
        assert!(handed_over(&[]).is_err());
        assert!(handed_over(&[null.as_fd()]).is_err());
        assert!(handed_over(&[master.as_fd(), master.as_fd()]).is_err());
    }

    #[test]
    fn a_silent_runtime_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c");
        let console = ConsoleSocket::bind(&path).unwrap();
        assert_eq!(console.take_master().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let _silent = UnixStream::connect(&path).unwrap();
        assert_eq!(console.take_master().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(console);
        assert!(!path.exists());
    }
}
