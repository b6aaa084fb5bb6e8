//! File descriptors over unix sockets.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The most descriptors one message may carry in either direction.
pub const MAX_FDS: usize = 8;

/// Sends `bytes` and `fds` as one message; returns the number of bytes taken.
///
/// # Errors
/// `InvalidInput` for more than [`MAX_FDS`]; else as sendmsg(2). `SIGPIPE` is not raised.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fits = fds.len() <= MAX_FDS;
    if !fits || (!fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds))) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors"));
    }
    let bytes = [IoSlice::new(bytes)];
    loop {
        match sendmsg(&socket, &bytes, &mut ancillary, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Receives one message into `buffer`; returns its length (0 at the end of the stream) and
/// its descriptors, which are close-on-exec.
///
/// # Errors
/// `InvalidData` when the sender passed more than [`MAX_FDS`] descriptors or a datagram did
/// not fit (what did arrive is closed); else as recvmsg(2).
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(buffer)];
    let received = loop {
        match recvmsg(&socket, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    let fds: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if received.flags.intersects(ReturnFlags::CTRUNC | ReturnFlags::TRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the message was cut off"));
    }
    Ok((received.bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_descriptor_arrives_close_on_exec() {
        let (left, right) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(send(&left, b"x", &[file.as_fd()]).unwrap(), 1);
        let mut buffer = [0; 4];
        let (length, fds) = receive(&right, &mut buffer).unwrap();
        assert_eq!((length, fds.len()), (1, 1));
        let flags = rustix::io::fcntl_getfd(&fds[0]).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn too_many_descriptors_are_refused_and_the_stream_ends_with_zero() {
        let (left, right) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let many = vec![file.as_fd(); MAX_FDS + 1];
        assert_eq!(send(&left, b"x", &many).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        drop(left);
        assert_eq!(receive(&right, &mut [0; 4]).unwrap().0, 0);
    }
}
