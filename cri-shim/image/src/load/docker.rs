//! Docker archives (`docker save`): `manifest.json`, a configuration and layers per image.

use std::{io::Read, path::Path};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{Candidate, source::Source};
use crate::{
    Digest, Error, Reference,
    config::MAX_CONFIG,
    error::Result,
    manifest::{Descriptor, Manifest, OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, parse_config},
    unpack::is_compressed,
};

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

/// The images that `manifest.json` lists.
pub(super) fn candidates(path: &Path, source: &mut Source, list: &[u8]) -> Result<Vec<Candidate>> {
    let refuse = |reason: String| Error::Archive { path: path.to_owned(), reason };
    let saved: Vec<Saved> =
        serde_json::from_slice(list).map_err(|e| refuse(format!("manifest.json: {e}")))?;
    if saved.is_empty() {
        return Err(refuse("manifest.json lists no image".to_owned()));
    }
    saved.into_iter().map(|saved| candidate(path, source, saved)).collect()
}

fn candidate(path: &Path, source: &mut Source, saved: Saved) -> Result<Candidate> {
    let refuse = |reason: String| Error::Archive { path: path.to_owned(), reason };
    let configuration = source
        .read(&saved.config, MAX_CONFIG)?
        .ok_or_else(|| refuse(format!("lacks the configuration {}", saved.config)))?;
    let what = format!("configuration {} of {}", saved.config, path.display());
    let (_, diff_ids) = parse_config(&what, &configuration, saved.layers.len())?;
    let mut layers = Vec::new();
    for (name, diff_id) in saved.layers.into_iter().zip(diff_ids) {
        let (mut reader, size) =
            source.file(&name)?.ok_or_else(|| refuse(format!("lacks the layer {name}")))?;
        let mut start = [0; 4];
        let count = reader.read(&mut start).map_err(Error::file("read", path))?;
        let media_type = OCI_LAYER.to_owned();
        // A layer stored as it is has its diff id for a digest; unpacking verifies both.
        let descriptor = if is_compressed(&start[..count]) {
            let digest = hash(source, &name, path)?;
            Descriptor { media_type: format!("{OCI_LAYER}+gzip"), digest, size }
        } else {
            Descriptor { media_type, digest: diff_id, size }
        };
        source.alias(descriptor.digest.clone(), name);
        layers.push(descriptor);
    }
    let config = Descriptor {
        media_type: OCI_CONFIG.to_owned(),
        digest: Digest::of(&configuration),
        size: configuration.len() as u64,
    };
    let manifest = Manifest { config, layers };
    let names = saved.repo_tags.unwrap_or_default();
    let names = names.iter().map(|name| Reference::parse(name)).collect::<Result<_, _>>()?;
    Ok(Candidate { documents: vec![document(&manifest)], manifest, configuration, names })
}

fn hash(source: &Source, name: &str, path: &Path) -> Result<Digest> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    if let Some((mut reader, _)) = source.file(name)? {
        loop {
            let count = reader.read(&mut buffer).map_err(Error::file("read", path))?;
            if count == 0 {
                break;
            }
            hasher.update(&buffer[..count]);
        }
    }
    Ok(Digest::of_hasher(hasher))
}

/// The manifest as it would have been pushed.
fn document(manifest: &Manifest) -> Vec<u8> {
    let descriptor = |d: &Descriptor| serde_json::json!({"mediaType": d.media_type, "digest": d.digest, "size": d.size});
    let layers: Vec<_> = manifest.layers.iter().map(descriptor).collect();
    let document = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(&manifest.config),
        "layers": layers,
    });
    document.to_string().into_bytes()
}
