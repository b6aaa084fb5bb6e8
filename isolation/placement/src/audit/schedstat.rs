//! `/proc/schedstat`: how many scheduling domains each CPU is in (sched-stats(7) of the
//! kernel's documentation). The `domain` lines follow the `cpu` line they belong to.

use std::collections::BTreeMap;

pub(super) fn domains(text: &str) -> BTreeMap<u32, usize> {
    let mut domains = BTreeMap::new();
    let mut current = None;
    for line in text.lines() {
        let word = line.split(' ').next().unwrap_or_default();
        if let Some(cpu) = word.strip_prefix("cpu").and_then(|cpu| cpu.parse().ok()) {
            domains.insert(cpu, 0);
            current = Some(cpu);
        } else if word.starts_with("domain") {
            let count = current.and_then(|cpu| domains.get_mut(&cpu));
            count.into_iter().for_each(|count| *count += 1);
        }
    }
    domains
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domains_belong_to_the_cpu_before_them() {
        let text = "\
version 16
timestamp 4294895938
cpu0 0 0 0 0 0 0 2677926713 361456780 1180
domain0 33 0 0 0
domain1 ff 0 0 0
cpu2 0 0 0 0 0 0 1 1 1
cpu10 0 0 0 0 0 0 1 1 1
domain0 SMT 00000c00 0 0 0";
        assert_eq!(domains(text), BTreeMap::from([(0, 2), (2, 0), (10, 1)]));
    }
}
