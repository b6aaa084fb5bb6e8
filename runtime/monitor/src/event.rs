//! What the loop waits for, and what its parts share.

use std::io;

use crate::link::LinkPart;
use crate::log::Stream;
use crate::reactor::Reactor;
use crate::stdio::ViewerId;

/// Names a container, exec or client for as long as the monitor lives.
pub type Key = u32;

/// Whose stdio it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// A container's init.
    Container(Key),
    /// An exec with a terminal.
    Exec(Key),
}

/// Which descriptor of a process's stdio.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// What the process writes.
    Output(Stream),
    /// What the process reads.
    Sink,
    /// Where a client gets a copy of an output.
    Tap(ViewerId, Stream),
    /// Where a client's input comes from.
    Feed(ViewerId),
}

/// What a readiness event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A client wants to connect.
    Listener,
    /// A signal arrived.
    Signals,
    /// Something was removed from the pod's directory.
    Directory,
    /// A client.
    Client(Key),
    /// A process's stdio.
    Stdio(Owner, Part),
    /// A container's memory cgroup.
    Oom(Key),
    /// The channel into the guest, or a stream of it.
    Link(LinkPart),
    /// What the guest's kernel and its machine say.
    Console,
    /// The machine's control channel.
    Control,
}

/// What an expired timer is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timer {
    /// A runtime invocation, by pid, takes too long.
    Runtime(i32),
    /// An exec is past its deadline.
    Deadline(Key),
    /// A client has not read output for too long.
    Stall(Owner),
    /// Look at a container's kill count again.
    Oom(Key),
    /// Look whether the pod's directory is still there.
    Directory,
    /// Containers do not die although killed.
    Shutdown,
    /// The guest is not up yet.
    Boot,
    /// Look whether output that holds up news of an end has gone.
    Held,
}

/// The reactor, and buffers that every part uses in turn so that an idle container costs
/// none.
#[derive(Debug)]
pub struct Shared {
    /// Descriptors and timers.
    pub reactor: Reactor<Source, Timer>,
    /// Bytes just read.
    pub bytes: Vec<u8>,
    /// Log records just made.
    pub records: Vec<u8>,
}

/// Size of one read from a container, in bytes.
const READ: usize = 16 * 1024;

impl Shared {
    /// A new reactor with empty buffers.
    ///
    /// # Errors
    /// Those of epoll_create1(2).
    pub fn new() -> io::Result<Self> {
        Ok(Self { reactor: Reactor::new()?, bytes: vec![0; READ], records: Vec::new() })
    }
}
