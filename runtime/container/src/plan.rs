//! A whole configuration, checked and decided before anything is touched.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Hook, LinuxNamespaceType, LinuxResources};
use pinion_seccomp::Program;
use rustix::thread::CapabilitySet;

use crate::config::Spec;
use crate::devices::{self, DeviceNode};
use crate::error::{Error, Result};
use crate::memory_policy::MemoryPolicy;
use crate::mounts::MountPlan;
use crate::namespaces::Namespaces;
use crate::net_devices::{self, NetDevice};
use crate::process::ProcessPlan;
use crate::sysctl::{self, Sysctl};
use crate::{capability, mount_options, personality};

/// What the plan depends on besides the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// The capabilities of the runtime that it can pass on.
    pub capabilities: CapabilitySet,
    /// True when the runtime is root on the host, and not in a user namespace only.
    pub privileged: bool,
}

impl Facts {
    /// What this process is, and may as far as `spec` asks for it.
    ///
    /// # Errors
    /// As capget(2).
    pub fn for_spec(spec: &Spec) -> Result<Self> {
        let process = spec.process.as_ref();
        let asked = capability::asked(process.and_then(|process| process.capabilities.as_ref()));
        Ok(Self {
            capabilities: capability::available(asked)?,
            privileged: rustix::process::geteuid().is_root() && pinion_sys::userns::is_first(),
        })
    }
}

/// Everything `create` does.
#[derive(Debug)]
pub struct Plan {
    /// Namespaces.
    pub namespaces: Namespaces,
    /// The root file system.
    pub root: RootPlan,
    /// Mounts in order.
    pub mounts: Vec<MountPlan>,
    /// Device nodes; `None` when the host's `/dev` is used.
    pub devices: Option<Vec<DeviceNode>>,
    /// Paths to hide.
    pub masked: Vec<PathBuf>,
    /// Paths to make read-only.
    pub read_only: Vec<PathBuf>,
    /// Kernel parameters.
    pub sysctl: Vec<Sysctl>,
    /// Host name.
    pub hostname: Option<String>,
    /// NIS domain name.
    pub domainname: Option<String>,
    /// The container's first process.
    pub process: ProcessPlan,
    /// Execution domain.
    pub personality: Option<u64>,
    /// NUMA policy of the first process.
    pub memory_policy: Option<MemoryPolicy>,
    /// Network devices to move in.
    pub net_devices: Vec<NetDevice>,
    /// SELinux context of the container's own file systems, which `mounts` have already.
    pub mount_label: Option<String>,
    /// Compiled system call filter.
    pub seccomp: Option<Program>,
    /// Resource limits and device rules.
    pub resources: LinuxResources,
    /// `cgroupsPath`.
    pub cgroups_path: Option<String>,
    /// Hooks.
    pub hooks: HookPlan,
    /// See [`Facts`].
    pub privileged: bool,
    /// For the log.
    pub warnings: Vec<String>,
}

/// The root file system.
#[derive(Clone, Debug)]
pub struct RootPlan {
    /// Absolute path on the host.
    pub path: PathBuf,
    /// Mount it read-only at the end.
    pub read_only: bool,
    /// `MS_*` flag for the container's view of the host's mounts, and for all below.
    pub propagation: Option<(u64, bool)>,
}

impl RootPlan {
    /// Whether what is mounted in the container is to appear on the host.
    #[must_use]
    pub fn reaches_host(&self) -> bool {
        self.propagation.is_some_and(|(flag, _)| flag == libc::MS_SHARED)
    }
}

/// The hooks by kind.
#[derive(Clone, Debug, Default)]
pub struct HookPlan {
    /// Runtime namespace, before the root changes; deprecated in the specification.
    pub prestart: Vec<Hook>,
    /// Runtime namespace, before the root changes.
    pub create_runtime: Vec<Hook>,
    /// Container namespace, before the root changes.
    pub create_container: Vec<Hook>,
    /// Container namespace, before the program.
    pub start_container: Vec<Hook>,
    /// Runtime namespace, after `start`.
    pub poststart: Vec<Hook>,
    /// Runtime namespace, after `delete`.
    pub poststop: Vec<Hook>,
}

impl Plan {
    /// Checks `spec` as found in the directory `bundle` (absolute).
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Unsupported`] naming the field.
    pub fn new(spec: &Spec, bundle: &Path, facts: Facts) -> Result<Self> {
        check_version(&spec.oci_version)?;
        if let Some(vm) = &spec.vm {
            vm.check()?;
            return Err(vm.refusal());
        }
        let linux = spec.linux.clone().unwrap_or_default_absent();
        let namespaces = Namespaces::plan(&linux)?;
        if !namespaces.has(LinuxNamespaceType::Mount) {
            return Err(Error::Unsupported("a container without a mount namespace".into()));
        }
        let process = spec.process.as_ref().ok_or_else(|| invalid("process is missing"))?;
        let available = if namespaces.has(LinuxNamespaceType::User) {
            CapabilitySet::all()
        } else {
            facts.capabilities
        };
        let (process, warnings) = ProcessPlan::plan(process, available)?;
        let mount_label = text(linux.mount_label().as_ref());
        let mut mounts: Vec<_> = spec
            .mounts
            .iter()
            .flatten()
            .map(|mount| MountPlan::plan(mount, bundle))
            .collect::<Result<_>>()?;
        let root = root(spec, &linux, bundle)?;
        let host_root = crate::process::clean(&root.path);
        mounts.iter_mut().for_each(|mount| mount.strip_root(&host_root));
        if let Some(label) = &mount_label {
            mounts.iter_mut().for_each(|mount| mount.label(label));
        }
        let devices = match devices::dev_is_foreign(&mounts) {
            true => None,
            false => Some(devices::nodes(linux.devices().as_deref().unwrap_or_default())?),
        };
        let mut sysctl: Vec<_> = linux
            .sysctl()
            .iter()
            .flatten()
            .map(|(name, value)| sysctl::plan(name, value, &namespaces))
            .collect::<Result<_>>()?;
        sysctl.sort_by(|a, b| a.path.cmp(&b.path));
        let plan = Self {
            root,
            mounts,
            devices,
            masked: paths(linux.masked_paths().as_deref()),
            read_only: paths(linux.readonly_paths().as_deref()),
            sysctl,
            hostname: text(spec.hostname.as_ref()),
            domainname: text(spec.domainname.as_ref()),
            process,
            personality: linux.personality().as_ref().map(personality::plan).transpose()?,
            memory_policy: linux.memory_policy().as_ref().map(MemoryPolicy::plan).transpose()?,
            mount_label,
            net_devices: net_devices::plan(
                linux.net_devices().as_ref(),
                &namespaces,
                facts.privileged,
            )?,
            seccomp: linux.seccomp().as_ref().map(pinion_seccomp::compile).transpose()?,
            resources: linux.resources().clone().unwrap_or_default(),
            cgroups_path: linux
                .cgroups_path()
                .as_ref()
                .map(|path| path.to_string_lossy().into_owned())
                .filter(|path| !path.is_empty()),
            hooks: HookPlan::new(spec),
            privileged: facts.privileged,
            warnings,
            namespaces,
        };
        plan.check()?;
        Ok(plan)
    }

    fn check(&self) -> Result<()> {
        if !self.namespaces.has(LinuxNamespaceType::Uts) {
            if self.hostname.is_some() {
                return Err(invalid("unable to set hostname without a private UTS namespace"));
            }
            if self.domainname.is_some() {
                return Err(invalid("unable to set domainname without a private UTS namespace"));
            }
        }
        Ok(())
    }
}

/// `Option::unwrap_or_default` would bring oci-spec's example values into a container.
trait OrAbsent {
    fn unwrap_or_default_absent(self) -> oci_spec::runtime::Linux;
}

impl OrAbsent for Option<oci_spec::runtime::Linux> {
    fn unwrap_or_default_absent(self) -> oci_spec::runtime::Linux {
        self.unwrap_or_else(|| {
            let mut linux = oci_spec::runtime::Linux::default();
            linux
                .set_namespaces(None)
                .set_masked_paths(None)
                .set_readonly_paths(None)
                .set_resources(None);
            linux
        })
    }
}

impl HookPlan {
    /// The hooks of a configuration.
    #[must_use]
    pub fn new(spec: &Spec) -> Self {
        let Some(hooks) = &spec.hooks else { return Self::default() };
        let list = |hooks: &Option<Vec<Hook>>| hooks.clone().unwrap_or_default();
        Self {
            #[allow(deprecated, reason = "runtimes must still run them")]
            prestart: list(hooks.prestart()),
            create_runtime: list(hooks.create_runtime()),
            create_container: list(hooks.create_container()),
            start_container: list(hooks.start_container()),
            poststart: list(hooks.poststart()),
            poststop: list(hooks.poststop()),
        }
    }
}

fn check_version(version: &str) -> Result<()> {
    let numbers = version.split(['-', '+']).next().unwrap_or_default();
    let parts: Vec<Option<u32>> = numbers.split('.').map(|part| part.parse().ok()).collect();
    match parts.as_slice() {
        [Some(1), Some(_), Some(_)] => Ok(()),
        [Some(_), Some(_), Some(_)] => {
            Err(Error::Unsupported(format!("ociVersion {version:?}: only 1.x is understood")))
        }
        _ => Err(invalid(format!("ociVersion {version:?} is not a semantic version"))),
    }
}

fn root(spec: &Spec, linux: &oci_spec::runtime::Linux, bundle: &Path) -> Result<RootPlan> {
    let root = spec.root.as_ref().ok_or_else(|| invalid("root is missing"))?;
    if root.path().as_os_str().is_empty() {
        return Err(invalid("root.path is empty"));
    }
    let propagation = match linux.rootfs_propagation().as_deref() {
        None | Some("") => None,
        Some(name) => Some(mount_options::propagation(name).ok_or_else(|| {
            invalid(format!("rootfsPropagation={name:?} is not a mount propagation"))
        })?),
    };
    let read_only = root.readonly().unwrap_or(false);
    Ok(RootPlan { path: bundle.join(root.path()), read_only, propagation })
}

/// Each path once: a second mount over the first would only be one more.
fn paths(list: Option<&[String]>) -> Vec<PathBuf> {
    let mut seen = HashSet::new();
    let clean = |path: &String| crate::process::clean(Path::new(path));
    list.into_iter().flatten().map(clean).filter(|path| seen.insert(path.clone())).collect()
}

fn text(text: Option<&String>) -> Option<String> {
    text.filter(|text| !text.is_empty()).cloned()
}

fn invalid(text: impl Into<String>) -> Error {
    Error::Invalid(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<Plan> {
        let spec: Spec = serde_json::from_str(json).unwrap();
        let facts = Facts { capabilities: CapabilitySet::all(), privileged: true };
        Plan::new(&spec, Path::new("/bundle"), facts)
    }

    const PROCESS: &str = r#""process":{"args":["a"],"cwd":"/","user":{"uid":0,"gid":0}}"#;

    #[test]
    fn the_smallest_configuration_is_planned() {
        let plan = plan(&format!(
            r#"{{"ociVersion":"1.2.0","root":{{"path":"rootfs"}},{PROCESS},
                "linux":{{"namespaces":[{{"type":"mount"}}]}}}}"#
        ))
        .unwrap();
        assert_eq!(plan.root.path, Path::new("/bundle/rootfs"));
        assert!(plan.masked.is_empty() && plan.seccomp.is_none());
        assert_eq!(plan.devices.unwrap().len(), 6);
    }

    #[test]
    fn a_path_named_twice_is_hidden_once() {
        let json = format!(
            r#"{{"ociVersion":"1.2.0","root":{{"path":"rootfs"}},{PROCESS},
                "linux":{{"namespaces":[{{"type":"mount"}}],
                "maskedPaths":["/a","/b","/a/","//a"],"readonlyPaths":["/c","/c"]}}}}"#
        );
        let plan = plan(&json).unwrap();
        assert_eq!(plan.masked, [Path::new("/a"), Path::new("/b")]);
        assert_eq!(plan.read_only, [Path::new("/c")]);
    }

    #[test]
    fn contradictions_and_missing_parts_are_refused_by_name() {
        let mount_only = r#""linux":{"namespaces":[{"type":"mount"}]}"#;
        for (json, word) in [
            (format!(r#"{{"ociVersion":"2.0.0",{PROCESS}}}"#), "ociVersion"),
            (format!(r#"{{"ociVersion":"x",{PROCESS}}}"#), "ociVersion"),
            (format!(r#"{{"ociVersion":"1.0.0",{PROCESS},{mount_only}}}"#), "root"),
            (format!(r#"{{"ociVersion":"1.0.0","root":{{"path":"r"}},{mount_only}}}"#), "process"),
            (
                format!(r#"{{"ociVersion":"1.0.0","root":{{"path":"r"}},{PROCESS}}}"#),
                "mount namespace",
            ),
            (
                format!(
                    r#"{{"ociVersion":"1.0.0","root":{{"path":"r"}},"hostname":"h",{PROCESS},{mount_only}}}"#
                ),
                "hostname",
            ),
        ] {
            let error = plan(&json).unwrap_err().to_string();
            assert!(error.contains(word), "{error} lacks {word}");
        }
    }
}
