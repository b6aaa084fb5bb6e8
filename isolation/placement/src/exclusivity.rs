//! Decides whether a container's CPUs are meant to be its own.
//!
//! Clients send a CPU list for shared containers too, so the list alone says nothing. An
//! annotation can decline; then counts what whoever allocated the CPUs has on record, then an
//! annotation that asks; else whole-CPU shares equal to the size of the list mean that the CPUs
//! were allocated one by one. If somebody else was given them as well, an ordinary container
//! shares them, while under a strict handler exclusivity stays asked for, to be refused.
//!
//! A record that gives a container nothing of its own says that its list is everybody's: not
//! even an annotation makes it one container's.

use pinion_topology::CpuSet;

use crate::PartitionKind;

/// What is known about a container when it is created.
#[derive(Debug, Clone, Copy)]
pub struct ExclusivityInputs<'a> {
    /// An explicit wish: `Some(None)` is an explicit "shared".
    pub annotation: Option<Option<PartitionKind>>,
    /// What the allocator of the CPUs has on record.
    pub record: Option<Recorded<'a>>,
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

/// An allocator's record of a container.
#[derive(Debug, Clone, Copy)]
pub struct Recorded<'a> {
    /// Where the record was found.
    pub source: Source,
    /// The CPUs given to the container alone; empty: it runs on what is left for all.
    pub cpus: &'a CpuSet,
}

/// Where an allocator's record was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The allocator answered.
    Answer,
    /// The file in which it keeps its state.
    StateFile,
    /// Variables that it put into the container's environment.
    Environment,
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
    /// The allocator's record, which names exactly these CPUs.
    Record(Source),
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
    /// The allocator has no CPUs of its own on record for it.
    Record(Source),
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
    let recorded =
        inputs.record.filter(|record| record.cpus == inputs.cpus && !record.cpus.is_empty());
    match (inputs.annotation, recorded) {
        (Some(None), _) => return Shared(SharedWhy::Annotation),
        (_, Some(record)) => return Exclusive(Basis::Record(record.source)),
        (Some(Some(_)), None) => match inputs.record.filter(|record| record.cpus.is_empty()) {
            Some(record) => return Shared(SharedWhy::Record(record.source)),
            None => return Exclusive(Basis::Annotation),
        },
        (None, None) => {}
    }
    if inputs.cpus.is_empty() {
        return Shared(SharedWhy::NoCpus);
    }
    if inputs.online.is_subset(inputs.cpus) {
        return Shared(SharedWhy::AllCpus);
    }
    if let Some(record) = inputs.record.filter(|record| record.cpus.is_empty()) {
        return Shared(SharedWhy::Record(record.source));
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
            record: None,
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
    fn the_allocator_s_record_counts_before_guesses_and_a_refusal_before_it() {
        let (own, list, none): (CpuSet, CpuSet, CpuSet) =
            ("2-3".parse().unwrap(), "0-7".parse().unwrap(), CpuSet::new());
        let decide = |annotation, cpus: &CpuSet| {
            exclusivity(&ExclusivityInputs {
                annotation,
                record: Some(Recorded { source: Source::StateFile, cpus }),
                strict: false,
                cpus: &own,
                shares: 2048,
                online: &list,
                others: &[],
            })
        };
        let recorded = Exclusivity::Exclusive(Basis::Record(Source::StateFile));
        assert_eq!(decide(None, &own), recorded);
        assert_eq!(decide(Some(Some(PartitionKind::Isolated)), &own), recorded);
        assert_eq!(decide(Some(None), &own), Exclusivity::Shared(SharedWhy::Annotation));
        assert_eq!(decide(None, &none), Exclusivity::Shared(SharedWhy::Record(Source::StateFile)));
        let asked = Some(Some(PartitionKind::Isolated));
        let pool = Exclusivity::Shared(SharedWhy::Record(Source::StateFile));
        assert_eq!(decide(asked, &none), pool, "everybody's CPUs are given to nobody");
        // A record of other CPUs says nothing about these.
        let other = "4-5".parse().unwrap();
        assert_eq!(decide(None, &other), Exclusivity::Exclusive(Basis::Inference));
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
