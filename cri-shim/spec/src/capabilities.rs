//! Which capabilities the process gets, and in which sets.
//!
//! Order of the rules: the default set → `ALL` added → `ALL` dropped → single names added →
//! single names dropped → cut down to what the host itself may pass on. Inheritable and
//! ambient stay empty except for `add_ambient_capabilities`, because a non-empty inheritable
//! set lets file capabilities raise privileges (CVE-2022-24769).

use crate::error::SpecError;
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities, LinuxCapabilitiesBuilder};
use pinion_cri_proto::v1;
use std::collections::BTreeSet;
use std::str::FromStr;

/// Kernel capabilities by bit number (capabilities(7), include/uapi/linux/capability.h).
pub(crate) const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What an unprivileged container has when nobody asks for more.
const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// The field these rules read.
const FIELD: &str = "linux.security_context.capabilities";

/// Capabilities of one process, as names without `CAP_`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct CapabilitySets {
    /// Bounding, permitted and effective.
    pub(crate) held: BTreeSet<&'static str>,
    /// Inheritable and ambient; a subset of `held`.
    pub(crate) ambient: BTreeSet<&'static str>,
}

/// Applies CRI's rules; `bounding` is what the host may pass on, as `CAP_…`.
pub(crate) fn decide(
    asked: Option<&v1::Capability>,
    privileged: bool,
    bounding: &BTreeSet<String>,
    warnings: &mut Vec<String>,
) -> Result<CapabilitySets, SpecError> {
    let none = v1::Capability::default();
    let asked = asked.unwrap_or(&none);
    let add = parse(&asked.add_capabilities, "add_capabilities")?;
    let drop = parse(&asked.drop_capabilities, "drop_capabilities")?;
    let ambient = parse(&asked.add_ambient_capabilities, "add_ambient_capabilities")?;

    let mut sets = CapabilitySets { held: DEFAULT.into(), ..Default::default() };
    if privileged || add.all {
        sets.held = NAMES.into();
    }
    if !privileged {
        if drop.all {
            sets.held.clear();
        }
        if ambient.all {
            sets.held = NAMES.into();
            sets.ambient = NAMES.into();
        }
        sets.held.extend(add.names.iter().chain(&ambient.names));
        sets.ambient.extend(&ambient.names);
        sets.held.retain(|name| !drop.names.contains(name));
    }
    let lacking: Vec<_> = sets
        .held
        .iter()
        .filter(|name| !bounding.contains(&format!("CAP_{name}")))
        .copied()
        .collect();
    if !lacking.is_empty() {
        sets.held.retain(|name| !lacking.contains(name));
        let names = lacking.join(", ");
        warnings.push(format!("{FIELD}: this host cannot pass on {names}; left out"));
    }
    let held = &sets.held;
    sets.ambient.retain(|name| held.contains(name));
    Ok(sets)
}

/// A parsed list of names.
#[derive(Default)]
struct Names {
    all: bool,
    names: BTreeSet<&'static str>,
}

/// Accepts `NET_ADMIN`, `CAP_NET_ADMIN` and any case of both, and `ALL`.
fn parse(list: &[String], member: &str) -> Result<Names, SpecError> {
    let mut parsed = Names::default();
    for (index, given) in list.iter().enumerate() {
        let upper = given.to_ascii_uppercase();
        let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
        if bare == "ALL" {
            parsed.all = true;
        } else if let Some(name) = NAMES.iter().find(|name| **name == bare) {
            parsed.names.insert(name);
        } else {
            let field = format!("{FIELD}.{member}[{index}]");
            return Err(SpecError::invalid(field, format!("{given:?} is no capability")));
        }
    }
    Ok(parsed)
}

impl CapabilitySets {
    /// The OCI form.
    pub(crate) fn to_oci(&self) -> Result<LinuxCapabilities, oci_spec::OciSpecError> {
        LinuxCapabilitiesBuilder::default()
            .bounding(oci(&self.held))
            .permitted(oci(&self.held))
            .effective(oci(&self.held))
            .inheritable(oci(&self.ambient))
            .ambient(oci(&self.ambient))
            .build()
    }
}

fn oci(names: &BTreeSet<&'static str>) -> Capabilities {
    names.iter().filter_map(|name| Capability::from_str(name).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> BTreeSet<String> {
        NAMES.iter().map(|name| format!("CAP_{name}")).collect()
    }

    fn ask(add: &[&str], drop: &[&str], ambient: &[&str]) -> v1::Capability {
        let own = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect();
        v1::Capability {
            add_capabilities: own(add),
            drop_capabilities: own(drop),
            add_ambient_capabilities: own(ambient),
        }
    }

    fn held(asked: &v1::Capability) -> BTreeSet<&'static str> {
        decide(Some(asked), false, &host(), &mut Vec::new()).unwrap().held
    }

    #[test]
    fn nothing_asked_gives_the_default_set_and_nothing_inheritable() {
        let sets = decide(None, false, &host(), &mut Vec::new()).unwrap();
        assert_eq!(sets.held, DEFAULT.into());
        assert!(sets.ambient.is_empty());
        let oci = sets.to_oci().unwrap();
        assert_eq!(oci.inheritable().as_ref().unwrap().len(), 0);
        assert_eq!(oci.bounding().as_ref().unwrap().len(), 14);
    }

    #[test]
    fn names_count_with_and_without_prefix_and_in_any_case() {
        let caps = held(&ask(&["NET_ADMIN", "CAP_SYS_NICE", "cap_ipc_lock"], &["CAP_CHOWN"], &[]));
        assert!(caps.is_superset(&["NET_ADMIN", "SYS_NICE", "IPC_LOCK"].into()));
        assert!(!caps.contains("CHOWN"));
    }

    #[test]
    fn all_comes_before_single_names() {
        assert_eq!(held(&ask(&["ALL"], &["CHOWN"], &[])).len(), 40);
        assert_eq!(held(&ask(&["NET_ADMIN"], &["ALL"], &[])), ["NET_ADMIN"].into());
        assert!(held(&ask(&["ALL"], &["ALL"], &[])).is_empty());
    }

    #[test]
    fn unknown_names_are_refused_with_their_place() {
        let asked = ask(&["CHOWN", "FOO"], &[], &[]);
        let error = decide(Some(&asked), false, &host(), &mut Vec::new()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "linux.security_context.capabilities.add_capabilities[1]: \"FOO\" is no capability"
        );
    }

    #[test]
    fn privileged_means_what_the_host_can_pass_on_and_says_what_is_missing() {
        let mut host = host();
        host.remove("CAP_SYS_RESOURCE");
        let mut warnings = Vec::new();
        let sets = decide(None, true, &host, &mut warnings).unwrap();
        assert_eq!(sets.held.len(), 40);
        assert!(warnings[0].contains("SYS_RESOURCE"), "{warnings:?}");
    }

    #[test]
    fn ambient_capabilities_reach_every_set_unless_dropped() {
        let asked = ask(&[], &["ALL", "SYS_TIME"], &["SYS_NICE", "SYS_TIME"]);
        let sets = decide(Some(&asked), false, &host(), &mut Vec::new()).unwrap();
        assert_eq!(sets.held, ["SYS_NICE"].into());
        assert_eq!(sets.ambient, ["SYS_NICE"].into());
    }

    #[test]
    fn every_kernel_name_has_an_oci_counterpart() {
        for name in NAMES {
            assert!(Capability::from_str(name).is_ok(), "{name}");
        }
    }
}
