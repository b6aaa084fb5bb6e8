//! Changing limits of what runs: CRI's message as OCI resources, and onto a record. Pure.

use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};
use pinion_cri_proto::v1::LinuxContainerResources;

use crate::error::{Error, Result};

/// Lays `change` over `current`: what is zero or empty in a change stays as it is.
pub(crate) fn merge(
    current: &LinuxContainerResources,
    change: &LinuxContainerResources,
) -> LinuxContainerResources {
    let number = |new: i64, old: i64| if new == 0 { old } else { new };
    let text = |new: &String, old: &String| if new.is_empty() { old.clone() } else { new.clone() };
    let mut unified = current.unified.clone();
    unified.extend(change.unified.clone());
    let mut hugepage_limits = current.hugepage_limits.clone();
    for limit in &change.hugepage_limits {
        hugepage_limits.retain(|l| l.page_size != limit.page_size);
        hugepage_limits.push(limit.clone());
    }
    LinuxContainerResources {
        cpu_period: number(change.cpu_period, current.cpu_period),
        cpu_quota: number(change.cpu_quota, current.cpu_quota),
        cpu_shares: number(change.cpu_shares, current.cpu_shares),
        memory_limit_in_bytes: number(change.memory_limit_in_bytes, current.memory_limit_in_bytes),
        oom_score_adj: number(change.oom_score_adj, current.oom_score_adj),
        cpuset_cpus: text(&change.cpuset_cpus, &current.cpuset_cpus),
        cpuset_mems: text(&change.cpuset_mems, &current.cpuset_mems),
        hugepage_limits,
        unified,
        memory_swap_limit_in_bytes: number(
            change.memory_swap_limit_in_bytes,
            current.memory_swap_limit_in_bytes,
        ),
    }
}

/// The change in the form `update --resources -` takes; only what is asked for is set.
pub(crate) fn to_oci(change: &LinuxContainerResources) -> Result<LinuxResources> {
    let mut oci = LinuxResources::default();
    oci.set_cpu(cpu(change)?);
    oci.set_memory(memory(change));
    if !change.hugepage_limits.is_empty() {
        let limits = change.hugepage_limits.iter().map(|asked| {
            let mut limit = LinuxHugepageLimit::default();
            limit.set_page_size(asked.page_size.clone());
            limit.set_limit(i64::try_from(asked.limit).unwrap_or(i64::MAX));
            limit
        });
        oci.set_hugepage_limits(Some(limits.collect()));
    }
    if !change.unified.is_empty() {
        oci.set_unified(Some(change.unified.clone()));
    }
    Ok(oci)
}

fn cpu(change: &LinuxContainerResources) -> Result<Option<LinuxCpu>> {
    let unsigned = |name: &str, value: i64| match u64::try_from(value) {
        Ok(0) => Ok(None),
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(Error::invalid(format!("{name} {value} is negative"))),
    };
    let text = |value: &String| (!value.is_empty()).then(|| value.clone());
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(unsigned("cpu_shares", change.cpu_shares)?);
    cpu.set_period(unsigned("cpu_period", change.cpu_period)?);
    cpu.set_quota((change.cpu_quota != 0).then_some(change.cpu_quota));
    cpu.set_cpus(text(&change.cpuset_cpus));
    cpu.set_mems(text(&change.cpuset_mems));
    Ok((cpu != LinuxCpu::default()).then_some(cpu))
}

fn memory(change: &LinuxContainerResources) -> Option<LinuxMemory> {
    let set = |value: i64| (value != 0).then_some(value);
    let mut memory = LinuxMemory::default();
    memory.set_limit(set(change.memory_limit_in_bytes));
    memory.set_swap(set(change.memory_swap_limit_in_bytes));
    (memory != LinuxMemory::default()).then_some(memory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_cri_proto::v1::HugepageLimit;

    #[test]
    fn what_a_change_does_not_name_stays() {
        let current = LinuxContainerResources {
            cpu_shares: 1024,
            cpuset_cpus: "2-3".into(),
            hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit: 4 << 20 }],
            ..Default::default()
        };
        let change = LinuxContainerResources { cpu_shares: 2048, ..Default::default() };
        let merged = merge(&current, &change);
        assert_eq!(merged.cpu_shares, 2048);
        assert_eq!(merged.cpuset_cpus, "2-3");
        assert_eq!(merged.hugepage_limits, current.hugepage_limits);
    }

    #[test]
    fn only_what_is_asked_for_reaches_the_runtime() {
        let change = LinuxContainerResources { cpuset_cpus: "1".into(), ..Default::default() };
        let json = serde_json::to_value(to_oci(&change).unwrap()).unwrap();
        assert_eq!(json, serde_json::json!({ "cpu": { "cpus": "1" } }));
        let nothing = serde_json::to_value(to_oci(&Default::default()).unwrap()).unwrap();
        assert_eq!(nothing, serde_json::json!({}));
    }

    #[test]
    fn an_unlimited_quota_is_a_change() {
        let change = LinuxContainerResources { cpu_quota: -1, ..Default::default() };
        assert_eq!(to_oci(&change).unwrap().cpu().as_ref().unwrap().quota(), Some(-1));
        let bad = LinuxContainerResources { cpu_shares: -1, ..Default::default() };
        assert!(to_oci(&bad).is_err());
    }
}
