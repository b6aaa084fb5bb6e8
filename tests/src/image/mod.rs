//! OCI images made from files on this machine, byte for byte reproducible.
//!
//! Nothing is downloaded from a registry: layers are written from Debian's packages and our
//! own small programs, with fixed times and owners, so the same inputs give the same digest.

pub(crate) mod catalogue;
pub(crate) mod large;
pub(crate) mod registry;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::error::{During, Result};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const CREATED: &str = "2024-01-01T00:00:00Z";

/// Content with its address.
#[derive(Debug, Clone)]
pub(crate) struct Blob {
    /// `sha256:<hex>`
    pub(crate) digest: String,
    /// The content.
    pub(crate) bytes: Vec<u8>,
}

impl Blob {
    fn new(bytes: Vec<u8>) -> Self {
        Self { digest: digest(&bytes), bytes }
    }

    fn descriptor(&self, media_type: &str) -> Value {
        json!({ "mediaType": media_type, "digest": self.digest, "size": self.bytes.len() })
    }
}

/// `sha256:<hex>` of some bytes.
pub(crate) fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// A layer: compressed content and the digest of the tar inside.
#[derive(Debug)]
pub(crate) struct Layer {
    blob: Blob,
    diff_id: String,
}

/// Writes a layer entry by entry.
#[allow(missing_debug_implementations, reason = "the tar writer has none")]
pub(crate) struct LayerBuilder {
    tar: tar::Builder<Vec<u8>>,
}

impl Default for LayerBuilder {
    fn default() -> Self {
        Self { tar: tar::Builder::new(Vec::new()) }
    }
}

impl LayerBuilder {
    /// A directory owned by root.
    pub(crate) fn dir(&mut self, path: &str, mode: u32) -> Result<&mut Self> {
        self.entry(path, tar::EntryType::Directory, mode, None, &[])
    }

    /// A file owned by root.
    pub(crate) fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<&mut Self> {
        self.entry(path, tar::EntryType::Regular, mode, None, bytes)
    }

    /// A symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &str) -> Result<&mut Self> {
        self.entry(path, tar::EntryType::Symlink, 0o777, Some(target), &[])
    }

    /// A hard link to a file added before.
    pub(crate) fn hard_link(&mut self, path: &str, target: &str) -> Result<&mut Self> {
        self.entry(path, tar::EntryType::Link, 0o755, Some(target), &[])
    }

    /// A file with the content and mode of one on this machine (links are followed).
    pub(crate) fn copy(&mut self, path: &str, from: &Path) -> Result<&mut Self> {
        let bytes = fs::read(from).during(|| format!("read {}", from.display()))?;
        let meta = fs::metadata(from).during(|| format!("stat {}", from.display()))?;
        self.file(path, meta.permissions().mode() & 0o7777, &bytes)
    }

    fn entry(
        &mut self,
        path: &str,
        kind: tar::EntryType,
        mode: u32,
        target: Option<&str>,
        bytes: &[u8],
    ) -> Result<&mut Self> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(bytes.len() as u64);
        match target {
            Some(target) => self.tar.append_link(&mut header, path, target),
            None => self.tar.append_data(&mut header, path, bytes),
        }
        .during(|| format!("add {path} to a layer"))?;
        Ok(self)
    }

    /// Ends the layer.
    pub(crate) fn finish(self) -> Result<Arc<Layer>> {
        let tar = self.tar.into_inner().during(|| "end a layer".into())?;
        let mut gzip = GzBuilder::new().mtime(0).write(Vec::new(), Compression::new(6));
        gzip.write_all(&tar).during(|| "compress a layer".into())?;
        let bytes = gzip.finish().during(|| "compress a layer".into())?;
        Ok(Arc::new(Layer { blob: Blob::new(bytes), diff_id: digest(&tar) }))
    }
}

/// What an image's config says about the process, in OCI's words.
#[derive(Debug, Clone, Default)]
pub(crate) struct Process {
    /// `user[:group]`; empty for root.
    pub(crate) user: &'static str,
    /// The default command.
    pub(crate) cmd: &'static [&'static str],
    /// What the command is appended to.
    pub(crate) entrypoint: &'static [&'static str],
    /// TCP ports, such as `80/tcp`.
    pub(crate) ports: &'static [&'static str],
}

/// An image: manifest, config and layers.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    /// The manifest as pushed.
    pub(crate) manifest: Blob,
    config: Blob,
    layers: Vec<Arc<Layer>>,
}

impl Image {
    /// Puts layers under a config.
    pub(crate) fn new(process: &Process, layers: &[&Arc<Layer>]) -> Self {
        let ports: serde_json::Map<String, Value> =
            process.ports.iter().map(|port| ((*port).to_owned(), json!({}))).collect();
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "created": CREATED,
            "config": {
                "User": process.user,
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Entrypoint": process.entrypoint,
                "Cmd": process.cmd,
                "ExposedPorts": ports,
                "WorkingDir": "/",
            },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": layers.iter().map(|_| json!({ "created": CREATED })).collect::<Vec<_>>(),
        });
        let config = Blob::new(config.to_string().into_bytes());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.descriptor(CONFIG),
            "layers": layers.iter().map(|l| l.blob.descriptor(LAYER)).collect::<Vec<_>>(),
        });
        let manifest = Blob::new(manifest.to_string().into_bytes());
        Self { manifest, config, layers: layers.iter().map(|layer| Arc::clone(layer)).collect() }
    }

    /// Everything that must be stored for the image.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = &Blob> {
        [&self.manifest, &self.config].into_iter().chain(self.layers.iter().map(|l| &l.blob))
    }

    /// Config and layers, without the manifest.
    pub(crate) fn parts(&self) -> impl Iterator<Item = &Blob> {
        self.blobs().skip(1)
    }

    /// Writes an OCI image layout whose single image carries `name`.
    pub(crate) fn write_layout(&self, dir: &Path, name: &str) -> Result<()> {
        let blobs = dir.join("blobs/sha256");
        fs::create_dir_all(&blobs).during(|| format!("create {}", blobs.display()))?;
        for blob in self.blobs() {
            let path = blobs.join(blob.digest.trim_start_matches("sha256:"));
            fs::write(&path, &blob.bytes).during(|| format!("write {}", path.display()))?;
        }
        let mut descriptor = self.manifest.descriptor(MANIFEST);
        descriptor["annotations"] = json!({
            "org.opencontainers.image.ref.name": name,
            "io.containerd.image.name": name,
        });
        let index = json!({ "schemaVersion": 2, "manifests": [descriptor] });
        for (file, text) in
            [("oci-layout", json!({ "imageLayoutVersion": "1.0.0" })), ("index.json", index)]
        {
            let path = dir.join(file);
            fs::write(&path, text.to_string()).during(|| format!("write {}", path.display()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Image {
        let mut layer = LayerBuilder::default();
        layer.dir("bin", 0o755).unwrap().file("bin/x", 0o4755, b"x").unwrap();
        layer.link("bin/y", "x").unwrap();
        Image::new(&Process::default(), &[&layer.finish().unwrap()])
    }

    #[test]
    fn the_same_inputs_give_the_same_digest() {
        assert_eq!(image().manifest.digest, image().manifest.digest);
    }

    #[test]
    fn the_manifest_names_config_and_layers_by_what_they_hold() {
        let image = image();
        let manifest: Value = serde_json::from_slice(&image.manifest.bytes).unwrap();
        for (part, named) in image.parts().zip([&manifest["config"], &manifest["layers"][0]]) {
            assert_eq!(named["digest"], digest(&part.bytes).as_str());
            assert_eq!(named["size"], part.bytes.len());
        }
    }
}
