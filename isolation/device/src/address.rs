//! Addresses of PCI functions.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// `domain:bus:device.function`, such as `0000:3b:00.1`: the only form that sysfs uses, and
/// the only one accepted, so that an address is always one harmless path component.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address(String);

/// A text that is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a PCI address such as 0000:3b:00.1")]
pub struct ParseAddressError(String);

impl Address {
    /// The text, as sysfs spells it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Address {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, ParseAddressError> {
        let lower = text.to_ascii_lowercase();
        let hex = |part: &str, digits: std::ops::RangeInclusive<usize>| {
            digits.contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_hexdigit())
        };
        let parts = lower.rsplit_once('.').and_then(|(slot, function)| {
            let mut slot = slot.splitn(3, ':');
            Some((slot.next()?, slot.next()?, slot.next()?, function))
        });
        match parts {
            // Domains above 0xffff exist behind VMD controllers.
            Some((domain, bus, device, function))
                if hex(domain, 4..=8)
                    && hex(bus, 2..=2)
                    && hex(device, 2..=2)
                    && hex(function, 1..=1) =>
            {
                Ok(Self(lower))
            }
            _ => Err(ParseAddressError(text.chars().take(64).collect())),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = ParseAddressError;

    fn try_from(text: String) -> Result<Self, ParseAddressError> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.0
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sysfs_form_is_an_address() {
        for good in ["0000:3b:00.1", "10000:01:1f.7", "0000:3B:0a.0"] {
            assert_eq!(good.parse::<Address>().unwrap().as_str(), good.to_ascii_lowercase());
        }
        for bad in [
            "",
            "3b:00.1",
            "0000:3b:00",
            "../../x",
            "0000:3b:00.1/..",
            "0000:3b:0g.1",
            "0000:3b:00.11",
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<Address>("\"../x\"").is_err());
    }
}
