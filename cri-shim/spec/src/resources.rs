//! CPU, memory, hugepage and process limits.
//!
//! Zero means "not asked" for every number here, as in CRI. A value the kernel would refuse is
//! refused before anything is created, so that an update never half succeeds.

use crate::error::SpecError;
use crate::facts::HostFacts;
use crate::inputs::Settings;
use oci_spec::OciSpecError;
use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxHugepageLimit, LinuxHugepageLimitBuilder, LinuxMemoryBuilder,
    LinuxPidsBuilder, LinuxResources, LinuxResourcesBuilder,
};
use pinion_cri_proto::v1::LinuxContainerResources;
use std::collections::HashMap;

const FIELD: &str = "linux.resources";

/// Limits of a new container as OCI states them, without devices.
///
/// Every hugepage size of the host that was not asked for is limited to 0, so a container
/// cannot take pages granted to another one. `None` asks for nothing but that.
pub fn resources(
    asked: Option<&LinuxContainerResources>,
    host: &HostFacts,
    settings: &Settings,
) -> Result<LinuxResources, SpecError> {
    let none = LinuxContainerResources::default();
    let asked = asked.unwrap_or(&none);
    let mut resources = resource_changes(asked, host)?;
    if host.hugetlb_controller {
        let mut limits = resources.hugepage_limits().clone().unwrap_or_default();
        for size in &host.hugepage_sizes {
            if !limits.iter().any(|limit| limit.page_size() == size) {
                limits.push(hugepage_limit(size, 0)?);
            }
        }
        resources.set_hugepage_limits((!limits.is_empty()).then_some(limits));
    }
    if let Some(limit) = settings.pids_limit {
        let pids = LinuxPidsBuilder::default().limit(limit).build().map_err(internal)?;
        resources.set_pids(Some(pids));
    }
    Ok(resources)
}

/// What UpdateContainerResources changes: exactly what `asked` names, nothing else. kubelet's
/// CPU manager sends a cpuset alone, which must not take a container's hugepages away.
pub fn resource_changes(
    asked: &LinuxContainerResources,
    host: &HostFacts,
) -> Result<LinuxResources, SpecError> {
    check_cpu(asked)?;
    let mut resources = LinuxResourcesBuilder::default();
    if let Some(cpu) = cpu(asked).transpose() {
        resources = resources.cpu(cpu.map_err(internal)?);
    }
    if let Some(memory) = memory(asked, host)? {
        resources = resources.memory(memory.build().map_err(internal)?);
    }
    let hugepages = hugepages(asked, host)?;
    if !hugepages.is_empty() {
        resources = resources.hugepage_limits(hugepages);
    }
    if let Some(unified) = unified(asked, host)? {
        resources = resources.unified(unified);
    }
    resources.build().map_err(internal)
}

#[allow(clippy::needless_pass_by_value, reason = "used as map_err's function")]
fn internal(error: OciSpecError) -> SpecError {
    SpecError::invalid(FIELD, error.to_string())
}

fn refuse<T>(member: &str, reason: impl Into<String>) -> Result<T, SpecError> {
    Err(SpecError::invalid(format!("{FIELD}.{member}"), reason))
}

/// Ranges the kernel enforces (Documentation/scheduler/sched-bwc.rst): period 1 ms to 1 s,
/// quota at least 1 ms, -1 for none.
fn check_cpu(asked: &LinuxContainerResources) -> Result<(), SpecError> {
    let (period, quota) = (asked.cpu_period, asked.cpu_quota);
    if period != 0 && !(1_000..=1_000_000).contains(&period) {
        return refuse("cpu_period", format!("{period} µs is not between 1000 and 1000000"));
    }
    if quota < -1 || (1..1_000).contains(&quota) {
        return refuse("cpu_quota", format!("{quota} µs is neither -1 nor at least 1000"));
    }
    if asked.cpu_shares < 0 {
        return refuse("cpu_shares", format!("{} is negative", asked.cpu_shares));
    }
    cpu_list(&asked.cpuset_cpus, "cpuset_cpus")?;
    cpu_list(&asked.cpuset_mems, "cpuset_mems")
}

/// `0-3,8` as cpuset(7) reads it; what is online is for the kernel to say.
fn cpu_list(list: &str, member: &str) -> Result<(), SpecError> {
    let range = |part: &str| {
        let mut ends = part.splitn(2, '-').map(str::parse::<u16>);
        match (ends.next(), ends.next()) {
            (Some(Ok(_)), None) => true,
            (Some(Ok(first)), Some(Ok(last))) => first <= last,
            _ => false,
        }
    };
    if !list.is_empty() && !list.trim().split(',').all(range) {
        let start: String = list.chars().take(64).collect();
        return refuse(member, format!("{start:?} is not a list like 0-3,8"));
    }
    Ok(())
}

fn cpu(
    asked: &LinuxContainerResources,
) -> Result<Option<oci_spec::runtime::LinuxCpu>, OciSpecError> {
    let mut cpu = LinuxCpuBuilder::default();
    let mut any = false;
    let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
    if let Some(shares) = positive(asked.cpu_shares) {
        (cpu, any) = (cpu.shares(shares), true);
    }
    if let Some(period) = positive(asked.cpu_period) {
        (cpu, any) = (cpu.period(period), true);
    }
    if asked.cpu_quota != 0 {
        (cpu, any) = (cpu.quota(asked.cpu_quota), true);
    }
    if !asked.cpuset_cpus.is_empty() {
        (cpu, any) = (cpu.cpus(asked.cpuset_cpus.trim()), true);
    }
    if !asked.cpuset_mems.is_empty() {
        (cpu, any) = (cpu.mems(asked.cpuset_mems.trim()), true);
    }
    if any { cpu.build().map(Some) } else { Ok(None) }
}

/// A memory limit without a swap limit means no swap at all (limit of both = memory limit).
fn memory(
    asked: &LinuxContainerResources,
    host: &HostFacts,
) -> Result<Option<LinuxMemoryBuilder>, SpecError> {
    let (limit, swap) = (asked.memory_limit_in_bytes, asked.memory_swap_limit_in_bytes);
    if limit < -1 {
        return refuse("memory_limit_in_bytes", format!("{limit} is negative"));
    }
    if swap < -1 || (swap > 0 && limit > swap) {
        let reason = format!("{swap} is below the memory limit of {limit}");
        return refuse("memory_swap_limit_in_bytes", reason);
    }
    let swap = if swap == 0 { limit } else { swap };
    let mut memory = LinuxMemoryBuilder::default();
    if limit != 0 {
        memory = memory.limit(limit);
    }
    let limit_swap = swap != 0 && host.swap_accounting;
    if limit_swap {
        memory = memory.swap(swap);
    }
    Ok((limit != 0 || limit_swap).then_some(memory))
}

/// The limits that were named, in their order; sizes the host does not have are left out when
/// they ask for nothing, as kubelet names every size it knows.
fn hugepages(
    asked: &LinuxContainerResources,
    host: &HostFacts,
) -> Result<Vec<LinuxHugepageLimit>, SpecError> {
    let mut limits: Vec<LinuxHugepageLimit> = Vec::new();
    for (index, limit) in asked.hugepage_limits.iter().enumerate() {
        let field = format!("{FIELD}.hugepage_limits[{index}]");
        let known = host.hugepage_sizes.contains(&limit.page_size);
        if limit.limit > 0 && !known {
            let (asked, sizes) = (&limit.page_size, host.hugepage_sizes.join(", "));
            let reason = format!("this host has no {asked:?} pages (it has: {sizes})");
            return Err(SpecError::unavailable(field, reason));
        }
        if limit.limit > 0 && !host.hugetlb_controller {
            let reason = "the hugetlb cgroup controller is missing, so the limit cannot hold";
            return Err(SpecError::unavailable(field, reason));
        }
        let bytes = i64::try_from(limit.limit)
            .map_err(|_range| SpecError::invalid(&field, "larger than the address space"))?;
        match limits.iter().find(|other| *other.page_size() == limit.page_size) {
            Some(other) if other.limit() != bytes => {
                return Err(SpecError::invalid(field, format!("{} twice", limit.page_size)));
            }
            None if known && host.hugetlb_controller => {
                limits.push(hugepage_limit(&limit.page_size, bytes)?);
            }
            _ => {}
        }
    }
    Ok(limits)
}

fn hugepage_limit(size: &str, bytes: i64) -> Result<LinuxHugepageLimit, SpecError> {
    LinuxHugepageLimitBuilder::default().page_size(size).limit(bytes).build().map_err(internal)
}

/// Files of the container's own cgroup; names that could reach outside or move tasks are refused.
fn unified(
    asked: &LinuxContainerResources,
    host: &HostFacts,
) -> Result<Option<HashMap<String, String>>, SpecError> {
    if asked.unified.is_empty() {
        return Ok(None);
    }
    if !host.cgroup_v2 {
        let reason = "this node does not run on cgroup v2";
        return Err(SpecError::unavailable(format!("{FIELD}.unified"), reason));
    }
    for (key, value) in &asked.unified {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let dotted = key.split_once('.').is_some_and(|(controller, file)| {
            !controller.is_empty() && !file.is_empty() && controller != "cgroup"
        });
        if !dotted || !key.chars().all(plain) || key.contains("..") {
            return refuse("unified", format!("{key:?} is no controller file"));
        }
        if value.contains('\0') {
            return refuse("unified", format!("the value of {key:?} contains NUL"));
        }
    }
    Ok(Some(asked.unified.clone().into_iter().collect()))
}

/// `oom_score_adj`, raised to what this host may set.
pub(crate) fn oom_score_adj(
    asked: Option<&LinuxContainerResources>,
    host: &HostFacts,
    warnings: &mut Vec<String>,
) -> Result<Option<i32>, SpecError> {
    let Some(asked) = asked.map(|resources| resources.oom_score_adj) else { return Ok(None) };
    let adj = i32::try_from(asked).ok().filter(|adj| (-1000..=1000).contains(adj));
    let Some(adj) = adj else {
        return refuse("oom_score_adj", format!("{asked} is not between -1000 and 1000"));
    };
    if adj < host.min_oom_score_adj {
        let least = host.min_oom_score_adj;
        warnings.push(format!(
            "{FIELD}.oom_score_adj: {adj} needs CAP_SYS_RESOURCE on the host; {least} is used"
        ));
    }
    Ok(Some(adj.max(host.min_oom_score_adj)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_cri_proto::v1::HugepageLimit;

    fn host() -> HostFacts {
        HostFacts {
            cgroup_v2: true,
            hugetlb_controller: true,
            swap_accounting: true,
            hugepage_sizes: vec!["2MB".to_owned(), "1GB".to_owned()],
            min_oom_score_adj: -1000,
            ..Default::default()
        }
    }

    fn run(asked: &LinuxContainerResources) -> Result<LinuxResources, SpecError> {
        resources(Some(asked), &host(), &Settings::default())
    }

    fn pages(page_size: &str, limit: u64) -> HugepageLimit {
        HugepageLimit { page_size: page_size.to_owned(), limit }
    }

    #[test]
    fn nothing_asked_limits_nothing_but_hugepages() {
        let found = run(&LinuxContainerResources::default()).unwrap();
        assert!(found.cpu().is_none() && found.memory().is_none() && found.pids().is_none());
        let limits = found.hugepage_limits().clone().unwrap();
        let limits: Vec<_> =
            limits.iter().map(|limit| (limit.page_size().as_str(), limit.limit())).collect();
        assert_eq!(limits, [("2MB", 0), ("1GB", 0)]);
    }

    #[test]
    fn cpu_values_are_passed_on_and_checked() {
        let asked = LinuxContainerResources {
            cpu_shares: 2048,
            cpu_quota: -1,
            cpu_period: 100_000,
            cpuset_cpus: "2-3,6".to_owned(),
            cpuset_mems: "1".to_owned(),
            ..Default::default()
        };
        let cpu = run(&asked).unwrap().cpu().clone().unwrap();
        assert_eq!(
            (cpu.shares(), cpu.quota(), cpu.period()),
            (Some(2048), Some(-1), Some(100_000))
        );
        assert_eq!((cpu.cpus().as_deref(), cpu.mems().as_deref()), (Some("2-3,6"), Some("1")));
        type Change = fn(&mut LinuxContainerResources);
        let bad: [(Change, &str); 9] = [
            (|r| r.cpu_period = 10, "cpu_period"),
            (|r| r.cpu_period = -1, "cpu_period"),
            (|r| r.cpu_quota = 500, "cpu_quota"),
            (|r| r.cpu_quota = -7, "cpu_quota"),
            (|r| r.cpu_shares = -1, "cpu_shares"),
            (|r| r.cpuset_cpus = "3-1".to_owned(), "cpuset_cpus"),
            (|r| r.cpuset_cpus = "0,".to_owned(), "cpuset_cpus"),
            (|r| r.cpuset_cpus = "all\n".to_owned(), "cpuset_cpus"),
            (|r| r.cpuset_mems = "-1".to_owned(), "cpuset_mems"),
        ];
        for (change, member) in bad {
            let mut asked = asked.clone();
            change(&mut asked);
            assert_eq!(run(&asked).unwrap_err().field, format!("linux.resources.{member}"));
        }
    }

    #[test]
    fn a_memory_limit_forbids_swap_unless_swap_was_asked_for() {
        let mut asked =
            LinuxContainerResources { memory_limit_in_bytes: 100, ..Default::default() };
        let memory = run(&asked).unwrap().memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(100), Some(100)));
        asked.memory_swap_limit_in_bytes = 150;
        assert_eq!(run(&asked).unwrap().memory().unwrap().swap(), Some(150));
        asked.memory_swap_limit_in_bytes = -1;
        assert_eq!(run(&asked).unwrap().memory().unwrap().swap(), Some(-1));
        asked.memory_swap_limit_in_bytes = 50;
        assert!(run(&asked).is_err());
        let mut host = host();
        host.swap_accounting = false;
        asked.memory_swap_limit_in_bytes = 0;
        let found = resources(Some(&asked), &host, &Settings::default()).unwrap();
        assert_eq!(found.memory().unwrap().swap(), None);
    }

    #[test]
    fn hugepages_asked_for_are_granted_and_all_others_are_zero() {
        let asked = LinuxContainerResources {
            hugepage_limits: vec![pages("2MB", 4 << 20)],
            ..Default::default()
        };
        let limits = run(&asked).unwrap().hugepage_limits().clone().unwrap();
        assert_eq!((limits[0].limit(), limits[1].limit()), (4 << 20, 0));
    }

    #[test]
    fn an_update_changes_only_what_it_names() {
        let asked = LinuxContainerResources { cpuset_cpus: "3".to_owned(), ..Default::default() };
        let changes = resource_changes(&asked, &host()).unwrap();
        assert!(changes.hugepage_limits().is_none() && changes.memory().is_none());
        assert_eq!(changes.cpu().as_ref().unwrap().shares(), None);
    }

    #[test]
    fn hugepages_the_host_cannot_limit_are_refused() {
        let with = |list: Vec<HugepageLimit>| LinuxContainerResources {
            hugepage_limits: list,
            ..Default::default()
        };
        assert!(run(&with(vec![pages("16MB", 1)])).is_err());
        assert!(run(&with(vec![pages("16MB", 0)])).is_ok(), "nothing of an unknown size");
        assert!(run(&with(vec![pages("2MB", u64::MAX)])).is_err());
        assert!(run(&with(vec![pages("2MB", 1), pages("2MB", 2)])).is_err());
        let mut host = host();
        host.hugetlb_controller = false;
        let settings = Settings::default();
        assert!(resources(Some(&with(vec![pages("2MB", 1)])), &host, &settings).is_err());
        let found = resources(Some(&with(vec![pages("2MB", 0)])), &host, &settings).unwrap();
        assert!(found.hugepage_limits().is_none());
    }

    #[test]
    fn unified_keys_name_files_of_a_controller_on_v2() {
        let with = |key: &str| LinuxContainerResources {
            unified: [(key.to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        assert!(run(&with("memory.high")).unwrap().unified().is_some());
        for key in ["cgroup.procs", "../memory.high", "memory", ".x", "memory./x", "a..b"] {
            assert!(run(&with(key)).is_err(), "{key}");
        }
        let mut host = host();
        host.cgroup_v2 = false;
        assert!(resources(Some(&with("memory.high")), &host, &Settings::default()).is_err());
    }

    #[test]
    fn the_oom_score_is_raised_to_what_the_host_allows() {
        let with = |adj| LinuxContainerResources { oom_score_adj: adj, ..Default::default() };
        let mut warnings = Vec::new();
        let mut host = host();
        assert_eq!(oom_score_adj(Some(&with(-997)), &host, &mut warnings).unwrap(), Some(-997));
        host.min_oom_score_adj = 0;
        assert_eq!(oom_score_adj(Some(&with(-997)), &host, &mut warnings).unwrap(), Some(0));
        assert_eq!(warnings.len(), 1);
        assert_eq!(oom_score_adj(None, &host, &mut warnings).unwrap(), None);
        assert!(oom_score_adj(Some(&with(1001)), &host, &mut warnings).is_err());
    }

    #[test]
    fn the_node_s_process_limit_applies_to_every_container() {
        let settings = Settings { pids_limit: Some(1024), ..Default::default() };
        let found = resources(None, &host(), &settings).unwrap();
        assert_eq!(found.pids().unwrap().limit(), 1024);
    }
}
