//! What a container's process and the runtime say to each other before execve(2).
//!
//! ```text
//!  runtime (create)                 process                    runtime (start)
//!     │  ids mapped, cgroup joined     │
//!     ├───────────── Proceed ─────────▶│ mounts…
//!     │◀──────────── RootfsReady ──────┤
//!     │  createRuntime hooks           │
//!     ├───────── Proceed(state) ──────▶│ pivot, identity…
//!     │◀──────────── Ready ────────────┤ accept()
//!     ▼ exits                          │◀───── Proceed(state) ────┤
//!                                      ├──── Listener{fd} ───────▶│ pidfd_getfd
//!                                      │◀──────── Proceed ────────┤
//!                                      ├──── (closed by execve) ─▶│
//! ```
//!
//! At any moment `Failed` may come instead. Each message is one packet; a message that is
//! not the next one of the plan ends the conversation: the process is hostile from the
//! moment it has entered the container.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

use crate::child::Step;
use crate::error::{Error, Failure, Result};

/// From the container's process.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Namespaces and mounts exist, the root is not yet changed.
    RootfsReady,
    /// Everything is done but what `start` sets off.
    Ready,
    /// The seccomp notification descriptor has this number in the process.
    Listener(i32),
    /// The process gives up.
    Failed(Report),
}

/// Why the process gave up.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// How far it had come.
    pub step: Step,
    /// What failed.
    pub what: String,
    /// The kernel's answer.
    pub errno: Option<i32>,
}

impl Report {
    /// What `failure` looks like on the wire.
    #[must_use]
    pub fn new(step: Step, failure: &Failure) -> Self {
        let (mut what, errno) = (failure.what.clone(), failure.errno());
        if let (None, Some(source)) = (errno, &failure.source) {
            what = format!("{what}: {source}");
        }
        let end = (0..=MAX_TEXT.min(what.len())).rev().find(|at| what.is_char_boundary(*at));
        what.truncate(end.unwrap_or(0));
        Self { step, what, errno }
    }

    pub(crate) fn into_error(self) -> Error {
        let source = self.errno.map(io::Error::from_raw_os_error);
        if self.step == Step::Execute {
            // As runc: the kernel's own words on the program, which is not the runtime's doing.
            return Error::System(Failure { what: self.what, source });
        }
        Error::Child { step: self.step, failure: Failure { what: self.what, source } }
    }
}

const MAX_TEXT: usize = 2048;
const MAX_PACKET: usize = 8192;
/// The largest state (with all annotations) that reaches hooks in the container, in bytes.
pub const MAX_STATE: usize = 128 << 10;

/// One end of the conversation.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Two connected ends.
    ///
    /// # Errors
    /// As socketpair(2).
    pub fn pair() -> io::Result<(Self, Self)> {
        let (left, right) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self(left), Self(right)))
    }

    /// Speaks over a connected `SOCK_SEQPACKET` socket.
    #[must_use]
    pub fn over(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Process: says something. Uses write(2) alone, because a seccomp filter may be in
    /// force already.
    ///
    /// # Errors
    /// As write(2).
    pub fn say(&self, message: &Message) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        rustix::io::write(&self.0, &bytes)?;
        Ok(())
    }

    /// Process: waits for the runtime's word, which carries the container's state for
    /// hooks (or nothing). Uses read(2) alone.
    ///
    /// # Errors
    /// As read(2); `UnexpectedEof` when the runtime is gone.
    pub fn await_proceed(&self) -> io::Result<Vec<u8>> {
        let mut packet = vec![0; MAX_STATE + 1];
        let length = rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut packet))?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        packet.truncate(length);
        packet.remove(0);
        Ok(packet)
    }

    /// Runtime: lets the process go on, with the state its hooks are to read.
    ///
    /// # Errors
    /// As send(2); `EMSGSIZE` for a state above [`MAX_STATE`].
    pub fn proceed(&self, state: &[u8]) -> io::Result<()> {
        if state.len() > MAX_STATE {
            return Err(rustix::io::Errno::MSGSIZE.into());
        }
        let packet = [b"+", state].concat();
        rustix::net::send(&self.0, &packet, rustix::net::SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Runtime: the next message, `None` when the process closed its end.
    ///
    /// # Errors
    /// [`Error::Child`] for a failure report, [`Error::Protocol`] for nonsense.
    pub fn hear(&self) -> Result<Option<Message>> {
        let mut packet = [0; MAX_PACKET];
        let length = rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut packet));
        let length = match length {
            // A process that died with unread data in its queue resets the connection.
            Ok(0) | Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            Ok(length) => length,
            Err(error) => return Err(Error::Protocol(error.to_string())),
        };
        match serde_json::from_slice(&packet[..length]) {
            Ok(Message::Failed(report)) => Err(report.into_error()),
            Ok(message) => Ok(Some(message)),
            Err(error) => Err(Error::Protocol(error.to_string())),
        }
    }

    /// Runtime: the next message, which must be `expected`.
    ///
    /// # Errors
    /// As [`Channel::hear`]; [`Error::ChildVanished`] with `doing` at the end.
    pub fn expect(&self, expected: &Message, doing: &'static str) -> Result<()> {
        match self.hear()? {
            Some(message) if message == *expected => Ok(()),
            Some(message) => Err(Error::Protocol(format!("{message:?} instead of {expected:?}"))),
            None => Err(Error::ChildVanished(doing)),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_arrives_with_its_step_text_and_errno() {
        let (runtime, process) = Channel::pair().unwrap();
        let failure = Failure {
            what: "mount /x".into(),
            source: Some(io::Error::from_raw_os_error(libc::EPERM)),
        };
        process.say(&Message::Failed(Report::new(Step::Rootfs, &failure))).unwrap();
        let error = runtime.expect(&Message::Ready, "x").unwrap_err();
        let text = crate::error::chain(&error);
        assert!(text.contains("mount /x: operation not permitted"), "{text}");
    }

    #[test]
    fn a_message_out_of_turn_and_nonsense_end_the_conversation() {
        let (runtime, process) = Channel::pair().unwrap();
        process.say(&Message::Ready).unwrap();
        assert!(matches!(runtime.expect(&Message::RootfsReady, "x"), Err(Error::Protocol(_))));
        rustix::io::write(&process, b"{nonsense").unwrap();
        assert!(matches!(runtime.hear(), Err(Error::Protocol(_))));
        drop(process);
        assert!(matches!(runtime.expect(&Message::Ready, "waiting"), Err(Error::ChildVanished(_))));
    }

    #[test]
    fn a_text_too_long_for_a_packet_is_cut_at_a_character() {
        let report = Report::new(Step::Rootfs, &Failure::refused("ä".repeat(5000)));
        assert!(report.what.len() <= MAX_TEXT && report.what.ends_with('ä'));
    }
}
