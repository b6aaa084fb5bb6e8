//! rtnetlink and nfnetlink, spoken directly: short requests and dumps on a blocking socket.
//!
//! A socket belongs to the network namespace of the thread that opens it and stays there, so
//! one thread can work on the host and on a pod at a time. Nothing here keeps state between
//! calls, but for [`KeptSocket`]. Formats: netlink(7), rtnetlink(7), `linux/netlink.h`,
//! `linux/netfilter/nfnetlink.h`.
//!
//! The crates for this are async or cover only half of it (none writes nf_tables rules), and
//! a start of a pod is a dozen messages.

pub(crate) mod conntrack;
mod kept;
mod message;
pub(crate) mod nftables;
pub(crate) mod route;

pub(crate) use kept::KeptSocket;
pub(crate) use message::{Attributes, Message, number, number_be};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_MULTI: u16 = 2;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
/// The object may exist already: it must not.
pub(crate) const NLM_F_EXCL: u16 = 0x200;
/// The object is made if it does not exist.
pub(crate) const NLM_F_CREATE: u16 = 0x400;
/// The object goes to the end of its list.
pub(crate) const NLM_F_APPEND: u16 = 0x800;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// The kernel fills at most 32 KiB per message of a dump.
const BUFFER: usize = 64 << 10;
/// The kernel answers at once, or is waiting for a lock that others hold.
const PATIENCE: i64 = 30;
/// A dump that another change cuts through is begun anew this often.
const DUMP_ATTEMPTS: u32 = 20;

/// One message of an answer.
#[derive(Debug)]
pub(crate) struct Answer {
    /// What follows the netlink header.
    pub(crate) body: Vec<u8>,
}

/// A netlink socket.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// A NETLINK_ROUTE socket in the calling thread's network namespace.
    pub(crate) fn route() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkRoute, 0)
    }

    /// A socket that hears of changes to links (`RTMGRP_LINK`), and is used for nothing else:
    /// what others cause has their sequence numbers.
    pub(crate) fn link_events() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkRoute, 1)
    }

    /// A NETLINK_NETFILTER socket in the calling thread's network namespace.
    pub(crate) fn netfilter() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkNetFilter, 0)
    }

    fn open(protocol: SockProtocol, groups: u32) -> io::Result<Self> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        let socket = Self { fd, sequence: 0, buffer: vec![0; BUFFER] };
        socket.set_patience(TimeVal::new(PATIENCE, 0))?;
        Ok(socket)
    }

    fn set_patience(&self, time: TimeVal) -> io::Result<()> {
        Ok(setsockopt(&self.fd, sockopt::ReceiveTimeout, &time)?)
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let kernel = NetlinkAddr::new(0, 0);
        let sent = sendto(self.fd.as_raw_fd(), bytes, &kernel, MsgFlags::empty())?;
        if sent == bytes.len() { Ok(()) } else { Err(malformed("the request was cut off")) }
    }

    /// Sends a request and waits for its acknowledgement.
    pub(crate) fn request(&mut self, message: Message) -> io::Result<()> {
        let sequence = self.next_sequence();
        self.send(&message.finish(NLM_F_REQUEST | NLM_F_ACK, sequence))?;
        self.receive(sequence, |kind, flags, body| match kind {
            NLMSG_ERROR => code(body).map(|()| true),
            _ => Ok(flags & NLM_F_MULTI == 0 && kind == NLMSG_DONE),
        })
    }

    /// Sends a request that is answered by one message.
    pub(crate) fn get(&mut self, message: Message) -> io::Result<Answer> {
        let sequence = self.next_sequence();
        self.send(&message.finish(NLM_F_REQUEST, sequence))?;
        let mut found = None;
        self.receive(sequence, |kind, _, body| {
            if kind == NLMSG_ERROR {
                code(body)?;
            }
            found = Some(Answer { body: body.to_vec() });
            Ok(true)
        })?;
        found.ok_or_else(|| malformed("no answer"))
    }

    /// All objects of a kind. Begun anew when a change went through the middle of it.
    pub(crate) fn dump(&mut self, message: &Message) -> io::Result<Vec<Answer>> {
        for _ in 0..DUMP_ATTEMPTS {
            let sequence = self.next_sequence();
            self.send(&message.clone().finish(NLM_F_REQUEST | NLM_F_DUMP, sequence))?;
            let (mut answers, mut torn) = (Vec::new(), false);
            self.receive(sequence, |kind, flags, body| {
                torn |= flags & NLM_F_DUMP_INTR != 0;
                match kind {
                    NLMSG_DONE => return Ok(true),
                    NLMSG_ERROR => return code(body).map(|()| true),
                    _ => answers.push(Answer { body: body.to_vec() }),
                }
                Ok(false)
            })?;
            if !torn {
                return Ok(answers);
            }
        }
        Err(io::Error::new(io::ErrorKind::Interrupted, "the table changes faster than it is read"))
    }

    /// Sends several requests as one datagram; each has its own sequence number, and the
    /// answers are collected until the last one's has come.
    pub(crate) fn batch(&mut self, messages: Vec<(u16, Message)>) -> io::Result<()> {
        let (mut bytes, mut first, mut last) = (Vec::new(), None, 0);
        for (flags, message) in messages {
            let sequence = self.next_sequence();
            first.get_or_insert(sequence);
            if flags & NLM_F_ACK != 0 {
                last = sequence;
            }
            bytes.extend(message.finish(NLM_F_REQUEST | flags, sequence));
        }
        self.send(&bytes)?;
        let mut outcome = Ok(());
        loop {
            let length = recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
            for (header, body) in split(self.buffer.get(..length).unwrap_or_default()) {
                if header.kind != NLMSG_ERROR {
                    continue;
                }
                let answer = code(body);
                // An error on the opening message is the whole batch's, and all there is.
                let over =
                    header.sequence == last || (answer.is_err() && Some(header.sequence) == first);
                outcome = outcome.and(answer);
                if over {
                    return outcome;
                }
            }
        }
    }

    /// Reads what the kernel sends unasked, or nothing when `time` has passed.
    pub(crate) fn events(&mut self, time: std::time::Duration) -> io::Result<Vec<Answer>> {
        let micros = i64::from(time.subsec_micros()).max(1);
        let seconds = i64::try_from(time.as_secs()).unwrap_or(PATIENCE);
        self.set_patience(TimeVal::new(seconds, micros))?;
        match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
            Ok(length) => Ok(split(self.buffer.get(..length).unwrap_or_default())
                .map(|(_, body)| Answer { body: body.to_vec() })
                .collect()),
            // ENOBUFS: events were lost, so the caller looks for itself.
            Err(nix::Error::EAGAIN | nix::Error::EINTR | nix::Error::ENOBUFS) => Ok(Vec::new()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Feeds the messages of `sequence` to `each` until it says that it has all.
    fn receive(
        &mut self,
        sequence: u32,
        mut each: impl FnMut(u16, u16, &[u8]) -> io::Result<bool>,
    ) -> io::Result<()> {
        loop {
            let length = match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Err(nix::Error::EINTR) => continue,
                other => other?,
            };
            for (header, body) in split(self.buffer.get(..length).unwrap_or_default()) {
                if header.sequence == sequence && each(header.kind, header.flags, body)? {
                    return Ok(());
                }
            }
        }
    }
}

struct Header {
    kind: u16,
    flags: u16,
    sequence: u32,
}

/// The messages of a datagram; what is cut off at its end is left out.
fn split(mut bytes: &[u8]) -> impl Iterator<Item = (Header, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::try_from(number(bytes.get(..4)?)).ok()?;
        let body = bytes.get(HEADER..length)?;
        let header = Header {
            kind: u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?),
            flags: u16::from_ne_bytes(bytes.get(6..8)?.try_into().ok()?),
            sequence: number(bytes.get(8..12)?),
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((header, body))
    })
}

/// Reads the code of an NLMSG_ERROR: 0 is the acknowledgement.
fn code(body: &[u8]) -> io::Result<()> {
    let bytes = body.get(..4).and_then(|bytes| bytes.try_into().ok());
    match i32::from_ne_bytes(bytes.ok_or_else(|| malformed("short answer"))?) {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("netlink: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_become_errno() {
        assert!(code(&[0; 4]).is_ok());
        assert_eq!(code(&(-19i32).to_ne_bytes()).unwrap_err().raw_os_error(), Some(19));
        assert!(code(&[]).is_err());
        assert!(code(&i32::MIN.to_ne_bytes()).is_err());
    }

    #[test]
    fn a_cut_off_datagram_ends_where_it_is_cut() {
        let mut bytes = Message::new(16).finish(0, 1);
        bytes.extend(Message::new(17).finish(0, 2));
        assert_eq!(split(&bytes).map(|(header, _)| header.kind).collect::<Vec<_>>(), [16, 17]);
        assert_eq!(split(&bytes[..bytes.len() - 1]).count(), 1);
        assert_eq!(split(&[1, 0, 0, 0]).count(), 0);
        assert_eq!(split(&[0; 64]).count(), 0, "a length of 0 does not loop");
    }
}
