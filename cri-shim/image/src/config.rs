//! Settings of the image side of the server.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

/// Where images live, how they are fetched, and how large they may be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageConfig {
    /// Holds `content/` and `snapshots/`; one file system.
    pub root: PathBuf,
    /// Directories of `<host>/hosts.toml` files, searched in order.
    pub certs_dirs: Vec<PathBuf>,
    /// `host` or `host:port` of registries reached without verified TLS (TLS is tried first, then
    /// plain HTTP). Loopback registries are always reached by plain HTTP.
    pub insecure_registries: Vec<String>,
    /// Hosts of token services trusted with a registry's credentials although they belong to
    /// another domain.
    pub trusted_realms: Vec<String>,
    /// References that the kubelet must not garbage-collect; a trailing `*` matches any rest.
    pub pinned: Vec<String>,
    /// Layers of one image downloaded at once.
    pub max_concurrent_downloads: usize,
    /// Seconds without a byte after which a download is retried elsewhere or given up.
    pub stall_seconds: u64,
    /// Keep the compressed layers after unpacking; costs disk, saves nothing for running pods.
    pub keep_layer_blobs: bool,
    /// Mount root file systems with overlayfs's `volatile`: no syncing of what is deleted with the
    /// container anyway. Unmounting otherwise syncs the whole file system below.
    pub volatile_rootfs: bool,
    /// Bounds on what an image may contain.
    pub limits: Limits,
}

/// Bounds on what an image may contain; crossing one fails the pull.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Layers of an image. The kernel stacks at most 500.
    pub layers: usize,
    /// Bytes of one layer after decompression.
    pub layer_bytes: u64,
    /// A layer may always expand to this many bytes …
    pub free_expansion_bytes: u64,
    /// … and beyond that to this many times its compressed size.
    pub expansion_ratio: u64,
    /// Files, directories and links of one layer.
    pub layer_entries: u64,
}

/// Largest manifest or index read, as containerd and the distribution spec advise.
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;
/// Largest image configuration read.
pub(crate) const MAX_CONFIG: u64 = 8 << 20;

impl Default for ImageConfig {
    fn default() -> Self {
        Self {
            root: "/var/lib/pinion".into(),
            certs_dirs: vec!["/etc/pinion/certs.d".into(), "/etc/containerd/certs.d".into()],
            insecure_registries: Vec::new(),
            trusted_realms: Vec::new(),
            pinned: Vec::new(),
            max_concurrent_downloads: 3,
            stall_seconds: 30,
            keep_layer_blobs: true,
            volatile_rootfs: true,
            limits: Limits::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            layers: 128,
            layer_bytes: 64 << 30,
            free_expansion_bytes: 1 << 30,
            expansion_ratio: 100,
            layer_entries: 2_000_000,
        }
    }
}

impl Limits {
    /// Bytes a layer of `compressed` bytes may expand to.
    pub(crate) fn expansion(&self, compressed: u64) -> u64 {
        compressed
            .saturating_mul(self.expansion_ratio)
            .max(self.free_expansion_bytes)
            .min(self.layer_bytes)
    }
}

impl ImageConfig {
    pub(crate) fn stall(&self) -> Duration {
        Duration::from_secs(self.stall_seconds.max(1))
    }

    pub(crate) fn is_pinned(&self, tag: &str) -> bool {
        self.pinned.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(prefix) => tag.starts_with(prefix),
            None => tag == pattern,
        })
    }
}
