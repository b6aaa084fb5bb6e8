//! Interrupts served on the container's CPUs, by `/proc/irq/<n>/effective_affinity_list`.

use std::fs;
use std::path::Path;

use pinion_topology::{CpuSet, Cpus};

use super::Subject;
use crate::{Host, Reason, Term, TermName, files};

const SHOWN: usize = 8;

pub(super) fn quiet(host: &Host, subject: &Subject) -> Term {
    let cpus = subject.cpus.clone().unwrap_or_default();
    let asked = subject.irq_quiet.then(|| format!("no interrupts on CPUs {cpus}"));
    let mut term = Term::new(TermName::IrqQuiet, asked);
    if cpus.is_empty() {
        term.fail(Reason::NoCpus, "the container has no CPU list");
        return term;
    }
    let irqs = host.proc().join("irq");
    let default = files::read(&irqs.join("default_smp_affinity")).ok().flatten();
    if let Some(default) = default {
        term.note("default_smp_affinity", &default);
        let overlaps = |mask: CpuSet| !mask.is_disjoint(&cpus);
        if CpuSet::from_mask(&default).is_ok_and(overlaps) {
            term.fail(Reason::IrqsOnCpus, "new interrupts may be routed to the CPUs");
        }
    }
    let residual = served_on(&irqs, &cpus);
    term.note("interrupts on the CPUs", residual.len().to_string());
    if !residual.is_empty() {
        let shown = residual.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
        let more = residual.len().saturating_sub(SHOWN);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let detail = format!("served on the CPUs: {shown}{more}");
        term.fail(Reason::IrqsOnCpus, detail);
    }
    term
}

/// Interrupts with a handler (a subdirectory named after it) whose effective CPUs overlap.
fn served_on(irqs: &Path, cpus: &CpuSet) -> Vec<String> {
    let mut served = Vec::new();
    for entry in fs::read_dir(irqs).into_iter().flatten().flatten() {
        let dir = entry.path();
        let number = entry.file_name().to_string_lossy().parse::<u32>();
        let Ok(number) = number else { continue };
        let handlers: Vec<String> = fs::read_dir(&dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        let list = |name: &str| files::read_set::<Cpus>(&dir.join(name)).ok().flatten();
        let effective = list("effective_affinity_list").or_else(|| list("smp_affinity_list"));
        let overlaps = effective.is_some_and(|effective| !effective.is_disjoint(cpus));
        if overlaps && !handlers.is_empty() {
            served.push((number, format!("{number} ({})", handlers.join(", "))));
        }
    }
    served.sort();
    served.into_iter().map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testtree::Tree;

    #[test]
    fn only_interrupts_with_a_handler_on_the_cpus_are_listed() {
        let tree = Tree::new();
        for (irq, cpus, handler) in
            [(24, "2", Some("virtio0")), (3, "2-3", None), (25, "0", Some("ahci"))]
        {
            tree.file(&format!("proc/irq/{irq}/effective_affinity_list"), cpus);
            if let Some(handler) = handler {
                tree.file(&format!("proc/irq/{irq}/{handler}/x"), "");
            }
        }
        tree.file("proc/irq/default_smp_affinity", "f3");
        let cpus = Some("2-3".parse().unwrap());
        let subject = Subject { cpus, ..Subject::default() };
        let term = quiet(&tree.host("6.12"), &subject);
        assert!(!term.in_force && term.asked.is_none());
        assert_eq!(term.reason.as_deref(), Some("served on the CPUs: 24 (virtio0)"));
        assert_eq!(term.evidence["interrupts on the CPUs"], "1");
    }
}
