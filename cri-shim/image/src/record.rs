//! What the store keeps about images, unpacked layers and container root file systems.

use std::{path::PathBuf, time::SystemTime};

use pinion_store::Table;
use serde::{Deserialize, Serialize};

use crate::Digest;

/// Images by id. An image whose record exists is complete and durable on disk.
pub const IMAGES: Table<ImageRecord> = Table::new("images");
/// Unpacked layers by chain id. A layer directory without a record is incomplete.
pub const LAYERS: Table<LayerRecord> = Table::new("layers");
/// Container root file systems by container id; written before the first directory is made.
pub const ROOTFS: Table<RootfsRecord> = Table::new("rootfs");

/// An image on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Digest of the image configuration, `sha256:…`.
    pub id: String,
    /// `name:tag` of each tag that names it, sorted.
    pub repo_tags: Vec<String>,
    /// `name@digest` of each manifest or index it was pulled by, sorted.
    pub repo_digests: Vec<String>,
    /// Bytes of manifest, configuration and compressed layers.
    pub size: u64,
    /// Layers, lowest first.
    pub layers: Vec<LayerRef>,
    /// Digests of the manifest and of the index that led to it, kept in the content store.
    pub manifests: Vec<Digest>,
    /// The user its configuration names.
    pub user: ImageUser,
    /// Never to be garbage-collected by the kubelet.
    pub pinned: bool,
    /// When it was last pulled or loaded.
    pub updated: SystemTime,
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRef {
    /// Digest of the blob as distributed.
    pub digest: Digest,
    /// Bytes of that blob.
    pub size: u64,
    /// Digest of the uncompressed tar stream.
    pub diff_id: Digest,
    /// Identity of this layer on top of those below it.
    pub chain_id: Digest,
}

/// The `User` of an image configuration, without its group part.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageUser {
    /// Set if the user is a number.
    pub uid: Option<i64>,
    /// Set if the user is a name.
    pub username: String,
}

/// An unpacked layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Disk space, rounded up to blocks.
    pub bytes: u64,
    /// Files, directories and links.
    pub inodes: u64,
    /// The layer hides everything below it.
    pub opaque_root: bool,
}

/// A container's root file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootfsRecord {
    /// The image it was made from.
    pub image_id: String,
    /// Chain ids of its layers, lowest first; they are kept as long as this record exists.
    pub chain_ids: Vec<Digest>,
    /// Where it is mounted.
    pub target: PathBuf,
}

impl ImageUser {
    /// `user[:group]` as the configuration writes it.
    pub(crate) fn parse(text: &str) -> Self {
        let user = text.split(':').next().unwrap_or_default();
        match user.parse() {
            Ok(uid) => Self { uid: Some(uid), username: String::new() },
            Err(_) => Self { uid: None, username: user.to_owned() },
        }
    }
}

impl ImageRecord {
    /// Every blob this image needs in the content store.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = &str> {
        let layers = self.layers.iter().map(|layer| layer.digest.as_str());
        let manifests = self.manifests.iter().map(Digest::as_str);
        std::iter::once(self.id.as_str()).chain(layers).chain(manifests)
    }

    pub(crate) fn chain_ids(&self) -> impl Iterator<Item = &Digest> {
        self.layers.iter().map(|layer| &layer.chain_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_is_a_number_or_a_name_without_its_group() {
        let user = |text| {
            let user = ImageUser::parse(text);
            (user.uid, user.username)
        };
        assert_eq!(user(""), (None, String::new()));
        assert_eq!(user("1000"), (Some(1000), String::new()));
        assert_eq!(user("1000:100"), (Some(1000), String::new()));
        assert_eq!(user("nobody:nogroup"), (None, "nobody".to_owned()));
    }
}
