//! The images in a registry on loopback: Debian's `docker-registry` over a storage
//! directory that we lay out ourselves, and the mirror files that lead clients to it.
//!
//! ```text
//! docker/registry/v2/blobs/sha256/ab/ab…/data
//! docker/registry/v2/repositories/NAME/_layers/sha256/ab…/link
//! docker/registry/v2/repositories/NAME/_manifests/revisions/sha256/ab…/link
//! docker/registry/v2/repositories/NAME/_manifests/tags/TAG/current/link
//! docker/registry/v2/repositories/NAME/_manifests/tags/TAG/index/sha256/ab…/link
//! ```

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::catalogue::Named;
use super::{Blob, Image};
use crate::error::{During, Error, Result};

/// Hosts whose images are ours to serve.
const MIRRORED: [&str; 5] =
    ["registry.k8s.io", "k8s.gcr.io", "gcr.io", "public.ecr.aws", "docker.io"];

/// Lays images out as a registry's storage below `dir`.
pub(crate) fn write_storage(dir: &Path, images: &[Named]) -> Result<()> {
    let base = dir.join("docker/registry/v2");
    for named in images {
        for blob in named.image.blobs() {
            put(&blob_path(&base, blob), &blob.bytes)?;
        }
        for reference in &named.references {
            let (_, path) = reference.split_once('/').unwrap_or(("", reference));
            let (name, tag) = path.rsplit_once(':').unwrap_or((path, "latest"));
            link_image(&base.join("repositories").join(name), tag, &named.image)?;
        }
    }
    Ok(())
}

/// Where the registry keeps a blob; for tests that damage it.
pub(crate) fn blob_path(base: &Path, blob: &Blob) -> PathBuf {
    let hex = blob.digest.trim_start_matches("sha256:");
    base.join("blobs/sha256").join(&hex[..2]).join(hex).join("data")
}

fn link_image(repository: &Path, tag: &str, image: &Image) -> Result<()> {
    let link = |dir: PathBuf, blob: &Blob| put(&dir.join("link"), blob.digest.as_bytes());
    let hex = |blob: &Blob| blob.digest.trim_start_matches("sha256:").to_owned();
    for blob in image.parts() {
        link(repository.join("_layers/sha256").join(hex(blob)), blob)?;
    }
    let manifests = repository.join("_manifests");
    let manifest = &image.manifest;
    link(manifests.join("revisions/sha256").join(hex(manifest)), manifest)?;
    let tag = manifests.join("tags").join(tag);
    link(tag.join("index/sha256").join(hex(manifest)), manifest)?;
    link(tag.join("current"), manifest)
}

fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).during(|| format!("create {}", dir.display()))?;
    }
    fs::write(path, bytes).during(|| format!("write {}", path.display()))
}

/// A running registry; it ends with this value.
#[derive(Debug)]
pub(crate) struct Registry {
    process: Child,
    /// Where it listens, on loopback.
    pub(crate) address: SocketAddr,
}

impl Registry {
    /// Starts a registry over a storage directory. `program` runs docker-registry;
    /// `scratch` takes its configuration and log.
    pub(crate) fn start(mut program: Command, storage: &Path, scratch: &Path) -> Result<Self> {
        let address = free_address()?;
        let config = scratch.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  \
             cache: {{blobdescriptor: inmemory}}\nhttp: {{addr: \"{address}\"}}\n",
            storage.display()
        );
        fs::write(&config, text).during(|| format!("write {}", config.display()))?;
        let log = scratch.join("registry.log");
        let output = fs::File::create(&log).during(|| format!("create {}", log.display()))?;
        let errors = output.try_clone().during(|| "duplicate a descriptor".into())?;
        let process = program
            .arg("serve")
            .arg(&config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .during(|| "start docker-registry".into())?;
        let mut registry = Self { process, address };
        registry.wait_listening(&log)?;
        Ok(registry)
    }

    fn wait_listening(&mut self, log: &Path) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(self.address).is_err() {
            let ended = self.process.try_wait().during(|| "wait for docker-registry".into())?;
            if ended.is_some() || Instant::now() > deadline {
                let said = fs::read_to_string(log).unwrap_or_default();
                return Err(Error::check(format!("docker-registry does not listen: {said}")));
            }
            std::thread::sleep(Duration::from_millis(30));
        }
        Ok(())
    }

    /// Writes `HOST/hosts.toml` files that send every mirrored host here.
    pub(crate) fn write_mirrors(&self, dir: &Path) -> Result<()> {
        MIRRORED.into_iter().try_for_each(|host| self.write_mirror(dir, host))
    }

    /// Writes the `hosts.toml` that sends one host here.
    pub(crate) fn write_mirror(&self, dir: &Path, host: &str) -> Result<()> {
        let text = format!(
            "server = \"http://{0}\"\n\n[host.\"http://{0}\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
            self.address
        );
        put(&dir.join(host).join("hosts.toml"), text.as_bytes())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A loopback address nobody listens on now.
pub(crate) fn free_address() -> Result<SocketAddr> {
    TcpListener::bind(("127.0.0.1", 0))
        .and_then(|listener| listener.local_addr())
        .during(|| "bind a loopback port".into())
}
