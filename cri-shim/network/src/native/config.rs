//! Which network configurations are done here, and what they ask for.
//!
//! A configuration is taken only if every plugin and every key of it is known here and means
//! the same as for the plugin; anything else, however small, leaves the whole chain to the
//! plugins. Nothing is interpreted halfway, and a mistake is left to the plugin to report.

use crate::cni::config::{NetworkList, PluginConfig};
use crate::cni::{Dns, IpNet, bits, next_ip};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::net::IpAddr;
use std::path::PathBuf;

/// Where host-local keeps leases unless told otherwise.
const LEASES: &str = "/var/lib/cni/networks";
const DEFAULT_BRIDGE: &str = "cni0";
/// The mark bit the portmap plugin uses; Kubernetes has 14 and 15.
const MARK_BIT: u32 = 13;

/// A chain that is done here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Makes the interface.
    pub(crate) link: Link,
    /// Gives the addresses.
    pub(crate) ipam: HostLocal,
    /// Packets that leave the pods' network get an address of the node.
    pub(crate) masquerade: bool,
    pub(crate) mtu: u32,
    /// Resolver settings of the configuration, for the result.
    pub(crate) dns: Dns,
    /// Maps ports of the node.
    pub(crate) portmap: Option<Portmap>,
    /// The result of the whole chain is that of its `loopback` plugin as well.
    pub(crate) plugins: Vec<String>,
}

/// How a pod is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Link {
    /// A port of a bridge.
    Bridge(Bridge),
    /// A pair of its own, routed.
    PointToPoint,
}

/// What is particular to bridges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bridge {
    pub(crate) name: String,
    pub(crate) is_gateway: bool,
    pub(crate) is_default_gateway: bool,
    pub(crate) force_address: bool,
    pub(crate) hairpin: bool,
    pub(crate) promiscuous: bool,
    pub(crate) duplicate_detection: bool,
}

/// The `portmap` plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Portmap {
    pub(crate) snat: bool,
    /// One bit.
    pub(crate) mark: u32,
    /// Whether it asked for the mappings at all.
    pub(crate) wanted: bool,
}

/// The `host-local` plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostLocal {
    pub(crate) data_dir: PathBuf,
    /// One address is given from each set.
    pub(crate) sets: Vec<Vec<Range>>,
    pub(crate) routes: Vec<RouteKeys>,
    /// Ranges of the node (`ipRanges`) go before those of the file.
    pub(crate) takes_node_ranges: bool,
}

/// Addresses that may be given out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) subnet: IpNet,
    pub(crate) first: IpAddr,
    pub(crate) last: IpAddr,
    pub(crate) gateway: IpAddr,
}

/// A route of the configuration, as written.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RouteKeys {
    pub(crate) dst: IpNet,
    #[serde(default)]
    pub(crate) gw: Option<IpAddr>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LinkKeys {
    #[serde(rename = "type")]
    _kind: String,
    #[serde(default, rename = "name")]
    _name: Option<String>,
    #[serde(default, rename = "cniVersion")]
    _version: Option<String>,
    #[serde(default, rename = "capabilities")]
    _capabilities: Map<String, Value>,
    #[serde(default)]
    bridge: Option<String>,
    #[serde(default)]
    is_gateway: bool,
    #[serde(default)]
    is_default_gateway: bool,
    #[serde(default)]
    force_address: bool,
    #[serde(default)]
    ip_masq: bool,
    #[serde(default)]
    ip_masq_backend: Option<String>,
    #[serde(default)]
    mtu: u32,
    #[serde(default)]
    hairpin_mode: bool,
    #[serde(default)]
    promisc_mode: bool,
    #[serde(default)]
    vlan: u32,
    #[serde(default)]
    preserve_default_vlan: bool,
    #[serde(default, rename = "macspoofchk")]
    mac_spoof_check: bool,
    #[serde(default, rename = "enabledad")]
    duplicate_detection: bool,
    #[serde(default)]
    port_isolation: bool,
    #[serde(default)]
    disable_container_interface: bool,
    ipam: Map<String, Value>,
    #[serde(default)]
    dns: Dns,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PortmapKeys {
    #[serde(rename = "type")]
    _kind: String,
    #[serde(default, rename = "name")]
    _name: Option<String>,
    #[serde(default, rename = "cniVersion")]
    _version: Option<String>,
    #[serde(default, rename = "capabilities")]
    _capabilities: Map<String, Value>,
    #[serde(default)]
    backend: Option<String>,
    #[serde(default)]
    snat: Option<bool>,
    #[serde(default)]
    mark_masq_bit: Option<u32>,
    #[serde(default, rename = "conditionsV4")]
    conditions_v4: Vec<String>,
    #[serde(default, rename = "conditionsV6")]
    conditions_v6: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct IpamKeys {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    data_dir: Option<PathBuf>,
    #[serde(default)]
    ranges: Vec<Vec<RangeKeys>>,
    #[serde(default)]
    routes: Vec<RouteKeys>,
    #[serde(default)]
    subnet: Option<IpNet>,
    #[serde(default)]
    range_start: Option<IpAddr>,
    #[serde(default)]
    range_end: Option<IpAddr>,
    #[serde(default)]
    gateway: Option<IpAddr>,
}

#[derive(Deserialize, Clone)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct RangeKeys {
    subnet: IpNet,
    #[serde(default)]
    range_start: Option<IpAddr>,
    #[serde(default)]
    range_end: Option<IpAddr>,
    #[serde(default)]
    gateway: Option<IpAddr>,
}

/// The chain as it is done here.
///
/// # Errors
/// Why it is left to the plugins: the first thing that is not done here.
pub(crate) fn plan(list: &NetworkList) -> Result<Plan, String> {
    let mut plan: Option<Plan> = None;
    for plugin in &list.plugins {
        let refuse = |reason: String| format!("plugin {:?}: {reason}", plugin.kind);
        match (plugin.kind.as_str(), &mut plan) {
            ("bridge" | "ptp", None) => plan = Some(link(plugin).map_err(refuse)?),
            ("portmap", Some(plan)) if plan.portmap.is_none() => {
                plan.portmap = Some(portmap(plugin).map_err(refuse)?);
            }
            ("bridge" | "ptp" | "portmap", _) => {
                return Err(refuse("is not in its usual place in the chain".to_owned()));
            }
            _ => return Err(refuse("is not built in".to_owned())),
        }
        if let Some(plan) = &mut plan {
            plan.plugins.push(plugin.kind.clone());
        }
    }
    plan.ok_or_else(|| "the chain makes no interface".to_owned())
}

fn keys<T: for<'de> Deserialize<'de>>(object: &Map<String, Value>) -> Result<T, String> {
    T::deserialize(Value::Object(object.clone())).map_err(|error| error.to_string())
}

fn link(plugin: &PluginConfig) -> Result<Plan, String> {
    let keys: LinkKeys = keys(&plugin.object)?;
    for (set, key) in [
        (keys.vlan != 0, "vlan"),
        (keys.preserve_default_vlan, "preserveDefaultVlan"),
        (keys.mac_spoof_check, "macspoofchk"),
        (keys.port_isolation, "portIsolation"),
        (keys.disable_container_interface, "disableContainerInterface"),
        (keys.hairpin_mode && keys.promisc_mode, "hairpinMode together with promiscMode"),
    ] {
        if set {
            return Err(format!("{key} is not built in"));
        }
    }
    iptables_backend("ipMasqBackend", keys.ip_masq_backend.as_deref())?;
    let bridge = keys.bridge.clone().unwrap_or_else(|| DEFAULT_BRIDGE.to_owned());
    if bridge.is_empty() || bridge.len() > 15 || bridge.contains(['/', ' ', ':']) {
        return Err(format!("bridge {bridge:?} is not the name of a link"));
    }
    let link = if plugin.kind == "bridge" {
        Link::Bridge(Bridge {
            name: bridge,
            is_gateway: keys.is_gateway || keys.is_default_gateway,
            is_default_gateway: keys.is_default_gateway,
            force_address: keys.force_address,
            hairpin: keys.hairpin_mode,
            promiscuous: keys.promisc_mode,
            duplicate_detection: keys.duplicate_detection,
        })
    } else {
        let own = [
            "type",
            "name",
            "cniVersion",
            "capabilities",
            "ipMasq",
            "ipMasqBackend",
            "mtu",
            "ipam",
            "dns",
        ];
        if let Some(key) = plugin.object.keys().find(|key| !own.contains(&key.as_str())) {
            return Err(format!("unknown field `{key}`"));
        }
        Link::PointToPoint
    };
    Ok(Plan {
        link,
        ipam: ipam(plugin, &keys.ipam)?,
        masquerade: keys.ip_masq,
        mtu: keys.mtu,
        dns: keys.dns,
        portmap: None,
        plugins: Vec::new(),
    })
}

fn iptables_backend(key: &str, backend: Option<&str>) -> Result<(), String> {
    match backend {
        None | Some("iptables") => Ok(()),
        Some(other) => Err(format!("{key} {other:?} is not built in")),
    }
}

fn portmap(plugin: &PluginConfig) -> Result<Portmap, String> {
    let keys: PortmapKeys = keys(&plugin.object)?;
    iptables_backend("backend", keys.backend.as_deref())?;
    if !(keys.conditions_v4.is_empty() && keys.conditions_v6.is_empty()) {
        return Err("conditions are not built in".to_owned());
    }
    let bit = keys.mark_masq_bit.unwrap_or(MARK_BIT);
    let mark = 1u32.checked_shl(bit).ok_or_else(|| format!("markMasqBit {bit}"))?;
    Ok(Portmap { snat: keys.snat.unwrap_or(true), mark, wanted: plugin.wants("portMappings") })
}

fn ipam(plugin: &PluginConfig, object: &Map<String, Value>) -> Result<HostLocal, String> {
    let kind = object.get("type").and_then(Value::as_str).unwrap_or_default();
    if kind != "host-local" {
        return Err(format!("ipam {kind:?} is not built in"));
    }
    let keys: IpamKeys = keys(object).map_err(|reason| format!("ipam: {reason}"))?;
    let mut sets = Vec::new();
    if let Some(subnet) = keys.subnet {
        let IpamKeys { range_start, range_end, gateway, .. } = keys;
        sets.push(vec![RangeKeys { subnet, range_start, range_end, gateway }]);
    } else if keys.range_start.or(keys.range_end).or(keys.gateway).is_some() {
        return Err("ipam: a range without subnet".to_owned());
    }
    sets.extend(keys.ranges);
    let takes_node_ranges = plugin.wants("ipRanges");
    if sets.is_empty() && !takes_node_ranges {
        return Err("ipam: no ranges".to_owned());
    }
    let sets = range_sets(&sets).map_err(|reason| format!("{}: {reason}", keys.kind))?;
    let data_dir = keys.data_dir.filter(|dir| !dir.as_os_str().is_empty());
    let data_dir = data_dir.unwrap_or_else(|| LEASES.into());
    if !data_dir.is_absolute() {
        return Err(format!("ipam: dataDir {} is not absolute", data_dir.display()));
    }
    Ok(HostLocal { data_dir, sets, routes: keys.routes, takes_node_ranges })
}

impl HostLocal {
    /// The same with the node's ranges, given as the `ipRanges` capability.
    pub(crate) fn with_node_ranges(&self, capability: Option<&Value>) -> Result<Self, String> {
        let mut all = self.clone();
        let Some(value) = capability.filter(|_| self.takes_node_ranges) else { return Ok(all) };
        let sets: Vec<Vec<RangeKeys>> =
            Deserialize::deserialize(value).map_err(|error| format!("ipRanges: {error}"))?;
        all.sets.splice(0..0, range_sets(&sets)?);
        check_overlap(&all.sets)?;
        Ok(all)
    }
}

fn range_sets(sets: &[Vec<RangeKeys>]) -> Result<Vec<Vec<Range>>, String> {
    let mut all = Vec::new();
    for set in sets {
        let ranges = set.iter().map(range).collect::<Result<Vec<_>, _>>()?;
        let Some(first) = ranges.first() else { return Err("an empty range set".to_owned()) };
        if ranges.iter().any(|range| range.subnet.is_ipv4() != first.subnet.is_ipv4()) {
            return Err("mixed address families in a range set".to_owned());
        }
        all.push(ranges);
    }
    check_overlap(&all)?;
    Ok(all)
}

/// Fills in what is not said, as the plugin does.
fn range(keys: &RangeKeys) -> Result<Range, String> {
    let subnet = keys.subnet;
    let width = if subnet.is_ipv4() { 32 } else { 128 };
    if subnet.prefix > width - 2 {
        return Err(format!("network {subnet} is too small"));
    }
    if subnet.network().ip != subnet.ip {
        return Err(format!("network {subnet} has host bits set"));
    }
    let inside = |ip: &IpAddr, what: &str| {
        if subnet.contains(*ip) { Ok(*ip) } else { Err(format!("{what} {ip} is not in {subnet}")) }
    };
    let first = keys.range_start.as_ref().map(|ip| inside(ip, "rangeStart")).transpose()?;
    let last = keys.range_end.as_ref().map(|ip| inside(ip, "rangeEnd")).transpose()?;
    let first = first.unwrap_or_else(|| next_ip(subnet.ip));
    let last = last.unwrap_or_else(|| before_broadcast(subnet));
    if bits(first) > bits(last) {
        return Err(format!("range {first} to {last} is empty"));
    }
    let gateway = keys.gateway.unwrap_or_else(|| next_ip(subnet.ip));
    if gateway.is_ipv4() != subnet.is_ipv4() {
        return Err(format!("gateway {gateway} is of another family than {subnet}"));
    }
    Ok(Range { subnet, first, last, gateway })
}

/// The last address of a subnet, or of IPv4 the one before the broadcast address.
fn before_broadcast(subnet: IpNet) -> IpAddr {
    match subnet.last() {
        IpAddr::V4(ip) => IpAddr::V4(ip.to_bits().saturating_sub(1).into()),
        v6 @ IpAddr::V6(_) => v6,
    }
}

fn check_overlap(sets: &[Vec<Range>]) -> Result<(), String> {
    let all: Vec<_> = sets.iter().flatten().collect();
    for (index, a) in all.iter().enumerate() {
        for b in all.iter().skip(index + 1) {
            let same = a.subnet.is_ipv4() == b.subnet.is_ipv4();
            if same && bits(a.first) <= bits(b.last) && bits(b.first) <= bits(a.last) {
                return Err(format!("ranges of {} and {} overlap", a.subnet, b.subnet));
            }
        }
    }
    Ok(())
}

impl Range {
    /// Whether the address may be given out from here.
    pub(crate) fn contains(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.subnet.is_ipv4()
            && (bits(self.first)..=bits(self.last)).contains(&bits(ip))
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
