//! A pod's machine: what cannot be had in one, its plan, and the proof that it is one.

use std::fs;
use std::path::PathBuf;

use pinion_cri_proto::v1::{LinuxContainerResources, NamespaceMode};
use pinion_microvm::machine::{Accelerator, Machine, Processors};
use pinion_microvm::plan::{Jail, Plan, Share};

use super::{Guest, Prepared};
use crate::annotations::MachineWishes;
use crate::config::Vm;
use crate::error::{Context, Error, Kind, Result};
use crate::node::Node;
use crate::pod::spec_error;
use crate::record::Sandbox;

/// What QEMU itself needs beside the guest's memory is the pod's overhead, not the guest's.
const LEAST_MEMORY: u64 = 128;

/// Refuses what a guest cannot give, before anything is made. Pure.
pub(crate) fn check(sandbox: &Sandbox) -> Result<()> {
    let namespaces = sandbox.namespaces();
    let host = |mode: NamespaceMode| mode == NamespaceMode::Node;
    let field = "linux.security_context.namespace_options";
    for (name, wanted, why) in [
        ("network", host(namespaces.network()), "a guest has a network stack of its own"),
        ("pid", host(namespaces.pid()), "a guest has processes of its own"),
        ("ipc", host(namespaces.ipc()), "a guest has IPC objects of its own"),
    ] {
        if wanted {
            return Err(Error::invalid(format!(
                "{field}.{name}: the host's namespace cannot be had under handler pinion-vm: {why}"
            )));
        }
    }
    let users = namespaces.userns_options.as_ref().map_or(NamespaceMode::Node, |u| u.mode());
    if !host(users) {
        return Err(Error::invalid(format!(
            "{field}.userns_options: not under handler pinion-vm: root of a guest is nobody on \
             the host already"
        )));
    }
    MachineWishes::read(&sandbox.config.annotations).map(drop)
}

/// Where the plan of a pod's machine is.
pub(crate) fn plan_path(node: &Node, sandbox: &Sandbox) -> PathBuf {
    node.paths.pod(&sandbox.id).path().join("machine.json")
}

/// Makes the machine's cgroup and writes its plan. Blocks.
pub(crate) fn write_plan(node: &Node, sandbox: &Sandbox, prepared: &Prepared) -> Result<()> {
    let directory = node.paths.pod(&sandbox.id);
    let size = size(sandbox, &node.config.vm)?;
    let hostname =
        pinion_spec::pod::hostname(&sandbox.config, &node.facts.hostname).map_err(spec_error)?;
    let sysctls = pinion_spec::pod::sysctls(&sandbox.config).map_err(spec_error)?;
    let sysctls = sysctls.net.into_iter().chain(sysctls.ipc);
    let plan = Plan {
        machine: Machine {
            emulator: prepared.emulator.clone(),
            accelerator: prepared.accelerator,
            kernel: prepared.kernel.clone(),
            initramfs: prepared.initramfs.clone(),
            processors: Processors { count: size.cpus, threads: 1 },
            memory: size.memory,
            huge: None,
        },
        namespace: Some(directory.namespaces().join("net")),
        cgroups: node.cgroups.make_machine(&sandbox.cgroup_parent)?,
        user: Some((user(&sandbox.id), user(&sandbox.id))),
        cpus: String::new(),
        jail: Some(jail(prepared, prepared.accelerator, directory.path().join("jail"))?),
        share: prepared
            .files
            .clone()
            .map(|program| Share { program, directory: directory.path().join("share") }),
        hostname,
        files: vec![directory.hosts(), directory.hostname(), directory.resolv_conf()],
        sysctls: sysctls.map(|s| (s.path.to_string_lossy().into_owned(), s.value)).collect(),
        shm_bytes: node.config.runtime.shm_size,
        boot_limit: node.config.vm.boot_seconds.saturating_mul(1000),
    };
    let path = plan_path(node, sandbox);
    let what = || format!("write {}", path.display());
    let json = serde_json::to_vec_pretty(&plan).context(what)?;
    pinion_sys::atomic_file::write_volatile(&path, &json, 0o600).context(what)
}

/// The user that a pod's machine runs as: one of sixteen million that nobody else has, so that
/// machines can neither signal nor trace each other. Pure.
fn user(pod: &str) -> u32 {
    const FIRST: u32 = 0x7000_0000;
    let digits = pod.get(..6).unwrap_or_default();
    FIRST + u32::from_str_radix(digits, 16).unwrap_or(0)
}

/// What a machine sees of the host: its program, libraries, firmware, kernel and initramfs.
pub(super) fn jail(prepared: &Prepared, how: Accelerator, root: PathBuf) -> Result<Jail> {
    fs::create_dir_all(&root).context(|| format!("create {}", root.display()))?;
    let emulator = &prepared.emulator;
    let mut visible: Vec<PathBuf> = [
        "/usr",
        "/lib",
        "/lib64",
        "/bin",
        "/sbin",
        "/etc/ld.so.cache",
        "/dev/null",
        "/dev/urandom",
    ]
    .map(PathBuf::from)
    .to_vec();
    visible.extend(emulator.firmware.iter().cloned());
    visible.extend(emulator.modules.clone());
    visible.extend(prepared.visible.iter().cloned());
    visible.extend([&emulator.program, &prepared.kernel, &prepared.initramfs].map(Clone::clone));
    let mut group = None;
    if how == Accelerator::Kvm {
        use std::os::unix::fs::MetadataExt;
        let device = PathBuf::from("/dev/kvm");
        let metadata = fs::metadata(&device).context(|| "stat /dev/kvm".to_string())?;
        group = Some(metadata.gid());
        visible.push(device);
    }
    Ok(Jail { root, visible, group })
}

/// Processors and MiB of memory.
#[derive(Debug, PartialEq, Eq)]
struct Size {
    cpus: u32,
    memory: u64,
}

/// The size of a pod's machine: as annotated; else what its containers may use together, as
/// the pod's resources say; but no less than the configuration's minimum. Pure.
fn size(sandbox: &Sandbox, config: &Vm) -> Result<Size> {
    let wishes = MachineWishes::read(&sandbox.config.annotations)?;
    let resources = sandbox.config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    let none = LinuxContainerResources::default();
    let resources = resources.unwrap_or(&none);
    let quota = match (resources.cpu_quota, resources.cpu_period) {
        (quota, period) if quota > 0 && period > 0 => {
            u32::try_from((quota + period - 1) / period).unwrap_or(u32::MAX)
        }
        _ => 0,
    };
    let limit = u64::try_from(resources.memory_limit_in_bytes).unwrap_or(0).div_ceil(1 << 20);
    let cpus = wishes.cpus.unwrap_or_else(|| quota.max(config.cpus));
    // What the guest's kernel takes for itself comes on top of what containers may use.
    let for_containers = if limit == 0 { 0 } else { limit + LEAST_MEMORY };
    let memory = wishes.memory.unwrap_or_else(|| for_containers.max(config.memory));
    if cpus == 0 || cpus > 255 {
        return Err(Error::invalid(format!("{cpus} processors; a guest has 1 to 255")));
    }
    if memory < LEAST_MEMORY {
        return Err(Error::invalid(format!(
            "{memory} MiB of memory; a guest needs {LEAST_MEMORY} at least"
        )));
    }
    Ok(Size { cpus, memory })
}

/// The kernel term: what runs in the machine is not the host's kernel.
pub(crate) fn verify(guest: &Guest) -> Result<()> {
    let file = "/proc/sys/kernel/random/boot_id";
    let host = fs::read_to_string(file).context(|| format!("read {file}"))?;
    differs(guest, host.trim())
}

fn differs(guest: &Guest, host: &str) -> Result<()> {
    if guest.boot_id.is_empty() || guest.boot_id == host {
        return Err(Error::new(
            Kind::Refused,
            format!(
                "kernel: the pod's boot id {:?} is the host's; it has no kernel of its own",
                guest.boot_id
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Wire;
    use pinion_cri_proto::v1;

    fn pod(resources: LinuxContainerResources, annotations: &[(&str, &str)]) -> Sandbox {
        let linux = v1::LinuxPodSandboxConfig { resources: Some(resources), ..Default::default() };
        let annotations =
            annotations.iter().map(|(k, v)| ((*k).to_string(), (*v).to_string())).collect();
        let config = v1::PodSandboxConfig { linux: Some(linux), annotations, ..Default::default() };
        Sandbox { config: Wire(config), ..Default::default() }
    }

    #[test]
    fn a_machine_is_as_large_as_its_containers_together() {
        let config = Vm { cpus: 1, memory: 256, ..Vm::default() };
        let nothing = pod(LinuxContainerResources::default(), &[]);
        assert_eq!(size(&nothing, &config).unwrap(), Size { cpus: 1, memory: 256 });
        let limits = LinuxContainerResources {
            cpu_quota: 250_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 1 << 30,
            ..Default::default()
        };
        let sized = size(&pod(limits.clone(), &[]), &config).unwrap();
        assert_eq!(sized, Size { cpus: 3, memory: 1024 + 128 });
        let wishes = [("vm.pinion.dev/cpus", "2"), ("vm.pinion.dev/memory-mib", "512")];
        let sized = size(&pod(limits, &wishes), &config).unwrap();
        assert_eq!(sized, Size { cpus: 2, memory: 512 });
        let small = pod(LinuxContainerResources::default(), &[("vm.pinion.dev/memory-mib", "16")]);
        assert!(size(&small, &config).is_err());
    }

    #[test]
    fn the_hosts_namespaces_are_refused_by_name() {
        let mut sandbox = pod(LinuxContainerResources::default(), &[]);
        check(&sandbox).unwrap();
        let options =
            v1::NamespaceOption { network: NamespaceMode::Node.into(), ..Default::default() };
        let security = v1::LinuxSandboxSecurityContext {
            namespace_options: Some(options),
            ..Default::default()
        };
        sandbox.config.0.linux.get_or_insert_default().security_context = Some(security);
        let text = check(&sandbox).unwrap_err().to_string();
        assert!(text.contains("network") && text.contains("network stack of its own"), "{text}");
    }

    #[test]
    fn the_hosts_boot_id_is_no_kernel_of_its_own() {
        let guest = |id: &str| Guest { boot_id: id.into(), ..Guest::default() };
        assert!(differs(&guest("a"), "b").is_ok());
        assert_eq!(differs(&guest("b"), "b").unwrap_err().kind(), Kind::Refused);
        assert_eq!(differs(&guest(""), "b").unwrap_err().kind(), Kind::Refused);
    }
}
