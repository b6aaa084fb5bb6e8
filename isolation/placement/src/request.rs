//! What is asked of the runtime for one container, carried in OCI annotations.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;

use pinion_topology::PageSize;
use serde::{Deserialize, Serialize};

use crate::Grant;

const PARTITION: &str = "dev.pinion.cpuset.partition";
const PREFAULT: &str = "dev.pinion.hugepages.prefault";
const STRICT: &str = "dev.pinion.strict";
const UNTHROTTLED: &str = "dev.pinion.cpu.unthrottled";
const OWNED_LEVELS: &str = "dev.pinion.cgroup.owned-levels";

/// Groups above the container's own whose quota may be lifted when nothing else is said:
/// the one that holds the containers of one workload.
const DEFAULT_OWNED_LEVELS: usize = 1;
/// Deeper trees than any orchestrator builds; bounds a hostile annotation.
const MAX_OWNED_LEVELS: usize = 8;

/// The kind of cpuset partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PartitionKind {
    /// Exclusive and without load balancing: what polling threads want.
    Isolated,
    /// Exclusive, with a scheduling domain of its own: what many threads want.
    Root,
}

/// The guarantees to enforce. Nothing is asked for by default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Make the container's CPUs a partition of this kind (`dev.pinion.cpuset.partition`).
    pub partition: Option<PartitionKind>,
    /// Huge pages to prove before the start (`dev.pinion.hugepages.prefault`).
    pub prefault: Vec<Grant>,
    /// Refuse rather than start degraded (`dev.pinion.strict`).
    pub strict: bool,
    /// Lift CPU quotas, which a partition implies (`dev.pinion.cpu.unthrottled`).
    pub unthrottled: bool,
    /// How many groups above the container's belong to the same workload, so that their CPU
    /// quota may be lifted for it (`dev.pinion.cgroup.owned-levels`).
    pub owned_levels: usize,
}

/// An annotation that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("annotation {name}={value:?}: expected {expected}")]
pub struct RequestError {
    /// The annotation.
    pub name: &'static str,
    /// Its value.
    pub value: String,
    /// What it may be.
    pub expected: &'static str,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            partition: None,
            prefault: Vec::new(),
            strict: false,
            unthrottled: false,
            owned_levels: DEFAULT_OWNED_LEVELS,
        }
    }
}

impl Request {
    /// Reads the annotations; `None` when none of them is there.
    pub fn from_annotations(
        annotations: &HashMap<String, String>,
    ) -> Result<Option<Self>, RequestError> {
        let mut request = Self::default();
        let mut asked = false;
        let mut read = |name: &'static str| {
            let value = annotations.get(name);
            asked |= value.is_some();
            value.map(String::as_str)
        };
        if let Some(value) = read(PARTITION) {
            request.partition = Some(value.parse()?);
        }
        if let Some(value) = read(PREFAULT) {
            request.prefault = parse_prefault(value)?;
        }
        if let Some(value) = read(STRICT) {
            request.strict = parse_flag(STRICT, value)?;
        }
        if let Some(value) = read(UNTHROTTLED) {
            request.unthrottled = parse_flag(UNTHROTTLED, value)?;
        }
        if let Some(value) = read(OWNED_LEVELS) {
            let levels = value.parse().ok().filter(|levels| *levels <= MAX_OWNED_LEVELS);
            request.owned_levels = levels.ok_or_else(|| RequestError {
                name: OWNED_LEVELS,
                value: value.to_owned(),
                expected: "a number from 0 to 8",
            })?;
        }
        Ok(asked.then_some(request))
    }

    /// Writes the annotations that [`Request::from_annotations`] reads back.
    #[must_use]
    pub fn to_annotations(&self) -> BTreeMap<String, String> {
        let mut annotations = BTreeMap::new();
        let mut put = |name: &str, value: String| annotations.insert(name.to_owned(), value);
        if let Some(kind) = self.partition {
            put(PARTITION, kind.to_string());
        }
        if !self.prefault.is_empty() {
            let demands: Vec<String> = self.prefault.iter().map(Grant::to_string).collect();
            put(PREFAULT, demands.join(","));
        }
        put(STRICT, self.strict.to_string());
        if self.unthrottled {
            put(UNTHROTTLED, self.unthrottled.to_string());
        }
        if self.owned_levels != DEFAULT_OWNED_LEVELS {
            put(OWNED_LEVELS, self.owned_levels.to_string());
        }
        annotations
    }
}

fn parse_flag(name: &'static str, value: &str) -> Result<bool, RequestError> {
    let expected = "true or false";
    value.parse().map_err(|_not_bool| RequestError { name, value: value.to_owned(), expected })
}

fn parse_prefault(value: &str) -> Result<Vec<Grant>, RequestError> {
    let error = || RequestError {
        name: PREFAULT,
        value: value.to_owned(),
        expected: "node/size=pages items such as 1/2MB=64,1/1GB=2",
    };
    let item = |item: &str| -> Option<Grant> {
        let (place, pages) = item.trim().split_once('=')?;
        let (node, size) = place.split_once('/')?;
        let node: u32 = node.parse().ok().filter(|node| *node < 1024)?;
        let size: PageSize = size.parse().ok()?;
        let pages: u64 = pages.parse().ok().filter(|pages| *pages > 0)?;
        pages.checked_mul(size.bytes())?;
        Some(Grant { node, size, pages })
    };
    let grants: Vec<Grant> = value.split(',').map(item).collect::<Option<_>>().ok_or_else(error)?;
    let places: std::collections::BTreeSet<_> =
        grants.iter().map(|grant| (grant.node, grant.size)).collect();
    if places.len() == grants.len() { Ok(grants) } else { Err(error()) }
}

impl FromStr for PartitionKind {
    type Err = RequestError;

    fn from_str(value: &str) -> Result<Self, RequestError> {
        match value {
            "isolated" => Ok(Self::Isolated),
            "root" => Ok(Self::Root),
            _ => Err(RequestError {
                name: PARTITION,
                value: value.to_owned(),
                expected: "isolated or root",
            }),
        }
    }
}

impl fmt::Display for PartitionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Isolated => "isolated",
            Self::Root => "root",
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Option<Request>, RequestError> {
        let owned = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Request::from_annotations(&owned.collect())
    }

    #[test]
    fn foreign_annotations_ask_for_nothing() {
        assert_eq!(read(&[("io.kubernetes.cri.sandbox-id", "x")]), Ok(None));
    }

    #[test]
    fn every_annotation_is_understood() {
        let request = read(&[
            (PARTITION, "isolated"),
            (PREFAULT, "1/2MB=64, 1/1GB=2"),
            (STRICT, "true"),
            (UNTHROTTLED, "true"),
            (OWNED_LEVELS, "0"),
        ]);
        let request = request.unwrap().unwrap();
        assert_eq!(request.partition, Some(PartitionKind::Isolated));
        assert_eq!((request.strict, request.unthrottled), (true, true));
        assert_eq!(request.owned_levels, 0);
        assert_eq!(request.prefault.len(), 2);
        let second = request.prefault[1];
        assert_eq!((second.node, second.size.bytes(), second.pages), (1, 1 << 30, 2));
    }

    #[test]
    fn nonsense_is_an_error_that_says_what_is_expected() {
        for (name, value) in [
            (PARTITION, "member"),
            (PREFAULT, ""),
            (PREFAULT, "1/2MB=0"),
            (PREFAULT, "1/3MB=1"),
            (PREFAULT, "4096/2MB=1"),
            (PREFAULT, "1/2MB=1,1/2MB=2"),
            (PREFAULT, "1/1GB=18446744073709551615"),
            (STRICT, "yes"),
            (UNTHROTTLED, "1"),
            (OWNED_LEVELS, "-1"),
            (OWNED_LEVELS, "99"),
        ] {
            let error = read(&[(name, value)]).unwrap_err();
            assert_eq!(error.name, name);
            assert!(error.to_string().contains("expected"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn annotations_round_trip(
            isolated in prop::option::of(any::<bool>()),
            pages in prop::collection::btree_map((0u32..8, 20u32..31), 1u64..1000, 0..4),
            strict in any::<bool>(),
            unthrottled in any::<bool>(),
            owned_levels in 0usize..=8,
        ) {
            let kind = |isolated| if isolated { PartitionKind::Isolated } else { PartitionKind::Root };
            let request = Request {
                partition: isolated.map(kind),
                prefault: pages
                    .into_iter()
                    .map(|((node, shift), pages)| {
                        Grant { node, size: PageSize::from_bytes(1 << shift).unwrap(), pages }
                    })
                    .collect(),
                strict,
                unthrottled,
                owned_levels,
            };
            let annotations = request.to_annotations().into_iter().collect();
            prop_assert_eq!(Request::from_annotations(&annotations), Ok(Some(request)));
        }
    }
}
