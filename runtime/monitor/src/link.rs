//! One byte stream that carries messages and any number of numbered data streams: the channel
//! between a monitor and the agent in its pod's virtual machine.
//!
//! ```text
//!   local descriptor ── Reader ──Data──▶ ┌─────────┐ ──Data──▶ Writer ──▶ local descriptor
//!                        ◀──── Credit ── │ channel │ ◀─ Credit ──
//!   caller ───────── send(Packet) ─────▶ └─────────┘ ─────────▶ ready() -> packets
//! ```
//!
//! The same code is both ends. Memory is bounded by construction: a stream has at most
//! [`WINDOW`] bytes under way, and nothing is read for the channel while more than
//! [`MAX_UNSENT`] bytes wait to be sent on it. Whatever the other side says that breaks the
//! protocol is an error, after which the link is of no use any more.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

use pinion_monitor_proto::WINDOW;
use pinion_monitor_proto::frame::{Decoder, FrameError, encode};
use pinion_monitor_proto::guest::{Credit, Cut, Data, End, Packet, packet::What};
use rustix::io::Errno;

use crate::reactor::{Interest, Reactor, Ready, Watched};

/// Local descriptors are not read while this much waits for the channel.
pub const MAX_UNSENT: usize = 256 * 1024;

/// Bytes of one read from the channel or a descriptor.
const READ: usize = 16 * 1024;

/// Reads of the channel per readiness event, so that the rest of the loop gets its turn.
const READS: usize = 8;

/// What a readiness event of a link is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkPart {
    /// The channel itself.
    Channel,
    /// The local descriptor of a stream.
    Stream(u32),
}

/// Why a link is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The other side closed the channel.
    #[error("the other side has closed the channel")]
    Closed,
    /// The other side does not speak the protocol.
    #[error("the other side broke the protocol: {0}")]
    Protocol(&'static str),
    /// A frame that is none.
    #[error("the other side broke the protocol: {0}")]
    Frame(#[from] FrameError),
    /// The channel or the poller failed.
    #[error("channel: {0}")]
    System(#[from] io::Error),
}

/// A local descriptor whose bytes go to the other side.
#[derive(Debug)]
struct Reader {
    fd: Watched,
    credit: u32,
}

/// A local descriptor that takes the other side's bytes.
#[derive(Debug)]
struct Writer {
    fd: Watched,
    pending: Vec<u8>,
    /// What the other side may still send.
    window: u32,
    ended: bool,
}

#[derive(Debug)]
enum Stream {
    Reader(Reader),
    Writer(Writer),
}

/// A multiplexed channel. `S` is what the caller's reactor knows sources by.
pub struct Link<S> {
    channel: Watched,
    decoder: Decoder,
    unsent: Vec<u8>,
    streams: BTreeMap<u32, Stream>,
    /// Streams that are over; the other side may not know yet.
    over: u32,
    source: fn(LinkPart) -> S,
}

impl<S> std::fmt::Debug for Link<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("streams", &self.streams.len()).finish_non_exhaustive()
    }
}

impl<S: Copy> Link<S> {
    /// Takes over a non-blocking channel and starts to watch it.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn new<T>(
        channel: OwnedFd,
        source: fn(LinkPart) -> S,
        reactor: &mut Reactor<S, T>,
    ) -> io::Result<Self> {
        let mut channel = Watched::new(channel);
        channel.watch(reactor, Interest::Read, source(LinkPart::Channel))?;
        Ok(Self {
            channel,
            decoder: Decoder::default(),
            unsent: Vec::new(),
            streams: BTreeMap::new(),
            over: 0,
            source,
        })
    }

    /// Sends what comes from `fd`, which must not block, as stream `id`.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn open_reader<T>(
        &mut self,
        id: u32,
        fd: OwnedFd,
        reactor: &mut Reactor<S, T>,
    ) -> io::Result<()> {
        let mut fd = Watched::new(fd);
        fd.watch(reactor, Interest::Read, (self.source)(LinkPart::Stream(id)))?;
        self.streams.insert(id, Stream::Reader(Reader { fd, credit: WINDOW }));
        self.over = self.over.max(id);
        Ok(())
    }

    /// Gives what comes as stream `id` to `fd`, which must not block.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn open_writer<T>(
        &mut self,
        id: u32,
        fd: OwnedFd,
        reactor: &mut Reactor<S, T>,
    ) -> io::Result<()> {
        let mut fd = Watched::new(fd);
        fd.watch(reactor, Interest::Failure, (self.source)(LinkPart::Stream(id)))?;
        let writer = Writer { fd, pending: Vec::new(), window: WINDOW, ended: false };
        self.streams.insert(id, Stream::Writer(writer));
        self.over = self.over.max(id);
        Ok(())
    }

    /// Lets go of everything: what came is given to the local descriptors as far as they take
    /// it, then all are closed.
    pub fn abandon<T>(&mut self, reactor: &mut Reactor<S, T>) {
        self.channel.unwatch(reactor);
        for id in self.streams.keys().copied().collect::<Vec<_>>() {
            // The channel is of no use any more, so what it says of it is none either.
            let _ = self.give(id, reactor);
            self.take(id, reactor);
        }
    }

    /// Whether a stream is neither ended nor cut, or has bytes that its descriptor did not
    /// take yet.
    #[must_use]
    pub fn is_open(&self, id: u32) -> bool {
        self.streams.contains_key(&id)
    }

    /// Whether bytes of a stream wait for its local descriptor.
    #[must_use]
    pub fn is_behind(&self, id: u32) -> bool {
        match self.streams.get(&id) {
            Some(Stream::Writer(writer)) => !writer.pending.is_empty(),
            _ => false,
        }
    }

    /// Ends a stream from this side and lets go of its descriptor.
    ///
    /// # Errors
    /// Those of sending.
    pub fn close<T>(&mut self, id: u32, reactor: &mut Reactor<S, T>) -> Result<(), LinkError> {
        let what = match self.take(id, reactor) {
            None => return Ok(()),
            Some(Stream::Reader(_)) => What::End(End { stream: id }),
            Some(Stream::Writer(writer)) if writer.ended => return Ok(()),
            Some(Stream::Writer(_)) => What::Cut(Cut { stream: id }),
        };
        self.send(what, reactor)
    }

    /// Queues a packet and sends what the channel takes.
    ///
    /// # Errors
    /// When the packet is too large or the channel fails.
    pub fn send<T>(&mut self, what: What, reactor: &mut Reactor<S, T>) -> Result<(), LinkError> {
        self.unsent.extend_from_slice(&encode(&Packet { what: Some(what) })?);
        self.flush(reactor)
    }

    /// Serves a readiness event; packets that are not about streams go to `packets`.
    ///
    /// # Errors
    /// Why the link is of no use any more. Packets that came before are in `packets`.
    pub fn ready<T>(
        &mut self,
        part: LinkPart,
        ready: Ready,
        reactor: &mut Reactor<S, T>,
        packets: &mut Vec<What>,
    ) -> Result<(), LinkError> {
        match part {
            LinkPart::Channel => {
                if ready.writable() {
                    self.flush(reactor)?;
                }
                if ready.readable() {
                    self.receive(reactor, packets)?;
                }
                Ok(())
            }
            LinkPart::Stream(id) => self.serve_stream(id, ready, reactor),
        }
    }

    /// Reads what is in a local descriptor now, as far as the other side takes it; whether
    /// nothing was left.
    ///
    /// # Errors
    /// Those of sending.
    pub fn drain<T>(&mut self, id: u32, reactor: &mut Reactor<S, T>) -> Result<bool, LinkError> {
        loop {
            match self.pump(id, reactor)? {
                Pumped::Some => {}
                Pumped::Nothing => return Ok(true),
                Pumped::Held => return Ok(false),
            }
        }
    }

    fn serve_stream<T>(
        &mut self,
        id: u32,
        ready: Ready,
        reactor: &mut Reactor<S, T>,
    ) -> Result<(), LinkError> {
        match self.streams.get(&id) {
            Some(Stream::Reader(_)) => self.pump(id, reactor).map(drop),
            Some(Stream::Writer(writer)) => {
                // A pipe's writer hears of the reader's end as an error; a socket may only
                // have ended its other direction.
                if ready.broken() && (!ready.writable() || writer.pending.is_empty()) {
                    return self.close(id, reactor);
                }
                self.give(id, reactor)
            }
            None => Ok(()),
        }
    }

    /// Moves one read of a local descriptor to the channel.
    fn pump<T>(&mut self, id: u32, reactor: &mut Reactor<S, T>) -> Result<Pumped, LinkError> {
        let full = self.unsent.len() > MAX_UNSENT;
        let Some(Stream::Reader(reader)) = self.streams.get_mut(&id) else {
            return Ok(Pumped::Nothing);
        };
        if reader.credit == 0 || full {
            reader.fd.unwatch(reactor);
            return Ok(Pumped::Held);
        }
        let mut bytes = vec![0; READ.min(reader.credit as usize)];
        let read = match rustix::io::read(&reader.fd, bytes.as_mut_slice()) {
            Ok(read) => read,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Pumped::Nothing),
            // A connection that was reset, a terminal that was hung up: an end like others.
            Err(_) => 0,
        };
        if read == 0 {
            self.take(id, reactor);
            self.send(What::End(End { stream: id }), reactor)?;
            return Ok(Pumped::Nothing);
        }
        bytes.truncate(read);
        reader.credit -= u32::try_from(read).unwrap_or(reader.credit);
        self.send(What::Data(Data { stream: id, bytes }), reactor)?;
        Ok(Pumped::Some)
    }

    /// Gives a local descriptor what it takes.
    fn give<T>(&mut self, id: u32, reactor: &mut Reactor<S, T>) -> Result<(), LinkError> {
        let source = (self.source)(LinkPart::Stream(id));
        let Some(Stream::Writer(writer)) = self.streams.get_mut(&id) else { return Ok(()) };
        let (mut taken, mut gone) = (0, false);
        while let Some(rest) = writer.pending.get(taken..).filter(|rest| !rest.is_empty()) {
            match rustix::io::write(&writer.fd, rest) {
                Ok(n) => taken += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    gone = true;
                    break;
                }
            }
        }
        writer.pending.drain(..taken);
        if gone {
            return self.close(id, reactor);
        }
        let (empty, ended) = (writer.pending.is_empty(), writer.ended);
        if empty && ended {
            if let Some(Stream::Writer(writer)) = self.take(id, reactor) {
                // A socket's other direction goes on; a pipe ends by being closed.
                rustix::net::shutdown(&writer.fd, rustix::net::Shutdown::Write).ok();
            }
            return Ok(());
        }
        let interest = if empty { Interest::Failure } else { Interest::Write };
        writer.fd.watch(reactor, interest, source)?;
        let credit = u32::try_from(taken).unwrap_or(u32::MAX);
        if credit > 0 && !ended {
            writer.window += credit;
            return self.send(What::Credit(Credit { stream: id, bytes: credit }), reactor);
        }
        Ok(())
    }

    fn receive<T>(
        &mut self,
        reactor: &mut Reactor<S, T>,
        packets: &mut Vec<What>,
    ) -> Result<(), LinkError> {
        let mut buffer = vec![0; READ];
        for _ in 0..READS {
            match rustix::io::read(&self.channel, buffer.as_mut_slice()) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(n) => self.decoder.push(buffer.get(..n).unwrap_or_default()),
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(error) => return Err(io::Error::from(error).into()),
            }
            while let Some(packet) = self.decoder.next::<Packet>()? {
                let what = packet.what.ok_or(LinkError::Protocol("an empty packet"))?;
                match what {
                    What::Data(data) => self.data(&data, reactor)?,
                    What::End(end) => self.end(end.stream, reactor)?,
                    What::Credit(credit) => self.credit(credit, reactor)?,
                    What::Cut(cut) => self.cut(cut.stream, reactor)?,
                    other => packets.push(other),
                }
            }
        }
        Ok(())
    }

    fn data<T>(&mut self, data: &Data, reactor: &mut Reactor<S, T>) -> Result<(), LinkError> {
        let length = u32::try_from(data.bytes.len()).unwrap_or(u32::MAX);
        match self.streams.get_mut(&data.stream) {
            Some(Stream::Writer(writer)) => {
                if writer.ended {
                    return Err(LinkError::Protocol("data after the end of its stream"));
                }
                writer.window = writer
                    .window
                    .checked_sub(length)
                    .ok_or(LinkError::Protocol("more data than was credited"))?;
                writer.pending.extend_from_slice(&data.bytes);
                self.give(data.stream, reactor)
            }
            Some(Stream::Reader(_)) => Err(LinkError::Protocol("data against its stream")),
            None => self.known(data.stream),
        }
    }

    fn end<T>(&mut self, id: u32, reactor: &mut Reactor<S, T>) -> Result<(), LinkError> {
        match self.streams.get_mut(&id) {
            Some(Stream::Writer(writer)) => {
                writer.ended = true;
                self.give(id, reactor)
            }
            Some(Stream::Reader(_)) => Err(LinkError::Protocol("end against its stream")),
            None => self.known(id),
        }
    }

    fn credit<T>(&mut self, credit: Credit, reactor: &mut Reactor<S, T>) -> Result<(), LinkError> {
        let source = (self.source)(LinkPart::Stream(credit.stream));
        match self.streams.get_mut(&credit.stream) {
            Some(Stream::Reader(reader)) => {
                let total = reader.credit.saturating_add(credit.bytes);
                if total > WINDOW {
                    return Err(LinkError::Protocol("credit for what was not sent"));
                }
                reader.credit = total;
                reader.fd.watch(reactor, Interest::Read, source)?;
                Ok(())
            }
            Some(Stream::Writer(_)) => Err(LinkError::Protocol("credit against its stream")),
            None => self.known(credit.stream),
        }
    }

    fn cut<T>(&mut self, id: u32, reactor: &mut Reactor<S, T>) -> Result<(), LinkError> {
        match self.streams.get(&id) {
            Some(Stream::Reader(_)) => {
                self.take(id, reactor);
                Ok(())
            }
            Some(Stream::Writer(_)) => Err(LinkError::Protocol("cut against its stream")),
            None => self.known(id),
        }
    }

    /// A stream that is over may still be talked of; one that never was may not.
    fn known(&self, id: u32) -> Result<(), LinkError> {
        if id > 0 && id <= self.over {
            Ok(())
        } else {
            Err(LinkError::Protocol("a stream that does not exist"))
        }
    }

    fn take<T>(&mut self, id: u32, reactor: &mut Reactor<S, T>) -> Option<Stream> {
        let mut stream = self.streams.remove(&id)?;
        match &mut stream {
            Stream::Reader(reader) => reader.fd.unwatch(reactor),
            Stream::Writer(writer) => writer.fd.unwatch(reactor),
        }
        Some(stream)
    }

    fn flush<T>(&mut self, reactor: &mut Reactor<S, T>) -> Result<(), LinkError> {
        let was_full = self.unsent.len() > MAX_UNSENT;
        let mut sent = 0;
        while let Some(rest) = self.unsent.get(sent..).filter(|rest| !rest.is_empty()) {
            match rustix::io::write(&self.channel, rest) {
                Ok(n) => sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        if sent == self.unsent.len() {
            self.unsent = Vec::new();
        } else {
            self.unsent.drain(..sent);
        }
        let interest = if self.unsent.is_empty() { Interest::Read } else { Interest::Both };
        self.channel.watch(reactor, interest, (self.source)(LinkPart::Channel))?;
        if was_full && self.unsent.len() <= MAX_UNSENT {
            for (id, stream) in &mut self.streams {
                if let Stream::Reader(reader) = stream
                    && reader.credit > 0
                {
                    let source = (self.source)(LinkPart::Stream(*id));
                    reader.fd.watch(reactor, Interest::Read, source)?;
                }
            }
        }
        Ok(())
    }
}

/// What became of one look at a local descriptor.
enum Pumped {
    /// Bytes were moved.
    Some,
    /// There was nothing, or nothing more will come.
    Nothing,
    /// The other side must take something first.
    Held,
}

#[cfg(test)]
mod tests;
