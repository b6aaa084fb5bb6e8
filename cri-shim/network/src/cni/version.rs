//! CNI specification versions and what each of them brought.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A version of the specification this runtime speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Version {
    /// 0.3.0: chains and structured results.
    V0_3_0,
    /// 0.3.1.
    V0_3_1,
    /// 0.4.0: CHECK, and the previous result on DEL.
    V0_4_0,
    /// 1.0.0.
    V1_0_0,
    /// 1.1.0: STATUS and GC.
    V1_1_0,
}

/// With their spelling, ascending.
const ALL: [(Version, &str); 5] = [
    (Version::V0_3_0, "0.3.0"),
    (Version::V0_3_1, "0.3.1"),
    (Version::V0_4_0, "0.4.0"),
    (Version::V1_0_0, "1.0.0"),
    (Version::V1_1_0, "1.1.0"),
];

impl Version {
    /// `1.0.0`.
    pub fn as_str(self) -> &'static str {
        ALL.iter().find(|(version, _)| *version == self).map_or("1.1.0", |(_, text)| text)
    }

    /// DEL and CHECK get `prevResult`, and CHECK exists.
    pub fn has_check(self) -> bool {
        self >= Self::V0_4_0
    }

    /// STATUS and GC exist.
    pub fn has_status(self) -> bool {
        self >= Self::V1_1_0
    }
}

impl FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = ALL.iter().find(|(_, spelling)| *spelling == text);
        known.map(|(version, _)| *version).ok_or_else(|| {
            let all = ALL.map(|(_, spelling)| spelling).join(", ");
            format!("cniVersion {text:?} is none of {all}")
        })
    }
}

impl TryFrom<String> for Version {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Version> for String {
    fn from(version: Version) -> Self {
        version.as_str().to_owned()
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_what_they_can_do() {
        assert!(!Version::V0_3_1.has_check() && Version::V0_4_0.has_check());
        assert!(!Version::V1_0_0.has_status() && Version::V1_1_0.has_status());
        for (version, text) in ALL {
            assert_eq!(text.parse(), Ok(version));
            assert_eq!(version.to_string(), text);
        }
        assert!("0.2.0".parse::<Version>().unwrap_err().contains("1.1.0"));
    }
}
