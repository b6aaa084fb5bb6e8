//! The spec's device rules, checked and brought to one form.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::{Error, Result};

/// `BPF_DEVCG_ACC_*` of `linux/bpf.h`.
pub(super) const MKNOD: u8 = 1;
pub(super) const READ: u8 = 2;
pub(super) const WRITE: u8 = 4;
pub(super) const ALL: u8 = MKNOD | READ | WRITE;

/// Block or character.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Block,
    Char,
}

/// One rule; a missing number matches every number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) allow: bool,
    pub(super) kind: Kind,
    pub(super) major: Option<u32>,
    pub(super) minor: Option<u32>,
    /// Any of [`MKNOD`], [`READ`], [`WRITE`], never none.
    pub(super) access: u8,
}

/// Checks rules and splits those for all kinds in two. Missing access means all access.
pub(super) fn normalise(rules: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>> {
    let mut normal = Vec::with_capacity(rules.len() + 2);
    for rule in rules {
        let kinds: &[Kind] = match rule.typ().unwrap_or(LinuxDeviceType::A) {
            LinuxDeviceType::A => &[Kind::Block, Kind::Char],
            LinuxDeviceType::B => &[Kind::Block],
            LinuxDeviceType::C | LinuxDeviceType::U => &[Kind::Char],
            LinuxDeviceType::P => return invalid("a FIFO is not a device the kernel restricts"),
        };
        let major = number("major", rule.major())?;
        let minor = number("minor", rule.minor())?;
        let access = access(rule.access().as_deref().unwrap_or(""))?;
        let allow = rule.allow();
        normal.extend(kinds.iter().map(|kind| Rule { allow, kind: *kind, major, minor, access }));
    }
    Ok(normal)
}

fn invalid<T>(reason: impl Into<String>) -> Result<T> {
    Err(Error::Invalid { field: "linux.resources.devices", reason: reason.into() })
}

/// -1 is the spec's other spelling of "any".
fn number(name: &str, value: Option<i64>) -> Result<Option<u32>> {
    match value {
        None | Some(-1) => Ok(None),
        Some(value) => match u32::try_from(value) {
            Ok(value) => Ok(Some(value)),
            Err(_out_of_range) => invalid(format!("{name} {value} is not a device number")),
        },
    }
}

fn access(text: &str) -> Result<u8> {
    let mut bits = 0;
    for letter in text.chars() {
        bits |= match letter {
            'm' => MKNOD,
            'r' => READ,
            'w' => WRITE,
            _ => return invalid(format!("access {text:?} is not made of r, w and m")),
        };
    }
    Ok(if bits == 0 { ALL } else { bits })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Vec<Rule>> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        normalise(&rules)
    }

    #[test]
    fn a_rule_for_everything_covers_both_kinds_and_all_access() {
        let rules = parse(r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"a"}]"#).unwrap();
        assert_eq!(rules.len(), 4);
        assert!(rules.iter().all(|rule| rule.access == ALL && rule.major.is_none()));
    }

    #[test]
    fn minus_one_is_any_and_other_negatives_are_refused() {
        let rules = parse(r#"[{"allow":true,"type":"c","major":-1,"minor":3,"access":"r"}]"#);
        assert_eq!(
            rules.unwrap(),
            [Rule { allow: true, kind: Kind::Char, major: None, minor: Some(3), access: READ }]
        );
        for bad in [
            r#"[{"allow":true,"type":"c","major":-2}]"#,
            r#"[{"allow":true,"type":"c","major":4294967296}]"#,
            r#"[{"allow":true,"type":"c","access":"x"}]"#,
            r#"[{"allow":true,"type":"p"}]"#,
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
