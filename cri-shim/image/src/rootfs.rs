//! Container root file systems: an overlay over an image's layers, and what it occupies.
//!
//! The same stack without a place for changes is an image volume ([`crate::volume`]).

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::Path,
};

use pinion_store::Tx;

use crate::{
    Digest, Error, IdMap, ImageRecord, Images, LayerRecord, RootfsRecord, Usage,
    error::Result,
    id_map,
    images::Inner,
    inventory::Lease,
    overlay::{Stack, Writable, is_mount_point, mount_stack, unmount_all},
    record::{LAYERS, ROOTFS},
    snapshot::Snapshots,
    unpack::{InRoot, copy_directory},
};

/// Disk used by images and by containers, for CRI's `ImageFsInfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsInfo {
    /// Directory whose file system holds both.
    pub path: std::path::PathBuf,
    /// Blobs and unpacked layers.
    pub images: Usage,
    /// What containers have written to their root file systems.
    pub containers: Usage,
}

impl Images {
    /// Mounts a writable root file system of the image at `target`, which is made if need be.
    /// Repeating it is fine while it is mounted; what an interrupted attempt left is made anew.
    pub fn prepare_rootfs(&self, container_id: &str, image_id: &str, target: &Path) -> Result<()> {
        self.prepare(container_id, image_id, target, Make::Rootfs, None)
    }

    /// The same for a container in a user namespace: what belongs to an id in the image
    /// belongs to that id inside.
    pub fn prepare_mapped_rootfs(
        &self,
        container_id: &str,
        image_id: &str,
        target: &Path,
        ids: &IdMap,
    ) -> Result<()> {
        self.prepare(container_id, image_id, target, Make::Rootfs, Some(ids))
    }

    /// Whether root file systems can be mapped for user namespaces: the kernel and the file
    /// system of the layers must both be able to.
    pub fn check_id_maps(&self, ids: &IdMap) -> Result<()> {
        let stack = Stack {
            layers_dir: self.inner.snapshots.layers_dir().to_owned(),
            lowers: vec![Snapshots::EMPTY.to_owned(), "../trash".to_owned()],
            writable: None,
        };
        id_map::compose(&stack, ids).map(drop)
    }

    pub(crate) fn prepare(
        &self,
        container_id: &str,
        image_id: &str,
        target: &Path,
        make: Make,
        ids: Option<&IdMap>,
    ) -> Result<()> {
        check_id(container_id)?;
        let inner = &self.inner;
        let image = self
            .resolve(image_id)
            .ok_or_else(|| Error::NoImage { reference: image_id.to_owned() })?;
        if let Some(known) = inner.store.get(ROOTFS, container_id)?
            && known.image_id == image.id
            && known.target == target
            && is_mount_point(target).map_err(Error::file("look at", target))?
        {
            return Ok(());
        }
        let claim = inner.claim(container_id, &image, target)?;
        if inner.store.get(ROOTFS, container_id)?.as_ref() != Some(&claim.record) {
            inner.store.write(|tx| claim.commit(tx))?;
        }
        drop(claim);
        let result = inner.mount_rootfs(container_id, &image, target, make, ids);
        if result.is_err() {
            // The mount's own failure is the one to report; the record lets a retry clean up.
            let _ = self.remove_rootfs(container_id, target);
        }
        result
    }

    /// Keeps an image's layers for a container whose root file system is to be made at
    /// `target`. With the claim committed in a transaction of the caller's, before it makes
    /// anything, [`Images::prepare_rootfs`] needs none of its own.
    ///
    /// # Errors
    /// An id that is no name; an image that is not here.
    pub fn claim_rootfs(&self, container_id: &str, image_id: &str, target: &Path) -> Result<Claim> {
        check_id(container_id)?;
        let image = self
            .resolve(image_id)
            .ok_or_else(|| Error::NoImage { reference: image_id.to_owned() })?;
        self.inner.claim(container_id, &image, target)
    }

    /// Forgets that a container uses layers, in a transaction of the caller's: the end of
    /// what [`Images::unmount_rootfs`] began.
    pub fn forget_rootfs(tx: &Tx, container_id: &str) -> pinion_store::Result<()> {
        tx.delete(ROOTFS, container_id).map(drop)
    }

    /// Unmounts and deletes a container's root file system. Repeating it is fine.
    pub fn remove_rootfs(&self, container_id: &str, target: &Path) -> Result<()> {
        self.unmount_rootfs(container_id, target)?;
        self.inner.store.write(|tx| Self::forget_rootfs(tx, container_id))?;
        self.inner.snapshots.trash.empty()
    }

    /// Unmounts a container's root file system and moves what it wrote to the trash; its
    /// layers stay claimed until [`Images::forget_rootfs`]. Repeating it is fine.
    pub fn unmount_rootfs(&self, container_id: &str, target: &Path) -> Result<()> {
        check_id(container_id)?;
        let inner = &self.inner;
        if let Ok(Some(known)) = inner.store.get(ROOTFS, container_id)
            && known.target != target
        {
            unmount_all(&known.target)?;
        }
        unmount_all(target)?;
        let dir = inner.snapshots.container(container_id);
        inner.snapshots.trash.take_path(&dir)?;
        inner.usage.forget(&dir.join("upper"));
        Ok(())
    }

    /// Deletes what was moved to the trash, which takes as long as there are files in it;
    /// returns at once if another call is at it, which then deletes this as well.
    pub fn empty_trash(&self) -> Result<()> {
        self.inner.snapshots.trash.empty_once()
    }

    /// Where a container's changes to its root file system are. Their content is the
    /// container's, and may change at any time.
    #[must_use]
    pub fn upper(&self, container_id: &str) -> std::path::PathBuf {
        self.inner.snapshots.container(container_id).join("upper")
    }

    /// Containers that have a root file system here, mounted or not.
    pub fn rootfs_list(&self) -> Result<Vec<(String, RootfsRecord)>> {
        Ok(self.inner.store.list(ROOTFS)?.records)
    }

    /// What a container has written to its root file system; at most ten seconds old.
    pub fn rootfs_usage(&self, container_id: &str) -> Result<Usage> {
        check_id(container_id)?;
        self.inner.written_by(container_id)
    }

    /// Disk used by images and containers.
    pub fn fs_info(&self) -> Result<FsInfo> {
        let inner = &self.inner;
        let mut images = Usage::default();
        for (_, layer) in inner.store.list(LAYERS)?.records {
            images += Usage { bytes: layer.bytes, inodes: layer.inodes };
        }
        for (_, bytes) in inner.content.list()? {
            images += Usage { bytes, inodes: 1 };
        }
        let mut containers = Usage::default();
        for (id, _) in inner.store.list(ROOTFS)?.records {
            // A container removed meanwhile uses nothing.
            containers += inner.written_by(&id).unwrap_or_default();
        }
        Ok(FsInfo { path: inner.root().to_owned(), images, containers })
    }
}

/// Layers kept for a container: by a lease until this is dropped, and for good once committed.
#[derive(Debug)]
pub struct Claim {
    container: String,
    record: RootfsRecord,
    _lease: Lease,
}

impl Claim {
    /// Writes the claim. The lease must outlive the transaction: drop this after it.
    pub fn commit(&self, tx: &Tx) -> pinion_store::Result<()> {
        tx.put(ROOTFS, &self.container, &self.record)
    }
}

/// What is made of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Make {
    /// A file system that a container may change.
    Rootfs,
    /// One that nobody can.
    Volume,
}

impl Inner {
    fn written_by(&self, container_id: &str) -> Result<Usage> {
        let upper = self.snapshots.container(container_id).join("upper");
        self.usage.of(&upper).map_err(|e| {
            if e.kind() == std::io::ErrorKind::NotFound {
                Error::NoRootfs { id: container_id.to_owned() }
            } else {
                Error::file("measure", upper)(e)
            }
        })
    }

    /// The container as a user of the image's layers, so that they stay.
    fn claim(&self, container_id: &str, image: &ImageRecord, target: &Path) -> Result<Claim> {
        let mut lease = self.inventory.lease();
        image.chain_ids().for_each(|chain_id| lease.cover(chain_id));
        for layer in &image.layers {
            if !self.has_layer(&layer.chain_id)? {
                return Err(Error::NoImage { reference: image.id.clone() });
            }
        }
        let record = RootfsRecord {
            image_id: image.id.clone(),
            chain_ids: image.chain_ids().cloned().collect(),
            target: target.to_owned(),
        };
        Ok(Claim { container: container_id.to_owned(), record, _lease: lease })
    }

    fn mount_rootfs(
        &self,
        container_id: &str,
        image: &ImageRecord,
        target: &Path,
        make: Make,
        ids: Option<&IdMap>,
    ) -> Result<()> {
        unmount_all(target)?;
        let dir = self.snapshots.container(container_id);
        self.snapshots.trash.take_path(&dir)?;
        fs::create_dir(&dir).map_err(Error::file("create directory", &dir))?;
        fs::create_dir_all(target).map_err(Error::file("create directory", target))?;
        let chain_ids: Vec<&Digest> = image.chain_ids().collect();
        let mut lowers = self.lowers(&chain_ids)?;
        let writable = match make {
            Make::Rootfs => Some(self.make_upper(&dir, chain_ids.last().copied(), ids)?),
            Make::Volume => {
                let none = dir.join("none");
                fs::create_dir(&none).map_err(Error::file("create directory", &none))?;
                lowers.push(format!("../containers/{container_id}/none"));
                None
            }
        };
        let stack = Stack { layers_dir: self.snapshots.layers_dir().to_owned(), lowers, writable };
        match ids {
            None => mount_stack(&stack, target),
            Some(ids) => id_map::mount(&stack, ids, target),
        }
    }

    /// The directories for changes, in `dir`.
    fn make_upper(
        &self,
        dir: &Path,
        top: Option<&Digest>,
        ids: Option<&IdMap>,
    ) -> Result<Writable> {
        let (upper, work) = (dir.join("upper"), dir.join("work"));
        for path in [&upper, &work] {
            fs::create_dir(path).map_err(Error::file("create directory", path))?;
        }
        fs::set_permissions(&upper, fs::Permissions::from_mode(0o755))
            .map_err(Error::file("set the mode of", &upper))?;
        if let Some(top) = top {
            // The merged root shows the upper directory's owner and mode, not the layer's.
            let copied = InRoot::open(&self.snapshots.layer(top))
                .and_then(|mut from| from.directory(Path::new("")))
                .and_then(|from| {
                    let to = InRoot::open(&upper)?.directory(Path::new(""))?;
                    copy_directory(from, to)
                });
            copied.map_err(Error::file("set attributes of", &upper))?;
        }
        if let Some(ids) = ids {
            // Changes are stored with the ids they have on the host.
            let owned = fs::metadata(&upper).and_then(|found| {
                chown(&upper, Some(ids.uid(found.uid())), Some(ids.gid(found.gid())))
            });
            owned.map_err(Error::file("set the owner of", &upper))?;
        }
        Ok(Writable { upper, work, volatile: self.config.volatile_rootfs })
    }

    /// Layer directories, top first, down to the first one that hides the rest.
    fn lowers(&self, chain_ids: &[&Digest]) -> Result<Vec<String>> {
        let mut names = Vec::with_capacity(chain_ids.len());
        for chain_id in chain_ids.iter().rev() {
            names.push(Snapshots::name(chain_id).to_owned());
            let layer: Option<LayerRecord> = self.store.get(LAYERS, chain_id.as_str())?;
            if layer.is_some_and(|layer| layer.opaque_root) {
                break;
            }
        }
        if names.is_empty() {
            names.push(Snapshots::EMPTY.to_owned());
        }
        Ok(names)
    }
}

/// Ids name directories.
fn check_id(id: &str) -> Result<()> {
    let plain = !id.is_empty()
        && id.len() <= 128
        && !id.starts_with('.')
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'));
    if plain { Ok(()) } else { Err(Error::ContainerId { id: id.chars().take(100).collect() }) }
}
