//! Directories of unpacked layers.
//!
//! ```text
//!   stage ──▶ layers/<id>.tmp-<n> ──unpack──▶ publish ──▶ layers/<id> ──sync, record──▶ durable
//!                     └── dropped before that: moved to the trash
//! ```
//! `<id>` is the first 24 digits of the chain id: 96 bits tell layers apart, and 128 such names
//! fit into the one page of options that mount(2) takes.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{
    Digest, Error,
    error::Result,
    trash::Trash,
    unpack::{InRoot, copy_directory, look, open_directory},
};

const NAME_DIGITS: usize = 24;
const STAGED: &str = ".tmp-";

/// The layers, and the trash they end in.
#[derive(Debug)]
pub(crate) struct Snapshots {
    layers: PathBuf,
    containers: PathBuf,
    pub(crate) trash: Trash,
    stages: AtomicU64,
}

impl Snapshots {
    /// Name of the lower directory of an image without layers.
    pub(crate) const EMPTY: &str = "empty";

    /// Opens `<root>/snapshots`, closed to everyone but root: layers hold setuid programs and
    /// device nodes.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let base = root.join("snapshots");
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&base).map_err(Error::file("create directory", &base))?;
        fs::set_permissions(&base, fs::Permissions::from_mode(0o700))
            .map_err(Error::file("set the mode of", &base))?;
        let (layers, containers) = (base.join("layers"), base.join("containers"));
        for dir in [&layers, &containers, &layers.join(Self::EMPTY)] {
            builder.create(dir).map_err(Error::file("create directory", dir))?;
        }
        let trash = Trash::open(base.join("trash"))?;
        Ok(Self { layers, containers, trash, stages: AtomicU64::new(0) })
    }

    /// Name of a layer's directory below [`Snapshots::layers_dir`].
    pub(crate) fn name(chain_id: &Digest) -> &str {
        &chain_id.hex()[..NAME_DIGITS]
    }

    pub(crate) fn layers_dir(&self) -> &Path {
        &self.layers
    }

    pub(crate) fn layer(&self, chain_id: &Digest) -> PathBuf {
        self.layers.join(Self::name(chain_id))
    }

    pub(crate) fn has(&self, chain_id: &Digest) -> bool {
        self.layer(chain_id).is_dir()
    }

    /// Upper and work directories of a container live here.
    pub(crate) fn container(&self, id: &str) -> PathBuf {
        self.containers.join(id)
    }

    /// Names of layers, staged ones included, and of containers.
    pub(crate) fn list(&self) -> Result<(Vec<String>, Vec<String>)> {
        let mut layers = names(&self.layers)?;
        layers.retain(|name| name != Self::EMPTY);
        Ok((layers, names(&self.containers)?))
    }

    pub(crate) fn is_staged(name: &str) -> bool {
        name.contains(STAGED)
    }

    /// An empty directory to unpack a layer into.
    pub(crate) fn stage(&self, chain_id: &Digest) -> Result<Stage<'_>> {
        let number = self.stages.fetch_add(1, Ordering::Relaxed);
        let path = self.layers.join(format!("{}{STAGED}{number}", Self::name(chain_id)));
        self.trash.take_path(&path)?; // left by a crash
        fs::create_dir(&path).map_err(Error::file("create directory", &path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
            .map_err(Error::file("set the mode of", &path))?;
        Ok(Stage { path, target: self.layer(chain_id), trash: &self.trash })
    }

    /// Gives directories that the top layer uses without describing them the owner and mode they
    /// have in the nearest layer below; overlayfs shows the upper directory's. Done again, it
    /// changes nothing.
    pub(crate) fn adopt_implied(
        &self,
        chain_id: &Digest,
        below: &[Digest],
        implied: &BTreeSet<PathBuf>,
    ) -> Result<()> {
        let dir = self.layer(chain_id);
        let mut top = InRoot::open(&dir).map_err(Error::file("open", &dir))?;
        let mut lowers = Vec::new();
        for lower in below.iter().rev() {
            let dir = self.layer(lower);
            lowers.push(InRoot::open(&dir).map_err(Error::file("open", dir))?);
        }
        for path in implied {
            let adopted = lowers.iter_mut().find_map(|lower| adopt(&mut top, lower, path));
            if let Some(Err(e)) = adopted {
                return Err(Error::file("set attributes of", dir.join(path))(e));
            }
        }
        Ok(())
    }
}

/// `None` if `lower` has no such directory.
fn adopt(top: &mut InRoot, lower: &mut InRoot, path: &Path) -> Option<io::Result<()>> {
    let (parent, name) = (path.parent()?, Path::new(path.file_name()?));
    let beside = lower.directory(parent).ok()?;
    look(&beside, name).ok()??;
    let from = open_directory(&beside, name).ok()?;
    // What is no longer a directory in the top layer was replaced by a later entry.
    let to = open_directory(top.directory(parent).ok()?, name).ok()?;
    Some(copy_directory(from, to))
}

fn names(dir: &Path) -> Result<Vec<String>> {
    fs::read_dir(dir)
        .and_then(|entries| {
            entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect()
        })
        .map_err(Error::file("read directory", dir))
}

/// A layer being unpacked.
#[derive(Debug)]
pub(crate) struct Stage<'a> {
    path: PathBuf,
    target: PathBuf,
    trash: &'a Trash,
}

impl Stage<'_> {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Puts the complete layer in its place, over what an interrupted pull may have left there.
    pub(crate) fn publish(self) -> Result<()> {
        self.trash.take_path(&self.target)?;
        fs::rename(&self.path, &self.target).map_err(Error::file("rename", &self.path))
    }
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        // After `publish` there is nothing left under this name.
        if let Err(error) = self.trash.take_path(&self.path) {
            tracing::warn!(error = error.chain(), "an unfinished layer stays behind");
        }
    }
}

/// Makes everything written so far below `root` durable.
pub(crate) fn sync(root: &Path) -> Result<()> {
    let dir = File::open(root).map_err(Error::file("open", root))?;
    rustix::fs::syncfs(&dir).map_err(|e| Error::file("sync the file system of", root)(e.into()))
}
