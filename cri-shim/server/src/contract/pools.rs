//! Pools of hugepages that change while pages of them are granted.
//!
//! An administrator, another program or the kernel itself (which moves pages between nodes
//! along with a process) can resize a pool at any time. What is granted stays granted, so a
//! pool that has become too small for it is a promise that no longer holds: it is logged,
//! stands in Status and in the receipt of each container that has pages there, and goes when
//! the pool is large enough again. A pool that only grew or shrank within what is left is
//! logged.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pinion_placement::{Drift, Ledger, Reason, Refusal, TermName};

use super::hugepages;
use crate::error::Result;
use crate::node::Node;
use crate::services::blocking;

/// How often the pools are looked at while something is granted.
const EVERY: Duration = Duration::from_secs(2);

/// Looks in a row after which pages in others' use count. Until then they may be those that a
/// container being created touches to prove its grant, which no group's counters show yet.
const FOREIGN: u32 = 30;

/// Pools that are too small for what is granted of them.
#[derive(Debug, Default)]
pub(crate) struct Pools(Mutex<Vec<Drift>>);

impl Pools {
    /// For `info`.
    pub(crate) fn words(&self) -> Vec<String> {
        self.lock().iter().map(words).collect()
    }

    /// What it means for a container.
    pub(super) fn refusal(&self, container: &str) -> Option<Refusal> {
        let drift = self.lock();
        let concerns = |drift: &&Drift| match drift {
            Drift::Overcommitted { containers, .. } => containers.iter().any(|id| id == container),
            Drift::Resized { .. } => false,
        };
        let found = drift.iter().find(concerns)?;
        let (term, reason, detail) = (TermName::Hugepages, Reason::PoolExhausted, words(found));
        Some(Refusal { term, reason, detail })
    }

    /// Keeps what was found; says what is new or gone.
    fn keep(&self, found: Vec<Drift>) {
        let (resized, short): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|drift| matches!(drift, Drift::Resized { .. }));
        for drift in &resized {
            tracing::warn!("{}", words(drift));
        }
        let mut before = self.lock();
        for drift in short.iter().filter(|drift| !before.contains(drift)) {
            tracing::error!("{}", words(drift));
        }
        if short.is_empty() && !before.is_empty() {
            tracing::info!("the pools of hugepages have room for all grants again");
        }
        *before = short;
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Drift>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn words(drift: &Drift) -> String {
    match drift {
        Drift::Resized { node, size, before, now } => {
            format!("the pool of {size} pages on node {node} had {before} pages and has {now}")
        }
        Drift::Overcommitted { node, size, total, granted, foreign, containers } => format!(
            "node {node} has {total} pages of {size}; {granted} are granted to {} and {foreign} \
             in use by others; raise nr_hugepages of the node or end one of them",
            containers.join(", ")
        ),
    }
}

/// Watches for as long as the server runs.
pub(crate) async fn run(node: Arc<Node>) {
    let mut last: Option<Ledger> = None;
    let mut foreign = 0;
    loop {
        tokio::time::sleep(EVERY).await;
        if node.hugepages.holders().is_empty() {
            last = None;
            foreign = 0;
            node.pools.keep(Vec::new());
            continue;
        }
        let looker = node.clone();
        let seen = blocking(move || hugepages::observed(&looker)).await;
        last = look(&node, last, seen, &mut foreign);
    }
}

/// Compares with the last look; what the next one is compared with.
fn look(
    node: &Node,
    last: Option<Ledger>,
    seen: Result<(Vec<pinion_placement::NodePool>, hugepages::Grants)>,
    foreign: &mut u32,
) -> Option<Ledger> {
    let (pools, grants) = match seen {
        Ok(seen) => seen,
        Err(error) => {
            tracing::debug!(error = %error.chain(), "the pools of hugepages were not looked at");
            return last;
        }
    };
    let mut ledger = Ledger::new(pools.clone());
    let short = believed(ledger.restore(grants), foreign);
    let resized = last.map(|mut last| last.observe(pools)).unwrap_or_default();
    let resized = resized.into_iter().filter(|drift| matches!(drift, Drift::Resized { .. }));
    node.pools.keep(resized.chain(short).collect());
    Some(ledger)
}

/// What is short without doubt, and what has been for long; `foreign` counts the looks.
fn believed(short: Vec<Drift>, foreign: &mut u32) -> Vec<Drift> {
    let is_certain = |drift: &Drift| match drift {
        Drift::Overcommitted { granted, total, .. } => granted > total,
        Drift::Resized { .. } => true,
    };
    let doubtful = short.iter().any(|drift| !is_certain(drift));
    *foreign = if doubtful { foreign.saturating_add(1) } else { 0 };
    let all = *foreign > FOREIGN;
    short.into_iter().filter(|drift| all || is_certain(drift)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_in_others_use_count_when_they_stay_so() {
        let size = "1GB".parse().unwrap();
        let short = |granted, foreign| Drift::Overcommitted {
            node: 1,
            size,
            total: 2,
            granted,
            foreign,
            containers: vec!["a".to_owned()],
        };
        let mut looks = 0;
        for _ in 0..FOREIGN {
            assert!(believed(vec![short(2, 2)], &mut looks).is_empty());
        }
        assert_eq!(believed(vec![short(2, 2)], &mut looks).len(), 1);
        assert!(believed(Vec::new(), &mut looks).is_empty());
        assert_eq!(believed(vec![short(3, 0), short(2, 1)], &mut looks).len(), 1);
    }

    #[test]
    fn a_short_pool_concerns_those_who_have_pages_there_and_ends() {
        let pools = Pools::default();
        let size = "2MB".parse().unwrap();
        let short = Drift::Overcommitted {
            node: 1,
            size,
            total: 32,
            granted: 64,
            foreign: 0,
            containers: vec!["a".to_owned()],
        };
        pools.keep(vec![Drift::Resized { node: 1, size, before: 128, now: 32 }, short]);
        assert_eq!(pools.words().len(), 1);
        let refusal = pools.refusal("a").unwrap();
        assert_eq!(refusal.reason, Reason::PoolExhausted);
        assert!(refusal.detail.contains("node 1 has 32 pages of 2MB; 64 are granted to a"));
        assert_eq!(pools.refusal("b"), None);
        pools.keep(Vec::new());
        assert!(pools.words().is_empty() && pools.refusal("a").is_none());
    }
}
