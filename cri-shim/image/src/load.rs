//! Loading images from files: OCI layout directories, OCI archives, Docker archives.
//!
//! Each is brought to the same form, a manifest, a configuration and layers that can be opened,
//! and from there follows the path of a pull. A Docker archive has no manifest; one is made.

mod docker;
mod source;

use std::{io::Read, path::Path};

use self::source::Source;
use crate::{
    Digest, Error, ImageRecord, Images, Reference,
    config::{MAX_CONFIG, MAX_MANIFEST},
    error::Result,
    images::{Inner, NewImage},
    inventory::Lease,
    manifest::{self, Choice, Document, Manifest},
};

const MAX_NESTING: usize = 4;

/// An image found in a file.
struct Candidate {
    manifest: Manifest,
    /// The documents that led to it, the manifest last.
    documents: Vec<Vec<u8>>,
    configuration: Vec<u8>,
    /// Names the file gives it.
    names: Vec<Reference>,
}

impl Images {
    /// Loads every image for this machine from an OCI layout directory, or an OCI or Docker
    /// archive, compressed or not. `name` replaces the names the file gives, for a file with one
    /// image; without it, a tag that was pulled from its registry is not taken over.
    pub fn load(&self, path: &Path, name: Option<&str>) -> Result<Vec<ImageRecord>> {
        let name = name.map(Reference::parse).transpose()?;
        let mut lease = self.inner.inventory.lease();
        let result = self.inner.load(path, name.as_ref(), &mut lease);
        drop(lease);
        if result.is_err() {
            // The load's own failure is the one to report; what stays is collected later.
            let _ = self.inner.collect();
        }
        result
    }
}

impl Inner {
    fn load(
        &self,
        path: &Path,
        name: Option<&Reference>,
        lease: &mut Lease,
    ) -> Result<Vec<ImageRecord>> {
        let refuse = |reason: String| Error::Archive { path: path.to_owned(), reason };
        let mut source = Source::open(path, self.root(), self.config.limits.layer_bytes)?;
        let candidates = if let Some(index) = source.read("index.json", MAX_MANIFEST)? {
            self.oci_candidates(path, &mut source, &index)?
        } else if let Some(list) = source.read("manifest.json", MAX_MANIFEST)? {
            docker::candidates(path, &mut source, &list)?
        } else {
            return Err(refuse("holds neither index.json nor manifest.json".to_owned()));
        };
        if name.is_some() && candidates.len() > 1 {
            let count = candidates.len();
            return Err(refuse(format!("holds {count} images, which cannot share one name")));
        }
        let mut loaded = Vec::new();
        for candidate in candidates {
            loaded.push(self.load_one(path, &mut source, &candidate, name, lease)?);
        }
        Ok(loaded)
    }

    fn load_one(
        &self,
        path: &Path,
        source: &mut Source,
        candidate: &Candidate,
        name: Option<&Reference>,
        lease: &mut Lease,
    ) -> Result<ImageRecord> {
        let what = path.display().to_string();
        candidate.manifest.check(&what, self.config.limits.layers)?;
        let mut image = NewImage::assemble(&what, &candidate.manifest, &candidate.configuration)?;
        manifest::check_platform(&what, &image.configuration, &self.host)?;
        let names = name.map_or(candidate.names.as_slice(), std::slice::from_ref);
        image.repo_tags = names.iter().filter_map(Reference::repo_tag).collect();
        if name.is_none() {
            self.check_tags(&image, names)?;
        }
        image.size += candidate.documents.last().map_or(0, |bytes| bytes.len() as u64);
        image.manifests = candidate.documents.iter().map(|bytes| Digest::of(bytes)).collect();

        lease.cover(&image.id);
        image.manifests.iter().for_each(|digest| lease.cover(digest));
        for layer in &image.layers {
            lease.cover(&layer.chain_id);
            lease.cover(&layer.digest);
        }
        for layer in &image.layers {
            if self.has_layer(&layer.chain_id)? {
                continue;
            }
            let blob = source.blob(&layer.digest)?;
            let keep = if self.config.keep_layer_blobs {
                Some(self.content.ingest(&layer.digest, layer.size)?)
            } else {
                None
            };
            self.unpack_layer(blob, keep, layer)?;
        }
        for bytes in candidate.documents.iter().chain([&candidate.configuration]) {
            self.content.put(bytes)?;
        }
        self.record(image)
    }

    /// A file must not put its own content under a name that stands for a registry's.
    fn check_tags(&self, image: &NewImage, names: &[Reference]) -> Result<()> {
        for reference in names {
            let Some(tag) = reference.repo_tag() else { continue };
            let repository = format!("{}@", reference.name());
            let taken = self.snapshot().values().any(|other| {
                other.id != image.id.as_str()
                    && other.repo_tags.contains(&tag)
                    && other.repo_digests.iter().any(|digest| digest.starts_with(&repository))
            });
            if taken {
                return Err(Error::TagTaken { tag });
            }
        }
        Ok(())
    }

    fn oci_candidates(
        &self,
        path: &Path,
        source: &mut Source,
        index: &[u8],
    ) -> Result<Vec<Candidate>> {
        let what = path.display().to_string();
        let Document::Index(choices) = manifest::parse(&what, index, None)? else {
            let reason = "index.json is no index".to_owned();
            return Err(Error::Archive { path: path.to_owned(), reason });
        };
        let mut candidates: Vec<Candidate> = Vec::new();
        let mut unsuitable = None;
        for choice in choices.iter().filter(|choice| choice.is_image()) {
            // Each entry is an image of its own, unless it is for another machine.
            let one = std::slice::from_ref(choice);
            let target = match manifest::choose(&what, one, &self.host) {
                Ok(choice) => choice,
                Err(e) => {
                    unsuitable = Some(e);
                    continue;
                }
            };
            let mut candidate = self.oci_candidate(&what, source, target)?;
            let same = candidates
                .iter_mut()
                .find(|other| other.manifest.config.digest == candidate.manifest.config.digest);
            match same {
                Some(other) => other.names.append(&mut candidate.names),
                None => candidates.push(candidate),
            }
        }
        match (candidates.is_empty(), unsuitable) {
            (true, Some(e)) => Err(e),
            (true, None) => {
                let reason = "holds no image".to_owned();
                Err(Error::Archive { path: path.to_owned(), reason })
            }
            (false, _) => Ok(candidates),
        }
    }

    /// Follows an entry of `index.json` through nested indexes to the manifest for this machine.
    fn oci_candidate(&self, what: &str, source: &mut Source, from: &Choice) -> Result<Candidate> {
        let names = from.names.iter().filter_map(|name| full_name(name)).take(1).collect();
        let mut documents = Vec::new();
        let mut next = from.target.digest.clone();
        let manifest = loop {
            let bytes = read_verified(source, &next, MAX_MANIFEST)?;
            let parsed = manifest::parse(what, &bytes, None)?;
            documents.push(bytes);
            match parsed {
                Document::Manifest(manifest) => break manifest,
                Document::Index(choices) => {
                    next = manifest::choose(what, &choices, &self.host)?.target.digest.clone();
                }
            }
            if documents.len() > MAX_NESTING {
                let reason = format!("indexes are nested more than {MAX_NESTING} deep");
                return Err(Error::Document { what: what.to_owned(), reason });
            }
        };
        let configuration = read_verified(source, &manifest.config.digest, MAX_CONFIG)?;
        Ok(Candidate { manifest, documents, configuration, names })
    }
}

/// An annotation that is a whole name; `org.opencontainers.image.ref.name` is often only a tag.
fn full_name(name: &str) -> Option<Reference> {
    name.contains(['/', ':']).then(|| Reference::parse(name).ok()).flatten()
}

fn read_verified(source: &mut Source, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source
        .blob(digest)?
        .take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::file("read", source.path()))?;
    if bytes.len() as u64 > limit {
        let what = format!("document {digest}");
        return Err(Error::TooLarge { what, limit: format!("{limit} bytes") });
    }
    let actual = Digest::of(&bytes);
    if actual == *digest {
        return Ok(bytes);
    }
    let (expected, actual) = (digest.to_string(), actual.to_string());
    Err(Error::Mismatch { what: format!("blob {digest}"), expected, actual })
}
