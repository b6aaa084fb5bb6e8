//! The common chain without plugin processes: `bridge` or `ptp`, `host-local`, `portmap`.
//!
//! ```text
//!  add   lease ─▶ bridge ─▶ veth pair ─┬▶ (in the pod) addresses, up, routes ─┬▶ port up ─▶ result
//!                                      └▶ gateway, forwarding, nat rules ─────┘
//!  del   pod's end down, addresses gone ─▶ nat rules ─▶ lease ─▶ pair deleted behind the scenes
//! ```
//!
//! Same configuration, same leases, same rules, same result as the plugins, so that a pod
//! attached by the one can be detached by the other. What is done here is decided by
//! [`config::plan`] for a chain as a whole. A pod start spends about 30 ms in the plugins'
//! processes, and a stop 100.
//!
//! Deleting a veth pair takes the kernel some 20 ms of waiting, so `del` leaves the pair
//! without address and down, and the [`reaper`] deletes it if the end of the pod's namespace
//! has not done so before.

pub(crate) mod config;
mod firewall;
mod host_local;
mod iptables;
mod link;
pub(crate) mod reaper;
mod sysctl;

use crate::cni::{Dns, Interface, IpNet, PluginResult, Route, Version};
use crate::namespaces;
use crate::netlink::route::{self, VethPair};
use crate::netlink::{KeptSocket, Socket};
use crate::pod::PortMapping;
use config::{HostLocal, Link, Plan, Portmap};
use host_local::Leases;
pub(crate) use link::host_name;
use link::{Address, PodSide};
use reaper::Reaper;
use serde_json::{Map, Value, json};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;

/// A step that failed.
#[derive(Debug)]
pub(crate) struct Failed {
    /// What was tried, with its arguments.
    pub(crate) step: String,
    /// What the kernel said.
    pub(crate) source: io::Error,
}

/// Names the step whose error this is.
pub(crate) trait Step<T> {
    /// The error with what was tried.
    fn step(self, what: impl FnOnce() -> String) -> Result<T, Failed>;
}

impl<T> Step<T> for io::Result<T> {
    fn step(self, what: impl FnOnce() -> String) -> Result<T, Failed> {
        self.map_err(|source| Failed { step: what(), source })
    }
}

/// One attachment: what a plugin learns from its environment and standard input.
#[derive(Debug)]
pub(crate) struct Attach<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) version: Version,
    pub(crate) network: &'a str,
    pub(crate) pod: &'a str,
    pub(crate) interface: &'a str,
    /// Empty when the namespace is gone.
    pub(crate) netns: &'a Path,
    pub(crate) capabilities: &'a Map<String, Value>,
    /// Addresses the pod is known to have, for `del` and `check`.
    pub(crate) known: &'a [IpAddr],
}

impl Attach<'_> {
    fn ipam(&self) -> Result<HostLocal, Failed> {
        let ranges = self.capabilities.get("ipRanges");
        let ipam = self.plan.ipam.with_node_ranges(ranges).map_err(io::Error::other);
        ipam.step(|| "read the address ranges".to_owned())
    }

    fn lease_owner(&self) -> host_local::Owner<'_> {
        host_local::Owner { pod: self.pod, interface: self.interface }
    }

    fn rule_owner(&self) -> firewall::Owner<'_> {
        firewall::Owner { network: self.network, pod: self.pod }
    }

    fn host_name(&self) -> String {
        link::host_name(self.network, self.pod, self.interface)
    }

    /// The port mappings the portmap plugin would be given.
    fn mappings(&self) -> Result<Option<(&Portmap, Vec<PortMapping>)>, Failed> {
        let Some(portmap) = self.plan.portmap.as_ref().filter(|portmap| portmap.wanted) else {
            return Ok(None);
        };
        let Some(value) = self.capabilities.get("portMappings") else { return Ok(None) };
        let mappings: Vec<PortMapping> = serde_json::from_value(value.clone())
            .map_err(io::Error::other)
            .step(|| "read the port mappings".to_owned())?;
        Ok((!mappings.is_empty()).then_some((portmap, mappings)))
    }

    /// Attaches the pod; the result as the last plugin would print it. Blocks.
    ///
    /// # Errors
    /// The step that failed. What was done stays and is taken back by [`Attach::del`].
    pub(crate) fn add(&self, rules: &KeptSocket) -> Result<Value, Failed> {
        let plan = self.plan;
        let netns = namespaces::open(self.netns)
            .step(|| format!("open network namespace {}", self.netns.display()))?;
        let ipam = self.ipam()?;
        let leases = {
            let leases = Leases::lock(&ipam, self.network)
                .step(|| format!("lock leases in {}", ipam.data_dir.display()))?;
            leases.take(&ipam, self.lease_owner()).step(|| "allocate an address".to_owned())?
        };
        let mut host = Socket::route().step(|| "open netlink".to_owned())?;
        let bridge = match &plan.link {
            Link::Bridge(bridge) => {
                Some((bridge, link::ensure_bridge(&mut host, bridge, plan.mtu)?))
            }
            Link::PointToPoint => None,
        };
        let (addresses, routes) = match &bridge {
            Some((bridge, _)) => link::bridge_addresses(bridge, &leases, &ipam.routes),
            None => (
                leases
                    .iter()
                    .map(|l| Address { net: l.address, gateway: Some(l.gateway) })
                    .collect(),
                ipam.routes.iter().map(|r| Route { dst: r.dst, gw: r.gw }).collect(),
            ),
        };
        let mut events = Socket::link_events().step(|| "open netlink for events".to_owned())?;
        let name = self.host_name();
        let pair = VethPair {
            host: &name,
            pod: self.interface,
            namespace: netns.as_fd(),
            mtu: plan.mtu,
            master: bridge.as_ref().map_or(0, |(_, link)| link.index),
        };
        let end = link::make_pair(&mut host, pair)?;
        let pod = PodSide {
            interface: self.interface,
            addresses: &addresses,
            routes: &routes,
            detection: bridge.as_ref().map(|(bridge, _)| bridge.duplicate_detection),
            point_to_point: bridge.is_none(),
        };
        // The pod's side needs a thread of its own anyway; the node's goes on meanwhile.
        let (inside, outside) = std::thread::scope(|scope| {
            let inside = scope.spawn(|| link::configure_pod(&netns, pod));
            let outside = self.node_side((&mut host, rules), bridge.as_ref(), &end, &addresses);
            let inside = inside.join().unwrap_or_else(|_panic| {
                Err(io::Error::other("the thread ended unexpectedly"))
                    .step(|| "configure the pod's end".to_owned())
            });
            (inside, outside)
        });
        let (inside, ()) = (inside?, outside?);
        let mut interfaces = Vec::new();
        if let Some((bridge, link)) = &bridge {
            link::await_port(&mut host, &mut events, &end)?;
            let link =
                host.link_by_index(link.index).step(|| format!("look up {}", bridge.name))?;
            let mac = link.map(|link| link.mac_text()).unwrap_or_default();
            interfaces.push(Interface { name: bridge.name.clone(), mac, ..Default::default() });
        }
        interfaces.push(Interface { name, mac: end.mac_text(), ..Default::default() });
        interfaces.push(Interface {
            name: self.interface.to_owned(),
            mac: inside.mac_text(),
            sandbox: self.netns.to_string_lossy().into_owned(),
        });
        Ok(result(self.version, &interfaces, &addresses, &routes, &plan.dns))
    }

    /// Gateway, forwarding and nat rules.
    fn node_side(
        &self,
        (host, rules): (&mut Socket, &KeptSocket),
        bridge: Option<&(&config::Bridge, route::Link)>,
        end: &route::Link,
        addresses: &[Address],
    ) -> Result<(), Failed> {
        let families = |v4: bool| addresses.iter().filter(move |a| a.net.is_ipv4() == v4);
        let forward = match bridge {
            Some((bridge, link)) => {
                if bridge.hairpin {
                    host.set_hairpin(end.index).step(|| format!("let {} hairpin", end.name))?;
                }
                if bridge.is_gateway {
                    for address in addresses {
                        let gateway = link::gateway_of(*address);
                        link::ensure_gateway(host, bridge, link.index, gateway)?;
                    }
                }
                bridge.is_gateway
            }
            None => {
                link::configure_host_end(host, end.index, addresses)?;
                true
            }
        };
        for v4 in [true, false] {
            if forward && families(v4).next().is_some() {
                sysctl::enable_forwarding(v4).step(|| "enable forwarding".to_owned())?;
            }
        }
        let mappings = self.mappings()?;
        if !self.plan.masquerade && mappings.is_none() {
            return Ok(());
        }
        for v4 in [true, false] {
            let nets: Vec<IpNet> = families(v4).map(|address| address.net).collect();
            let Some(first) = nets.first() else { continue };
            let masquerade = if self.plan.masquerade { nets.as_slice() } else { &[] };
            let ports =
                mappings.as_ref().map(|(portmap, maps)| (*portmap, *first, maps.as_slice()));
            let wanted = firewall::Wanted { masquerade, ports };
            rules
                .run(|socket| firewall::set(socket, v4, self.rule_owner(), wanted))
                .step(|| format!("write nat rules for {first}"))?;
            if let Some((portmap, mappings)) = &mappings {
                rules
                    .run(|socket| firewall::forget_flows(socket, v4, mappings))
                    .step(|| "forget old UDP flows".to_owned())?;
                if v4 && portmap.snat {
                    route_localhost(host, first.ip)?;
                }
            }
        }
        Ok(())
    }

    /// Detaches the pod. Every step is tried; what failed is listed. Blocks.
    pub(crate) fn del(&self, reaper: &Reaper, rules: &KeptSocket) -> Vec<Failed> {
        let mut failures = Vec::new();
        let mut end = 0;
        if !self.netns.as_os_str().is_empty() {
            let silenced = namespaces::open(self.netns)
                .and_then(|netns| link::silence(&netns, self.interface))
                .step(|| format!("detach {} in {}", self.interface, self.netns.display()));
            match silenced {
                Ok(index) => end = index,
                Err(failed) => failures.push(failed),
            }
        }
        failures.extend(self.delete_pair(reaper, end).err());
        if self.plan.masquerade || self.plan.portmap.is_some() {
            let cleared = rules.run(|socket| {
                let v4 = firewall::clear(socket, true, self.rule_owner());
                v4.and(firewall::clear(socket, false, self.rule_owner()))
            });
            failures.extend(cleared.step(|| "delete nat rules".to_owned()).err());
        }
        let released = self.ipam().and_then(|ipam| {
            Leases::lock(&ipam, self.network)
                .and_then(|leases| leases.release(self.lease_owner(), self.known))
                .step(|| format!("give back leases in {}", ipam.data_dir.display()))
        });
        failures.extend(released.err());
        failures
    }

    /// `end`: the node's end as the pod's end named it; else it is looked for by its name.
    fn delete_pair(&self, reaper: &Reaper, end: u32) -> Result<(), Failed> {
        let index = if end == 0 {
            let found = Socket::route().and_then(|mut socket| socket.link(&self.host_name()));
            let found = found.step(|| format!("look up {}", self.host_name()))?;
            found.filter(|link| link.kind == "veth").map_or(0, |link| link.index)
        } else {
            end
        };
        if index != 0 {
            reaper.delete(index);
        }
        Ok(())
    }

    /// What is no longer as `add` made it; nothing if all is well. Blocks.
    ///
    /// # Errors
    /// What could not be looked at.
    pub(crate) fn check(&self, expected: &PluginResult) -> Result<Option<String>, Failed> {
        let netns = namespaces::open(self.netns)
            .step(|| format!("open network namespace {}", self.netns.display()))?;
        let name = self.interface;
        let wrong = namespaces::within(netns.as_fd(), || {
            let mut socket = Socket::route()?;
            let Some(found) = socket.link(name)? else {
                return Ok(Some(format!("interface {name} is not there")));
            };
            if found.flags & route::IFF_UP == 0 {
                return Ok(Some(format!("interface {name} is down")));
            }
            let addresses = socket.addresses(found.index)?;
            let own = expected.ips.iter().map(|ip| ip.address);
            let mut own = own.filter(|net| !addresses.iter().any(|(there, _)| there == net));
            Ok(own.next().map(|net| format!("interface {name} has lost the address {net}")))
        })
        .step(|| format!("look at {name}"))?;
        if wrong.is_some() {
            return Ok(wrong);
        }
        if let Some(wrong) = self.check_node(expected)? {
            return Ok(Some(wrong));
        }
        let ipam = self.ipam()?;
        let held = Leases::lock(&ipam, self.network)
            .and_then(|leases| leases.held(self.lease_owner()))
            .step(|| format!("read leases in {}", ipam.data_dir.display()))?;
        Ok(held.is_empty().then(|| "the pod's address is no longer leased to it".to_owned()))
    }

    fn check_node(&self, expected: &PluginResult) -> Result<Option<String>, Failed> {
        let step = || "look at the node's end".to_owned();
        let mut host = Socket::route().step(step)?;
        if let Link::Bridge(bridge) = &self.plan.link {
            let Some(found) = host.link(&bridge.name).step(step)? else {
                return Ok(Some(format!("bridge {} is not there", bridge.name)));
            };
            let own = |link: &&route::Link| {
                expected.interfaces.iter().any(|i| i.sandbox.is_empty() && i.name == link.name)
            };
            let ports = host.links().step(step)?;
            if !ports.iter().any(|link| link.master == found.index && own(&link)) {
                return Ok(Some(format!("the pod is no longer connected to {}", bridge.name)));
            }
        }
        let ports = self.mappings()?.is_some();
        let mut socket = Socket::netfilter().step(step)?;
        for v4 in [true, false] {
            if expected.ips.iter().any(|ip| ip.address.is_ipv4() == v4) {
                let (owner, masquerade) = (self.rule_owner(), self.plan.masquerade);
                let missing = firewall::missing(&mut socket, v4, owner, masquerade, ports);
                if let Some(missing) = missing.step(|| "look at the nat rules".to_owned())? {
                    return Ok(Some(missing));
                }
            }
        }
        Ok(None)
    }
}

/// Gives back leases of the network whose owner is not among `valid` (pod and interface).
pub(crate) fn collect(
    plan: &Plan,
    network: &str,
    valid: &[(String, String)],
) -> Result<(), Failed> {
    let step = || format!("collect leases in {}", plan.ipam.data_dir.display());
    let leases = Leases::lock(&plan.ipam, network).step(step)?;
    leases.collect(valid).step(step)
}

/// Packets from 127/8 may go to pods behind the link by which the pod is reached.
fn route_localhost(host: &mut Socket, pod: IpAddr) -> Result<(), Failed> {
    let step = || format!("let 127.0.0.1 reach {pod}");
    let Some(index) = host.link_towards(pod).step(step)? else { return Ok(()) };
    let Some(link) = host.link_by_index(index).step(step)? else { return Ok(()) };
    sysctl::ensure("ipv4", &link.name, "route_localnet", "1").step(step)
}

/// The result in the words of the version.
fn result(
    version: Version,
    interfaces: &[Interface],
    addresses: &[Address],
    routes: &[Route],
    dns: &Dns,
) -> Value {
    let pod = interfaces.len().saturating_sub(1);
    let ips: Vec<_> = addresses
        .iter()
        .map(|address| {
            let mut ip = json!({"interface": pod, "address": address.net});
            if let (Some(gateway), Some(object)) = (address.gateway, ip.as_object_mut()) {
                object.insert("gateway".to_owned(), json!(gateway));
            }
            if let (true, Some(object)) = (version < Version::V1_0_0, ip.as_object_mut()) {
                let family = if address.net.is_ipv4() { "4" } else { "6" };
                object.insert("version".to_owned(), json!(family));
            }
            ip
        })
        .collect();
    let mut value = json!({
        "cniVersion": version, "interfaces": interfaces, "ips": ips, "dns": dns,
    });
    if let (false, Some(object)) = (routes.is_empty(), value.as_object_mut()) {
        object.insert("routes".to_owned(), json!(routes));
    }
    value
}
