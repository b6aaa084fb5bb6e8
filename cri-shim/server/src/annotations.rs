//! The pod annotations Pinion honours.
//!
//! | annotation | value | meaning |
//! |---|---|---|
//! | `cpu.pinion.dev/exclusive` | `true`, `false` | every container of the pod owns its cpuset alone, or none does whatever its requests look like |
//! | `cpu.pinion.dev/exclusive.<container>` | `true`, `false` | the same for one container; wins over the pod's |
//! | `hugepages.pinion.dev/prefault` | `true`, `false` | prove the granted hugepages by touching them before the container starts; default: for strict pods |
//! | `isolation.pinion.dev/strict` | `true`, `false` | as the `pinion-strict` handler: a container starts only if every term is in force |
//!
//! They are read from the pod, never from the image, and a value that is neither `true`
//! nor `false` is an error: a misspelt wish for isolation must not pass as no wish.

use std::collections::HashMap;

use crate::error::{Error, Result};

const EXCLUSIVE: &str = "cpu.pinion.dev/exclusive";
const PREFAULT: &str = "hugepages.pinion.dev/prefault";
const STRICT: &str = "isolation.pinion.dev/strict";

/// What a pod's annotations ask for on behalf of one container. `None`: nothing said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Wishes {
    /// Exclusive CPUs.
    pub(crate) exclusive: Option<bool>,
    /// Hugepages proven before the start.
    pub(crate) prefault: Option<bool>,
    /// All or nothing.
    pub(crate) strict: Option<bool>,
}

impl Wishes {
    /// Reads the pod's annotations for the container named `container`.
    pub(crate) fn read(annotations: &HashMap<String, String>, container: &str) -> Result<Self> {
        let one = flag(annotations, &format!("{EXCLUSIVE}.{container}"))?;
        Ok(Self {
            exclusive: one.or(flag(annotations, EXCLUSIVE)?),
            prefault: flag(annotations, PREFAULT)?,
            strict: flag(annotations, STRICT)?,
        })
    }
}

fn flag(annotations: &HashMap<String, String>, key: &str) -> Result<Option<bool>> {
    match annotations.get(key).map(String::as_str) {
        None => Ok(None),
        Some("true") => Ok(Some(true)),
        Some("false") => Ok(Some(false)),
        Some(other) => {
            Err(Error::invalid(format!("annotation {key}: {other:?} is neither true nor false")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn the_container_s_own_word_wins_over_the_pod_s() {
        let a = map(&[
            ("cpu.pinion.dev/exclusive", "true"),
            ("cpu.pinion.dev/exclusive.sidecar", "false"),
        ]);
        assert_eq!(Wishes::read(&a, "app").unwrap().exclusive, Some(true));
        assert_eq!(Wishes::read(&a, "sidecar").unwrap().exclusive, Some(false));
    }

    #[test]
    fn a_misspelt_value_is_an_error() {
        let a = map(&[("isolation.pinion.dev/strict", "yes")]);
        assert!(Wishes::read(&a, "app").unwrap_err().to_string().contains("strict"));
    }

    #[test]
    fn silence_is_no_wish() {
        assert_eq!(Wishes::read(&HashMap::new(), "app").unwrap(), Wishes::default());
    }
}
