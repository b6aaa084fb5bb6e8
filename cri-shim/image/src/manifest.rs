//! Manifests, indexes and image configurations: parsing, checking, choosing a platform.

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, de::IgnoredAny};

use crate::{Digest, Error, error::Result};

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(crate) const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// What a client says it accepts.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// Either kind of document a reference can lead to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Document {
    Manifest(Manifest),
    Index(Vec<Choice>),
}

/// An image for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

/// Content by digest and size.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// An index entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) target: Descriptor,
    pub(crate) platform: Option<Platform>,
    /// The names an archive gives the image.
    pub(crate) names: Vec<String>,
}

/// Operating system and processor, in Go's words.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Platform {
    pub(crate) os: String,
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) variant: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: u64,
    #[serde(default)]
    media_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<RawChoice>>,
    #[serde(default)]
    fs_layers: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawChoice {
    #[serde(default)]
    media_type: String,
    digest: Digest,
    size: u64,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<std::collections::BTreeMap<String, String>>,
}

/// Parses a document that is exactly one of manifest and index (CVE-2021-41190). `content_type`
/// is what the registry called it.
pub(crate) fn parse(what: &str, bytes: &[u8], content_type: Option<&str>) -> Result<Document> {
    let refuse = |reason: String| Error::Document { what: what.to_owned(), reason };
    let raw: Raw = serde_json::from_slice(bytes).map_err(|e| refuse(e.to_string()))?;
    if raw.schema_version != 2 || raw.fs_layers.is_some() {
        let reason = format!("manifest schema {} is obsolete", raw.schema_version);
        return Err(Error::Unsupported { what: what.to_owned(), reason });
    }
    let is_index = match (raw.manifests.is_some(), raw.layers.is_some() || raw.config.is_some()) {
        (true, false) => true,
        (false, true) => false,
        (true, true) => return Err(refuse("is both a manifest and an index".to_owned())),
        (false, false) => return Err(refuse("is neither a manifest nor an index".to_owned())),
    };
    let stated = [raw.media_type.as_deref(), content_type.filter(|t| is_known(t))];
    for media_type in stated.into_iter().flatten() {
        let fits = if is_index {
            matches!(media_type, OCI_INDEX | DOCKER_INDEX)
        } else {
            matches!(media_type, OCI_MANIFEST | DOCKER_MANIFEST)
        };
        if !fits {
            return Err(refuse(format!("its content does not fit its type {media_type:?}")));
        }
    }
    if let (Some(inside), Some(outside)) = (stated[0], stated[1])
        && inside != outside
    {
        return Err(refuse(format!("is {inside:?}, but was sent as {outside:?}")));
    }
    if let Some(entries) = raw.manifests {
        return Ok(Document::Index(entries.into_iter().map(Choice::from).collect()));
    }
    match (raw.config, raw.layers) {
        (Some(config), Some(layers)) => Ok(Document::Manifest(Manifest { config, layers })),
        _ => Err(refuse("lacks its configuration or its layers".to_owned())),
    }
}

fn is_known(media_type: &str) -> bool {
    matches!(media_type, OCI_MANIFEST | OCI_INDEX | DOCKER_MANIFEST | DOCKER_INDEX)
}

impl From<RawChoice> for Choice {
    fn from(raw: RawChoice) -> Self {
        let annotations = raw.annotations.unwrap_or_default();
        let names = ["io.containerd.image.name", "org.opencontainers.image.ref.name"]
            .iter()
            .filter_map(|key| annotations.get(*key).cloned())
            .collect();
        let target = Descriptor { media_type: raw.media_type, digest: raw.digest, size: raw.size };
        Self { target, platform: raw.platform, names }
    }
}

impl Choice {
    /// False for attestations and other things that are no image.
    pub(crate) fn is_image(&self) -> bool {
        matches!(
            self.target.media_type.as_str(),
            "" | OCI_MANIFEST | OCI_INDEX | DOCKER_MANIFEST | DOCKER_INDEX
        ) && self.platform.as_ref().is_none_or(|p| p.os != "unknown")
    }
}

impl Platform {
    /// The platform of this machine.
    pub(crate) fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", ""),
            "x86" => ("386", ""),
            "aarch64" => ("arm64", "v8"),
            "arm" => ("arm", "v7"),
            "powerpc64" => ("ppc64le", ""),
            other => (other, ""),
        };
        Self { os: "linux".into(), architecture: architecture.into(), variant: variant.into() }
    }

    /// How well an offer suits this machine: lower is better, `None` not at all.
    fn suits(&self, offer: &Self) -> Option<u32> {
        if offer.os != self.os || offer.architecture != self.architecture {
            return None;
        }
        // v1 is amd64 without more; the exact variant or none is safe; others may not run, but
        // are what is left.
        match offer.variant.as_str() {
            v if v == self.variant => Some(0),
            "" | "v1" => Some(1),
            _ => Some(2),
        }
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if !self.variant.is_empty() {
            write!(f, "/{}", self.variant)?;
        }
        Ok(())
    }
}

/// The index entry for this machine; one that names no platform serves if none fits by name.
pub(crate) fn choose<'a>(what: &str, choices: &'a [Choice], host: &Platform) -> Result<&'a Choice> {
    let images = || choices.iter().filter(|choice| choice.is_image());
    let best = images()
        .filter_map(|c| Some((host.suits(c.platform.as_ref()?)?, c)))
        .min_by_key(|(rank, _)| *rank)
        .map(|(_, choice)| choice);
    best.or_else(|| images().find(|choice| choice.platform.is_none())).ok_or_else(|| {
        Error::Platform {
            reference: what.to_owned(),
            wanted: host.to_string(),
            offered: images()
                .filter_map(|c| c.platform.as_ref().map(Platform::to_string))
                .take(20)
                .collect(),
        }
    })
}

impl Manifest {
    /// Refuses artifacts, kernel file systems and encrypted layers before anything is fetched.
    pub(crate) fn check(&self, what: &str, max_layers: usize) -> Result<()> {
        if !matches!(self.config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG) {
            let reason =
                format!("its configuration is {:?}: no container image", self.config.media_type);
            return Err(Error::Unsupported { what: what.to_owned(), reason });
        }
        if self.layers.len() > max_layers {
            let what = format!("{what}: its {} layers", self.layers.len());
            return Err(Error::TooLarge { what, limit: format!("{max_layers} layers") });
        }
        match self.layers.iter().find(|layer| !is_tar_layer(&layer.media_type)) {
            None => Ok(()),
            Some(layer) => {
                let reason = format!("layer type {:?} is not a tar archive", layer.media_type);
                Err(Error::Unsupported { what: what.to_owned(), reason })
            }
        }
    }
}

fn is_tar_layer(media_type: &str) -> bool {
    let rest = media_type
        .strip_prefix("application/vnd.oci.image.layer.v1.tar")
        .or_else(|| {
            media_type.strip_prefix("application/vnd.oci.image.layer.nondistributable.v1.tar")
        })
        .or_else(|| media_type.strip_prefix("application/vnd.docker.image.rootfs.diff.tar"))
        .or_else(|| {
            media_type.strip_prefix("application/vnd.docker.image.rootfs.foreign.diff.tar")
        });
    matches!(rest, Some("" | "+gzip" | "+zstd" | ".gzip" | ".zstd"))
}

/// Parses a configuration; returns it with its diff ids, one per layer of the manifest.
pub(crate) fn parse_config(
    what: &str,
    bytes: &[u8],
    layers: usize,
) -> Result<(ImageConfiguration, Vec<Digest>)> {
    let refuse = |reason: String| Error::Document { what: what.to_owned(), reason };
    let config: ImageConfiguration =
        serde_json::from_slice(bytes).map_err(|e| refuse(e.to_string()))?;
    let diff_ids = config
        .rootfs()
        .diff_ids()
        .iter()
        .map(|text| Digest::parse(text))
        .collect::<Result<Vec<_>, _>>()?;
    if diff_ids.len() != layers {
        return Err(refuse(format!(
            "names {} uncompressed layers where the manifest has {layers}",
            diff_ids.len()
        )));
    }
    Ok((config, diff_ids))
}

/// Refuses an image for another machine.
pub(crate) fn check_platform(
    what: &str,
    config: &ImageConfiguration,
    host: &Platform,
) -> Result<()> {
    let (os, architecture) = (config.os().to_string(), config.architecture().to_string());
    let fits = |mine: &str, theirs: &str| theirs.is_empty() || mine == theirs;
    if fits(&host.os, &os) && fits(&host.architecture, &architecture) {
        return Ok(());
    }
    Err(Error::Platform {
        reference: what.to_owned(),
        wanted: host.to_string(),
        offered: vec![format!("{os}/{architecture}")],
    })
}

#[cfg(test)]
mod tests;
