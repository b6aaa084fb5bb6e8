//! The cgroups of pods and containers, seen from the server.

use std::path::PathBuf;

use pinion_cgroup::{Cgroup, CgroupPaths, Driver, Hierarchies, Mode};
use pinion_spec::HostFacts;

use crate::error::{Context, Result};
use crate::signals::KILL;

/// Name of the cgroup of a pod's virtual machine.
const MACHINE: &str = "pinion-machine";

/// The hierarchies of the host and who makes cgroups in them.
#[derive(Debug)]
pub(crate) struct Cgroups {
    hierarchies: Hierarchies,
    driver: Driver,
    default_parent: String,
    /// Where monitors go.
    monitors: Option<Cgroup>,
}

impl Cgroups {
    /// `default_parent`: for pods that name none; empty for `/pinion` or `pinion.slice`.
    pub(crate) fn new(hierarchies: Hierarchies, driver: Driver, default_parent: &str) -> Self {
        let default_parent = match (default_parent, driver) {
            ("", Driver::Cgroupfs) => "/pinion".to_string(),
            ("", Driver::Systemd) => "pinion.slice".to_string(),
            (named, _) => named.to_string(),
        };
        Self { hierarchies, driver, default_parent, monitors: None }
    }

    /// Makes the cgroup that monitors are moved to. Only on v2: a move costs v1 up to 20 ms
    /// in each hierarchy, during which no process of the machine can fork.
    pub(crate) fn separate_monitors(&mut self, path: &str) -> Result<()> {
        if !path.is_empty() && self.is_v2() {
            let paths = self.plan(Driver::Cgroupfs, path, "")?;
            if !directories(&paths).all(|directory| directory.exists()) {
                Cgroup::create(&self.hierarchies, &paths)
                    .context(|| format!("create cgroup {path}"))?;
            }
            self.monitors = Some(Cgroup::open(paths));
        }
        Ok(())
    }

    /// Moves a monitor out of the server's cgroup.
    pub(crate) fn adopt_monitor(&self, pid: i32) -> Result<()> {
        match &self.monitors {
            Some(group) => group.join(pid).context(|| format!("move monitor {pid}")),
            None => Ok(()),
        }
    }

    pub(crate) fn driver(&self) -> Driver {
        self.driver
    }

    /// The driver in the spec builder's words.
    pub(crate) fn spec_driver(&self) -> pinion_spec::CgroupDriver {
        match self.driver {
            Driver::Cgroupfs => pinion_spec::CgroupDriver::Cgroupfs,
            Driver::Systemd => pinion_spec::CgroupDriver::Systemd,
        }
    }

    /// What the spec builder wants to know of the host.
    pub(crate) fn host_facts(&self) -> HostFacts {
        // On a hybrid host limits go to v1 alone, whatever the v2 hierarchy beside it has.
        let hugetlb = if self.is_v2() {
            let controllers = self.hierarchies.controllers().unwrap_or_default();
            controllers.iter().any(|c| c == "hugetlb")
        } else {
            self.hierarchies.v1_root("hugetlb").is_some()
        };
        HostFacts::read(self.is_v2(), hugetlb, self.accounts_swap())
    }

    /// Whether a swap limit can be written.
    fn accounts_swap(&self) -> bool {
        match self.hierarchies.v1_root("memory") {
            Some(root) => root.join("memory.memsw.limit_in_bytes").exists(),
            // On v2 the file exists in every group but the root, where swap is accounted.
            None => self.hierarchies.v2_root().is_some_and(|root| {
                let groups = std::fs::read_dir(root).into_iter().flatten().flatten();
                groups.map(|entry| entry.path().join("memory.swap.max")).any(|file| file.exists())
            }),
        }
    }

    pub(crate) fn hierarchies(&self) -> &Hierarchies {
        &self.hierarchies
    }

    /// Whether v2 carries the controllers.
    pub(crate) fn is_v2(&self) -> bool {
        self.hierarchies.mode() == Mode::V2
    }

    /// The parent of a pod: the one it names, or one of its own below the default parent.
    pub(crate) fn parent_for(&self, asked: &str, pod: &str) -> String {
        if !asked.is_empty() {
            return asked.to_string();
        }
        match self.driver {
            Driver::Cgroupfs => format!("{}/{pod}", self.default_parent.trim_end_matches('/')),
            // The dashes of a slice's name are its path.
            Driver::Systemd => {
                format!("{}-{pod}.slice", self.default_parent.trim_end_matches(".slice"))
            }
        }
    }

    /// Makes the parent of a pod's containers if it is not there; true if it was made here.
    /// systemd makes slices by itself.
    pub(crate) fn ensure_parent(&self, parent: &str) -> Result<bool> {
        if self.driver == Driver::Systemd {
            return Ok(false);
        }
        let paths = self.parent(parent)?;
        if directories(&paths).all(|directory| directory.exists()) {
            return Ok(false);
        }
        Cgroup::create(&self.hierarchies, &paths).context(|| format!("create cgroup {parent}"))?;
        Ok(true)
    }

    /// Removes a parent that [`Self::ensure_parent`] made, unless others use it.
    pub(crate) fn remove_parent(&self, parent: &str) -> Result<()> {
        for directory in directories(&self.parent(parent)?) {
            use std::io::ErrorKind;
            match std::fs::remove_dir(directory) {
                Ok(()) => {}
                Err(e)
                    if matches!(
                        e.kind(),
                        ErrorKind::NotFound
                            | ErrorKind::ResourceBusy
                            | ErrorKind::DirectoryNotEmpty
                    ) => {}
                Err(e) => return Err(e).context(|| format!("remove {}", directory.display())),
            }
        }
        Ok(())
    }

    /// Makes the cgroup of a pod's virtual machine, beside those of containers; its
    /// directories.
    pub(crate) fn make_machine(&self, parent: &str) -> Result<Vec<PathBuf>> {
        let paths = self.machine(parent)?;
        if !directories(&paths).all(|directory| directory.exists()) {
            Cgroup::create(&self.hierarchies, &paths)
                .context(|| format!("create a machine's cgroup below {parent}"))?;
        }
        Ok(directories(&paths).cloned().collect())
    }

    /// Kills what is in a machine's cgroup, and removes it.
    pub(crate) fn remove_machine(&self, parent: &str) -> Result<()> {
        let group = Cgroup::open(self.machine(parent)?);
        let what = || format!("remove the machine's cgroup below {parent}");
        if !group.exists() {
            return Ok(());
        }
        group.kill_all(KILL).context(what)?;
        group.remove().context(what)
    }

    fn machine(&self, parent: &str) -> Result<CgroupPaths> {
        let parent = match self.driver {
            Driver::Cgroupfs => parent.trim_end_matches('/').to_string(),
            Driver::Systemd => slice_path(parent),
        };
        self.plan(Driver::Cgroupfs, &format!("{parent}/{MACHINE}"), "")
    }

    /// The cgroup a pod's containers live under.
    pub(crate) fn parent(&self, parent: &str) -> Result<CgroupPaths> {
        match self.driver {
            Driver::Cgroupfs => self.plan(Driver::Cgroupfs, parent, ""),
            // A slice is a directory like any other to those who only look at it.
            Driver::Systemd => self.plan(Driver::Cgroupfs, &slice_path(parent), ""),
        }
    }

    /// The cgroup of a container by its spec's `cgroupsPath`.
    pub(crate) fn container(&self, cgroups_path: &str, id: &str) -> Result<Cgroup> {
        Ok(Cgroup::open(self.container_paths(cgroups_path, id)?))
    }

    /// The planned directories of a container's cgroup, whether they are there or not.
    pub(crate) fn container_paths(&self, cgroups_path: &str, id: &str) -> Result<CgroupPaths> {
        self.plan(self.driver, cgroups_path, id)
    }

    fn plan(&self, driver: Driver, path: &str, id: &str) -> Result<CgroupPaths> {
        Cgroup::plan(&self.hierarchies, driver, Some(path), id)
            .context(|| format!("plan cgroup {path}"))
    }

    /// Kills every process of a container; done when it has no cgroup.
    pub(crate) fn kill(&self, cgroups_path: &str, id: &str) -> Result<()> {
        self.container(cgroups_path, id)?
            .kill_all(KILL)
            .context(|| format!("kill cgroup {cgroups_path}"))
    }

    /// The processes of a container, with those in groups below its own.
    pub(crate) fn processes(&self, cgroups_path: &str, id: &str) -> Result<Vec<i32>> {
        self.container(cgroups_path, id)?
            .pids(true)
            .context(|| format!("list the processes of cgroup {cgroups_path}"))
    }
}

/// Every directory of a cgroup, in whichever hierarchies it is.
fn directories(paths: &CgroupPaths) -> impl Iterator<Item = &PathBuf> {
    paths.unified.iter().chain(paths.v1.values())
}

/// The directory of a slice: `a-b.slice` lies in `a.slice`; see systemd.slice(5).
fn slice_path(slice: &str) -> String {
    let name = slice.trim_end_matches('/').rsplit('/').next().unwrap_or(slice);
    let stem = name.trim_end_matches(".slice");
    let mut path = String::new();
    let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
    for end in ends {
        path.push_str(&format!("/{}.slice", &stem[..end]));
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_s_name_is_its_path() {
        assert_eq!(slice_path("pinion.slice"), "/pinion.slice");
        assert_eq!(
            slice_path("kubepods-burstable-podx.slice"),
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice"
        );
        assert_eq!(slice_path("/a.slice/a-b.slice"), "/a.slice/a-b.slice");
    }
}
