//! The images of a make-believe node in a temporary directory.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use pinion_image::{
    Auth, Error, ImageConfig, ImageRecord, Images, Progress, ProgressFn, Result, Stage,
};
use pinion_store::Store;

/// A node; its mounts are undone on drop.
pub(crate) struct Node {
    pub(crate) images: Images,
    pub(crate) root: PathBuf,
    config: ImageConfig,
    _dir: Option<tempfile::TempDir>,
}

impl Node {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(crate) fn with(adjust: impl FnOnce(&mut ImageConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        Self::at(root, Some(dir), adjust)
    }

    pub(crate) fn at(
        root: PathBuf,
        dir: Option<tempfile::TempDir>,
        adjust: impl FnOnce(&mut ImageConfig),
    ) -> Self {
        let mut config = ImageConfig {
            root: root.clone(),
            certs_dirs: vec![root.join("certs.d")],
            ..ImageConfig::default()
        };
        adjust(&mut config);
        let images = open(&config);
        Self { images, root, config, _dir: dir }
    }

    /// The same node after piniond was restarted.
    pub(crate) fn restart(&mut self) {
        // The store's lock is released with the last clone.
        let parked = tempfile::tempdir().unwrap();
        let other = ImageConfig { root: parked.path().to_owned(), ..ImageConfig::default() };
        self.images = open(&other);
        self.images = open(&self.config);
    }

    pub(crate) async fn pull(&self, reference: &str) -> Result<ImageRecord> {
        self.images.pull(reference, &None, Arc::new(|_| {})).await
    }

    pub(crate) async fn pull_as(&self, reference: &str, password: &str) -> Result<ImageRecord> {
        let auth = Auth { username: "user".into(), password: password.into(), ..Auth::default() };
        self.images.pull(reference, &Some(auth), Arc::new(|_| {})).await
    }

    /// Files of the content store, by name.
    pub(crate) fn blobs(&self) -> BTreeSet<String> {
        list(&self.root.join("content/blobs/sha256"))
    }

    /// Layer directories, unfinished ones included.
    pub(crate) fn layers(&self) -> BTreeSet<String> {
        let mut layers = list(&self.root.join("snapshots/layers"));
        layers.remove("empty");
        layers
    }

    /// Fails unless the node holds nothing but what it started with.
    pub(crate) fn assert_empty(&self) {
        assert!(self.images.list().is_empty(), "{:?}", self.images.list());
        assert_eq!(self.blobs(), BTreeSet::new());
        assert_eq!(self.layers(), BTreeSet::new());
        assert_eq!(list(&self.root.join("snapshots/trash")), BTreeSet::new());
        assert_eq!(list(&self.root.join("snapshots/containers")), BTreeSet::new());
    }

    /// Mounts a container's root file system below the node's directory.
    pub(crate) fn mount(&self, id: &str, image: &str) -> PathBuf {
        let target = self.root.join("bundles").join(id);
        self.images.prepare_rootfs(id, image, &target).unwrap_or_else(|e| panic!("{}", chain(&e)));
        target
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for (id, rootfs) in self.images.rootfs_list().unwrap_or_default() {
            let _ = self.images.remove_rootfs(&id, &rootfs.target);
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let root = self.root.join("bundles").display().to_string();
        assert!(std::thread::panicking() || !mounts.contains(&root), "a mount was left behind");
    }
}

fn open(config: &ImageConfig) -> Images {
    let store = Store::open(config.root.join("store.redb")).unwrap().store;
    Images::open(config.clone(), store).unwrap_or_else(|e| panic!("{}", chain(&e)))
}

fn list(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// An error with all its causes.
pub(crate) fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

/// Records progress reports.
#[derive(Clone, Default)]
pub(crate) struct Recorder(Arc<Mutex<Vec<Progress>>>);

impl Recorder {
    pub(crate) fn listener(&self) -> ProgressFn {
        let reports = self.0.clone();
        Arc::new(move |progress| reports.lock().unwrap().push(progress))
    }

    pub(crate) fn reports(&self) -> Vec<Progress> {
        self.0.lock().unwrap().clone()
    }

    pub(crate) fn saw(&self, stage: Stage, is_layer: bool) -> bool {
        self.reports().iter().any(|p| p.stage == stage && p.layer.is_some() == is_layer)
    }
}
