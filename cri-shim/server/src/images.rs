//! Images, as the services and the pods use them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use pinion_image::{Auth, ErrorKind, ImageRecord, Images, Progress, ProgressFn};
use serde_json::json;

use crate::error::{Error, Kind, Result};
use crate::node::Node;
use crate::pod::volumes;

/// The image crate's errors as ours.
pub(crate) trait Foreign<T> {
    fn image_error(self) -> Result<T>;
}

impl<T> Foreign<T> for Result<T, pinion_image::Error> {
    fn image_error(self) -> Result<T> {
        self.map_err(|error| {
            let kind = match error.kind() {
                ErrorKind::InvalidArgument => Kind::Invalid,
                ErrorKind::NotFound => Kind::NotFound,
                ErrorKind::PermissionDenied => Kind::Denied,
                ErrorKind::Unavailable => Kind::Unavailable,
                ErrorKind::ResourceExhausted => Kind::Exhausted,
                ErrorKind::Unsupported | ErrorKind::FailedPrecondition => Kind::Precondition,
                ErrorKind::DataLoss | ErrorKind::Internal => Kind::Internal,
            };
            Error::from_foreign(kind, error)
        })
    }
}

/// Progress that nobody watches.
pub(crate) fn silent() -> ProgressFn {
    Arc::new(|_: Progress| {})
}

/// Pulls an image; the pull runs on if the caller goes away.
pub(crate) async fn pull(
    node: &Node,
    reference: &str,
    auth: Option<Auth>,
    progress: ProgressFn,
) -> Result<ImageRecord> {
    node.images.pull(reference, &auth, progress).await.image_error()
}

/// Removes an image by any of its names. What is not there is removed already.
pub(crate) fn remove(images: &Images, name: &str) -> Result<()> {
    images.remove(name).image_error().map(drop)
}

/// The `info` map of a verbose image status.
pub(crate) fn info(images: &Images, record: &ImageRecord) -> HashMap<String, String> {
    let config = images.config(&record.id).ok();
    let layers: Vec<_> = record.layers.iter().map(|l| l.digest.to_string()).collect();
    let info = json!({ "imageSpec": config, "layers": layers });
    HashMap::from([("info".to_string(), info.to_string())])
}

/// Removes root filesystems whose container is none of `live`; their ids.
pub(crate) fn remove_strange_rootfs(node: &Node, live: &HashSet<String>) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for (id, record) in node.images.rootfs_list().image_error()? {
        if !live.contains(volumes::owner(&id)) {
            node.images.remove_volume(&id, &record.target).image_error()?;
            removed.push(id);
        }
    }
    Ok(removed)
}
