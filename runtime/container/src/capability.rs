//! The five capability sets of a process.
//!
//! Names, numbers and the bounding and ambient sets are those of the caps crate. The three
//! base sets stay masks, set in one capset(2): caps would read and write each of the three in
//! turn, six calls with states in between that the kernel may refuse.

use caps::{CapSet, Capability as Known};
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};
use rustix::thread::CapabilitySet;

use crate::error::{Doing, Failure, Result};

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
    /// have (`available`): it could not give that away. The second value warns of those, and
    /// of ambient ones that the kernel would not raise.
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
        // inheritable; as runc, warn about the others and go on.
        let idle = sets.ambient - (sets.permitted & sets.inheritable);
        sets.ambient -= idle;
        sets.effective &= sets.permitted;
        let missing = names(missing)
            .into_iter()
            .map(|name| format!("ignoring unknown or unavailable capability: {name}"));
        let idle = names(idle).into_iter().map(|name| {
            format!("can't raise ambient capability {name}: it is not permitted and inheritable")
        });
        (sets, missing.chain(idle).collect())
    }
}

/// Every capability that has a name here, by number (capabilities(7)).
#[must_use]
pub fn all() -> Vec<Known> {
    let mut all: Vec<Known> = caps::all().into_iter().collect();
    all.sort_unstable_by_key(Known::index);
    all
}

/// The one-bit mask of a capability.
#[must_use]
pub fn bit(capability: Known) -> CapabilitySet {
    CapabilitySet::from_bits_retain(capability.bitmask())
}

/// The mask of some capabilities.
pub fn mask(capabilities: impl IntoIterator<Item = Capability>) -> CapabilitySet {
    let known = |capability: Capability| format!("CAP_{capability}").parse::<Known>().ok();
    capabilities
        .into_iter()
        .filter_map(known)
        .fold(CapabilitySet::empty(), |set, capability| set | bit(capability))
}

/// The `CAP_` names of a mask, by number.
#[must_use]
pub fn names(set: CapabilitySet) -> Vec<String> {
    let present = all().into_iter().filter(|capability| set.contains(bit(*capability)));
    present.map(|capability| capability.to_string()).collect()
}

/// The capability of a name such as `CAP_NET_ADMIN`, `net_admin`.
#[must_use]
pub fn parse(name: &str) -> Option<Capability> {
    let upper = name.to_ascii_uppercase();
    upper.strip_prefix("CAP_").unwrap_or(&upper).parse().ok()
}

/// Every capability a configuration asks for, in any of the sets.
#[must_use]
pub fn asked(sets: Option<&LinuxCapabilities>) -> CapabilitySet {
    let Some(sets) = sets else { return CapabilitySet::empty() };
    let all =
        [sets.bounding(), sets.effective(), sets.permitted(), sets.inheritable(), sets.ambient()];
    mask(all.into_iter().flatten().flatten().copied())
}

/// What this process can pass on of `wanted`: permitted, and within its own bounding set.
///
/// # Errors
/// As capget(2).
pub fn available(wanted: CapabilitySet) -> Result<CapabilitySet> {
    let permitted = rustix::thread::capabilities(None).doing(|| "capget".into())?.permitted;
    let bounded = |capability: &Known| {
        // An error stands for a capability the kernel does not know.
        caps::has_cap(None, CapSet::Bounding, *capability).unwrap_or(false)
    };
    let possible = wanted & permitted;
    Ok(all()
        .into_iter()
        .filter(|capability| possible.contains(bit(*capability)))
        .filter(bounded)
        .fold(CapabilitySet::empty(), |set, capability| set | bit(capability)))
}

/// Takes everything but `keep` out of the bounding set of the calling thread.
///
/// # Errors
/// `EPERM` without `CAP_SETPCAP`, unless there was nothing to take out.
pub fn limit(keep: CapabilitySet) -> Result<(), Failure> {
    let doing = |name: String| move || format!("drop {name} from the bounding set");
    for capability in all().into_iter().filter(|capability| !keep.contains(bit(*capability))) {
        match caps::drop(None, CapSet::Bounding, capability) {
            Ok(()) => {}
            // Not there to begin with, or a kernel that ends before this number.
            Err(_) if !matches!(caps::has_cap(None, CapSet::Bounding, capability), Ok(true)) => {}
            Err(error) => {
                return Err(Failure::refused(format!(
                    "{}: {error}",
                    doing(capability.to_string())()
                )));
            }
        }
    }
    // A kernel may have capabilities newer than the names.
    for number in FIRST_WITHOUT_NAME..u64::BITS {
        let unnamed = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(unnamed) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL) => return Ok(()),
            Err(rustix::io::Errno::PERM)
                if !rustix::thread::capability_is_in_bounding_set(unnamed).unwrap_or(true) => {}
            Err(error) => return Err(error).doing(doing(format!("capability {number}"))),
        }
    }
    Ok(())
}

const FIRST_WITHOUT_NAME: u32 = Known::CAP_CHECKPOINT_RESTORE as u32 + 1;

/// Makes `wanted` the ambient set of the calling thread.
///
/// # Errors
/// `EPERM` for what is not both permitted and inheritable.
pub fn set_ambient(wanted: CapabilitySet) -> Result<(), Failure> {
    let refused =
        |error: caps::errors::CapsError| Failure::refused(format!("ambient set: {error}"));
    caps::clear(None, CapSet::Ambient).map_err(refused)?;
    for capability in all().into_iter().filter(|capability| wanted.contains(bit(*capability))) {
        caps::raise(None, CapSet::Ambient, capability).map_err(refused)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(json: &str) -> LinuxCapabilities {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn every_capability_of_the_specification_has_a_number() {
        for (number, known) in all().into_iter().enumerate() {
            let name = known.to_string();
            let capability = parse(&name).unwrap_or_else(|| panic!("{name}"));
            assert_eq!(mask([capability]).bits(), 1 << number, "{name}");
        }
        assert_eq!(parse("cap_net_admin"), Some(Capability::NetAdmin));
        assert_eq!(parse("CAP_FOO"), None);
    }

    #[test]
    fn what_can_be_passed_on_is_what_the_kernel_reports() {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let set = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
            CapabilitySet::from_bits_retain(u64::from_str_radix(line.trim(), 16).unwrap())
        };
        let named = all().into_iter().fold(CapabilitySet::empty(), |set, c| set | bit(c));
        assert_eq!(
            available(CapabilitySet::all()).unwrap(),
            set("CapPrm:") & set("CapBnd:") & named
        );
        assert_eq!(available(CapabilitySet::empty()).unwrap(), CapabilitySet::empty());
    }

    #[test]
    fn what_the_runtime_lacks_is_left_out_and_named() {
        let available = CapabilitySet::all() - CapabilitySet::SYS_RESOURCE;
        let (sets, missing) = CapabilitySets::plan(
            &asked(r#"{"bounding":["CAP_KILL","CAP_SYS_RESOURCE"],"permitted":["CAP_KILL"]}"#),
            available,
        );
        assert_eq!(sets.bounding, CapabilitySet::KILL);
        assert!(missing.len() == 1 && missing[0].contains("CAP_SYS_RESOURCE"), "{missing:?}");
        assert!(sets.inheritable.is_empty());
    }

    #[test]
    fn an_ambient_capability_must_be_permitted_and_inheritable() {
        let (sets, warnings) = CapabilitySets::plan(
            &asked(
                r#"{"permitted":["CAP_KILL","CAP_CHOWN"],"inheritable":["CAP_KILL"],
                    "ambient":["CAP_KILL","CAP_CHOWN"],"effective":["CAP_SYS_ADMIN"]}"#,
            ),
            CapabilitySet::all(),
        );
        assert_eq!(sets.ambient, CapabilitySet::KILL);
        assert!(warnings.len() == 1 && warnings[0].contains("CAP_CHOWN"), "{warnings:?}");
        assert!(sets.effective.is_empty());
    }
}
