//! What the node is: the data the builder decides from, and the one place that reads it.
//!
//! [`HostFacts`] is read once at start, [`HostPaths`] once per request. The builder itself
//! touches nothing, so every rule is tested with made-up facts.

use crate::mount_table::{MountTable, Propagation};
use oci_spec::runtime::{Capability, LinuxDeviceType};
use pinion_cri_proto::v1;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A device node of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceNode {
    /// Path on the host.
    pub path: PathBuf,
    /// Character or block.
    pub kind: LinuxDeviceType,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits (0o666).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// AppArmor as the kernel reports it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AppArmor {
    /// Names of the loaded profiles (`/sys/kernel/security/apparmor/profiles`).
    pub profiles: BTreeSet<String>,
}

/// What does not change while the server runs.
#[derive(Debug, Clone, Default)]
pub struct HostFacts {
    /// The host's name, for pods that do not bring one.
    pub hostname: String,
    /// The cgroup hierarchy is v2 only: containers get a cgroup namespace and `unified` works.
    pub cgroup_v2: bool,
    /// Capabilities this process may pass on: its own bounding set.
    pub bounding: BTreeSet<String>,
    /// AppArmor, when enabled.
    pub apparmor: Option<AppArmor>,
    /// SELinux is enabled.
    pub selinux: bool,
    /// The kernel has seccomp filters.
    pub seccomp: bool,
    /// Hugepage sizes the kernel knows, as cgroup files name them: `2MB`, `1GB`.
    pub hugepage_sizes: Vec<String>,
    /// The hugetlb cgroup controller is there.
    pub hugetlb_controller: bool,
    /// Swap is accounted, so a swap limit can be written.
    pub swap_accounting: bool,
    /// Lowest `oom_score_adj` this process may set; -1000 with CAP_SYS_RESOURCE.
    pub min_oom_score_adj: i32,
    /// `mount_setattr(AT_RECURSIVE)` works (Linux 5.12).
    pub recursive_read_only: bool,
}

impl HostFacts {
    /// Reads the host. What cannot be read counts as absent.
    ///
    /// `cgroup_v2` and the two controllers come from the caller, who knows the hierarchies.
    pub fn read(cgroup_v2: bool, hugetlb_controller: bool, swap_accounting: bool) -> Self {
        let status = text("/proc/self/status");
        let bounding = bounding_set();
        let own_adj = text("/proc/self/oom_score_adj").trim().parse().unwrap_or(0);
        let may_lower = bounding.contains("CAP_SYS_RESOURCE");
        Self {
            hostname: text("/proc/sys/kernel/hostname").trim().to_owned(),
            cgroup_v2,
            apparmor: read_apparmor(),
            selinux: Path::new("/sys/fs/selinux/enforce").exists(),
            seccomp: status.lines().any(|line| line.starts_with("Seccomp:")),
            hugepage_sizes: hugepage_sizes(Path::new("/sys/kernel/mm/hugepages")),
            hugetlb_controller,
            swap_accounting,
            min_oom_score_adj: if may_lower { -1000 } else { own_adj },
            recursive_read_only: kernel_at_least(&text("/proc/sys/kernel/osrelease"), (5, 12)),
            bounding,
        }
    }
}

fn text(path: &str) -> String {
    std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

fn read_apparmor() -> Option<AppArmor> {
    if text("/sys/module/apparmor/parameters/enabled").trim() != "Y" {
        return None;
    }
    let profiles = text("/sys/kernel/security/apparmor/profiles");
    Some(AppArmor { profiles: profiles.lines().filter_map(profile_name).collect() })
}

/// `name (mode)` → `name`; names may hold blanks themselves.
fn profile_name(line: &str) -> Option<String> {
    line.rsplit_once(" (").map(|(name, _)| name.to_owned())
}

/// The bounding set of this thread as `CAP_…` names, without those oci-spec does not know.
fn bounding_set() -> BTreeSet<String> {
    let held = caps::read(None, caps::CapSet::Bounding).unwrap_or_default();
    let names = held.iter().map(ToString::to_string);
    names.filter(|name| Capability::from_str(name.trim_start_matches("CAP_")).is_ok()).collect()
}

/// Names of `/sys/kernel/mm/hugepages` (`hugepages-2048kB`) in the cgroup's spelling.
fn hugepage_sizes(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut sizes: Vec<u64> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()
        })
        .collect();
    sizes.sort_unstable();
    sizes.into_iter().map(cgroup_page_size).collect()
}

/// 2048 → `2MB`, as `mem_fmt` in mm/hugetlb_cgroup.c spells it.
pub(crate) fn cgroup_page_size(kib: u64) -> String {
    match kib {
        gib if gib >= 1 << 20 => format!("{}GB", gib >> 20),
        mib if mib >= 1 << 10 => format!("{}MB", mib >> 10),
        kib => format!("{kib}KB"),
    }
}

fn kernel_at_least(release: &str, wanted: (u32, u32)) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= wanted,
        _ => false,
    }
}

/// One mount source on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountSource {
    /// Nothing is there: a directory will be made.
    Missing,
    /// Something is there, and its mount propagates like this.
    Present(Propagation),
}

/// What the paths a request names are at this moment.
#[derive(Debug, Clone, Default)]
pub struct HostPaths {
    /// By `host_path` of the request's mounts.
    pub mounts: BTreeMap<String, MountSource>,
    /// By `host_path` of the request's devices: one node, or all below a directory, with the
    /// path below that directory (empty for a node itself).
    pub devices: DevicesByPath,
    /// Every device of the host, filled in for privileged containers only.
    pub all_devices: Vec<DeviceNode>,
    /// By `container_path`: directory at which the server has mounted an image volume
    /// (`Mount.image`, with `image_sub_path` already resolved inside it).
    pub image_volumes: BTreeMap<String, PathBuf>,
}

impl HostPaths {
    /// Looks at every host path `container` names. Image volumes are the caller's to add.
    pub fn inspect(container: &v1::ContainerConfig) -> io::Result<Self> {
        let mut paths = Self::default();
        let table = MountTable::parse(&std::fs::read("/proc/self/mountinfo")?);
        for mount in &container.mounts {
            let host = Path::new(&mount.host_path);
            if !host.is_absolute() {
                continue; // an image volume, or refused by the builder
            }
            let source = match host.canonicalize() {
                Ok(real) => MountSource::Present(table.propagation_of(&real)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => MountSource::Missing,
                Err(error) => return Err(at(host, &error)),
            };
            paths.mounts.insert(mount.host_path.clone(), source);
        }
        paths.devices = Self::inspect_devices(container)?;
        let security = container.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        if security.is_some_and(|security| security.privileged) {
            paths.all_devices =
                devices_below(Path::new("/dev"))?.into_iter().map(|(_, node)| node).collect();
        }
        Ok(paths)
    }

    /// Looks at the device nodes alone, see [`HostPaths::devices`].
    pub fn inspect_devices(container: &v1::ContainerConfig) -> io::Result<DevicesByPath> {
        let mut devices = BTreeMap::new();
        for device in &container.devices {
            let host = Path::new(&device.host_path);
            let nodes = devices_below(host).map_err(|error| at(host, &error))?;
            devices.insert(device.host_path.clone(), nodes);
        }
        Ok(devices)
    }
}

/// Device nodes by the host path a request names, with their path below it.
pub type DevicesByPath = BTreeMap<String, Vec<(PathBuf, DeviceNode)>>;

fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Directories of `/dev` that are filesystems of their own or belong to a container manager.
const NOT_DEVICES: [&str; 7] = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"];

/// The node at `path`, or all nodes below it; FIFOs, sockets and files are no devices.
fn devices_below(path: &Path) -> io::Result<Vec<(PathBuf, DeviceNode)>> {
    let meta = std::fs::metadata(path)?;
    if !meta.is_dir() {
        let node = device_node(path, &meta).ok_or_else(|| io::Error::other("not a device node"))?;
        return Ok(vec![(PathBuf::new(), node)]);
    }
    let mut found = Vec::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(below) = pending.pop() {
        for entry in std::fs::read_dir(path.join(&below))?.flatten() {
            let (name, relative) = (entry.file_name(), below.join(entry.file_name()));
            // A device may vanish between the listing and the stat; symlinks are not followed.
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                if !NOT_DEVICES.iter().any(|skip| name == *skip) {
                    pending.push(relative);
                }
            } else if name != "console" {
                found.extend(device_node(&entry.path(), &meta).map(|node| (relative, node)));
            }
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

fn device_node(path: &Path, meta: &std::fs::Metadata) -> Option<DeviceNode> {
    let kind = match meta.file_type() {
        kind if kind.is_char_device() => LinuxDeviceType::C,
        kind if kind.is_block_device() => LinuxDeviceType::B,
        _ => return None,
    };
    Some(DeviceNode {
        path: path.to_owned(),
        kind,
        major: rustix::fs::major(meta.rdev()),
        minor: rustix::fs::minor(meta.rdev()),
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounding_set_is_the_one_the_kernel_reports() {
        let status = text("/proc/self/status");
        let mask = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).unwrap();
        let mask = u64::from_str_radix(mask.trim(), 16).unwrap();
        let names = crate::capabilities::NAMES;
        let reported = (0..names.len()).filter(|bit| mask & (1 << bit) != 0);
        assert_eq!(
            bounding_set(),
            reported.map(|bit| format!("CAP_{}", names[bit])).collect::<BTreeSet<_>>()
        );
    }

    #[test]
    fn page_sizes_are_spelled_like_cgroup_files() {
        assert_eq!(cgroup_page_size(2048), "2MB");
        assert_eq!(cgroup_page_size(1_048_576), "1GB");
        assert_eq!(cgroup_page_size(64), "64KB");
        assert_eq!(cgroup_page_size(16_777_216), "16GB");
    }

    #[test]
    fn kernel_releases_compare_by_number() {
        assert!(kernel_at_least("6.12.95+deb12-amd64", (5, 12)));
        assert!(kernel_at_least("5.12.0", (5, 12)));
        assert!(!kernel_at_least("5.9.1", (5, 12)));
        assert!(!kernel_at_least("linux", (5, 12)));
    }

    #[test]
    fn a_request_s_paths_are_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let here = dir.path().to_str().unwrap().to_owned();
        let missing = format!("{here}/nothing/here");
        let mount = |host: &str| v1::Mount { host_path: host.to_owned(), ..Default::default() };
        let config = v1::ContainerConfig {
            mounts: vec![mount(&here), mount(&missing), mount("")],
            devices: vec![v1::Device { host_path: "/dev/null".to_owned(), ..Default::default() }],
            ..Default::default()
        };
        let paths = HostPaths::inspect(&config).unwrap();
        assert!(matches!(paths.mounts[&here], MountSource::Present(_)));
        assert_eq!(paths.mounts[&missing], MountSource::Missing);
        assert_eq!(paths.mounts.len(), 2);
        let (_, null) = &paths.devices["/dev/null"][0];
        assert_eq!((null.kind, null.major, null.minor), (LinuxDeviceType::C, 1, 3));
        assert!(paths.all_devices.is_empty(), "only privileged containers see all devices");
    }

    #[test]
    fn a_file_is_not_a_device() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = devices_below(file.path()).unwrap_err();
        assert!(error.to_string().contains("not a device node"), "{error}");
    }
}
