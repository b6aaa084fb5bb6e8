//! The kernel out of Debian's package: an uncompressed image that boots by PVH.
//!
//! A bzImage is set-up code, then a decompressor with the compressed ELF image as payload;
//! the header says where (Documentation/arch/x86/boot.rst, protocol 2.08).

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::debian::Tree;
use crate::error::{During, Error, Result};

const SETUP_SECTORS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// The kernel of an unpacked package.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// Its release, such as `6.12.95+deb12-amd64`.
    pub(crate) release: String,
    /// The image as packaged.
    pub(crate) image: PathBuf,
    /// The directory that holds its modules.
    pub(crate) modules: PathBuf,
}

impl Kernel {
    /// Finds kernel and modules in an unpacked package.
    pub(crate) fn find(tree: &Tree) -> Result<Self> {
        let boot = tree.root.join("boot");
        let listing = fs::read_dir(&boot).during(|| format!("list {}", boot.display()))?;
        let (release, image) = listing
            .flatten()
            .find_map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                Some((name.strip_prefix("vmlinuz-")?.to_owned(), entry.path()))
            })
            .ok_or_else(|| Error::check(format!("{} holds no kernel", boot.display())))?;
        let modules = tree.find(&format!("lib/modules/{release}"))?;
        Ok(Self { release, image, modules })
    }

    /// Writes the uncompressed kernel.
    pub(crate) fn extract(&self, unpack: &Decompressor<'_>, to: &Path) -> Result<()> {
        let image = fs::read(&self.image).during(|| format!("read {}", self.image.display()))?;
        let payload = payload(&image)
            .ok_or_else(|| Error::check(format!("{} is not a bzImage", self.image.display())))?;
        let elf = unpack.decompress(payload)?;
        if !elf.starts_with(b"\x7fELF") {
            return Err(Error::check(format!("{}: no ELF image inside", self.image.display())));
        }
        fs::write(to, elf).during(|| format!("write {}", to.display()))
    }
}

/// The compressed payload of a bzImage, without the length that ends it.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
    };
    let sectors = match *image.get(SETUP_SECTORS)? {
        0 => 4,
        count => usize::from(count),
    };
    let start = (sectors + 1) * 512 + word(PAYLOAD_OFFSET)?;
    image.get(start..(start + word(PAYLOAD_LENGTH)?).checked_sub(4)?)
}

/// Decompresses by what the data says it is.
#[derive(Debug)]
pub(crate) struct Decompressor<'a> {
    /// Holds busybox, which knows xz.
    pub(crate) system: &'a Tree,
}

impl Decompressor<'_> {
    /// zstd and xz, the two that Debian uses; anything else is returned as it is.
    pub(crate) fn decompress(&self, data: &[u8]) -> Result<Vec<u8>> {
        if data.starts_with(b"\x28\xb5\x2f\xfd") {
            return unzstd(data);
        }
        if data.starts_with(b"\xfd7zXZ") {
            return self.unxz(data);
        }
        Ok(data.to_vec())
    }

    fn unxz(&self, data: &[u8]) -> Result<Vec<u8>> {
        let mut busybox: Command = self.system.command("bin/busybox")?;
        let mut child = busybox
            .args(["xz", "-dc"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .during(|| "start busybox xz".into())?;
        let mut input = child.stdin.take();
        let data = data.to_vec();
        let writer = std::thread::spawn(move || match input.as_mut() {
            Some(pipe) => pipe.write_all(&data),
            None => Ok(()),
        });
        let output = child.wait_with_output().during(|| "run busybox xz".into())?;
        let _ = writer.join();
        if output.status.success() {
            return Ok(output.stdout);
        }
        Err(Error::check(format!("busybox xz ended with {}", output.status)))
    }
}

fn unzstd(data: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let mut decoder = ruzstd::decoding::StreamingDecoder::new(data)
        .map_err(|error| Error::check(format!("zstd: {error}")))?;
    decoder.read_to_end(&mut out).during(|| "decompress zstd".into())?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_is_where_the_header_says() {
        let mut image = vec![0; 2048];
        image[SETUP_SECTORS] = 1;
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16u32.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&8u32.to_le_bytes());
        image[1040..1044].copy_from_slice(b"data");
        assert_eq!(payload(&image), Some(&b"data"[..]));
        assert_eq!(payload(&image[..600]), None);
    }
}
