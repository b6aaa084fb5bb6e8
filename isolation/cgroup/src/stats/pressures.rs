//! Pressure stall information of one cgroup (Documentation/accounting/psi.rst), for pollers.

use std::path::Path;

use super::Pressure;
use super::parse::pressure;
use crate::Result;

/// Who waited for what; `None` where the kernel does not say (`psi=0`, cgroup v1).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pressures {
    /// For a CPU.
    pub cpu: Option<Pressure>,
    /// For memory.
    pub memory: Option<Pressure>,
    /// For block devices.
    pub io: Option<Pressure>,
}

impl Pressures {
    /// Reads the three files of the v2 cgroup at `directory`.
    pub(crate) fn read(directory: &Path) -> Result<Self> {
        Ok(Self {
            cpu: pressure(directory, "cpu.pressure")?,
            memory: pressure(directory, "memory.pressure")?,
            io: pressure(directory, "io.pressure")?,
        })
    }
}
