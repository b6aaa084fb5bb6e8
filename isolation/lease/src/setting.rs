//! The settings that can be lent: where each lives and how its text is understood.

use std::fmt;
use std::path::{Path, PathBuf};

use pinion_topology::{CpuSet, PageSize};
use serde::{Deserialize, Serialize};

/// One kernel file that belongs to the whole node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub enum Setting {
    /// CPUs that may serve an interrupt (`/proc/irq/<n>/smp_affinity_list`), a list.
    IrqAffinity {
        /// Its number.
        irq: u32,
    },
    /// CPUs for interrupts yet to come (`/proc/irq/default_smp_affinity`), a mask.
    DefaultIrqAffinity,
    /// The frequency governor of a CPU (`cpufreq/scaling_governor`).
    Governor {
        /// The CPU.
        cpu: u32,
    },
    /// The longest wake-up latency of a CPU in microseconds
    /// (`power/pm_qos_resume_latency_us`): `0` for no limit, `n/a` for none tolerated.
    ResumeLatency {
        /// The CPU.
        cpu: u32,
    },
    /// The driver a PCI device is reserved for (`driver_override`); empty for none.
    DriverOverride {
        /// Its address, such as `0000:00:03.0`.
        device: String,
    },
    /// Huge pages in a node's pool (`nr_hugepages`).
    HugepagePool {
        /// The NUMA node.
        node: u32,
        /// Size of a page.
        size: PageSize,
    },
}

impl Setting {
    /// Its file below `root`, which has `proc` and `sys` in it.
    #[must_use]
    pub fn path(&self, root: &Path) -> PathBuf {
        let cpu_dir = |cpu: &u32| root.join(format!("sys/devices/system/cpu/cpu{cpu}"));
        match self {
            Self::IrqAffinity { irq } => root.join(format!("proc/irq/{irq}/smp_affinity_list")),
            Self::DefaultIrqAffinity => root.join("proc/irq/default_smp_affinity"),
            Self::Governor { cpu } => cpu_dir(cpu).join("cpufreq/scaling_governor"),
            Self::ResumeLatency { cpu } => cpu_dir(cpu).join("power/pm_qos_resume_latency_us"),
            Self::DriverOverride { device } => {
                root.join("sys/bus/pci/devices").join(device).join("driver_override")
            }
            Self::HugepagePool { node, size } => {
                let pool = size.sysfs_name();
                root.join(format!(
                    "sys/devices/system/node/node{node}/hugepages/{pool}/nr_hugepages"
                ))
            }
        }
    }

    /// Whether its text is a set of CPUs.
    #[must_use]
    pub fn is_affinity(&self) -> bool {
        matches!(self, Self::IrqAffinity { .. } | Self::DefaultIrqAffinity)
    }

    /// The CPUs in its text; `None` if it is no affinity or not understood.
    #[must_use]
    pub fn cpus(&self, text: &str) -> Option<CpuSet> {
        match self {
            Self::IrqAffinity { .. } => text.parse().ok(),
            Self::DefaultIrqAffinity => CpuSet::from_mask(text).ok(),
            _ => None,
        }
    }

    /// CPUs as its file takes them.
    #[must_use]
    pub fn text_of(&self, cpus: &CpuSet) -> String {
        match self {
            Self::DefaultIrqAffinity => cpus.mask(),
            _ => cpus.to_string(),
        }
    }

    /// Whether two texts of the file mean the same.
    #[must_use]
    pub fn same(&self, one: &str, other: &str) -> bool {
        let (one, other) = (self.normal(one), self.normal(other));
        match (self.cpus(one), self.cpus(other)) {
            (Some(one), Some(other)) => one == other,
            _ => one == other,
        }
    }

    /// A text of the file as a write takes it.
    pub(crate) fn writable<'a>(&self, text: &'a str) -> &'a str {
        self.normal(text)
    }

    fn normal<'a>(&self, text: &'a str) -> &'a str {
        match (self, text.trim()) {
            (Self::DriverOverride { .. }, "(null)") => "",
            (_, text) => text,
        }
    }
}

impl fmt::Display for Setting {
    /// Its absolute path, which is also its key in a store.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path(Path::new("/")).display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_compared_by_what_they_mean() {
        let mask = Setting::DefaultIrqAffinity;
        assert!(mask.same("ff", "000000ff") && !mask.same("ff", "f3"));
        let list = Setting::IrqAffinity { irq: 1 };
        assert!(list.same("0-1,2", "0-2\n"));
        let driver = Setting::DriverOverride { device: "0000:00:03.0".into() };
        assert!(driver.same("(null)", "") && !driver.same("(null)", "vfio-pci"));
        assert!(!Setting::ResumeLatency { cpu: 0 }.same("0", "n/a"));
    }

    #[test]
    fn the_key_is_the_path() {
        assert_eq!(
            Setting::Governor { cpu: 3 }.to_string(),
            "/sys/devices/system/cpu/cpu3/cpufreq/scaling_governor"
        );
        let pool = Setting::HugepagePool { node: 1, size: "2MB".parse().unwrap() };
        assert_eq!(
            pool.to_string(),
            "/sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages"
        );
    }
}
