//! The pod annotations Pinion honours.
//!
//! | annotation | value | meaning |
//! |---|---|---|
//! | `cpu.pinion.dev/exclusive` | `true`, `false` | every container of the pod owns its cpuset alone, or none does whatever its requests look like |
//! | `hugepages.pinion.dev/prefault` | `true`, `false` | prove the granted hugepages by touching them before the container starts; default: for strict pods |
//! | `irq.pinion.dev/quiet` | `true`, `false`, `all` | keep interrupts off exclusive CPUs, those that can be moved (the default) or every single one |
//! | `hugepages.pinion.dev/mount` | `true`, `false` | mount a hugetlbfs for each size at `/dev/hugepages` |
//! | `vm.pinion.dev/cpus` | a number | processors of the pod's machine, under handler `pinion-vm`; default: what the pod's resources come to |
//! | `vm.pinion.dev/memory-mib` | a number | MiB of memory of that machine; default likewise |
//! | `isolation.pinion.dev/strict` | `true`, `false` | as the `pinion-strict` handler: a container starts only if every term is in force |
//!
//! CRI-O's annotations for high performance mean what they mean there, and are proven:
//!
//! | annotation | value | meaning |
//! |---|---|---|
//! | `cpu-load-balancing.crio.io` | `disable`, `enable` | exclusive CPUs, or not |
//! | `cpu-quota.crio.io` | `disable`, `enable` | no CPU quota on container and pod |
//! | `irq-load-balancing.crio.io` | `disable`, `enable` | `irq.pinion.dev/quiet` |
//! | `cpu-c-states.crio.io` | `disable`, `enable`, `max_latency:<µs>` | the wake-up latency the CPUs may have |
//! | `cpu-freq-governor.crio.io` | a governor | the CPUs' frequency governor |
//! | `cpu-shared.crio.io` | `enable`, `disable` | shared CPUs beside its own, which are then not isolated; refused where strict, see [`Wishes::shared`] |
//!
//! For one container the name is followed by `.<container>` (Pinion's) or `/<container>`
//! (CRI-O's); that wins over the pod's, and Pinion's wins over CRI-O's. They are read from the
//! pod, never from the image, and a value that is none of these is an error: a misspelt wish
//! for isolation must not pass as no wish.

use std::collections::HashMap;

use pinion_placement::IrqQuiet;

use crate::error::{Error, Result};

const EXCLUSIVE: &str = "cpu.pinion.dev/exclusive";
const PREFAULT: &str = "hugepages.pinion.dev/prefault";
const QUIET: &str = "irq.pinion.dev/quiet";
const STRICT: &str = "isolation.pinion.dev/strict";

const LOAD_BALANCING: &str = "cpu-load-balancing.crio.io";
const QUOTA: &str = "cpu-quota.crio.io";
const IRQ_LOAD_BALANCING: &str = "irq-load-balancing.crio.io";
const C_STATES: &str = "cpu-c-states.crio.io";
const MOUNT: &str = "hugepages.pinion.dev/mount";
const GOVERNOR: &str = "cpu-freq-governor.crio.io";
const SHARED: &str = "cpu-shared.crio.io";
const VM_CPUS: &str = "vm.pinion.dev/cpus";
const VM_MEMORY: &str = "vm.pinion.dev/memory-mib";

/// What a pod's annotations ask of its machine. `None`: nothing said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct MachineWishes {
    /// Processors.
    pub(crate) cpus: Option<u32>,
    /// MiB of memory.
    pub(crate) memory: Option<u64>,
}

impl MachineWishes {
    /// Reads the pod's annotations.
    pub(crate) fn read(annotations: &HashMap<String, String>) -> Result<Self> {
        Ok(Self { cpus: number(annotations, VM_CPUS)?, memory: number(annotations, VM_MEMORY)? })
    }
}

fn number<T: std::str::FromStr>(
    annotations: &HashMap<String, String>,
    key: &str,
) -> Result<Option<T>> {
    let Some(text) = annotations.get(key) else { return Ok(None) };
    match text.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Err(Error::invalid(format!("annotation {key}: {text:?} is not a number"))),
    }
}

/// What a pod's annotations ask for on behalf of one container. `None`: nothing said.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Wishes {
    /// Exclusive CPUs.
    pub(crate) exclusive: Option<bool>,
    /// Hugepages proven before the start.
    pub(crate) prefault: Option<bool>,
    /// A hugetlbfs for each size it may use.
    pub(crate) mount: bool,
    /// All or nothing.
    pub(crate) strict: Option<bool>,
    /// Interrupts kept off its exclusive CPUs.
    pub(crate) irqs: Option<IrqQuiet>,
    /// No CPU quota.
    pub(crate) unthrottled: bool,
    /// The wake-up latency limit as the kernel writes it: `n/a`, `0` or microseconds.
    pub(crate) latency: Option<String>,
    /// The frequency governor.
    pub(crate) governor: Option<String>,
    /// Shared CPUs beside the exclusive ones. One cgroup cannot be an isolated partition and
    /// have CPUs outside it, and a thread cannot move itself between two groups from inside a
    /// container. So the container's own CPUs are kept from other containers and from us, but
    /// not from other tasks of the node: degraded, or refused where strict.
    pub(crate) shared: bool,
}

impl Wishes {
    /// Whether anything is asked for that needs more than limits.
    pub(crate) fn any(&self) -> bool {
        let Self { exclusive, irqs, unthrottled, latency, governor, .. } = self;
        let quiet = irqs.is_some_and(|irqs| irqs != IrqQuiet::Any);
        *exclusive == Some(true) || quiet || *unthrottled || latency.is_some() || governor.is_some()
    }

    /// Reads the pod's annotations for the container named `container`.
    pub(crate) fn read(annotations: &HashMap<String, String>, container: &str) -> Result<Self> {
        // CPUs chosen here are chosen to be exclusive.
        let counted = crate::contract::cpus::wanted(annotations, container)?.map(|_| true);
        let own = |key| Lookup { annotations, key, separator: '.', container };
        let crio = |key| Lookup { annotations, key, separator: '/', container };
        let balanced = crio(LOAD_BALANCING).one_of(&DISABLE)?;
        let irqs_balanced = crio(IRQ_LOAD_BALANCING).one_of(&DISABLE)?;
        let balanced_irqs = |quiet| if quiet { IrqQuiet::Steerable } else { IrqQuiet::Any };
        Ok(Self {
            exclusive: own(EXCLUSIVE).one_of(&FLAG)?.or(counted).or(balanced),
            mount: own(MOUNT).one_of(&FLAG)?.unwrap_or(false),
            prefault: own(PREFAULT).one_of(&FLAG)?,
            strict: own(STRICT).one_of(&FLAG)?,
            irqs: own(QUIET).one_of(&IRQS)?.or(irqs_balanced.map(balanced_irqs)),
            unthrottled: crio(QUOTA).one_of(&DISABLE)?.unwrap_or(false),
            latency: latency(&crio(C_STATES))?,
            governor: governor(&crio(GOVERNOR))?,
            shared: crio(SHARED).one_of(&ENABLE)?.unwrap_or(false),
        })
    }
}

const FLAG: [(&str, bool); 2] = [("true", true), ("false", false)];
/// CRI-O reads `true` as `disable`, a leftover of the annotations' first form.
const DISABLE: [(&str, bool); 3] = [("disable", true), ("true", true), ("enable", false)];
const ENABLE: [(&str, bool); 2] = [("enable", true), ("disable", false)];
const IRQS: [(&str, IrqQuiet); 3] =
    [("true", IrqQuiet::Steerable), ("false", IrqQuiet::Any), ("all", IrqQuiet::All)];

/// An annotation, the container's own before the pod's.
struct Lookup<'a> {
    annotations: &'a HashMap<String, String>,
    key: &'static str,
    separator: char,
    container: &'a str,
}

impl Lookup<'_> {
    /// The name it was found under, and its value.
    fn find(&self) -> Option<(String, &str)> {
        let own = format!("{}{}{}", self.key, self.separator, self.container);
        let value = |key: String| Some((self.annotations.get(&key)?.as_str(), key));
        let (value, key) = value(own).or_else(|| value(self.key.to_owned()))?;
        Some((key, value))
    }

    /// Its value among those it may have.
    fn one_of<T: Copy>(&self, values: &[(&str, T)]) -> Result<Option<T>> {
        let Some((key, found)) = self.find() else { return Ok(None) };
        let known = values.iter().find(|(word, _)| *word == found);
        let words = || values.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
        known.map(|(_, value)| Some(*value)).ok_or_else(|| wrong(&key, found, &words()))
    }
}

fn wrong(key: &str, found: &str, expected: &str) -> Error {
    Error::invalid(format!("annotation {key}: {found:?} is none of {expected}"))
}

/// `disable` is written `n/a`: no idle state whose latency could be noticed.
fn latency(annotation: &Lookup<'_>) -> Result<Option<String>> {
    let Some((key, found)) = annotation.find() else { return Ok(None) };
    let micros = found.strip_prefix("max_latency:").and_then(|n| n.parse::<u32>().ok());
    match (found, micros) {
        ("disable" | "true", _) => Ok(Some("n/a".into())),
        ("enable", _) => Ok(Some("0".into())),
        // For the kernel 0 is no limit at all, and who writes 0 here wants the opposite.
        (_, Some(0)) => Ok(Some("n/a".into())),
        (_, Some(micros)) => Ok(Some(micros.to_string())),
        _ => Err(wrong(&key, found, "disable, enable, max_latency:<microseconds>")),
    }
}

fn governor(annotation: &Lookup<'_>) -> Result<Option<String>> {
    let Some((key, found)) = annotation.find() else { return Ok(None) };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if found.is_empty() || found.len() > 16 || !found.chars().all(plain) {
        return Err(wrong(&key, found, "the kernel's governors, such as performance"));
    }
    Ok(Some(found.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    fn read(pairs: &[(&str, &str)]) -> Result<Wishes> {
        Wishes::read(&map(pairs), "app")
    }

    #[test]
    fn the_container_s_own_word_wins_over_the_pod_s() {
        let a = map(&[
            ("cpu.pinion.dev/exclusive", "true"),
            ("cpu.pinion.dev/exclusive.sidecar", "false"),
            ("cpu-quota.crio.io", "disable"),
            ("cpu-quota.crio.io/sidecar", "enable"),
        ]);
        let (app, sidecar) =
            (Wishes::read(&a, "app").unwrap(), Wishes::read(&a, "sidecar").unwrap());
        assert_eq!((app.exclusive, sidecar.exclusive), (Some(true), Some(false)));
        assert_eq!((app.unthrottled, sidecar.unthrottled), (true, false));
    }

    #[test]
    fn crio_s_words_are_understood_and_pinion_s_win() {
        let wishes = read(&[
            ("cpu-load-balancing.crio.io", "disable"),
            ("irq-load-balancing.crio.io", "true"),
            ("cpu-c-states.crio.io", "max_latency:10"),
            ("cpu-freq-governor.crio.io", "performance"),
            ("cpu-shared.crio.io/app", "enable"),
        ]);
        let wishes = wishes.unwrap();
        assert_eq!((wishes.exclusive, wishes.irqs), (Some(true), Some(IrqQuiet::Steerable)));
        assert_eq!(wishes.latency.as_deref(), Some("10"));
        assert_eq!(wishes.governor.as_deref(), Some("performance"));
        assert!(wishes.shared);
        let both =
            [("cpu-load-balancing.crio.io", "disable"), ("cpu.pinion.dev/exclusive", "false")];
        assert_eq!(read(&both).unwrap().exclusive, Some(false));
    }

    #[test]
    fn no_latency_is_not_no_limit() {
        let latency = |value| read(&[("cpu-c-states.crio.io", value)]).unwrap().latency.unwrap();
        assert_eq!(latency("disable"), "n/a");
        assert_eq!(latency("max_latency:0"), "n/a");
        assert_eq!(latency("enable"), "0");
    }

    #[test]
    fn a_misspelt_value_is_an_error_that_names_the_annotation() {
        for (key, value) in [
            ("isolation.pinion.dev/strict", "yes"),
            ("irq.pinion.dev/quiet.app", "some"),
            ("cpu-quota.crio.io/app", "off"),
            ("irq-load-balancing.crio.io", "housekeeping"),
            ("cpu-c-states.crio.io", "max_latency:x"),
            ("cpu-freq-governor.crio.io", "../x"),
        ] {
            let error = read(&[(key, value)]).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(value), "{error}");
        }
    }

    #[test]
    fn a_machine_s_size_is_a_number_or_an_error() {
        let a = map(&[("vm.pinion.dev/cpus", "2"), ("vm.pinion.dev/memory-mib", "512")]);
        let wishes = MachineWishes::read(&a).unwrap();
        assert_eq!((wishes.cpus, wishes.memory), (Some(2), Some(512)));
        let error = MachineWishes::read(&map(&[("vm.pinion.dev/memory-mib", "512Mi")]));
        assert!(error.unwrap_err().to_string().contains("memory-mib"));
    }

    #[test]
    fn silence_is_no_wish() {
        assert_eq!(read(&[]).unwrap(), Wishes::default());
    }
}
