//! Image volumes of a container: which images, and where they are mounted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pinion_cri_proto::v1;

use super::users;
use crate::error::{Context, Error, Kind, Result};
use crate::images::Foreign as _;
use crate::node::Node;
use crate::record::{Container, ImageVolume, Sandbox};

/// The word by which kubelet knows that it was the image volume that failed.
const FAILED: &str = "ImageVolumeMountFailed";

/// The images that a configuration mounts, which must be on this node already.
pub(crate) fn find(node: &Node, config: &v1::ContainerConfig) -> Result<Vec<ImageVolume>> {
    let mut found = Vec::new();
    for (mount, asked) in config.mounts.iter().enumerate() {
        let Some(name) = asked.image.as_ref().map(|i| &i.image).filter(|name| !name.is_empty())
        else {
            continue;
        };
        let image = node.images.resolve(name).ok_or_else(|| {
            let message = format!(
                "{FAILED}: mounts[{mount}].image: {name:?} is not on this node; pull it first"
            );
            Error::not_found(message)
        })?;
        found.push(ImageVolume { mount, image_id: image.id });
    }
    Ok(found)
}

/// Mounts a container's image volumes; what is to be bound, by `container_path`. Blocks.
pub(crate) fn mount(
    node: &Node,
    sandbox: &Sandbox,
    container: &Container,
) -> Result<BTreeMap<String, PathBuf>> {
    let ids = users::id_map(node, sandbox);
    let directory = node.paths.pod(&sandbox.id).container(&container.id);
    let mut places = BTreeMap::new();
    for volume in &container.image_volumes {
        let Some(asked) = container.config.mounts.get(volume.mount) else { continue };
        let place = node
            .images
            .prepare_volume(
                &name(&container.id, volume.mount),
                &volume.image_id,
                &directory.volume(volume.mount),
                &asked.image_sub_path,
                ids.as_ref(),
            )
            .image_error()
            .map_err(|error| {
                let message = format!("{FAILED}: mounts[{}]", volume.mount);
                Error::new(error.kind(), message).caused_by(error)
            })?;
        places.insert(asked.container_path.clone(), place);
    }
    Ok(places)
}

/// Unmounts an image volume. Blocks.
pub(crate) fn remove(node: &Node, container: &str, mount: usize, target: &Path) -> Result<()> {
    node.images
        .remove_volume(&name(container, mount), target)
        .kind(Kind::Internal, || format!("unmount image volume {mount} of {container}"))
}

/// What the image store knows a volume by.
fn name(container: &str, mount: usize) -> String {
    format!("{container}.{mount}")
}

/// The container of a root file system or volume in the image store.
pub(crate) fn owner(id: &str) -> &str {
    id.split_once('.').map_or(id, |(container, _)| container)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_names_its_container() {
        assert_eq!(owner(&name("abc", 3)), "abc");
        assert_eq!(owner("abc"), "abc");
    }
}
