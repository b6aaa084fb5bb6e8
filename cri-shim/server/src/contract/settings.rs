//! Kernel settings of the whole node, lent to containers and always given back.
//!
//! The algebra is [`pinion_lease`]'s; here are its two tables and its one lock. Whoever
//! needs a setting ([`lease`]) names itself as the owner, by container id or another stable
//! name, and [`release`]s by the same name; both may be repeated. Wishes and undo are
//! committed before the first write, so that a start after a crash finds everything that is
//! owed. The kernel is made to agree at every change of a lease and once a second after.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pinion_lease::{Conflict, Entry, Leases, Record, Report, Setting, State, Wish, conflict};
use pinion_store::Table;

use crate::error::{Context, Error, Kind, Result};
use crate::node::Node;
use crate::services::blocking;

/// Wishes by owner.
pub(crate) const LEASES: Table<Vec<Wish>> = Table::new("node-leases");
/// The undo of each changed setting, by its path.
pub(crate) const SETTINGS: Table<Entry> = Table::new("node-settings");

/// How often the kernel is looked at while something is lent: interrupts come and go, and
/// other programs write the same files.
const EVERY: Duration = Duration::from_secs(1);
const ROOT: &str = "/";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The settings in force.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    state: Mutex<State>,
}

impl Settings {
    /// Takes over what the store remembers; the keys of entries that a reboot made void.
    pub(crate) fn restore(&self, leases: Leases, entries: Vec<Entry>) -> Vec<Setting> {
        let boot = std::fs::read_to_string(BOOT_ID).unwrap_or_default();
        let (state, void) = State::restore(boot.trim(), leases, entries);
        *self.lock() = state;
        void
    }

    /// Everybody who was lent something.
    pub(crate) fn owners(&self) -> Vec<String> {
        self.lock().leases().keys().cloned().collect()
    }

    /// Interrupts that the kernel does not let go elsewhere, with its words.
    pub(crate) fn unsteerable(&self) -> BTreeMap<u32, String> {
        let refused = |(setting, refused): (&Setting, &pinion_lease::Refused)| match setting {
            Setting::IrqAffinity { irq } => Some((*irq, refused.reason.clone())),
            _ => None,
        };
        self.lock().refused().iter().filter_map(refused).collect()
    }

    /// Settings that are not as they were, with their old values.
    pub(crate) fn changed(&self) -> Vec<Entry> {
        self.lock().entries().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lends settings to an owner, in place of what it had, and makes the kernel agree. A wish
/// that contradicts another owner's is refused before anything is written; one the kernel
/// does not grant is left to the audit.
pub(crate) async fn lease(node: &Arc<Node>, owner: &str, wishes: Vec<Wish>) -> Result<()> {
    if wishes.is_empty() {
        return release(node, owner).await;
    }
    if let Some(conflict) = conflict(node.settings.lock().leases(), owner, &wishes) {
        return Err(refusal(conflict));
    }
    let (node, owner) = (node.clone(), owner.to_owned());
    blocking(move || {
        let committed = node.store.write(|tx| tx.put(LEASES, &owner, &wishes));
        committed.context(|| format!("remember the node settings lent to {owner}"))?;
        node.settings.lock().lease(&owner, wishes);
        reconcile(&node)
    })
    .await
}

/// Takes everything back from an owner. Quick when it has nothing.
pub(crate) async fn release(node: &Arc<Node>, owner: &str) -> Result<()> {
    if !node.settings.lock().leases().contains_key(owner) {
        return Ok(());
    }
    let (node, owner) = (node.clone(), owner.to_owned());
    blocking(move || {
        let committed = node.store.write(|tx| tx.delete(LEASES, &owner).map(drop));
        committed.context(|| format!("forget the node settings lent to {owner}"))?;
        node.settings.lock().release(&owner);
        reconcile(&node)
    })
    .await
}

fn refusal(conflict: Conflict) -> Error {
    Error::from_foreign(Kind::Refused, conflict)
}

/// Drops the leases of owners that are gone and makes the kernel agree with the rest: what a
/// start does once it knows who is left.
pub(crate) async fn settle(node: &Arc<Node>, known: &HashSet<String>) -> Result<()> {
    let gone: Vec<String> =
        node.settings.owners().into_iter().filter(|owner| !known.contains(owner)).collect();
    let node = node.clone();
    blocking(move || {
        let forget = |tx: &pinion_store::Tx| {
            gone.iter().try_for_each(|owner| tx.delete(LEASES, owner).map(drop))
        };
        node.store.write(forget).context(|| "forget leases of the past".to_owned())?;
        for owner in &gone {
            node.settings.lock().release(owner);
        }
        reconcile(&node)
    })
    .await
}

/// One pass. Blocks.
fn reconcile(node: &Node) -> Result<()> {
    let mut record = |records: &[Record]| {
        let written = node.store.write(|tx| {
            records.iter().try_for_each(|record| match record {
                Record::Put(entry) => tx.put(SETTINGS, &entry.setting.to_string(), entry),
                Record::Drop(setting) => tx.delete(SETTINGS, &setting.to_string()).map(drop),
            })
        });
        written.map_err(|error| io::Error::other(error.to_string()))
    };
    let report = node.settings.lock().reconcile(Path::new(ROOT), &mut record);
    let report = report.context(|| "reconcile node settings".to_owned())?;
    say(&report);
    Ok(())
}

fn say(report: &Report) {
    for (setting, reason) in &report.refused {
        tracing::info!(%setting, reason, "the kernel keeps its own value");
    }
    for (setting, reason) in &report.stuck {
        tracing::warn!(%setting, reason, "the old value could not be written back");
    }
    if !report.written.is_empty() || !report.restored.is_empty() {
        let (written, restored) = (report.written.len(), report.restored.len());
        tracing::debug!(written, restored, "node settings");
    }
}

/// Keeps the kernel in agreement for as long as the server runs.
pub(crate) async fn watch(node: Arc<Node>) {
    let mut failing = false;
    loop {
        tokio::time::sleep(EVERY).await;
        if node.settings.lock().is_idle() {
            continue;
        }
        let looked = node.clone();
        match blocking(move || reconcile(&looked)).await {
            Ok(()) => failing = false,
            // Once per failure, not once a second.
            Err(error) if !failing => {
                failing = true;
                tracing::error!(error = %error.chain(), "node settings are not watched");
            }
            Err(_) => {}
        }
    }
}
