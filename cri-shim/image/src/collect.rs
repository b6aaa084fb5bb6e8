//! Deleting what nothing needs: blobs, layers, remains of interrupted work.

use std::collections::BTreeSet;

use crate::{
    Digest,
    content::Content,
    error::Result,
    images::Inner,
    record::{IMAGES, LAYERS, ROOTFS},
    snapshot::Snapshots,
};

/// What is to be kept, as names in the respective directories.
#[derive(Debug, Default, PartialEq, Eq)]
struct Keep {
    blobs: BTreeSet<String>,
    chains: BTreeSet<Digest>,
    containers: BTreeSet<String>,
}

impl Inner {
    /// Deletes everything that neither an image, nor a container, nor work in progress needs.
    pub(crate) fn collect(&self) -> Result<()> {
        {
            // Whoever recorded content before this lock is seen in the store, whoever is still at
            // it is seen among the leases.
            let mut state = self.inventory.lock();
            let mut keep = self.kept_by_records()?;
            keep.blobs.extend(state.leased_hex().map(str::to_owned));
            let leased: BTreeSet<&str> = state.leased_hex().map(|hex| &hex[..24]).collect();
            let layers: BTreeSet<&str> = keep.chains.iter().map(Snapshots::name).collect();

            for (name, _) in self.content.list()? {
                let hex = name.split('.').next().unwrap_or(&name);
                let wanted = if Content::is_partial(&name) {
                    state.leased_hex().any(|leased| leased == hex)
                } else {
                    keep.blobs.contains(hex)
                };
                if !wanted {
                    self.content.remove(&name)?;
                }
            }
            let (on_disk, containers) = self.snapshots.list()?;
            for name in on_disk {
                let id = name.split('.').next().unwrap_or(&name);
                let wanted =
                    leased.contains(id) || (layers.contains(id) && !Snapshots::is_staged(&name));
                if !wanted {
                    self.snapshots.trash.take_path(&self.snapshots.layers_dir().join(&name))?;
                }
            }
            for name in containers.iter().filter(|name| !keep.containers.contains(*name)) {
                self.snapshots.trash.take_path(&self.snapshots.container(name))?;
            }
            let unleased: Vec<Digest> =
                state.ready.keys().filter(|chain| !state.is_leased(chain)).cloned().collect();
            for chain in unleased {
                state.ready.remove(&chain);
            }
            self.forget_layers(&keep, |chain| state.is_leased(chain))?;
        }
        self.snapshots.trash.empty()
    }

    fn kept_by_records(&self) -> Result<Keep> {
        let mut keep = Keep::default();
        for (_, image) in self.store.list(IMAGES)?.records {
            let hex = |blob: &str| blob.strip_prefix("sha256:").unwrap_or(blob).to_owned();
            keep.blobs.extend(image.blobs().map(hex));
            keep.chains.extend(image.chain_ids().cloned());
        }
        for (id, rootfs) in self.store.list(ROOTFS)?.records {
            keep.chains.extend(rootfs.chain_ids);
            keep.containers.insert(id);
        }
        Ok(keep)
    }

    fn forget_layers(&self, keep: &Keep, is_leased: impl Fn(&Digest) -> bool) -> Result<()> {
        let stale: Vec<String> = self
            .store
            .list(LAYERS)?
            .records
            .into_iter()
            .map(|(chain, _)| chain)
            .filter(|chain| {
                Digest::parse(chain).is_ok_and(|c| !keep.chains.contains(&c) && !is_leased(&c))
            })
            .collect();
        if stale.is_empty() {
            return Ok(());
        }
        Ok(self
            .store
            .write(|tx| stale.iter().try_for_each(|chain| tx.delete(LAYERS, chain).map(drop)))?)
    }
}
