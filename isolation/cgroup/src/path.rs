//! From the spec's `cgroupsPath` to directories.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::hierarchy::{Hierarchies, Mode, Mount};
use crate::{Error, Result};

/// Who creates the cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// We do, with `mkdir`.
    Cgroupfs,
    /// systemd does, as a transient unit with `Delegate=yes`.
    Systemd,
}

/// The systemd unit a cgroup belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    /// `prefix-name.scope`, or a slice.
    pub name: String,
    /// The slice it is placed in.
    pub slice: String,
}

/// Where a container's cgroup is, in every hierarchy. Kept in the container's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupPaths {
    /// Who creates it.
    pub driver: Driver,
    /// The directory in the v2 hierarchy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unified: Option<PathBuf>,
    /// The directory of each v1 controller (`name=...` hierarchies included).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub v1: BTreeMap<String, PathBuf>,
    /// The unit, with the systemd driver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<Unit>,
}

impl CgroupPaths {
    /// Plans the directories for a container. Pure.
    ///
    /// `cgroups_path` is the spec's: with cgroupfs a path, absolute from the hierarchy's root
    /// or relative to our own cgroup (on v2: to its parent, since a cgroup with processes
    /// cannot have controlled children); with systemd `slice:prefix:name`. Without one the
    /// container's id is used.
    pub fn plan(
        hierarchies: &Hierarchies,
        driver: Driver,
        cgroups_path: Option<&str>,
        id: &str,
    ) -> Result<Self> {
        let asked = cgroups_path.filter(|path| !path.is_empty());
        let (place, unit) = match driver {
            Driver::Cgroupfs => (cgroupfs_place(asked, id)?, None),
            Driver::Systemd => {
                let unit = systemd_unit(asked, id)?;
                let path = expand_slice(&unit.slice)?.join(&unit.name);
                (Place::FromRoot(path), Some(unit))
            }
        };
        let mut v1 = BTreeMap::new();
        for mount in hierarchies.v1() {
            let directory = place.in_v1(mount)?;
            for controller in &mount.controllers {
                v1.insert(controller.clone(), directory.clone());
            }
        }
        let beside = hierarchies.mode() != Mode::V2;
        let unified = hierarchies.v2().map(|mount| place.in_v2(mount, beside)).transpose()?;
        Ok(Self { driver, unified, v1, unit })
    }

    /// The cgroup `name` below this one, for an exec'd process; always plain files.
    pub fn child(&self, name: &str) -> Result<Self> {
        let below = plain_path(name)?;
        Ok(Self {
            driver: Driver::Cgroupfs,
            unified: self.unified.as_ref().map(|path| path.join(&below)),
            v1: self.v1.iter().map(|(c, path)| (c.clone(), path.join(&below))).collect(),
            unit: None,
        })
    }

    /// Every directory once: v2 first, then v1 in the controllers' order.
    pub(crate) fn directories(&self) -> Vec<&Path> {
        let mut all: Vec<&Path> = Vec::with_capacity(1 + self.v1.len());
        for path in self.unified.iter().chain(self.v1.values()) {
            if !all.contains(&path.as_path()) {
                all.push(path);
            }
        }
        all
    }

    /// Whether the v2 hierarchy is the one that carries the controllers.
    pub(crate) fn is_v2(&self) -> bool {
        self.v1.is_empty()
    }
}

/// A path below the root of each hierarchy, or below our own cgroup there.
enum Place {
    FromRoot(PathBuf),
    FromOwn(PathBuf),
}

impl Place {
    fn in_v1(&self, mount: &Mount) -> Result<PathBuf> {
        self.resolve(mount, Path::to_path_buf)
    }

    /// `beside`: the v2 hierarchy has no controllers, so our own cgroup can have children.
    fn in_v2(&self, mount: &Mount, beside: bool) -> Result<PathBuf> {
        self.resolve(mount, |own| {
            if beside { own.to_path_buf() } else { own.parent().unwrap_or(own).to_path_buf() }
        })
    }

    fn resolve(&self, mount: &Mount, base: impl Fn(&Path) -> PathBuf) -> Result<PathBuf> {
        match self {
            Self::FromRoot(path) => Ok(mount.point.join(path)),
            Self::FromOwn(path) => match &mount.own {
                Some(own) => Ok(mount.point.join(base(own)).join(path)),
                None => Err(Error::Path {
                    path: path.display().to_string(),
                    reason: "is relative, and our own cgroup is outside the mounted hierarchy",
                }),
            },
        }
    }
}

fn cgroupfs_place(asked: Option<&str>, id: &str) -> Result<Place> {
    let Some(asked) = asked else {
        return Ok(Place::FromOwn(plain_path(id)?));
    };
    if !asked.contains('/') && asked.split(':').count() == 3 {
        return Err(Error::Path {
            path: asked.to_owned(),
            reason: "is in systemd's slice:prefix:name form, but the driver is cgroupfs",
        });
    }
    let path = plain_path(asked.trim_start_matches('/'))?;
    Ok(if asked.starts_with('/') { Place::FromRoot(path) } else { Place::FromOwn(path) })
}

/// A relative path of ordinary components: nothing that leaves the place it is joined to.
fn plain_path(text: &str) -> Result<PathBuf> {
    let refuse = |reason| Err(Error::Path { path: text.to_owned(), reason });
    let mut plain = PathBuf::new();
    for component in Path::new(text).components() {
        match component {
            Component::Normal(name) if name.len() <= 255 => plain.push(name),
            Component::Normal(_) => return refuse("has a component longer than 255 bytes"),
            Component::CurDir => {}
            Component::ParentDir => return refuse("must not contain \"..\""),
            Component::RootDir | Component::Prefix(_) => return refuse("must be relative"),
        }
    }
    if plain.as_os_str().is_empty() {
        return refuse("names no cgroup");
    }
    if text.contains(['\0', '\n']) {
        return refuse("contains a control character");
    }
    if text.len() > 2048 {
        return refuse("is longer than 2048 bytes");
    }
    Ok(plain)
}

/// `slice:prefix:name`, as runc reads it.
fn systemd_unit(asked: Option<&str>, id: &str) -> Result<Unit> {
    let default = if rustix::process::geteuid().is_root() { "system.slice" } else { "user.slice" };
    let Some(asked) = asked else {
        let name = format!("pinion-{id}.scope");
        plain_path(&name)?;
        return Ok(Unit { name, slice: default.to_owned() });
    };
    let refuse = |reason| Err(Error::Path { path: asked.to_owned(), reason });
    let parts: Vec<&str> = asked.split(':').collect();
    let &[slice, prefix, name] = parts.as_slice() else {
        return refuse("must have the form slice:prefix:name with the systemd driver");
    };
    if name.is_empty() {
        return refuse("has no unit name");
    }
    if asked.contains('/') {
        return refuse("must not contain a slash with the systemd driver");
    }
    let slice = if slice.is_empty() { default } else { slice };
    let name = if name.ends_with(".slice") {
        name.to_owned()
    } else if prefix.is_empty() {
        format!("{name}.scope")
    } else {
        format!("{prefix}-{name}.scope")
    };
    plain_path(&name)?;
    Ok(Unit { name, slice: slice.to_owned() })
}

/// systemd's slice nesting: `a-b.slice` lives in `a.slice/a-b.slice`, `-.slice` is the root.
fn expand_slice(slice: &str) -> Result<PathBuf> {
    let refuse = |reason| Err(Error::Path { path: slice.to_owned(), reason });
    let Some(stem) = slice.strip_suffix(".slice").filter(|stem| !stem.is_empty()) else {
        return refuse("does not name a slice");
    };
    if slice.contains('/') {
        return refuse("does not name a slice");
    }
    if stem == "-" {
        return Ok(PathBuf::new());
    }
    let mut path = PathBuf::new();
    let mut prefix = String::new();
    for part in stem.split('-') {
        if part.is_empty() {
            return refuse("has an empty component between dashes");
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
        prefix.push('-');
    }
    plain_path(&path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v2() -> Hierarchies {
        let mounts = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        Hierarchies::parse(mounts, "0::/user/shell\n").unwrap()
    }

    fn hybrid() -> Hierarchies {
        let mounts = "\
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";
        Hierarchies::parse(mounts, "4:memory:/m\n2:cpu,cpuacct:/\n0::/u\n").unwrap()
    }

    fn unified(driver: Driver, path: Option<&str>) -> Result<PathBuf> {
        CgroupPaths::plan(&v2(), driver, path, "c1").map(|paths| paths.unified.unwrap())
    }

    #[test]
    fn an_absolute_path_starts_at_the_hierarchys_root() {
        let path = unified(Driver::Cgroupfs, Some("/kubepods/pod1/c1")).unwrap();
        assert_eq!(path, Path::new("/sys/fs/cgroup/kubepods/pod1/c1"));
    }

    #[test]
    fn a_relative_path_lies_beside_us_on_v2_and_below_us_on_v1() {
        let path = unified(Driver::Cgroupfs, Some("a/b")).unwrap();
        assert_eq!(path, Path::new("/sys/fs/cgroup/user/a/b"));
        let paths = CgroupPaths::plan(&hybrid(), Driver::Cgroupfs, None, "c1").unwrap();
        assert_eq!(paths.v1["memory"], Path::new("/sys/fs/cgroup/memory/m/c1"));
        assert_eq!(paths.v1["cpuacct"], Path::new("/sys/fs/cgroup/cpu,cpuacct/c1"));
        assert_eq!(paths.unified.as_deref(), Some(Path::new("/sys/fs/cgroup/unified/u/c1")));
        assert_eq!(paths.directories().len(), 3);
    }

    #[test]
    fn systemd_units_are_found_in_their_nested_slices() {
        let plan = |path| CgroupPaths::plan(&v2(), Driver::Systemd, Some(path), "c1").unwrap();
        let pod = plan("kubepods-burstable-podx.slice:cri-containerd:abc");
        assert_eq!(
            pod.unified.as_deref(),
            Some(Path::new(
                "/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/\
                 kubepods-burstable-podx.slice/cri-containerd-abc.scope"
            ))
        );
        let unit = pod.unit.unwrap();
        assert_eq!(unit.name, "cri-containerd-abc.scope");
        assert_eq!(unit.slice, "kubepods-burstable-podx.slice");
        assert_eq!(
            plan("-.slice::x").unified.as_deref(),
            Some(Path::new("/sys/fs/cgroup/x.scope"))
        );
        assert_eq!(
            plan("a.slice:p:b.slice").unified.as_deref(),
            Some(Path::new("/sys/fs/cgroup/a.slice/b.slice"))
        );
    }

    #[test]
    fn paths_that_leave_their_place_are_refused() {
        for path in ["../x", "/a/../../x", "/..", "/", "a:b:c", "/a\nb", &"x".repeat(300)] {
            let error = unified(Driver::Cgroupfs, Some(path)).unwrap_err();
            assert!(matches!(error, Error::Path { .. }), "{path:?}: {error}");
        }
        for path in ["/a/b", "a:b", "a.slice:p:../x", "a.slice:p:", "a/b.slice:p:x", "..:p:x"] {
            let error = unified(Driver::Systemd, Some(path)).unwrap_err();
            assert!(matches!(error, Error::Path { .. }), "{path:?}: {error}");
        }
        for slice in ["a--b.slice:p:x", "-a.slice:p:x", ".slice:p:x", "a-.slice:p:x"] {
            assert!(unified(Driver::Systemd, Some(slice)).is_err(), "{slice}");
        }
    }

    #[test]
    fn an_exec_cgroup_lies_below_and_cannot_climb() {
        let paths = CgroupPaths::plan(&hybrid(), Driver::Cgroupfs, Some("/c1"), "c1").unwrap();
        let child = paths.child("exec/1").unwrap();
        assert_eq!(child.v1["memory"], Path::new("/sys/fs/cgroup/memory/c1/exec/1"));
        assert!(paths.child("../c10").is_err());
        assert!(paths.child("").is_err());
    }
}
