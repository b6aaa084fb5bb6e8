//! Kernel modules a guest needs, and the order in which they can be loaded.
//!
//! What a module needs is in the module itself: its `.modinfo` section has `depends=a,b`. So
//! no table made by depmod has to be there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result, bad};
use crate::kernel::{Kernel, decompress};

/// A module as the guest loads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The uncompressed object.
    pub object: Vec<u8>,
}

/// The wanted modules and all they need, each after what it needs. One that is built into the
/// kernel is left out.
///
/// # Errors
/// When the kernel has a module neither as a file nor built in.
pub fn load_order(kernel: &Kernel, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    collect(&kernel.modules, &mut files)?;
    let builtin = kernel.modules.join("modules.builtin");
    let builtin = fs::read_to_string(&builtin).unwrap_or_default();
    let is_builtin = |name: &str| builtin.lines().any(|line| module_name(line) == name);
    let mut order: Vec<Module> = Vec::new();
    // A module stands on the stack a second time once what it needs is above it.
    let mut pending: Vec<(String, Option<Module>)> =
        wanted.iter().rev().map(|name| (module_name(name), None)).collect();
    while let Some((name, loaded)) = pending.pop() {
        if order.iter().any(|module| module.name == name) {
            continue;
        }
        if let Some(module) = loaded {
            order.push(module);
            continue;
        }
        let Some(path) = files.get(&name) else {
            if is_builtin(&name) {
                continue;
            }
            let (release, at) = (&kernel.release, kernel.modules.display());
            let what = format!("kernel {release} has no module {name:?} in {at}");
            return Err(Error::Missing(what));
        };
        let packed = fs::read(path).context(|| format!("read {}", path.display()))?;
        let object = decompress(&packed, path)?;
        let Some(needs) = depends(&object) else {
            return bad(path, "not a kernel module");
        };
        if pending.len() > 4096 {
            return bad(path, "its dependencies do not end");
        }
        pending.push((name.clone(), Some(Module { name, object })));
        pending.extend(needs.into_iter().rev().map(|need| (need, None)));
    }
    Ok(order)
}

/// All module files below `directory` by name.
fn collect(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries = fs::read_dir(directory).context(|| format!("list {}", directory.display()))?;
    for entry in entries {
        let entry = entry.context(|| format!("list {}", directory.display()))?;
        let (path, name) = (entry.path(), entry.file_name());
        let Some(name) = name.to_str() else { continue };
        // The links "build" and "source" lead out of the tree.
        let kind = entry.file_type().context(|| format!("stat {}", path.display()))?;
        if kind.is_dir() {
            collect(&path, files)?;
        } else if name.contains(".ko") {
            files.insert(module_name(name), path);
        }
    }
    Ok(())
}

/// `kernel/fs/ext4/ext4.ko.xz` and `ext4` alike are `ext4`; dashes are underscores.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// The names after `depends=` in the `.modinfo` section of an ELF64 object.
fn depends(object: &[u8]) -> Option<Vec<String>> {
    let text = section(object, b".modinfo")?;
    let line = text.split(|byte| *byte == 0).find_map(|line| line.strip_prefix(b"depends="))?;
    let names = std::str::from_utf8(line).ok()?.split(',').filter(|name| !name.is_empty());
    Some(names.map(module_name).collect())
}

/// A section of a little-endian ELF64 object (elf(5)).
fn section<'a>(object: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    if !object.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let half =
        |at: usize| Some(usize::from(u16::from_le_bytes(object.get(at..at + 2)?.try_into().ok()?)));
    let long = |at: usize| {
        let bytes = object.get(at..at.checked_add(8)?)?.try_into().ok()?;
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    };
    let word = |at: usize| {
        let bytes = object.get(at..at.checked_add(4)?)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes) as usize)
    };
    let (table, size, count, names) = (long(0x28)?, half(0x3a)?, half(0x3c)?, half(0x3e)?);
    let header = |index: usize| table.checked_add(index.checked_mul(size)?);
    let body = |index: usize| {
        let at = header(index)?;
        let start = long(at.checked_add(0x18)?)?;
        object.get(start..start.checked_add(long(at.checked_add(0x20)?)?)?)
    };
    let strings = body(names)?;
    (0..count).find_map(|index| {
        let rest = strings.get(word(header(index)?)?..)?;
        let end = rest.iter().position(|byte| *byte == 0)?;
        (rest.get(..end)? == name).then(|| body(index)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An object with nothing but a `.modinfo` section.
    pub(crate) fn object(depends: &str) -> Vec<u8> {
        let info = format!("license=GPL\0depends={depends}\0");
        let strings = b"\0.modinfo\0.shstrtab\0";
        let mut object = vec![0u8; 64];
        object[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let info_at = object.len();
        object.extend_from_slice(info.as_bytes());
        let strings_at = object.len();
        object.extend_from_slice(strings);
        let table = object.len();
        let mut header = |name: u32, at: usize, size: usize| {
            let mut entry = [0u8; 64];
            entry[..4].copy_from_slice(&name.to_le_bytes());
            entry[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
            entry[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
            object.extend_from_slice(&entry);
        };
        header(0, 0, 0);
        header(1, info_at, info.len());
        header(10, strings_at, strings.len());
        object[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        object[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
        object[0x3c..0x3e].copy_from_slice(&3u16.to_le_bytes());
        object[0x3e..0x40].copy_from_slice(&2u16.to_le_bytes());
        object
    }

    fn kernel(modules: &[(&str, &str)]) -> (tempfile::TempDir, Kernel) {
        let dir = tempfile::tempdir().unwrap();
        for (path, needs) in modules {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, object(needs)).unwrap();
        }
        fs::write(dir.path().join("modules.builtin"), "kernel/lib/crc16.ko\n").unwrap();
        let modules = dir.path().to_owned();
        (dir, Kernel { release: "6.1".into(), image: "/x".into(), modules })
    }

    #[test]
    fn a_module_comes_after_what_it_needs() {
        let (_dir, kernel) = kernel(&[
            ("kernel/a/virtio-net.ko", "net_failover,virtio"),
            ("kernel/b/net_failover.ko", "failover"),
            ("kernel/b/failover.ko", ""),
            ("kernel/c/virtio.ko", ""),
        ]);
        let order = load_order(&kernel, &["virtio_net", "virtio", "crc16"]).unwrap();
        let names: Vec<&str> = order.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["failover", "net_failover", "virtio", "virtio_net"]);
    }

    #[test]
    fn a_module_that_is_nowhere_is_named() {
        let (_dir, kernel) = kernel(&[("kernel/a.ko", "b")]);
        let error = load_order(&kernel, &["a"]).unwrap_err().to_string();
        assert!(error.contains("has no module \"b\""), "{error}");
    }

    #[test]
    fn modules_that_need_each_other_do_not_hang_it() {
        let (_dir, kernel) = kernel(&[("a.ko", "b"), ("b.ko", "a")]);
        assert!(load_order(&kernel, &["a"]).is_err());
    }

    proptest! {
        #[test]
        fn no_object_leads_out_of_itself(mut bytes in prop::collection::vec(any::<u8>(), 64..512)) {
            bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
            let _ = depends(&bytes);
        }
    }
}
