//! Links, addresses and routes (rtnetlink(7), `linux/if_link.h`, `linux/if_addr.h`).

use super::{Attributes, Message, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, Socket, number};
use crate::cni::IpNet;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

pub(crate) const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
pub(crate) const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
pub(crate) const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
pub(crate) const RTM_GETROUTE: u16 = 26;

pub(crate) const AF_INET: u8 = 2;
const AF_BRIDGE: u8 = 7;
pub(crate) const AF_INET6: u8 = 10;

/// Length of `struct ifinfomsg`.
pub(crate) const LINK: usize = 16;
/// Length of `struct ifaddrmsg`.
pub(crate) const ADDRESS: usize = 8;
/// Length of `struct rtmsg`.
pub(crate) const ROUTE: usize = 12;

pub(crate) const IFF_UP: u32 = 1;
pub(crate) const IFF_PROMISC: u32 = 0x100;

const IFLA_ADDRESS: u16 = 1;
pub(crate) const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_PROTINFO: u16 = 12;
const IFLA_OPERSTATE: u16 = 16;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFLA_BRPORT_MODE: u16 = 4;
const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;
const OPERSTATE_UP: u8 = 6;

pub(crate) const IFA_ADDRESS: u16 = 1;
pub(crate) const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
pub(crate) const IFA_FLAGS: u16 = 8;
pub(crate) const IFA_F_DADFAILED: u32 = 0x08;
pub(crate) const IFA_F_TENTATIVE: u32 = 0x40;

pub(crate) const RTA_DST: u16 = 1;
pub(crate) const RTA_OIF: u16 = 4;
pub(crate) const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
pub(crate) const RTA_TABLE: u16 = 15;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;

/// How the kernel says that there is no such link.
const ENODEV: i32 = nix::Error::ENODEV as i32;

/// A link as the kernel describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// Hardware address.
    pub(crate) mac: Vec<u8>,
    /// `veth`, `bridge`; empty for hardware.
    pub(crate) kind: String,
    pub(crate) mtu: u32,
    /// `IFF_*`
    pub(crate) flags: u32,
    /// Index of the bridge or bond it is a port of; 0 for none.
    pub(crate) master: u32,
    /// Index of the other end or of the link below; 0 for none.
    pub(crate) peer: u32,
    /// Whether `peer` is in another network namespace.
    pub(crate) peer_elsewhere: bool,
    /// Whether packets pass (RFC 2863).
    pub(crate) operational: bool,
}

impl Link {
    /// The hardware address as people write it.
    pub(crate) fn mac_text(&self) -> String {
        self.mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
    }

    pub(crate) fn parse(body: &[u8]) -> Self {
        let attributes = Attributes::after(body, LINK);
        let field = |at: usize| number(body.get(at..).unwrap_or_default());
        Self {
            index: field(4),
            flags: field(8),
            name: attributes.text(IFLA_IFNAME).unwrap_or_default(),
            mac: attributes.get(IFLA_ADDRESS).unwrap_or_default().to_vec(),
            kind: attributes.nested(IFLA_LINKINFO).text(IFLA_INFO_KIND).unwrap_or_default(),
            mtu: attributes.number(IFLA_MTU).unwrap_or_default(),
            master: attributes.number(IFLA_MASTER).unwrap_or_default(),
            peer: attributes.number(IFLA_LINK).unwrap_or_default(),
            peer_elsewhere: attributes.get(IFLA_LINK_NETNSID).is_some(),
            operational: attributes.get(IFLA_OPERSTATE) == Some(&[OPERSTATE_UP]),
        }
    }
}

/// `struct ifinfomsg`
fn link_header(family: u8, index: u32, flags: u32, change: u32) -> Vec<u8> {
    let mut bytes = vec![family, 0, 0, 0];
    bytes.extend(index.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(change.to_ne_bytes());
    bytes
}

/// `struct ifaddrmsg`
fn address_header(family: u8, prefix: u8, index: u32) -> Vec<u8> {
    let mut bytes = vec![family, prefix, 0, 0];
    bytes.extend(index.to_ne_bytes());
    bytes
}

/// AF_INET or AF_INET6.
pub(crate) fn family(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { AF_INET } else { AF_INET6 }
}

/// The bytes of an address in network order.
pub(crate) fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// An address from its bytes in network order.
pub(crate) fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_longer| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// A veth pair to be made: one end here, the other in a pod.
#[derive(Debug, Clone, Copy)]
pub(crate) struct VethPair<'a> {
    pub(crate) host: &'a str,
    pub(crate) pod: &'a str,
    pub(crate) namespace: BorrowedFd<'a>,
    /// 0 for the kernel's default.
    pub(crate) mtu: u32,
    /// Index of the bridge that the end here becomes a port of; 0 for none.
    pub(crate) master: u32,
}

/// A route to be added.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewRoute {
    pub(crate) to: IpNet,
    pub(crate) gateway: Option<IpAddr>,
    pub(crate) source: Option<IpAddr>,
    pub(crate) link: u32,
    /// `RT_SCOPE_*`
    pub(crate) scope: u8,
}

impl Socket {
    /// The link of this name, if there is one.
    pub(crate) fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        let request = Message::new(RTM_GETLINK).raw(&link_header(0, 0, 0, 0));
        self.one_link(request.text(IFLA_IFNAME, name))
    }

    /// The link with this index, if there is one.
    pub(crate) fn link_by_index(&mut self, index: u32) -> io::Result<Option<Link>> {
        self.one_link(Message::new(RTM_GETLINK).raw(&link_header(0, index, 0, 0)))
    }

    fn one_link(&mut self, request: Message) -> io::Result<Option<Link>> {
        match self.get(request.number(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)) {
            Ok(answer) => Ok(Some(Link::parse(&answer.body))),
            Err(error) if error.raw_os_error() == Some(ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All links.
    pub(crate) fn links(&mut self) -> io::Result<Vec<Link>> {
        let request = Message::new(RTM_GETLINK)
            .raw(&link_header(0, 0, 0, 0))
            .number(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
        Ok(self.dump(&request)?.iter().map(|answer| Link::parse(&answer.body)).collect())
    }

    /// Makes a bridge. EEXIST if there is a link of that name.
    pub(crate) fn create_bridge(&mut self, name: &str, mtu: u32) -> io::Result<()> {
        let mut request = Message::new(RTM_NEWLINK)
            .flags(NLM_F_CREATE | NLM_F_EXCL)
            .raw(&link_header(0, 0, 0, 0))
            .text(IFLA_IFNAME, name);
        if mtu != 0 {
            request = request.number(IFLA_MTU, mtu);
        }
        self.request(request.nest(IFLA_LINKINFO, |info| info.text(IFLA_INFO_KIND, "bridge")))
    }

    /// Makes a veth pair with both ends in their places; the one here is up. The other is
    /// down, because its settings must be there before.
    pub(crate) fn create_veth(&mut self, pair: VethPair<'_>) -> io::Result<()> {
        let namespace = u32::try_from(pair.namespace.as_raw_fd()).map_err(io::Error::other)?;
        let mtu = |message: Message| {
            if pair.mtu == 0 { message } else { message.number(IFLA_MTU, pair.mtu) }
        };
        let mut request = mtu(Message::new(RTM_NEWLINK)
            .flags(NLM_F_CREATE | NLM_F_EXCL)
            .raw(&link_header(0, 0, IFF_UP, IFF_UP))
            .text(IFLA_IFNAME, pair.host));
        if pair.master != 0 {
            request = request.number(IFLA_MASTER, pair.master);
        }
        let peer = |data: Message| {
            data.nest(VETH_INFO_PEER, |peer| {
                let peer = peer.raw(&link_header(0, 0, 0, 0)).text(IFLA_IFNAME, pair.pod);
                mtu(peer).number(IFLA_NET_NS_FD, namespace)
            })
        };
        self.request(request.nest(IFLA_LINKINFO, |info| {
            info.text(IFLA_INFO_KIND, "veth").nest(IFLA_INFO_DATA, peer)
        }))
    }

    /// Sets or clears `IFF_*` flags.
    pub(crate) fn set_flags(&mut self, index: u32, flags: u32, change: u32) -> io::Result<()> {
        self.request(Message::new(RTM_NEWLINK).raw(&link_header(0, index, flags, change)))
    }

    /// Sets IFF_UP.
    pub(crate) fn set_up(&mut self, index: u32) -> io::Result<()> {
        self.set_flags(index, IFF_UP, IFF_UP)
    }

    /// Clears IFF_UP.
    pub(crate) fn set_down(&mut self, index: u32) -> io::Result<()> {
        self.set_flags(index, 0, IFF_UP)
    }

    /// Sets a hardware address; a bridge keeps it from then on.
    pub(crate) fn set_mac(&mut self, index: u32, mac: &[u8]) -> io::Result<()> {
        let request = Message::new(RTM_NEWLINK).raw(&link_header(0, index, 0, 0));
        self.request(request.attribute(IFLA_ADDRESS, mac))
    }

    /// Lets a bridge port send packets back out of the port they came in by.
    pub(crate) fn set_hairpin(&mut self, index: u32) -> io::Result<()> {
        let request = Message::new(RTM_SETLINK).raw(&link_header(AF_BRIDGE, index, 0, 0));
        self.request(request.nest(IFLA_PROTINFO, |port| port.attribute(IFLA_BRPORT_MODE, &[1])))
    }

    /// Deletes a link, and with it the other end of a veth pair.
    pub(crate) fn delete_link(&mut self, index: u32) -> io::Result<()> {
        self.request(Message::new(RTM_DELLINK).raw(&link_header(0, index, 0, 0)))
    }

    /// Waits until packets pass a link; false if they do not within `limit`. `events` is a
    /// socket that hears link events and was opened before what is waited for began.
    pub(crate) fn await_operational(
        &mut self,
        events: &mut Self,
        index: u32,
        limit: Duration,
    ) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        loop {
            match self.link_by_index(index)? {
                Some(link) if link.operational => return Ok(true),
                Some(_) => {}
                None => return Err(io::Error::from_raw_os_error(ENODEV)),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            // Any event is a reason to look again; so is a while without any.
            events.events(left.min(Duration::from_millis(50)))?;
        }
    }

    /// Addresses of a link with their `IFA_F_*` flags.
    pub(crate) fn addresses(&mut self, index: u32) -> io::Result<Vec<(IpNet, u32)>> {
        let request = Message::new(RTM_GETADDR).raw(&address_header(0, 0, index));
        let answers = self.dump(&request)?;
        Ok(answers
            .iter()
            .filter(|answer| number(answer.body.get(4..).unwrap_or_default()) == index)
            .filter_map(|answer| parse_address(&answer.body))
            .collect())
    }

    /// Adds an address, with the broadcast address that IPv4 networks have.
    pub(crate) fn add_address(&mut self, index: u32, net: IpNet) -> io::Result<()> {
        let bytes = octets(net.ip);
        let mut request = Message::new(RTM_NEWADDR)
            .flags(NLM_F_CREATE | NLM_F_EXCL)
            .raw(&address_header(family(net.ip), net.prefix, index))
            .attribute(IFA_LOCAL, &bytes)
            .attribute(IFA_ADDRESS, &bytes);
        if let Some(broadcast) = net.broadcast() {
            request = request.attribute(IFA_BROADCAST, &octets(broadcast));
        }
        self.request(request)
    }

    /// Deletes an address.
    pub(crate) fn delete_address(&mut self, index: u32, net: IpNet) -> io::Result<()> {
        let request = Message::new(RTM_DELADDR)
            .raw(&address_header(family(net.ip), net.prefix, index))
            .attribute(IFA_LOCAL, &octets(net.ip));
        self.request(request)
    }

    /// Adds a route to the main table.
    pub(crate) fn add_route(&mut self, route: NewRoute) -> io::Result<()> {
        let request = Message::new(RTM_NEWROUTE).flags(NLM_F_CREATE | NLM_F_APPEND);
        self.request(route_request(request, route, RTN_UNICAST, RTPROT_BOOT))
    }

    /// Deletes a route of the main table, whatever its scope.
    pub(crate) fn delete_route(&mut self, to: IpNet, link: u32) -> io::Result<()> {
        const RT_SCOPE_NOWHERE: u8 = 255;
        let route = NewRoute { to, gateway: None, source: None, link, scope: RT_SCOPE_NOWHERE };
        self.request(route_request(Message::new(RTM_DELROUTE), route, 0, 0))
    }

    /// Index of the link by which packets to an address leave.
    pub(crate) fn link_towards(&mut self, ip: IpAddr) -> io::Result<Option<u32>> {
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        let request = Message::new(RTM_GETROUTE)
            .raw(&[family(ip), bits, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
            .attribute(RTA_DST, &octets(ip));
        let answer = self.get(request)?;
        Ok(Attributes::after(&answer.body, ROUTE).number(RTA_OIF))
    }
}

fn route_request(request: Message, route: NewRoute, kind: u8, protocol: u8) -> Message {
    let NewRoute { to, gateway, source, link, scope } = route;
    let family = family(to.ip);
    let mut request = request
        .raw(&[family, to.prefix, 0, 0, RT_TABLE_MAIN, protocol, scope, kind, 0, 0, 0, 0])
        .attribute(RTA_DST, &octets(to.ip));
    if let Some(gateway) = gateway {
        request = request.attribute(RTA_GATEWAY, &octets(gateway));
    }
    if let Some(source) = source {
        request = request.attribute(RTA_PREFSRC, &octets(source));
    }
    request.number(RTA_OIF, link)
}

/// Address, prefix and flags of a `RTM_NEWADDR` message.
pub(crate) fn parse_address(body: &[u8]) -> Option<(IpNet, u32)> {
    let attributes = Attributes::after(body, ADDRESS);
    let bytes = attributes.get(IFA_LOCAL).or_else(|| attributes.get(IFA_ADDRESS))?;
    let flags = attributes.number(IFA_FLAGS).unwrap_or_default();
    Some((IpNet { ip: address(bytes)?, prefix: *body.get(1)? }, flags))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_the_kernel_s_lengths() {
        assert_eq!(link_header(0, 1, 2, 3).len(), LINK);
        assert_eq!(address_header(2, 24, 1).len(), ADDRESS);
    }

    #[test]
    fn addresses_survive_bytes() {
        for text in ["10.1.2.3", "fd00::9"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(address(&octets(ip)), Some(ip));
        }
        assert_eq!(address(&[1, 2, 3]), None);
    }

    #[test]
    fn lo_is_there_and_nothing_else_by_that_name() {
        let mut socket = Socket::route().unwrap();
        let lo = socket.link("lo").unwrap().unwrap();
        assert_eq!((lo.index, lo.name.as_str()), (1, "lo"));
        assert_eq!(socket.link_by_index(1).unwrap().unwrap().name, "lo");
        assert!(socket.link("no-such-link").unwrap().is_none());
        assert!(socket.links().unwrap().iter().any(|link| link.name == "lo"));
    }
}
