//! What `ipMasq` and `portmap` put into the nat table, in one transaction per family.
//!
//! ```text
//!  POSTROUTING ─▶ CNI-HOSTPORT-MASQ      marked packets are masqueraded       (shared, first)
//!              ─▶ CNI-<hash>             from the pod: ACCEPT within its network, else MASQUERADE
//!  PREROUTING, OUTPUT ─▶ CNI-HOSTPORT-DNAT ─▶ CNI-DN-<hash>                    one per pod
//!                                              mark hairpin and localhost packets, then DNAT
//! ```
//!
//! Names, rules and their order are the plugins' (`hash` is of network name and container id).
//! What is shared is made when it is missing and never deleted.

use super::config::Portmap;
use super::iptables::{self, Builder, MULTIPORT_MAX};
use crate::cni::IpNet;
use crate::netlink::nftables::{Change, Hook, Place, Rule, Table};
use crate::netlink::route::{AF_INET, AF_INET6};
use crate::netlink::{Socket, conntrack};
use crate::pod::{PortMapping, Protocol};
use sha2::{Digest, Sha512};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const NAT: &str = "nat";
const DNAT: &str = "CNI-HOSTPORT-DNAT";
const SET_MARK: &str = "CNI-HOSTPORT-SETMARK";
const MASQUERADE: &str = "CNI-HOSTPORT-MASQ";
/// Length of the plugins' chain names.
const CHAIN_LENGTH: usize = 28;

/// Whose rules they are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Owner<'a> {
    pub(crate) network: &'a str,
    pub(crate) pod: &'a str,
}

/// What a pod asks for in one family.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted<'a> {
    /// Addresses that are masqueraded outside their network.
    pub(crate) masquerade: &'a [IpNet],
    /// Ports of the node that lead to this address.
    pub(crate) ports: Option<(&'a Portmap, IpNet, &'a [PortMapping])>,
}

/// `CNI-`, a prefix, and as much of the hash as fits.
fn chain_name(owner: Owner<'_>, prefix: &str) -> String {
    let hash = Sha512::digest(format!("{}{}", owner.network, owner.pod));
    let mut name = format!("CNI-{prefix}");
    name.extend(hash.iter().map(|byte| format!("{byte:02x}")));
    name.truncate(CHAIN_LENGTH);
    name
}

fn table(socket: &mut Socket, v4: bool) -> Table<'_> {
    Table { socket, family: if v4 { AF_INET } else { AF_INET6 }, name: NAT }
}

/// Makes a pod's rules of one family; what there was of it is replaced.
pub(crate) fn set(
    socket: &mut Socket,
    v4: bool,
    owner: Owner<'_>,
    wanted: Wanted<'_>,
) -> io::Result<()> {
    table(socket, v4).transact(|table| {
        let mut plan = Changes { there: table.chains()?, list: Vec::new() };
        if plan.there.is_empty() {
            plan.list.push(Change::Table);
        }
        if !wanted.masquerade.is_empty() {
            masquerade(table, &mut plan, owner, wanted.masquerade)?;
        }
        if let Some((portmap, address, mappings)) = wanted.ports {
            let ports = Ports { portmap, address, mappings };
            shared_chains(table, &mut plan, portmap)?;
            ports.chain(table, &mut plan, owner)?;
        }
        Ok(plan.list)
    })
}

/// Takes a pod's rules of one family away; done when there are none.
pub(crate) fn clear(socket: &mut Socket, v4: bool, owner: Owner<'_>) -> io::Result<()> {
    table(socket, v4).transact(|table| {
        let mut changes = Vec::new();
        for (prefix, entry) in [("", "POSTROUTING"), ("DN-", DNAT)] {
            let chain = chain_name(owner, prefix);
            if table.has_chain(&chain)? {
                changes.extend(unlink(table, entry, &chain)?);
                changes.push(Change::Flush { chain: chain.clone() });
                changes.push(Change::DeleteChain { chain });
            }
        }
        Ok(changes)
    })
}

/// The pod's own chains of one family that are missing, of those it should have.
pub(crate) fn missing(
    socket: &mut Socket,
    v4: bool,
    owner: Owner<'_>,
    masquerade: bool,
    ports: bool,
) -> io::Result<Option<String>> {
    let mut table = table(socket, v4);
    for (wanted, prefix, entry) in [(masquerade, "", "POSTROUTING"), (ports, "DN-", DNAT)] {
        let chain = chain_name(owner, prefix);
        let entered = |rules: &[crate::netlink::nftables::Found]| {
            rules
                .iter()
                .any(|rule| iptables::jumps_to(&rule.expressions).as_deref() == Some(&chain))
        };
        if wanted && !entered(&table.rules(entry)?) {
            return Ok(Some(format!("no rule of {entry} leads to chain {chain}")));
        }
        if wanted && table.rules(&chain)?.is_empty() {
            return Ok(Some(format!("chain {chain} is empty")));
        }
    }
    Ok(None)
}

/// Lets UDP flows to the pod's ports begin anew.
pub(crate) fn forget_flows(
    socket: &mut Socket,
    v4: bool,
    mappings: &[PortMapping],
) -> io::Result<usize> {
    let udp = mappings.iter().filter(|map| map.protocol == Protocol::Udp);
    let ports: Vec<_> = udp.map(|map| map.host_port).collect();
    if ports.is_empty() {
        return Ok(0);
    }
    conntrack::forget_udp(socket, if v4 { AF_INET } else { AF_INET6 }, &ports)
}

struct Changes {
    /// Chains of the table before the transaction, and those it makes.
    there: Vec<String>,
    list: Vec<Change>,
}

impl Changes {
    /// Makes a chain if there is none; whether it was there.
    fn chain(&mut self, name: &str, hook: Option<Hook>) -> bool {
        let there = self.there.iter().any(|chain| chain == name);
        if !there {
            self.there.push(name.to_owned());
            self.list.push(Change::Chain { name: name.to_owned(), hook });
        }
        there
    }

    fn rule(&mut self, chain: &str, place: Place, rule: Rule) {
        self.list.push(Change::Rule { chain: chain.to_owned(), place, rule });
    }

    /// Adds a rule unless the chain has it.
    fn ensure(
        &mut self,
        table: &mut Table<'_>,
        chain: &str,
        place: Place,
        rule: Rule,
    ) -> io::Result<()> {
        let essence = iptables::essence(&rule.expressions);
        let found = table.rules(chain)?;
        if !found.iter().any(|rule| iptables::essence(&rule.expressions) == essence) {
            self.rule(chain, place, rule);
        }
        Ok(())
    }

    /// A chain of the pod's own, empty, that nothing leads to.
    fn fresh_chain(&mut self, table: &mut Table<'_>, name: &str, entry: &str) -> io::Result<()> {
        if self.chain(name, None) {
            self.list.extend(unlink(table, entry, name)?);
            self.list.push(Change::Flush { chain: name.to_owned() });
        }
        Ok(())
    }
}

/// Deletions of the rules in `entry` that lead to `chain`.
fn unlink(table: &mut Table<'_>, entry: &str, chain: &str) -> io::Result<Vec<Change>> {
    let leads = |expressions: &[u8]| iptables::jumps_to(expressions).as_deref() == Some(chain);
    let found = table.rules(entry)?.into_iter().filter(|rule| leads(&rule.expressions));
    Ok(found.map(|rule| Change::DeleteRule { chain: rule.chain, handle: rule.handle }).collect())
}

fn masquerade(
    table: &mut Table<'_>,
    plan: &mut Changes,
    owner: Owner<'_>,
    addresses: &[IpNet],
) -> io::Result<()> {
    let chain = chain_name(owner, "");
    let comment = format!("name: {:?} id: {:?}", owner.network, owner.pod);
    plan.chain("POSTROUTING", Some(iptables::POSTROUTING));
    plan.fresh_chain(table, &chain, "POSTROUTING")?;
    for (index, address) in addresses.iter().enumerate() {
        let v4 = address.is_ipv4();
        let before = addresses.get(..index).unwrap_or_default();
        if !before.iter().any(|other| other.network() == address.network()) {
            let within = Builder::default().destination(*address).comment(&comment).accept();
            plan.rule(&chain, Place::Last, within);
        }
        if index == 0 {
            let outside = Builder::default().not_destination(multicast_net(v4)).comment(&comment);
            plan.rule(&chain, Place::Last, outside.masquerade(v4));
        }
        let entry = Builder::default().source(host(address.ip)).comment(&comment).jump(&chain);
        plan.rule("POSTROUTING", Place::Last, entry);
    }
    Ok(())
}

/// 224.0.0.0/4 or ff00::/8
fn multicast_net(v4: bool) -> IpNet {
    if v4 {
        IpNet { ip: Ipv4Addr::new(224, 0, 0, 0).into(), prefix: 4 }
    } else {
        IpNet { ip: Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0).into(), prefix: 8 }
    }
}

/// The network that has nothing but this address.
fn host(ip: IpAddr) -> IpNet {
    IpNet { ip, prefix: if ip.is_ipv4() { 32 } else { 128 } }
}

fn shared_chains(table: &mut Table<'_>, plan: &mut Changes, portmap: &Portmap) -> io::Result<()> {
    plan.chain("PREROUTING", Some(iptables::PREROUTING));
    plan.chain("OUTPUT", Some(iptables::OUTPUT));
    plan.chain("POSTROUTING", Some(iptables::POSTROUTING));
    if portmap.snat {
        plan.chain(SET_MARK, None);
        let set = Builder::default().comment("CNI portfwd masquerade mark").set_mark(portmap.mark);
        plan.ensure(table, SET_MARK, Place::Last, set)?;
        plan.chain(MASQUERADE, None);
        let masquerade = Builder::default().mark(portmap.mark).masquerade(table.family == AF_INET);
        plan.ensure(table, MASQUERADE, Place::Last, masquerade)?;
        let entry = Builder::default().comment("CNI portfwd requiring masquerade").jump(MASQUERADE);
        // Before the pods' own masquerading, which would be the end of it.
        plan.ensure(table, "POSTROUTING", Place::First, entry)?;
    }
    plan.chain(DNAT, None);
    for chain in ["PREROUTING", "OUTPUT"] {
        let entry = Builder::default().destination_is_local().jump(DNAT);
        plan.ensure(table, chain, Place::Last, entry)?;
    }
    Ok(())
}

struct Ports<'a> {
    portmap: &'a Portmap,
    address: IpNet,
    mappings: &'a [PortMapping],
}

impl Ports<'_> {
    fn chain(&self, table: &mut Table<'_>, plan: &mut Changes, owner: Owner<'_>) -> io::Result<()> {
        let chain = chain_name(owner, "DN-");
        plan.fresh_chain(table, &chain, DNAT)?;
        for mapping in self.mappings {
            for rule in self.rules(mapping) {
                plan.rule(&chain, Place::Last, rule);
            }
        }
        let comment = format!("dnat name: \"{}\" id: \"{}\"", owner.network, owner.pod);
        let comment = shorten(comment);
        for protocol in [Protocol::Sctp, Protocol::Tcp, Protocol::Udp] {
            let own = self.mappings.iter().filter(|map| map.protocol == protocol);
            let ports: Vec<_> = own.map(|map| map.host_port).collect();
            for ports in ports.chunks(MULTIPORT_MAX) {
                let entry = Builder::default().protocol(protocol).comment(&comment);
                plan.rule(DNAT, Place::Last, entry.destination_ports(ports).jump(&chain));
            }
        }
        Ok(())
    }

    /// Marks come before the translation, which ends the walk.
    fn rules(&self, mapping: &PortMapping) -> Vec<Rule> {
        let v4 = self.address.is_ipv4();
        if mapping.host_ip.is_some_and(|ip| ip.is_ipv4() != v4) {
            return Vec::new();
        }
        let only = mapping.host_ip.filter(|ip| !ip.is_unspecified()).map(host);
        let from = |source: Option<IpNet>| {
            let mut rule = Builder::default().protocol(mapping.protocol);
            if let Some(source) = source {
                rule = rule.source(source);
            }
            if let Some(only) = only {
                rule = rule.destination(only);
            }
            rule.destination_port(mapping.protocol, mapping.host_port)
        };
        let mut rules = Vec::new();
        if self.portmap.snat {
            rules.push(from(Some(self.address)).jump(SET_MARK));
            if v4 {
                let localhost = host(Ipv4Addr::LOCALHOST.into());
                rules.push(from(Some(localhost)).jump(SET_MARK));
            }
        }
        rules.push(from(None).dnat(self.address.ip, mapping.container_port));
        rules
    }
}

/// No comment is over the 255 bytes that iptables takes.
fn shorten(mut comment: String) -> String {
    if comment.len() > 255 {
        comment.truncate(253); // names and ids are ASCII
        comment.push_str("...");
    }
    comment
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_named_as_the_plugins_name_them() {
        // from the plugins' own tests: name "test", id "1234"
        let owner = Owner { network: "test", pod: "1234" };
        assert_eq!(chain_name(owner, ""), "CNI-2bbe0c48b91a7d1b8a6753a8");
        assert_eq!(chain_name(owner, "DN-").len(), CHAIN_LENGTH);
    }

    #[test]
    fn a_mapping_for_another_family_makes_no_rule() {
        let portmap = Portmap { snat: true, mark: 0x2000, wanted: true };
        let mapping = PortMapping {
            host_port: 80,
            container_port: 8080,
            protocol: Protocol::Tcp,
            host_ip: Some("::1".parse().unwrap()),
        };
        let ports = Ports {
            portmap: &portmap,
            address: "10.1.0.5/16".parse().unwrap(),
            mappings: std::slice::from_ref(&mapping),
        };
        assert!(ports.rules(&mapping).is_empty());
        let any = PortMapping { host_ip: Some("0.0.0.0".parse().unwrap()), ..mapping.clone() };
        let none = PortMapping { host_ip: None, ..mapping };
        assert_eq!(ports.rules(&any), ports.rules(&none));
        assert_eq!(ports.rules(&none).len(), 3);
    }
}
