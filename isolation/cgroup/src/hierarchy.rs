//! Which cgroup hierarchies are mounted, and where this process is in them.

use std::path::{Path, PathBuf};

use crate::{Error, Result, file};

/// How controllers reach us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// One unified hierarchy with all controllers.
    V2,
    /// Controllers on v1, and a v2 hierarchy beside them without (most) controllers.
    Hybrid,
    /// v1 only.
    V1,
}

/// The mounted hierarchies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchies {
    mode: Mode,
    v2: Option<Mount>,
    v1: Vec<Mount>,
}

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// v1: controllers or `name=...`; v2: empty.
    pub(crate) controllers: Vec<String>,
    pub(crate) point: PathBuf,
    /// Our own cgroup, as a path below `point`, without a leading slash. `None` when it lies
    /// outside what is mounted.
    pub(crate) own: Option<PathBuf>,
}

impl Hierarchies {
    /// Reads `/proc/self/mountinfo` and `/proc/self/cgroup`.
    pub fn detect() -> Result<Self> {
        let mounts = file::read(Path::new("/proc/self/mountinfo"))?;
        let own = file::read(Path::new("/proc/self/cgroup"))?;
        Self::parse(&mounts, &own)
    }

    /// What the two files say. A v2 mount at `/sys/fs/cgroup` itself makes the host v2,
    /// whatever single v1 controllers somebody mounted elsewhere.
    pub fn parse(mountinfo: &str, own: &str) -> Result<Self> {
        let mut v2: Option<Mount> = None;
        let mut v1: Vec<Mount> = Vec::new();
        for (kind, mount) in mountinfo.lines().filter_map(|line| parse_mount(line, own)) {
            match kind {
                Kind::V2 if v2.is_none() => v2 = Some(mount),
                Kind::V1 if !v1.iter().any(|known| known.controllers == mount.controllers) => {
                    v1.push(mount);
                }
                Kind::V1 | Kind::V2 => {}
            }
        }
        let unified = v2.as_ref().is_some_and(|mount| mount.point == Path::new("/sys/fs/cgroup"));
        let any_v1 = v1.iter().flat_map(|mount| &mount.controllers).any(|c| !c.contains('='));
        let mode = match (&v2, any_v1 && !unified) {
            (Some(_), false) => Mode::V2,
            (Some(_), true) => Mode::Hybrid,
            (None, true) => Mode::V1,
            (None, false) => return Err(Error::NoHierarchy),
        };
        if mode == Mode::V2 {
            v1.clear();
        }
        Ok(Self { mode, v2, v1 })
    }

    /// How controllers reach us.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Where the v2 hierarchy is mounted.
    #[must_use]
    pub fn v2_root(&self) -> Option<&Path> {
        self.v2.as_ref().map(|mount| mount.point.as_path())
    }

    /// Where a v1 controller is mounted.
    #[must_use]
    pub fn v1_root(&self, controller: &str) -> Option<PathBuf> {
        let has = |mount: &&Mount| mount.controllers.iter().any(|name| name == controller);
        self.v1.iter().find(has).map(|mount| mount.point.clone())
    }

    /// The controllers that can be used: those of the v2 root and those mounted on v1.
    pub fn controllers(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = self
            .v1
            .iter()
            .flat_map(|mount| mount.controllers.iter().cloned())
            .filter(|name| !name.contains('='))
            .collect();
        if let Some(root) = self.v2_root() {
            let text = file::read(&root.join("cgroup.controllers"))?;
            names.extend(text.split_whitespace().map(str::to_owned));
        }
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    pub(crate) fn v2(&self) -> Option<&Mount> {
        self.v2.as_ref()
    }

    pub(crate) fn v1(&self) -> &[Mount] {
        &self.v1
    }
}

enum Kind {
    V1,
    V2,
}

/// One line of mountinfo(5), if it is a cgroup mount:
/// `36 35 98:0 /root /point options [tags] - type source super-options`.
fn parse_mount(line: &str, own: &str) -> Option<(Kind, Mount)> {
    let (head, tail) = line.split_once(" - ")?;
    let mut head = head.split(' ').skip(3);
    let root = unescape(head.next()?);
    let point = PathBuf::from(unescape(head.next()?));
    let mut tail = tail.split(' ');
    let kind = tail.next()?;
    let options = tail.nth(1).unwrap_or_default();
    match kind {
        "cgroup2" => {
            let own = own_path(own, &root, |id, names| id == "0" && names.is_empty());
            Some((Kind::V2, Mount { controllers: Vec::new(), point, own }))
        }
        "cgroup" => {
            let controllers: Vec<String> = options
                .split(',')
                .filter(|option| CONTROLLERS.contains(option) || option.starts_with("name="))
                .map(str::to_owned)
                .collect();
            let first = controllers.first()?.clone();
            let own = own_path(own, &root, |_, names| names.split(',').any(|name| name == first));
            Some((Kind::V1, Mount { controllers, point, own }))
        }
        _ => None,
    }
}

/// The v1 controllers; other super options (`rw`, `xattr`, `release_agent=`) are none.
const CONTROLLERS: [&str; 14] = [
    "blkio",
    "cpu",
    "cpuacct",
    "cpuset",
    "debug",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "misc",
    "net_cls",
    "net_prio",
    "perf_event",
    "pids",
];

/// Our cgroup in the matching hierarchy of cgroup(7)'s `id:controllers:path`, below `root`.
fn own_path(own: &str, root: &str, matches: impl Fn(&str, &str) -> bool) -> Option<PathBuf> {
    let path = own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (id, names, path) = (fields.next()?, fields.next()?, fields.next()?);
        matches(id, names).then_some(path)
    })?;
    let below = Path::new(path).strip_prefix(root).ok()?;
    let plain = below.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    plain.then(|| below.to_owned())
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &str) -> String {
    if !field.contains('\\') {
        return field.to_owned();
    }
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";
    const OWN: &str = "9:name=systemd:/a\n4:memory:/process/x\n2:cpu,cpuacct:/\n0::/user\n";

    #[test]
    fn a_hybrid_host_has_v1_controllers_and_a_v2_root() {
        let found = Hierarchies::parse(HYBRID, OWN).unwrap();
        assert_eq!(found.mode(), Mode::Hybrid);
        assert_eq!(found.v2_root(), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(found.v1_root("cpuacct"), Some("/sys/fs/cgroup/cpu,cpuacct".into()));
        assert_eq!(found.v1_root("pids"), None);
        let memory = found.v1().iter().find(|mount| mount.controllers == ["memory"]).unwrap();
        assert_eq!(memory.own.as_deref(), Some(Path::new("process/x")));
        assert_eq!(found.v2().unwrap().own.as_deref(), Some(Path::new("user")));
    }

    #[test]
    fn without_the_v2_mount_the_same_host_is_v1() {
        let text: String = HYBRID.lines().take(4).map(|line| format!("{line}\n")).collect();
        assert_eq!(Hierarchies::parse(&text, OWN).unwrap().mode(), Mode::V1);
    }

    #[test]
    fn a_unified_host_stays_v2_beside_a_stray_v1_mount() {
        let text = "\
30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate
90 23 0:60 / /opt/net\\040cls rw - cgroup net_cls rw,net_cls
";
        let found = Hierarchies::parse(text, "0::/\n").unwrap();
        assert_eq!(found.mode(), Mode::V2);
        assert_eq!(found.v1_root("net_cls"), None);
    }

    #[test]
    fn inside_a_container_our_place_is_relative_to_what_is_mounted() {
        let text = "30 23 0:26 /docker/c1 /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n";
        let inside = Hierarchies::parse(text, "0::/docker/c1/sub\n").unwrap();
        assert_eq!(inside.v2().unwrap().own.as_deref(), Some(Path::new("sub")));
        let outside = Hierarchies::parse(text, "0::/../other\n").unwrap();
        assert_eq!(outside.v2().unwrap().own, None);
    }

    #[test]
    fn no_mount_at_all_is_an_error() {
        assert!(matches!(Hierarchies::parse("", ""), Err(Error::NoHierarchy)));
    }
}
