//! What may not be collected: content that a pull or load is about to use or has just brought.
//!
//! A lease is taken before looking whether content exists; the collector looks at leases and
//! deletes under the same lock. So content found under a lease stays.

use std::{
    collections::{BTreeSet, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{Digest, record::LayerRecord};

/// A layer on disk whose record is not written yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ready {
    pub(crate) record: LayerRecord,
    pub(crate) implied: BTreeSet<PathBuf>,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    /// Holders per digest: blobs by digest, layers by chain id.
    leases: HashMap<Digest, usize>,
    pub(crate) ready: HashMap<Digest, Ready>,
}

impl State {
    pub(crate) fn is_leased(&self, digest: &Digest) -> bool {
        self.leases.contains_key(digest)
    }

    /// Digits of the names of everything leased.
    pub(crate) fn leased_hex(&self) -> impl Iterator<Item = &str> {
        self.leases.keys().map(Digest::hex)
    }
}

/// The shared list of leases and unrecorded layers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Inventory {
    state: Arc<Mutex<State>>,
}

impl Inventory {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty lease, ended by dropping it.
    pub(crate) fn lease(&self) -> Lease {
        Lease { inventory: self.clone(), held: Vec::new() }
    }
}

/// Keeps content from being collected.
#[derive(Debug)]
pub(crate) struct Lease {
    inventory: Inventory,
    held: Vec<Digest>,
}

impl Lease {
    /// Covers `digest` as well.
    pub(crate) fn cover(&mut self, digest: &Digest) {
        *self.inventory.lock().leases.entry(digest.clone()).or_default() += 1;
        self.held.push(digest.clone());
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.inventory.lock();
        for digest in &self.held {
            if let Some(holders) = state.leases.get_mut(digest) {
                *holders -= 1;
                if *holders == 0 {
                    state.leases.remove(digest);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_leased_until_its_last_holder_goes() {
        let inventory = Inventory::default();
        let digest = Digest::of(b"x");
        let (mut one, mut two) = (inventory.lease(), inventory.lease());
        one.cover(&digest);
        one.cover(&digest);
        two.cover(&digest);
        drop(one);
        assert!(inventory.lock().is_leased(&digest));
        drop(two);
        assert!(!inventory.lock().is_leased(&digest));
    }
}
