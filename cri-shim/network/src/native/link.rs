//! The pod's interface and what it hangs on: `bridge` and `ptp` without their processes.
//!
//! ```text
//!   node                                     pod
//!   bridge (gateway address, kept) ─ veth… ═══ eth0 (address, routes)      bridge
//!   veth… (gateway/32, route to the pod) ═════ eth0 (address, routes)      ptp
//! ```
//!
//! The name of the node's end follows from network and pod, so that what a crash has left is
//! recognised by the next ADD or DEL even after the pod's namespace is gone.

use super::config::{Bridge, RouteKeys};
use super::host_local::Lease;
use super::{Failed, Step, sysctl};
use crate::cni::{IpNet, Route, next_ip};
use crate::namespaces;
use crate::netlink::Socket;
use crate::netlink::route::{
    self, IFA_F_DADFAILED, IFA_F_TENTATIVE, IFF_PROMISC, NewRoute, VethPair,
};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How long a bridge port may take until packets pass, and addresses until they are settled.
const SETTLE: Duration = Duration::from_secs(5);
const SCOPE_UNIVERSE: u8 = 0;
const SCOPE_LINK: u8 = 253;
const SCOPE_HOST: u8 = 254;

/// An address of the pod as the result states it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) net: IpNet,
    pub(crate) gateway: Option<IpAddr>,
}

/// Name of the node's end of a pod's pair.
pub(crate) fn host_name(network: &str, pod: &str, interface: &str) -> String {
    let hash = Sha256::digest(format!("{network}\0{pod}\0{interface}"));
    let mut name = "veth".to_owned();
    name.extend(hash.iter().take(4).map(|byte| format!("{byte:02x}")));
    name
}

/// What bridges make of leases: a gateway where none is said, and a default route if asked.
pub(crate) fn bridge_addresses(
    bridge: &Bridge,
    leases: &[Lease],
    routes: &[RouteKeys],
) -> (Vec<Address>, Vec<Route>) {
    let mut all: Vec<_> = routes.iter().map(|r| Route { dst: r.dst, gw: r.gw }).collect();
    let addresses: Vec<_> =
        leases.iter().map(|l| Address { net: l.address, gateway: Some(l.gateway) }).collect();
    for v4 in [true, false] {
        let Some(first) = addresses.iter().find(|address| address.net.is_ipv4() == v4) else {
            continue;
        };
        let everywhere = everywhere(v4);
        let has = all.iter().any(|route| route.dst == everywhere && route.gw.is_some());
        if bridge.is_default_gateway && !has {
            all.push(Route { dst: everywhere, gw: first.gateway });
        }
    }
    (addresses, all)
}

fn everywhere(v4: bool) -> IpNet {
    let ip = if v4 { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    IpNet { ip, prefix: 0 }
}

/// The bridge, made if it is missing, up.
pub(crate) fn ensure_bridge(
    host: &mut Socket,
    bridge: &Bridge,
    mtu: u32,
) -> Result<route::Link, Failed> {
    let name = &bridge.name;
    let step = |what: &str| format!("{what} bridge {name}");
    let found = host.link(name).step(|| step("look up"))?;
    let made = found.is_none();
    if made {
        match host.create_bridge(name, mtu) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            outcome => outcome.step(|| step("make"))?,
        }
    }
    let link = match found {
        Some(link) => link,
        None => host
            .link(name)
            .and_then(|link| link.ok_or_else(|| io::Error::other("it has gone again")))
            .step(|| step("look up"))?,
    };
    if link.kind != "bridge" {
        let error = io::Error::other(format!("{name:?} already exists but is not a bridge"));
        return Err(error).step(|| step("use"));
    }
    if bridge.promiscuous && link.flags & IFF_PROMISC == 0 {
        host.set_flags(link.index, IFF_PROMISC, IFF_PROMISC)
            .step(|| step("set promiscuous mode on"))?;
    }
    if made {
        sysctl::try_write("ipv6", name, "accept_ra", "0");
    }
    if link.flags & route::IFF_UP == 0 {
        host.set_up(link.index).step(|| step("bring up"))?;
    }
    Ok(link)
}

/// Makes the pair. What an interrupted ADD or a DEL of this very pod has left is in the way
/// at most, and is removed.
pub(crate) fn make_pair(host: &mut Socket, pair: VethPair<'_>) -> Result<route::Link, Failed> {
    let step = || format!("make veth pair {} and {}", pair.host, pair.pod);
    match host.create_veth(pair) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let stale = host.link(pair.host).step(step)?.filter(|link| link.kind == "veth");
            let Some(stale) = stale else {
                let why = format!("the pod has an interface {:?} already", pair.pod);
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, why)).step(step);
            };
            host.delete_link(stale.index).step(|| format!("delete stale link {}", pair.host))?;
            host.create_veth(pair).step(step)?;
        }
        outcome => outcome.step(step)?,
    }
    sysctl::try_write("ipv6", pair.host, "accept_ra", "0");
    let link = host.link(pair.host).step(step)?;
    link.ok_or_else(|| io::Error::other("it has gone again")).step(step)
}

/// Gives the bridge the pods' gateway address and keeps its hardware address from changing.
pub(crate) fn ensure_gateway(
    host: &mut Socket,
    bridge: &Bridge,
    index: u32,
    gateway: IpNet,
) -> Result<(), Failed> {
    let name = &bridge.name;
    let step = || format!("give bridge {name} the address {gateway}");
    for (there, _) in host.addresses(index).step(step)? {
        if there == gateway {
            return Ok(());
        }
        let same_family = there.is_ipv4() == gateway.is_ipv4();
        let overlap = there.contains(gateway.ip) || gateway.contains(there.ip);
        if !same_family || !(gateway.is_ipv4() || overlap) {
            continue;
        }
        if !bridge.force_address {
            let why = format!("{name:?} already has an IP address different from {gateway}");
            return Err(io::Error::other(why)).step(step);
        }
        host.delete_address(index, there).step(|| format!("delete {there} from {name}"))?;
    }
    match host.add_address(index, gateway) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        outcome => outcome.step(step)?,
    }
    // Else the bridge takes the lowest address of its ports, anew with each pod.
    let link = host.link_by_index(index).step(step)?;
    let mac = link.map(|link| link.mac).unwrap_or_default();
    host.set_mac(index, &mac).step(|| format!("fix the hardware address of {name}"))
}

/// The address the bridge has in the pods' network.
pub(crate) fn gateway_of(address: Address) -> IpNet {
    let ip = address.gateway.unwrap_or_else(|| next_ip(address.net.network().ip));
    IpNet { ip, prefix: address.net.prefix }
}

/// What is done to the pod's end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PodSide<'a> {
    pub(crate) interface: &'a str,
    pub(crate) addresses: &'a [Address],
    pub(crate) routes: &'a [Route],
    /// IPv6 duplicate address detection; `None`: the kernel's default (ptp).
    pub(crate) detection: Option<bool>,
    pub(crate) point_to_point: bool,
}

/// Addresses and routes inside the pod; the link as it is then.
pub(crate) fn configure_pod(netns: &File, pod: PodSide<'_>) -> Result<route::Link, Failed> {
    let mut failed = None;
    let link = namespaces::within(netns.as_fd(), || {
        let outcome = Socket::route().step(|| "open netlink in the pod".to_owned());
        match outcome.and_then(|mut socket| configure(&mut socket, pod)) {
            Ok(link) => Ok(Some(link)),
            Err(error) => {
                failed = Some(error);
                Ok(None)
            }
        }
    });
    match (failed, link) {
        (Some(failed), _) => Err(failed),
        (None, link) => link
            .and_then(|link| link.ok_or_else(|| io::Error::other("no link")))
            .step(|| "enter the pod's network namespace".to_owned()),
    }
}

fn configure(socket: &mut Socket, pod: PodSide<'_>) -> Result<route::Link, Failed> {
    let name = pod.interface;
    let found = socket.link(name).step(|| format!("look up {name}"))?;
    let link = found.ok_or_else(|| io::Error::other("not there")).step(|| format!("use {name}"))?;
    if let Some(detection) = pod.detection {
        if detection {
            sysctl::try_write("ipv6", name, "enhanced_dad", "1");
        }
        sysctl::try_write("ipv6", name, "accept_dad", if detection { "1" } else { "0" });
        sysctl::try_write("ipv4", name, "arp_notify", "1");
    }
    let v6 = pod.addresses.iter().any(|address| !address.net.is_ipv4());
    if v6 {
        for link in ["lo", name] {
            sysctl::ensure("ipv6", link, "disable_ipv6", "0")
                .step(|| format!("switch IPv6 on for {link}"))?;
        }
        sysctl::write("ipv6", name, "keep_addr_on_down", "1")
            .step(|| format!("keep IPv6 addresses of {name}"))?;
    }
    for address in pod.addresses {
        let net = address.net;
        socket.add_address(link.index, net).step(|| format!("give {name} the address {net}"))?;
    }
    socket.set_up(link.index).step(|| format!("bring up {name}"))?;
    if v6 {
        settle(socket, link.index).step(|| format!("settle the IPv6 addresses of {name}"))?;
    }
    let gateway = |v4: bool| {
        let own = pod.addresses.iter().find(|address| address.net.is_ipv4() == v4);
        own.and_then(|address| address.gateway)
    };
    for route in pod.routes {
        let new = NewRoute {
            to: route.dst,
            gateway: route.gw.or_else(|| gateway(route.dst.is_ipv4())),
            source: None,
            link: link.index,
            scope: SCOPE_UNIVERSE,
        };
        socket.add_route(new).step(|| format!("add route {} to {name}", route.dst))?;
    }
    if pod.point_to_point {
        for address in pod.addresses {
            route_through_gateway(socket, link.index, *address)
                .step(|| format!("route {} through its gateway", address.net.network()))?;
        }
    }
    Ok(link)
}

/// All of the pod's network is reached by its gateway, and only that directly.
fn route_through_gateway(socket: &mut Socket, link: u32, address: Address) -> io::Result<()> {
    let network = address.net.network();
    let Some(gateway) = address.gateway else { return Ok(()) };
    socket.delete_route(network, link)?;
    let source = Some(address.net.ip);
    let to = single(gateway);
    socket.add_route(NewRoute { to, gateway: None, source, link, scope: SCOPE_LINK })?;
    let gateway = Some(gateway);
    socket.add_route(NewRoute { to: network, gateway, source, link, scope: SCOPE_UNIVERSE })
}

/// The network that has nothing but this address.
pub(crate) fn single(ip: IpAddr) -> IpNet {
    IpNet { ip, prefix: if ip.is_ipv4() { 32 } else { 128 } }
}

/// The node's end of a point-to-point pair: the gateway's address, and the way to the pod.
pub(crate) fn configure_host_end(
    host: &mut Socket,
    link: u32,
    addresses: &[Address],
) -> Result<(), Failed> {
    for address in addresses {
        let Some(gateway) = address.gateway else { continue };
        let step = || format!("give the node's end the address {gateway}");
        host.add_address(link, single(gateway)).step(step)?;
        let to = single(address.net.ip);
        let route = NewRoute { to, gateway: None, source: None, link, scope: SCOPE_HOST };
        match host.add_route(route) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            outcome => outcome.step(|| format!("route {} to the pod", to.ip))?,
        }
    }
    Ok(())
}

/// Waits for IPv6 addresses to be usable: without detection that is at once, but not yet when
/// the kernel has answered.
fn settle(socket: &mut Socket, link: u32) -> io::Result<()> {
    let deadline = Instant::now() + SETTLE;
    let mut pause = Duration::from_micros(200);
    loop {
        let mut tentative = false;
        for (net, flags) in socket.addresses(link)? {
            if flags & IFA_F_DADFAILED != 0 {
                return Err(io::Error::other(format!("{net} is in use by another machine")));
            }
            tentative |= flags & IFA_F_TENTATIVE != 0;
        }
        if !tentative {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "still tentative"));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Takes address and traffic from the pod's end. Deleting the pair is left to the caller, who
/// gets the index of the node's end; 0 if there is none.
pub(crate) fn silence(netns: &File, interface: &str) -> io::Result<u32> {
    namespaces::within(netns.as_fd(), || {
        let mut socket = Socket::route()?;
        let Some(link) = socket.link(interface)? else { return Ok(0) };
        let addresses: Vec<_> =
            socket.addresses(link.index)?.into_iter().map(|(net, _)| net).collect();
        socket.set_down(link.index)?;
        for net in &addresses {
            match socket.delete_address(link.index, *net) {
                // IPv6 addresses may have gone with the link's being up
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
                outcome => outcome?,
            }
        }
        if link.kind == "veth" && link.peer_elsewhere {
            return Ok(link.peer);
        }
        socket.delete_link(link.index)?; // not of our making: nothing else deletes it
        Ok(0)
    })
}

/// Waits until packets pass a bridge port.
pub(crate) fn await_port(
    host: &mut Socket,
    events: &mut Socket,
    link: &route::Link,
) -> Result<(), Failed> {
    let step = || format!("wait for bridge port {}", link.name);
    if host.await_operational(events, link.index, SETTLE).step(step)? {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "bridge port in error state")).step(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(net: &str, gateway: &str) -> Lease {
        Lease { address: net.parse().unwrap(), gateway: gateway.parse().unwrap() }
    }

    fn bridge(is_default_gateway: bool) -> Bridge {
        Bridge {
            name: "br0".to_owned(),
            is_gateway: true,
            is_default_gateway,
            force_address: false,
            hairpin: false,
            promiscuous: false,
            duplicate_detection: false,
        }
    }

    #[test]
    fn a_default_gateway_makes_a_route_per_family_unless_there_is_one() {
        let leases = [lease("10.1.0.5/16", "10.1.0.1"), lease("fd00::5/64", "fd00::1")];
        let routes = |routes: &[RouteKeys]| -> Vec<String> {
            let (_, routes) = bridge_addresses(&bridge(true), &leases, routes);
            routes.iter().map(|r| format!("{} {:?}", r.dst, r.gw)).collect()
        };
        assert_eq!(routes(&[]), ["0.0.0.0/0 Some(10.1.0.1)", "::/0 Some(fd00::1)"]);
        let own =
            RouteKeys { dst: "0.0.0.0/0".parse().unwrap(), gw: Some("10.1.0.9".parse().unwrap()) };
        assert_eq!(routes(&[own]), ["0.0.0.0/0 Some(10.1.0.9)", "::/0 Some(fd00::1)"]);
        assert!(bridge_addresses(&bridge(false), &leases, &[]).1.is_empty());
    }

    #[test]
    fn names_of_pairs_are_links_names_and_follow_from_the_pod() {
        let name = host_name("net", "pod", "eth0");
        assert_eq!(name.len(), 12);
        assert_eq!(name, host_name("net", "pod", "eth0"));
        assert_ne!(name, host_name("net", "pod", "net1"));
    }
}
