//! The initramfs: a static busybox, the modules that find the disks, and a script that
//! mounts the system and hands over to it.
//!
//! The handover matters: pivot_root does not work on the initramfs, so container runtimes
//! need a root that is a mount of its own.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::kernel::{Decompressor, Kernel};
use crate::error::{During, Error, Result};

/// What must be loaded before the system's own modprobe is there.
const MODULES: [&str; 7] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "crc32c_generic",
    "crc32c_intel",
    "ext4",
    "overlay",
];

const FILE: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Builds the initramfs. `modules_dep` is depmod's text table.
pub(crate) fn build(
    kernel: &Kernel,
    unpack: &Decompressor<'_>,
    modules_dep: &str,
    busybox: &Path,
) -> Result<Vec<u8>> {
    let mut archive = Cpio::default();
    for dir in ["bin", "proc", "sys", "dev", "modules", "lower", "over", "new"] {
        archive.add(dir, DIRECTORY | 0o755, (0, 0), &[]);
    }
    archive.add("dev/console", CHARACTER_DEVICE | 0o600, (5, 1), &[]);
    archive.add("dev/null", CHARACTER_DEVICE | 0o666, (1, 3), &[]);
    archive.add("init", FILE | 0o755, (0, 0), include_bytes!("../../node/initramfs-init"));
    let bytes = fs::read(busybox).during(|| format!("read {}", busybox.display()))?;
    archive.add("bin/busybox", FILE | 0o755, (0, 0), &bytes);
    let mut order = String::new();
    for path in load_order(modules_dep, &MODULES)? {
        let from = kernel.modules.join(path);
        let packed = fs::read(&from).during(|| format!("read {}", from.display()))?;
        let name = format!("modules/{}.ko", module_name(path));
        archive.add(&name, FILE | 0o644, (0, 0), &unpack.decompress(&packed)?);
        order.push_str(&format!("/{name}\n"));
    }
    archive.add("modules/order", FILE | 0o644, (0, 0), order.as_bytes());
    Ok(archive.finish())
}

/// The files of the wanted modules and of all they need, each after what it needs. Modules
/// that the table does not know are built in.
fn load_order<'a>(modules_dep: &'a str, wanted: &[&str]) -> Result<Vec<&'a str>> {
    let mut needs: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut by_name = BTreeMap::new();
    for line in modules_dep.lines() {
        let (path, rest) = line
            .split_once(':')
            .ok_or_else(|| Error::check(format!("modules.dep: not understood: {line}")))?;
        by_name.insert(module_name(path), path);
        needs.insert(path, rest.split_whitespace().collect());
    }
    let mut order = Vec::new();
    let found = wanted.iter().filter_map(|name| by_name.get(*name).copied());
    let mut pending: Vec<&str> = found.rev().collect();
    while let Some(path) = pending.pop() {
        if order.contains(&path) {
            continue;
        }
        let missing: Vec<&str> = needs
            .get(path)
            .into_iter()
            .flatten()
            .copied()
            .filter(|need| !order.contains(need))
            .collect();
        if missing.is_empty() {
            order.push(path);
        } else {
            pending.push(path);
            pending.extend(missing);
        }
    }
    Ok(order)
}

/// `kernel/fs/ext4/ext4.ko.xz` is ext4; names use underscores.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// A cpio archive in the "newc" format, the one the kernel unpacks.
#[derive(Debug, Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    fn add(&mut self, path: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(b"070701");
        for field in [self.entries, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0]
        {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "k/fs/ext4/ext4.ko.xz: k/lib/crc16.ko.xz k/fs/jbd2/jbd2.ko.xz\n\
                       k/lib/crc16.ko.xz:\nk/fs/jbd2/jbd2.ko.xz: k/lib/crc16.ko.xz\n\
                       k/drivers/virtio-blk.ko:\n";

    #[test]
    fn a_module_comes_after_all_that_it_needs() {
        let order = load_order(DEP, &["ext4", "virtio_blk", "built_in"]).unwrap();
        let names: Vec<String> = order.iter().map(|path| module_name(path)).collect();
        let at = |name: &str| names.iter().position(|have| have == name).unwrap();
        assert!(at("crc16") < at("jbd2") && at("jbd2") < at("ext4"));
        assert_eq!(names.len(), 4);
    }

    #[test]
    fn an_archive_is_a_chain_of_padded_entries() {
        let mut archive = Cpio::default();
        archive.add("a", FILE | 0o644, (0, 0), b"12345");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[54..62], b"00000005", "size of the data");
        assert_eq!(&bytes[112..117], b"12345");
    }
}
