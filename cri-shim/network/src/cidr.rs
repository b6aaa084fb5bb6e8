//! The node's pod CIDRs as kubelet hands them over: one network, or one of each family.

use crate::cni::IpNet;

/// Reads `10.244.1.0/24` or `10.244.1.0/24,fd00:1::/64`; empty when none is assigned yet. Bits
/// outside the prefix are cleared, because plugins refuse networks that have any.
///
/// # Errors
/// Names the part that is no network, or says that two networks are of one family.
pub fn pod_cidrs(text: &str) -> Result<Vec<IpNet>, String> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let mut networks: Vec<IpNet> = Vec::new();
    for part in text.split(',').map(str::trim) {
        let network: IpNet = part.parse().map_err(|error| {
            format!("{part:?} in {text:?} is no network like 10.244.1.0/24: {error}")
        })?;
        if let Some(other) = networks.iter().find(|n| n.is_ipv4() == network.is_ipv4()) {
            let family = if network.is_ipv4() { "IPv4" } else { "IPv6" };
            return Err(format!(
                "{text:?} has two networks of {family}, {other} and {network}; a node has at most one of each family"
            ));
        }
        networks.push(network.network());
    }
    Ok(networks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str) -> Vec<String> {
        pod_cidrs(text).unwrap().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_node_has_one_network_of_each_family() {
        assert_eq!(texts("10.244.1.0/24"), ["10.244.1.0/24"]);
        assert_eq!(texts("10.244.1.0/24, fd00:1::/64"), ["10.244.1.0/24", "fd00:1::/64"]);
        assert_eq!(texts("fd00:1::/64,10.244.1.7/24"), ["fd00:1::/64", "10.244.1.0/24"]);
        assert!(texts("").is_empty());
    }

    #[test]
    fn what_is_no_network_is_named() {
        for (text, named) in [
            ("10.244.1.0", "\"10.244.1.0\""),
            ("10.244.1.0/33", "\"10.244.1.0/33\""),
            ("10.244.1.0/24,", "\"\""),
            ("10.244.1.0/24,x/64", "\"x/64\""),
            ("10.0.0.0/24,10.1.0.0/24", "two networks of IPv4"),
            ("fd00::/129", "\"fd00::/129\""),
            ("10.0.0.0/24/24", "\"10.0.0.0/24/24\""),
        ] {
            let error = pod_cidrs(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
