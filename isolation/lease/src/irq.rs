//! Interrupts as `/proc/irq` shows them.

use std::fs;
use std::path::Path;

use pinion_topology::CpuSet;

use crate::files;

/// One interrupt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Irq {
    /// Its number.
    pub number: u32,
    /// Who handles it: the names of the directories in its own.
    pub handlers: Vec<String>,
    /// Where it may be served (`smp_affinity_list`).
    pub allowed: Option<CpuSet>,
    /// Where it is served now (`effective_affinity_list`).
    pub effective: Option<CpuSet>,
}

impl Irq {
    /// `24 (virtio0)`, for people.
    #[must_use]
    pub fn title(&self) -> String {
        format!("{} ({})", self.number, self.handlers.join(", "))
    }
}

/// The numbers of all interrupts, in order.
#[must_use]
pub fn numbers(root: &Path) -> Vec<u32> {
    let entries = fs::read_dir(root.join("proc/irq")).into_iter().flatten().flatten();
    let mut numbers: Vec<u32> =
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

/// Reads one interrupt. What is not there is not known.
#[must_use]
pub fn read(root: &Path, number: u32) -> Irq {
    let dir = root.join(format!("proc/irq/{number}"));
    let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
    let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    let handlers =
        entries.filter(is_dir).map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    let list = |name: &str| files::read(&dir.join(name)).ok()??.parse().ok();
    Irq {
        number,
        handlers,
        allowed: list("smp_affinity_list"),
        effective: list("effective_affinity_list"),
    }
}
