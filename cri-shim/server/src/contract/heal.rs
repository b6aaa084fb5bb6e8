//! Lost CPUs taken back by this process itself, and the undo of that.
//!
//! The runtime's own journal is in its state directory and is its alone; what is written here
//! is in the server's store, by container, before it is written. Both undo the same way and
//! any number of times, so neither needs to know of the other. The entry is given back after
//! the runtime has deleted the container, or at the next start when the container is gone.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use pinion_placement::UndoStep;
use pinion_store::Table;

use super::view::{asked, host};
use crate::error::{Context, Error, Kind, Result};
use crate::node::Node;
use crate::record::Container;
use crate::services::blocking;

/// What was written to take CPUs back, by container.
pub(crate) const HEALS: Table<Vec<UndoStep>> = Table::new("heals");

/// The table as the store has it.
#[derive(Debug, Default)]
pub(crate) struct Journal(Mutex<BTreeMap<String, Vec<UndoStep>>>);

impl Journal {
    /// Takes over what the store remembers.
    pub(crate) fn restore(&self, entries: Vec<(String, Vec<UndoStep>)>) {
        self.lock().extend(entries);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Vec<UndoStep>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a container's CPUs back. Blocks, for as long as some writes to the kernel take.
pub(super) fn take_back(node: &Node, container: &Container) -> Result<()> {
    let (target, request) = asked(node, container)?;
    let id = &container.id;
    let mut record = |steps: &[UndoStep]| {
        let mut known = node.heals.lock().get(id).cloned().unwrap_or_default();
        let new: Vec<&UndoStep> = steps.iter().filter(|step| !known.contains(step)).collect();
        if new.is_empty() {
            return Ok(());
        }
        known.extend(new.into_iter().cloned());
        let committed = node.store.write(|tx| tx.put(HEALS, id, &known));
        committed.map_err(|error| io::Error::other(error.to_string()))?;
        node.heals.lock().insert(id.clone(), known);
        Ok(())
    };
    pinion_placement::heal(host()?, &target, &request, &mut record)
        .map_err(|error| Error::from_foreign(Kind::Refused, error))
}

/// Undoes what was written for a container that is gone. Quick when that is nothing.
pub(crate) async fn give_back(node: &Arc<Node>, container: &str) -> Result<()> {
    let Some(steps) = node.heals.lock().get(container).cloned() else { return Ok(()) };
    let (node, container) = (node.clone(), container.to_owned());
    blocking(move || {
        if let Err(failures) = pinion_placement::undo(host()?, &steps) {
            let first = failures.into_iter().next();
            let what = || format!("undo what took CPUs back for {container}");
            return first.map_or(Ok(()), Err).context(what);
        }
        let forgotten = node.store.write(|tx| tx.delete(HEALS, &container).map(drop));
        forgotten.context(|| format!("forget what took CPUs back for {container}"))?;
        node.heals.lock().remove(&container);
        Ok(())
    })
    .await
}

/// Undoes what was written for containers that are not there any more.
pub(crate) async fn settle(node: &Arc<Node>, known: &HashSet<String>) -> Result<()> {
    let gone: Vec<String> =
        node.heals.lock().keys().filter(|id| !known.contains(*id)).cloned().collect();
    let mut outcome = Ok(());
    for container in gone {
        outcome = outcome.and(give_back(node, &container).await);
    }
    outcome
}
