//! Identifiers and clocks.

use std::fs::File;
use std::io::Read;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::error::{Context, Error, Result};

/// Bytes of randomness in an id; written as twice as many hex digits, the length that
/// kubelet, crictl and log collectors know.
const BYTES: usize = 32;

/// A new random id for a pod or container: 64 lower-case hex digits.
pub(crate) fn random_id() -> Result<String> {
    let mut bytes = [0u8; BYTES];
    File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut bytes))
        .context(|| "read /dev/urandom".to_string())?;
    Ok(hex(&bytes))
}

/// Lower-case hex of bytes.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The bytes of lower- or upper-case hex; nothing if it is not hex.
pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).ok()).collect()
}

/// Checks an id a client sent, which may be a prefix of one of ours. What passes can never
/// be a path.
pub(crate) fn check_id(id: &str) -> Result<&str> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if id.is_empty() {
        return Err(Error::invalid("the request names no id"));
    }
    if id.len() > 128 || id.starts_with('.') || !id.chars().all(good) {
        return Err(Error::invalid(format!(
            "{:?} is not an id",
            id.chars().take(80).collect::<String>()
        )));
    }
    Ok(id)
}

/// Nanoseconds since the epoch.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_64_hex_digits_and_differ() {
        let (a, b) = (random_id().unwrap(), random_id().unwrap());
        assert_eq!(a.len(), 64);
        assert!(a.bytes().all(|c| c.is_ascii_hexdigit()));
        assert_ne!(a, b);
    }

    #[test]
    fn hex_reads_back() {
        assert_eq!(unhex(&hex(&[0, 15, 255])).unwrap(), [0, 15, 255]);
        assert!(unhex("0").is_none());
        assert!(unhex("zz").is_none());
        assert!(unhex("ää").is_none());
    }

    #[test]
    fn ids_that_could_be_paths_are_refused() {
        for id in ["", ".", "..", "a/b", "../x", "a\0b", "é", &"x".repeat(129)] {
            assert!(check_id(id).is_err(), "{id:?}");
        }
        assert!(check_id("0b4c2a8e-8f3c-4d34-9d1f-2f43c1f0a000").is_ok());
    }
}
