//! Leases of addresses in the files of the `host-local` plugin.
//!
//! ```text
//!  <dataDir>/<network>/lock                     flock(2) around every look and change
//!                     /10.88.0.7                "<container id>\r\n<interface>": one lease
//!                     /last_reserved_ip.<n>     where the next search in set n begins
//! ```
//!
//! The plugin and this code may take turns. Unlike the plugin's, a lease file appears whole or
//! not at all, so that a crash in the middle leaves no lease without an owner.

use super::config::{HostLocal, Range};
use crate::cni::{IpNet, next_ip};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const LAST: &str = "last_reserved_ip.";
/// A lease is two short lines; larger files are something else.
const MAX_LEASE: u64 = 4096;

/// Whose lease it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Owner<'a> {
    pub(crate) pod: &'a str,
    pub(crate) interface: &'a str,
}

impl Owner<'_> {
    fn text(self) -> String {
        format!("{}\r\n{}", self.pod, self.interface)
    }

    /// Versions of the plugin before 0.8 wrote no interface.
    fn owns(self, lease: &str) -> bool {
        let lease = lease.trim();
        lease == self.text() || lease == self.pod
    }
}

/// An address given to a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) address: IpNet,
    pub(crate) gateway: IpAddr,
}

/// The leases of one network, locked for as long as the value lives.
#[derive(Debug)]
pub(crate) struct Leases {
    dir: PathBuf,
    _lock: File,
}

impl Leases {
    /// Opens the directory, making it if need be, and waits for the lock.
    pub(crate) fn lock(ipam: &HostLocal, network: &str) -> io::Result<Self> {
        let dir = ipam.data_dir.join(network);
        fs::DirBuilder::new().recursive(true).mode(0o755).create(&dir)?;
        // Write access makes the file, reading is what the plugin asks for.
        let lock = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .mode(0o750)
            .open(dir.join("lock"))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
        Ok(Self { dir, _lock: lock })
    }

    /// Gives the owner one address of each set; all or none.
    pub(crate) fn take(&self, ipam: &HostLocal, owner: Owner<'_>) -> io::Result<Vec<Lease>> {
        let held = self.held(owner)?;
        let mut given = Vec::new();
        for (index, set) in ipam.sets.iter().enumerate() {
            let outcome = match held.iter().find(|ip| set.iter().any(|r| r.contains(**ip))) {
                Some(ip) => Err(io::Error::other(format!(
                    "{ip} has been allocated to {}, duplicate allocation is not allowed",
                    owner.pod
                ))),
                None => self.take_from(index, set, owner),
            };
            match outcome {
                Ok(lease) => given.push(lease),
                Err(error) => {
                    for lease in &given {
                        self.give_back(lease.address.ip)?;
                    }
                    return Err(error);
                }
            }
        }
        Ok(given)
    }

    fn take_from(&self, index: usize, set: &[Range], owner: Owner<'_>) -> io::Result<Lease> {
        let last = self.dir.join(format!("{LAST}{index}"));
        let begin = fs::read_to_string(&last).ok().and_then(|text| text.trim().parse().ok());
        for (range, ip) in candidates(set, begin) {
            if ip == range.gateway || !self.reserve(ip, owner)? {
                continue;
            }
            fs::write(&last, ip.to_string())?;
            let address = IpNet { ip, prefix: range.subnet.prefix };
            return Ok(Lease { address, gateway: range.gateway });
        }
        let all: Vec<_> = set.iter().map(|r| format!("{}-{}", r.first, r.last)).collect();
        let all = all.join(",");
        Err(io::Error::other(format!("no IP addresses available in range set: {all}")))
    }

    /// False if the address has an owner.
    fn reserve(&self, ip: IpAddr, owner: Owner<'_>) -> io::Result<bool> {
        let path = self.dir.join(ip.to_string());
        // Most searches go over addresses that are taken: look before making anything.
        if path.symlink_metadata().is_ok() {
            return Ok(false);
        }
        match self.publish(&path, owner.text().as_bytes()) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            outcome => outcome.map(|()| true),
        }
    }

    /// Makes a file that has its content from the first moment.
    fn publish(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let mode = Mode::RUSR | Mode::WUSR;
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        match rustix::fs::open(&self.dir, flags, mode) {
            Ok(file) => {
                let mut file = File::from(file);
                file.write_all(content)?;
                let name = pinion_sys::fd::proc_path(file.as_fd());
                let cwd = rustix::fs::CWD;
                Ok(rustix::fs::linkat(cwd, &name, cwd, path, AtFlags::SYMLINK_FOLLOW)?)
            }
            // A file system that cannot: as the plugin does, and all is taken back if it fails.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
                let mut file =
                    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
                file.write_all(content).inspect_err(|_| drop(fs::remove_file(path)))
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// Addresses the owner has.
    pub(crate) fn held(&self, owner: Owner<'_>) -> io::Result<Vec<IpAddr>> {
        let mut held = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let Some(ip) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            if self.owner_of(&entry.path()).is_some_and(|lease| owner.owns(&lease)) {
                held.push(ip);
            }
        }
        Ok(held)
    }

    fn owner_of(&self, path: &Path) -> Option<String> {
        use std::io::Read;
        let mut text = String::new();
        File::open(path).ok()?.take(MAX_LEASE).read_to_string(&mut text).ok()?;
        Some(text)
    }

    /// Gives back what the owner has. `expected` are the addresses it is known to have: if
    /// these are all, the others' files need not be read.
    pub(crate) fn release(&self, owner: Owner<'_>, expected: &[IpAddr]) -> io::Result<()> {
        let known: Vec<_> = expected
            .iter()
            .filter(|ip| {
                let path = self.dir.join(ip.to_string());
                self.owner_of(&path).is_some_and(|lease| owner.owns(&lease))
            })
            .copied()
            .collect();
        let all_known = !expected.is_empty() && known.len() == expected.len();
        for ip in if all_known { known } else { self.held(owner)? } {
            self.give_back(ip)?;
        }
        Ok(())
    }

    /// Gives back every lease whose owner is not among `valid` (pod and interface).
    pub(crate) fn collect(&self, valid: &[(String, String)]) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let Some(ip) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let Some(lease) = self.owner_of(&entry.path()) else { continue };
            let owned = |(pod, interface): &(String, String)| Owner { pod, interface }.owns(&lease);
            if !valid.iter().any(owned) {
                self.give_back(ip)?;
            }
        }
        Ok(())
    }

    fn give_back(&self, ip: IpAddr) -> io::Result<()> {
        match fs::remove_file(self.dir.join(ip.to_string())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// All addresses of a set, once around, beginning after the one given last.
fn candidates(set: &[Range], last: Option<IpAddr>) -> impl Iterator<Item = (&Range, IpAddr)> {
    let start = last.and_then(|ip| Some((set.iter().position(|r| r.contains(ip))?, ip)));
    // After the last one given comes the next; at the very beginning, the first of all.
    let mut next = match start {
        Some((index, ip)) => step(set, index, ip),
        None => set.first().map(|range| (0, range.first)),
    };
    let begin = next;
    let mut over = false;
    std::iter::from_fn(move || {
        let (index, ip) = next.filter(|_| !over)?;
        next = step(set, index, ip);
        over = next == begin;
        Some((set.get(index)?, ip))
    })
}

/// The address after `ip` in a set, with its range.
fn step(set: &[Range], index: usize, ip: IpAddr) -> Option<(usize, IpAddr)> {
    if set.get(index)?.last == ip {
        let next = (index + 1) % set.len();
        return Some((next, set.get(next)?.first));
    }
    Some((index, next_ip(ip)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ipam(dir: &Path, ranges: &[(&str, &str, &str)]) -> HostLocal {
        let range = |(subnet, first, last): &(&str, &str, &str)| {
            let subnet: IpNet = subnet.parse().unwrap();
            Range {
                subnet,
                first: first.parse().unwrap(),
                last: last.parse().unwrap(),
                gateway: next_ip(subnet.ip),
            }
        };
        HostLocal {
            data_dir: dir.to_owned(),
            sets: vec![ranges.iter().map(range).collect()],
            routes: Vec::new(),
            takes_node_ranges: false,
        }
    }

    fn owner(pod: &str) -> Owner<'_> {
        Owner { pod, interface: "eth0" }
    }

    fn take(ipam: &HostLocal, pod: &str) -> io::Result<String> {
        let leases = Leases::lock(ipam, "net").unwrap();
        leases.take(ipam, owner(pod)).map(|given| given[0].address.to_string())
    }

    #[test]
    fn addresses_go_round_and_the_gateway_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let ipam = ipam(dir.path(), &[("10.1.0.0/29", "10.1.0.1", "10.1.0.4")]);
        for (pod, expected) in [("a", "10.1.0.2/29"), ("b", "10.1.0.3/29"), ("c", "10.1.0.4/29")] {
            assert_eq!(take(&ipam, pod).unwrap(), expected);
        }
        let error = take(&ipam, "d").unwrap_err().to_string();
        assert_eq!(error, "no IP addresses available in range set: 10.1.0.1-10.1.0.4");
        Leases::lock(&ipam, "net").unwrap().release(owner("a"), &[]).unwrap();
        assert_eq!(take(&ipam, "d").unwrap(), "10.1.0.2/29");
        let error = take(&ipam, "d").unwrap_err().to_string();
        assert!(error.contains("has been allocated to d"), "{error}");
    }

    #[test]
    fn the_search_goes_on_after_the_last_address_through_all_ranges() {
        let dir = tempfile::tempdir().unwrap();
        let ipam = ipam(
            dir.path(),
            &[("10.1.0.0/29", "10.1.0.2", "10.1.0.3"), ("10.2.0.0/29", "10.2.0.5", "10.2.0.5")],
        );
        let given: Vec<_> = ["a", "b", "c"].map(|pod| take(&ipam, pod).unwrap()).into();
        assert_eq!(given, ["10.1.0.2/29", "10.1.0.3/29", "10.2.0.5/29"]);
        let leases = Leases::lock(&ipam, "net").unwrap();
        leases.release(owner("b"), &["10.1.0.3".parse().unwrap()]).unwrap();
        drop(leases);
        assert_eq!(take(&ipam, "d").unwrap(), "10.1.0.3/29");
        let last = fs::read_to_string(dir.path().join("net/last_reserved_ip.0")).unwrap();
        assert_eq!(last, "10.1.0.3");
    }

    #[test]
    fn leases_read_as_the_plugin_writes_them() {
        let dir = tempfile::tempdir().unwrap();
        let ipam = ipam(dir.path(), &[("fd00::/64", "fd00::1", "fd00::ff")]);
        take(&ipam, "a").unwrap();
        let text = fs::read_to_string(dir.path().join("net/fd00::2")).unwrap();
        assert_eq!(text, "a\r\neth0");
        fs::write(dir.path().join("net/fd00::9"), "old-style").unwrap();
        fs::write(dir.path().join("net/fd00::a"), "").unwrap();
        let leases = Leases::lock(&ipam, "net").unwrap();
        assert_eq!(leases.held(owner("old-style")).unwrap().len(), 1);
        // Wrong expectations free nothing of others, and all of one's own.
        leases.release(owner("a"), &["fd00::9".parse().unwrap()]).unwrap();
        assert!(leases.held(owner("a")).unwrap().is_empty());
        assert_eq!(leases.held(owner("old-style")).unwrap().len(), 1);
    }

    #[test]
    fn a_set_that_is_half_given_is_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut both = ipam(dir.path(), &[("10.1.0.0/24", "10.1.0.1", "10.1.0.9")]);
        both.sets.push(ipam(dir.path(), &[("10.2.0.0/29", "10.2.0.1", "10.2.0.1")]).sets.remove(0));
        assert!(take(&both, "a").is_err(), "the second set has nothing but its gateway");
        let leases = Leases::lock(&both, "net").unwrap();
        assert!(leases.held(owner("a")).unwrap().is_empty());
    }
}
