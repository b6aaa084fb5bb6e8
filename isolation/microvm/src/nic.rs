//! Carrying the interfaces of a network namespace into a guest.
//!
//! ```text
//!   network ◀──▶ eth0 ◀── redirect ──▶ pinion0 (tap) ◀── descriptor ──▶ guest's eth0
//!                └─────── pod's namespace ─────────┘        same MAC, MTU, addresses, routes
//! ```
//!
//! The interface keeps its addresses, so whoever gave them finds them as they were; its
//! packets are redirected before the host's network stack looks at them. Names, addresses and
//! routes are read from the kernel, so it does not matter who put them there.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sched::{CloneFlags, setns};

use crate::error::{Context, Error, Result};
use crate::netlink::{Address, Link, Netlink, Route};

/// Most interfaces of one guest.
const MOST: usize = 8;

/// An interface as the guest is to have it, and the host's end of it.
#[derive(Debug)]
pub struct Carried {
    /// The open tap device.
    pub tap: OwnedFd,
    /// Name, MAC and MTU of the interface that was carried.
    pub link: Link,
    /// Its addresses, those the kernel makes by itself left out.
    pub addresses: Vec<Address>,
    /// Its routes, likewise.
    pub routes: Vec<Route>,
}

/// Carries every interface of `namespace` that is not the loopback. Enters the namespace and
/// comes back: not for a process with other threads that use the network.
///
/// # Errors
/// When the namespace cannot be entered or left, or the kernel lacks tap devices or
/// redirection.
pub fn carry(namespace: &Path) -> Result<Vec<Carried>> {
    let home = File::open("/proc/self/ns/net").context(|| "open /proc/self/ns/net".into())?;
    let there = File::open(namespace).context(|| format!("open {}", namespace.display()))?;
    setns(&there, CloneFlags::CLONE_NEWNET).context(|| format!("enter {}", namespace.display()))?;
    let carried = carry_here();
    setns(&home, CloneFlags::CLONE_NEWNET).context(|| "leave the pod's network".into())?;
    carried
}

fn carry_here() -> Result<Vec<Carried>> {
    let mut netlink = Netlink::open().context(|| "open a netlink socket".into())?;
    let links = netlink.links().context(|| "list interfaces".into())?;
    let addresses = netlink.addresses().context(|| "list addresses".into())?;
    let routes = netlink.routes().context(|| "list routes".into())?;
    // Tunnel templates that the kernel puts into every namespace have no Ethernet address.
    let wanted: Vec<Link> =
        links.into_iter().filter(|l| l.mac.len() == 6 && l.name != "lo" && l.up).collect();
    if wanted.len() > MOST {
        let count = wanted.len();
        return Err(Error::Refused(format!("{count} interfaces; a guest can have {MOST}")));
    }
    let mut carried = Vec::new();
    for (number, link) in wanted.into_iter().enumerate() {
        let name = format!("pinion{number}");
        let tap = pinion_sys::tap::open(&name).context(|| format!("open tap device {name}"))?;
        let peer = netlink
            .links()
            .context(|| "list interfaces".into())?
            .into_iter()
            .find(|found| found.name == name)
            .ok_or_else(|| Error::Missing(format!("tap device {name} has no interface")))?;
        netlink
            .set_link(peer.index, None, Some(link.mtu))
            .context(|| format!("bring up {name} with MTU {}", link.mtu))?;
        for (from, to) in [(&link, &peer), (&peer, &link)] {
            netlink
                .redirect(from.index, to.index)
                .context(|| format!("redirect {} to {}", from.name, to.name))?;
        }
        let index = link.index;
        let own =
            addresses.iter().filter(|address| address.index == index && !is_automatic(address));
        let through = routes.iter().filter(|route| route.index == index && route.protocol != 2);
        carried.push(Carried {
            tap,
            addresses: own.cloned().collect(),
            routes: through.cloned().collect(),
            link,
        });
    }
    Ok(carried)
}

/// Whether the guest's kernel makes this address by itself.
fn is_automatic(address: &Address) -> bool {
    const LINK_SCOPE: u8 = 253;
    address.ip.is_ipv6() && address.scope == LINK_SCOPE
}
