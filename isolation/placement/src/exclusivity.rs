//! Decides whether a container's CPUs are meant to be its own.
//!
//! Clients send a CPU list for shared containers too, so the list alone says nothing. An
//! annotation decides; else whole-CPU shares equal to the size of the list mean that the CPUs
//! were allocated one by one. If somebody else was given them as well, an ordinary container
//! shares them, while under a strict handler exclusivity stays asked for, to be refused.

use pinion_topology::CpuSet;

use crate::PartitionKind;

/// What is known about a container when it is created.
#[derive(Debug, Clone, Copy)]
pub struct ExclusivityInputs<'a> {
    /// An explicit wish: `Some(None)` is an explicit "shared".
    pub annotation: Option<Option<PartitionKind>>,
    /// Whether the container runs under the handler that refuses what cannot be guaranteed.
    pub strict: bool,
    /// The container's CPUs.
    pub cpus: &'a CpuSet,
    /// Its CPU shares, 1024 per CPU; 0 when not given.
    pub shares: u64,
    /// The machine's online CPUs.
    pub online: &'a CpuSet,
    /// CPU lists of every other container, by name.
    pub others: &'a [(String, CpuSet)],
}

/// The decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exclusivity {
    /// The CPUs are to be the container's alone.
    Exclusive(Basis),
    /// They are not.
    Shared(SharedWhy),
}

/// What an exclusive decision rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Basis {
    /// The annotation.
    Annotation,
    /// The strict handler, and whole-CPU shares over a list of the same size.
    Strict,
    /// Whole-CPU shares over a list of the same size that nobody else was given.
    Inference,
}

/// Why CPUs are shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SharedWhy {
    /// The annotation says so.
    Annotation,
    /// There is no CPU list.
    NoCpus,
    /// The list is every online CPU.
    AllCpus,
    /// The shares are not a whole number of CPUs equal to the list's size.
    Shares {
        /// The shares.
        shares: u64,
        /// CPUs in the list.
        cpus: usize,
    },
    /// Another container has some of the CPUs.
    Overlap {
        /// The other container.
        with: String,
        /// The CPUs both have.
        cpus: CpuSet,
    },
}

/// See the module's documentation.
#[must_use]
pub fn exclusivity(inputs: &ExclusivityInputs<'_>) -> Exclusivity {
    use Exclusivity::{Exclusive, Shared};
    match inputs.annotation {
        Some(Some(_)) => return Exclusive(Basis::Annotation),
        Some(None) => return Shared(SharedWhy::Annotation),
        None => {}
    }
    if inputs.cpus.is_empty() {
        return Shared(SharedWhy::NoCpus);
    }
    if inputs.online.is_subset(inputs.cpus) {
        return Shared(SharedWhy::AllCpus);
    }
    let cpus = inputs.cpus.len();
    if inputs.shares != 1024 * cpus as u64 {
        return Shared(SharedWhy::Shares { shares: inputs.shares, cpus });
    }
    if inputs.strict {
        return Exclusive(Basis::Strict);
    }
    let overlaps = |other: &&(String, CpuSet)| !other.1.is_disjoint(inputs.cpus);
    match inputs.others.iter().find(overlaps) {
        Some((with, theirs)) => Shared(SharedWhy::Overlap {
            with: with.clone(),
            cpus: theirs.intersection(inputs.cpus),
        }),
        None => Exclusive(Basis::Inference),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decide(
        annotation: Option<Option<PartitionKind>>,
        strict: bool,
        cpus: &str,
        shares: u64,
        others: &[(&str, &str)],
    ) -> Exclusivity {
        let others: Vec<_> =
            others.iter().map(|(name, cpus)| ((*name).to_owned(), cpus.parse().unwrap())).collect();
        exclusivity(&ExclusivityInputs {
            annotation,
            strict,
            cpus: &cpus.parse().unwrap(),
            shares,
            online: &"0-7".parse().unwrap(),
            others: &others,
        })
    }

    #[test]
    fn a_guaranteed_container_with_a_list_of_its_own_is_exclusive() {
        let inferred = Exclusivity::Exclusive(Basis::Inference);
        assert_eq!(decide(None, false, "2-3", 2048, &[("web", "0-1,4-7")]), inferred);
    }

    #[test]
    fn whatever_does_not_fit_is_shared_and_says_why() {
        let shared = |why| Exclusivity::Shared(why);
        assert_eq!(decide(None, false, "", 2048, &[]), shared(SharedWhy::NoCpus));
        assert_eq!(decide(None, false, "0-7", 8192, &[]), shared(SharedWhy::AllCpus));
        let shares = SharedWhy::Shares { shares: 1536, cpus: 2 };
        assert_eq!(decide(None, false, "2-3", 1536, &[]), shared(shares));
        let overlap = SharedWhy::Overlap { with: "web".to_owned(), cpus: "3".parse().unwrap() };
        assert_eq!(decide(None, false, "2-3", 2048, &[("web", "3-7")]), shared(overlap));
    }

    #[test]
    fn an_annotation_wins_over_everything_and_strict_over_inference() {
        let asked = Some(Some(PartitionKind::Root));
        let exclusive = Exclusivity::Exclusive;
        assert_eq!(decide(asked, false, "2-3", 2, &[("web", "3")]), exclusive(Basis::Annotation));
        assert_eq!(
            decide(Some(None), true, "2-3", 2048, &[]),
            Exclusivity::Shared(SharedWhy::Annotation)
        );
        assert_eq!(decide(None, true, "2-3", 2048, &[("web", "3")]), exclusive(Basis::Strict));
        let pool = SharedWhy::Shares { shares: 2, cpus: 6 };
        assert_eq!(decide(None, true, "0-1,4-7", 2, &[]), Exclusivity::Shared(pool));
        assert_eq!(decide(None, true, "", 2, &[]), Exclusivity::Shared(SharedWhy::NoCpus));
    }
}
