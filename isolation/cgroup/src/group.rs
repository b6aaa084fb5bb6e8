//! One container's cgroup, across all hierarchies it has a directory in.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxResources};

use crate::hierarchy::Hierarchies;
use crate::path::{CgroupPaths, Driver};
use crate::resources::{self, Layout, Undo, hugepage_sizes};
use crate::stats::{Pressures, Stats, Usage};
use crate::systemd::Scope;
use crate::{Error, Result, devices, enable, file, freeze, kill};

/// A container's cgroup.
///
/// With the systemd driver a fresh cgroup is kept alive by a placeholder process until this
/// value is dropped: join the container's process to it before that.
#[derive(Debug)]
pub struct Cgroup {
    paths: CgroupPaths,
    scope: Option<Scope>,
}

impl Cgroup {
    /// Plans the directories for a container; see [`CgroupPaths::plan`]. Pure.
    pub fn plan(
        hierarchies: &Hierarchies,
        driver: Driver,
        cgroups_path: Option<&str>,
        id: &str,
    ) -> Result<CgroupPaths> {
        CgroupPaths::plan(hierarchies, driver, cgroups_path, id)
    }

    /// Makes the directories (or has systemd make the unit), with controllers enabled down
    /// the chain. A directory that exists is taken over if no process is in it; on failure
    /// what was made is removed again.
    pub fn create(hierarchies: &Hierarchies, paths: &CgroupPaths) -> Result<Self> {
        let scope = paths.unit.as_ref().map(Scope::start).transpose()?;
        let mut made = Vec::new();
        let outcome = Self::make_directories(hierarchies, paths, scope.is_some(), &mut made);
        if let Err(error) = outcome {
            for directory in made.iter().rev() {
                let _ = fs::remove_dir(directory);
            }
            if let Some(scope) = scope {
                let _ = scope.stop();
            }
            return Err(error);
        }
        Ok(Self { paths: paths.clone(), scope })
    }

    fn make_directories(
        hierarchies: &Hierarchies,
        paths: &CgroupPaths,
        by_systemd: bool,
        made: &mut Vec<PathBuf>,
    ) -> Result<()> {
        if let (Some(root), Some(leaf)) = (hierarchies.v2_root(), &paths.unified)
            && enable::create_v2(root, leaf)?
        {
            made.push(leaf.clone());
        }
        for (controller, leaf) in &paths.v1 {
            let Some(root) = hierarchies.v1_root(controller) else {
                continue;
            };
            if enable::create_v1(&root, leaf, controller)? {
                made.push(leaf.clone());
            }
        }
        if by_systemd {
            return Ok(()); // our placeholder is in it
        }
        for directory in paths.directories() {
            if !made.iter().any(|path| path == directory)
                && !kill::pids_of(directory, false)?.is_empty()
            {
                return Err(Error::Occupied { path: directory.to_owned() });
            }
        }
        Ok(())
    }

    /// A cgroup that exists, from a container's state. Touches nothing.
    #[must_use]
    pub fn open(paths: CgroupPaths) -> Self {
        Self { paths, scope: None }
    }

    /// Where it is.
    #[must_use]
    pub fn paths(&self) -> &CgroupPaths {
        &self.paths
    }

    /// Its directory in the v2 hierarchy: for `CLONE_INTO_CGROUP`, `memory.events` and the
    /// like. On a hybrid host this one carries no controllers.
    #[must_use]
    pub fn v2_dir(&self) -> Option<&Path> {
        self.paths.unified.as_deref()
    }

    /// Whether any of its directories exists.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.paths.directories().iter().any(|directory| directory.is_dir())
    }

    /// Moves a process into the cgroup, in every hierarchy.
    ///
    /// On v1 the kernel may wait for a grace period (7 to 22 ms per hierarchy): a child of
    /// ours had better call [`Self::join_self`].
    pub fn join(&self, pid: i32) -> Result<()> {
        self.join_each(&pid.to_string(), "cgroup.procs")
    }

    /// Moves the calling process into the cgroup, in every hierarchy. To be called while the
    /// process has one thread: on v1 it moves the calling thread, which is far cheaper.
    pub fn join_self(&self) -> Result<()> {
        self.join_each("0", "tasks")
    }

    /// [`Self::join_self`] for a child started in the v2 cgroup by `CLONE_INTO_CGROUP`.
    pub fn join_self_v1(&self) -> Result<()> {
        for directory in self.paths.directories() {
            if self.v2_dir() != Some(directory) {
                file::write(&directory.join("tasks"), "0")?;
            }
        }
        Ok(())
    }

    fn join_each(&self, pid: &str, v1_file: &str) -> Result<()> {
        for directory in self.paths.directories() {
            let name = if self.v2_dir() == Some(directory) { "cgroup.procs" } else { v1_file };
            file::write(&directory.join(name), pid)?;
        }
        Ok(())
    }

    /// Puts limits and device rules in force on a new cgroup. Device rules are those of
    /// `resources` followed by [`crate::default_device_rules`]; everything else is denied.
    pub fn apply(&self, resources: &LinuxResources) -> Result<()> {
        self.set(resources, None)?;
        self.set_devices(resources.devices().as_deref().unwrap_or_default())
    }

    /// Changes limits of a running container. Devices are left alone unless `resources`
    /// names some. When a value is refused the ones before it are put back.
    pub fn update(&self, resources: &LinuxResources) -> Result<()> {
        let mut undo = Undo::new();
        let outcome = self.set(resources, Some(&mut undo)).and_then(|()| {
            match resources.devices().as_deref() {
                None | Some([]) => Ok(()),
                Some(rules) => self.set_devices(rules),
            }
        });
        outcome.inspect_err(|_error| resources::roll_back(undo))
    }

    fn set(&self, resources: &LinuxResources, undo: Option<&mut Undo>) -> Result<()> {
        let sizes = match resources.hugepage_limits() {
            Some(limits) if !limits.is_empty() => hugepage_sizes(),
            _ => Vec::new(),
        };
        let layout = if self.paths.is_v2() { Layout::V2 } else { Layout::V1 };
        let on_v1 = |controller: &str| self.paths.v1.contains_key(controller);
        let writes = resources::writes(resources, &sizes, layout, on_v1)?;
        self.check_usage(resources)?;
        if let Some(unit) = &self.paths.unit {
            crate::systemd::set_resources(unit, resources, self.paths.is_v2())?;
        }
        resources::carry_out(&writes, |controller| self.directory(controller), undo)
    }

    /// The directory that carries a controller, if any does, and whether it is a v2 one. On
    /// a hybrid host what is not mounted on v1 may be found on v2.
    fn place(&self, controller: &str) -> Option<(&Path, bool)> {
        match self.paths.v1.get(controller) {
            Some(path) => Some((path, false)),
            None => self.v2_dir().map(|path| (path, true)),
        }
    }

    fn directory(&self, controller: &str) -> Option<&Path> {
        self.place(controller).map(|(path, _)| path)
    }

    /// `checkBeforeUpdate`: on v2 the kernel would accept a limit below the usage and kill.
    fn check_usage(&self, resources: &LinuxResources) -> Result<()> {
        let Some(memory) = resources.memory() else {
            return Ok(());
        };
        let (Some(limit @ 1..), Some(true), Some((directory, true))) =
            (memory.limit(), memory.check_before_update(), self.place("memory"))
        else {
            return Ok(());
        };
        let usage = file::number(&directory.join("memory.current"))?.unwrap_or(0);
        if usage > limit as u64 {
            return Err(Error::Invalid {
                field: "linux.resources.memory.limit",
                reason: format!("{limit} is below the current usage of {usage}"),
            });
        }
        Ok(())
    }

    /// Puts `rules` followed by [`crate::default_device_rules`] in force, atomically.
    pub fn set_devices(&self, rules: &[LinuxDeviceCgroup]) -> Result<()> {
        let mut all = rules.to_vec();
        all.extend(devices::default_device_rules());
        match self.place("devices") {
            Some((directory, true)) => devices::set_v2(directory, &all),
            Some((directory, false)) => devices::set_v1(directory, &all),
            None => Err(Error::ControllerMissing {
                controller: "devices".to_owned(),
                file: "devices.deny".to_owned(),
                value: "a *:* rwm".to_owned(),
            }),
        }
    }

    /// The processes in the cgroup, with `recursive` also those in cgroups below it. None
    /// when the cgroup is gone.
    pub fn pids(&self, recursive: bool) -> Result<Vec<i32>> {
        match self.processes_dir() {
            Some(directory) => kill::pids_of(directory, recursive),
            None => Ok(Vec::new()),
        }
    }

    /// The directory that lists the processes most reliably.
    fn processes_dir(&self) -> Option<&Path> {
        if self.paths.is_v2() {
            return self.v2_dir();
        }
        let named = ["devices", "pids", "freezer"].iter().find_map(|name| self.paths.v1.get(*name));
        named.map(PathBuf::as_path).or_else(|| self.paths.directories().first().copied())
    }

    /// Stops all processes and returns once they are stopped.
    pub fn freeze(&self) -> Result<()> {
        let (directory, v2) = self.freezer()?;
        freeze::set(directory, v2, true)
    }

    /// Lets all processes run again.
    pub fn thaw(&self) -> Result<()> {
        let (directory, v2) = self.freezer()?;
        freeze::set(directory, v2, false)
    }

    /// Whether all processes are stopped.
    pub fn is_frozen(&self) -> Result<bool> {
        let (directory, v2) = self.freezer()?;
        freeze::is_frozen(directory, v2)
    }

    fn freezer(&self) -> Result<(&Path, bool)> {
        self.place("freezer").ok_or_else(|| Error::ControllerMissing {
            controller: "freezer".to_owned(),
            file: "freezer.state".to_owned(),
            value: "FROZEN".to_owned(),
        })
    }

    /// Sends `signal` to every process in the cgroup and below. `SIGKILL` leaves none alive:
    /// by `cgroup.kill` where the kernel has it, otherwise frozen, killed and thawed until
    /// nothing is left to kill. A cgroup that is gone is no error.
    pub fn kill_all(&self, signal: i32) -> Result<()> {
        let Some(directory) = self.processes_dir() else {
            return Ok(());
        };
        let killer = self.v2_dir().filter(|_| self.paths.is_v2());
        let freezer = self.place("freezer").filter(|(path, _)| path.is_dir());
        kill::all(directory, killer, freezer, signal)
    }

    /// Removes the directories, those below first, waiting a little for dying processes;
    /// with systemd, the unit too. What is already gone is no error.
    pub fn remove(&self) -> Result<()> {
        let mut first_error = None;
        if let Some(unit) = &self.paths.unit
            && let Err(error) = crate::systemd::stop(unit)
        {
            first_error = Some(error);
        }
        // Every directory is tried, whatever happened to the ones before.
        for directory in self.paths.directories() {
            if let Err(error) = kill::remove_tree(directory) {
                first_error.get_or_insert(error);
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// Everything the controllers count.
    pub fn stats(&self) -> Result<Stats> {
        if self.paths.is_v2() {
            self.v2_dir().map_or_else(|| Err(Error::NoHierarchy), crate::stats::read_v2)
        } else {
            crate::stats::read_v1(&self.v1_dirs(), self.v2_dir())
        }
    }

    /// The few numbers a node agent polls, in as few reads as possible.
    pub fn usage(&self) -> Result<Usage> {
        if self.paths.is_v2() {
            self.v2_dir().map_or_else(|| Err(Error::NoHierarchy), Usage::read_v2)
        } else {
            Usage::read_v1(&self.v1_dirs())
        }
    }

    /// Pressure stall information; nothing on cgroup v1, which has none.
    pub fn pressures(&self) -> Result<Pressures> {
        match self.v2_dir() {
            Some(directory) if self.paths.is_v2() => Pressures::read(directory),
            _ => Ok(Pressures::default()),
        }
    }

    fn v1_dirs(&self) -> BTreeMap<&str, &Path> {
        self.paths.v1.iter().map(|(name, path)| (name.as_str(), path.as_path())).collect()
    }

    /// How often the kernel killed a process of this cgroup for want of memory. Zero when
    /// the cgroup is gone or memory is not controlled.
    pub fn oom_kill_count(&self) -> Result<u64> {
        let Some((directory, v2)) = self.place("memory") else {
            return Ok(0);
        };
        let name = if v2 { "memory.events" } else { "memory.oom_control" };
        let text = file::read_if_present(&directory.join(name))?.unwrap_or_default();
        Ok(crate::stats::value_of(&text, "oom_kill").unwrap_or(0))
    }

    /// Ends the placeholder process, once a process of the container is in the cgroup.
    /// Dropping the value does the same.
    pub fn settle(&mut self) {
        self.scope = None;
    }
}
