//! Content digests: `sha256:` and 64 lower-case hexadecimal digits, nothing else.
//!
//! A digest names files and URL parts, so no other text ever becomes a [`Digest`].

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

const PREFIX: &str = "sha256:";

/// A verified digest string.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

/// Text that is not a digest this crate accepts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("digest {value:?}: {reason}")]
pub struct DigestError {
    /// The text, cut at 100 characters.
    pub value: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl Digest {
    /// Checks and keeps a digest.
    pub fn parse(text: &str) -> Result<Self, DigestError> {
        let refuse = |reason| Err(DigestError { value: text.chars().take(100).collect(), reason });
        let Some((algorithm, hex)) = text.split_once(':') else {
            return refuse("lacks an algorithm such as sha256:");
        };
        if algorithm != "sha256" {
            return refuse("only sha256 is supported");
        }
        if hex.len() != 64 {
            return refuse("sha256 takes 64 hexadecimal digits");
        }
        if !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return refuse("only lower-case hexadecimal digits are allowed");
        }
        Ok(Self(text.to_owned()))
    }

    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self::of_hasher(Sha256::new_with_prefix(bytes))
    }

    /// The digest of everything `hasher` has seen.
    pub(crate) fn of_hasher(hasher: Sha256) -> Self {
        use fmt::Write;
        let mut text = String::with_capacity(PREFIX.len() + 64);
        text.push_str(PREFIX);
        for byte in hasher.finalize() {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        Self(text)
    }

    /// The whole text, `sha256:…`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The hexadecimal part.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.0[PREFIX.len()..]
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, DigestError> {
        Self::parse(&text)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

/// Chain ids: what a layer's directory is named after, because a layer's meaning depends on what
/// lies below it (image-spec, config.md, "Layer ChainID").
pub(crate) fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chain: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        chain.push(match chain.last() {
            None => diff_id.clone(),
            Some(parent) => Digest::of(format!("{parent} {diff_id}").as_bytes()),
        });
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lower_case_sha256_is_a_digest() {
        let good = format!("sha256:{}", "0a".repeat(32));
        assert_eq!(Digest::parse(&good).unwrap().hex(), "0a".repeat(32));
        let long = format!("sha256:{}", "a".repeat(1 << 20));
        let upper = format!("sha256:{}", "0A".repeat(32));
        let sha512 = format!("sha512:{}", "a".repeat(128));
        let bad =
            ["", "sha256:", "sha256:../../x", "sha256:%2e%2e", "../x", &long, &upper, &sha512];
        for text in bad {
            let error = Digest::parse(text).unwrap_err();
            assert!(error.value.len() <= 100);
        }
    }

    #[test]
    fn the_digest_of_nothing_is_the_well_known_one() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").as_str(), empty);
    }

    #[test]
    fn a_chain_starts_with_the_first_diff_id_and_then_hashes_pairs() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let chain = chain_ids(&[a.clone(), b.clone()]);
        assert_eq!(chain[0], a);
        assert_eq!(chain[1], Digest::of(format!("{a} {b}").as_bytes()));
    }
}
