//! The little of rtnetlink(7) that carries a network into a guest: links, addresses, routes,
//! and redirecting one interface's packets into another (tc-mirred(8)).
//!
//! Blocking, for the namespace of the calling thread.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;
const REPLACE: u16 = 0x100;

const DONE: u16 = 3;
const ERROR: u16 = 2;

const NEWLINK: u16 = 16;
const GETLINK: u16 = 18;
const NEWADDR: u16 = 20;
const GETADDR: u16 = 22;
const NEWROUTE: u16 = 24;
const GETROUTE: u16 = 26;
const NEWQDISC: u16 = 36;
const DELQDISC: u16 = 37;
const NEWTFILTER: u16 = 44;

const UNSPEC: u8 = 0;
const INET: u8 = 2;
const INET6: u8 = 10;

const IFF_UP: u32 = 1;
/// The parent of what arrives at an interface, `ffff:`.
const INGRESS: u32 = 0xffff_fff1;
const INGRESS_HANDLE: u32 = 0xffff_0000;
const ETH_P_ALL: u16 = 3;

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its number in the namespace.
    pub index: i32,
    /// Its name.
    pub name: String,
    /// Its hardware address; empty for those without.
    pub mac: Vec<u8>,
    /// Bytes of a packet.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The interface.
    pub index: i32,
    /// The address.
    pub ip: IpAddr,
    /// Bits of its network.
    pub prefix: u8,
    /// How far it is valid (`RT_SCOPE_*`); 253 is this link only.
    pub scope: u8,
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The interface it leaves by.
    pub index: i32,
    /// Where to; `None` for anywhere.
    pub destination: Option<IpAddr>,
    /// Bits of the destination.
    pub prefix: u8,
    /// The next hop; `None` when the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// Who made it (`RTPROT_*`); 2 is the kernel itself.
    pub protocol: u8,
    /// Whether it is of IPv6.
    pub v6: bool,
}

/// A conversation with the kernel.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in the calling thread's namespace.
    ///
    /// # Errors
    /// Those of socket(2).
    pub fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        Ok(Self { socket, sequence: 0 })
    }

    /// All interfaces.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let answers = self.ask(&Message::new(GETLINK, REQUEST | DUMP).raw(&[0; 16]))?;
        Ok(answers.iter().filter_map(|body| link(body)).collect())
    }

    /// All addresses.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn addresses(&mut self) -> io::Result<Vec<Address>> {
        let answers = self.ask(&Message::new(GETADDR, REQUEST | DUMP).raw(&[0; 8]))?;
        Ok(answers.iter().filter_map(|body| address(body)).collect())
    }

    /// All unicast routes of the main table.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn routes(&mut self) -> io::Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in [INET, INET6] {
            let mut header = [0; 12];
            header[0] = family;
            let answers = self.ask(&Message::new(GETROUTE, REQUEST | DUMP).raw(&header))?;
            routes.extend(answers.iter().filter_map(|body| route(body)));
        }
        Ok(routes)
    }

    /// Sets name, MTU and hardware address where given, then brings the interface up.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_link(&mut self, index: i32, name: Option<&str>, mtu: Option<u32>) -> io::Result<()> {
        let mut message = Message::new(NEWLINK, REQUEST | ACK).raw(&link_header(index, 0, 0));
        if let Some(name) = name {
            message = message.attribute(3, &terminated(name));
        }
        if let Some(mtu) = mtu {
            message = message.attribute(4, &mtu.to_ne_bytes());
        }
        self.ask(&message)?;
        let up = Message::new(NEWLINK, REQUEST | ACK).raw(&link_header(index, IFF_UP, IFF_UP));
        self.ask(&up).map(drop)
    }

    /// Gives an interface an address; one that is there is as good. IPv6 duplicates are not
    /// looked for: the address was in use by this very pod before.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add_address(&mut self, index: i32, ip: IpAddr, prefix: u8) -> io::Result<()> {
        const NODAD: u8 = 2;
        let (family, bytes) = octets(ip);
        let flags = if family == INET6 { NODAD } else { 0 };
        let mut header = vec![family, prefix, flags, 0];
        header.extend_from_slice(&index.to_ne_bytes());
        let message = Message::new(NEWADDR, REQUEST | ACK | CREATE | REPLACE)
            .raw(&header)
            .attribute(2, &bytes)
            .attribute(1, &bytes);
        self.ask(&message).map(drop)
    }

    /// Adds a route.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add_route(&mut self, route: &Route) -> io::Result<()> {
        const MAIN: u8 = 254;
        const BOOT: u8 = 3;
        const UNICAST: u8 = 1;
        const ONLINK: u32 = 4;
        let family = if route.v6 { INET6 } else { INET };
        let mut header = vec![family, route.prefix, 0, 0, MAIN, BOOT, route.scope, UNICAST];
        // A gateway need not be in a network of ours: point-to-point set-ups rely on it.
        let flags = if route.gateway.is_some() { ONLINK } else { 0 };
        header.extend_from_slice(&flags.to_ne_bytes());
        let mut message = Message::new(NEWROUTE, REQUEST | ACK | CREATE | REPLACE).raw(&header);
        if let Some(ip) = route.destination {
            message = message.attribute(1, &octets(ip).1);
        }
        if let Some(ip) = route.gateway {
            message = message.attribute(5, &octets(ip).1);
        }
        self.ask(&message.attribute(4, &route.index.to_ne_bytes())).map(drop)
    }

    /// Hands every packet that arrives at one interface out of another, unseen by anyone.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn redirect(&mut self, from: i32, to: i32) -> io::Result<()> {
        let discard =
            Message::new(DELQDISC, REQUEST | ACK).raw(&traffic(from, INGRESS_HANDLE, INGRESS, 0));
        // Whatever a former redirection left; usually there is nothing.
        drop(self.ask(&discard));
        let qdisc = Message::new(NEWQDISC, REQUEST | ACK | CREATE)
            .raw(&traffic(from, INGRESS_HANDLE, INGRESS, 0))
            .attribute(1, &terminated("ingress"));
        self.ask(&qdisc)?;
        let info = (1u32 << 16) | u32::from(ETH_P_ALL.to_be());
        let filter = Message::new(NEWTFILTER, REQUEST | ACK | CREATE)
            .raw(&traffic(from, 0, INGRESS_HANDLE, info))
            .attribute(1, &terminated("u32"))
            .attribute(2, &match_all_and_redirect(to));
        self.ask(&filter).map(drop)
    }

    /// Sends a request and collects the bodies of the answers.
    fn ask(&mut self, message: &Message) -> io::Result<Vec<Vec<u8>>> {
        self.sequence += 1;
        let bytes = message.finish(self.sequence);
        sendto(self.socket.as_raw_fd(), &bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut answers = Vec::new();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some((kind, sequence, body, after)) = split(rest) {
                rest = after;
                match kind {
                    _ if sequence != self.sequence => {}
                    DONE => return Ok(answers),
                    ERROR => {
                        let code = body.first_chunk::<4>().copied().unwrap_or_default();
                        return match i32::from_ne_bytes(code) {
                            0 => Ok(answers),
                            code => Err(io::Error::from_raw_os_error(-code)),
                        };
                    }
                    _ => answers.push(body.to_vec()),
                }
            }
        }
    }
}

/// `struct ifinfomsg`.
fn link_header(index: i32, flags: u32, change: u32) -> Vec<u8> {
    let mut header = vec![UNSPEC, 0, 0, 0];
    header.extend_from_slice(&index.to_ne_bytes());
    header.extend_from_slice(&flags.to_ne_bytes());
    header.extend_from_slice(&change.to_ne_bytes());
    header
}

/// `struct tcmsg`.
fn traffic(index: i32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let mut header = vec![UNSPEC, 0, 0, 0];
    header.extend_from_slice(&index.to_ne_bytes());
    for word in [handle, parent, info] {
        header.extend_from_slice(&word.to_ne_bytes());
    }
    header
}

/// The options of a u32 filter whose one key matches everything, and whose action is to
/// redirect (`struct tc_u32_sel`, `struct tc_mirred`).
fn match_all_and_redirect(to: i32) -> Vec<u8> {
    const TERMINAL: u8 = 1;
    const STOLEN: i32 = 4;
    const EGRESS_REDIRECT: i32 = 1;
    let mut selector = vec![TERMINAL, 0, 1, 0];
    selector.extend_from_slice(&[0; 12]);
    selector.extend_from_slice(&[0; 16]);
    let mut mirred = Vec::new();
    for word in [0, 0, STOLEN, 0, 0, EGRESS_REDIRECT, to] {
        mirred.extend_from_slice(&word.to_ne_bytes());
    }
    let options = attribute(2, &mirred);
    let action = [attribute(1, &terminated("mirred")), attribute(2, &options)].concat();
    let actions = attribute(1, &action);
    [attribute(5, &selector), attribute(7, &actions)].concat()
}

fn terminated(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

fn octets(ip: IpAddr) -> (u8, Vec<u8>) {
    match ip {
        IpAddr::V4(ip) => (INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (INET6, ip.octets().to_vec()),
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(v4));
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

/// A request under construction.
struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        Self { kind, flags, body: Vec::new() }
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.body.extend_from_slice(bytes);
        self
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.body.extend_from_slice(&attribute(kind, value));
        self
    }

    fn finish(&self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(16 + self.body.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(16 + self.body.len());
        bytes.extend_from_slice(&length.to_ne_bytes());
        bytes.extend_from_slice(&self.kind.to_ne_bytes());
        bytes.extend_from_slice(&self.flags.to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&0u32.to_ne_bytes());
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// An attribute, padded to four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::with_capacity(8 + value.len());
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The first message: its kind, sequence and body, and what follows.
fn split(bytes: &[u8]) -> Option<(u16, u32, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let sequence = u32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
    let body = bytes.get(16..length)?;
    let after = bytes.get(length.next_multiple_of(4).min(bytes.len())..)?;
    Some((kind, sequence, body, after))
}

/// The attributes behind a header of `skip` bytes.
fn attributes(body: &[u8], skip: usize) -> Vec<(u16, &[u8])> {
    let mut list = Vec::new();
    let mut rest = body.get(skip..).unwrap_or_default();
    while let (Some(length), Some(kind)) = (rest.get(..2), rest.get(2..4)) {
        let short = |bytes: &[u8]| bytes.try_into().map(u16::from_ne_bytes).unwrap_or_default();
        let (length, kind) = (usize::from(short(length)), short(kind) & 0x3fff);
        let Some(value) = rest.get(4..length) else { break };
        list.push((kind, value));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    list
}

fn number(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(value.get(..4)?.try_into().ok()?))
}

fn index(bytes: &[u8]) -> Option<i32> {
    Some(i32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

fn link(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: index(body.get(4..)?)?,
        name: String::new(),
        mac: Vec::new(),
        mtu: 0,
        up: number(body.get(8..)?)? & IFF_UP != 0,
    };
    for (kind, value) in attributes(body, 16) {
        match kind {
            1 => link.mac = value.to_vec(),
            3 => link.name = String::from_utf8_lossy(value).trim_end_matches('\0').to_owned(),
            4 => link.mtu = number(value)?,
            _ => {}
        }
    }
    Some(link)
}

fn address(body: &[u8]) -> Option<Address> {
    let (prefix, scope) = (*body.get(1)?, *body.get(3)?);
    let index = index(body.get(4..)?)?;
    let list = attributes(body, 8);
    // IFA_LOCAL is the own address where IFA_ADDRESS is the peer's.
    let value = |wanted| list.iter().find(|(kind, _)| *kind == wanted).map(|(_, value)| *value);
    let ip = ip(value(2).or_else(|| value(1))?)?;
    Some(Address { index, ip, prefix, scope })
}

fn route(body: &[u8]) -> Option<Route> {
    const UNICAST: u8 = 1;
    const MAIN: u32 = 254;
    let list = attributes(body, 12);
    let value = |wanted| list.iter().find(|(kind, _)| *kind == wanted).map(|(_, value)| *value);
    let table =
        value(15).and_then(number).unwrap_or_else(|| body.get(4).map_or(0, |t| u32::from(*t)));
    if *body.get(7)? != UNICAST || table != MAIN {
        return None;
    }
    Some(Route {
        index: index(value(4)?)?,
        destination: value(1).and_then(ip),
        prefix: *body.get(1)?,
        gateway: value(5).and_then(ip),
        scope: *body.get(6)?,
        protocol: *body.get(5)?,
        v6: *body.first()? == INET6,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_loopback_interface_of_this_machine_is_read() {
        let mut netlink = Netlink::open().unwrap();
        let links = netlink.links().unwrap();
        let loopback = links.iter().find(|link| link.name == "lo").unwrap();
        assert!(loopback.mtu >= 65536 - 1, "{loopback:?}");
        let addresses = netlink.addresses().unwrap();
        assert!(addresses.iter().any(|a| a.index == loopback.index && a.ip.is_loopback()));
        netlink.routes().unwrap();
    }

    #[test]
    fn what_the_kernel_refuses_is_its_errno() {
        let mut netlink = Netlink::open().unwrap();
        let error = netlink.set_link(i32::MAX, None, Some(1500)).unwrap_err();
        assert!(matches!(error.raw_os_error(), Some(19 | 1)), "{error}");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_read_without_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..256),
        ) {
            let _ = (link(&bytes), address(&bytes), route(&bytes), split(&bytes));
        }
    }
}
