//! What is mounted inside the container, and in which order.
//!
//! The runtime's own filesystems come first, then the pod's files and CRI's mounts ordered by
//! depth, so that no mount hides a deeper one. A CRI mount replaces a default at the same
//! place, and a CRI mount on `/dev` all defaults below it.

use crate::error::SpecError;
use crate::facts::{HostFacts, HostPaths, MountSource};
use crate::inputs::PodPaths;
use crate::mount_table::Propagation;
use crate::namespaces;
use oci_spec::OciSpecError;
use oci_spec::runtime::{Mount, MountBuilder};
use pinion_cri_proto::v1::{self, MountPropagation};
use std::path::{Component, Path, PathBuf};

/// All mounts, and what goes with them.
#[derive(Debug)]
pub(crate) struct Mounts {
    pub(crate) list: Vec<Mount>,
    /// `linux.rootfsPropagation`, when a mount needs more than the runtime's default.
    pub(crate) rootfs_propagation: Option<&'static str>,
    /// Sources to create before the container.
    pub(crate) missing_sources: Vec<PathBuf>,
}

/// How the rest of the request bears on mounts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) pod: &'a PodPaths,
    pub(crate) host: &'a HostFacts,
    pub(crate) paths: &'a HostPaths,
    pub(crate) privileged: bool,
    pub(crate) readonly_rootfs: bool,
    /// The container has a user namespace but the host's network, so sysfs cannot be mounted.
    pub(crate) bind_sysfs: bool,
}

/// Decides all mounts of a container.
pub(crate) fn mounts(asked: &[v1::Mount], context: Context<'_>) -> Result<Mounts, SpecError> {
    let mut binds = Vec::with_capacity(asked.len() + 4);
    for (index, mount) in asked.iter().enumerate() {
        binds.push(bind(mount, &format!("mounts[{index}]"), context)?);
    }
    let taken: Vec<PathBuf> = binds.iter().map(|bind| bind.destination.clone()).collect();
    for (destination, source, readonly) in pod_files(context) {
        if !taken.iter().any(|path| path == Path::new(destination)) {
            binds.push(Bind::of_the_pod(destination, source, readonly));
        }
    }
    binds.sort_by_key(|bind| bind.destination.components().count());

    let replaces_dev = taken.iter().any(|path| path == Path::new("/dev"));
    let kept = |mount: &&DefaultMount| {
        let at = Path::new(mount.0);
        let replaced = taken.iter().any(|path| path == at);
        !replaced && (!replaces_dev || !at.starts_with("/dev/"))
    };
    let mut list = Vec::new();
    for mount in default_mounts(context).iter().filter(kept) {
        list.push(mount.to_oci().map_err(internal)?);
    }
    for bind in &binds {
        list.push(bind.to_oci().map_err(internal)?);
    }
    let wanted = |propagation| binds.iter().any(|bind| bind.propagation == propagation);
    Ok(Mounts {
        list,
        rootfs_propagation: if wanted(MountPropagation::PropagationBidirectional) {
            Some("rshared")
        } else if wanted(MountPropagation::PropagationHostToContainer) {
            Some("rslave")
        } else {
            None
        },
        missing_sources: binds
            .into_iter()
            .filter(|bind| bind.missing)
            .map(|bind| bind.source)
            .collect(),
    })
}

#[allow(clippy::needless_pass_by_value, reason = "used as map_err's function")]
fn internal(error: OciSpecError) -> SpecError {
    SpecError::invalid("mounts", error.to_string())
}

/// Destination, type, source, options.
struct DefaultMount(&'static str, &'static str, &'static str, Vec<&'static str>);

impl DefaultMount {
    fn to_oci(&self) -> Result<Mount, OciSpecError> {
        let Self(destination, kind, source, options) = self;
        MountBuilder::default()
            .destination(*destination)
            .typ(*kind)
            .source(*source)
            .options(options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
            .build()
    }
}

/// The filesystems every container has; sysfs and cgroup writable for privileged ones.
fn default_mounts(context: Context<'_>) -> Vec<DefaultMount> {
    let access = if context.privileged { "rw" } else { "ro" };
    let sysfs = if context.bind_sysfs {
        DefaultMount("/sys", "bind", "/sys", vec!["rbind", "rro", "nosuid", "noexec", "nodev"])
    } else {
        DefaultMount("/sys", "sysfs", "sysfs", vec!["nosuid", "noexec", "nodev", access])
    };
    vec![
        DefaultMount("/proc", "proc", "proc", vec!["nosuid", "noexec", "nodev"]),
        DefaultMount(
            "/dev",
            "tmpfs",
            "tmpfs",
            vec!["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        DefaultMount(
            "/dev/pts",
            "devpts",
            "devpts",
            vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        DefaultMount("/dev/mqueue", "mqueue", "mqueue", vec!["nosuid", "noexec", "nodev"]),
        sysfs,
        DefaultMount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            vec!["nosuid", "noexec", "nodev", "relatime", access],
        ),
    ]
}

/// What the pod lends, unless CRI mounts something there itself.
fn pod_files(context: Context<'_>) -> impl Iterator<Item = (&'static str, &Path, bool)> {
    let pod = context.pod;
    let readonly = context.readonly_rootfs;
    [
        ("/etc/hostname", &pod.hostname, readonly),
        ("/etc/hosts", &pod.hosts, readonly),
        ("/etc/resolv.conf", &pod.resolv_conf, readonly),
        ("/dev/shm", &pod.shm, false),
    ]
    .into_iter()
    .filter_map(|(at, source, readonly)| Some((at, source.as_deref()?, readonly)))
}

/// A bind mount, decided.
struct Bind<'a> {
    destination: PathBuf,
    source: PathBuf,
    missing: bool,
    propagation: MountPropagation,
    access: &'static str,
    extra: &'a [String],
    ids: [Vec<oci_spec::runtime::LinuxIdMapping>; 2],
}

impl Bind<'_> {
    fn of_the_pod(destination: &str, source: &Path, readonly: bool) -> Self {
        Self {
            destination: destination.into(),
            source: source.to_owned(),
            missing: false,
            propagation: MountPropagation::PropagationPrivate,
            access: if readonly { "ro" } else { "rw" },
            extra: &[],
            ids: [Vec::new(), Vec::new()],
        }
    }

    fn to_oci(&self) -> Result<Mount, OciSpecError> {
        let propagation = match self.propagation {
            MountPropagation::PropagationPrivate => "rprivate",
            MountPropagation::PropagationHostToContainer => "rslave",
            MountPropagation::PropagationBidirectional => "rshared",
        };
        let mut options = ["rbind", propagation, self.access].map(str::to_owned).to_vec();
        options.extend(self.extra.iter().cloned());
        let mut mount = MountBuilder::default()
            .destination(&self.destination)
            .typ("bind")
            .source(&self.source)
            .options(options);
        let [uids, gids] = &self.ids;
        if !uids.is_empty() {
            mount = mount.uid_mappings(uids.clone()).gid_mappings(gids.clone());
        }
        mount.build()
    }
}

fn bind<'a>(
    mount: &'a v1::Mount,
    field: &str,
    context: Context<'_>,
) -> Result<Bind<'a>, SpecError> {
    let refuse =
        |member: &str, reason: String| Err(SpecError::invalid(format!("{field}.{member}"), reason));
    let destination = clean(&mount.container_path, &format!("{field}.container_path"))?;
    if destination == Path::new("/") {
        return refuse("container_path", "\"/\" is the root filesystem's place".to_owned());
    }
    let image = mount.image.as_ref().is_some_and(|image| !image.image.is_empty());
    if !image && !mount.image_sub_path.is_empty() {
        return refuse("image_sub_path", "only an image volume has one".to_owned());
    }
    let (source, fact) = if image {
        if !mount.host_path.is_empty() {
            return refuse("host_path", "a mount has either a host path or an image".to_owned());
        }
        if !mount.readonly {
            return refuse("readonly", "an image volume cannot be writable".to_owned());
        }
        let Some(source) = context.paths.image_volumes.get(&mount.container_path) else {
            let reason = "the image volume is not mounted on this host";
            return Err(SpecError::unavailable(format!("{field}.image"), reason));
        };
        (source.clone(), MountSource::Present(Propagation::Private))
    } else {
        let source = clean(&mount.host_path, &format!("{field}.host_path"))?;
        let fact = context.paths.mounts.get(&mount.host_path).cloned();
        (source, fact.unwrap_or(MountSource::Missing))
    };
    let Ok(propagation) = MountPropagation::try_from(mount.propagation) else {
        return refuse("propagation", format!("unknown mode {}", mount.propagation));
    };
    propagates(propagation, &fact, &source, &format!("{field}.propagation"))?;
    let odd = |option: &&String| !["noexec", "nodev", "nosuid"].contains(&option.as_str());
    if let Some(option) = mount.mount_options.iter().find(odd) {
        return refuse("mount_options", format!("{option:?} is not noexec, nodev or nosuid"));
    }
    if mount.uid_mappings.is_empty() != mount.gid_mappings.is_empty() {
        return refuse("uid_mappings", "user and group mappings come together".to_owned());
    }
    Ok(Bind {
        destination,
        source,
        missing: fact == MountSource::Missing,
        propagation,
        access: access(mount, propagation, field, context.host)?,
        extra: &mount.mount_options,
        ids: [
            namespaces::mappings(&mount.uid_mappings, &format!("{field}.uid_mappings"))?,
            namespaces::mappings(&mount.gid_mappings, &format!("{field}.gid_mappings"))?,
        ],
    })
}

/// `rw`, `ro` or recursively read-only (KEP-3857), which needs a private read-only mount.
fn access(
    mount: &v1::Mount,
    propagation: MountPropagation,
    field: &str,
    host: &HostFacts,
) -> Result<&'static str, SpecError> {
    if !mount.recursive_read_only {
        return Ok(if mount.readonly { "ro" } else { "rw" });
    }
    let field = format!("{field}.recursive_read_only");
    if !mount.readonly {
        return Err(SpecError::invalid(field, "conflicts with a writable mount"));
    }
    if propagation != MountPropagation::PropagationPrivate {
        let name = propagation.as_str_name();
        return Err(SpecError::invalid(field, format!("needs private propagation, not {name}")));
    }
    if !host.recursive_read_only {
        return Err(SpecError::unavailable(field, "this kernel lacks mount_setattr(2)"));
    }
    Ok("rro")
}

/// A mount can pass on only what its source's mount takes part in.
fn propagates(
    wanted: MountPropagation,
    fact: &MountSource,
    source: &Path,
    field: &str,
) -> Result<(), SpecError> {
    let MountSource::Present(actual) = fact else { return Ok(()) };
    let enough = match wanted {
        MountPropagation::PropagationPrivate => true,
        MountPropagation::PropagationHostToContainer => *actual != Propagation::Private,
        MountPropagation::PropagationBidirectional => *actual == Propagation::Shared,
    };
    if enough {
        return Ok(());
    }
    let needed = match wanted {
        MountPropagation::PropagationBidirectional => "shared",
        _ => "shared or slave",
    };
    let reason = format!("{} is not on a {needed} mount", source.display());
    Err(SpecError::unavailable(field, reason))
}

/// An absolute path with `.`, `..` and double slashes resolved by text, as kubelet's paths are.
fn clean(path: &str, field: &str) -> Result<PathBuf, SpecError> {
    if !path.starts_with('/') || path.contains('\0') || path.len() > 4095 {
        let start: String = path.chars().take(64).collect();
        return Err(SpecError::invalid(field, format!("{start:?} is not an absolute path")));
    }
    let mut clean = PathBuf::from("/");
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Ok(clean)
}

#[cfg(test)]
#[path = "mounts_tests.rs"]
mod tests;
