//! Checkpoints of containers and pods, for whoever has switched them on.
//!
//! ```text
//!   <root>/checkpoints/<random>/   private, removed whatever happens
//!     checkpoint/                  CRIU's images, written by `pinion checkpoint`
//!     dump.log, stats-dump         CRIU's own words
//!     config.dump, spec.dump       which container, and its OCI configuration
//!     rootfs-diff.tar              what it has changed of its image
//!   ──▶ one archive beside the place that was asked for ──sync──▶ renamed to it
//! ```
//!
//! The container goes on running. Its writable layer is read while it may change it, so nothing
//! in there is ever named by path ([`upper`]). The archive is for root alone: it holds the
//! memory of the container.

mod archive;
mod upper;

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use crate::error::{Context, Error, Kind, Result};
use crate::ids;
use crate::node::Node;
use crate::record::{Container, Phase, Sandbox};
use crate::services::blocking;

use archive::Archive;

/// The error of every call while checkpoints are off.
pub(crate) fn allowed(node: &Node) -> Result<()> {
    if node.config.checkpoint.enabled {
        return Ok(());
    }
    Err(Error::precondition(format!(
        "checkpoints are switched off on this node; to switch them on, set `enabled = true` in \
         the table `[checkpoint]` of {} and restart piniond",
        crate::config::DEFAULT_PATH
    )))
}

/// The error of a restore while checkpoints are on: what is there can be taken, not put back.
pub(crate) fn restore_refused(path: &str) -> Error {
    Error::precondition(format!(
        "checkpoint_path {path:?}: restoring pods is not possible with this version; create \
         the pod anew, or restore its containers with `pinion restore`"
    ))
}

/// A place for an archive that a client may name: absolute, in a directory that exists.
pub(crate) fn check_place(field: &str, place: &str) -> Result<PathBuf> {
    let path = Path::new(place);
    let refuse = |reason: &str| Err(Error::invalid(format!("{field} {place:?} {reason}")));
    if !path.is_absolute() || place.contains('\0') {
        return refuse("is not an absolute path");
    }
    if path.components().any(|part| matches!(part, std::path::Component::ParentDir)) {
        return refuse("must not contain \"..\"");
    }
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(_)) if parent.is_dir() => {}
        _ => return refuse("is not in a directory that exists"),
    }
    if fs::symlink_metadata(path).is_ok_and(|file| !file.is_file()) {
        return refuse("exists and is not a regular file");
    }
    Ok(path.to_path_buf())
}

/// A private directory that is removed with this value.
struct Work(PathBuf);

impl Work {
    fn new(node: &Node) -> Result<Self> {
        let path = node.paths.checkpoints().join(ids::random_id()?);
        let what = || format!("create {}", path.display());
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).context(what)?;
        Ok(Self(path))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a checkpoint's files stay behind");
        }
    }
}

/// Removes what servers that ended in between have left.
pub(crate) fn sweep(node: &Node) {
    let path = node.paths.checkpoints();
    match fs::remove_dir_all(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            node.find(format!("remove {}: {error}", path.display()));
        }
        _ => {}
    }
}

/// Checkpoints a running container into an archive at `place`.
pub(crate) async fn container(
    node: &Arc<Node>,
    record: &Container,
    place: &Path,
    limit: Duration,
) -> Result<()> {
    if record.phase() != Phase::Running {
        return Err(Error::precondition(format!("container {} is not running", record.id)));
    }
    let work = Work::new(node)?;
    let images = work.0.join("checkpoint");
    fs::DirBuilder::new()
        .mode(0o700)
        .create(&images)
        .context(|| format!("create {}", images.display()))?;
    let dumped = node.programs.checkpoint(&record.id, &images, &work.0);
    let dumped = match limit.is_zero() {
        true => dumped.await,
        false => tokio::time::timeout(limit, dumped).await.unwrap_or_else(|_late| {
            let message = format!("checkpoint of {} is not done within {limit:?}", record.id);
            Err(Error::new(Kind::Timeout, message))
        }),
    };
    // Without CRIU's own words nobody could tell why.
    dumped.map_err(|error| match archive::last_error(&work.0.join("dump.log")) {
        Some(words) => Error::new(error.kind(), format!("{} (CRIU: {words})", error.chain())),
        None => error,
    })?;
    let (node, record, place) = (node.clone(), record.clone(), place.to_path_buf());
    blocking(move || pack(&node, &record, &work, &place)).await
}

/// Puts the archive of a container together. Blocks.
fn pack(node: &Node, record: &Container, work: &Work, place: &Path) -> Result<()> {
    let image = record.config.image.clone().unwrap_or_default();
    let name = match image.user_specified_image.is_empty() {
        true => image.image.clone(),
        false => image.user_specified_image.clone(),
    };
    let config = json!({
        "id": record.id,
        "name": record.name(),
        "rootfsImage": name,
        "rootfsImageRef": record.image_id,
        "rootfsImageName": name,
        "runtime": "pinion",
        "createdTime": time(record.created_at),
        "checkpointedTime": time(ids::now()),
        "restoredTime": time(0),
        "restored": false,
    });
    let spec = node.paths.pod(&record.pod).container(&record.id).config();
    let spec = fs::read(&spec).context(|| format!("read {}", spec.display()))?;
    let mut archive = Archive::create(place)?;
    archive.bytes("config.dump", &serde_json::to_vec(&config).unwrap_or_default())?;
    archive.bytes("spec.dump", &spec)?;
    let diff = work.0.join("rootfs-diff.tar");
    upper::write(&node.images.upper(&record.id), &diff)?;
    archive.file("rootfs-diff.tar", &diff)?;
    for name in ["dump.log", "stats-dump"] {
        let path = work.0.join(name);
        if path.is_file() {
            archive.file(name, &path)?;
        }
    }
    archive.directory("checkpoint", &work.0.join("checkpoint"))?;
    archive.publish()
}

/// Nanoseconds since the epoch, to the second, as RFC 3339 has it.
fn time(nanoseconds: i64) -> String {
    let seconds = nanoseconds.div_euclid(1_000_000_000);
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Civil from days (Hinnant), with the year beginning in March.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * march + 2) / 5 + 1;
    let month = if march < 10 { march + 3 } else { march - 9 };
    let year = year + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Checkpoints running containers of a pod into one archive at `place`.
pub(crate) async fn pod(
    node: &Arc<Node>,
    sandbox: &Sandbox,
    chosen: &[Arc<Container>],
    place: &Path,
) -> Result<()> {
    let work = Work::new(node)?;
    let mut members = Vec::new();
    for record in chosen {
        let path = work.0.join(format!("{}.tar", record.id));
        container(node, record, &path, Duration::ZERO).await?;
        members.push((record.name().to_owned(), record.id.clone(), path));
    }
    let metadata = sandbox.metadata();
    let pod = json!({
        "version": 1,
        "id": sandbox.id,
        "name": metadata.name,
        "namespace": metadata.namespace,
        "uid": metadata.uid,
        "runtimeHandler": sandbox.handler,
        "checkpointedTime": time(ids::now()),
        "containers": members
            .iter()
            .map(|(name, id, _)| json!({ "name": name, "id": id, "archive": format!("containers/{id}.tar") }))
            .collect::<Vec<_>>(),
    });
    let place = place.to_path_buf();
    blocking(move || {
        // Removed after the archive has been read from it.
        let _work = &work;
        let mut archive = Archive::create(&place)?;
        archive.bytes("pod.dump", &serde_json::to_vec(&pod).unwrap_or_default())?;
        for (_, id, path) in &members {
            archive.file(&format!("containers/{id}.tar"), path)?;
        }
        archive.publish()
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339() {
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(951_827_696_000_000_000), "2000-02-29T12:34:56Z");
        assert_eq!(time(1_735_689_599_999_999_999), "2024-12-31T23:59:59Z");
    }

    #[test]
    fn archives_go_only_where_a_file_can_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        check_place("location", &at("new.tar")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        for bad in ["", "relative.tar", "/", &at("missing/x.tar"), &at("../x.tar"), &at("link")] {
            let error = check_place("location", bad).unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid, "{bad:?}");
        }
    }
}
