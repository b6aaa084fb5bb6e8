//! The small part of rtnetlink(7) that moving a network device takes: list links and their
//! addresses, rename and hand over a link, bring it up, give it addresses.
//!
//! ```text
//! request  nlmsghdr │ ifinfomsg or ifaddrmsg │ rtattr, rtattr, …
//! answer   one NLMSG_ERROR (0 = done), or any number of messages and NLMSG_DONE
//! ```
//!
//! The codec works on byte slices: lengths from the kernel are checked and never trusted.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// `IFA_F_PERMANENT`: the address was configured and does not expire.
const PERMANENT: u32 = 0x80;
/// Flags of an address that whoever configures it chooses: `IFA_F_NODAD`, `_HOMEADDRESS`,
/// `_MANAGETEMPADDR`, `_NOPREFIXROUTE`, `_MCAUTOJOIN`. The others are the kernel's.
const CONFIGURABLE: u32 = 0x02 | 0x10 | 0x100 | 0x200 | 0x400;
/// `IFA_RT_PRIORITY`, absent from libc.
const IFA_RT_PRIORITY: u16 = 9;
const HEADER: usize = 16;
/// Larger than any message rtnetlink puts into one datagram for the requests made here.
const BUFFER: usize = 64 << 10;

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Interface index in its network namespace.
    pub index: i32,
    /// Name in its network namespace.
    pub name: String,
    /// `IFF_*`.
    pub flags: u32,
}

/// An address of a network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    family: u8,
    prefix: u8,
    scope: u8,
    flags: u32,
    /// `IFA_LOCAL`, `IFA_ADDRESS`, `IFA_BROADCAST`, `IFA_RT_PRIORITY` as they came.
    attributes: Vec<(u16, Vec<u8>)>,
}

impl Address {
    /// True for an address that somebody configured for communication with the world:
    /// `IFA_F_PERMANENT` with `RT_SCOPE_UNIVERSE`.
    #[must_use]
    pub fn is_permanent_global(&self) -> bool {
        self.flags & PERMANENT != 0 && self.scope == libc::RT_SCOPE_UNIVERSE
    }
}

/// A socket of one network namespace: that of its making.
#[derive(Debug)]
pub struct Route {
    socket: OwnedFd,
    sequence: u32,
}

impl Route {
    /// Opens a socket in the network namespace of the caller.
    ///
    /// # Errors
    /// As socket(2).
    pub fn open() -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok(Self { socket, sequence: 0 })
    }

    /// All links of the namespace.
    ///
    /// # Errors
    /// As the kernel answers.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let request = Request::new(libc::RTM_GETLINK, libc::NLM_F_DUMP, &link_header(0, 0, 0));
        Ok(self.ask(request)?.iter().filter_map(|message| decode_link(message)).collect())
    }

    /// The addresses of a link.
    ///
    /// # Errors
    /// As the kernel answers.
    pub fn addresses(&mut self, index: i32) -> io::Result<Vec<Address>> {
        let request = Request::new(libc::RTM_GETADDR, libc::NLM_F_DUMP, &[0; 8]);
        let all = self.ask(request)?;
        let decoded = all.iter().filter_map(|message| decode_address(message));
        Ok(decoded.filter(|(of, _)| *of == index).map(|(_, address)| address).collect())
    }

    /// Brings a link up or down.
    ///
    /// # Errors
    /// As the kernel answers.
    pub fn set_up(&mut self, index: i32, up: bool) -> io::Result<()> {
        let bit = libc::IFF_UP as u32;
        let header = link_header(index, if up { bit } else { 0 }, bit);
        self.ask(Request::new(libc::RTM_NEWLINK, libc::NLM_F_ACK, &header)).map(drop)
    }

    /// Moves a link into the network namespace `target`, where it is called `name`; a name
    /// that ends in `%d` gets a number from the kernel. Both happen at once or not at all.
    ///
    /// # Errors
    /// As the kernel answers: `EEXIST` for a name in use, `EINVAL` for a device that is
    /// bound to its namespace.
    pub fn hand_over(&mut self, index: i32, target: BorrowedFd<'_>, name: &str) -> io::Result<()> {
        let header = link_header(index, 0, 0);
        let mut request = Request::new(libc::RTM_NEWLINK, libc::NLM_F_ACK, &header);
        request.attribute(libc::IFLA_IFNAME, &[name.as_bytes(), b"\0"].concat());
        request.attribute(libc::IFLA_NET_NS_FD, &target.as_raw_fd().to_ne_bytes());
        self.ask(request).map(drop)
    }

    /// Gives a link an address that was read from one.
    ///
    /// # Errors
    /// As the kernel answers.
    pub fn add_address(&mut self, index: i32, address: &Address) -> io::Result<()> {
        let mut header = vec![address.family, address.prefix, 0, address.scope];
        header.extend(index.to_ne_bytes());
        let flags = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        let mut request = Request::new(libc::RTM_NEWADDR, flags, &header);
        for (kind, value) in &address.attributes {
            request.attribute(*kind, value);
        }
        request.attribute(libc::IFA_FLAGS, &(address.flags & CONFIGURABLE).to_ne_bytes());
        self.ask(request).map(drop)
    }

    /// Sends a request and collects the messages of its answer, headers included.
    fn ask(&mut self, request: Request) -> io::Result<Vec<Vec<u8>>> {
        self.sequence += 1;
        let kernel = rustix::net::netlink::SocketAddrNetlink::new(0, 0);
        let bytes = request.finish(self.sequence);
        rustix::net::sendto(&self.socket, &bytes, SendFlags::empty(), &kernel)?;
        let mut collected = Vec::new();
        let mut buffer = vec![0; BUFFER];
        loop {
            let (length, _) = rustix::io::retry_on_intr(|| {
                rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty())
            })?;
            for message in messages(&buffer[..length.min(BUFFER)]) {
                if u32_at(message, 8) != Some(self.sequence) {
                    continue;
                }
                match verdict(message) {
                    Verdict::More => collected.push(message.to_vec()),
                    Verdict::Done(0) => return Ok(collected),
                    Verdict::Done(errno) => return Err(io::Error::from_raw_os_error(errno)),
                }
            }
        }
    }
}

/// A message under construction.
struct Request(Vec<u8>);

impl Request {
    fn new(kind: u16, flags: i32, header: &[u8]) -> Self {
        let flags = u16::try_from(libc::NLM_F_REQUEST | flags).unwrap_or(u16::MAX);
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(header);
        Self(bytes)
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        // Names and addresses: far from the 64 KiB an attribute can hold.
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(aligned(self.0.len()), 0);
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[0..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// `struct ifinfomsg`.
fn link_header(index: i32, flags: u32, change: u32) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    bytes.extend(index.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(change.to_ne_bytes());
    bytes
}

enum Verdict {
    More,
    /// The end, with an errno or 0.
    Done(i32),
}

fn verdict(message: &[u8]) -> Verdict {
    match u16_at(message, 4).map(i32::from) {
        Some(libc::NLMSG_ERROR) => Verdict::Done(
            u32_at(message, HEADER).map_or(libc::EPROTO, |e| (e as i32).wrapping_neg()),
        ),
        // A dump that failed half-way says so in its last message.
        Some(libc::NLMSG_DONE) => {
            Verdict::Done(u32_at(message, HEADER).map_or(0, |e| (e as i32).wrapping_neg()))
        }
        _ => Verdict::More,
    }
}

fn decode_link(message: &[u8]) -> Option<Link> {
    if u16_at(message, 4)? != libc::RTM_NEWLINK {
        return None;
    }
    let attributes = attributes(message.get(HEADER + 16..)?);
    let name = attributes.into_iter().find(|(kind, _)| *kind == libc::IFLA_IFNAME)?.1;
    let name = name.split(|byte| *byte == 0).next()?;
    Some(Link {
        index: u32_at(message, HEADER + 4)? as i32,
        name: String::from_utf8_lossy(name).into_owned(),
        flags: u32_at(message, HEADER + 8)?,
    })
}

fn decode_address(message: &[u8]) -> Option<(i32, Address)> {
    const KEPT: [u16; 4] =
        [libc::IFA_LOCAL, libc::IFA_ADDRESS, libc::IFA_BROADCAST, IFA_RT_PRIORITY];
    if u16_at(message, 4)? != libc::RTM_NEWADDR {
        return None;
    }
    let header = message.get(HEADER..HEADER + 8)?;
    let mut address = Address {
        family: header[0],
        prefix: header[1],
        scope: header[3],
        flags: u32::from(header[2]),
        attributes: Vec::new(),
    };
    for (kind, value) in attributes(message.get(HEADER + 8..)?) {
        if kind == libc::IFA_FLAGS {
            address.flags = u32_at(value, 0)?;
        } else if KEPT.contains(&kind) {
            address.attributes.push((kind, value.to_vec()));
        }
    }
    Some((u32_at(message, HEADER + 4)? as i32, address))
}

/// The messages in a datagram; ends at the first that is cut short.
fn messages(datagram: &[u8]) -> Vec<&[u8]> {
    split(datagram, HEADER, |rest| usize::try_from(u32_at(rest, 0)?).ok())
}

/// The attributes in the rest of a message.
fn attributes(bytes: &[u8]) -> Vec<(u16, &[u8])> {
    const TYPE_MASK: u16 = 0x3fff;
    let parts = split(bytes, 4, |rest| u16_at(rest, 0).map(usize::from));
    parts.iter().filter_map(|part| Some((u16_at(part, 2)? & TYPE_MASK, &part[4..]))).collect()
}

/// Cuts `bytes` into parts that begin with their own length of at least `least`.
fn split(bytes: &[u8], least: usize, length: impl Fn(&[u8]) -> Option<usize>) -> Vec<&[u8]> {
    let mut rest = bytes;
    let mut parts = Vec::new();
    while let Some(length) = length(rest).filter(|length| *length >= least) {
        let Some(part) = rest.get(..length) else { break };
        parts.push(part);
        rest = rest.get(aligned(length)..).unwrap_or_default();
    }
    parts
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_device_is_found_with_its_address() {
        let mut route = Route::open().unwrap();
        let links = route.links().unwrap();
        let loopback = links.iter().find(|link| link.name == "lo").unwrap();
        assert_ne!(loopback.flags & libc::IFF_LOOPBACK as u32, 0);
        // Of host scope, if it is up at all.
        let addresses = route.addresses(loopback.index).unwrap();
        assert!(addresses.iter().all(|address| !address.is_permanent_global()));
    }

    #[test]
    fn the_kernels_refusal_arrives_as_an_errno() {
        let mut route = Route::open().unwrap();
        let error = route.set_up(0x7fff_fff0, true).unwrap_err();
        let errno = error.raw_os_error();
        assert!(matches!(errno, Some(libc::ENODEV | libc::EPERM)), "{error}");
    }

    #[test]
    fn requests_are_laid_out_as_the_kernel_reads_them() {
        let mut request = Request::new(libc::RTM_NEWLINK, libc::NLM_F_ACK, &link_header(7, 1, 1));
        request.attribute(libc::IFLA_IFNAME, b"ab\0");
        let bytes = request.finish(9);
        assert_eq!(bytes.len(), 16 + 16 + 8);
        assert_eq!(u32_at(&bytes, 0), Some(40));
        let link = decode_link(&bytes).unwrap();
        assert_eq!((link.index, link.name.as_str(), link.flags), (7, "ab", 1));
    }

    #[test]
    fn lengths_that_lie_end_the_parse() {
        for bytes in [&[0xff; 64][..], &[0; 64], &[3, 0, 1, 0, 0, 0], &[], &[16]] {
            assert!(attributes(bytes).len() <= bytes.len() && messages(bytes).is_empty());
            assert_eq!(decode_link(bytes), None);
            assert_eq!(decode_address(bytes), None);
        }
    }
}
