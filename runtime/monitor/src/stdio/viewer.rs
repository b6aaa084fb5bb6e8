//! A client attached to a process.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::FileType;
use rustix::io::Errno;

use crate::event::{Owner, Part, Shared, Source};
use crate::log::Stream;
use crate::reactor::{Interest, Ready, Watched};
use crate::socket::set_nonblocking;

/// Asked of the kernel for a client's pipe: bursts wait there, not in our memory.
const PIPE_SIZE: usize = 1024 * 1024;

/// Names a client among those of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ViewerId(pub u32);

/// What became of output offered to a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Offer {
    /// It has all of it, or does not want this output.
    Taken,
    /// It has yet to take a part.
    Behind,
    /// It is gone.
    Lost,
}

/// Where a client gets one output.
#[derive(Debug)]
struct Tap {
    fd: Watched,
    backlog: Vec<u8>,
    behind_since: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Viewer {
    pub(super) id: ViewerId,
    owner: Owner,
    feed: Option<Watched>,
    taps: [Option<Tap>; 2],
    patient: bool,
}

impl Viewer {
    pub(super) fn new(
        id: ViewerId,
        owner: Owner,
        stdin: Option<OwnedFd>,
        outputs: [Option<OwnedFd>; 2],
        patient: bool,
    ) -> Self {
        let tap = |fd| Tap { fd: Watched::new(fd), backlog: Vec::new(), behind_since: None };
        let taps = outputs.map(|fd| fd.map(tap));
        Self { id, owner, feed: stdin.map(Watched::new), taps, patient }
    }

    /// Starts to report on all descriptors; on the feed only if its input has a taker.
    pub(super) fn watch(&mut self, accepts: bool, shared: &mut Shared) -> io::Result<()> {
        if let Some(feed) = &mut self.feed {
            check_pollable(&*feed)?;
            if accepts {
                let source = Source::Stdio(self.owner, Part::Feed(self.id));
                feed.watch(&mut shared.reactor, Interest::Read, source)?;
            }
        }
        for (tap, stream) in self.taps.iter_mut().zip([Stream::Stdout, Stream::Stderr]) {
            let Some(tap) = tap else { continue };
            check_pollable(&tap.fd)?;
            // Smaller is fine too, and sockets have no such size.
            rustix::pipe::fcntl_setpipe_size(&tap.fd, PIPE_SIZE).ok();
            let source = Source::Stdio(self.owner, Part::Tap(self.id, stream));
            tap.fd.watch(&mut shared.reactor, Interest::Failure, source)?;
        }
        Ok(())
    }

    /// Gives the client a copy of output.
    pub(super) fn offer(&mut self, stream: Stream, bytes: &[u8], shared: &mut Shared) -> Offer {
        let Some(Some(tap)) = self.taps.get_mut(stream.index()) else { return Offer::Taken };
        let mut rest = bytes;
        if tap.backlog.is_empty() && !write(&tap.fd, &mut rest) {
            self.close_tap(stream, shared);
            return Offer::Lost;
        }
        if rest.is_empty() {
            return Offer::Taken;
        }
        tap.backlog.extend_from_slice(rest);
        tap.behind_since.get_or_insert_with(Instant::now);
        let source = Source::Stdio(self.owner, Part::Tap(self.id, stream));
        if tap.fd.watch(&mut shared.reactor, Interest::Write, source).is_err() {
            self.close_tap(stream, shared);
            return Offer::Lost;
        }
        Offer::Behind
    }

    /// Serves a readiness event of a tap; whether the client turned out to be gone.
    pub(super) fn serve(&mut self, stream: Stream, ready: Ready, shared: &mut Shared) -> bool {
        let Some(Some(tap)) = self.taps.get_mut(stream.index()) else { return false };
        let mut rest = tap.backlog.as_slice();
        if ready.broken() || !write(&tap.fd, &mut rest) {
            self.close_tap(stream, shared);
            return true;
        }
        let left = rest.len();
        tap.backlog.drain(..tap.backlog.len() - left);
        if tap.backlog.is_empty() {
            tap.backlog = Vec::new();
            tap.behind_since = None;
            let source = Source::Stdio(self.owner, Part::Tap(self.id, stream));
            if tap.fd.watch(&mut shared.reactor, Interest::Failure, source).is_err() {
                self.close_tap(stream, shared);
                return true;
            }
        }
        false
    }

    /// Cuts off outputs that have been behind for `limit`; whether there were any.
    pub(super) fn cut_stalled(&mut self, limit: Duration, shared: &mut Shared) -> bool {
        let mut cut = false;
        if self.patient {
            return cut;
        }
        for stream in [Stream::Stdout, Stream::Stderr] {
            let Some(Some(tap)) = self.taps.get(stream.index()) else { continue };
            if tap.behind_since.is_some_and(|since| since.elapsed() >= limit) {
                self.close_tap(stream, shared);
                cut = true;
            }
        }
        cut
    }

    pub(super) fn is_behind(&self, stream: Stream) -> bool {
        matches!(self.taps.get(stream.index()), Some(Some(tap)) if !tap.backlog.is_empty())
    }

    pub(super) fn has_feed(&self) -> bool {
        self.feed.is_some()
    }

    pub(super) fn read(&self, bytes: &mut [u8]) -> Result<usize, Errno> {
        match &self.feed {
            Some(feed) => rustix::io::read(feed, bytes),
            None => Err(Errno::AGAIN),
        }
    }

    /// Reads the client's input, or leaves it where it is.
    pub(super) fn watch_feed(&mut self, on: bool, shared: &mut Shared) {
        let source = Source::Stdio(self.owner, Part::Feed(self.id));
        let Some(feed) = &mut self.feed else { return };
        if !on {
            feed.unwatch(&mut shared.reactor);
        } else if feed.watch(&mut shared.reactor, Interest::Read, source).is_err() {
            self.close_feed(shared);
        }
    }

    pub(super) fn close_feed(&mut self, shared: &mut Shared) {
        if let Some(mut feed) = self.feed.take() {
            feed.unwatch(&mut shared.reactor);
        }
    }

    fn close_tap(&mut self, stream: Stream, shared: &mut Shared) {
        let tap = self.taps.get_mut(stream.index()).and_then(Option::take);
        if let Some(mut tap) = tap {
            tap.fd.unwatch(&mut shared.reactor);
        }
    }

    /// Closes the taps of outputs that have ended, once the client has it all; input has no
    /// taker when every output has ended.
    pub(super) fn finish(&mut self, open: [bool; 2], shared: &mut Shared) {
        for (stream, open) in [Stream::Stdout, Stream::Stderr].into_iter().zip(open) {
            if !open && !self.is_behind(stream) {
                self.close_tap(stream, shared);
            }
        }
        if open == [false, false] {
            self.close_feed(shared);
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.feed.is_none() && self.taps.iter().all(Option::is_none)
    }

    pub(super) fn close(&mut self, shared: &mut Shared) {
        self.finish([true, true], shared);
        self.close_feed(shared);
        self.close_tap(Stream::Stdout, shared);
        self.close_tap(Stream::Stderr, shared);
    }
}

/// Writes as much as goes without waiting; false if the reader is gone.
fn write(fd: &Watched, rest: &mut &[u8]) -> bool {
    while !rest.is_empty() {
        match rustix::io::write(fd, rest) {
            Ok(n) => *rest = rest.get(n..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return true,
            Err(_) => return false,
        }
    }
    true
}

/// Only pipes and sockets: they can be polled, and being non-blocking stays between us
/// and the client, whereas a terminal's mode is everyone's.
pub(crate) fn check_pollable(fd: impl AsFd) -> io::Result<()> {
    match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
        FileType::Fifo | FileType::Socket => set_nonblocking(fd),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a pipe nor a socket")),
    }
}
