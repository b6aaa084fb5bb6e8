//! The thread between the channel and the core.
//!
//! ```text
//!   host ◀── link ──▶ bridge ── a thread per call ──▶ core
//!                       ▲  └── pipes of stdio ─────────┘
//!                       └───── events of the core (a connection of its own)
//! ```
//!
//! A call that names streams gets pipes whose near ends are streams of the link. What the
//! core says of an end (a container's, an exec's) goes to the host behind the output that came
//! before it.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use pinion_monitor::link::{Link, LinkError, LinkPart};
use pinion_monitor::reactor::{Interest, Reactor};
use pinion_monitor_proto::VERSION;
use pinion_monitor_proto::channel::{Descriptors, recv_with_fds, send_with_fds};
use pinion_monitor_proto::frame::{Decoder, encode};
use pinion_monitor_proto::guest::{Call, Ready, packet::What};
use pinion_monitor_proto::message::event::What as Told;
use pinion_monitor_proto::message::request::Verb;
use pinion_monitor_proto::message::response::Outcome;
use pinion_monitor_proto::message::{self, Hello, Request, Response};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::conduct::{Conduct, conduct};
use crate::error::{Context, Error};
use crate::{CORE, setup};

/// Calls under way at a time; more are refused, for each is a thread.
const MOST_CALLS: usize = 128;

/// Output that its reader does not take holds up the news of its end for so long at most.
const HOLD: Duration = Duration::from_secs(10);

/// How often to look again while something is held.
const LOOK: Duration = Duration::from_millis(50);

/// What the bridge waits for.
#[derive(Debug, Clone, Copy)]
enum Source {
    Link(LinkPart),
    Core,
    Wake,
}

/// What a call's thread has for the bridge.
#[derive(Debug)]
pub(crate) enum Word {
    /// An answer; once what is in these streams was sent, which are closed then.
    Answer { response: Box<Response>, after: Vec<u32> },
    /// A connection that is stream `read` and `written`.
    Connected { socket: OwnedFd, read: u32, written: u32 },
    /// The call is over.
    Over,
}

/// How a call's thread speaks to the bridge.
#[derive(Debug, Clone)]
pub(crate) struct Words {
    sender: Sender<Word>,
    wake: std::sync::Arc<OwnedFd>,
}

impl Words {
    pub(crate) fn say(&self, word: Word) {
        // The bridge ends only with the machine, and a full pipe wakes it as well.
        drop(self.sender.send(word));
        rustix::io::write(self.wake.as_fd(), b"!").ok();
    }
}

/// News that waits for output to go first.
#[derive(Debug)]
struct Held {
    what: What,
    streams: Vec<u32>,
    /// Whether the streams must have ended, rather than be empty.
    ended: bool,
    since: Instant,
}

struct Bridge {
    link: Link<Source>,
    reactor: Reactor<Source, ()>,
    core: OwnedFd,
    decoder: Decoder,
    words: Words,
    received: Receiver<Word>,
    wake: OwnedFd,
    held: Vec<Held>,
    /// Output streams of each container.
    outputs: BTreeMap<String, Vec<u32>>,
    calls: usize,
}

/// Serves the channel for as long as it lives.
pub(crate) fn run(channel: OwnedFd) -> Result<(), Error> {
    let mut bridge = Bridge::new(channel)?;
    let hello = setup::hello()?;
    bridge.send(What::Hello(hello))?;
    let mut ready = Vec::new();
    let mut timer = false;
    loop {
        if !bridge.held.is_empty() && !timer {
            bridge.reactor.after(LOOK, ());
            timer = true;
        }
        bridge.reactor.wait(&mut ready).context(|| "wait for events".into())?;
        while bridge.reactor.expired().is_some() {
            timer = false;
        }
        for (token, what) in &ready {
            match bridge.reactor.source(*token) {
                Some(Source::Link(part)) => {
                    let mut packets = Vec::new();
                    let served = bridge.link.ready(part, *what, &mut bridge.reactor, &mut packets);
                    for packet in packets {
                        bridge.take(packet)?;
                    }
                    served.map_err(broken)?;
                }
                Some(Source::Core) => bridge.events()?,
                Some(Source::Wake) => bridge.listen()?,
                None => {}
            }
        }
        bridge.release()?;
    }
}

#[allow(clippy::needless_pass_by_value, reason = "used as map_err's function")]
fn broken(error: LinkError) -> Error {
    Error::Failed(error.to_string())
}

impl Bridge {
    fn new(channel: OwnedFd) -> Result<Self, Error> {
        let mut reactor = Reactor::new().context(|| "create epoll".into())?;
        let link = Link::new(channel, Source::Link, &mut reactor)
            .context(|| "watch the channel".into())?;
        let (wake, waker) = pipe()?;
        reactor.add(&wake, Interest::Read, Source::Wake).context(|| "watch a pipe".into())?;
        let core = subscribe()?;
        reactor.add(&core, Interest::Read, Source::Core).context(|| "watch the core".into())?;
        let (sender, received) = channel_of_words();
        let words = Words { sender, wake: std::sync::Arc::new(waker) };
        Ok(Self {
            link,
            reactor,
            core,
            decoder: Decoder::default(),
            words,
            received,
            wake,
            held: Vec::new(),
            outputs: BTreeMap::new(),
            calls: 0,
        })
    }

    fn send(&mut self, what: What) -> Result<(), Error> {
        self.link.send(what, &mut self.reactor).map_err(broken)
    }

    /// Something from the host that is not about a stream.
    fn take(&mut self, packet: What) -> Result<(), Error> {
        match packet {
            What::Setup(asked) => {
                let error = setup::apply(&asked).err().map(|error| error.text());
                self.send(What::Ready(Ready { error: error.unwrap_or_default() }))
            }
            What::Call(call) => self.call(call),
            // Only a guest says such things.
            _ => Ok(()),
        }
    }

    /// Starts a thread for a call, with pipes for its streams.
    fn call(&mut self, call: Call) -> Result<(), Error> {
        let id = call.request.as_ref().map_or(0, |request| request.id);
        match self.prepare(&call) {
            Ok((fds, after)) => {
                let conduct_ = Conduct { call, fds, after, words: self.words.clone() };
                let started = std::thread::Builder::new()
                    .name("call".into())
                    .stack_size(128 * 1024)
                    .spawn(move || conduct(conduct_));
                match started {
                    Ok(_) => {
                        self.calls += 1;
                        Ok(())
                    }
                    Err(error) => self.refuse(id, &format!("start a thread: {error}")),
                }
            }
            Err(error) => self.refuse(id, &error.text()),
        }
    }

    fn refuse(&mut self, request: u64, message: &str) -> Result<(), Error> {
        let kind = message::error::Kind::Internal.into();
        let error = message::Error { kind, message: message.to_owned() };
        let outcome = Some(Outcome::Error(error));
        self.send(What::Answer(Response { request, outcome }))
    }

    /// The far ends of a call's pipes, and its output streams.
    fn prepare(&mut self, call: &Call) -> Result<([Option<OwnedFd>; 3], Vec<u32>), Error> {
        if self.calls >= MOST_CALLS {
            return Err(Error::Failed(format!("{MOST_CALLS} calls are under way")));
        }
        let verb = call.request.as_ref().and_then(|request| request.verb.as_ref());
        if matches!(verb, Some(Verb::Dial(_))) {
            return Ok(([None, None, None], Vec::new()));
        }
        let mut fds = [None, None, None];
        let mut outputs = Vec::new();
        for (slot, stream) in fds.iter_mut().zip([call.stdin, call.stdout, call.stderr]).skip(1) {
            if stream != 0 {
                let (near, far) = pipe()?;
                blocking(&far)?;
                self.link
                    .open_reader(stream, near, &mut self.reactor)
                    .context(|| format!("open stream {stream}"))?;
                *slot = Some(far);
                outputs.push(stream);
            }
        }
        if call.stdin != 0 {
            let (far, near) = pipe()?;
            blocking(&far)?;
            self.link
                .open_writer(call.stdin, near, &mut self.reactor)
                .context(|| format!("open stream {}", call.stdin))?;
            fds[0] = Some(far);
        }
        if let Some(Verb::Create(create)) = verb {
            self.outputs.insert(create.id.clone(), outputs.clone());
        }
        Ok((fds, outputs))
    }

    /// What the core tells on its own.
    fn events(&mut self) -> Result<(), Error> {
        let mut buffer = [0; 4096];
        let mut none = Descriptors::default();
        loop {
            match recv_with_fds(&self.core, &mut buffer, &mut none) {
                Ok(0) => return Err(Error::Failed("the core has closed its connection".into())),
                Ok(n) => self.decoder.push(buffer.get(..n).unwrap_or_default()),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context(|| "read from the core".into()),
            }
        }
        let bad = |error| Error::Failed(format!("the core: {error}"));
        while let Some(response) = self.decoder.next::<Response>().map_err(bad)? {
            if response.request != 0 {
                continue;
            }
            let streams = match &response.outcome {
                Some(Outcome::Event(event)) => match &event.what {
                    Some(Told::Exited(exited)) => {
                        self.outputs.remove(&exited.id).unwrap_or_default()
                    }
                    _ => Vec::new(),
                },
                _ => continue,
            };
            let (what, since) = (What::Answer(response), Instant::now());
            self.held.push(Held { what, streams, ended: true, since });
        }
        Ok(())
    }

    /// What threads of calls have to say.
    fn listen(&mut self) -> Result<(), Error> {
        let mut buffer = [0; 256];
        while rustix::io::read(&self.wake, &mut buffer).is_ok_and(|n| n > 0) {}
        while let Ok(word) = self.received.try_recv() {
            match word {
                Word::Answer { response, after } => {
                    let (what, since) = (What::Answer(*response), Instant::now());
                    self.held.push(Held { what, streams: after, ended: false, since });
                }
                Word::Connected { socket, read, written } => {
                    let other = socket.try_clone().context(|| "duplicate a socket".into())?;
                    self.link
                        .open_reader(read, socket, &mut self.reactor)
                        .and_then(|()| self.link.open_writer(written, other, &mut self.reactor))
                        .context(|| "watch a connection".into())?;
                }
                Word::Over => self.calls = self.calls.saturating_sub(1),
            }
        }
        Ok(())
    }

    /// Sends the news whose output has gone before.
    fn release(&mut self) -> Result<(), Error> {
        let mut at = 0;
        while let Some(held) = self.held.get(at) {
            let (streams, ended) = (held.streams.clone(), held.ended);
            let mut done = true;
            for stream in &streams {
                let empty = self.link.drain(*stream, &mut self.reactor).map_err(broken)?;
                done &= if ended { !self.link.is_open(*stream) } else { empty };
            }
            if !done && self.held.get(at).is_some_and(|held| held.since.elapsed() < HOLD) {
                at += 1;
                continue;
            }
            let held = self.held.remove(at);
            for stream in streams {
                self.link.close(stream, &mut self.reactor).map_err(broken)?;
            }
            self.send(held.what)?;
        }
        Ok(())
    }
}

fn channel_of_words() -> (Sender<Word>, Receiver<Word>) {
    channel()
}

fn pipe() -> Result<(OwnedFd, OwnedFd), Error> {
    pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).context(|| "create a pipe".into())
}

/// A container's own end blocks, as any program expects.
fn blocking(fd: &OwnedFd) -> Result<(), Error> {
    rustix::io::ioctl_fionbio(fd, false).context(|| "make a pipe block".into())
}

/// A connection to the core that hears of events.
fn subscribe() -> Result<OwnedFd, Error> {
    let path = format!("{CORE}/monitor.sock");
    let stream = UnixStream::connect(&path).context(|| format!("connect to {path}"))?;
    let hello = Hello { version: VERSION, subscribe: true };
    let frame = encode(&Request { id: 1, verb: Some(Verb::Hello(hello)) })
        .map_err(|error| Error::Failed(error.to_string()))?;
    send_with_fds(&stream, &frame, &[]).context(|| format!("write to {path}"))?;
    stream.set_nonblocking(true).context(|| format!("use {path}"))?;
    Ok(stream.into())
}
