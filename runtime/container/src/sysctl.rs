//! Kernel parameters a container may set: those that belong to one of its own namespaces.

use oci_spec::runtime::LinuxNamespaceType;

use crate::error::{Error, Result};
use crate::namespaces::Namespaces;

/// Parameters of the IPC namespace besides `fs.mqueue`.
const IPC: &[&str] = &[
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
];

/// One parameter: its path below `/proc/sys` and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// `net/ipv4/ip_forward`.
    pub path: String,
    /// Written as it is.
    pub value: String,
}

/// Checks one `linux.sysctl` entry.
///
/// # Errors
/// [`Error::Invalid`] when it is malformed or would change the host.
pub fn plan(name: &str, value: &str, namespaces: &Namespaces) -> Result<Sysctl> {
    let path = path_of(name);
    let sound =
        |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
    if !path.split('/').all(sound) || value.contains(['\0', '\n']) {
        return Err(Error::Invalid(format!("sysctl {name:?} is malformed")));
    }
    let owner = match path.as_str() {
        p if p.starts_with("net/") => LinuxNamespaceType::Network,
        p if p.starts_with("fs/mqueue/") || IPC.contains(&p) => LinuxNamespaceType::Ipc,
        "kernel/domainname" => LinuxNamespaceType::Uts,
        "kernel/hostname" => {
            return Err(Error::Invalid(
                "sysctl \"kernel.hostname\" is not allowed as it conflicts with the OCI \"hostname\" field".into(),
            ));
        }
        _ => {
            return Err(Error::Invalid(format!(
                "sysctl {name:?} is not in a separate kernel namespace"
            )));
        }
    };
    if !namespaces.has(owner) {
        let place = match owner {
            LinuxNamespaceType::Network => "hosts network namespace",
            LinuxNamespaceType::Ipc => "hosts ipc namespace",
            _ => "hosts uts namespace",
        };
        return Err(Error::Invalid(format!("sysctl {name:?} is not allowed in the {place}")));
    }
    Ok(Sysctl { path, value: value.to_owned() })
}

/// As sysctl(8): the first separator decides whether `.` or `/` separates; the other one
/// then stands for itself (`net.ipv4.conf.eth0/100.rp_filter`).
fn path_of(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(at) if name.as_bytes()[at] == b'.' => name
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Namespaces {
        Namespaces {
            create: (libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS) as u64,
            ..Default::default()
        }
    }

    #[test]
    fn both_spellings_name_the_same_parameter() {
        for name in ["net.ipv4.conf.eth0/1.rp_filter", "net/ipv4/conf/eth0.1/rp_filter"] {
            assert_eq!(plan(name, "1", &all()).unwrap().path, "net/ipv4/conf/eth0.1/rp_filter");
        }
    }

    #[test]
    fn parameters_of_the_host_and_tricks_are_refused() {
        for name in [
            "kernel.core_pattern",
            "vm.swappiness",
            "net/../kernel/core_pattern",
            "net..x",
            "kernel.hostname",
            "",
            "net",
        ] {
            assert!(plan(name, "1", &all()).is_err(), "{name}");
        }
        assert!(plan("net.core.somaxconn", "1\nx", &all()).is_err());
        assert!(plan("net.core.somaxconn", "1", &Namespaces::default()).is_err());
        assert!(plan("kernel.shmmax", "1", &all()).is_ok());
    }
}
