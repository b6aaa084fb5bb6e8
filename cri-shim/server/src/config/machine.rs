//! What concerns the node itself: the isolation contract, devices, files about it, virtual machines.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The isolation contract.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Isolation {
    /// What happens when a node's pool cannot hold a container's hugepage limit.
    pub hugepages: HugepagePolicy,
    /// Treat a container whose CPU request is whole and matches its cpuset as exclusive.
    pub infer_exclusive: bool,
    /// Keep interrupts off exclusive CPUs unless a pod says otherwise.
    pub steer_interrupts: bool,
    /// CPUs for containers that ask for shared ones beside their own (`cpu-shared.crio.io`);
    /// the node profile's `reserved_cpus` when empty.
    pub shared_cpus: String,
    /// Where kubelet keeps its state: `cpu_manager_state`, `pod-resources/kubelet.sock`.
    pub kubelet_dir: PathBuf,
}

impl Default for Isolation {
    fn default() -> Self {
        Self {
            hugepages: HugepagePolicy::Enforce,
            infer_exclusive: true,
            steer_interrupts: true,
            shared_cpus: String::new(),
            kubelet_dir: "/var/lib/kubelet".into(),
        }
    }
}

/// Pods with a kernel of their own, handler `pinion-vm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Vm {
    /// QEMU; `qemu-system-x86_64` beside this executable, then in `PATH`, when empty.
    pub qemu: PathBuf,
    /// Directories of QEMU's firmware, besides its own.
    pub qemu_data: Vec<PathBuf>,
    /// QEMU's loadable parts, where they are not in its own place.
    pub qemu_modules: PathBuf,
    /// Files and directories that QEMU needs besides `/usr`, `/lib*` and `/bin`: it sees
    /// nothing else of this host.
    pub qemu_files: Vec<PathBuf>,
    /// The guests' kernel, a bzImage or ELF; the newest `/boot/vmlinuz-*` when empty.
    pub kernel: PathBuf,
    /// Its modules; `/lib/modules/<release>` when empty.
    pub kernel_modules: PathBuf,
    /// The guests' first program; `pinion-agent`, found as the monitor is, when empty.
    pub agent: PathBuf,
    /// The guests' OCI runtime, a static program; that of the host when empty.
    pub runtime: PathBuf,
    /// `mke2fs`, which writes root filesystems as disks; found likewise when empty.
    pub mke2fs: PathBuf,
    /// `virtiofsd` (1.10 or later), which serves volumes; found likewise, or at
    /// `/usr/libexec/virtiofsd`, when empty. Without it pods have no volumes.
    pub virtiofsd: PathBuf,
    /// How guests are executed. `auto`: by KVM where a guest comes up under it, else by
    /// translation where `allow_tcg` says so.
    pub accelerator: VmAccelerator,
    /// Whether guests may be executed by translation, some thirty times slower.
    pub allow_tcg: bool,
    /// Seconds a trial guest has to come up under KVM.
    pub kvm_probe_seconds: u64,
    /// Seconds a pod's guest has to come up.
    pub boot_seconds: u64,
    /// Processors of a guest whose pod asks for none.
    pub cpus: u32,
    /// MiB of memory of a guest whose pod asks for none, and the least there is.
    pub memory: u64,
}

impl Default for Vm {
    fn default() -> Self {
        Self {
            qemu: PathBuf::new(),
            qemu_data: Vec::new(),
            qemu_modules: PathBuf::new(),
            qemu_files: Vec::new(),
            kernel: PathBuf::new(),
            kernel_modules: PathBuf::new(),
            agent: PathBuf::new(),
            runtime: PathBuf::new(),
            mke2fs: PathBuf::new(),
            virtiofsd: PathBuf::new(),
            accelerator: VmAccelerator::Auto,
            allow_tcg: false,
            kvm_probe_seconds: 15,
            boot_seconds: 90,
            cpus: 1,
            memory: 256,
        }
    }
}

/// How guests are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmAccelerator {
    /// KVM where it works, else translation where that is allowed.
    Auto,
    /// KVM or not at all.
    Kvm,
    /// Translation, where that is allowed.
    Tcg,
}

/// What happens when a node's pool cannot hold a container's hugepage limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugepagePolicy {
    /// Every container is refused, so that none meets SIGBUS later.
    Enforce,
    /// Only strict containers are refused; the others start and the log says so.
    Report,
}

/// Devices of containers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Device {
    /// Directories with CDI files, by rising priority.
    pub cdi_dirs: Vec<PathBuf>,
    /// PCI functions that pods may have handed over by VFIO: addresses (`0000:41:10.0`), or
    /// vendor and device (`8086:10ca`). None by default: whoever gets one takes it from the
    /// host.
    pub vfio_allow: Vec<String>,
}

impl Default for Device {
    fn default() -> Self {
        Self { cdi_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()], vfio_allow: Vec::new() }
    }
}

/// The node itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NodeFiles {
    /// What the node is declared to be; without the file nothing is.
    pub profile: PathBuf,
    /// Where features are written for Node Feature Discovery, such as
    /// `/etc/kubernetes/node-feature-discovery/features.d/pinion`; nowhere when empty.
    pub features_file: PathBuf,
}

impl Default for NodeFiles {
    fn default() -> Self {
        Self { profile: "/etc/pinion/node.toml".into(), features_file: PathBuf::new() }
    }
}
