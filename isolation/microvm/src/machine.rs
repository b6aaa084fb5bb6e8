//! What a virtual machine is asked to be. Written by who decides, read by who starts it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How the guest's instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// By the processor.
    Kvm,
    /// By translation: some thirty times slower, and shared with nobody all the same.
    Tcg,
}

impl Accelerator {
    /// As QEMU spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// The virtual processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processors {
    /// How many.
    pub count: u32,
    /// Threads of one core: 2 shows the guest pairs of siblings. Divides `count`.
    pub threads: u32,
}

/// Hugepages that the guest's memory is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugeMemory {
    /// Bytes of one page.
    pub page: u64,
    /// Nodes of the host that the pages come from, such as `0-1`; any when empty.
    pub nodes: String,
}

/// The program that is the machine, and what it is started with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Emulator {
    /// `qemu-system-x86_64`.
    pub program: PathBuf,
    /// Directories of firmware (`-L`), besides its own.
    #[serde(default)]
    pub firmware: Vec<PathBuf>,
    /// Where its loadable parts are, if not in its own place.
    #[serde(default)]
    pub modules: Option<PathBuf>,
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// What runs it.
    pub emulator: Emulator,
    /// How.
    pub accelerator: Accelerator,
    /// An ELF kernel with a PVH entry.
    pub kernel: PathBuf,
    /// The first root of the guest.
    pub initramfs: PathBuf,
    /// Processors.
    pub processors: Processors,
    /// MiB of memory.
    pub memory: u64,
    /// Of what the memory is made; ordinary pages if not said.
    #[serde(default)]
    pub huge: Option<HugeMemory>,
}
