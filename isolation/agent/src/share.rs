//! Files of the host, served by virtiofs: a directory with one name for each thing lent.
//!
//! A directory lent is a filesystem of its own, which the kernel mounts when somebody walks
//! into it, and which is unmounted when its container is gone: only then does the host's side
//! let go of the files.

use std::fs;
use std::path::Path;

use pinion_monitor_proto::message::Share;
use rustix::mount::{MountFlags, UnmountFlags, unmount};

use crate::error::{Context, Error};

/// Where they are; configurations name paths below it.
const SHARE: &str = "/run/pinion/share";

/// Mounts what is shared.
pub(crate) fn mount() -> Result<(), Error> {
    fs::create_dir_all(SHARE).context(|| format!("create {SHARE}"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount("share", SHARE, "virtiofs", flags, c"")
        .context(|| format!("mount virtiofs at {SHARE}"))
}

/// Walks into what was lent, so that it is mounted before anything is bound from it.
pub(crate) fn enter(shares: &[Share]) -> Result<(), Error> {
    for share in shares {
        let path = Path::new(SHARE).join(plain(&share.name)?);
        let metadata = fs::metadata(&path).context(|| format!("look at {}", path.display()))?;
        if metadata.is_dir() {
            drop(fs::read_dir(&path).context(|| format!("enter {}", path.display()))?);
        }
    }
    Ok(())
}

/// Unmounts what was lent to a container, so that the host gets it back.
pub(crate) fn leave(container: &str) {
    let ours = format!("{SHARE}/{container}-");
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    for point in points.filter(|point| point.starts_with(&ours)) {
        // Those below go with it, and one that is in use goes when it is not.
        unmount(point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).ok();
    }
}

fn plain(name: &str) -> Result<&str, Error> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if !name.is_empty() && name.chars().all(good) {
        Ok(name)
    } else {
        Err(Error::Invalid(format!("bad name of a share {name:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_paths_are_refused() {
        for name in ["", ".", "..", "a/b", "a\0"] {
            assert!(plain(name).is_err(), "{name:?}");
        }
        assert_eq!(plain("c1-0").unwrap(), "c1-0");
    }
}
