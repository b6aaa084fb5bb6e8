//! Qualified device names: `vendor.com/class=name`.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Far more than any container has; bounds a hostile request.
const MOST_NAMES: usize = 256;
const LONGEST_PART: usize = 253;

/// A device's full name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct QualifiedName {
    /// Vendor and class, `vendor.com/class`.
    pub kind: String,
    /// The device within its kind.
    pub device: String,
}

/// A text that is not a qualified name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Malformed.
    #[error("{0:?} is not a CDI device name such as vendor.com/class=name")]
    Malformed(String),
    /// More names than a container can have.
    #[error("{0} CDI devices are asked for, at most {MOST_NAMES} are given")]
    TooMany(usize),
}

impl FromStr for QualifiedName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let parsed =
            text.split_once('=').filter(|(kind, device)| is_kind(kind) && is_device(device));
        match parsed {
            Some((kind, device)) => Ok(Self { kind: kind.to_owned(), device: device.to_owned() }),
            None => Err(NameError::Malformed(text.chars().take(80).collect())),
        }
    }
}

impl fmt::Display for QualifiedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.kind, self.device)
    }
}

/// Vendor and class begin with a letter and end with a letter or digit.
pub(super) fn is_kind(kind: &str) -> bool {
    let part =
        |part: &str| part.starts_with(|c: char| c.is_ascii_alphabetic()) && is_word(part, "_-.");
    kind.split_once('/').is_some_and(|(vendor, class)| part(vendor) && part(class))
}

pub(super) fn is_device(name: &str) -> bool {
    is_word(name, "_-.:")
}

/// Letters and digits, at both ends nothing else.
fn is_word(text: &str, between: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric();
    text.len() <= LONGEST_PART
        && text.starts_with(plain)
        && text.ends_with(plain)
        && text.chars().all(|c| plain(c) || between.contains(c))
}

/// The names a request lists and those in its container's annotations, each once, in order.
/// `prefix` is what the keys of annotations with device names begin with.
pub fn from_annotations(
    listed: &[String],
    annotations: &BTreeMap<&str, &str>,
    prefix: &str,
) -> Result<Vec<QualifiedName>, NameError> {
    let annotated = annotations
        .iter()
        .filter(|(key, _)| key.starts_with(prefix))
        .flat_map(|(_, value)| value.split(','));
    let all: Vec<&str> = listed.iter().map(String::as_str).chain(annotated).collect();
    if all.len() > MOST_NAMES {
        return Err(NameError::TooMany(all.len()));
    }
    let mut names: Vec<QualifiedName> = Vec::new();
    for text in all {
        let name = text.parse()?;
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFIX: &str = "cdi.example.com/";

    #[test]
    fn names_have_a_vendor_a_class_and_a_device() {
        for good in ["vendor.com/net=vf0", "a/b=0", "intel.com/vfio-pool_1.x=0000:41:10.0"] {
            assert_eq!(good.parse::<QualifiedName>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "../../x",
            "vendor.com=x",
            "vendor.com/net",
            "vendor.com/net=",
            "/net=x",
            "vendor.com/net=../x",
            "1vendor/net=x",
            "vendor.com/net=x-",
            "v/c=a b",
            "v/c=a/b",
        ] {
            assert!(bad.parse::<QualifiedName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn annotations_add_to_the_list_and_nothing_is_named_twice() {
        let annotations =
            BTreeMap::from([("cdi.example.com/plugin_0", "v/c=a,v/c=b"), ("other", "v/c=z")]);
        let names = from_annotations(&["v/c=b".to_owned()], &annotations, PREFIX).unwrap();
        let text: Vec<String> = names.iter().map(QualifiedName::to_string).collect();
        assert_eq!(text, ["v/c=b", "v/c=a"]);
        let bad = BTreeMap::from([("cdi.example.com/plugin_0", "../../x")]);
        assert!(from_annotations(&[], &bad, PREFIX).is_err());
    }

    #[test]
    fn ten_thousand_names_are_refused() {
        let many: Vec<String> = (0..10_000).map(|n| format!("v/c=d{n}")).collect();
        let names = from_annotations(&many, &BTreeMap::new(), PREFIX);
        assert_eq!(names, Err(NameError::TooMany(10_000)));
    }
}
