//! PCI functions handed to user space through `vfio-pci`, and given back.
//!
//! ```text
//!   admit    facts → Binding: what the function is now          pure, may refuse
//!   bind     driver_override = vfio-pci · unbind · probe · read back
//!   restore  driver_override as before · unbind · probe · name, MAC and VLAN as before
//! ```
//!
//! The caller stores the [`Binding`]s before [`bind`] and keeps them until [`restore`] has
//! succeeded; both may be repeated from any point at which they were interrupted. The kernel
//! itself resets a function when VFIO opens and closes it, so nothing of one container is
//! seen by the next.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use pinion_placement::{Reason, Refusal, TermName};
use serde::{Deserialize, Serialize};

use crate::facts::{self, devices_dir, link_name};
use crate::netlink::{self, VfIdentity};
use crate::{Address, Function};

const DRIVER: &str = "vfio-pci";
/// How long a driver may take to make its interface again.
const INTERFACE_LIMIT: Duration = Duration::from_secs(5);

/// A function and what it was before it was handed over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// The function.
    pub address: Address,
    /// Its IOMMU group.
    pub group: u32,
    /// The driver it had.
    #[serde(default)]
    pub driver: Option<String>,
    /// Its `driver_override`.
    #[serde(default)]
    pub driver_override: Option<String>,
    /// Its network interface: name and MAC.
    #[serde(default)]
    pub interface: Option<(String, String)>,
    /// The physical function and the number of this virtual one.
    #[serde(default)]
    pub parent: Option<(Address, u32)>,
    /// MAC, VLAN and priority that the parent had given it.
    #[serde(default)]
    identity: Option<VfIdentity>,
}

/// Which functions may be handed over.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Addresses, or vendor and device such as `8086:10ca`.
    pub entries: Vec<String>,
}

impl Allowed {
    fn has(&self, function: &Function) -> bool {
        let is = |entry: &String| {
            entry.eq_ignore_ascii_case(function.address.as_str())
                || entry.eq_ignore_ascii_case(&function.id)
        };
        self.entries.iter().any(is)
    }
}

/// Looks at the functions and refuses what must not be handed over: what is not allowed, what
/// the host or somebody else uses, what is not a whole IOMMU group.
pub fn admit(root: &Path, wanted: &[Address], allowed: &Allowed) -> Result<Vec<Binding>, Refusal> {
    let unreadable =
        |error: facts::FactsError| refuse(Reason::Unreadable, format!("{error}: {}", error.source));
    if !root.join("sys/bus/pci/drivers").join(DRIVER).exists() {
        let detail =
            "the driver vfio-pci is not loaded; `modprobe vfio-pci`, and boot with an IOMMU";
        return Err(refuse(Reason::DeviceAbsent, detail));
    }
    let mut bindings = Vec::new();
    for address in wanted {
        let Some(function) = facts::function(root, address).map_err(unreadable)? else {
            let detail = format!("{address}: the machine has no such PCI function");
            return Err(refuse(Reason::DeviceAbsent, detail));
        };
        let Some(group) = function.group else {
            let detail = format!(
                "{address} is in no IOMMU group; switch the IOMMU on (intel_iommu=on, amd_iommu=on)"
            );
            return Err(refuse(Reason::DeviceAbsent, detail));
        };
        let members = facts::group_members(root, group).map_err(unreadable)?;
        admissible(&function, group, &members, wanted, allowed)?;
        let up = function.interfaces.iter().find(|name| is_up(root, address, name));
        if let Some(name) = up {
            let detail = format!("{address}: the host uses it, interface {name} is up");
            return Err(refuse(Reason::DeviceInUse, detail));
        }
        bindings.push(binding(root, &function, group));
    }
    Ok(bindings)
}

fn refuse(reason: Reason, detail: impl Into<String>) -> Refusal {
    Refusal::new(TermName::Devices, reason, detail)
}

fn admissible(
    function: &Function,
    group: u32,
    members: &[Function],
    wanted: &[Address],
    allowed: &Allowed,
) -> Result<(), Refusal> {
    let address = &function.address;
    if !allowed.has(function) {
        let detail = format!(
            "{address} ({}) may not be handed to containers; list it or its id in [device] \
             vfio_allow",
            function.id
        );
        return Err(refuse(Reason::DeviceNotAllowed, detail));
    }
    if function.is_bridge() {
        return Err(refuse(Reason::DeviceNotAllowed, format!("{address} is a bridge")));
    }
    if !function.virtfns.is_empty() {
        let detail = format!(
            "{address} has {} virtual functions, which would be lost with its driver",
            function.virtfns.len()
        );
        return Err(refuse(Reason::DeviceInUse, detail));
    }
    let driver = function.driver.as_deref();
    if function.class.starts_with("01") && driver.is_some() && !function.on_vfio() {
        let detail = format!(
            "{address} is a storage controller that the host's driver {} has; unbind it first",
            driver.unwrap_or_default()
        );
        return Err(refuse(Reason::DeviceInUse, detail));
    }
    let network = function.class.starts_with("02") && driver.is_some() && !function.on_vfio();
    if network && function.interfaces.is_empty() {
        let detail = format!(
            "{address}: its interface is not in the host's network namespace, so somebody has it"
        );
        return Err(refuse(Reason::DeviceInUse, detail));
    }
    let left: Vec<String> = members
        .iter()
        .filter(|other| !other.is_bridge() && !wanted.contains(&other.address))
        .map(|other| other.address.to_string())
        .collect();
    if left.is_empty() {
        return Ok(());
    }
    let detail = format!(
        "{address} is in IOMMU group {group} with {}; a group is handed over as a whole, so ask \
         for all of it",
        left.join(", ")
    );
    Err(refuse(Reason::PartialIommuGroup, detail))
}

/// IFF_UP of an interface's flags.
fn is_up(root: &Path, address: &Address, interface: &str) -> bool {
    let path = devices_dir(root).join(address.as_str()).join("net").join(interface).join("flags");
    let flags = fs::read_to_string(path).unwrap_or_default();
    u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).is_ok_and(|flags| flags & 1 == 1)
}

fn binding(root: &Path, function: &Function, group: u32) -> Binding {
    let dir = devices_dir(root).join(function.address.as_str());
    let interface = function.interfaces.first().map(|name| {
        let mac = fs::read_to_string(dir.join("net").join(name).join("address"));
        (name.clone(), mac.unwrap_or_default().trim().to_owned())
    });
    let parent = function.physfn.clone().zip(function.vf);
    let identity = parent.as_ref().and_then(|(address, vf)| {
        let index = parent_index(root, address)?;
        netlink::vf_identity(index, *vf).ok()?
    });
    Binding {
        address: function.address.clone(),
        group,
        driver: function.driver.clone().filter(|name| name != DRIVER),
        driver_override: function.driver_override.clone().filter(|name| name != DRIVER),
        interface,
        parent,
        identity,
    }
}

/// The index of a physical function's interface, if it is in this namespace.
fn parent_index(root: &Path, parent: &Address) -> Option<u32> {
    let net = devices_dir(root).join(parent.as_str()).join("net");
    let name = facts::names(&net).ok()?.into_iter().next()?;
    fs::read_to_string(net.join(name).join("ifindex")).ok()?.trim().parse().ok()
}

/// A write to sysfs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Write {
    path: String,
    value: String,
}

/// The writes that take a function from its present driver to another, or to none. Pure.
fn rebind(function: &Function, to: Option<&str>, overriding: Option<&str>) -> Vec<Write> {
    let address = function.address.as_str();
    let dir = format!("sys/bus/pci/devices/{address}");
    let write = |path: String, value: &str| Write { path, value: value.to_owned() };
    let mut writes = Vec::new();
    if function.driver_override.as_deref() != overriding {
        // A line end alone clears it.
        writes.push(write(format!("{dir}/driver_override"), overriding.unwrap_or("\n")));
    }
    if function.driver.as_deref() != to {
        if function.driver.is_some() {
            writes.push(write(format!("{dir}/driver/unbind"), address));
        }
        if to.is_some() {
            writes.push(write("sys/bus/pci/drivers_probe".into(), address));
        }
    }
    writes
}

fn carry_out(root: &Path, writes: &[Write]) -> io::Result<()> {
    for Write { path, value } in writes {
        let path = root.join(path);
        fs::write(&path, value).map_err(|error| {
            let kind = error.kind();
            io::Error::new(kind, format!("write({}, {value:?}): {error}", path.display()))
        })?;
    }
    Ok(())
}

/// Binds a function to `vfio-pci` and reads back that it is.
pub fn bind(root: &Path, binding: &Binding) -> io::Result<()> {
    let function = present(root, &binding.address)?;
    let function = function.ok_or_else(|| gone(&binding.address))?;
    carry_out(root, &rebind(&function, Some(DRIVER), Some(DRIVER)))?;
    match present(root, &binding.address)?.and_then(|function| function.driver) {
        Some(driver) if driver == DRIVER => Ok(()),
        other => Err(io::Error::other(format!(
            "{} was handed to vfio-pci, and the kernel has {} for it",
            binding.address,
            other.as_deref().unwrap_or("no driver")
        ))),
    }
}

/// Gives a function back to the driver it had. A function that is gone, or that somebody else
/// has bound since, is left alone. What of its identity could not be restored is an error
/// after the driver is back.
pub fn restore(root: &Path, binding: &Binding) -> io::Result<()> {
    let Some(function) = present(root, &binding.address)? else { return Ok(()) };
    let ours = function.driver.as_deref().is_none_or(|driver| driver == DRIVER);
    let driver = binding.driver.as_deref();
    if !ours && function.driver.as_deref() != driver {
        return Ok(());
    }
    carry_out(root, &rebind(&function, driver, binding.driver_override.as_deref()))?;
    let now = present(root, &binding.address)?.and_then(|function| function.driver);
    if now.as_deref() != driver {
        return Err(io::Error::other(format!(
            "{} was given back to {}, and the kernel has {} for it",
            binding.address,
            driver.unwrap_or("no driver"),
            now.as_deref().unwrap_or("no driver")
        )));
    }
    identity(root, binding)
}

fn present(root: &Path, address: &Address) -> io::Result<Option<Function>> {
    facts::function(root, address)
        .map_err(|error| io::Error::new(error.source.kind(), format!("{error}: {}", error.source)))
}

fn gone(address: &Address) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{address} is no longer there"))
}

/// MAC and VLAN at the parent first: the driver takes its interface's MAC from there.
fn identity(root: &Path, binding: &Binding) -> io::Result<()> {
    let named = |what: &str, error: &io::Error| {
        io::Error::new(error.kind(), format!("{}: {what}: {error}", binding.address))
    };
    if let (Some((parent, vf)), Some(wanted)) = (&binding.parent, &binding.identity)
        && let Some(index) = parent_index(root, parent)
    {
        let what = "MAC and VLAN at its parent";
        let now = netlink::vf_identity(index, *vf).map_err(|error| named(what, &error))?;
        if now.as_ref() != Some(wanted) {
            netlink::set_vf_identity(index, *vf, wanted).map_err(|error| named(what, &error))?;
        }
    }
    let Some((name, mac)) = &binding.interface else { return Ok(()) };
    let net = devices_dir(root).join(binding.address.as_str()).join("net");
    let Some(found) = wait_for_interface(&net) else {
        return Err(named("its interface", &io::Error::other("the driver did not make it again")));
    };
    let read = |file: &str| {
        fs::read_to_string(net.join(&found).join(file)).map(|text| text.trim().to_owned())
    };
    let index: u32 = read("ifindex")?.parse().map_err(io::Error::other)?;
    if read("address")? != *mac
        && let Some(mac) = parse_mac(mac)
    {
        netlink::set_mac(index, mac).map_err(|error| named("MAC of its interface", &error))?;
    }
    if found != *name {
        let what = format!("rename interface {found} to {name}");
        netlink::rename(index, name).map_err(|error| named(&what, &error))?;
    }
    Ok(())
}

fn wait_for_interface(net: &Path) -> Option<String> {
    let began = Instant::now();
    loop {
        if let Some(name) = facts::names(net).ok()?.into_iter().next() {
            return Some(name);
        }
        if began.elapsed() > INTERFACE_LIMIT {
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> =
        text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    bytes?.try_into().ok()
}

/// The character device of a group, once a function of it is bound.
#[must_use]
pub fn group_node(group: u32) -> String {
    format!("/dev/vfio/{group}")
}

/// Whether the kernel binds this function to user space now.
#[must_use]
pub fn is_bound(root: &Path, address: &Address) -> bool {
    let driver = devices_dir(root).join(address.as_str()).join("driver");
    link_name(&driver).is_some_and(|name| name == DRIVER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testtree::{CARD, CARD_TWIN, PF, Tree, VF0, VF1, telco};

    fn ask(tree: &Tree, wanted: &[&str], allowed: &[&str]) -> Result<Vec<Binding>, Refusal> {
        let wanted: Vec<Address> = wanted.iter().map(|text| text.parse().unwrap()).collect();
        let entries = allowed.iter().map(|entry| (*entry).to_owned()).collect();
        admit(tree.root(), &wanted, &Allowed { entries })
    }

    fn reason(answer: Result<Vec<Binding>, Refusal>) -> Reason {
        answer.unwrap_err().reason
    }

    #[test]
    fn what_a_function_was_is_recorded() {
        let bindings = ask(&telco(), &[VF1], &["8086:10CA"]).unwrap();
        assert_eq!(bindings[0].group, 12);
        assert_eq!(bindings[0].driver.as_deref(), Some("igbvf"));
        let interface = bindings[0].interface.clone().unwrap();
        assert_eq!(interface, ("eth2".to_owned(), "02:00:00:00:00:01".to_owned()));
        assert_eq!(bindings[0].parent, Some((PF.parse().unwrap(), 1)));
        let json = serde_json::to_string(&bindings).unwrap();
        assert_eq!(serde_json::from_str::<Vec<Binding>>(&json).unwrap(), bindings);
    }

    #[test]
    fn what_must_stay_with_the_host_is_refused() {
        let tree = telco();
        assert_eq!(reason(ask(&tree, &[VF0], &[])), Reason::DeviceNotAllowed);
        assert_eq!(reason(ask(&tree, &[PF], &[PF])), Reason::DeviceInUse);
        assert_eq!(reason(ask(&tree, &["0000:ff:00.0"], &[VF0])), Reason::DeviceAbsent);
        tree.file(&format!("sys/devices/pci/{VF0}/net/eth1/flags"), "0x1003");
        let refusal = ask(&tree, &[VF0], &[VF0]).unwrap_err();
        assert!(refusal.detail.contains("eth1 is up"), "{refusal}");
        std::fs::remove_dir_all(tree.root().join(format!("sys/devices/pci/{VF0}/net"))).unwrap();
        let refusal = ask(&tree, &[VF0], &[VF0]).unwrap_err();
        assert!(refusal.detail.contains("network namespace"), "{refusal}");
        tree.file(&format!("sys/devices/pci/{CARD}/class"), "0x010802");
        tree.bind(CARD, Some("nvme"));
        assert_eq!(reason(ask(&tree, &[CARD], &["10ee:5000"])), Reason::DeviceInUse);
    }

    #[test]
    fn groups_are_handed_over_whole() {
        let tree = telco();
        let refusal = ask(&tree, &[CARD], &["10ee:5000"]).unwrap_err();
        assert_eq!(refusal.reason, Reason::PartialIommuGroup);
        assert!(refusal.detail.contains(CARD_TWIN), "{refusal}");
        assert_eq!(ask(&tree, &[CARD, CARD_TWIN], &["10ee:5000"]).unwrap().len(), 2);
    }

    #[test]
    fn rebinding_writes_only_what_differs() {
        let tree = telco();
        let look = || facts::function(tree.root(), &VF0.parse().unwrap()).unwrap().unwrap();
        let text = |writes: Vec<Write>| -> Vec<String> {
            let short = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
            writes.iter().map(|w| format!("{} {}", short(&w.path), w.value.trim())).collect()
        };
        let to_vfio = text(rebind(&look(), Some(DRIVER), Some(DRIVER)));
        let probe = format!("drivers_probe {VF0}");
        let unbind = format!("unbind {VF0}");
        assert_eq!(to_vfio, ["driver_override vfio-pci", unbind.as_str(), probe.as_str()]);
        tree.bind(VF0, Some(DRIVER));
        tree.file(&format!("sys/devices/pci/{VF0}/driver_override"), DRIVER);
        assert!(rebind(&look(), Some(DRIVER), Some(DRIVER)).is_empty(), "done already");
        let back = text(rebind(&look(), Some("igbvf"), None));
        assert_eq!(back, ["driver_override ", unbind.as_str(), probe.as_str()]);
        assert_eq!(text(rebind(&look(), None, None)), ["driver_override ", unbind.as_str()]);
    }

    #[test]
    fn what_others_have_bound_since_is_left_alone() {
        let tree = telco();
        let binding = ask(&tree, &[VF0], &[VF0]).unwrap().remove(0);
        tree.bind(VF0, Some("somebody"));
        restore(tree.root(), &binding).unwrap();
        assert!(!is_bound(tree.root(), &binding.address));
        let gone = Binding { address: "0000:ff:00.0".parse().unwrap(), ..binding };
        restore(tree.root(), &gone).unwrap();
        assert!(bind(tree.root(), &gone).unwrap_err().to_string().contains("no longer there"));
    }
}
