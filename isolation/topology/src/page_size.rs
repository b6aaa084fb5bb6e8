//! Sizes of huge pages under their three spellings: sysfs (`2048kB`), the hugetlb controller
//! and the OCI specification (`2MB`), Kubernetes-style quantities (`2Mi`).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A huge page size in bytes, always a power of two of at least 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageSize(u64);

/// A text or number that is not a page size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a huge page size such as 2MB or 1GB")]
pub struct ParsePageSizeError(String);

impl PageSize {
    /// The size of this many bytes.
    pub fn from_bytes(bytes: u64) -> Result<Self, ParsePageSizeError> {
        if bytes.is_power_of_two() && bytes >= 4096 {
            Ok(Self(bytes))
        } else {
            Err(ParsePageSizeError(bytes.to_string()))
        }
    }

    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.0
    }

    /// The base-two logarithm, as `MAP_HUGE_SHIFT` wants it.
    #[must_use]
    pub fn shift(self) -> u32 {
        self.0.trailing_zeros()
    }

    /// The directory under `/sys/kernel/mm/hugepages`: `hugepages-2048kB`.
    #[must_use]
    pub fn sysfs_name(self) -> String {
        format!("hugepages-{}kB", self.0 / 1024)
    }

    /// Pages that fit into this many bytes.
    #[must_use]
    pub fn pages_in(self, bytes: u64) -> u64 {
        bytes / self.0
    }
}

impl FromStr for PageSize {
    type Err = ParsePageSizeError;

    fn from_str(text: &str) -> Result<Self, ParsePageSizeError> {
        let error = || ParsePageSizeError(text.chars().take(64).collect());
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let shift = match unit {
            "kB" | "KB" | "Ki" | "KiB" => 10,
            "MB" | "Mi" | "MiB" | "M" => 20,
            "GB" | "Gi" | "GiB" | "G" => 30,
            _ => return Err(error()),
        };
        let number: u64 = number.parse().map_err(|_ignored| error())?;
        let bytes = number.checked_mul(1 << shift).ok_or_else(error)?;
        Self::from_bytes(bytes).map_err(|_ignored| error())
    }
}

impl fmt::Display for PageSize {
    /// The hugetlb controller's spelling, as in `hugetlb.2MB.max`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes >= 1 << 30 => write!(f, "{}GB", bytes >> 30),
            bytes if bytes >= 1 << 20 => write!(f, "{}MB", bytes >> 20),
            bytes => write!(f, "{}KB", bytes >> 10),
        }
    }
}

impl Serialize for PageSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PageSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_spellings_mean_the_same_size() {
        for text in ["2MB", "2Mi", "2048kB", "2M"] {
            let size: PageSize = text.parse().unwrap();
            assert_eq!((size.bytes(), size.shift()), (2 << 20, 21));
            assert_eq!(size.to_string(), "2MB");
            assert_eq!(size.sysfs_name(), "hugepages-2048kB");
        }
        assert_eq!("1048576kB".parse::<PageSize>().unwrap().to_string(), "1GB");
        assert_eq!("64KB".parse::<PageSize>().unwrap().to_string(), "64KB");
        assert_eq!("32MB".parse::<PageSize>().unwrap().to_string(), "32MB");
    }

    #[test]
    fn what_is_no_page_size_is_refused() {
        for text in ["", "MB", "3MB", "2", "2mb", "1KB", "99999999999999999GB", "-2MB"] {
            assert!(text.parse::<PageSize>().is_err(), "{text}");
        }
        assert!(PageSize::from_bytes(0).is_err());
    }
}
