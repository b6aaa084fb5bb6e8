//! Rules as `iptables-nft` writes them: nf_tables expressions, and matches and targets of
//! xtables where it keeps those.
//!
//! The plugins run `iptables`, so the rules made here are the ones it would make: `iptables -S`
//! prints them, the plugins find and delete them, and the other way round. Reference: what
//! iptables 1.8.9 sends (the tests compare with the one that is installed), `linux/netfilter/
//! nf_tables.h`, `nf_tables_compat.h`, `xt_*.h`.

use crate::cni::IpNet;
use crate::netlink::nftables::{Hook, Rule};
use crate::netlink::route::octets;
use crate::netlink::{Attributes, Message};
use crate::pod::Protocol;
use std::net::IpAddr;

const LIST_ELEM: u16 = 1;
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
const BITWISE_OP: u16 = 6;

const REGISTER: u32 = 1;
const BASE_NETWORK: u32 = 1;
const BASE_TRANSPORT: u32 = 2;
const META_MARK: u32 = 3;
const META_L4PROTO: u32 = 16;
const CMP_EQ: u32 = 0;
const CMP_NEQ: u32 = 1;
const VERDICT_ACCEPT: u32 = 1;
const VERDICT_JUMP: u32 = -3i32 as u32;

/// The nat table's hooks as iptables makes them.
pub(crate) const PREROUTING: Hook = Hook { kind: "nat", number: 0, priority: -100 };
pub(crate) const OUTPUT: Hook = Hook { kind: "nat", number: 3, priority: -100 };
pub(crate) const POSTROUTING: Hook = Hook { kind: "nat", number: 4, priority: 100 };

/// Port numbers one `multiport` match holds.
pub(crate) const MULTIPORT_MAX: usize = 15;

/// A rule in the making; methods add what the option of the same name adds, and the order of
/// the calls is that of `iptables`: protocol, source, destination, matches, target.
#[derive(Debug, Clone, Default)]
pub(crate) struct Builder {
    list: Message,
    protocol: Option<u8>,
}

/// `IPPROTO_*`
fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

impl Builder {
    fn expression(mut self, name: &str, data: impl FnOnce(Message) -> Message) -> Self {
        self.list = self
            .list
            .nest(LIST_ELEM, |element| element.text(EXPR_NAME, name).nest(EXPR_DATA, data));
        self
    }

    fn compare(self, op: u32, value: &[u8]) -> Self {
        self.expression("cmp", |data| {
            data.number_be(1, REGISTER).number_be(2, op).nest(3, |inner| inner.attribute(1, value))
        })
    }

    fn payload(self, base: u32, offset: u32, length: usize) -> Self {
        self.expression("payload", |data| {
            data.number_be(1, REGISTER)
                .number_be(2, base)
                .number_be(3, offset)
                .number_be(4, u32::try_from(length).unwrap_or_default())
        })
    }

    fn meta(self, key: u32) -> Self {
        // The order is the kernel's when it lists rules.
        self.expression("meta", |data| data.number_be(2, key).number_be(1, REGISTER))
    }

    fn bitwise(self, mask: &[u8]) -> Self {
        self.expression("bitwise", |data| {
            data.number_be(1, REGISTER)
                .number_be(2, REGISTER)
                .number_be(3, u32::try_from(mask.len()).unwrap_or_default())
                .number_be(BITWISE_OP, 0)
                .nest(4, |inner| inner.attribute(1, mask))
                .nest(5, |inner| inner.attribute(1, &vec![0; mask.len()]))
        })
    }

    /// A match of xtables with its `struct xt_*_info`.
    fn xt_match(self, name: &str, revision: u32, info: &[u8]) -> Self {
        self.expression("match", |data| {
            data.text(1, name).number_be(2, revision).attribute(3, info)
        })
    }

    /// `-p`
    pub(crate) fn protocol(mut self, protocol: Protocol) -> Self {
        self.protocol = Some(number(protocol));
        self.meta(META_L4PROTO).compare(CMP_EQ, &[number(protocol)])
    }

    /// `-s`
    pub(crate) fn source(self, net: IpNet) -> Self {
        self.address(net, if net.is_ipv4() { 12 } else { 8 }, CMP_EQ)
    }

    /// `-d`
    pub(crate) fn destination(self, net: IpNet) -> Self {
        self.address(net, if net.is_ipv4() { 16 } else { 24 }, CMP_EQ)
    }

    /// `! -d`
    pub(crate) fn not_destination(self, net: IpNet) -> Self {
        self.address(net, if net.is_ipv4() { 16 } else { 24 }, CMP_NEQ)
    }

    /// A prefix of whole bytes is a shorter comparison; any other one goes through a mask.
    fn address(self, net: IpNet, offset: u32, op: u32) -> Self {
        let bytes = octets(net.network().ip);
        let whole = usize::from(net.prefix / 8);
        if net.prefix == 0 {
            return self; // every packet
        }
        if net.prefix.is_multiple_of(8) {
            let part = bytes.get(..whole).unwrap_or_default();
            return self.payload(BASE_NETWORK, offset, whole).compare(op, part);
        }
        let all = IpNet { ip: ones(net.is_ipv4()), prefix: net.prefix };
        self.payload(BASE_NETWORK, offset, bytes.len())
            .bitwise(&octets(all.network().ip))
            .compare(op, &bytes)
    }

    /// `--dport`, after `-p`
    pub(crate) fn destination_port(self, protocol: Protocol, port: u16) -> Self {
        if protocol == Protocol::Sctp {
            return self.xt_match("sctp", 0, &sctp(port));
        }
        self.payload(BASE_TRANSPORT, 2, 2).compare(CMP_EQ, &port.to_be_bytes())
    }

    /// `-m comment --comment`
    pub(crate) fn comment(self, text: &str) -> Self {
        let mut info = text.as_bytes().iter().copied().take(255).collect::<Vec<_>>();
        info.resize(256, 0);
        self.xt_match("comment", 0, &info)
    }

    /// `-m multiport --destination-ports`, at most [`MULTIPORT_MAX`] of them.
    pub(crate) fn destination_ports(self, ports: &[u16]) -> Self {
        let mut info = vec![1, u8::try_from(ports.len()).unwrap_or_default()];
        for port in ports.iter().take(MULTIPORT_MAX) {
            info.extend(port.to_ne_bytes());
        }
        info.resize(48, 0);
        self.xt_match("multiport", 1, &info)
    }

    /// `-m addrtype --dst-type LOCAL`
    pub(crate) fn destination_is_local(self) -> Self {
        const LOCAL: u16 = 1 << 2;
        let mut info = vec![0; 2];
        info.extend(LOCAL.to_ne_bytes());
        info.resize(8, 0);
        self.xt_match("addrtype", 1, &info)
    }

    /// `-m mark --mark bit/bit`
    pub(crate) fn mark(self, bit: u32) -> Self {
        self.meta(META_MARK).bitwise(&bit.to_ne_bytes()).compare(CMP_EQ, &bit.to_ne_bytes())
    }

    fn counter(self) -> Self {
        self.expression("counter", |data| data.attribute(1, &[0; 8]).attribute(2, &[0; 8]))
    }

    fn target(self, name: &str, revision: u32, info: &[u8]) -> Rule {
        self.counter()
            .expression("target", |data| {
                data.text(1, name).number_be(2, revision).attribute(3, info)
            })
            .build()
    }

    fn verdict(self, code: u32, chain: Option<&str>) -> Rule {
        self.counter()
            .expression("immediate", |data| {
                data.number_be(1, 0).nest(2, |value| {
                    value.nest(2, |verdict| {
                        let verdict = verdict.number_be(1, code);
                        match chain {
                            Some(chain) => verdict.text(2, chain),
                            None => verdict,
                        }
                    })
                })
            })
            .build()
    }

    /// `-j ACCEPT`
    pub(crate) fn accept(self) -> Rule {
        self.verdict(VERDICT_ACCEPT, None)
    }

    /// `-j <chain>`
    pub(crate) fn jump(self, chain: &str) -> Rule {
        self.verdict(VERDICT_JUMP, Some(chain))
    }

    /// `-j MASQUERADE`
    pub(crate) fn masquerade(self, v4: bool) -> Rule {
        if !v4 {
            return self.target("MASQUERADE", 0, &[0; 40]); // struct nf_nat_range
        }
        let mut info = vec![0; 24]; // struct nf_nat_ipv4_multi_range_compat with one range
        if let Some(size) = info.first_mut() {
            *size = 1;
        }
        self.target("MASQUERADE", 0, &info)
    }

    /// `-j MARK --set-xmark bit/bit`
    pub(crate) fn set_mark(self, bit: u32) -> Rule {
        self.target("MARK", 2, &[bit.to_ne_bytes(), bit.to_ne_bytes()].concat())
    }

    /// `-j DNAT --to-destination`
    pub(crate) fn dnat(self, ip: IpAddr, port: u16) -> Rule {
        const MAP_IPS_AND_PROTO: u32 = 1 | 2;
        let mut info = MAP_IPS_AND_PROTO.to_ne_bytes().to_vec(); // struct nf_nat_range2
        let mut address = octets(ip);
        address.resize(16, 0);
        info.extend([address.clone(), address].concat());
        info.extend([port.to_be_bytes(), port.to_be_bytes()].concat());
        info.resize(48, 0);
        self.target("DNAT", 2, &info)
    }

    fn build(self) -> Rule {
        Rule { expressions: self.list.into_body(), protocol: self.protocol }
    }
}

fn ones(v4: bool) -> IpAddr {
    if v4 { [255; 4].into() } else { [255u8; 16].into() }
}

/// `struct xt_sctp_info` for one destination port.
fn sctp(port: u16) -> Vec<u8> {
    const DESTINATION_PORTS: u32 = 2;
    let mut info = [port.to_ne_bytes(), port.to_ne_bytes()].concat();
    info.resize(4 + 4 + 256 + 4, 0); // source ports, chunk map, chunk match type
    info.extend([0xff, 0, 0].repeat(4)); // chunk flags: of no chunk
    info.extend(0u32.to_ne_bytes()); // how many of them count
    info.extend(DESTINATION_PORTS.to_ne_bytes());
    info.extend(0u32.to_ne_bytes()); // inverted: none
    info.resize(296, 0);
    info
}

/// Name and attributes of an expression.
type Essence = (String, Vec<(u16, Vec<u8>)>);

/// What is left of a rule's expressions when all is taken out that differs between a rule as
/// it was sent and as the kernel lists it: counters, and attributes only some kernels know.
pub(crate) fn essence(expressions: &[u8]) -> Vec<Essence> {
    let mut all = Vec::new();
    for (_, element) in Attributes(expressions) {
        let element = Attributes(element);
        let name = element.text(EXPR_NAME).unwrap_or_default();
        if name == "counter" {
            continue;
        }
        let bitwise = name == "bitwise";
        let mut data: Vec<_> = element
            .nested(EXPR_DATA)
            .into_iter()
            .filter(|(kind, _)| !(bitwise && *kind == BITWISE_OP))
            .map(|(kind, value)| (kind, plain(value)))
            .collect();
        data.sort();
        all.push((name, data));
    }
    all
}

/// A value without the bits that mark nested attributes, which kernels set or do not set.
fn plain(value: &[u8]) -> Vec<u8> {
    let attributes = Attributes(value);
    let (mut out, mut length) = (Vec::new(), 0);
    for (kind, inner) in attributes {
        length += (4 + inner.len()).next_multiple_of(4);
        out.extend(kind.to_ne_bytes());
        out.extend(plain(inner));
    }
    // Only what is wholly made of attributes is taken for nested ones.
    if length == value.len().next_multiple_of(4) && !out.is_empty() { out } else { value.to_vec() }
}

/// The chain a rule jumps to.
pub(crate) fn jumps_to(expressions: &[u8]) -> Option<String> {
    Attributes(expressions).into_iter().find_map(|(_, element)| {
        let element = Attributes(element);
        let is_jump = element.text(EXPR_NAME).as_deref() == Some("immediate");
        is_jump.then(|| element.nested(EXPR_DATA).nested(2).nested(2).text(2))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(rule: &Rule) -> String {
        rule.expressions.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn a_jump_names_its_chain() {
        let rule = Builder::default().destination_is_local().jump("CNI-HOSTPORT-DNAT");
        assert_eq!(jumps_to(&rule.expressions).as_deref(), Some("CNI-HOSTPORT-DNAT"));
        assert_eq!(jumps_to(&Builder::default().accept().expressions), None);
        assert_eq!(jumps_to(&[]), None);
    }

    #[test]
    fn rules_differ_by_what_they_do_and_not_by_counters() {
        let net: IpNet = "10.1.0.5/16".parse().unwrap();
        let rule = Builder::default().destination(net).comment("x").accept();
        let same = Builder::default().destination(net.network()).comment("x").accept();
        assert_eq!(essence(&rule.expressions), essence(&same.expressions));
        let other = Builder::default().destination(net).comment("y").accept();
        assert_ne!(essence(&rule.expressions), essence(&other.expressions));
        assert!(essence(&rule.expressions).iter().all(|(name, _)| name != "counter"));
    }

    #[test]
    fn prefixes_of_whole_bytes_need_no_mask() {
        let rule = |net: &str| hex(&Builder::default().source(net.parse().unwrap()).accept());
        let bitwise = "626974776973"; // "bitwis"
        assert!(!rule("10.1.0.5/16").contains(bitwise));
        assert!(rule("10.1.0.5/12").contains(bitwise));
        assert!(!rule("fd00::5/64").contains(bitwise));
        assert_eq!(rule("0.0.0.0/0"), hex(&Builder::default().accept()));
    }

    #[test]
    fn structures_have_the_kernel_s_sizes() {
        assert_eq!(sctp(8081).len(), 296);
        assert_eq!(sctp(8081)[..4], [0x91, 0x1f, 0x91, 0x1f]);
    }
}
