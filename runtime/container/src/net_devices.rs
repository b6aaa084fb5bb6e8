//! `linux.netDevices`: devices of the host that move into the container's network namespace.
//!
//! ```text
//! host ──set down, move and rename at once──▶ container ──permanent addresses, up──▶ in use
//!   ▲                                            │
//!   └──────────── only if `create` fails ────────┘
//! ```
//!
//! runtime-spec: what the device is (hardware address, MTU) stays, its permanent addresses of
//! global scope are carried over, and it is up in the container. A runtime must not fetch it
//! back from a container that has run: when the namespace ends, the kernel returns physical
//! devices to the host and destroys virtual ones. A container that never came to be is
//! another matter, and its devices go home with their names, addresses and state.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use oci_spec::runtime::{LinuxNamespaceType, LinuxNetDevice};
use pinion_sys::clone::setns;
use pinion_sys::netlink::{Address, Link, Route};

use crate::error::{Doing, Error, Failure, Result};
use crate::launch::open_namespace;
use crate::namespaces::Namespaces;

/// One device to move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetDevice {
    /// Its name in the runtime's network namespace.
    pub host: String,
    /// Its name in the container; one that ends in `%d` is completed by the kernel.
    pub container: String,
}

/// `IFNAMSIZ` without the terminating NUL.
const MAX_NAME: usize = 15;

/// Checks the configured devices; the result is in order of the hosts' names.
///
/// # Errors
/// [`Error::Invalid`] for impossible names, or without a network namespace to move them to.
pub fn plan(
    asked: Option<&HashMap<String, LinuxNetDevice>>,
    namespaces: &Namespaces,
    privileged: bool,
) -> Result<Vec<NetDevice>> {
    let Some(asked) = asked.filter(|devices| !devices.is_empty()) else { return Ok(Vec::new()) };
    if !namespaces.has(LinuxNamespaceType::Network) {
        return Err(invalid("unable to move network devices without a NET namespace"));
    }
    if !privileged {
        return Err(invalid("network devices are not supported for rootless containers"));
    }
    let mut devices = Vec::new();
    for (host, device) in asked {
        let container = device.name().clone().filter(|name| !name.is_empty());
        let container = container.unwrap_or_else(|| host.clone());
        let template = container.strip_suffix("%d");
        if !is_name(host) || !is_name(template.unwrap_or(&container)) && template != Some("") {
            return Err(invalid(format!(
                "linux.netDevices: {host:?} → {container:?} is not a valid network device name"
            )));
        }
        devices.push(NetDevice { host: host.clone(), container });
    }
    devices.sort_by(|a, b| a.host.cmp(&b.host));
    for (index, device) in devices.iter().enumerate() {
        let same = |other: &&NetDevice| other.container == device.container;
        if let Some(other) = devices[..index].iter().find(same)
            && !device.container.ends_with("%d")
        {
            return Err(invalid(format!(
                "linux.netDevices: {:?} and {:?} would both be called {:?}",
                other.host, device.host, device.container
            )));
        }
    }
    Ok(devices)
}

/// As the kernel's `dev_valid_name`, and without a template inside.
fn is_name(name: &str) -> bool {
    let bad = |c: char| c == '/' || c == ':' || c == '%' || c == '\0' || c.is_ascii_whitespace();
    !name.is_empty() && name.len() <= MAX_NAME && name != "." && name != ".." && !name.contains(bad)
}

/// Devices on their way into a container.
#[derive(Debug)]
pub struct Transfer {
    home: Route,
    away: Route,
    target: OwnedFd,
    moved: Vec<Moved>,
}

#[derive(Debug)]
struct Moved {
    host: String,
    /// Index in the container's namespace.
    index: i32,
    was_up: bool,
    addresses: Vec<Address>,
}

impl Transfer {
    /// Prepares to move devices from the caller's network namespace to `target`.
    ///
    /// # Errors
    /// As setns(2) and socket(2).
    pub fn to(target: OwnedFd) -> Result<Self, Failure> {
        let home = Route::open().doing(|| "open a netlink socket".into())?;
        let away = route_in(target.as_fd())?;
        Ok(Self { home, away, target, moved: Vec::new() })
    }

    /// Moves one device, with its permanent global addresses, and brings it up.
    ///
    /// # Errors
    /// Names the device; what was moved before can still be [taken back](Self::take_back).
    pub fn give(&mut self, device: &NetDevice) -> Result<(), Failure> {
        let named = |failure: Failure| Failure {
            what: format!(
                "unable to move network device {:?} into the container as {:?}: {}",
                device.host, device.container, failure.what
            ),
            ..failure
        };
        self.move_in(device).map_err(named)
    }

    fn move_in(&mut self, device: &NetDevice) -> Result<(), Failure> {
        let links = self.home.links().doing(|| "list network devices".into())?;
        let link = links
            .into_iter()
            .find(|link| link.name == device.host)
            .ok_or_else(|| Failure::refused("link not found on the runtime namespace"))?;
        let was_up = link.flags & libc::IFF_UP as u32 != 0;
        // Before the device goes down, for that takes its IPv6 addresses away.
        let mut addresses =
            self.home.addresses(link.index).doing(|| "read its addresses".into())?;
        addresses.retain(Address::is_permanent_global);
        let inside = self.away.links().doing(|| "list the container's devices".into())?;
        if inside.iter().any(|other| other.name == device.container) {
            return Err(Failure::refused("a device of that name exists in the container"));
        }
        let moved = self
            .home
            .set_up(link.index, false)
            .doing(|| "set it down".into())
            .and_then(|()| {
                let handed =
                    self.home.hand_over(link.index, self.target.as_fd(), &device.container);
                handed.doing(|| "change its network namespace".into())
            })
            .and_then(|()| arrived(&mut self.away, &inside, &device.container));
        match moved {
            Ok(index) => {
                let host = device.host.clone();
                self.moved.push(Moved { host, index, was_up, addresses: addresses.clone() });
                settle(&mut self.away, index, &addresses, true)
            }
            Err(failure) => {
                // It is still here, as it was but for what its being down has cost it.
                let _ = settle(&mut self.home, link.index, &addresses, was_up);
                Err(failure)
            }
        }
    }

    /// Brings every device home, for a container that could not be created.
    ///
    /// # Errors
    /// The texts of what failed; all devices are tried.
    pub fn take_back(mut self) -> Result<(), Vec<String>> {
        let mut failures = Vec::new();
        for moved in std::mem::take(&mut self.moved) {
            if let Err(failure) = self.bring_home(&moved) {
                failures.push(format!(
                    "bring network device {:?} back: {}",
                    moved.host,
                    crate::error::chain(&failure)
                ));
            }
        }
        if failures.is_empty() { Ok(()) } else { Err(failures) }
    }

    fn bring_home(&mut self, moved: &Moved) -> Result<(), Failure> {
        let here = open_namespace("/proc/self/ns/net".as_ref())?;
        let before = self.home.links().doing(|| "list network devices".into())?;
        self.away.set_up(moved.index, false).doing(|| "set it down".into())?;
        self.away
            .hand_over(moved.index, here.as_fd(), &moved.host)
            .doing(|| "change its network namespace".into())?;
        let index = arrived(&mut self.home, &before, &moved.host)?;
        settle(&mut self.home, index, &moved.addresses, moved.was_up)
    }
}

/// The index of the device that is new in a namespace. The kernel keeps the old index only
/// where it is free.
fn arrived(route: &mut Route, before: &[Link], name: &str) -> Result<i32, Failure> {
    let links = route.links().doing(|| "list network devices".into())?;
    let is_new = |link: &&Link| before.iter().all(|old| old.index != link.index);
    let by_name = links.iter().find(|link| link.name == name);
    match by_name.or_else(|| links.iter().find(is_new)) {
        Some(link) => Ok(link.index),
        None => Err(Failure::refused("it has not arrived in the other namespace")),
    }
}

/// Gives a device the addresses it lacks and its state.
fn settle(route: &mut Route, index: i32, addresses: &[Address], up: bool) -> Result<(), Failure> {
    for address in addresses {
        match route.add_address(index, address) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            other => other.doing(|| "add one of its addresses".into())?,
        }
    }
    if up { route.set_up(index, true).doing(|| "set it up".into()) } else { Ok(()) }
}

/// A netlink socket of the network namespace `target`; the caller stays in its own.
fn route_in(target: BorrowedFd<'_>) -> Result<Route, Failure> {
    let home = open_namespace("/proc/self/ns/net".as_ref())?;
    let network = libc::CLONE_NEWNET as u64;
    setns(target, network).doing(|| "visit the container's network namespace".into())?;
    let route = Route::open();
    // Staying there would have every later step act on the wrong network.
    setns(home.as_fd(), network).doing(|| "return from the container's network".into())?;
    route.doing(|| "open a netlink socket in the container's network namespace".into())
}

fn invalid(text: impl Into<String>) -> Error {
    Error::Invalid(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices(json: &str) -> Result<Vec<NetDevice>> {
        let linux = serde_json::from_str(r#"{"namespaces":[{"type":"network"}]}"#).unwrap();
        let namespaces = Namespaces::plan(&linux).unwrap();
        plan(Some(&serde_json::from_str(json).unwrap()), &namespaces, true)
    }

    #[test]
    fn a_device_keeps_its_name_unless_it_gets_another() {
        let planned = devices(r#"{"eth1":{"name":"net%d"},"eth0":{}}"#).unwrap();
        let names: Vec<_> =
            planned.iter().map(|d| (d.host.as_str(), d.container.as_str())).collect();
        assert_eq!(names, [("eth0", "eth0"), ("eth1", "net%d")]);
    }

    #[test]
    fn impossible_and_doubled_names_are_refused() {
        for json in [
            r#"{"":{}}"#,
            r#"{"a/b":{}}"#,
            r#"{"a b":{}}"#,
            r#"{"eth0":{"name":"0123456789abcdef"}}"#,
            r#"{"eth0":{"name":"a%db"}}"#,
            r#"{"eth0":{"name":"a%s"}}"#,
            r#"{"eth0":{"name":".."}}"#,
            r#"{"eth0":{"name":"x"},"eth1":{"name":"x"}}"#,
        ] {
            assert!(devices(json).is_err(), "{json}");
        }
        assert!(devices(r#"{"eth0":{"name":"x%d"},"eth1":{"name":"x%d"}}"#).is_ok());
    }

    #[test]
    fn there_must_be_somewhere_to_move_to_and_the_right_to_do_it() {
        let asked = serde_json::from_str(r#"{"eth0":{}}"#).unwrap();
        assert!(plan(Some(&asked), &Namespaces::default(), true).is_err());
        let linux = serde_json::from_str(r#"{"namespaces":[{"type":"network"}]}"#).unwrap();
        let namespaces = Namespaces::plan(&linux).unwrap();
        assert!(plan(Some(&asked), &namespaces, false).is_err());
    }
}
