//! What a guest starts from: an ELF kernel, and an initramfs with the agent, the OCI runtime
//! and the modules they need. No shell, no library, nothing else.
//!
//! ```text
//!   inputs: kernel image, modules, agent, runtime ──digest──▶ <dir>/<digest>/
//!                                                               ├─ vmlinux
//!                                                               ├─ initramfs
//!                                                               └─ image.json   written last
//! ```
//!
//! The same inputs give the same bytes. An image is used only after what is on the disk was
//! compared with the digests in its `image.json`.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cpio::{Archive, CHARACTER_DEVICE, DIRECTORY, FILE};
use crate::error::{Context, Error, Result, bad};
use crate::kernel::Kernel;
use crate::modules;

/// Raised when images are made differently from the same inputs.
const REVISION: u32 = 2;

/// Modules a guest loads, in this order where they do not need each other. A kernel that has
/// one built in needs no file for it.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "virtio_rng",
    "virtio_blk",
    "virtio_net",
    "crc32c_generic",
    "ext4",
    "overlay",
    "virtiofs",
];

/// Where the agent finds its modules, and a file that names them in order.
pub const MODULES_DIR: &str = "modules";

/// What an image is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inputs {
    /// The kernel.
    pub kernel: Kernel,
    /// The agent, a static program.
    pub agent: PathBuf,
    /// The OCI runtime, a static program.
    pub runtime: PathBuf,
}

/// An image on the disk, as `image.json` describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Digest of the inputs: the image's name.
    pub id: String,
    /// Release of its kernel.
    pub release: String,
    /// SHA-256 of `vmlinux`.
    pub kernel: String,
    /// SHA-256 of `initramfs`.
    pub initramfs: String,
    /// Bytes of both.
    pub bytes: u64,
}

impl Image {
    /// Where its kernel is.
    #[must_use]
    pub fn kernel_path(&self, directory: &Path) -> PathBuf {
        directory.join(&self.id).join("vmlinux")
    }

    /// Where its initramfs is.
    #[must_use]
    pub fn initramfs_path(&self, directory: &Path) -> PathBuf {
        directory.join(&self.id).join("initramfs")
    }

    /// Compares the files with their digests.
    ///
    /// # Errors
    /// Names the file that is not what was built.
    pub fn check(&self, directory: &Path) -> Result<()> {
        let files = [
            (self.kernel_path(directory), &self.kernel),
            (self.initramfs_path(directory), &self.initramfs),
        ];
        for (path, expected) in files {
            let found = digest_of(&path)?;
            if found != *expected {
                let at = directory.join(&self.id);
                let reason = format!(
                    "is corrupt: sha256 {found}, built as {expected}; remove {} and the image is \
                     built again",
                    at.display()
                );
                return bad(path, reason);
            }
        }
        Ok(())
    }
}

/// The image of these inputs below `directory`: the one that is there, checked, or a new one.
///
/// # Errors
/// When an input is not what it should be, the image that is there is corrupt, or the disk
/// fails.
pub fn ensure(directory: &Path, inputs: &Inputs) -> Result<Image> {
    let id = identify(inputs)?;
    if let Some(image) = load(directory, &id)? {
        image.check(directory)?;
        return Ok(image);
    }
    build(directory, inputs, id)
}

/// Images below `directory`, whole ones only.
///
/// # Errors
/// When the directory cannot be read; one that is not there holds none.
pub fn list(directory: &Path) -> Result<Vec<Image>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context(|| format!("list {}", directory.display())),
    };
    let mut images = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        if let Some(image) = name.to_str().map(|id| load(directory, id)).transpose()?.flatten() {
            images.push(image);
        }
    }
    images.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(images)
}

fn load(directory: &Path, id: &str) -> Result<Option<Image>> {
    let path = directory.join(id).join("image.json");
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error).context(|| format!("read {}", path.display())),
    };
    match serde_json::from_slice::<Image>(&text) {
        Ok(image) if image.id == id => Ok(Some(image)),
        Ok(_) => bad(path, "describes another image"),
        Err(error) => bad(path, format!("not an image's description: {error}")),
    }
}

/// The digest of all that goes into an image. Modules are named by the kernel's release: a
/// package that changes them changes it.
fn identify(inputs: &Inputs) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(format!("{REVISION} {} {MODULES:?}", inputs.kernel.release));
    for path in [&inputs.kernel.image, &inputs.agent, &inputs.runtime] {
        hash.update(digest_of(path)?);
    }
    let id = hex(&hash.finalize());
    Ok(id.get(..32).unwrap_or(&id).to_owned())
}

fn build(directory: &Path, inputs: &Inputs, id: String) -> Result<Image> {
    for program in [&inputs.agent, &inputs.runtime] {
        check_static(program)?;
    }
    let kernel = inputs.kernel.extract()?;
    let initramfs = initramfs(inputs)?;
    let image = Image {
        release: inputs.kernel.release.clone(),
        kernel: hex(&Sha256::digest(&kernel)),
        initramfs: hex(&Sha256::digest(&initramfs)),
        bytes: (kernel.len() + initramfs.len()) as u64,
        id,
    };
    let at = directory.join(&image.id);
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o755);
    builder.create(&at).context(|| format!("create {}", at.display()))?;
    let description = serde_json::to_vec_pretty(&image).map_err(io::Error::from);
    let description = description.context(|| "encode image.json".into())?;
    let files: [(&str, &[u8]); 3] =
        [("vmlinux", &kernel), ("initramfs", &initramfs), ("image.json", &description)];
    for (name, bytes) in files {
        let path = at.join(name);
        pinion_sys::atomic_file::write(&path, bytes, 0o444)
            .context(|| format!("write {}", path.display()))?;
    }
    Ok(image)
}

/// Packs the initramfs.
fn initramfs(inputs: &Inputs) -> Result<Vec<u8>> {
    let read = |path: &Path| fs::read(path).context(|| format!("read {}", path.display()));
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "proc", "sys", "run", "new", MODULES_DIR] {
        archive.add(directory, DIRECTORY | 0o755, (0, 0), &[]);
    }
    archive.add("dev/console", CHARACTER_DEVICE | 0o600, (5, 1), &[]);
    archive.add("init", FILE | 0o755, (0, 0), &read(&inputs.agent)?);
    archive.add("bin/pinion", FILE | 0o755, (0, 0), &read(&inputs.runtime)?);
    let mut order = String::new();
    for module in modules::load_order(&inputs.kernel, MODULES)? {
        let name = format!("{MODULES_DIR}/{}.ko", module.name);
        archive.add(&name, FILE | 0o644, (0, 0), &module.object);
        order.push_str(&format!("/{name}\n"));
    }
    archive.add(&format!("{MODULES_DIR}/order"), FILE | 0o644, (0, 0), order.as_bytes());
    Ok(archive.finish())
}

/// Refuses a program that needs a loader: there is none in the guest.
fn check_static(program: &Path) -> Result<()> {
    let bytes = fs::read(program).context(|| format!("read {}", program.display()))?;
    let executable =
        fs::metadata(program).is_ok_and(|metadata| metadata.permissions().mode() & 0o111 != 0);
    if !bytes.starts_with(b"\x7fELF") || !executable {
        return bad(program, "not an executable program");
    }
    match interpreter(&bytes) {
        None => Ok(()),
        Some(loader) => bad(
            program,
            format!("needs the loader {loader}; a guest has none. Build it for a musl target"),
        ),
    }
}

/// The program interpreter an ELF64 program names (PT_INTERP, elf(5)).
fn interpreter(bytes: &[u8]) -> Option<String> {
    const PT_INTERP: u32 = 3;
    let long = |at: usize| {
        let bytes = bytes.get(at..at.checked_add(8)?)?.try_into().ok()?;
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    };
    let half = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let (table, size, count) = (long(0x20)?, usize::from(half(0x36)?), usize::from(half(0x38)?));
    (0..count).find_map(|index| {
        let at = table.checked_add(index.checked_mul(size)?)?;
        let kind = u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?);
        if kind != PT_INTERP {
            return None;
        }
        let start = long(at + 8)?;
        let text = bytes.get(start..start.checked_add(long(at + 32)?)?)?;
        Some(String::from_utf8_lossy(text).trim_end_matches('\0').to_owned())
    })
}

fn digest_of(path: &Path) -> Result<String> {
    let what = || format!("read {}", path.display());
    let mut file = fs::File::open(path).context(what)?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hex(&hash.finalize())),
            Ok(n) => hash.update(buffer.get(..n).unwrap_or_default()),
            Err(error) => return Err(Error::System { what: what(), source: error }),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
