//! The guest's kernel: found, and brought into the form a machine starts fastest.
//!
//! Distributions ship a bzImage: a compressed ELF kernel behind boot code that unpacks it.
//! A machine that starts the ELF kernel directly (PVH) skips the boot code and the unpacking;
//! where the payload lies is in the header (Documentation/arch/x86/boot.rst, protocol 2.08).

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result, bad};

const SETUP_SECTORS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const VERSION_OFFSET: usize = 0x20e;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// Largest kernel or module that is unpacked, in bytes.
const LIMIT: u64 = 512 << 20;

const ELF: &[u8] = b"\x7fELF";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
const XZ: &[u8] = b"\xfd7zXZ";

/// A kernel and its modules on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// Its release, such as `6.12.95+deb12-amd64`.
    pub release: String,
    /// A bzImage or an ELF kernel.
    pub image: PathBuf,
    /// The directory with its modules, `…/lib/modules/<release>`.
    pub modules: PathBuf,
}

impl Kernel {
    /// The kernel at `image` with its modules in `modules`; where a path is empty, the newest
    /// of the distribution's kernels below `root` (`/boot/vmlinuz-*`) that has modules.
    ///
    /// # Errors
    /// When there is none, or a path names something else.
    pub fn find(image: &Path, modules: &Path, root: &Path) -> Result<Self> {
        if image.as_os_str().is_empty() {
            return Self::installed(root);
        }
        let bytes = read(image)?;
        let release = match version(&bytes) {
            Some(release) => release,
            None if bytes.starts_with(ELF) => name_of(modules).ok_or_else(|| Error::Bad {
                path: image.to_owned(),
                reason: "an ELF kernel does not tell its release; name its modules' directory too"
                    .into(),
            })?,
            None => return bad(image, "neither a bzImage nor an ELF kernel"),
        };
        let modules = if modules.as_os_str().is_empty() {
            root.join("lib/modules").join(&release)
        } else {
            modules.to_owned()
        };
        if !modules.is_dir() {
            let what = format!("kernel {release} has no modules at {}", modules.display());
            return Err(Error::Missing(what));
        }
        Ok(Self { release, image: image.to_owned(), modules })
    }

    fn installed(root: &Path) -> Result<Self> {
        let boot = root.join("boot");
        let entries = fs::read_dir(&boot).context(|| format!("list {}", boot.display()))?;
        let mut found: Vec<Self> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let release = name.strip_prefix("vmlinuz-")?.to_owned();
                let modules = root.join("lib/modules").join(&release);
                let image = entry.path();
                modules.is_dir().then_some(Self { release, image, modules })
            })
            .collect();
        found.sort_by_key(|found| natural(&found.release));
        found.pop().ok_or_else(|| {
            Error::Missing(format!(
                "no kernel for guests: {} has no vmlinuz-* with modules; install a kernel package \
                 or name one by path",
                boot.display()
            ))
        })
    }

    /// The uncompressed ELF kernel.
    ///
    /// # Errors
    /// When the image is no bzImage, is compressed in a way not known, or is cut short.
    pub fn extract(&self) -> Result<Vec<u8>> {
        let image = read(&self.image)?;
        if image.starts_with(ELF) {
            return Ok(image);
        }
        let Some(packed) = payload(&image) else {
            return bad(&self.image, "not a bzImage, or cut short");
        };
        let elf = decompress(packed, &self.image)?;
        if elf.starts_with(ELF) { Ok(elf) } else { bad(&self.image, "holds no ELF kernel") }
    }
}

/// Numbers compare as numbers, so that 6.9 comes before 6.12.
fn natural(release: &str) -> Vec<(u64, String)> {
    let mut parts = Vec::new();
    let mut rest = release;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (number, after) = rest.split_at(digits);
        let words = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (word, after) = after.split_at(words);
        parts.push((number.parse().unwrap_or(0), word.to_owned()));
        rest = after;
    }
    parts
}

fn name_of(directory: &Path) -> Option<String> {
    Some(directory.file_name()?.to_str()?.to_owned())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).context(|| format!("read {}", path.display()))
}

fn word(image: &[u8], at: usize) -> Option<usize> {
    let bytes = image.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
}

/// The first word of the version string of a bzImage.
fn version(image: &[u8]) -> Option<String> {
    if image.get(HEADER_MAGIC..HEADER_MAGIC + 4)? != b"HdrS" {
        return None;
    }
    let offset = image.get(VERSION_OFFSET..VERSION_OFFSET + 2)?;
    let at = 0x200 + usize::from(u16::from_le_bytes(offset.try_into().ok()?));
    let text = image.get(at..(at + 128).min(image.len()))?;
    let end = text.iter().position(|byte| matches!(byte, 0 | b' '))?;
    let release = std::str::from_utf8(text.get(..end)?).ok()?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "._+-~".contains(c);
    (!release.is_empty() && release.chars().all(plain)).then(|| release.to_owned())
}

/// The compressed payload of a bzImage, without the length that ends it.
fn payload(image: &[u8]) -> Option<&[u8]> {
    if image.get(HEADER_MAGIC..HEADER_MAGIC + 4)? != b"HdrS" {
        return None;
    }
    let sectors = match *image.get(SETUP_SECTORS)? {
        0 => 4,
        count => usize::from(count),
    };
    let start = ((sectors + 1) * 512).checked_add(word(image, PAYLOAD_OFFSET)?)?;
    let end = start.checked_add(word(image, PAYLOAD_LENGTH)?)?.checked_sub(4)?;
    image.get(start..end)
}

/// Decompresses zstd and xz; what is neither is returned as it is. `path` is for messages.
///
/// # Errors
/// When the data is damaged or larger than anything a guest needs.
pub fn decompress(data: &[u8], path: &Path) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let damaged = |reason: String| Error::Bad { path: path.to_owned(), reason };
    let read = if data.starts_with(ZSTD) {
        let decoder = ruzstd::decoding::StreamingDecoder::new(data)
            .map_err(|error| damaged(format!("zstd: {error}")))?;
        decoder.take(LIMIT).read_to_end(&mut out)
    } else if data.starts_with(XZ) {
        lzma_rust2::XzReader::new(data, false).take(LIMIT).read_to_end(&mut out)
    } else {
        return Ok(data.to_vec());
    };
    let read = read.map_err(|error| damaged(format!("damaged: {error}")))?;
    if read as u64 >= LIMIT {
        return Err(damaged(format!("larger than {LIMIT} bytes")));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn image() -> Vec<u8> {
        let mut image = vec![0; 2048];
        image[SETUP_SECTORS] = 1;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[VERSION_OFFSET..VERSION_OFFSET + 2].copy_from_slice(&0x100u16.to_le_bytes());
        image[0x300..0x310].copy_from_slice(b"6.12.9-x (me) #1");
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16u32.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&8u32.to_le_bytes());
        image[1040..1044].copy_from_slice(b"data");
        image
    }

    #[test]
    fn the_payload_and_the_release_are_where_the_header_says() {
        let image = image();
        assert_eq!(payload(&image), Some(&b"data"[..]));
        assert_eq!(payload(&image[..600]), None);
        assert_eq!(version(&image).as_deref(), Some("6.12.9-x"));
    }

    #[test]
    fn releases_are_compared_number_by_number() {
        let mut releases = ["6.12.9-amd64", "6.9.1-amd64", "6.12.10-amd64", "5.10.0-30-amd64"];
        releases.sort_by_key(|release| natural(release));
        assert_eq!(releases, ["5.10.0-30-amd64", "6.9.1-amd64", "6.12.9-amd64", "6.12.10-amd64"]);
    }

    #[test]
    fn a_kernel_that_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinuz");
        fs::write(&path, b"#!/bin/sh").unwrap();
        let error = Kernel::find(&path, Path::new(""), dir.path()).unwrap_err().to_string();
        assert!(error.contains("vmlinuz: neither a bzImage nor an ELF kernel"), "{error}");
        let error = Kernel::find(Path::new(""), Path::new(""), dir.path()).unwrap_err();
        assert!(error.to_string().contains("boot"), "{error}");
    }

    #[test]
    fn damaged_data_is_an_error() {
        let path = Path::new("/x");
        assert!(decompress(b"\x28\xb5\x2f\xfdgarbage", path).is_err());
        assert!(decompress(b"\xfd7zXZ\0garbage", path).is_err());
        assert_eq!(decompress(b"plain", path).unwrap(), b"plain");
    }

    proptest! {
        #[test]
        fn no_header_leads_out_of_the_image(
            mut image in prop::collection::vec(any::<u8>(), 0..4096),
        ) {
            if image.len() > HEADER_MAGIC + 4 {
                image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
            }
            let _ = (payload(&image), version(&image));
        }
    }
}
