//! Pulling: manifest, configuration, then layers, each downloaded and unpacked in one go.
//!
//! ```text
//!   share ──▶ one task per (reference, credentials)
//!               │ resolve ▶ choose platform ▶ configuration ▶ lease everything
//!               ├─▶ one flight per layer (chain id), at most three of this image at once:
//!               │       download ─channel─▶ hash, store, inflate, hash, untar ▶ publish
//!               └─▶ sync once ▶ record image and layers in one transaction
//! ```
//! A failed or abandoned pull leaves nothing: its leases end and the collector runs.

use std::{
    fmt,
    io::{self, Read},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Buf, Bytes};
use futures::{StreamExt, TryStreamExt};
use tokio::sync::mpsc;

use crate::{
    Auth, Digest, Error, ErrorKind, ImageRecord, LayerRecord, LayerRef, ProgressFn, Reference,
    Stage,
    config::{MAX_CONFIG, MAX_MANIFEST},
    content::Ingest,
    error::Result,
    images::{Inner, NewImage},
    inventory::{Lease, Ready},
    manifest::{self, Document, Manifest},
    progress::Audience,
    record::LAYERS,
    registry::{Fetched, Session},
    unpack::{Announced, unpack},
};

/// Chunks of a download waiting to be unpacked; a chunk is what the network delivers, about 16 KiB.
const QUEUE: usize = 64;
/// Indexes nested in one another.
const MAX_NESTING: usize = 4;
/// A progress report per this many bytes.
const REPORT_EVERY: u64 = 512 << 10;

/// What makes two pulls the same.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PullKey {
    reference: String,
    auth: Option<Auth>,
}

impl fmt::Display for PullKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pull of {}", self.reference)
    }
}

/// Pulls, or joins the pull under way.
pub(crate) async fn share(
    inner: &Arc<Inner>,
    reference: Reference,
    auth: Option<Auth>,
    progress: ProgressFn,
) -> Result<ImageRecord> {
    let key = PullKey { reference: reference.to_string(), auth: auth.clone() };
    let alone = Audience::of(progress.clone());
    let seat = inner.pulls.board(key, alone, |audience| {
        let inner = Arc::clone(inner);
        async move { pull(&inner, &reference, auth.as_ref(), &audience).await }
    });
    if !seat.is_first {
        seat.shared.join(progress);
    }
    seat.landing.await.map_err(Error::Shared)
}

async fn pull(
    inner: &Arc<Inner>,
    reference: &Reference,
    auth: Option<&Auth>,
    audience: &Audience,
) -> Result<ImageRecord> {
    audience.image(Stage::Resolving, 0, 0);
    let mut lease = inner.inventory.lease();
    let result = pull_leased(inner, reference, auth, audience, &mut lease).await;
    drop(lease);
    if result.is_err() {
        let inner = Arc::clone(inner);
        // The pull's own failure is the one to report; what stays is collected at the next chance.
        let _ = blocking("clean up", move || inner.collect()).await;
    }
    result
}

async fn pull_leased(
    inner: &Arc<Inner>,
    reference: &Reference,
    auth: Option<&Auth>,
    audience: &Audience,
    lease: &mut Lease,
) -> Result<ImageRecord> {
    let session = Arc::new(inner.registry.session(reference, auth)?);
    let found = find_manifest(inner, &session, reference, lease).await?;
    found.manifest.check(&reference.to_string(), inner.config.limits.layers)?;
    let configuration = configuration(inner, &session, &found.manifest, lease).await?;

    let mut image = NewImage::assemble(&reference.to_string(), &found.manifest, &configuration)?;
    manifest::check_platform(&reference.to_string(), &image.configuration, &inner.host)?;
    image.size += found.documents.last().map_or(0, |bytes| bytes.len() as u64);
    image.manifests = found.documents.iter().map(|bytes| Digest::of(bytes)).collect();
    image.repo_tags = reference.repo_tag().into_iter().collect();
    image.repo_digests =
        image.manifests.first().map(|top| reference.repo_digest(top)).into_iter().collect();
    for layer in &image.layers {
        lease.cover(&layer.chain_id);
        lease.cover(&layer.digest);
    }
    let brought = bring_layers(inner, &session, &image.layers, audience).await?;

    let inner = Arc::clone(inner);
    let record = blocking("record the image", move || {
        for bytes in found.documents.iter().chain([&configuration]) {
            inner.content.put(bytes)?;
        }
        inner.record(image)
    })
    .await?;
    let stage = if brought { Stage::Done } else { Stage::AlreadyPresent };
    audience.image(stage, record.size, record.size);
    Ok(record)
}

struct Found {
    manifest: Manifest,
    /// The documents that led to it, the one the reference names first, the manifest last.
    documents: Vec<Vec<u8>>,
}

async fn find_manifest(
    inner: &Arc<Inner>,
    session: &Session,
    reference: &Reference,
    lease: &mut Lease,
) -> Result<Found> {
    let what = reference.to_string();
    let mut documents: Vec<Vec<u8>> = Vec::new();
    let mut fetched = session.resolve().await?;
    loop {
        lease.cover(&Digest::of(&fetched.bytes));
        let parsed = manifest::parse(&what, &fetched.bytes, fetched.content_type.as_deref())?;
        documents.push(fetched.bytes);
        let choices = match parsed {
            Document::Manifest(manifest) => return Ok(Found { manifest, documents }),
            Document::Index(choices) => choices,
        };
        if documents.len() > MAX_NESTING {
            let reason = format!("indexes are nested more than {MAX_NESTING} deep");
            return Err(Error::Document { what, reason });
        }
        let target = &manifest::choose(&what, &choices, &inner.host)?.target;
        fetched = match inner.content.read(&target.digest, MAX_MANIFEST)? {
            Some(bytes) => Fetched { bytes, content_type: None },
            None => session.manifest_by_digest(&target.digest).await?,
        };
    }
}

async fn configuration(
    inner: &Arc<Inner>,
    session: &Session,
    manifest: &Manifest,
    lease: &mut Lease,
) -> Result<Vec<u8>> {
    let wanted = &manifest.config;
    if wanted.size > MAX_CONFIG {
        let what = format!("configuration {} of {} bytes", wanted.digest, wanted.size);
        return Err(Error::TooLarge { what, limit: format!("{MAX_CONFIG} bytes") });
    }
    lease.cover(&wanted.digest);
    match inner.content.read(&wanted.digest, MAX_CONFIG)? {
        Some(bytes) => Ok(bytes),
        None => session.blob(&wanted.digest, wanted.size).await,
    }
}

/// Sees to it that every layer is on disk; true if any was not.
async fn bring_layers(
    inner: &Arc<Inner>,
    session: &Arc<Session>,
    layers: &[LayerRef],
    audience: &Audience,
) -> Result<bool> {
    let mut missing = Vec::new();
    for layer in layers {
        if inner.has_layer(&layer.chain_id)? {
            audience.layer(&layer.digest, Stage::AlreadyPresent, layer.size, layer.size);
        } else {
            missing.push(layer.clone());
        }
    }
    let any = !missing.is_empty();
    futures::stream::iter(missing)
        .map(|layer| bring_layer(inner, session, layer, audience))
        .buffer_unordered(inner.config.max_concurrent_downloads.max(1))
        .try_collect::<()>()
        .await?;
    Ok(any)
}

/// Joins the flight for a layer. One started by a pull with other credentials may fail for reasons
/// that are not ours, so its failure is tried again once.
async fn bring_layer(
    inner: &Arc<Inner>,
    session: &Arc<Session>,
    layer: LayerRef,
    audience: &Audience,
) -> Result<()> {
    loop {
        let seat = inner.layer_flights.board(layer.chain_id.clone(), (), |()| {
            let (inner, session) = (Arc::clone(inner), Arc::clone(session));
            let (layer, audience) = (layer.clone(), audience.clone());
            async move {
                tokio::select! {
                    result = fetch_layer(&inner, &session, &layer, &audience) => result,
                    () = unwanted(&inner, &layer.chain_id) => {
                        Err(Error::Abandoned { what: format!("layer {}", layer.digest) })
                    }
                }
            }
        });
        match seat.landing.await {
            Ok(()) => {
                audience.layer(&layer.digest, Stage::Done, layer.size, layer.size);
                return Ok(());
            }
            Err(e) if seat.is_first => return Err(Error::Shared(e)),
            Err(_others) => {}
        }
    }
}

/// Ends when no pull needs the layer any more, because all have failed.
async fn unwanted(inner: &Inner, chain_id: &Digest) {
    while inner.inventory.lock().is_leased(chain_id) {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn fetch_layer(
    inner: &Arc<Inner>,
    session: &Session,
    layer: &LayerRef,
    audience: &Audience,
) -> Result<()> {
    if inner.has_layer(&layer.chain_id)? {
        return Ok(());
    }
    if inner.content.size(&layer.digest) == Some(layer.size) {
        audience.layer(&layer.digest, Stage::Unpacking, 0, layer.size);
        let (owned, wanted) = (Arc::clone(inner), layer.clone());
        let unpacked = blocking("unpack a layer", move || {
            let blob = owned.content.reader(&wanted.digest)?;
            owned.unpack_layer(blob, None, &wanted)
        })
        .await;
        match unpacked {
            Err(e) if e.kind() == ErrorKind::DataLoss => {
                tracing::warn!(layer = %layer.digest, error = e.chain(), "blob is fetched again");
                inner.content.remove(layer.digest.hex())?;
            }
            other => return other,
        }
    }
    download_layer(inner, session, layer, audience).await
}

async fn download_layer(
    inner: &Arc<Inner>,
    session: &Session,
    layer: &LayerRef,
    audience: &Audience,
) -> Result<()> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let (owned, wanted) = (Arc::clone(inner), layer.clone());
    let unpacking = blocking("unpack a layer", move || {
        let keep = if owned.config.keep_layer_blobs {
            Some(owned.content.ingest(&wanted.digest, wanted.size)?)
        } else {
            None
        };
        owned.unpack_layer(Incoming { receiver, current: Bytes::new() }, keep, &wanted)
    });
    let reported = AtomicU64::new(0);
    let progress = |position: u64| {
        let last = reported.load(Ordering::Relaxed);
        if position >= last + REPORT_EVERY || position == layer.size {
            reported.store(position, Ordering::Relaxed);
            audience.layer(&layer.digest, Stage::Downloading, position, layer.size);
        }
    };
    let downloading = async {
        let result = session.download(&layer.digest, layer.size, &sender, &progress).await;
        drop(sender); // the end of the stream
        result
    };
    let (downloaded, unpacked) = futures::join!(downloading, unpacking);
    // A download that broke off explains why unpacking failed.
    downloaded.and(unpacked)
}

impl Inner {
    /// Unpacks a layer into its place and notes it as ready to be recorded.
    pub(crate) fn unpack_layer(
        &self,
        source: impl Read + Send,
        keep: Option<Ingest>,
        layer: &LayerRef,
    ) -> Result<()> {
        let limits = &self.config.limits;
        let announced = Announced {
            digest: layer.digest.clone(),
            size: layer.size,
            diff_id: layer.diff_id.clone(),
            max_bytes: limits.expansion(layer.size),
            max_entries: limits.layer_entries,
        };
        let stage = self.snapshots.stage(&layer.chain_id)?;
        let unpacked = unpack(source, keep, &announced, stage.path(), &self.snapshots.trash)?;
        let record = LayerRecord {
            bytes: unpacked.bytes,
            inodes: unpacked.inodes,
            opaque_root: unpacked.opaque_root,
        };
        let mut state = self.inventory.lock();
        let recorded = self.store.get(LAYERS, layer.chain_id.as_str());
        if state.ready.contains_key(&layer.chain_id) || matches!(recorded, Ok(Some(_))) {
            // A load and a pull brought the same layer; the first may be mounted by now.
            if self.snapshots.has(&layer.chain_id) {
                return Ok(());
            }
        }
        stage.publish()?;
        let ready = Ready { record, implied: unpacked.implied };
        state.ready.insert(layer.chain_id.clone(), ready);
        Ok(())
    }
}

/// Runs `work` where it may block.
async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(Error::Abandoned { what: what.to_owned() }),
    }
}

/// A download as a reader for another thread.
struct Incoming {
    receiver: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.receiver.blocking_recv() {
                Some(next) => self.current = next,
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}
