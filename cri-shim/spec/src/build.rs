//! Puts the rules together into one specification.

use crate::annotations::annotations;
use crate::capabilities::{self, CapabilitySets};
use crate::cgroups_path::cgroups_path;
use crate::confinement::{self, Labels};
use crate::devices;
use crate::error::SpecError;
use crate::inputs::{Built, Inputs, ResolvedUser};
use crate::mounts::{self, Mounts};
use crate::namespaces::{self, Modes};
use crate::{process, resources, signal, user};
use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Linux, LinuxBuilder, Process, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
};
use pinion_cri_proto::v1::LinuxContainerSecurityContext;

/// Version of the runtime specification the result conforms to.
pub(crate) const OCI_VERSION: &str = "1.2.0";

/// Decides everything about a container before anything of it exists.
pub fn build(inputs: &Inputs<'_>) -> Result<Built, SpecError> {
    check_names(inputs)?;
    let mut warnings = Vec::new();
    let linux = inputs.container.linux.clone().unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    check_privileged(&security, inputs)?;
    let modes = namespaces::modes(security.namespace_options.as_ref(), pod_namespaces(inputs))?;
    let image_user = inputs.image.and_then(|image| image.user().as_deref()).unwrap_or_default();
    let user = user::resolve(&security, image_user, inputs.accounts)?;
    let capabilities = capabilities::decide(
        security.capabilities.as_ref(),
        security.privileged,
        &inputs.host.bounding,
        &mut warnings,
    )?;
    let labels = confinement::selinux(
        security.selinux_options.as_ref(),
        pod_security(inputs).and_then(|pod| pod.selinux_options.as_ref()),
        security.privileged,
        inputs.host,
    )?;
    let mounts = mounts::mounts(
        &inputs.container.mounts,
        mounts::Context {
            pod: inputs.pod,
            host: inputs.host,
            paths: inputs.paths,
            privileged: security.privileged,
            readonly_rootfs: security.readonly_rootfs,
            bind_sysfs: modes.user && modes.host_network,
        },
    )?;
    let stop_signal = signal::stop_signal(inputs.container, inputs.image, &mut warnings)?;
    let parts = Parts { security: &security, modes, user: &user, capabilities, labels, mounts };
    let process = parts.process(inputs, &mut warnings)?;
    let linux = parts.linux(inputs)?;
    let spec = parts.spec(inputs, process, linux).map_err(internal)?;
    let missing_sources = parts.mounts.missing_sources;
    Ok(Built { spec, user, stop_signal, missing_sources, warnings })
}

/// Decided pieces on their way into the specification.
struct Parts<'a> {
    security: &'a LinuxContainerSecurityContext,
    modes: Modes,
    user: &'a ResolvedUser,
    capabilities: CapabilitySets,
    labels: Option<Labels>,
    mounts: Mounts,
}

impl Parts<'_> {
    fn process(
        &self,
        inputs: &Inputs<'_>,
        warnings: &mut Vec<String>,
    ) -> Result<Process, SpecError> {
        let config = inputs.container;
        let hostname = match inputs.sandbox.hostname.as_str() {
            "" => &inputs.host.hostname,
            own => own,
        };
        let resources = config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
        let user = UserBuilder::default()
            .uid(self.user.uid)
            .gid(self.user.gid)
            .additional_gids(self.user.groups.clone())
            .build()
            .map_err(internal)?;
        let mut process = ProcessBuilder::default()
            .terminal(config.tty)
            .user(user)
            .args(process::args(config, inputs.image)?)
            .env(process::env(config, inputs.image, hostname, warnings)?)
            .cwd(process::cwd(config, inputs.image)?)
            .capabilities(self.capabilities.to_oci().map_err(internal)?)
            .no_new_privileges(self.security.no_new_privs)
            .rlimits(inputs.settings.rlimits.clone());
        if let Some(adj) = resources::oom_score_adj(resources, inputs.host, warnings)? {
            process = process.oom_score_adj(adj);
        }
        if let Some(profile) = confinement::apparmor(self.security, inputs.host, warnings)? {
            process = process.apparmor_profile(profile);
        }
        if let Some(labels) = &self.labels {
            process = process.selinux_label(&labels.process);
        }
        process.build().map_err(internal)
    }

    fn linux(&self, inputs: &Inputs<'_>) -> Result<Linux, SpecError> {
        let config = inputs.container;
        let asked = config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
        let devices = devices::devices(&config.devices, self.security.privileged, inputs.paths)?;
        let mut resources = resources::resources(asked, inputs.host, inputs.settings)?;
        resources.set_devices(Some(devices.rules));
        let parent = inputs.sandbox.linux.as_ref().map(|linux| linux.cgroup_parent.as_str());
        let path =
            cgroups_path(inputs.cgroup_driver, parent.unwrap_or_default(), inputs.container_id)?;
        // A private view of the hierarchy is what hides the host's cgroups on v2; on v1 and
        // for privileged containers workloads expect the host's, as with containerd.
        let cgroup = inputs.host.cgroup_v2 && !self.security.privileged;
        let namespaces = namespaces::namespaces(
            self.modes,
            &inputs.pod.namespaces,
            inputs.target_pid_namespace,
            cgroup,
        )?;
        let (masked, readonly) = confinement::paths(self.security, self.modes.user);
        let mut linux = LinuxBuilder::default()
            .resources(resources)
            .cgroups_path(path)
            .namespaces(namespaces)
            .devices(devices.nodes)
            .masked_paths(masked)
            .readonly_paths(readonly);
        if self.modes.user {
            let (uids, gids) = self.user_mappings()?;
            linux = linux.uid_mappings(uids).gid_mappings(gids);
        }
        if let Some(propagation) = self.mounts.rootfs_propagation {
            linux = linux.rootfs_propagation(propagation);
        }
        if let Some(labels) = &self.labels {
            linux = linux.mount_label(&labels.mount);
        }
        let seccomp = confinement::seccomp(
            self.security,
            &self.capabilities,
            inputs.localhost_seccomp,
            inputs.host,
            inputs.settings,
        )?;
        if let Some(seccomp) = seccomp {
            linux = linux.seccomp(seccomp);
        }
        linux.build().map_err(internal)
    }

    fn user_mappings(&self) -> Result<(IdMappings, IdMappings), SpecError> {
        let field = "linux.security_context.namespace_options.userns_options";
        let options = self.security.namespace_options.clone().unwrap_or_default();
        let options = options.userns_options.unwrap_or_default();
        Ok((
            namespaces::mappings(&options.uids, &format!("{field}.uids"))?,
            namespaces::mappings(&options.gids, &format!("{field}.gids"))?,
        ))
    }

    fn spec(
        &self,
        inputs: &Inputs<'_>,
        process: Process,
        linux: Linux,
    ) -> Result<Spec, OciSpecError> {
        let root = RootBuilder::default()
            .path(inputs.rootfs)
            .readonly(self.security.readonly_rootfs)
            .build()?;
        let mut spec = SpecBuilder::default()
            .version(OCI_VERSION)
            .root(root)
            .mounts(self.mounts.list.clone())
            .process(process)
            .linux(linux)
            .annotations(annotations(inputs))
            .build()?;
        // The name lives in the pod's UTS namespace; setting it again would need rights there.
        spec.set_hostname(None);
        Ok(spec)
    }
}

type IdMappings = Vec<oci_spec::runtime::LinuxIdMapping>;

#[allow(clippy::needless_pass_by_value, reason = "used as map_err's function")]
fn internal(error: OciSpecError) -> SpecError {
    SpecError::invalid("linux", error.to_string())
}

fn pod_security<'a>(
    inputs: &Inputs<'a>,
) -> Option<&'a pinion_cri_proto::v1::LinuxSandboxSecurityContext> {
    inputs.sandbox.linux.as_ref()?.security_context.as_ref()
}

fn pod_namespaces<'a>(inputs: &Inputs<'a>) -> Option<&'a pinion_cri_proto::v1::NamespaceOption> {
    pod_security(inputs)?.namespace_options.as_ref()
}

/// A privileged container needs a privileged pod: admission looks at the pod.
fn check_privileged(
    security: &LinuxContainerSecurityContext,
    inputs: &Inputs<'_>,
) -> Result<(), SpecError> {
    if security.privileged && !pod_security(inputs).is_some_and(|pod| pod.privileged) {
        let reason = "a privileged container in a pod that is not privileged";
        return Err(SpecError::invalid("linux.security_context.privileged", reason));
    }
    Ok(())
}

/// Ids become path components and cgroup names.
fn check_names(inputs: &Inputs<'_>) -> Result<(), SpecError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
    let id = inputs.container_id;
    if id.is_empty() || id.len() > 128 || !id.chars().all(plain) {
        return Err(SpecError::invalid("container_id", format!("{id:?} is no container id")));
    }
    if !inputs.rootfs.is_absolute() {
        let reason = format!("{} is not absolute", inputs.rootfs.display());
        return Err(SpecError::invalid("rootfs", reason));
    }
    Ok(())
}
