//! The five capability sets of a process.

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};
use rustix::thread::CapabilitySet;

/// The sets as bit masks; bit n is capability n of capabilities(7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CapabilitySets {
    /// The limit for everything that follows.
    pub bounding: CapabilitySet,
    /// What the kernel checks.
    pub effective: CapabilitySet,
    /// What may become effective.
    pub permitted: CapabilitySet,
    /// What survives execve(2) together with a file's capabilities.
    pub inheritable: CapabilitySet,
    /// What survives execve(2) of ordinary files.
    pub ambient: CapabilitySet,
}

impl CapabilitySets {
    /// No capability at all.
    #[must_use]
    pub fn none() -> Self {
        let empty = CapabilitySet::empty();
        Self {
            bounding: empty,
            effective: empty,
            permitted: empty,
            inheritable: empty,
            ambient: empty,
        }
    }

    /// Converts the configuration's sets, leaving out what the runtime itself does not
    /// have (`available`): it could not give that away. The second value names those.
    #[must_use]
    pub fn plan(asked: &LinuxCapabilities, available: CapabilitySet) -> (Self, Vec<String>) {
        let mut missing = CapabilitySet::empty();
        let mut take = |set: &Option<Capabilities>| {
            let bits = mask(set.iter().flatten().copied());
            missing |= bits - available;
            bits & available
        };
        let mut sets = Self {
            bounding: take(asked.bounding()),
            effective: take(asked.effective()),
            permitted: take(asked.permitted()),
            inheritable: take(asked.inheritable()),
            ambient: take(asked.ambient()),
        };
        // The kernel raises an ambient capability only where it is permitted and
        // inheritable; runc warns about the others and goes on.
        sets.ambient &= sets.permitted & sets.inheritable;
        sets.effective &= sets.permitted;
        (sets, names(missing))
    }
}

/// The mask of some capabilities.
pub fn mask(capabilities: impl IntoIterator<Item = Capability>) -> CapabilitySet {
    capabilities
        .into_iter()
        .filter_map(|capability| {
            let name = capability.to_string();
            NAMES.iter().position(|known| *known == name)
        })
        .fold(CapabilitySet::empty(), |set, n| set | CapabilitySet::from_bits_retain(1 << n))
}

/// The `CAP_` names of a mask, by number.
#[must_use]
pub fn names(set: CapabilitySet) -> Vec<String> {
    let present = |n: &usize| set.bits() & (1 << n) != 0;
    (0..NAMES.len()).filter(present).map(|n| format!("CAP_{}", NAMES[n])).collect()
}

/// The capability of a name such as `CAP_NET_ADMIN`, `net_admin`.
#[must_use]
pub fn parse(name: &str) -> Option<Capability> {
    let upper = name.to_ascii_uppercase();
    upper.strip_prefix("CAP_").unwrap_or(&upper).parse().ok()
}

/// Names by number, `include/uapi/linux/capability.h`.
pub const NAMES: [&str; 41] = [
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

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(json: &str) -> LinuxCapabilities {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn every_capability_of_the_specification_has_a_number() {
        for (number, name) in NAMES.iter().enumerate() {
            let capability = parse(name).unwrap_or_else(|| panic!("{name}"));
            assert_eq!(mask([capability]).bits(), 1 << number);
        }
        assert_eq!(parse("cap_net_admin"), Some(Capability::NetAdmin));
        assert_eq!(parse("CAP_FOO"), None);
    }

    #[test]
    fn what_the_runtime_lacks_is_left_out_and_named() {
        let available = CapabilitySet::all() - CapabilitySet::SYS_RESOURCE;
        let (sets, missing) = CapabilitySets::plan(
            &asked(r#"{"bounding":["CAP_KILL","CAP_SYS_RESOURCE"],"permitted":["CAP_KILL"]}"#),
            available,
        );
        assert_eq!(sets.bounding, CapabilitySet::KILL);
        assert_eq!(missing, ["CAP_SYS_RESOURCE"]);
        assert!(sets.inheritable.is_empty());
    }

    #[test]
    fn an_ambient_capability_must_be_permitted_and_inheritable() {
        let (sets, _) = CapabilitySets::plan(
            &asked(
                r#"{"permitted":["CAP_KILL","CAP_CHOWN"],"inheritable":["CAP_KILL"],
                    "ambient":["CAP_KILL","CAP_CHOWN"],"effective":["CAP_SYS_ADMIN"]}"#,
            ),
            CapabilitySet::all(),
        );
        assert_eq!(sets.ambient, CapabilitySet::KILL);
        assert!(sets.effective.is_empty());
    }
}
