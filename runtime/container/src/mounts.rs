//! The mounts of a container, decided.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;

use crate::error::{Error, Result};
use crate::mount_options::MountOptions;
use crate::namespaces::Mappings;
use crate::process::clean;

/// One mount.
#[derive(Clone, Debug)]
pub struct MountPlan {
    /// Where in the container, absolute and clean.
    pub destination: PathBuf,
    /// What is mounted.
    pub kind: MountKind,
    /// How.
    pub options: MountOptions,
    /// The id mapping an idmapped mount applies; `None` means the container's.
    pub mappings: Option<Mappings>,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MountKind {
    /// A file or directory of the host.
    Bind {
        /// The absolute path on the host.
        source: PathBuf,
    },
    /// The container's view of the cgroup hierarchies.
    Cgroup,
    /// A new file system.
    FileSystem {
        /// `tmpfs`, `proc`, …
        name: String,
        /// The device name.
        source: String,
    },
}

/// The only files below `/proc` that may be covered, as in runc: tools such as lxcfs do.
const COVERABLE_PROC: &[&str] = &[
    "cpuinfo",
    "diskstats",
    "meminfo",
    "stat",
    "swaps",
    "uptime",
    "loadavg",
    "slabinfo",
    "net/dev",
    "sys/kernel/ns_last_pid",
    "sys/crypto/fips_enabled",
];

impl MountPlan {
    /// Checks one entry of `mounts` of a bundle at `bundle`.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the destination.
    pub fn plan(mount: &Mount, bundle: &Path) -> Result<Self> {
        let destination = clean(mount.destination());
        let empty = Vec::new();
        let words = mount.options().as_ref().unwrap_or(&empty);
        let options = MountOptions::parse(words.iter().map(String::as_str));
        let source = mount.source().clone();
        let kind_name = mount.typ().clone().unwrap_or_default();
        let kind = if options.bind.is_some() || kind_name == "bind" {
            let source = source.ok_or_else(|| bad(&destination, "a bind mount needs a source"))?;
            MountKind::Bind { source: bundle.join(source) }
        } else if kind_name == "cgroup" || kind_name == "cgroup2" {
            MountKind::Cgroup
        } else if kind_name.is_empty() || kind_name == "none" {
            return Err(bad(&destination, "a mount needs a type"));
        } else {
            let source =
                source.map_or_else(|| kind_name.clone(), |s| s.to_string_lossy().into_owned());
            MountKind::FileSystem { name: kind_name, source }
        };
        let plan = Self { mappings: mappings(mount, &destination)?, destination, kind, options };
        plan.check()?;
        Ok(plan)
    }

    fn check(&self) -> Result<()> {
        if self.destination == Path::new("/") {
            return Err(bad(&self.destination, "a mount cannot cover the root"));
        }
        let bind = matches!(self.kind, MountKind::Bind { .. });
        if (self.options.idmap.is_some() || self.mappings.is_some()) && !bind {
            return Err(bad(&self.destination, "only bind mounts can be id-mapped"));
        }
        let is_proc =
            |kind: &MountKind| matches!(kind, MountKind::FileSystem { name, .. } if name == "proc");
        if let Ok(below) = self.destination.strip_prefix("/proc") {
            let coverable = COVERABLE_PROC.iter().any(|known| below == Path::new(known));
            if below.as_os_str().is_empty() {
                let whole_proc = matches!(&self.kind, MountKind::Bind { source } if source == Path::new("/proc"));
                if !(is_proc(&self.kind) || whole_proc) {
                    return Err(bad(&self.destination, "only procfs may be mounted there"));
                }
            } else if !coverable {
                return Err(bad(
                    &self.destination,
                    "it cannot be mounted because it is inside /proc",
                ));
            }
        }
        Ok(())
    }

    /// As runc: some callers name the mountpoint by its path on the host.
    pub(crate) fn strip_root(&mut self, root: &Path) {
        if root == Path::new("/") {
            return;
        }
        if let Ok(inside) = self.destination.strip_prefix(root)
            && !inside.as_os_str().is_empty()
        {
            self.destination = Path::new("/").join(inside);
        }
    }

    /// True for what others may be mounted in, and is therefore read-only only at the end, as
    /// runc has it.
    #[must_use]
    pub fn is_read_only_at_the_end(&self) -> bool {
        let MountKind::FileSystem { name, .. } = &self.kind else { return false };
        self.options.attributes.set & libc::MOUNT_ATTR_RDONLY != 0
            && (name == "tmpfs" || self.destination == Path::new("/dev"))
    }

    /// Gives a new file system the SELinux context `label`; those of the kernel cannot have
    /// one, and a bind mount has that of its files.
    pub(crate) fn label(&mut self, label: &str) {
        const UNLABELLED: [&str; 3] = ["proc", "sysfs", "mqueue"];
        match &self.kind {
            MountKind::FileSystem { name, .. } if !UNLABELLED.contains(&name.as_str()) => {
                self.options.data.push(format!("context=\"{label}\""));
            }
            _ => {}
        }
    }

    /// True for file systems the kernel's own interfaces live in: their mountpoint must be
    /// an ordinary directory, never a symlink of the image.
    #[must_use]
    pub fn needs_real_directory(&self) -> bool {
        matches!(&self.kind, MountKind::FileSystem { name, .. } if name == "proc" || name == "sysfs")
    }
}

fn mappings(mount: &Mount, destination: &Path) -> Result<Option<Mappings>> {
    let uids = mount.uid_mappings().as_deref().unwrap_or_default();
    let gids = mount.gid_mappings().as_deref().unwrap_or_default();
    match (uids.is_empty(), gids.is_empty()) {
        (true, true) => Ok(None),
        (false, false) => Mappings::plan(uids, gids).map(Some),
        _ => Err(bad(destination, "uidMappings and gidMappings belong together")),
    }
}

fn bad(destination: &Path, why: &str) -> Error {
    Error::Invalid(format!("mount {}: {why}", destination.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<MountPlan> {
        MountPlan::plan(&serde_json::from_str(json).unwrap(), Path::new("/bundle"))
    }

    #[test]
    fn kinds_are_told_apart() {
        let bind =
            plan(r#"{"destination":"/a/../b","source":"/s","options":["rbind","ro"]}"#).unwrap();
        assert_eq!(bind.destination, Path::new("/b"));
        assert_eq!(bind.kind, MountKind::Bind { source: "/s".into() });
        assert_eq!(
            plan(r#"{"destination":"/c","type":"cgroup2"}"#).unwrap().kind,
            MountKind::Cgroup
        );
        assert!(
            plan(r#"{"destination":"/proc","type":"proc","source":"proc"}"#)
                .unwrap()
                .needs_real_directory()
        );
    }

    #[test]
    fn only_file_systems_of_the_containers_own_are_labelled() {
        let labelled = |json: &str| {
            let mut mount = plan(json).unwrap();
            mount.label("u:r:t:s0:c1,c2");
            mount.options.data.contains(&"context=\"u:r:t:s0:c1,c2\"".to_owned())
        };
        assert!(labelled(r#"{"destination":"/t","type":"tmpfs"}"#));
        assert!(!labelled(r#"{"destination":"/proc","type":"proc"}"#));
        assert!(!labelled(r#"{"destination":"/b","source":"/s","type":"bind"}"#));
    }

    #[test]
    fn covering_the_root_or_proc_is_refused() {
        for json in [
            r#"{"destination":"/","type":"tmpfs"}"#,
            r#"{"destination":"/proc","type":"tmpfs"}"#,
            r#"{"destination":"/proc/self/attr","type":"tmpfs"}"#,
            r#"{"destination":"/proc/../proc/sys","source":"/x","type":"bind"}"#,
            r#"{"destination":"/x","options":["rbind"]}"#,
            r#"{"destination":"/x","type":"tmpfs","options":["idmap"]}"#,
        ] {
            assert!(plan(json).is_err(), "{json}");
        }
        assert!(plan(r#"{"destination":"/proc/meminfo","source":"/x","type":"bind"}"#).is_ok());
    }
}
