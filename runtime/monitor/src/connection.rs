//! One client: frames in, frames out, never waiting for it.

use std::io;
use std::os::fd::OwnedFd;

use pinion_monitor_proto::channel::{Descriptors, recv_with_fds, send_with_fds};
use pinion_monitor_proto::frame::{Decoder, FrameError, encode};
use pinion_monitor_proto::message::{Request, Response};

use crate::reactor::{Interest, Reactor, Watched};

/// Longest request, in bytes.
const MAX_REQUEST: usize = 64 * 1024;

/// A client that leaves more than this unread is cut off; it learns what it missed from
/// its next hello.
const MAX_UNREAD: usize = 256 * 1024;

/// Reads per readiness event, so that one client cannot keep the others waiting.
const READS: usize = 8;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum Closed {
    /// The client closed it.
    #[error("client has left")]
    Left,
    /// The client does not read.
    #[error("client leaves {0} bytes unread")]
    TooSlow(usize),
    /// The client does not speak the protocol.
    #[error("client broke the protocol: {0}")]
    Protocol(#[from] FrameError),
    /// The socket failed.
    #[error("client socket: {0}")]
    Socket(#[from] io::Error),
}

/// A request with its descriptors.
pub type Received = (Request, Vec<OwnedFd>);

/// A connected client.
#[derive(Debug)]
pub struct Connection {
    socket: Watched,
    decoder: Decoder,
    descriptors: Descriptors,
    unsent: Vec<u8>,
    /// Whether the client wants events.
    pub subscribed: bool,
}

impl Connection {
    /// Takes over an accepted, non-blocking socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket: Watched::new(socket),
            decoder: Decoder::with_limit(MAX_REQUEST),
            descriptors: Descriptors::default(),
            unsent: Vec::new(),
            subscribed: false,
        }
    }

    /// Starts to report on the socket.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn watch<S: Copy, T>(&mut self, reactor: &mut Reactor<S, T>, source: S) -> io::Result<()> {
        let interest = if self.unsent.is_empty() { Interest::Read } else { Interest::Both };
        self.socket.watch(reactor, interest, source)
    }

    /// Reports nothing more.
    pub fn unwatch<S: Copy, T>(&mut self, reactor: &mut Reactor<S, T>) {
        self.socket.unwatch(reactor);
    }

    /// Reads what has arrived into `requests`; what came whole before the connection ended
    /// is there as well.
    ///
    /// # Errors
    /// Why the connection has ended.
    pub fn receive(&mut self, requests: &mut Vec<Received>) -> Result<(), Closed> {
        let mut buffer = [0; 4096];
        for _ in 0..READS {
            match recv_with_fds(&self.socket, &mut buffer, &mut self.descriptors) {
                Ok(0) => return Err(Closed::Left),
                Ok(n) => self.decoder.push(buffer.get(..n).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
            while let Some(request) = self.decoder.next::<Request>()? {
                let descriptors = self.descriptors.claim(request.descriptors())?;
                requests.push((request, descriptors));
            }
            if self.decoder.is_empty() {
                self.descriptors.check_empty()?;
            }
        }
        Ok(())
    }

    /// Queues a response and sends what the socket takes.
    ///
    /// # Errors
    /// Why the connection has ended.
    pub fn send(&mut self, response: &Response) -> Result<(), Closed> {
        self.unsent.extend_from_slice(&encode(response)?);
        self.flush()
    }

    /// Sends what the socket takes; call [`watch`](Self::watch) afterwards.
    ///
    /// # Errors
    /// Why the connection has ended.
    pub fn flush(&mut self) -> Result<(), Closed> {
        let mut sent = 0;
        while let Some(rest) = self.unsent.get(sent..).filter(|rest| !rest.is_empty()) {
            match send_with_fds(&self.socket, rest, &[]) {
                Ok(n) => sent += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        if sent == self.unsent.len() {
            self.unsent = Vec::new();
        } else {
            self.unsent.drain(..sent);
        }
        match self.unsent.len() {
            unread if unread > MAX_UNREAD => Err(Closed::TooSlow(unread)),
            _ => Ok(()),
        }
    }
}
