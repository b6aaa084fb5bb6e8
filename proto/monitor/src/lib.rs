//! The protocol between piniond and the monitor of one pod: messages and framing.
//!
//! `message` is generated from `proto/monitor.proto`; [`frame`] turns a byte stream into
//! messages and back; [`channel`] carries both, with file descriptors, over a unix socket.
//! `guest` is generated from `proto/guest.proto`: the same verbs between a monitor and the
//! agent in its pod's virtual machine.

pub mod channel;
pub mod frame;

/// The messages of `proto/monitor.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
pub mod message {
    include!(concat!(env!("OUT_DIR"), "/pinion.monitor.v1.rs"));
}

/// The messages of `proto/guest.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
pub mod guest {
    include!(concat!(env!("OUT_DIR"), "/pinion.guest.v1.rs"));
}

/// Bytes of one stream that may be under way to the other side of a guest's channel.
pub const WINDOW: u32 = 64 * 1024;

/// The version of the protocol that this crate speaks, as carried by `Hello`.
pub const VERSION: u32 = 1;

impl message::Request {
    /// How many descriptors travel with this request: one for each of stdin, stdout and
    /// stderr that an exec or attach names, the socket of a dial, none for every other verb.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        use message::request::Verb;
        match &self.verb {
            Some(Verb::Exec(v)) => count(v.stdin, v.stdout, v.stderr),
            Some(Verb::Attach(v)) => count(v.stdin, v.stdout, v.stderr),
            Some(Verb::Dial(_)) => 1,
            _ => 0,
        }
    }
}

fn count(stdin: bool, stdout: bool, stderr: bool) -> usize {
    usize::from(stdin) + usize::from(stdout) + usize::from(stderr)
}
