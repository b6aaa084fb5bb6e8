//! What there is of the node's network: links, addresses, routes, rules, nf_tables tables.
//!
//! Five dumps, tens of microseconds each on an ordinary node. What changes by itself is left
//! out: counters, carrier, lifetimes, cached routes.

use crate::cni::IpNet;
use crate::netlink::route::{self, IFF_PROMISC, IFF_UP};
use crate::netlink::{Attributes, Message, Socket, nftables, number};
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::IpAddr;

const RTM_GETRULE: u16 = 34;
const RTA_PRIORITY: u16 = 6;
const RTM_F_CLONED: u32 = 0x200;
const RULE_HEADER: usize = 12;
const FRA_PRIORITY: u16 = 6;
const FRA_TABLE: u16 = 15;

/// One thing of the node's network. Two that are equal are the same thing unchanged.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Object {
    Link {
        index: u32,
        name: String,
        kind: String,
        mtu: u32,
        master: u32,
        flags: u32,
    },
    Address {
        link: u32,
        net: (u8, IpAddr),
    },
    Route {
        table: u32,
        to: (u8, IpAddr),
        gateway: Option<IpAddr>,
        link: u32,
        priority: u32,
        kind: u8,
    },
    /// A routing policy rule: family, priority, table, all of its attributes.
    Rule {
        family: u8,
        priority: u32,
        table: u32,
        raw: Vec<u8>,
    },
    Table {
        family: u8,
        name: String,
    },
}

/// All of them, in order, with the names of links.
#[derive(Debug, Clone, Default)]
pub(crate) struct Snapshot {
    objects: Vec<Object>,
    names: BTreeMap<u32, String>,
}

/// A difference of two snapshots.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Change {
    pub(crate) added: bool,
    pub(crate) object: Object,
    /// Name of the link it is about; empty for none.
    pub(crate) link: String,
}

impl Snapshot {
    /// Looks at the calling thread's network namespace. Blocks.
    pub(crate) fn take() -> io::Result<Self> {
        let mut socket = Socket::route()?;
        let links = socket.links()?;
        let names: BTreeMap<_, _> =
            links.iter().map(|link| (link.index, link.name.clone())).collect();
        let mut objects: Vec<_> = links
            .into_iter()
            .map(|link| Object::Link {
                index: link.index,
                name: link.name,
                kind: link.kind,
                mtu: link.mtu,
                master: link.master,
                flags: link.flags & (IFF_UP | IFF_PROMISC),
            })
            .collect();
        let addresses = socket.dump(&Message::new(route::RTM_GETADDR).raw(&[0; 8]))?;
        objects.extend(addresses.iter().filter_map(|answer| address(&answer.body)));
        let routes = socket.dump(&Message::new(route::RTM_GETROUTE).raw(&[0; 12]))?;
        objects.extend(routes.iter().filter_map(|answer| route_of(&answer.body)));
        let rules = socket.dump(&Message::new(RTM_GETRULE).raw(&[0; 12]))?;
        objects.extend(rules.iter().map(|answer| rule(&answer.body)));
        let tables = nftables::tables(&mut Socket::netfilter()?)?;
        objects.extend(tables.into_iter().map(|(family, name)| Object::Table { family, name }));
        // A link made since the links were read is another pod's, or the next look shows it
        // with its name; what it has by now cannot be told apart without.
        objects.retain(|object| match object {
            Object::Address { link, .. } | Object::Route { link, .. } => {
                *link == 0 || names.contains_key(link)
            }
            _ => true,
        });
        objects.sort_unstable();
        objects.dedup();
        Ok(Self { objects, names })
    }

    /// What is in `after` and not here, and the other way round.
    pub(crate) fn changes(&self, after: &Self) -> Vec<Change> {
        let missing = |from: &Self, other: &Self, added: bool| -> Vec<Change> {
            let gone = from.objects.iter().filter(|o| other.objects.binary_search(o).is_err());
            gone.map(|object| Change {
                added,
                link: from.link_of(object).to_owned(),
                object: object.clone(),
            })
            .collect()
        };
        let mut changes = missing(self, after, false);
        changes.extend(missing(after, self, true));
        changes
    }

    fn link_of<'a>(&'a self, object: &'a Object) -> &'a str {
        match object {
            Object::Link { name, .. } => name,
            Object::Address { link, .. } | Object::Route { link, .. } => {
                self.names.get(link).map_or("", String::as_str)
            }
            Object::Rule { .. } | Object::Table { .. } => "",
        }
    }
}

fn address(body: &[u8]) -> Option<Object> {
    let (IpNet { ip, prefix }, _) = route::parse_address(body)?;
    let link = number(body.get(4..).unwrap_or_default());
    Some(Object::Address { link, net: (prefix, ip) })
}

fn route_of(body: &[u8]) -> Option<Object> {
    let [family, prefix, _, _, table, _, _, kind] = *body.first_chunk::<8>()?;
    if number(body.get(8..)?) & RTM_F_CLONED != 0 {
        return None;
    }
    let attributes = Attributes::after(body, route::ROUTE);
    let unspecified: IpAddr = if family == route::AF_INET {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    } else if family == route::AF_INET6 {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    } else {
        return None;
    };
    let ip = |kind| attributes.get(kind).and_then(route::address);
    Some(Object::Route {
        table: attributes.number(route::RTA_TABLE).unwrap_or(u32::from(table)),
        to: (prefix, ip(route::RTA_DST).unwrap_or(unspecified)),
        gateway: ip(route::RTA_GATEWAY),
        link: attributes.number(route::RTA_OIF).unwrap_or_default(),
        priority: attributes.number(RTA_PRIORITY).unwrap_or_default(),
        kind,
    })
}

fn rule(body: &[u8]) -> Object {
    let attributes = Attributes::after(body, RULE_HEADER);
    Object::Rule {
        family: body.first().copied().unwrap_or_default(),
        priority: attributes.number(FRA_PRIORITY).unwrap_or_default(),
        table: attributes.number(FRA_TABLE).unwrap_or_default(),
        raw: body.to_vec(),
    }
}

fn family(number: u8) -> &'static str {
    match number {
        1 => "inet",
        2 => "ip",
        3 => "arp",
        5 => "netdev",
        7 => "bridge",
        10 => "ip6",
        _ => "other",
    }
}

/// As `ip` and `nft` would put it.
impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.added { "added: " } else { "removed: " })?;
        match &self.object {
            Object::Link { name, kind, mtu, flags, .. } => {
                let state = if flags & IFF_UP == 0 { "down" } else { "up" };
                write!(f, "link {name} {kind} mtu {mtu} {state}")?;
                if flags & IFF_PROMISC != 0 { f.write_str(" promisc") } else { Ok(()) }
            }
            Object::Address { net: (prefix, ip), .. } => {
                write!(f, "address {ip}/{prefix} dev {}", self.link)
            }
            Object::Route { table, to: (prefix, ip), gateway, priority, .. } => {
                write!(f, "route {ip}/{prefix}")?;
                if let Some(gateway) = gateway {
                    write!(f, " via {gateway}")?;
                }
                if !self.link.is_empty() {
                    write!(f, " dev {}", self.link)?;
                }
                write!(f, " metric {priority} table {table}")
            }
            Object::Rule { family: number, priority, table, .. } => {
                write!(f, "rule {} pref {priority} lookup {table}", family(*number))
            }
            Object::Table { family: number, name } => {
                write!(f, "nftables table {} {name}", family(*number))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_has_lo_and_does_not_differ_from_itself() {
        let snapshot = Snapshot::take().unwrap();
        assert!(snapshot.names.values().any(|name| name == "lo"));
        assert!(snapshot.changes(&snapshot).is_empty());
    }

    #[test]
    fn changes_read_as_commands_do() {
        let link = Object::Link {
            index: 3,
            name: "x0".to_owned(),
            kind: "dummy".to_owned(),
            mtu: 1500,
            master: 0,
            flags: IFF_UP,
        };
        let to = (16, "10.9.0.0".parse().unwrap());
        let gateway = Some("10.0.0.1".parse().unwrap());
        let route = Object::Route { table: 254, to, gateway, link: 3, priority: 0, kind: 1 };
        let mut objects = vec![link, route];
        objects.sort();
        let after = Snapshot { objects, names: [(3, "x0".to_owned())].into() };
        let changes = Snapshot::default().changes(&after);
        let texts: Vec<_> = changes.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "added: link x0 dummy mtu 1500 up",
                "added: route 10.9.0.0/16 via 10.0.0.1 dev x0 metric 0 table 254"
            ]
        );
        assert_eq!(changes[1].link, "x0");
        let back = after.changes(&Snapshot::default());
        assert!(back[0].to_string().starts_with("removed: "));
    }
}
