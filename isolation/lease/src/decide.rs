//! What is to happen to one setting, from its text, its undo and what is wanted. Pure.

use pinion_topology::CpuSet;
use serde::{Deserialize, Serialize};

use crate::Setting;

/// What a setting is to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Want {
    /// Exactly this.
    Is(String),
    /// An affinity without these CPUs.
    Avoid(CpuSet),
}

/// The undo of one setting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The setting.
    pub setting: Setting,
    /// What the file said before the first write.
    pub old: String,
    /// What it may say by our doing: the value before the last write and the one after.
    pub ours: Vec<String>,
    /// Who wanted it when it was last written, for people.
    pub owners: Vec<String>,
    /// The boot in which it was written (`/proc/sys/kernel/random/boot_id`).
    pub boot: String,
    /// For the default affinity: the interrupts that were there before it was changed. Later
    /// ones were born under our value and get the old one when it is given back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub present: Vec<u32>,
}

/// What is to happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Move {
    /// It is as it should be.
    Stay,
    /// Record the old value, then write.
    Write {
        /// The old value, for the undo.
        old: String,
        /// What the file may say until the write is done.
        before: String,
        /// The value.
        value: String,
    },
    /// Write the old value, then drop the undo.
    Restore {
        /// The old value.
        value: String,
    },
    /// Nothing of ours is in the file: drop the undo.
    Forget,
    /// No value could satisfy the wish.
    Hopeless,
}

/// Decides for one setting. `online`: the CPUs an affinity may fall back to.
#[must_use]
pub fn decide(
    setting: &Setting,
    current: &str,
    entry: Option<&Entry>,
    want: Option<&Want>,
    online: &CpuSet,
) -> Move {
    let is = |text: &String| setting.same(text, current);
    // What stands there by our doing, or still stands there because a write never came.
    let known = entry.filter(|entry| is(&entry.old) || entry.ours.iter().any(is));
    let old = known.map_or(current, |entry| entry.old.as_str());
    let wanted = match want {
        None => old.to_owned(),
        Some(Want::Is(value)) => value.clone(),
        Some(Want::Avoid(quiet)) => match avoid(setting, old, quiet, online) {
            Some(value) => value,
            None => return Move::Hopeless,
        },
    };
    if setting.same(&wanted, old) {
        return match (entry, setting.same(current, old)) {
            (None, _) => Move::Stay,
            (Some(_), true) => Move::Forget,
            (Some(_), false) => Move::Restore { value: old.to_owned() },
        };
    }
    if setting.same(&wanted, current) {
        return Move::Stay;
    }
    Move::Write { old: old.to_owned(), before: current.to_owned(), value: wanted }
}

/// The affinity without the quiet CPUs; all other online ones if nothing is left of it.
fn avoid(setting: &Setting, old: &str, quiet: &CpuSet, online: &CpuSet) -> Option<String> {
    let cpus = setting.cpus(old)?;
    if cpus.is_disjoint(quiet) {
        return Some(old.to_owned());
    }
    let mut rest = cpus.difference(quiet);
    if rest.is_disjoint(online) {
        rest = online.difference(quiet);
    }
    (!rest.is_empty()).then(|| setting.text_of(&rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const IRQ: Setting = Setting::IrqAffinity { irq: 24 };

    fn cpus(list: &str) -> CpuSet {
        list.parse().unwrap()
    }

    fn entry(old: &str, ours: &[&str]) -> Entry {
        Entry {
            setting: IRQ,
            old: old.into(),
            ours: ours.iter().map(|text| (*text).to_owned()).collect(),
            owners: vec![],
            boot: String::new(),
            present: vec![],
        }
    }

    fn steer(current: &str, entry: Option<&Entry>, quiet: &str) -> Move {
        let want = (!quiet.is_empty()).then(|| Want::Avoid(cpus(quiet)));
        decide(&IRQ, current, entry, want.as_ref(), &cpus("0-7"))
    }

    fn write(old: &str, before: &str, value: &str) -> Move {
        Move::Write { old: old.into(), before: before.into(), value: value.into() }
    }

    #[test]
    fn an_interrupt_leaves_the_quiet_cpus_and_no_others() {
        assert_eq!(steer("0-7", None, "2-3"), write("0-7", "0-7", "0-1,4-7"));
        assert_eq!(steer("0-1", None, "2-3"), Move::Stay);
        assert_eq!(steer("2", None, "2-3"), write("2", "2", "0-1,4-7"));
        assert_eq!(steer("0-7", None, "0-7"), Move::Hopeless);
    }

    #[test]
    fn a_second_owner_and_the_first_one_s_end_are_judged_from_the_old_value() {
        let first = entry("0-7", &["0-7", "0-1,4-7"]);
        assert_eq!(steer("0-1,4-7", Some(&first), "2-3"), Move::Stay);
        let more = steer("0-1,4-7", Some(&first), "2-5");
        assert_eq!(more, write("0-7", "0-1,4-7", "0-1,6-7"));
        let second = entry("0-7", &["0-1,4-7", "0-1,6-7"]);
        assert_eq!(steer("0-1,6-7", Some(&second), "4-5"), write("0-7", "0-1,6-7", "0-3,6-7"));
        assert_eq!(steer("0-1,6-7", Some(&second), ""), Move::Restore { value: "0-7".into() });
    }

    #[test]
    fn a_crash_at_any_point_is_found_by_the_text() {
        // recorded, not written
        let recorded = entry("0-7", &["0-7", "0-1,4-7"]);
        assert_eq!(steer("0-7", Some(&recorded), "2-3"), write("0-7", "0-7", "0-1,4-7"));
        assert_eq!(steer("0-7", Some(&recorded), ""), Move::Forget);
        // recorded for a second write that never came
        let between = entry("0-7", &["0-1,4-7", "0-1,6-7"]);
        assert_eq!(steer("0-1,4-7", Some(&between), ""), Move::Restore { value: "0-7".into() });
    }

    #[test]
    fn what_somebody_else_wrote_is_kept_unless_it_breaks_the_wish() {
        let entry = entry("0-7", &["0-7", "0-1,4-7"]);
        assert_eq!(steer("5", Some(&entry), "2-3"), Move::Forget);
        assert_eq!(steer("5", Some(&entry), ""), Move::Forget);
        assert_eq!(steer("3-5", Some(&entry), "2-3"), write("3-5", "3-5", "4-5"));
    }

    #[test]
    fn a_value_is_written_and_given_back() {
        let setting = Setting::ResumeLatency { cpu: 2 };
        let want = Want::Is("n/a".into());
        let none = CpuSet::new();
        assert_eq!(decide(&setting, "0", None, Some(&want), &none), write("0", "0", "n/a"));
        let entry = Entry { setting: setting.clone(), ..entry("0", &["0", "n/a"]) };
        assert_eq!(decide(&setting, "n/a", Some(&entry), Some(&want), &none), Move::Stay);
        let back = Move::Restore { value: "0".into() };
        assert_eq!(decide(&setting, "n/a", Some(&entry), None, &none), back);
        // Somebody's other value while ours is wanted: ours again, theirs comes back later.
        assert_eq!(
            decide(&setting, "50", Some(&entry), Some(&want), &none),
            write("50", "50", "n/a")
        );
        // It was so before: nothing to give back.
        assert_eq!(decide(&setting, "n/a", None, Some(&want), &none), Move::Stay);
    }
}
