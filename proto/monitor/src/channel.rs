//! Frames and their file descriptors over a unix stream socket.
//!
//! The descriptors of a message travel as one `SCM_RIGHTS` message with the first byte of
//! its frame. The kernel ends a read behind such a byte's segment, so at most one batch
//! comes with each read, and batches keep the order of the frames that own them: a queue of
//! batches is enough to match them ([`Descriptors`]).
//!
//! [`send_with_fds`] and [`recv_with_fds`] are single system calls that may return
//! `WouldBlock`, for event loops; [`Channel`] is the blocking form for everyone else.
//! With tokio: `stream.try_io(Interest::READABLE, || recv_with_fds(&stream, ..))`.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use crate::frame::{Decoder, FrameError, encode};
use crate::message::{Request, Response};

/// Most descriptors one message may carry.
pub const MAX_DESCRIPTORS: usize = 3;

/// Sends bytes, with `descriptors` attached to the first of them; returns how many bytes
/// went out. Send the rest of a short write without descriptors.
///
/// # Errors
/// Those of sendmsg(2); `BrokenPipe` instead of a signal when the peer is gone.
pub fn send_with_fds(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let sent = rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
    })?;
    Ok(sent)
}

/// Receives bytes into `buffer` and descriptors, all close-on-exec, into `descriptors`;
/// returns the number of bytes, 0 at the end of the stream.
///
/// # Errors
/// Those of recvmsg(2); `InvalidData` when descriptors were lost because more came than a
/// message may carry (the rest is closed).
pub fn recv_with_fds(
    socket: impl AsFd,
    buffer: &mut [u8],
    descriptors: &mut Descriptors,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        let mut bytes = [IoSliceMut::new(buffer)];
        rustix::net::recvmsg(&socket, &mut bytes, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut batch = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            batch.extend(fds);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        let reason = "more descriptors than a message may carry";
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    if !batch.is_empty() {
        descriptors.batches.push_back(batch);
    }
    Ok(received.bytes)
}

/// Descriptors received and not yet claimed by the message they belong to.
#[derive(Debug, Default)]
pub struct Descriptors {
    batches: VecDeque<Vec<OwnedFd>>,
}

impl Descriptors {
    /// The descriptors of the message decoded last, which names `expected` of them.
    ///
    /// # Errors
    /// [`FrameError::Descriptors`] if its batch has another size or did not come.
    pub fn claim(&mut self, expected: usize) -> Result<Vec<OwnedFd>, FrameError> {
        if expected == 0 {
            return Ok(Vec::new());
        }
        let batch = self.batches.pop_front().unwrap_or_default();
        if batch.len() == expected {
            Ok(batch)
        } else {
            Err(FrameError::Descriptors { expected, received: batch.len() })
        }
    }

    /// Confirms that nothing is left over; call when the decoder holds no partial frame.
    ///
    /// # Errors
    /// [`FrameError::Descriptors`] if descriptors came with a message that names none.
    pub fn check_empty(&self) -> Result<(), FrameError> {
        match self.batches.iter().map(Vec::len).sum() {
            0 => Ok(()),
            received => Err(FrameError::Descriptors { expected: 0, received }),
        }
    }
}

/// Why a [`Channel`] failed.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket failed.
    #[error("monitor socket")]
    Socket(#[from] io::Error),
    /// The peer sent something that is not the protocol.
    #[error("monitor protocol")]
    Frame(#[from] FrameError),
}

/// A blocking client of a monitor.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    decoder: Decoder,
}

impl Channel {
    /// Connects to the monitor's socket at `path`.
    ///
    /// # Errors
    /// Those of connect(2).
    pub fn connect(path: &Path) -> io::Result<Self> {
        Ok(Self::new(UnixStream::connect(path)?))
    }

    /// Takes over a connected stream in blocking mode.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, decoder: Decoder::default() }
    }

    /// The underlying stream, to set timeouts or wait for readiness.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a request with the descriptors it names.
    ///
    /// # Errors
    /// When the message is too large, its descriptors are not those it names, or the
    /// socket fails.
    pub fn send(
        &mut self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let expected = request.descriptors();
        if expected != descriptors.len() {
            let received = descriptors.len();
            return Err(FrameError::Descriptors { expected, received }.into());
        }
        let frame = encode(request)?;
        let mut sent = send_with_fds(&self.stream, &frame, descriptors)?;
        while let Some(rest) = frame.get(sent..).filter(|rest| !rest.is_empty()) {
            sent += send_with_fds(&self.stream, rest, &[])?;
        }
        Ok(())
    }

    /// Waits for the next response; `None` when the monitor has closed the connection.
    ///
    /// # Errors
    /// When the socket fails, times out or carries something else.
    pub fn receive(&mut self) -> Result<Option<Response>, ChannelError> {
        let mut none = Descriptors::default();
        loop {
            if let Some(response) = self.decoder.next()? {
                return Ok(Some(response));
            }
            let mut buffer = [0; 4096];
            match recv_with_fds(&self.stream, &mut buffer, &mut none)? {
                0 if self.decoder.is_empty() => return Ok(None),
                0 => return Err(FrameError::Truncated.into()),
                n => self.decoder.push(buffer.get(..n).unwrap_or_default()),
            }
            none.check_empty()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Attach, Hello, request::Verb};
    use rustix::io::{FdFlags, fcntl_getfd};

    fn attach(id: u64) -> Request {
        let verb = Attach { stdin: true, stdout: true, ..Attach::default() };
        Request { id, verb: Some(Verb::Attach(verb)) }
    }

    fn hello(id: u64) -> Request {
        Request { id, verb: Some(Verb::Hello(Hello::default())) }
    }

    /// Reads everything that has arrived and pairs each request with its descriptors.
    fn receive(socket: &UnixStream) -> Result<Vec<(u64, Vec<OwnedFd>)>, FrameError> {
        socket.set_nonblocking(true).unwrap();
        let (mut decoder, mut queue) = (Decoder::default(), Descriptors::default());
        let mut requests = Vec::new();
        loop {
            let mut buffer = [0; 4096];
            match recv_with_fds(socket, &mut buffer, &mut queue) {
                Ok(n) => decoder.push(&buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(requests),
                Err(e) => panic!("{e}"),
            }
            while let Some(request) = decoder.next::<Request>()? {
                let fds = queue.claim(request.descriptors())?;
                requests.push((request.id, fds));
            }
            if decoder.is_empty() {
                queue.check_empty()?;
            }
        }
    }

    #[test]
    fn descriptors_arrive_with_their_message_and_close_on_exec() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(ours);
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        channel.send(&hello(1), &[]).unwrap();
        channel.send(&attach(2), &[reader.as_fd(), writer.as_fd()]).unwrap();
        channel.send(&hello(3), &[]).unwrap();
        channel.send(&attach(4), &[writer.as_fd(), reader.as_fd()]).unwrap();
        let received = receive(&theirs).unwrap();
        let counts: Vec<_> = received.iter().map(|(id, fds)| (*id, fds.len())).collect();
        assert_eq!(counts, [(1, 0), (2, 2), (3, 0), (4, 2)]);
        for fd in received.iter().flat_map(|(_, fds)| fds) {
            assert!(fcntl_getfd(fd).unwrap().contains(FdFlags::CLOEXEC));
        }
        rustix::io::write(&received[1].1[1], b"x").unwrap();
        let mut byte = [0];
        assert_eq!(rustix::io::read(&received[3].1[1], &mut byte).unwrap(), 1);
    }

    #[test]
    fn too_few_descriptors_are_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        send_with_fds(&ours, &encode(&attach(1)).unwrap(), &[reader.as_fd()]).unwrap();
        let error = receive(&theirs).unwrap_err();
        assert!(matches!(error, FrameError::Descriptors { expected: 2, received: 1 }));
    }

    #[test]
    fn descriptors_nobody_asked_for_are_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        send_with_fds(&ours, &encode(&hello(1)).unwrap(), &[reader.as_fd()]).unwrap();
        let error = receive(&theirs).unwrap_err();
        assert!(matches!(error, FrameError::Descriptors { expected: 0, received: 1 }));
    }

    #[test]
    fn a_flood_of_descriptors_is_an_error_and_leaks_none() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let flood = [reader.as_fd(); 64];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&flood)));
        let frame = encode(&attach(1)).unwrap();
        rustix::net::sendmsg(&ours, &[IoSlice::new(&frame)], &mut control, SendFlags::empty())
            .unwrap();
        let mut queue = Descriptors::default();
        let error = recv_with_fds(&theirs, &mut [0; 64], &mut queue).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        // The only reader left is ours: with it gone a write fails.
        drop((reader, queue));
        let write = rustix::io::write(&writer, b"x");
        assert_eq!(write.unwrap_err(), rustix::io::Errno::PIPE);
    }

    #[test]
    fn a_closed_connection_is_the_end_only_between_frames() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(Channel::new(ours).receive().unwrap().is_none());
        let (ours, theirs) = UnixStream::pair().unwrap();
        send_with_fds(&theirs, &[9, 0, 0, 0, 1], &[]).unwrap();
        drop(theirs);
        let error = Channel::new(ours).receive().unwrap_err();
        assert!(matches!(error, ChannelError::Frame(FrameError::Truncated)));
    }
}
