//! The images of this node: opening, listing, finding, recording, removing.

use std::{
    collections::BTreeMap,
    fmt,
    path::Path,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::SystemTime,
};

use oci_spec::image::ImageConfiguration;
use pinion_store::{Store, Tx};

use crate::{
    Auth, Digest, Error, ImageConfig, ImageRecord, ImageUser, LayerRecord, LayerRef, ProgressFn,
    Reference,
    config::MAX_CONFIG,
    content::Content,
    error::Result,
    flight::Flights,
    inventory::Inventory,
    manifest::{Manifest, Platform, parse_config},
    progress::Audience,
    pull::{self, PullKey},
    record::{IMAGES, LAYERS, ROOTFS},
    registry::Registry,
    snapshot::{self, Snapshots},
    usage::UsageCache,
};

/// The images of this node. Cheap to clone; all clones are one.
///
/// Calls that are not `async` block on the disk: asynchronous callers use `spawn_blocking`, except
/// for [`Images::list`] and [`Images::resolve`], which are answered from memory.
#[derive(Clone)]
pub struct Images {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) config: ImageConfig,
    pub(crate) store: Store,
    pub(crate) content: Content,
    pub(crate) snapshots: Snapshots,
    pub(crate) registry: Registry,
    pub(crate) inventory: Inventory,
    pub(crate) host: Platform,
    pub(crate) pulls: Flights<PullKey, ImageRecord, Audience>,
    pub(crate) layer_flights: Flights<Digest, ()>,
    pub(crate) usage: UsageCache,
    /// What `list` shows; replaced whole after each commit.
    published: RwLock<Arc<BTreeMap<String, ImageRecord>>>,
    /// Held from a commit to its publication, so that the order of both is the same.
    writing: Mutex<()>,
}

/// An image about to be recorded.
pub(crate) struct NewImage {
    pub(crate) id: Digest,
    pub(crate) configuration: ImageConfiguration,
    pub(crate) layers: Vec<LayerRef>,
    pub(crate) manifests: Vec<Digest>,
    /// Bytes of manifest, configuration and compressed layers.
    pub(crate) size: u64,
    pub(crate) repo_tags: Vec<String>,
    pub(crate) repo_digests: Vec<String>,
}

impl NewImage {
    /// Checks a configuration against its manifest.
    pub(crate) fn assemble(what: &str, manifest: &Manifest, configuration: &[u8]) -> Result<Self> {
        let (parsed, diff_ids) = parse_config(what, configuration, manifest.layers.len())?;
        let chain_ids = crate::digest::chain_ids(&diff_ids);
        let layers: Vec<LayerRef> = manifest
            .layers
            .iter()
            .zip(diff_ids)
            .zip(chain_ids)
            .map(|((blob, diff_id), chain_id)| LayerRef {
                digest: blob.digest.clone(),
                size: blob.size,
                diff_id,
                chain_id,
            })
            .collect();
        let content: u64 = layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.size));
        Ok(Self {
            id: manifest.config.digest.clone(),
            configuration: parsed,
            layers,
            manifests: Vec::new(),
            size: content.saturating_add(configuration.len() as u64),
            repo_tags: Vec::new(),
            repo_digests: Vec::new(),
        })
    }

    fn into_record(self, config: &ImageConfig) -> ImageRecord {
        let user = self.configuration.config().as_ref().and_then(|c| c.user().as_deref());
        ImageRecord {
            id: self.id.to_string(),
            user: ImageUser::parse(user.unwrap_or_default()),
            pinned: self.repo_tags.iter().any(|tag| config.is_pinned(tag)),
            repo_tags: self.repo_tags,
            repo_digests: self.repo_digests,
            size: self.size,
            layers: self.layers,
            manifests: self.manifests,
            updated: SystemTime::now(),
        }
    }
}

impl Images {
    /// Opens the images below `config.root`, forgets those that are damaged, and deletes what no
    /// image and no container needs.
    pub fn open(config: ImageConfig, store: Store) -> Result<Self> {
        let inner = Inner {
            content: Content::open(&config.root)?,
            snapshots: Snapshots::open(&config.root)?,
            registry: Registry::new(&config),
            inventory: Inventory::default(),
            host: Platform::host(),
            pulls: Flights::new(),
            layer_flights: Flights::new(),
            usage: UsageCache::default(),
            published: RwLock::default(),
            writing: Mutex::new(()),
            config,
            store,
        };
        inner.forget_damaged()?;
        inner.publish()?;
        inner.collect()?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Pulls an image and returns its record. Callers asking for the same reference with the same
    /// credentials share one pull, which goes on to its end even if all of them leave.
    pub async fn pull(
        &self,
        reference: &str,
        auth: &Option<Auth>,
        progress: ProgressFn,
    ) -> Result<ImageRecord> {
        let reference = Reference::parse(reference)?;
        pull::share(&self.inner, reference, auth.clone(), progress).await
    }

    /// Every image, by id.
    #[must_use]
    pub fn list(&self) -> Vec<ImageRecord> {
        self.inner.snapshot().values().cloned().collect()
    }

    /// The image that `name` means: a reference, `name@digest`, an id with or without `sha256:`,
    /// or the unambiguous beginning of one.
    #[must_use]
    pub fn resolve(&self, name: &str) -> Option<ImageRecord> {
        find(&self.inner.snapshot(), name).cloned()
    }

    /// Removes an image under all its names, and what only it needed. Containers made from it keep
    /// their layers. `None` if there was no such image.
    pub fn remove(&self, name: &str) -> Result<Option<ImageRecord>> {
        let Some(image) = self.resolve(name) else { return Ok(None) };
        self.inner.write(|tx| tx.delete(IMAGES, &image.id).map(drop))?;
        self.inner.collect()?;
        Ok(Some(image))
    }

    /// The OCI configuration of an image.
    pub fn config(&self, id: &str) -> Result<ImageConfiguration> {
        let missing = || Error::NoImage { reference: id.to_owned() };
        let image = self.resolve(id).ok_or_else(missing)?;
        let digest = Digest::parse(&image.id)?;
        let bytes = self.inner.content.read(&digest, MAX_CONFIG)?.ok_or_else(missing)?;
        let what = format!("configuration {digest}");
        parse_config(&what, &bytes, image.layers.len()).map(|(config, _)| config)
    }

    /// Deletes blobs and layers that nothing needs. Done by itself at opening and after removals.
    pub fn gc(&self) -> Result<()> {
        self.inner.collect()
    }
}

impl Inner {
    pub(crate) fn snapshot(&self) -> Arc<BTreeMap<String, ImageRecord>> {
        self.published.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Commits a change and shows it to readers.
    pub(crate) fn write<T>(&self, work: impl FnOnce(&Tx) -> pinion_store::Result<T>) -> Result<T> {
        let _order = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let value = self.store.write(work)?;
        self.publish()?;
        Ok(value)
    }

    fn publish(&self) -> Result<()> {
        let images = self.store.list(IMAGES)?.records.into_iter().collect();
        *self.published.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(images);
        Ok(())
    }

    /// Whether a layer is complete on disk, recorded or about to be.
    pub(crate) fn has_layer(&self, chain_id: &Digest) -> Result<bool> {
        let known = self.inventory.lock().ready.contains_key(chain_id)
            || matches!(self.store.get(LAYERS, chain_id.as_str()), Ok(Some(_)));
        Ok(known && self.snapshots.has(chain_id))
    }

    /// Makes an image and its layers, all of them on disk and leased, durable and visible.
    pub(crate) fn record(&self, image: NewImage) -> Result<ImageRecord> {
        let chain_ids: Vec<Digest> = image.layers.iter().map(|l| l.chain_id.clone()).collect();
        let mut fresh: Vec<(Digest, LayerRecord)> = Vec::new();
        for (height, chain_id) in chain_ids.iter().enumerate() {
            let ready = self.inventory.lock().ready.get(chain_id).cloned();
            let Some(ready) = ready else { continue };
            if !ready.implied.is_empty() {
                self.snapshots.adopt_implied(chain_id, &chain_ids[..height], &ready.implied)?;
            }
            fresh.push((chain_id.clone(), ready.record));
        }
        snapshot::sync(&self.config.root)?;
        let record = image.into_record(&self.config);
        let record = self.write(|tx| {
            for (chain_id, layer) in &fresh {
                tx.put(LAYERS, chain_id.as_str(), layer)?;
            }
            name_image(tx, record)
        })?;
        let mut state = self.inventory.lock();
        for (chain_id, _) in &fresh {
            state.ready.remove(chain_id);
        }
        Ok(record)
    }

    /// Sets unreadable records aside and forgets images whose layers or configuration are gone, so
    /// that the next pull brings them anew.
    fn forget_damaged(&self) -> Result<()> {
        let images = self.store.list(IMAGES)?;
        let mut bad: Vec<(String, String)> = images.bad;
        let mut incomplete = Vec::new();
        for (id, image) in &images.records {
            if let Some(reason) = self.missing_part(image)? {
                tracing::warn!(image = id, reason, "image is damaged and must be pulled again");
                incomplete.push(id.clone());
            }
        }
        let layers = self.store.list(LAYERS)?.bad;
        let rootfs = self.store.list(ROOTFS)?.bad;
        for (key, reason) in bad.iter().chain(&layers).chain(&rootfs) {
            tracing::warn!(key, reason, "record cannot be read and is set aside");
        }
        if bad.is_empty() && incomplete.is_empty() && layers.is_empty() && rootfs.is_empty() {
            return Ok(());
        }
        self.store.write(|tx| {
            for (id, _) in bad.drain(..) {
                tx.set_aside(IMAGES, &id)?;
            }
            for (id, _) in &layers {
                tx.set_aside(LAYERS, id)?;
            }
            for (id, _) in &rootfs {
                tx.set_aside(ROOTFS, id)?;
            }
            incomplete.iter().try_for_each(|id| tx.delete(IMAGES, id).map(drop))
        })?;
        Ok(())
    }

    fn missing_part(&self, image: &ImageRecord) -> Result<Option<String>> {
        for layer in &image.layers {
            if !self.has_layer(&layer.chain_id)? {
                return Ok(Some(format!("layer {} is missing", layer.digest)));
            }
        }
        let config = match Digest::parse(&image.id) {
            Ok(digest) => self.content.read(&digest, MAX_CONFIG)?,
            Err(_) => None,
        };
        Ok(config.is_none().then(|| "its configuration is missing or damaged".to_owned()))
    }

    /// Directories whose usage [`Images::fs_info`] reports.
    pub(crate) fn root(&self) -> &Path {
        &self.config.root
    }
}

/// Writes `image`, which takes its tags from whichever image had them and keeps the names the same
/// image already has.
fn name_image(tx: &Tx, mut image: ImageRecord) -> pinion_store::Result<ImageRecord> {
    for (id, mut other) in tx.list(IMAGES)?.records {
        if id == image.id {
            image.repo_tags.append(&mut other.repo_tags);
            image.repo_digests.append(&mut other.repo_digests);
            image.manifests.append(&mut other.manifests);
            image.pinned |= other.pinned;
            continue;
        }
        let before = other.repo_tags.len();
        other.repo_tags.retain(|tag| !image.repo_tags.contains(tag));
        if other.repo_tags.len() != before {
            tx.put(IMAGES, &id, &other)?;
        }
    }
    for names in [&mut image.repo_tags, &mut image.repo_digests] {
        names.sort_unstable();
        names.dedup();
    }
    image.manifests.sort_unstable();
    image.manifests.dedup();
    tx.put(IMAGES, &image.id, &image)?;
    Ok(image)
}

/// Names first, then ids, so that an image called `cafe` is found by its name.
fn find<'a>(images: &'a BTreeMap<String, ImageRecord>, name: &str) -> Option<&'a ImageRecord> {
    if let Some(image) = images.get(name) {
        return Some(image);
    }
    if let Ok(reference) = Reference::parse(name) {
        let named = |image: &&ImageRecord| match reference.digest() {
            Some(digest) => image.repo_digests.contains(&reference.repo_digest(digest)),
            None => reference.repo_tag().is_some_and(|tag| image.repo_tags.contains(&tag)),
        };
        if let Some(image) = images.values().find(named) {
            return Some(image);
        }
    }
    let hex = name.strip_prefix("sha256:").unwrap_or(name);
    if hex.len() < 3 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    let mut matching = images.values().filter(|image| {
        let id = image.id.strip_prefix("sha256:").unwrap_or(&image.id);
        let by_manifest = hex.len() == 64 && image.manifests.iter().any(|m| m.hex() == hex);
        id.starts_with(hex) || by_manifest
    });
    match (matching.next(), matching.next()) {
        (Some(image), None) => Some(image),
        _ => None,
    }
}

impl fmt::Debug for Images {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Images").field("root", &self.inner.root()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(seed: &str, tags: &[&str]) -> (String, ImageRecord) {
        let id = Digest::of(seed.as_bytes());
        let record = ImageRecord {
            id: id.to_string(),
            repo_tags: tags.iter().map(|t| (*t).to_owned()).collect(),
            repo_digests: vec![format!("docker.io/library/{seed}@{}", Digest::of(b"m"))],
            size: 1,
            layers: Vec::new(),
            manifests: vec![Digest::of(format!("manifest of {seed}").as_bytes())],
            user: ImageUser::default(),
            pinned: false,
            updated: SystemTime::UNIX_EPOCH,
        };
        (id.to_string(), record)
    }

    #[test]
    fn an_image_is_found_by_every_name_it_has() {
        let images: BTreeMap<_, _> =
            [image("a", &["docker.io/library/a:latest"]), image("b", &["x.y/cafe:1"])].into();
        let found = |name: &str| find(&images, name).map(|i| i.repo_tags[0].as_str());
        let id = Digest::of(b"a");
        for name in [
            "a",
            "a:latest",
            "docker.io/library/a",
            id.as_str(),
            id.hex(),
            &id.hex()[..12],
            &id.as_str()[..15],
            &format!("a@{}", Digest::of(b"m")),
            Digest::of(b"manifest of a").as_str(),
        ] {
            assert_eq!(found(name), Some("docker.io/library/a:latest"), "{name}");
        }
        assert_eq!(found("x.y/cafe:1"), Some("x.y/cafe:1"));
        for name in ["", "c", "a:2", "sha256:", "ca", "x.y/cafe", "A B"] {
            assert_eq!(found(name), None, "{name}");
        }
    }

    #[test]
    fn an_ambiguous_beginning_finds_nothing() {
        let mut images = BTreeMap::new();
        for n in 0..40 {
            images.extend([image(&format!("i{n}"), &["x.y/z:1"])]);
        }
        let ambiguous = (0..16)
            .flat_map(|a| (0..16).map(move |b| format!("{a:x}{b:x}")))
            .find(|p| images.keys().filter(|k| k[7..].starts_with(p)).count() > 1);
        if let Some(prefix) = ambiguous {
            assert!(find(&images, &prefix).is_none());
        }
    }
}
