//! What a node boots from, fetched and built once and kept in the cache.

use std::fs;
use std::path::PathBuf;

use super::kernel::{Decompressor, Kernel};
use super::{disk, initramfs};
use crate::assets;
use crate::cache::{self, Cache};
use crate::debian::{Archive, Spec, Tree};
use crate::error::{During, Result};

/// Raised when the contents of the disk or the initramfs are made differently.
const REVISION: u32 = 1;
const KERNEL_META: &str = "linux-image-amd64";

const QEMU: Spec<'static> = Spec {
    name: "qemu",
    packages: &["qemu-system-x86", "seabios"],
    // 10.0; bookworm's own 7.2 makes this kernel panic with eight CPUs
    backports: true,
    next: false,
    closure: true,
    without: &["adduser", "passwd", "debconf", "perl"],
};

const VIRTIOFSD: Spec<'static> = Spec {
    name: "virtiofsd",
    packages: &["virtiofsd"],
    backports: false,
    // bookworm has the older one in C only, with other options
    next: true,
    closure: true,
    // Only for users other than root.
    without: &["debconf", "uidmap", "libsubid", "libpam", "libselinux", "libsemanage", "libsepol"],
};

const STATIC_BUSYBOX: Spec<'static> = Spec {
    name: "busybox-static",
    packages: &["busybox-static"],
    backports: false,
    next: false,
    closure: false,
    without: &[],
};

/// Emulator, kernel, initramfs and system disk.
#[derive(Debug)]
pub(crate) struct Parts {
    /// The emulator's tree.
    pub(crate) qemu: Tree,
    /// The uncompressed kernel.
    pub(crate) kernel: PathBuf,
    /// The initramfs.
    pub(crate) initramfs: PathBuf,
    /// The system disk.
    pub(crate) disk: PathBuf,
    /// A static busybox.
    pub(crate) busybox: PathBuf,
}

impl Parts {
    /// Fetches and builds what is not in the cache.
    pub(crate) fn fetch(cache: &Cache) -> Result<Self> {
        let archive = Archive::new(cache);
        let qemu = archive.tree(&QEMU)?;
        let system = archive.tree(&assets::SYSTEM)?;
        let busybox = archive.tree(&STATIC_BUSYBOX)?.find("bin/busybox")?;
        let kernel_tree = kernel_tree(cache, &archive)?;
        let kernel = Kernel::find(&kernel_tree)?;
        let scripts = [
            include_str!("../../node/initramfs-init"),
            include_str!("../../node/node-init"),
            include_str!("../../node/node-run"),
            include_str!("../../node/node.target"),
            include_str!("../../node/node.service"),
        ];
        let key = format!(
            "{REVISION} {} {:?} {}",
            kernel.release,
            assets::SYSTEM,
            crate::image::digest(scripts.concat().as_bytes())
        );
        let dir = cache.entry("node", &key, |dir| {
            eprintln!("building the node's disks for kernel {}", kernel.release);
            let unpack = Decompressor { system: &system };
            kernel.extract(&unpack, &dir.join("vmlinux"))?;
            let staging = dir.join("staging");
            disk::stage_system(&system, &kernel, &staging)?;
            let table = staging.join("lib/modules").join(&kernel.release).join("modules.dep");
            let table =
                fs::read_to_string(&table).during(|| format!("read {}", table.display()))?;
            let image = initramfs::build(&kernel, &unpack, &table, &busybox)?;
            let path = dir.join("initramfs");
            fs::write(&path, image).during(|| format!("write {}", path.display()))?;
            disk::make_ext4(&staging, &dir.join("system.ext4"))?;
            cache::remove_tree(&staging)
        })?;
        Ok(Self {
            qemu,
            kernel: dir.join("vmlinux"),
            initramfs: dir.join("initramfs"),
            disk: dir.join("system.ext4"),
            busybox,
        })
    }
}

/// What guests of microVM pods are made of: the same emulator and kernel package.
#[derive(Debug)]
pub(crate) struct GuestParts {
    /// The emulator's tree.
    pub(crate) qemu: Tree,
    /// The kernel as packaged, a bzImage.
    pub(crate) kernel: PathBuf,
    /// Its modules.
    pub(crate) modules: PathBuf,
    /// virtiofsd.
    pub(crate) virtiofsd: Tree,
}

/// Fetches what is not in the cache.
pub(crate) fn guest_parts(cache: &Cache) -> Result<GuestParts> {
    let archive = Archive::new(cache);
    let kernel = Kernel::find(&kernel_tree(cache, &archive)?)?;
    Ok(GuestParts {
        qemu: archive.tree(&QEMU)?,
        kernel: kernel.image,
        modules: kernel.modules,
        virtiofsd: archive.tree(&VIRTIOFSD)?,
    })
}

/// The kernel's package. Its name carries the version, so it is looked up once and kept.
fn kernel_tree(cache: &Cache, archive: &Archive<'_>) -> Result<Tree> {
    let name_file = cache.path("debian/kernel-package");
    let package = match fs::read_to_string(&name_file) {
        Ok(name) => name,
        Err(_) => {
            let name = archive.first_dependency(KERNEL_META)?;
            fs::write(&name_file, &name).during(|| format!("write {}", name_file.display()))?;
            name
        }
    };
    archive.tree(&Spec {
        name: "kernel",
        packages: &[package.as_str()],
        backports: false,
        next: false,
        closure: false,
        without: &[],
    })
}
