//! The container that holds a shared PID namespace: one static binary in an empty rootfs.
//!
//! It reaps orphans and waits for its end; it needs no capability, no device, no user. Pods
//! that do not share a PID namespace have no such container.

use crate::annotations::sandbox_annotations;
use crate::build::OCI_VERSION;
use crate::cgroups_path::{CgroupDriver, cgroups_path};
use crate::error::SpecError;
use crate::facts::{HostFacts, HostPaths};
use crate::inputs::{PodPaths, Settings};
use crate::{devices, namespaces, resources};
use oci_spec::OciSpecError;
use oci_spec::runtime::{
    LinuxBuilder, LinuxCapabilitiesBuilder, LinuxNamespace, LinuxResources, MountBuilder,
    ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
};
use pinion_cri_proto::v1::{
    LinuxContainerResources, NamespaceMode, NamespaceOption, PodSandboxConfig,
};
use std::path::Path;

/// Where the binary appears inside.
const INSIDE: &str = "/init";
/// An id nobody has; the process acts for no user.
const NOBODY: u32 = 65535;

/// What the init container is made of.
#[derive(Debug, Clone, Copy)]
pub struct PodInit<'a> {
    /// Id of the pod sandbox; also the container's id.
    pub sandbox_id: &'a str,
    /// The pod.
    pub sandbox: &'a PodSandboxConfig,
    /// The pod's namespaces; `pid` is ignored, this container makes it.
    pub pod: &'a PodPaths,
    /// An empty directory.
    pub rootfs: &'a Path,
    /// The init binary on the host, absolute; statically linked.
    pub binary: &'a Path,
    /// The host.
    pub host: &'a HostFacts,
    /// Who manages cgroups.
    pub cgroup_driver: CgroupDriver,
}

/// The init container's specification.
pub fn init_spec(init: &PodInit<'_>) -> Result<Spec, SpecError> {
    let security = init.sandbox.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let mut options: NamespaceOption =
        security.and_then(|security| security.namespace_options.clone()).unwrap_or_default();
    options.pid = NamespaceMode::Container.into();
    let modes = namespaces::modes(Some(&options), Some(&options))?;
    let list = namespaces::namespaces(modes, &init.pod.namespaces, None, init.host.cgroup_v2)?;
    // The lowest CPU weight, and the last process of the pod to be killed for memory.
    let asked =
        LinuxContainerResources { cpu_shares: 2, oom_score_adj: -998, ..Default::default() };
    let mut limits = resources::resources(Some(&asked), init.host, &Settings::default())?;
    limits.set_devices(Some(devices::devices(&[], false, &HostPaths::default())?.rules));
    let parent = init.sandbox.linux.as_ref().map(|linux| linux.cgroup_parent.as_str());
    let path = cgroups_path(init.cgroup_driver, parent.unwrap_or_default(), init.sandbox_id)?;
    let adj = resources::oom_score_adj(Some(&asked), init.host, &mut Vec::new())?;
    // The last id, where a user namespace has fewer.
    let ids = super::user_namespace(init.sandbox)?;
    let nobody =
        ids.map_or(NOBODY, |ids| NOBODY.min(ids.uids.count.min(ids.gids.count).saturating_sub(1)));
    assemble(init, list, limits, &path, (nobody, adj.unwrap_or_default()))
        .map_err(|error| SpecError::invalid("linux", error.to_string()))
}

fn assemble(
    init: &PodInit<'_>,
    namespaces: Vec<LinuxNamespace>,
    resources: LinuxResources,
    cgroups_path: &str,
    (nobody, oom_score_adj): (u32, i32),
) -> Result<Spec, OciSpecError> {
    let user = UserBuilder::default().uid(nobody).gid(nobody).build()?;
    let none = oci_spec::runtime::Capabilities::new;
    let capabilities = LinuxCapabilitiesBuilder::default()
        .bounding(none())
        .permitted(none())
        .effective(none())
        .inheritable(none())
        .ambient(none())
        .build()?;
    let process = ProcessBuilder::default()
        .terminal(false)
        .user(user)
        .args(vec![INSIDE.to_owned()])
        .env(Vec::<String>::new())
        .cwd("/")
        .capabilities(capabilities)
        .no_new_privileges(true)
        .oom_score_adj(oom_score_adj)
        .rlimits(Vec::new())
        .build()?;
    let options =
        |list: &[&str]| list.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>();
    let proc = MountBuilder::default()
        .destination("/proc")
        .typ("proc")
        .source("proc")
        .options(options(&["nosuid", "noexec", "nodev"]))
        .build()?;
    let dev = MountBuilder::default()
        .destination("/dev")
        .typ("tmpfs")
        .source("tmpfs")
        .options(options(&["nosuid", "strictatime", "mode=755", "size=64k"]))
        .build()?;
    let binary = MountBuilder::default()
        .destination(INSIDE)
        .typ("bind")
        .source(init.binary)
        .options(options(&["bind", "rprivate", "ro", "nosuid", "nodev"]))
        .build()?;
    let linux = LinuxBuilder::default()
        .namespaces(namespaces)
        .resources(resources)
        .cgroups_path(cgroups_path)
        .masked_paths(Vec::new())
        .readonly_paths(Vec::new())
        .build()?;
    let root = RootBuilder::default().path(init.rootfs).readonly(true).build()?;
    let mut spec = SpecBuilder::default()
        .version(OCI_VERSION)
        .root(root)
        .mounts(vec![proc, dev, binary])
        .process(process)
        .linux(linux)
        .annotations(sandbox_annotations(init.sandbox_id))
        .build()?;
    spec.set_hostname(None);
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inputs::PodNamespaces;
    use oci_spec::runtime::LinuxNamespaceType;

    #[test]
    fn the_init_joins_the_pod_and_makes_its_pid_namespace() {
        let namespaces = PodNamespaces {
            net: Some("/pod/ns/net".into()),
            ipc: Some("/pod/ns/ipc".into()),
            uts: Some("/pod/ns/uts".into()),
            ..Default::default()
        };
        let pod = PodPaths { namespaces, ..Default::default() };
        let init = PodInit {
            sandbox_id: "pod1",
            sandbox: &PodSandboxConfig::default(),
            pod: &pod,
            rootfs: Path::new("/run/pod/init"),
            binary: Path::new("/usr/local/bin/pinion-init"),
            host: &HostFacts::default(),
            cgroup_driver: CgroupDriver::Cgroupfs,
        };
        let spec = init_spec(&init).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        let list = linux.namespaces().as_ref().unwrap();
        let pid = list.iter().find(|ns| ns.typ() == LinuxNamespaceType::Pid).unwrap();
        assert_eq!(pid.path(), &None);
        assert_eq!(list.len(), 5);
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/pinion/pod1")));
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.user().uid(), NOBODY);
        assert_eq!(process.oom_score_adj(), Some(0), "clamped to what the host allows");
        let capabilities = process.capabilities().as_ref().unwrap();
        assert!(capabilities.bounding().as_ref().unwrap().is_empty());
    }
}
