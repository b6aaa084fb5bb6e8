//! `linux.memoryPolicy`: the NUMA policy of the container's first process.

use oci_spec::runtime::{LinuxMemoryPolicy, MemoryPolicyFlagType, MemoryPolicyModeType};
use pinion_topology::NodeSet;

use crate::error::{Error, Result};

/// The arguments of set_mempolicy(2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPolicy {
    /// `MPOL_*` with its mode flags.
    pub mode: i32,
    /// One bit per node.
    pub nodes: Vec<u64>,
}

impl MemoryPolicy {
    /// Checks and converts the configuration.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a malformed node list or a mode without its nodes.
    pub fn plan(asked: &LinuxMemoryPolicy) -> Result<Self> {
        use MemoryPolicyFlagType as Flag;
        use MemoryPolicyModeType as Mode;
        let (mode, needs_nodes) = match asked.mode() {
            Mode::MpolDefault => (0, Some(false)),
            Mode::MpolPreferred => (1, None),
            Mode::MpolBind => (2, Some(true)),
            Mode::MpolInterleave => (3, Some(true)),
            Mode::MpolLocal => (4, Some(false)),
            Mode::MpolPreferredMany => (5, Some(true)),
            Mode::MpolWeightedInterleave => (6, Some(true)),
        };
        let nodes = nodes(asked.nodes().as_deref().unwrap_or_default())?;
        if needs_nodes.is_some_and(|needed| needed == nodes.is_empty()) {
            return Err(Error::Invalid(format!(
                "invalid memory policy: linux.memoryPolicy.nodes does not fit the mode: {} needs {}",
                asked.mode(),
                if nodes.is_empty() { "nodes" } else { "none" }
            )));
        }
        let flags = asked.flags().iter().flatten().fold(0, |flags, flag| {
            flags
                | match flag {
                    Flag::MpolFNumaBalancing => 1 << 13,
                    Flag::MpolFRelativeNodes => 1 << 14,
                    Flag::MpolFStaticNodes => 1 << 15,
                }
        });
        Ok(Self { mode: mode | flags, nodes })
    }
}

fn nodes(list: &str) -> Result<Vec<u64>> {
    match list.parse::<NodeSet>() {
        Ok(set) => Ok(set.words().to_vec()),
        Err(error) => Err(Error::Invalid(format!(
            "invalid memory policy node in linux.memoryPolicy.nodes: {error}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<MemoryPolicy> {
        MemoryPolicy::plan(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn modes_flags_and_nodes_are_combined() {
        let policy =
            plan(r#"{"mode":"MPOL_BIND","nodes":"0-1,3","flags":["MPOL_F_STATIC_NODES"]}"#)
                .unwrap();
        assert_eq!(policy, MemoryPolicy { mode: 2 | 1 << 15, nodes: vec![0b1011] });
    }

    #[test]
    fn a_mode_without_its_nodes_and_nonsense_are_refused() {
        for json in [
            r#"{"mode":"MPOL_BIND"}"#,
            r#"{"mode":"MPOL_DEFAULT","nodes":"0"}"#,
            r#"{"mode":"MPOL_BIND","nodes":"2-1"}"#,
            r#"{"mode":"MPOL_BIND","nodes":"99999"}"#,
        ] {
            assert!(plan(json).is_err(), "{json}");
        }
    }
}
