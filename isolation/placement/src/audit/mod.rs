//! Judges a container by what the kernel says now, and by nothing else.
//!
//! Each submodule reads for one term. A file that cannot be read makes its term fail; a file
//! that this kernel does not have is left out of the evidence.

mod cpus;
mod hugepages;
mod irq;
mod memory;
mod power;
mod quota;
mod schedstat;
mod tasks;

use std::collections::BTreeMap;
use std::path::PathBuf;

use pinion_topology::{CpuSet, NodeSet, PageSize, Topology};
use serde::{Deserialize, Serialize};

pub use hugepages::held as hugepages_held;
pub(crate) use hugepages::{held_of, reserved};

use crate::{Grant, Host, PartitionKind, Reason, Receipt, Request, Target, Term, TermName};

/// Which interrupts are to stay off a container's CPUs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IrqQuiet {
    /// None in particular.
    #[default]
    Any,
    /// Every one that the kernel lets go elsewhere; the rest is listed.
    Steerable,
    /// Every single one.
    All,
}

/// A container and what it was promised.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// Its cgroup v2 directory, relative to the mount point.
    pub cgroup: Option<PathBuf>,
    /// Its cgroup v1 directories, absolute, by controller.
    pub v1: BTreeMap<String, PathBuf>,
    /// Its CPUs.
    pub cpus: Option<CpuSet>,
    /// Its memory nodes.
    pub mems: Option<NodeSet>,
    /// The kind of partition its CPUs are to be.
    pub partition: Option<PartitionKind>,
    /// Whether CPU quotas were to be lifted, as a partition implies.
    #[serde(default)]
    pub unthrottled: bool,
    /// Its hugetlb limits in bytes.
    pub hugepage_limits: BTreeMap<PageSize, u64>,
    /// The huge pages granted to it.
    pub grants: Vec<Grant>,
    /// Which interrupts were to be kept off its CPUs.
    #[serde(default)]
    pub irqs: IrqQuiet,
    /// Interrupts that the kernel refused to move, with its words.
    #[serde(default)]
    pub unsteerable: BTreeMap<u32, String>,
    /// The frequency governor its CPUs were to have.
    #[serde(default)]
    pub governor: Option<String>,
    /// The wake-up latency limit its CPUs were to have, as the kernel writes it.
    #[serde(default)]
    pub latency: Option<String>,
    /// Whether anything missing is a violation.
    pub strict: bool,
    /// A process of it, for the residency of its memory.
    pub pid: Option<i32>,
}

impl Subject {
    /// What this target was promised under this request.
    #[must_use]
    pub fn new(target: &Target, request: &Request) -> Self {
        Self {
            cgroup: target.cgroup.clone(),
            v1: target.v1.clone(),
            cpus: target.cpus.clone().filter(|cpus| !cpus.is_empty()),
            mems: target.mems.clone().filter(|mems| !mems.is_empty()),
            partition: request.partition,
            unthrottled: request.unthrottled,
            hugepage_limits: target.hugepages.clone(),
            grants: request.prefault.clone(),
            irqs: IrqQuiet::Any,
            unsteerable: BTreeMap::new(),
            governor: None,
            latency: None,
            strict: request.strict,
            pid: None,
        }
    }

    /// Its cgroup v2 directory, absolute, if the cpuset controller is on v2.
    pub(crate) fn v2(&self, host: &Host) -> Option<PathBuf> {
        let cgroup = self.cgroup.as_ref()?;
        Some(host.v2_with_cpuset()?.join(cgroup.strip_prefix("/").unwrap_or(cgroup)))
    }
}

/// Reads the kernel and judges every term.
#[must_use]
pub fn audit(host: &Host, subject: &Subject) -> Receipt {
    let terms = match Topology::read_from(&host.root) {
        Ok(topology) => vec![
            cpus::exclusive(host, subject, &topology),
            cpus::whole_cores(host, subject, &topology),
            quota::no_throttling(host, subject),
            memory::locality(host, subject, &topology),
            hugepages::term(host, subject, &topology),
            irq::quiet(host, subject),
            power::power(host, subject),
            kernel(host),
        ],
        Err(error) => unreadable(subject, &error.to_string()),
    };
    Receipt::new(&host.kernel.release, subject.strict, terms)
}

/// Without a topology nothing can be confirmed.
fn unreadable(subject: &Subject, error: &str) -> Vec<Term> {
    let asked = subject.partition.is_some().then(|| "yes".to_owned());
    let mut cpus = Term::new(TermName::ExclusiveCpus, asked);
    cpus.fail(Reason::Unreadable, format!("the topology cannot be read: {error}"));
    vec![cpus]
}

fn kernel(host: &Host) -> Term {
    let mut term = Term::new(TermName::Kernel, None);
    term.note("release", &host.kernel.release);
    term.fail(Reason::SharedKernel, "the container shares the host's kernel");
    term
}
