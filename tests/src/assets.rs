//! What the suites need beside Pinion: registry, images, CNI plugins, clients.
//!
//! On a host they come from the cache and are made on first use. Inside the virtual node
//! they are installed where a Debian system has them, and a marker file says so.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::Cache;
use crate::debian::{Archive, Spec, Tree};
use crate::error::{During, Error, Result};
use crate::image::{self, catalogue, large, registry};
use crate::tools;

/// Exists in the virtual node only.
pub(crate) const NODE_MARKER: &str = "/etc/pinion-node";
/// Where the node keeps the registry's storage.
pub(crate) const NODE_IMAGES: &str = "/usr/local/share/pinion-tests/images";

const DIGESTS: &str = "digests.json";

/// The node's system and the source of the test images, from Debian's packages.
pub(crate) const SYSTEM: Spec<'static> = Spec {
    name: "system",
    packages: &[
        "busybox",
        "procps",
        "util-linux",
        "kmod",
        "iproute2",
        "iptables",
        "nftables",
        "containernetworking-plugins",
        "docker-registry",
        "runc",
        "containerd",
        "strace",
        "systemd",
    ],
    backports: false,
    next: false,
    closure: true,
    // only maintainer scripts use them
    without: &[
        "perl",
        "libperl",
        "debconf_",
        "usrmerge",
        "adduser",
        "passwd",
        "libnumber-compare",
        "libtext-glob",
        "libfile-find",
        "libgdbm",
        "libdb5",
    ],
};

/// Finds and makes what the suites need.
#[derive(Debug)]
pub(crate) struct Assets {
    cache: Option<Cache>,
}

impl Assets {
    /// The assets of this machine, which may be the virtual node.
    pub(crate) fn open() -> Result<Self> {
        let in_node = Path::new(NODE_MARKER).exists();
        Ok(Self { cache: if in_node { None } else { Some(Cache::open()?) } })
    }

    /// Whether this is the virtual node.
    pub(crate) fn in_node(&self) -> bool {
        self.cache.is_none()
    }

    /// Debian's files for images and node; only a host has them as a tree.
    pub(crate) fn system(&self) -> Result<Tree> {
        match &self.cache {
            Some(cache) => Archive::new(cache).tree(&SYSTEM),
            None => Ok(Tree { root: "/".into() }),
        }
    }

    /// The registry's storage with all test images in it.
    pub(crate) fn images(&self) -> Result<PathBuf> {
        let Some(cache) = &self.cache else { return Ok(NODE_IMAGES.into()) };
        let tree = self.system()?;
        let workload = binary("pinion-workload")?;
        let bytes = fs::read(&workload).during(|| format!("read {}", workload.display()))?;
        let key = format!("{} {SYSTEM:?} {}", catalogue::REVISION, image::digest(&bytes));
        cache.entry("images", &key, |dir| {
            let images = catalogue::build(&tree, &workload)?;
            registry::write_storage(dir, &images)?;
            let digests: BTreeMap<&String, &String> = images
                .iter()
                .flat_map(|named| {
                    named.references.iter().map(|name| (name, &named.image.manifest.digest))
                })
                .collect();
            for named in images.iter().filter(|n| n.references[0] == catalogue::WORKLOAD) {
                named.image.write_layout(&dir.join("layout"), catalogue::WORKLOAD)?;
            }
            let path = dir.join(DIGESTS);
            let text = serde_json::to_vec_pretty(&digests).during(|| "encode digests".into())?;
            fs::write(&path, text).during(|| format!("write {}", path.display()))
        })
    }

    /// The manifest digest of a test image.
    pub(crate) fn digest(&self, reference: &str) -> Result<String> {
        let path = self.images()?.join(DIGESTS);
        let text = fs::read(&path).during(|| format!("read {}", path.display()))?;
        let mut digests: BTreeMap<String, String> =
            serde_json::from_slice(&text).during(|| format!("decode {}", path.display()))?;
        digests
            .remove(reference)
            .ok_or_else(|| Error::check(format!("no test image is called {reference}")))
    }

    /// An OCI layout with the workload image.
    pub(crate) fn layout(&self) -> Result<PathBuf> {
        Ok(self.images()?.join("layout"))
    }

    /// The registry's storage with the images for measuring pulls.
    pub(crate) fn large_images(&self) -> Result<PathBuf> {
        self.cache()?.entry("large-images", &large::REVISION.to_string(), large::write)
    }

    /// Starts the registry with the test images.
    pub(crate) fn registry(&self, scratch: &Path) -> Result<registry::Registry> {
        self.registry_over(&self.images()?, scratch)
    }

    /// Starts a registry over another storage directory.
    pub(crate) fn registry_over(
        &self,
        storage: &Path,
        scratch: &Path,
    ) -> Result<registry::Registry> {
        registry::Registry::start(self.program("usr/bin/docker-registry")?, storage, scratch)
    }

    /// A command for a Debian program: the machine's own in the node, the tree's on a host.
    pub(crate) fn program(&self, path: &str) -> Result<Command> {
        match &self.cache {
            Some(_) => self.system()?.command(path),
            None => Ok(Command::new(Path::new("/").join(path))),
        }
    }

    /// The directory with Debian's CNI plugins.
    pub(crate) fn cni_plugins(&self) -> Result<PathBuf> {
        self.system()?.find("usr/lib/cni")
    }

    /// critest, crictl or kubelet.
    pub(crate) fn tool(&self, tool: &tools::Tool) -> Result<PathBuf> {
        match &self.cache {
            Some(cache) => tools::build(cache, tool),
            None => Ok(Path::new("/usr/local/bin").join(tool.name)),
        }
    }

    /// The cache; only a host has one.
    pub(crate) fn cache(&self) -> Result<&Cache> {
        self.cache.as_ref().ok_or_else(|| Error::check("not possible inside the virtual node"))
    }
}

/// One of Pinion's binaries: from `$PINION_BIN`, beside this executable, in the release
/// directory next to it, or on the PATH.
pub(crate) fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().during(|| "find this executable".into())?;
    let beside = own.parent().map(Path::to_path_buf).unwrap_or_default();
    let mut dirs = vec![beside.join("../release"), "/usr/local/bin".into()];
    dirs.insert(0, beside);
    if let Some(dir) = std::env::var_os("PINION_BIN") {
        dirs.insert(0, dir.into());
    }
    dirs.iter()
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| Error::check(format!("{name} is not built; looked in {dirs:?}")))
}
