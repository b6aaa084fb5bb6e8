//! Interrupts and the container's CPUs, by `/proc/irq/<n>` and `/proc/interrupts`.
//!
//! Three sorts of interrupt touch a CPU that is to be quiet: one that may be served there
//! although it could go elsewhere (the promise is broken); one that the kernel does not let go
//! elsewhere (*residual*, listed); and one that has been sent away and moves with its next
//! occurrence, which is how interrupts without remapping hardware are moved (*pending*,
//! listed).

use pinion_lease::{Setting, irq};
use pinion_topology::CpuSet;

use super::{IrqQuiet, Subject, tasks};
use crate::{Host, Reason, Term, TermName, files};

const SHOWN: usize = 8;

pub(super) fn quiet(host: &Host, subject: &Subject) -> Term {
    let cpus = subject.cpus.clone().unwrap_or_default();
    let asked = match subject.irqs {
        IrqQuiet::Any => None,
        IrqQuiet::Steerable => Some(format!("no interrupt on CPUs {cpus} that can be elsewhere")),
        IrqQuiet::All => Some(format!("no interrupt on CPUs {cpus}")),
    };
    let mut term = Term::new(TermName::IrqQuiet, asked);
    if cpus.is_empty() {
        term.fail(Reason::NoCpus, "the container has no CPU list");
        return term;
    }
    default_mask(&mut term, host, &cpus);
    let touching = Touching::find(host, subject, &cpus);
    term.note("interrupts on the CPUs", touching.served.to_string());
    if !touching.residual.is_empty() {
        term.note("residual", abridged(&touching.residual));
    }
    if !touching.pending.is_empty() {
        term.note("pending, move when they next occur", abridged(&touching.pending));
    }
    if let Some(counted) = counted(host, &cpus) {
        term.note("device interrupts counted", counted);
    }
    if let Some(pid) = tasks::named(&host.proc(), "irqbalance") {
        let advice = "it rewrites affinities by its own policy, and they are rewritten again \
                      within a second; ban the CPUs in its configuration";
        term.note("irqbalance", format!("runs as process {pid}: {advice}"));
    }
    if !touching.steerable.is_empty() {
        let detail = format!("may be served on the CPUs: {}", abridged(&touching.steerable));
        term.fail(Reason::IrqsOnCpus, detail);
    }
    if !touching.residual.is_empty() && subject.irqs == IrqQuiet::All {
        let detail = format!(
            "the kernel does not let these go elsewhere: {}; choose other CPUs",
            abridged(&touching.residual)
        );
        term.fail(Reason::IrqsUnsteerable, detail);
    }
    term
}

fn default_mask(term: &mut Term, host: &Host, cpus: &CpuSet) {
    let path = Setting::DefaultIrqAffinity.path(&host.root);
    let Ok(Some(default)) = files::read(&path) else { return };
    term.note("default_smp_affinity", &default);
    if CpuSet::from_mask(&default).is_ok_and(|mask| !mask.is_disjoint(cpus)) {
        term.fail(Reason::IrqsOnCpus, "new interrupts may be routed to the CPUs");
    }
}

fn abridged(names: &[String]) -> String {
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// The interrupts with a handler that touch the CPUs, by sort.
#[derive(Debug, Default)]
struct Touching {
    steerable: Vec<String>,
    residual: Vec<String>,
    pending: Vec<String>,
    /// Those served on the CPUs now, whatever their sort.
    served: usize,
}

impl Touching {
    fn find(host: &Host, subject: &Subject, cpus: &CpuSet) -> Self {
        let mut touching = Self::default();
        let overlaps = |set: &Option<CpuSet>| set.as_ref().is_some_and(|s| !s.is_disjoint(cpus));
        for number in irq::numbers(&host.root) {
            let irq = irq::read(&host.root, number);
            let (allowed, effective) = (overlaps(&irq.allowed), overlaps(&irq.effective));
            if irq.handlers.is_empty() || !(allowed || effective) {
                continue;
            }
            touching.served += usize::from(effective);
            match subject.unsteerable.get(&number) {
                // Not there now, and it does not move: no business of these CPUs.
                Some(_) if !effective && irq.effective.is_some() => {}
                Some(words) => touching.residual.push(format!("{}: {words}", irq.title())),
                None if allowed => touching.steerable.push(irq.title()),
                None => touching.pending.push(irq.title()),
            }
        }
        touching
    }
}

/// How often device interrupts have occurred on each of the CPUs since the boot.
fn counted(host: &Host, cpus: &CpuSet) -> Option<String> {
    let table = files::read(&host.proc().join("interrupts")).ok()??;
    let mut lines = table.lines();
    let columns: Vec<u32> = lines
        .next()?
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("CPU")?.parse().ok())
        .collect();
    let mut sums = vec![0u64; columns.len()];
    for line in lines {
        let Some((name, counts)) = line.split_once(':') else { continue };
        if name.trim().parse::<u32>().is_err() {
            continue; // NMI, LOC and the like are the CPU's own
        }
        for (sum, count) in sums.iter_mut().zip(counts.split_whitespace()) {
            *sum += count.parse().unwrap_or(0);
        }
    }
    let of = columns.into_iter().zip(sums).filter(|(cpu, _)| cpus.contains(*cpu));
    Some(of.map(|(cpu, sum)| format!("cpu{cpu}={sum}")).collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testtree::Tree;

    fn irq(tree: &Tree, number: u32, allowed: &str, effective: &str, handler: Option<&str>) {
        tree.file(&format!("proc/irq/{number}/smp_affinity_list"), allowed);
        tree.file(&format!("proc/irq/{number}/effective_affinity_list"), effective);
        if let Some(handler) = handler {
            tree.file(&format!("proc/irq/{number}/{handler}/x"), "");
        }
    }

    fn term(tree: &Tree, irqs: IrqQuiet, unsteerable: &[u32]) -> Term {
        let subject = Subject {
            cpus: Some("2-3".parse().unwrap()),
            irqs,
            unsteerable: unsteerable.iter().map(|irq| (*irq, "EIO".to_owned())).collect(),
            ..Subject::default()
        };
        quiet(&tree.host("6.12"), &subject)
    }

    #[test]
    fn only_interrupts_with_a_handler_on_the_cpus_are_listed() {
        let tree = Tree::new();
        irq(&tree, 24, "0-7", "2", Some("virtio0"));
        irq(&tree, 3, "0-7", "2-3", None);
        irq(&tree, 25, "0", "0", Some("ahci"));
        tree.file("proc/irq/default_smp_affinity", "f3");
        let term = term(&tree, IrqQuiet::Any, &[]);
        assert!(!term.in_force && term.asked.is_none());
        assert_eq!(term.reason.as_deref(), Some("may be served on the CPUs: 24 (virtio0)"));
        assert_eq!(term.evidence["interrupts on the CPUs"], "1");
    }

    #[test]
    fn what_cannot_move_is_residual_and_fails_only_who_wants_none_at_all() {
        let tree = Tree::new();
        irq(&tree, 9, "0-7", "2", Some("acpi"));
        irq(&tree, 10, "0-7", "1", Some("elsewhere"));
        irq(&tree, 30, "0-1,4-7", "3", Some("virtio1"));
        tree.file("proc/irq/default_smp_affinity", "f3");
        let steerable = term(&tree, IrqQuiet::Steerable, &[9, 10]);
        assert!(steerable.in_force, "{steerable:?}");
        assert_eq!(steerable.evidence["residual"], "9 (acpi): EIO");
        assert_eq!(steerable.evidence["pending, move when they next occur"], "30 (virtio1)");
        let all = term(&tree, IrqQuiet::All, &[9, 10]);
        assert_eq!(all.code, Some(Reason::IrqsUnsteerable));
    }

    #[test]
    fn a_default_mask_over_the_cpus_is_a_failure() {
        let tree = Tree::new();
        tree.file("proc/irq/default_smp_affinity", "ff");
        let failed = term(&tree, IrqQuiet::Steerable, &[]);
        assert_eq!(failed.code, Some(Reason::IrqsOnCpus));
    }

    #[test]
    fn device_interrupts_are_counted_per_cpu() {
        let tree = Tree::new();
        let table = "           CPU0       CPU2       CPU3\n  1:          5          7          0   IO-APIC  i8042\n\
                     24:          1          2          3   PCI-MSI virtio0\nLOC:          9          9          9   Local timer interrupts\n";
        tree.file("proc/interrupts", table);
        let counted = counted(&tree.host("6.12"), &"2-3".parse().unwrap());
        assert_eq!(counted.as_deref(), Some("cpu2=9 cpu3=3"));
    }
}
