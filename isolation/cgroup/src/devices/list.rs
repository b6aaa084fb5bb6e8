//! Device rules as the exception list of the v1 `devices` controller.
//!
//! The kernel keeps a default (allow or deny) and exceptions keyed by the exact triple of
//! kind, major and minor, wildcards included. It cannot except one device from a wildcard
//! that is itself an exception; such rules are refused instead of being half in force.

use std::collections::BTreeMap;
use std::fmt;

use super::rules::{ALL, Kind, MKNOD, READ, Rule, WRITE};
use crate::{Error, Result};

type Key = (Kind, Option<u32>, Option<u32>);

/// What a v1 group holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Whitelist {
    allow_by_default: bool,
    /// Accesses that are treated against the default.
    exceptions: BTreeMap<Key, u8>,
}

/// One write to `devices.allow` or `devices.deny`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) allow: bool,
    pub(super) value: String,
}

impl Whitelist {
    /// The state that `rules` lead to, starting from deny-all.
    pub(super) fn fold(rules: &[Rule]) -> Result<Self> {
        let mut state = Self::default();
        let mut rules = rules.iter().peekable();
        while let Some(rule) = rules.next() {
            let everything =
                |rule: &Rule| rule.major.is_none() && rule.minor.is_none() && rule.access == ALL;
            // A rule for everything was split into its two kinds: both together switch the
            // default.
            let next_completes = everything(rule)
                && rules.peek().is_some_and(|next| {
                    everything(next) && next.allow == rule.allow && next.kind != rule.kind
                });
            if next_completes {
                rules.next();
                state = Self { allow_by_default: rule.allow, exceptions: BTreeMap::new() };
            } else {
                state.add(rule)?;
            }
        }
        Ok(state)
    }

    fn add(&mut self, rule: &Rule) -> Result<()> {
        let key = (rule.kind, rule.major, rule.minor);
        if rule.allow != self.allow_by_default {
            *self.exceptions.entry(key).or_default() |= rule.access;
            return Ok(());
        }
        // Back to the default: exceptions inside the rule shrink; one that is wider than the
        // rule would have to be split.
        for (held, access) in &mut self.exceptions {
            if covers(key, *held) {
                *access &= !rule.access;
            } else if overlaps(*held, key) && *access & rule.access != 0 {
                return Err(Error::Invalid {
                    field: "linux.resources.devices",
                    reason: format!(
                        "cgroup v1 cannot except {} from {}",
                        entry(key, rule.access),
                        entry(*held, *access)
                    ),
                });
            }
        }
        self.exceptions.retain(|_, access| *access != 0);
        Ok(())
    }

    pub(super) fn allows_by_default(&self) -> bool {
        self.allow_by_default
    }

    /// Reads `devices.list`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut state = Self::default();
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            let mut fields = line.split_whitespace();
            let (kind, numbers, access) = (fields.next()?, fields.next()?, fields.next()?);
            let kind = match kind {
                "a" => {
                    state.allow_by_default = true;
                    continue;
                }
                "b" => Kind::Block,
                "c" => Kind::Char,
                _ => return None,
            };
            let (major, minor) = numbers.split_once(':')?;
            let number = |text: &str| match text {
                "*" => Some(None),
                text => text.parse().ok().map(Some),
            };
            let bits = access.chars().try_fold(0, |bits, letter| match letter {
                'r' => Some(bits | READ),
                'w' => Some(bits | WRITE),
                'm' => Some(bits | MKNOD),
                _ => None,
            })?;
            state.exceptions.insert((kind, number(major)?, number(minor)?), bits);
        }
        Some(state)
    }

    /// The writes that lead from this state to `wanted`: additions first.
    pub(super) fn changes_to(&self, wanted: &Self) -> Vec<Change> {
        let mut changes = Vec::new();
        // A group that allows by default does not show its exceptions, so it starts over.
        let start_over = self.allow_by_default || wanted.allow_by_default;
        let empty = BTreeMap::new();
        let held = if start_over { &empty } else { &self.exceptions };
        if start_over {
            changes.push(Change { allow: wanted.allow_by_default, value: "a *:* rwm".to_owned() });
        }
        let against = !wanted.allow_by_default;
        let difference = |from: &BTreeMap<Key, u8>, to: &BTreeMap<Key, u8>, allow: bool| {
            let missing = to.iter().filter_map(|(key, access)| {
                let missing = access & !from.get(key).copied().unwrap_or(0);
                (missing != 0).then(|| Change { allow, value: entry(*key, missing) })
            });
            missing.collect::<Vec<_>>()
        };
        changes.extend(difference(held, &wanted.exceptions, against));
        changes.extend(difference(&wanted.exceptions, held, !against));
        changes
    }
}

/// Whether every device of `inner` is one of `outer`.
fn covers(outer: Key, inner: Key) -> bool {
    outer.0 == inner.0
        && (outer.1.is_none() || outer.1 == inner.1)
        && (outer.2.is_none() || outer.2 == inner.2)
}

/// Whether some device is in both.
fn overlaps(a: Key, b: Key) -> bool {
    let agree = |a: Option<u32>, b: Option<u32>| a.is_none() || b.is_none() || a == b;
    a.0 == b.0 && agree(a.1, b.1) && agree(a.2, b.2)
}

/// The kernel's notation: `c 1:3 rwm`.
fn entry((kind, major, minor): Key, access: u8) -> String {
    let number = |value: Option<u32>| value.map_or_else(|| "*".to_owned(), |n| n.to_string());
    let kind = if kind == Kind::Block { 'b' } else { 'c' };
    let mut text = format!("{kind} {}:{} ", number(major), number(minor));
    for (bit, letter) in [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')] {
        if access & bit != 0 {
            text.push(letter);
        }
    }
    text
}

impl fmt::Display for Whitelist {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.allow_by_default { "all except" } else { "none except" })?;
        for (key, access) in &self.exceptions {
            write!(f, " {},", entry(*key, *access))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::rules::normalise;
    use super::*;

    fn fold(json: &str) -> Result<Whitelist> {
        Whitelist::fold(&normalise(&serde_json::from_str::<Vec<_>>(json).unwrap()).unwrap())
    }

    fn changes(from: &Whitelist, to: &Whitelist) -> Vec<String> {
        let written = from.changes_to(to);
        written
            .iter()
            .map(|change| format!("{}{}", if change.allow { '+' } else { '-' }, change.value))
            .collect()
    }

    #[test]
    fn a_fresh_group_that_allows_all_is_emptied_then_filled() {
        let fresh = Whitelist::parse("a *:* rwm\n").unwrap();
        let wanted = fold(
            r#"[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"c","major":1,"minor":3,"access":"rw"},
                {"allow":true,"type":"c","major":1,"minor":3,"access":"m"},
                {"allow":true,"type":"b","access":"m"}]"#,
        )
        .unwrap();
        assert_eq!(changes(&fresh, &wanted), ["-a *:* rwm", "+b *:* m", "+c 1:3 rwm"]);
    }

    #[test]
    fn an_update_only_writes_the_difference_and_adds_first() {
        let held = Whitelist::parse("c 1:3 rwm\nc 1:5 rw\nb 8:* r\n").unwrap();
        let wanted = Whitelist::parse("c 1:3 rwm\nc 1:5 r\nc 10:229 rwm\n").unwrap();
        assert_eq!(changes(&held, &wanted), ["+c 10:229 rwm", "-b 8:* r", "-c 1:5 w"]);
        assert!(changes(&held, &held).is_empty());
    }

    #[test]
    fn a_privileged_container_is_one_write() {
        let held = Whitelist::parse("c 1:3 rwm\n").unwrap();
        let wanted = fold(r#"[{"allow":true,"type":"a","access":"rwm"}]"#).unwrap();
        assert_eq!(changes(&held, &wanted), ["+a *:* rwm"]);
    }

    #[test]
    fn a_hole_in_a_wildcard_is_refused_instead_of_ignored() {
        let hole = r#"[{"allow":true,"type":"c","major":1,"access":"rwm"},
                       {"allow":false,"type":"c","major":1,"minor":3,"access":"w"}]"#;
        let error = fold(hole).unwrap_err();
        assert_eq!(
            error.to_string(),
            "linux.resources.devices: cgroup v1 cannot except c 1:3 w from c 1:* rwm"
        );
        let whole = r#"[{"allow":true,"type":"c","major":1,"minor":3,"access":"rwm"},
                        {"allow":false,"type":"c","major":1,"access":"w"}]"#;
        assert_eq!(fold(whole).unwrap(), Whitelist::parse("c 1:3 rm").unwrap());
    }

    #[test]
    fn text_that_is_no_device_list_is_not_taken_for_one() {
        for bad in ["x 1:3 rwm", "c 1 rwm", "c 1:3", "c 1:3 q", "c a:3 r"] {
            assert_eq!(Whitelist::parse(bad), None, "{bad}");
        }
    }
}
