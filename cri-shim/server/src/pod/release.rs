//! Giving back what a pod or container holds.
//!
//! Every step is idempotent: what is gone already counts as given back. Things are released
//! in the reverse of the order they were taken. A failing step does not keep the others from
//! running, with one exception: what a living process may still use (its root filesystem,
//! its hugepages) is kept while the process cannot be ended.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::contract::{heal, hugepages, settings};
use crate::error::{Context, Error, Kind, Result};
use crate::monitor::{self, Client};
use crate::node::Node;
use crate::record::{Holding, Sandbox};
use crate::services::blocking;

use super::volumes;

/// How long a creation that was interrupted may go on in the monitor.
const CREATE_LIMIT: Duration = Duration::from_secs(15);

/// What releasing needs to know.
#[derive(Debug, Clone)]
pub(crate) struct Release {
    pub(crate) node: Arc<Node>,
    pub(crate) sandbox: Sandbox,
    pub(crate) monitor: Option<Client>,
    /// The caller forgets a container's layers in the transaction that forgets the container.
    pub(crate) forgets_layers: bool,
}

impl Holding {
    /// Whether a stopped pod keeps it until it is removed.
    pub(crate) fn outlives_stop(&self) -> bool {
        match self {
            Self::PodDirectory
            | Self::PodCgroup { .. }
            | Self::ContainerDirectory { .. }
            | Self::Rootfs { .. } => true,
            Self::Namespaces
            | Self::Shm
            | Self::Network
            | Self::Machine { .. }
            | Self::Monitor
            | Self::ImageVolume { .. }
            | Self::Hugepages { .. }
            | Self::Settings { .. }
            | Self::Cpus { .. }
            | Self::Devices { .. }
            | Self::RuntimeContainer { .. } => false,
        }
    }
}

/// Releases those of `holdings` that `which` chooses; what is left, and the first error.
pub(crate) async fn all(
    release: &Release,
    holdings: Vec<Holding>,
    which: fn(&Holding) -> bool,
) -> (Vec<Holding>, Result<()>) {
    let mut left = Vec::new();
    let mut outcome = Ok(());
    let mut processes_left = false;
    for holding in holdings.into_iter().rev() {
        let in_use = processes_left && !matches!(holding, Holding::Network | Holding::Monitor);
        if !which(&holding) || in_use {
            left.push(holding);
            continue;
        }
        if let Err(error) = one(release, &holding).await {
            processes_left |= matches!(holding, Holding::RuntimeContainer { .. });
            left.push(holding);
            outcome = outcome.and(Err(error));
        }
    }
    left.reverse();
    (left, outcome)
}

async fn one(release: &Release, holding: &Holding) -> Result<()> {
    let node = &release.node;
    let directory = node.paths.pod(&release.sandbox.id);
    match holding {
        Holding::PodDirectory => {
            if let Ok(mut known) = node.foreign_changes.lock() {
                known.remove(&release.sandbox.id);
            }
            let path = directory.path().to_path_buf();
            blocking(move || remove_tree(&path)).await
        }
        Holding::PodCgroup { parent } => {
            let (node, parent) = (node.clone(), parent.clone());
            blocking(move || node.cgroups.remove_parent(&parent)).await
        }
        Holding::Namespaces => {
            let path = directory.namespaces();
            blocking(move || {
                pinion_network::namespaces::remove(&path)
                    .context(|| format!("release namespaces in {}", path.display()))
            })
            .await
        }
        Holding::Shm => {
            let path = directory.shm();
            blocking(move || unmount(&path)).await
        }
        Holding::Network => super::network::del(node, &release.sandbox).await,
        Holding::Machine { parent } => {
            let (node, parent) = (node.clone(), parent.clone());
            blocking(move || node.cgroups.remove_machine(&parent)).await
        }
        Holding::Monitor => end_monitor(release, directory.path()).await,
        Holding::ContainerDirectory { container } => {
            let path = directory.container(container).path().to_path_buf();
            blocking(move || remove_tree(&path)).await
        }
        Holding::Rootfs { container } => {
            let (node, container) = (node.clone(), container.clone());
            let target = directory.container(&container).rootfs();
            let forgets_layers = release.forgets_layers;
            blocking(move || {
                let images = &node.images;
                let removed = match forgets_layers {
                    true => images.unmount_rootfs(&container, &target),
                    false => images.remove_rootfs(&container, &target),
                };
                removed.context(|| format!("remove root filesystem of {container}"))
            })
            .await
        }
        Holding::ImageVolume { container, mount } => {
            let (node, container, mount) = (node.clone(), container.clone(), *mount);
            let target = directory.container(&container).volume(mount);
            blocking(move || volumes::remove(&node, &container, mount, &target)).await
        }
        Holding::Hugepages { container } => hugepages::release(node, container).await,
        Holding::Settings { container } => settings::release(node, container).await,
        Holding::Cpus { container, .. } => {
            node.cpus.release(container);
            Ok(())
        }
        Holding::Devices { container, bindings } => {
            crate::contract::devices::release(node, container, bindings).await
        }
        Holding::RuntimeContainer { container } => {
            delete(release, container).await?;
            heal::give_back(node, container).await
        }
    }
}

/// Deletes a container from the runtime, through the monitor that is its parent, or without
/// it when there is none or it does not know the container.
async fn delete(release: &Release, container: &str) -> Result<()> {
    let Some(monitor) = &release.monitor else {
        return release.node.programs.delete(container).await;
    };
    let began = Instant::now();
    loop {
        match monitor.delete(container).await {
            Ok(()) => return Ok(()),
            Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Unavailable | Kind::Timeout) => {
                return release.node.programs.delete(container).await;
            }
            // The monitor may still be creating it for a server that has ended since.
            Err(e) if e.kind() == Kind::Invalid && began.elapsed() < CREATE_LIMIT => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(e) => {
                let message = format!("delete container {container}");
                return Err(Error::new(e.kind(), message).caused_by(e));
            }
        }
    }
}

async fn end_monitor(release: &Release, directory: &Path) -> Result<()> {
    if let Some(monitor) = &release.monitor {
        match monitor.shutdown().await {
            // It may close the connection before its answer is read.
            Ok(()) => {}
            Err(e) if e.kind() == Kind::Unavailable => {}
            Err(e) => {
                tracing::warn!(error = %e.chain(), "the monitor did not shut down, killing it");
            }
        }
    }
    monitor::end(directory).await
}

/// Unmounts a path of ours if it is a mount point.
pub(crate) fn unmount(path: &Path) -> Result<()> {
    use rustix::io::Errno;
    use rustix::mount::{UnmountFlags, unmount};
    match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // EINVAL: not a mount point.
        Ok(()) | Err(Errno::NOENT | Errno::INVAL) => Ok(()),
        Err(e) => Err(e).context(|| format!("unmount {}", path.display())),
    }
}

/// Removes a directory of ours and all below it. Nothing may be mounted there any more: a
/// mount point that is left makes the removal fail instead of emptying what is mounted.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    let what = || format!("remove {}", path.display());
    refuse_mounts_below(path)?;
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).context(what),
    }
}

fn refuse_mounts_below(path: &Path) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo")
        .context(|| "read /proc/self/mountinfo".to_string())?;
    // Our own paths have no characters that the table escapes.
    let below = |point: &&str| Path::new(point).starts_with(path);
    match table.lines().filter_map(|line| line.split(' ').nth(4)).find(below) {
        None => Ok(()),
        Some(point) => {
            Err(Error::internal(format!("remove {}: {point} is still mounted", path.display())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removing_what_is_not_there_is_done() {
        let dir = tempfile::tempdir().unwrap();
        remove_tree(&dir.path().join("gone")).unwrap();
        unmount(&dir.path().join("gone")).unwrap();
        unmount(dir.path()).unwrap();
    }

    #[test]
    fn a_tree_is_removed_without_following_links_out_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, outside) = (dir.path().join("tree"), dir.path().join("outside"));
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "x").unwrap();
        std::os::unix::fs::symlink(&outside, tree.join("a/link")).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        assert!(outside.join("kept").exists());
    }

    #[test]
    fn what_is_mounted_below_is_not_emptied() {
        assert!(refuse_mounts_below(Path::new("/proc")).is_err());
    }

    #[test]
    fn a_stopped_pod_keeps_its_files_and_nothing_that_costs() {
        assert!(Holding::PodDirectory.outlives_stop());
        assert!(!Holding::Network.outlives_stop());
        assert!(!Holding::Hugepages { container: "c".into() }.outlives_stop());
    }
}
