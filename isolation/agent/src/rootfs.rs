//! Root filesystems of containers in the guest: an image on a read-only disk, and an overlay
//! whose upper layer is in the guest's memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::error::{Context, Error};

/// Directories of containers.
const CONTAINERS: &str = "/run/pinion/containers";
/// How long a disk that was plugged in may take to show up.
const DISK_LIMIT: Duration = Duration::from_secs(20);

/// The directory of a container: its bundle. Ids were checked by the caller.
pub(crate) fn directory(id: &str) -> PathBuf {
    Path::new(CONTAINERS).join(id)
}

/// Makes a container's directory and mounts its root filesystem from the disk `serial`.
pub(crate) fn mount_rootfs(id: &str, serial: &str) -> Result<(), Error> {
    let directory = directory(id);
    for name in ["image", "upper", "work", "rootfs"] {
        let path = directory.join(name);
        fs::create_dir_all(&path).context(|| format!("create {}", path.display()))?;
    }
    let device = wait_for_disk(serial)?;
    let image = directory.join("image");
    let flags = MountFlags::RDONLY | MountFlags::NODEV;
    mount(&device, &image, "ext4", flags, c"noload")
        .context(|| format!("mount {} at {}", device.display(), image.display()))?;
    copy_attributes(&image, &directory.join("upper"))?;
    let options = format!(
        "lowerdir={d}/image,upperdir={d}/upper,workdir={d}/work,index=off,metacopy=off",
        d = directory.display()
    );
    let data = std::ffi::CString::new(options).unwrap_or_default();
    let rootfs = directory.join("rootfs");
    mount("overlay", &rootfs, "overlay", MountFlags::NODEV, data.as_c_str())
        .context(|| format!("mount {}", rootfs.display()))
}

/// The merged root shows the upper directory's owner and mode, not the image's.
fn copy_attributes(from: &Path, to: &Path) -> Result<(), Error> {
    use std::os::unix::fs::{MetadataExt, chown};
    let metadata = fs::metadata(from).context(|| format!("stat {}", from.display()))?;
    chown(to, Some(metadata.uid()), Some(metadata.gid()))
        .and_then(|()| fs::set_permissions(to, metadata.permissions()))
        .context(|| format!("set attributes of {}", to.display()))
}

/// Unmounts and removes all of a container; what is not there is fine.
pub(crate) fn remove(id: &str) -> Result<(), Error> {
    let directory = directory(id);
    for name in ["rootfs", "image"] {
        let path = directory.join(name);
        match unmount(&path, UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(rustix::io::Errno::NOENT | rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error).context(|| format!("unmount {}", path.display())),
        }
    }
    match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context(|| format!("remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}

/// The block device with this serial number, once it is there.
fn wait_for_disk(serial: &str) -> Result<PathBuf, Error> {
    let began = Instant::now();
    loop {
        if let Some(device) = find_disk(serial) {
            return Ok(device);
        }
        if began.elapsed() > DISK_LIMIT {
            return Err(Error::Failed(format!("no disk {serial:?} after {DISK_LIMIT:?}")));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn find_disk(serial: &str) -> Option<PathBuf> {
    fs::read_dir("/sys/block").ok()?.flatten().find_map(|entry| {
        let found = fs::read_to_string(entry.path().join("serial")).ok()?;
        let device = Path::new("/dev").join(entry.file_name());
        (found.trim() == serial && device.exists()).then_some(device)
    })
}
