//! Pods with a kernel of their own: handler `pinion-vm`.
//!
//! ```text
//!   RunPodSandbox ─▶ refuse what a guest cannot give ─▶ namespaces, CNI ─▶ plan ─▶ monitor --machine
//!                                                                                   │ QEMU, agent
//!                    kernel term: the guest's boot id is not the host's  ◀── hello ─┘
//!   CreateContainer ─▶ root filesystem ─▶ ext4 image (kept per image) ─▶ configuration, adapted
//! ```
//!
//! The kernel term is strict whatever the rest of the contract: a pod of this handler runs on
//! a kernel of its own or not at all. How guests are executed is decided once per boot of the
//! host ([`accelerator`]); translation only where the configuration allows it.

mod accelerator;
mod disk;
mod machine;
mod receipt;
mod resize;
mod spec;
mod usage;

use std::path::PathBuf;
use std::sync::Mutex;

use pinion_microvm::image::Image;
use pinion_microvm::machine::{Accelerator, Emulator};
use pinion_monitor_proto::message;
use serde::{Deserialize, Serialize};

pub(crate) use disk::ensure as ensure_disk;
pub(crate) use machine::{check, plan_path, verify, write_plan};
pub(crate) use receipt::receipt;
pub(crate) use resize::update;
pub(crate) use spec::{adapt_config, lend};
pub(crate) use usage::{Usages, read as read_usages};

/// The guest of a pod, as its record keeps it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Guest {
    /// `/proc/sys/kernel/random/boot_id` inside.
    pub(crate) boot_id: String,
    /// `uname -r` inside.
    pub(crate) release: String,
    /// `kvm` or `tcg`.
    pub(crate) accelerator: String,
    /// Processors.
    pub(crate) cpus: u32,
    /// Bytes of memory.
    pub(crate) memory: u64,
    /// The machine's process.
    pub(crate) pid: i32,
    /// Thread of processor n.
    pub(crate) threads: Vec<i32>,
    /// Microseconds of each phase of the start.
    pub(crate) phases: Vec<(String, u64)>,
    /// Why it is gone, once it is.
    #[serde(default)]
    pub(crate) ended: Option<String>,
}

impl From<message::Guest> for Guest {
    fn from(told: message::Guest) -> Self {
        let phases = told.phases.into_iter().map(|phase| (phase.name, phase.microseconds));
        Self {
            boot_id: told.boot_id,
            release: told.release,
            accelerator: told.accelerator,
            cpus: told.cpus,
            memory: told.memory_bytes,
            pid: told.vmm_pid,
            threads: told.vcpu_threads,
            phases: phases.collect(),
            ended: told.ended.map(|ended| ended.message),
        }
    }
}

/// What every guest of this node is started with.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Prepared {
    image: Image,
    kernel: PathBuf,
    initramfs: PathBuf,
    emulator: Emulator,
    /// What else the machine's process must see of the host.
    visible: Vec<PathBuf>,
    /// What serves files to guests.
    files: Option<PathBuf>,
    accelerator: Accelerator,
}

/// What is prepared once, and who may prepare it.
#[derive(Debug, Default)]
pub(crate) struct Machines {
    prepared: tokio::sync::Mutex<Option<Prepared>>,
    /// One root filesystem is made at a time; others wait for it or find it made.
    making: Mutex<()>,
}
