//! Making the guest what the host asks for: name, files, sysctls, network.

use std::fs;
use std::net::IpAddr;
use std::path::{Component, Path};

use pinion_microvm::netlink::{Netlink, Route};
use pinion_monitor_proto::VERSION;
use pinion_monitor_proto::guest::{AgentHello, File, Interface, Setup, Sysctl};
use rustix::mount::{MountFlags, mount};

use crate::error::{Context, Error};
use crate::share;

/// The pod's files.
const POD: &str = "/run/pinion/pod";
/// Who and what this guest is.
pub(crate) fn hello() -> Result<AgentHello, Error> {
    let boot_id = "/proc/sys/kernel/random/boot_id";
    let id = fs::read_to_string(boot_id).context(|| format!("read {boot_id}"))?;
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds: f64 = uptime.split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0.0);
    let info = rustix::system::sysinfo();
    Ok(AgentHello {
        version: VERSION,
        boot_id: id.trim().to_owned(),
        release: rustix::system::uname().release().to_string_lossy().into_owned(),
        cpus: std::thread::available_parallelism()
            .map_or(1, |n| u32::try_from(n.get()).unwrap_or(1)),
        memory_bytes: info.totalram * u64::from(info.mem_unit),
        uptime_microseconds: (seconds * 1e6) as u64,
    })
}

/// Does all that a setup asks for.
pub(crate) fn apply(setup: &Setup) -> Result<(), Error> {
    nix::unistd::sethostname(&setup.hostname)
        .context(|| format!("set the host name {:?}", setup.hostname))?;
    for file in &setup.files {
        write(file)?;
    }
    let shm = format!("{POD}/shm");
    fs::create_dir_all(&shm).context(|| format!("create {shm}"))?;
    let options = format!("mode=1777,size={}", setup.shm_bytes);
    let data = std::ffi::CString::new(options).unwrap_or_default();
    let flags = MountFlags::NOEXEC | MountFlags::NOSUID | MountFlags::NODEV;
    mount("shm", &shm, "tmpfs", flags, data.as_c_str()).context(|| format!("mount {shm}"))?;
    if setup.share {
        share::mount()?;
    }
    network(&setup.interfaces)?;
    setup.sysctls.iter().try_for_each(sysctl)
}

/// Writes one of the pod's files. The name is one component, whatever the host says.
fn write(file: &File) -> Result<(), Error> {
    let mut parts = Path::new(&file.name).components();
    let (Some(Component::Normal(_)), None) = (parts.next(), parts.next()) else {
        return Err(Error::Invalid(format!("file name {:?} is no plain name", file.name)));
    };
    let path = Path::new(POD).join(&file.name);
    fs::write(&path, &file.content).context(|| format!("write {}", path.display()))
}

fn sysctl(sysctl: &Sysctl) -> Result<(), Error> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    if sysctl.name.is_empty() || !sysctl.name.chars().all(plain) || sysctl.name.contains("..") {
        return Err(Error::Invalid(format!("sysctl {:?} is no name", sysctl.name)));
    }
    let path = format!("/proc/sys/{}", sysctl.name.replace('.', "/"));
    fs::write(&path, &sysctl.value).context(|| format!("write {:?} to {path}", sysctl.value))
}

/// Gives each interface, found by its hardware address, its name, addresses and routes.
fn network(interfaces: &[Interface]) -> Result<(), Error> {
    let mut netlink = Netlink::open().context(|| "open a netlink socket".into())?;
    let links = netlink.links().context(|| "list interfaces".into())?;
    if let Some(loopback) = links.iter().find(|link| link.name == "lo") {
        netlink.set_link(loopback.index, None, None).context(|| "bring up lo".into())?;
    }
    for interface in interfaces {
        let name = &interface.name;
        let link = links
            .iter()
            .find(|link| link.mac == interface.mac)
            .ok_or_else(|| Error::Failed(format!("the machine has no card for {name}")))?;
        let rename = (link.name != *name).then_some(name.as_str());
        netlink
            .set_link(link.index, rename, Some(interface.mtu))
            .context(|| format!("bring up {name} with MTU {}", interface.mtu))?;
        for address in &interface.addresses {
            let ip = address_of(&address.ip)?;
            let prefix = u8::try_from(address.prefix).unwrap_or(u8::MAX);
            netlink
                .add_address(link.index, ip, prefix)
                .context(|| format!("give {name} {ip}/{prefix}"))?;
        }
        let mut routes = Vec::new();
        for route in &interface.routes {
            let optional = |bytes: &[u8]| {
                if bytes.is_empty() { Ok(None) } else { address_of(bytes).map(Some) }
            };
            routes.push(Route {
                index: link.index,
                destination: optional(&route.destination)?,
                prefix: u8::try_from(route.prefix).unwrap_or(u8::MAX),
                gateway: optional(&route.gateway)?,
                scope: u8::try_from(route.scope).unwrap_or(0),
                protocol: 0,
                v6: route.v6,
            });
        }
        // A gateway must be reachable, so what is on the link comes first.
        routes.sort_by_key(|route| route.gateway.is_some());
        for route in &routes {
            netlink.add_route(route).context(|| format!("add route {route:?} of {name}"))?;
        }
    }
    Ok(())
}

fn address_of(bytes: &[u8]) -> Result<IpAddr, Error> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    let v6 = <[u8; 16]>::try_from(bytes).map(IpAddr::from);
    v4.or(v6).map_err(|_length| Error::Invalid(format!("{bytes:?} is no address")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["", "..", "a/b", "/etc/passwd", "../x", "."] {
            let file = File { name: name.into(), content: Vec::new() };
            assert!(matches!(write(&file), Err(Error::Invalid(_))), "{name:?}");
        }
        for name in ["", "../kernel", "net ipv4", "a\0"] {
            let asked = Sysctl { name: name.into(), value: "1".into() };
            assert!(matches!(sysctl(&asked), Err(Error::Invalid(_))), "{name:?}");
        }
    }
}
