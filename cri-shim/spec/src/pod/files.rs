//! Text of the pod's `/etc/resolv.conf` and `/etc/hosts`, and its host name.

use crate::error::SpecError;
use pinion_cri_proto::v1::{DnsConfig, PodSandboxConfig};
use std::fmt::Write;
use std::net::IpAddr;

/// The pod's name, else the host's. At most 64 bytes (HOST_NAME_MAX of sethostname(2)).
pub fn hostname(pod: &PodSandboxConfig, host: &str) -> Result<String, SpecError> {
    let name = if pod.hostname.is_empty() { host } else { &pod.hostname };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
        let start: String = name.chars().take(80).collect();
        let reason = format!("{start:?} is no host name of 1 to 64 letters, digits, '-', '.'");
        return Err(SpecError::invalid("hostname", reason));
    }
    Ok(name.to_owned())
}

/// `/etc/resolv.conf` from the pod's DNS configuration; without one, a copy of the host's.
///
/// A configuration that is there but empty means an empty file (`dnsPolicy: None`).
pub fn resolv_conf(dns: Option<&DnsConfig>, host: &str) -> Result<String, SpecError> {
    let Some(dns) = dns else { return Ok(host.to_owned()) };
    let mut text = String::new();
    words(&dns.searches, "searches")?;
    words(&dns.options, "options")?;
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for (index, server) in dns.servers.iter().enumerate() {
        // The resolver takes a zone after the address: fe80::1%eth0.
        let address = server.split_once('%').map_or(server.as_str(), |(address, _)| address);
        if address.parse::<IpAddr>().is_err() || server.contains(char::is_whitespace) {
            let field = format!("dns_config.servers[{index}]");
            return Err(SpecError::invalid(field, format!("{server:?} is no IP address")));
        }
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    Ok(text)
}

/// One word each, so that no entry brings a line of its own.
fn words(list: &[String], member: &str) -> Result<(), SpecError> {
    for (index, word) in list.iter().enumerate() {
        if word.is_empty() || word.contains(|c: char| c.is_whitespace() || c.is_control()) {
            let field = format!("dns_config.{member}[{index}]");
            return Err(SpecError::invalid(field, format!("{word:?} is not one word")));
        }
    }
    Ok(())
}

/// `/etc/hosts` of a pod with its own network: loopback names, and the pod's name at its
/// addresses. Containers of host-network pods get a copy of the host's file instead.
pub fn hosts(hostname: &str, addresses: &[IpAddr]) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::\tip6-localnet\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    for address in addresses {
        let _ = writeln!(text, "{address}\t{hostname}");
    }
    if addresses.is_empty() {
        let _ = writeln!(text, "127.0.1.1\t{hostname}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(list: &[&str]) -> Vec<String> {
        list.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn the_host_name_is_the_pod_s_or_the_host_s() {
        let mut pod = PodSandboxConfig::default();
        assert_eq!(hostname(&pod, "node-1").unwrap(), "node-1");
        pod.hostname = "test-hostname".to_owned();
        assert_eq!(hostname(&pod, "node-1").unwrap(), "test-hostname");
        for bad in ["a b", "a\nb", "a/b", &"x".repeat(65)] {
            pod.hostname = bad.to_owned();
            assert_eq!(hostname(&pod, "node-1").unwrap_err().field, "hostname", "{bad:?}");
        }
    }

    #[test]
    fn dns_settings_become_lines() {
        let dns = DnsConfig {
            servers: own(&["10.96.0.10", "fe80::1%eth0"]),
            searches: own(&["ns.svc.cluster.local", "svc.cluster.local"]),
            options: own(&["ndots:5"]),
        };
        assert_eq!(
            resolv_conf(Some(&dns), "host").unwrap(),
            "search ns.svc.cluster.local svc.cluster.local\nnameserver 10.96.0.10\n\
             nameserver fe80::1%eth0\noptions ndots:5\n"
        );
        assert_eq!(resolv_conf(None, "host text\n").unwrap(), "host text\n");
        assert_eq!(resolv_conf(Some(&DnsConfig::default()), "host").unwrap(), "");
    }

    #[test]
    fn dns_entries_cannot_smuggle_lines() {
        let bad = [
            DnsConfig { servers: own(&["1.1.1.1\noptions x"]), ..Default::default() },
            DnsConfig { servers: own(&["dns.example"]), ..Default::default() },
            DnsConfig { searches: own(&["a\nnameserver 6.6.6.6"]), ..Default::default() },
            DnsConfig { options: own(&["a b"]), ..Default::default() },
        ];
        for dns in bad {
            assert!(resolv_conf(Some(&dns), "").is_err(), "{dns:?}");
        }
    }

    #[test]
    fn the_hosts_file_names_the_pod_at_each_address() {
        let text = hosts("web", &["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()]);
        assert!(text.ends_with("10.0.0.7\tweb\nfd00::7\tweb\n"), "{text}");
        assert!(hosts("web", &[]).ends_with("127.0.1.1\tweb\n"));
    }
}
