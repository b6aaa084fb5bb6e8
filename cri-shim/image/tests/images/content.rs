//! Images made for the tests: layers, configurations, manifests.

use std::io::Write;

use flate2::{Compression, write::GzEncoder};
use pinion_image::Digest;
use serde_json::{Value, json};

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// A layer as pushed, and the digest of its tar stream.
#[derive(Clone)]
pub(crate) struct Layer {
    pub(crate) blob: Vec<u8>,
    pub(crate) diff_id: Digest,
    pub(crate) media_type: String,
}

/// Entries of a layer; names ending in `/` are directories.
pub(crate) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_mtime(1_600_000_000);
        if name.ends_with('/') {
            header.set_entry_type(tar::EntryType::Directory);
        }
        header.set_size(data.len() as u64);
        builder.append_data(&mut header, name, *data).unwrap();
    }
    builder.into_inner().unwrap()
}

impl Layer {
    pub(crate) fn gzip(tar: &[u8]) -> Self {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(tar).unwrap();
        Self::new(encoder.finish().unwrap(), tar, &format!("{LAYER}+gzip"))
    }

    pub(crate) fn zstd(tar: &[u8]) -> Self {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        Self::new(ruzstd::encoding::compress_to_vec(tar, level), tar, &format!("{LAYER}+zstd"))
    }

    pub(crate) fn plain(tar: &[u8]) -> Self {
        Self::new(tar.to_vec(), tar, LAYER)
    }

    fn new(blob: Vec<u8>, tar: &[u8], media_type: &str) -> Self {
        Self { blob, diff_id: Digest::of(tar), media_type: media_type.to_owned() }
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.blob)
    }
}

/// A whole image.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) layers: Vec<Layer>,
    pub(crate) config: Vec<u8>,
    pub(crate) manifest: Vec<u8>,
    pub(crate) manifest_type: String,
}

impl Image {
    pub(crate) fn new(layers: Vec<Layer>) -> Self {
        Self::with_config(layers, &json!({}))
    }

    pub(crate) fn with_config(layers: Vec<Layer>, config: &Value) -> Self {
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id.to_string()).collect();
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = json!({
            "architecture": architecture, "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        Self::from_config(layers, &config)
    }

    pub(crate) fn from_config(layers: Vec<Layer>, config: &Value) -> Self {
        let config = config.to_string().into_bytes();
        let described: Vec<_> =
            layers.iter().map(|layer| descriptor(&layer.media_type, &layer.blob)).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &config), "layers": described,
        });
        let manifest = manifest.to_string().into_bytes();
        Self { layers, config, manifest, manifest_type: MANIFEST.to_owned() }
    }

    /// The same image in the words of Docker's schema 2.
    pub(crate) fn docker(layers: Vec<Layer>) -> Self {
        let mut image = Self::new(layers);
        let text = String::from_utf8(image.manifest).unwrap();
        image.manifest_type = "application/vnd.docker.distribution.manifest.v2+json".to_owned();
        let text = text
            .replace(MANIFEST, &image.manifest_type)
            .replace(CONFIG, "application/vnd.docker.container.image.v1+json")
            .replace(&format!("{LAYER}+gzip"), "application/vnd.docker.image.rootfs.diff.tar.gzip");
        image.manifest = text.into_bytes();
        image
    }

    /// busybox, with links for a few of its applets.
    pub(crate) fn busybox() -> Self {
        let program = std::fs::read("/bin/busybox").expect("busybox-static is installed");
        let files: &[(&str, &[u8])] =
            &[("bin/", b""), ("bin/busybox", &program), ("etc/", b""), ("etc/motd", b"hello\n")];
        let config = json!({"User": "1000:100", "Env": ["PATH=/bin"], "Cmd": ["busybox", "sh"]});
        Self::with_config(vec![Layer::gzip(&tar(files))], &config)
    }

    /// A small image whose content depends on `seed`.
    pub(crate) fn small(seed: &str) -> Self {
        let files: &[(&str, &[u8])] = &[("seed", seed.as_bytes())];
        Self::new(vec![Layer::gzip(&tar(files))])
    }

    pub(crate) fn id(&self) -> Digest {
        Digest::of(&self.config)
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    pub(crate) fn blobs(&self) -> impl Iterator<Item = &[u8]> {
        self.layers.iter().map(|layer| layer.blob.as_slice()).chain([self.config.as_slice()])
    }
}

pub(crate) fn descriptor(media_type: &str, content: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": Digest::of(content), "size": content.len()})
}

/// An index of manifests, each with `os/architecture`.
pub(crate) fn index(entries: &[(&str, &str, &[u8])]) -> Vec<u8> {
    let manifests: Vec<_> = entries
        .iter()
        .map(|(platform, media_type, content)| {
            let mut entry = descriptor(media_type, content);
            if let Some((os, architecture)) = platform.split_once('/') {
                entry["platform"] = json!({"os": os, "architecture": architecture});
            }
            entry
        })
        .collect();
    json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}).to_string().into_bytes()
}

/// Bytes that do not compress.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}
