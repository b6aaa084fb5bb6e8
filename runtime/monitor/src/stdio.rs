//! Stdio of a running process: its output goes to the log and to attached clients, their
//! input goes to the process.
//!
//! ```text
//! process ── Output ──▶ log                    client ── Feed ──▶ Sink ──▶ process
//!                 └───▶ Tap ──▶ client (any number)
//! ```
//!
//! Nothing here waits. A client that is behind pauses the process's output, so that a
//! terminal over a slow line loses nothing; one that takes no more for [`STALL`] is cut
//! off. The log never waits for a client once the process has ended.

mod viewer;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::termios::{Winsize, tcsetwinsize};

pub use self::viewer::ViewerId;
pub(crate) use self::viewer::check_pollable;
use self::viewer::{Offer, Viewer};
use crate::event::{Owner, Part, Shared, Source, Timer};
use crate::log::{Log, Stream};
use crate::reactor::{Interest, Ready, TimerId, Watched};
use crate::socket::set_nonblocking;

/// How long an attached client may hold up a process.
pub const STALL: Duration = Duration::from_secs(5);

/// What a process left in its pipes at its end is at most this, the largest pipe there is.
const LEFT_OVER: usize = 1024 * 1024;

/// Most input taken from a client at once, in bytes.
const INPUT: usize = 4096;

const STREAMS: [Stream; 2] = [Stream::Stdout, Stream::Stderr];

/// Our ends of a process's stdio.
#[derive(Debug, Default)]
pub struct Ends {
    /// Where its input goes.
    pub stdin: Option<OwnedFd>,
    /// Where its output comes from.
    pub stdout: Option<OwnedFd>,
    /// Where its errors come from; none with a terminal.
    pub stderr: Option<OwnedFd>,
}

impl Ends {
    /// Both directions of a terminal.
    ///
    /// # Errors
    /// Those of dup(2).
    pub fn terminal(master: OwnedFd) -> io::Result<Self> {
        Ok(Self { stdin: Some(master.try_clone()?), stdout: Some(master), stderr: None })
    }
}

/// How to treat the stdio of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Manner {
    /// Close the process's input when the first client's input ends.
    pub stdin_once: bool,
    /// Hang up the terminal when the client is gone.
    pub hang_up: bool,
}

/// Input of the process.
#[derive(Debug)]
struct Sink {
    fd: Watched,
    pending: Vec<u8>,
}

/// Outcome of one read.
enum Flow {
    Data(usize),
    Empty,
    End,
}

/// Stdio of one process.
#[derive(Debug)]
pub struct Stdio {
    owner: Owner,
    manner: Manner,
    outputs: [Option<Watched>; 2],
    sink: Option<Sink>,
    viewers: Vec<Viewer>,
    attached: u32,
    log: Log,
    ended: bool,
    stall: Option<TimerId>,
}

impl Stdio {
    /// Takes over our ends and starts to read.
    ///
    /// # Errors
    /// Those of fcntl(2) and epoll_ctl(2).
    pub fn new(
        owner: Owner,
        manner: Manner,
        ends: Ends,
        log: Log,
        shared: &mut Shared,
    ) -> io::Result<Self> {
        for fd in [&ends.stdin, &ends.stdout, &ends.stderr].into_iter().flatten() {
            set_nonblocking(fd)?;
        }
        let outputs = [ends.stdout.map(Watched::new), ends.stderr.map(Watched::new)];
        let sink = ends.stdin.map(|fd| Sink { fd: Watched::new(fd), pending: Vec::new() });
        let mut stdio = Self {
            owner,
            manner,
            outputs,
            sink,
            viewers: Vec::new(),
            attached: 0,
            log,
            ended: false,
            stall: None,
        };
        for stream in STREAMS {
            stdio.resume(stream, shared)?;
        }
        Ok(stdio)
    }

    /// Adds a client, by its pipes in the order stdin, stdout, stderr. A patient one is never
    /// cut off for being behind.
    ///
    /// # Errors
    /// When the descriptors cannot be polled; the client is not attached then.
    pub fn attach(
        &mut self,
        fds: [Option<OwnedFd>; 3],
        patient: bool,
        shared: &mut Shared,
    ) -> io::Result<()> {
        self.attached += 1;
        let [stdin, stdout, stderr] = fds;
        // Nobody reads the input of a process that has none.
        let stdin = stdin.filter(|_| self.sink.is_some());
        let id = ViewerId(self.attached);
        let mut viewer = Viewer::new(id, self.owner, stdin, [stdout, stderr], patient);
        let accepts = self.sink.as_ref().is_some_and(|sink| sink.pending.is_empty());
        if let Err(error) = viewer.watch(accepts, shared) {
            viewer.close(shared);
            return Err(error);
        }
        self.viewers.push(viewer);
        self.sweep(shared);
        Ok(())
    }

    /// Serves a readiness event.
    pub fn ready(&mut self, part: Part, ready: Ready, shared: &mut Shared) {
        match part {
            Part::Output(stream) => drop(self.pump(stream, shared)),
            Part::Sink => self.drain_sink(shared),
            Part::Feed(viewer) => self.feed(viewer, shared),
            Part::Tap(viewer, stream) => self.tap(viewer, stream, ready, shared),
        }
        self.sweep(shared);
    }

    /// Cuts off clients that have been behind for too long.
    pub fn cut_stalled(&mut self, shared: &mut Shared) {
        self.stall = None;
        let mut cut = false;
        for viewer in &mut self.viewers {
            cut |= viewer.cut_stalled(STALL, shared);
        }
        self.lost(cut, shared);
        self.resume_all(shared);
        self.sweep(shared);
    }

    /// The process has ended: takes what it wrote before, and lets go of the clients once
    /// they have it.
    pub fn settle(&mut self, shared: &mut Shared) {
        for stream in STREAMS {
            let mut taken = 0;
            while taken < LEFT_OVER {
                match self.pump(stream, shared) {
                    Flow::Data(n) => taken += n,
                    Flow::Empty | Flow::End => break,
                }
            }
        }
        self.ended = true;
        self.close_sink(shared);
        self.sweep(shared);
    }

    /// Whether every client has what the process wrote before it ended.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.ended && self.viewers.is_empty()
    }

    /// Ends everything; an unterminated line is logged.
    pub fn close(&mut self, shared: &mut Shared) {
        for stream in STREAMS {
            self.end(stream, shared);
        }
        self.close_sink(shared);
        for viewer in &mut self.viewers {
            viewer.close(shared);
        }
        self.viewers.clear();
        if let Some(timer) = self.stall.take() {
            shared.reactor.cancel(timer);
        }
    }

    /// Sets the size of the terminal, in characters.
    ///
    /// # Errors
    /// Those of the `TIOCSWINSZ` ioctl.
    pub fn resize(&self, width: u16, height: u16) -> io::Result<()> {
        let size = Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
        match self.outputs.first() {
            Some(Some(master)) => Ok(tcsetwinsize(master, size)?),
            _ => Err(Errno::NOTTY.into()),
        }
    }

    /// The process's log.
    pub fn log(&mut self) -> &mut Log {
        &mut self.log
    }

    /// Reads once from an output and passes on what came.
    fn pump(&mut self, stream: Stream, shared: &mut Shared) -> Flow {
        let Some(Some(output)) = self.outputs.get(stream.index()) else { return Flow::End };
        let read = match rustix::io::read(output, shared.bytes.as_mut_slice()) {
            Ok(0) => None,
            Ok(n) => Some(n),
            Err(Errno::AGAIN | Errno::INTR) => return Flow::Empty,
            // A terminal reports EIO when the last process has closed it.
            Err(_) => None,
        };
        let Some(read) = read else {
            self.end(stream, shared);
            return Flow::End;
        };
        let bytes = std::mem::take(&mut shared.bytes);
        let new = bytes.get(..read).unwrap_or_default();
        self.log.append(stream, new, &mut shared.records);
        let (mut behind, mut lost) = (false, false);
        for viewer in &mut self.viewers {
            match viewer.offer(stream, new, shared) {
                Offer::Taken => {}
                Offer::Behind => behind = true,
                Offer::Lost => lost = true,
            }
        }
        shared.bytes = bytes;
        if behind {
            self.pause(stream, shared);
        }
        self.lost(lost, shared);
        Flow::Data(read)
    }

    /// Stops to read an output until the clients have caught up.
    fn pause(&mut self, stream: Stream, shared: &mut Shared) {
        if let Some(Some(output)) = self.outputs.get_mut(stream.index()) {
            output.unwatch(&mut shared.reactor);
        }
        if self.stall.is_none() {
            self.stall = Some(shared.reactor.after(STALL, Timer::Stall(self.owner)));
        }
    }

    fn resume(&mut self, stream: Stream, shared: &mut Shared) -> io::Result<()> {
        let source = Source::Stdio(self.owner, Part::Output(stream));
        match self.outputs.get_mut(stream.index()) {
            Some(Some(output)) => output.watch(&mut shared.reactor, Interest::Read, source),
            _ => Ok(()),
        }
    }

    fn resume_all(&mut self, shared: &mut Shared) {
        let behind = |stream| self.viewers.iter().any(|viewer| viewer.is_behind(stream));
        let free = STREAMS.map(|stream| (stream, !behind(stream)));
        for (stream, _) in free.iter().filter(|(_, free)| *free) {
            // What was registered once can be registered again.
            drop(self.resume(*stream, shared));
        }
        if free.iter().all(|(_, free)| *free) {
            if let Some(timer) = self.stall.take() {
                shared.reactor.cancel(timer);
            }
        } else if self.stall.is_none() {
            self.stall = Some(shared.reactor.after(STALL, Timer::Stall(self.owner)));
        }
    }

    fn end(&mut self, stream: Stream, shared: &mut Shared) {
        let output = self.outputs.get_mut(stream.index()).and_then(Option::take);
        if let Some(mut output) = output {
            output.unwatch(&mut shared.reactor);
            self.log.finish(stream, &mut shared.records);
        }
    }

    /// A client can be written to, or is gone.
    fn tap(&mut self, id: ViewerId, stream: Stream, ready: Ready, shared: &mut Shared) {
        let Some(viewer) = self.viewers.iter_mut().find(|viewer| viewer.id == id) else { return };
        let lost = viewer.serve(stream, ready, shared);
        self.lost(lost, shared);
        self.resume_all(shared);
    }

    fn lost(&mut self, lost: bool, shared: &mut Shared) {
        if lost && self.manner.hang_up {
            for stream in STREAMS {
                self.end(stream, shared);
            }
            self.close_sink(shared);
        }
    }

    /// Takes input from a client.
    fn feed(&mut self, id: ViewerId, shared: &mut Shared) {
        let Some(viewer) = self.viewers.iter_mut().find(|viewer| viewer.id == id) else { return };
        let mut bytes = [0; INPUT];
        match viewer.read(&mut bytes) {
            Ok(n) if n > 0 => self.give(bytes.get(..n).unwrap_or_default(), shared),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(_) | Err(_) => {
                viewer.close_feed(shared);
                if self.manner.stdin_once {
                    self.close_sink_when_empty(shared);
                }
            }
        }
    }

    /// Gives input to the process, which may take only a part now.
    fn give(&mut self, bytes: &[u8], shared: &mut Shared) {
        let Some(sink) = &mut self.sink else { return };
        sink.pending.extend_from_slice(bytes);
        self.drain_sink(shared);
    }

    fn drain_sink(&mut self, shared: &mut Shared) {
        let Some(sink) = &mut self.sink else { return };
        let blocked = loop {
            if sink.pending.is_empty() {
                break false;
            }
            match rustix::io::write(&sink.fd, &sink.pending) {
                Ok(n) => drop(sink.pending.drain(..n)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break true,
                Err(_) => return self.close_sink(shared),
            }
        };
        if blocked {
            let source = Source::Stdio(self.owner, Part::Sink);
            if sink.fd.watch(&mut shared.reactor, Interest::Write, source).is_err() {
                return self.close_sink(shared);
            }
        } else {
            sink.pending = Vec::new();
            sink.fd.unwatch(&mut shared.reactor);
            if self.manner.stdin_once && self.attached > 0 && !self.has_feed() {
                return self.close_sink(shared);
            }
        }
        for viewer in &mut self.viewers {
            viewer.watch_feed(!blocked, shared);
        }
    }

    fn has_feed(&self) -> bool {
        self.viewers.iter().any(Viewer::has_feed)
    }

    fn close_sink_when_empty(&mut self, shared: &mut Shared) {
        if self.sink.as_ref().is_some_and(|sink| sink.pending.is_empty()) {
            self.close_sink(shared);
        }
    }

    fn close_sink(&mut self, shared: &mut Shared) {
        if let Some(mut sink) = self.sink.take() {
            sink.fd.unwatch(&mut shared.reactor);
        }
        for viewer in &mut self.viewers {
            viewer.close_feed(shared);
        }
    }

    /// Lets go of what no output will reach any more and of clients that are done.
    fn sweep(&mut self, shared: &mut Shared) {
        let open = STREAMS.map(|stream| {
            !self.ended && self.outputs.get(stream.index()).is_some_and(Option::is_some)
        });
        for viewer in &mut self.viewers {
            viewer.finish(open, shared);
        }
        self.viewers.retain(|viewer| !viewer.is_done());
    }
}
