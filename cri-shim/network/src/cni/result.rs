//! What a plugin returns on ADD: interfaces, addresses, routes, resolver settings.
//!
//! The text comes from a program of unknown quality: sizes are capped, addresses are parsed,
//! and unknown members are kept for the next plugin by passing the original value on.

use super::Version;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// More addresses or interfaces than this are taken for a defect.
const MAX_ENTRIES: usize = 256;

/// An address with its prefix length, `10.88.0.7/16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpNet {
    /// The address.
    pub ip: IpAddr,
    /// Bits of the network part.
    pub prefix: u8,
}

impl IpNet {
    /// Whether it is of IPv4.
    pub fn is_ipv4(&self) -> bool {
        self.ip.is_ipv4()
    }

    /// The address with the bits outside the prefix cleared: the network's own.
    #[must_use]
    pub fn network(&self) -> Self {
        Self { ip: from_bits(self.is_ipv4(), bits(self.ip) & self.mask()), prefix: self.prefix }
    }

    /// Whether an address is in the network.
    pub fn contains(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.is_ipv4() && bits(ip) & self.mask() == bits(self.ip) & self.mask()
    }

    /// The last address of an IPv4 network that is large enough to have a broadcast address.
    pub fn broadcast(&self) -> Option<IpAddr> {
        (self.is_ipv4() && self.prefix < 31).then(|| self.last())
    }

    /// The address with all bits outside the prefix set.
    pub fn last(&self) -> IpAddr {
        let width = if self.is_ipv4() { u128::from(u32::MAX) } else { u128::MAX };
        from_bits(self.is_ipv4(), bits(self.ip) | (!self.mask() & width))
    }

    fn mask(&self) -> u128 {
        let width = if self.is_ipv4() { 32 } else { 128 };
        let host = width - u32::from(self.prefix).min(width);
        u128::MAX.checked_shl(host).unwrap_or(0)
    }
}

/// The address after this one; the last one's is itself.
pub(crate) fn next_ip(ip: IpAddr) -> IpAddr {
    let limit = if ip.is_ipv4() { u128::from(u32::MAX) } else { u128::MAX };
    from_bits(ip.is_ipv4(), bits(ip).saturating_add(1).min(limit))
}

/// An address as a number.
pub(crate) fn bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

fn from_bits(v4: bool, bits: u128) -> IpAddr {
    match u32::try_from(bits) {
        Ok(bits) if v4 => IpAddr::V4(Ipv4Addr::from_bits(bits)),
        _ => IpAddr::V6(Ipv6Addr::from_bits(bits)),
    }
}

impl FromStr for IpNet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not an address with a prefix length");
        let (ip, prefix) = text.split_once('/').ok_or_else(bad)?;
        let ip: IpAddr = ip.parse().map_err(|_syntax| bad())?;
        let prefix: u8 = prefix.parse().map_err(|_syntax| bad())?;
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        if prefix > bits { Err(bad()) } else { Ok(Self { ip, prefix }) }
    }
}

impl fmt::Display for IpNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

impl Serialize for IpNet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for IpNet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A link made by a plugin.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Interface {
    /// Link name.
    pub name: String,
    /// Hardware address.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// Path of the network namespace; empty for links of the host.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
}

/// An address given to the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpAssignment {
    /// The address and its network.
    pub address: IpNet,
    /// Default gateway of that network.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "gateway")]
    pub gateway: Option<IpAddr>,
    /// Index into `interfaces`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
}

/// Some plugins write an empty string for "none".
fn gateway<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<IpAddr>, D::Error> {
    match Option::<String>::deserialize(deserializer)?.as_deref() {
        None | Some("") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

/// A route inside the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination network.
    pub dst: IpNet,
    /// Next hop; the interface's gateway when absent.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "gateway")]
    pub gw: Option<IpAddr>,
}

/// Resolver settings, in results and as the `dns` capability.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Addresses of name servers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// The local domain.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// Search list.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Resolver options.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

/// The result of a chain.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PluginResult {
    /// Links.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    /// Addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<IpAssignment>,
    /// Routes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    /// Resolver settings.
    pub dns: Dns,
}

impl PluginResult {
    /// Reads and checks a plugin's answer; the value itself goes on to the next plugin.
    pub(crate) fn parse(answer: &serde_json::Value) -> Result<Self, String> {
        let version = answer.get("cniVersion").and_then(serde_json::Value::as_str);
        let version = version.ok_or("the result has no cniVersion")?;
        version.parse::<Version>()?;
        let result = Self::deserialize(answer).map_err(|error| format!("the result: {error}"))?;
        for (what, count) in [
            ("interfaces", result.interfaces.len()),
            ("ips", result.ips.len()),
            ("routes", result.routes.len()),
        ] {
            if count > MAX_ENTRIES {
                return Err(format!("the result has {count} {what}, more than {MAX_ENTRIES}"));
            }
        }
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn results_of_every_version_are_read() {
        let old = json!({
            "cniVersion": "0.3.1",
            "interfaces": [{"name": "eth0", "sandbox": "/ns"}],
            "ips": [{"version": "4", "address": "10.1.2.3/24", "gateway": "10.1.2.1", "interface": 0}],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dns": {"nameservers": ["10.1.0.1"]}
        });
        let result = PluginResult::parse(&old).unwrap();
        assert_eq!(result.ips[0].address.to_string(), "10.1.2.3/24");
        assert_eq!(result.ips[0].gateway, Some("10.1.2.1".parse().unwrap()));
        let new = json!({
            "cniVersion": "1.1.0",
            "interfaces": [{"name": "eth0", "mtu": 1500, "socketPath": "/x", "pciID": "0000:01"}],
            "ips": [{"address": "fd00::5/64", "gateway": ""}],
            "routes": [{"dst": "::/0", "gw": "fd00::1", "mtu": 1400, "priority": 5}]
        });
        assert_eq!(PluginResult::parse(&new).unwrap().ips[0].gateway, None);
        assert_eq!(
            PluginResult::parse(&json!({"cniVersion": "1.0.0"})).unwrap(),
            PluginResult::default()
        );
    }

    #[test]
    fn what_is_no_result_is_refused_with_a_reason() {
        let many: Vec<_> = (0..1000).map(|_| json!({"address": "10.0.0.1/8"})).collect();
        for (answer, part) in [
            (json!({}), "no cniVersion"),
            (json!([]), "no cniVersion"),
            (json!({"cniVersion": "9.9.9"}), "9.9.9"),
            (json!({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.1"}]}), "prefix length"),
            (json!({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.1/33"}]}), "prefix length"),
            (json!({"cniVersion": "1.0.0", "ips": {}}), "invalid type"),
            (json!({"cniVersion": "1.0.0", "ips": many}), "1000 ips"),
        ] {
            let reason = PluginResult::parse(&answer).unwrap_err();
            assert!(reason.contains(part), "{reason} should name {part}");
        }
    }

    /// JSON of the keys and values that results have, put together in any way.
    fn any_answer() -> impl proptest::strategy::Strategy<Value = serde_json::Value> {
        use proptest::prelude::*;
        use serde_json::Value;
        let text = prop_oneof![
            Just("1.0.0".to_owned()),
            Just("10.1.2.3/24".to_owned()),
            Just("fd00::1/129".to_owned()),
            Just("fd00::1".to_owned()),
            Just(String::new()),
            ".{0,30}",
        ];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            Just(json!(-0.5)),
            text.prop_map(Value::from),
        ];
        let key = prop_oneof![
            Just("interfaces"),
            Just("ips"),
            Just("routes"),
            Just("dns"),
            Just("address"),
            Just("gateway"),
            Just("interface"),
            Just("dst"),
            Just("gw"),
            Just("name"),
            Just("sandbox"),
            Just("nameservers"),
        ];
        leaf.prop_recursive(4, 60, 8, move |inner| {
            let pairs = proptest::collection::vec((key.clone(), inner.clone()), 0..6);
            prop_oneof![
                proptest::collection::vec(inner, 0..5).prop_map(Value::from),
                pairs.prop_map(|pairs| {
                    pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect::<Value>()
                }),
            ]
        })
    }

    proptest::proptest! {
        #[test]
        fn any_answer_is_read_or_refused_and_what_is_read_is_bounded(answer in any_answer()) {
            let mut answer = answer;
            if let Some(map) = answer.as_object_mut() {
                map.insert("cniVersion".to_owned(), json!("1.0.0"));
            }
            if let Ok(result) = PluginResult::parse(&answer) {
                proptest::prop_assert!(result.ips.len() <= MAX_ENTRIES);
                for ip in &result.ips {
                    let width = if ip.address.is_ipv4() { 32 } else { 128 };
                    proptest::prop_assert!(ip.address.prefix <= width);
                    // Arithmetic on what came through does not overflow either.
                    proptest::prop_assert!(ip.address.network().contains(ip.address.ip));
                }
                let stored = serde_json::to_string(&result).unwrap();
                let read: PluginResult = serde_json::from_str(&stored).unwrap();
                proptest::prop_assert_eq!(read, result);
            }
        }
    }

    #[test]
    fn a_result_survives_being_stored() {
        let value = json!({"cniVersion": "1.0.0", "ips": [{"address": "10.1.2.3/24"}]});
        let result = PluginResult::parse(&value).unwrap();
        let stored = serde_json::to_string(&result).unwrap();
        assert_eq!(serde_json::from_str::<PluginResult>(&stored).unwrap(), result);
    }
}
