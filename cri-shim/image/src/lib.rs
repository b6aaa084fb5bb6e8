//! Images on this node: pulled from registries or loaded from files, unpacked once, and stacked
//! into container root file systems with overlayfs.
//!
//! ```text
//!   <root>/content/blobs/sha256/<hex>        manifests, configurations, compressed layers
//!   <root>/snapshots/layers/<chain id>/      one unpacked layer
//!   <root>/snapshots/containers/<id>/        upper and work directory of one container
//!   <root>/snapshots/trash/                  condemned trees
//!   store: images, layers, rootfs            what is complete, durable, and in use
//! ```
//! Invariants:
//! - Content is verified by digest before it counts; a record in the store is written after the
//!   content it names is on disk, so files without a record are rubbish and records are true.
//! - A pull belongs to no caller: it is shared by all who ask for it and runs to its end.
//! - Nothing in an image reaches outside its layer directory, whatever its names and links say.
//! - Layers are kept while an image, a container or work in progress needs them.

mod auth;
mod collect;
mod config;
mod content;
mod digest;
mod error;
mod flight;
mod id_map;
mod images;
mod inventory;
mod load;
mod manifest;
mod overlay;
mod progress;
mod pull;
mod record;
mod reference;
mod registry;
mod rootfs;
mod snapshot;
mod trash;
mod unpack;
mod usage;
mod volume;

pub use auth::Auth;
pub use config::{ImageConfig, Limits};
pub use digest::{Digest, DigestError};
pub use error::{Error, ErrorKind, Result};
pub use id_map::IdMap;
pub use images::Images;
pub use progress::{Progress, ProgressFn, Stage};
pub use record::{
    IMAGES, ImageRecord, ImageUser, LAYERS, LayerRecord, LayerRef, ROOTFS, RootfsRecord,
};
pub use reference::{Reference, ReferenceError};
pub use rootfs::{Claim, FsInfo};
pub use unpack::LayerError;
pub use usage::Usage;
