//! What owners want, and what their wishes come to for each setting. Pure.

use std::collections::BTreeMap;

use pinion_topology::CpuSet;
use serde::{Deserialize, Serialize};

use crate::{Setting, Want};

/// Wishes by owner.
pub type Leases = BTreeMap<String, Vec<Wish>>;

/// Something an owner wants of the node for as long as it lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "wish", rename_all = "kebab-case")]
pub enum Wish {
    /// No interrupt that can be served elsewhere is served on these CPUs.
    QuietCpus {
        /// The CPUs.
        cpus: CpuSet,
    },
    /// This frequency governor on these CPUs.
    Governor {
        /// The CPUs.
        cpus: CpuSet,
        /// Its name.
        governor: String,
    },
    /// No idle state that takes longer to leave on these CPUs: microseconds, or `n/a` for
    /// none at all (Documentation/ABI/testing/sysfs-devices-power).
    ResumeLatency {
        /// The CPUs.
        cpus: CpuSet,
        /// The limit.
        limit: String,
    },
    /// One value in one setting.
    Value {
        /// The setting.
        setting: Setting,
        /// The value.
        value: String,
    },
}

/// Two owners want different values in one setting.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{setting}: {owner} holds it at {held:?}, {asked:?} was asked")]
pub struct Conflict {
    /// The setting.
    pub setting: Setting,
    /// Who holds it.
    pub owner: String,
    /// At what value.
    pub held: String,
    /// The value asked for.
    pub asked: String,
}

impl Wish {
    /// The settings it names with the value each shall have; interrupts are not named, they
    /// are found.
    fn values(&self) -> Vec<(Setting, &str)> {
        match self {
            Self::QuietCpus { .. } => Vec::new(),
            Self::Governor { cpus, governor } => {
                cpus.iter().map(|cpu| (Setting::Governor { cpu }, governor.as_str())).collect()
            }
            Self::ResumeLatency { cpus, limit } => {
                cpus.iter().map(|cpu| (Setting::ResumeLatency { cpu }, limit.as_str())).collect()
            }
            Self::Value { setting, value } => vec![(setting.clone(), value.as_str())],
        }
    }
}

/// The CPUs that interrupts are kept off.
#[must_use]
pub fn quiet_cpus(leases: &Leases) -> CpuSet {
    leases.values().flatten().fold(CpuSet::new(), |all, wish| match wish {
        Wish::QuietCpus { cpus } => all.union(cpus),
        _ => all,
    })
}

/// What the settings that owners name are to say. Of two wishes for one latency limit the
/// stricter counts; of two for any other setting the one of the first owner by name, and
/// [`conflict`] tells before the second is let in.
#[must_use]
pub fn wanted(leases: &Leases) -> BTreeMap<Setting, Want> {
    let mut wants: BTreeMap<Setting, Want> = BTreeMap::new();
    for (setting, value) in leases.values().flatten().flat_map(Wish::values) {
        let stricter = match (&setting, wants.get(&setting)) {
            (_, None) => true,
            (Setting::ResumeLatency { .. }, Some(Want::Is(held))) => micros(value) < micros(held),
            _ => false,
        };
        if stricter {
            wants.insert(setting, Want::Is(value.to_owned()));
        }
    }
    wants
}

/// The order of latency limits: none tolerated, then microseconds, then no limit.
fn micros(limit: &str) -> u64 {
    match limit {
        "n/a" => 0,
        "0" => u64::MAX,
        number => number.parse().unwrap_or(u64::MAX),
    }
}

/// The first setting that another owner holds at a value that excludes this wish.
#[must_use]
pub fn conflict(leases: &Leases, owner: &str, wishes: &[Wish]) -> Option<Conflict> {
    let others = leases.iter().filter(|(other, _)| *other != owner);
    let held: Vec<(&String, Setting, &str)> = others
        .flat_map(|(other, wishes)| wishes.iter().map(move |wish| (other, wish)))
        .flat_map(|(other, wish)| wish.values().into_iter().map(move |(s, v)| (other, s, v)))
        .collect();
    for (setting, asked) in wishes.iter().flat_map(Wish::values) {
        if matches!(setting, Setting::ResumeLatency { .. }) {
            continue; // the stricter one serves both
        }
        let clash = held.iter().find(|(_, s, value)| *s == setting && !setting.same(value, asked));
        if let Some((owner, _, value)) = clash {
            return Some(Conflict {
                setting,
                owner: (*owner).clone(),
                held: (*value).to_owned(),
                asked: asked.to_owned(),
            });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(list: &str) -> CpuSet {
        list.parse().unwrap()
    }

    #[test]
    fn quiet_cpus_are_those_of_all_owners() {
        let quiet = |list| vec![Wish::QuietCpus { cpus: cpus(list) }];
        let leases = Leases::from([("a".into(), quiet("2-3")), ("b".into(), quiet("3,6"))]);
        assert_eq!(quiet_cpus(&leases).to_string(), "2-3,6");
    }

    #[test]
    fn the_stricter_latency_limit_counts() {
        let limit =
            |text: &str| vec![Wish::ResumeLatency { cpus: cpus("2"), limit: text.to_owned() }];
        for (one, other, strictest) in [("10", "n/a", "n/a"), ("0", "50", "50"), ("7", "30", "7")] {
            for (a, b) in [(one, other), (other, one)] {
                let leases = Leases::from([("a".into(), limit(a)), ("b".into(), limit(b))]);
                let wants = wanted(&leases);
                let expected = Want::Is(strictest.to_owned());
                assert_eq!(wants[&Setting::ResumeLatency { cpu: 2 }], expected);
                assert_eq!(conflict(&leases, "b", &limit(b)), None);
            }
        }
    }

    #[test]
    fn two_governors_for_one_cpu_are_a_conflict_that_names_the_holder() {
        let governor =
            |name: &str| vec![Wish::Governor { cpus: cpus("2-3"), governor: name.to_owned() }];
        let leases = Leases::from([("a".into(), governor("performance"))]);
        let clash = conflict(&leases, "b", &governor("powersave")).unwrap();
        assert!(clash.to_string().contains("a holds it at \"performance\""), "{clash}");
        assert_eq!(conflict(&leases, "b", &governor("performance")), None);
        assert_eq!(conflict(&leases, "a", &governor("powersave")), None);
    }
}
