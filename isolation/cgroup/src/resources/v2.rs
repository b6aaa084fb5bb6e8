//! What `LinuxResources` means in the unified hierarchy.

use std::collections::HashMap;

use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxPids, LinuxRdma, LinuxResources, LinuxThrottleDevice,
};

use super::values::{amount, device, list, weight};
use super::{Check, Need, Write, cpu_bandwidth, cpu_shares_to_weight, io_weight, swap_on_v2};
use crate::{Error, Result};

/// `pids.max`, the same file in both versions.
pub(super) fn pids_writes(resources: &LinuxResources, writes: &mut Vec<Write>) {
    let Some(limit) = resources.pids().as_ref().map(LinuxPids::limit) else { return };
    match limit {
        ..0 => writes.push(Write::new("pids", "pids.max", "max")),
        // No further process: as runc since 1.4, with the 1 that systemd can be told, too.
        0 => writes.push(Write::new("pids", "pids.max", 1)),
        limit => writes.push(Write::new("pids", "pids.max", limit)),
    }
}

/// The names of the two limits on huge pages. Both are set: the one on use alone lets a
/// mapping succeed and then kills its owner with SIGBUS.
pub(super) const HUGETLB_FILES: [&str; 2] = ["rsvd.max", "max"];

fn limit_text(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

pub(super) fn memory_writes(memory: &LinuxMemory, writes: &mut Vec<Write>) -> Result<()> {
    let limit = amount("linux.resources.memory.limit", memory.limit())?;
    let reservation = amount("linux.resources.memory.reservation", memory.reservation())?;
    if memory.disable_oom_killer() == Some(true) {
        return Err(Error::Unsupported {
            field: "linux.resources.memory.disableOOMKiller",
            version: "v2",
        });
    }
    if let Some(swap) = swap_on_v2(memory.limit(), memory.swap())? {
        let value = swap.map_or_else(|| "max".to_owned(), |bytes| bytes.to_string());
        // Without swap accounting in the kernel, no limit and no swap hold by themselves.
        let need = if matches!(swap, None | Some(0)) { Need::IfPresent } else { Need::Required };
        writes.push(Write::new("memory", "memory.swap.max", value).need(need));
    }
    if let Some(limit) = limit {
        let write = Write::new("memory", "memory.max", limit_text(limit));
        writes.push(write.check(Check::Bytes(PAGE)));
    }
    if let Some(reservation) = reservation {
        writes.push(Write::new("memory", "memory.low", limit_text(reservation)));
    }
    Ok(())
}

/// The kernel rounds memory limits down to base pages, the largest in use being 64 KiB.
pub(super) const PAGE: u64 = 64 << 10;

pub(super) fn cpu_writes(cpu: &LinuxCpu, writes: &mut Vec<Write>) -> Result<()> {
    if cpu.realtime_runtime().is_some_and(|value| value != 0)
        || cpu.realtime_period().is_some_and(|value| value != 0)
    {
        return Err(Error::Unsupported {
            field: "linux.resources.cpu.realtimeRuntime",
            version: "v2",
        });
    }
    if let Some(idle) = cpu.idle() {
        writes.push(Write::new("cpu", "cpu.idle", idle));
    }
    let shares = cpu.shares().unwrap_or(0);
    // An idle group has no weight of its own: the kernel refuses the write.
    if shares != 0 && cpu.idle() != Some(1) {
        writes.push(Write::new("cpu", "cpu.weight", cpu_shares_to_weight(shares)));
    }
    let bandwidth = cpu_bandwidth(cpu)?;
    let burst = bandwidth.burst.map(|burst| Write::new("cpu", "cpu.max.burst", burst));
    // A smaller burst has to come before a smaller quota, a larger one after a larger quota.
    writes.extend(burst.clone().map(|write| write.need(Need::Attempt)));
    if bandwidth.quota.is_some() || bandwidth.period.is_some() {
        let quota = bandwidth.quota.map_or_else(|| "max".to_owned(), limit_text);
        let period = bandwidth.period.unwrap_or(100_000);
        writes.push(Write::new("cpu", "cpu.max", format!("{quota} {period}")));
    }
    writes.extend(burst);
    Ok(())
}

/// `cpuset.cpus` and `cpuset.mems`, the same files in both versions.
pub(super) fn cpuset_writes(cpu: &LinuxCpu, writes: &mut Vec<Write>) -> Result<()> {
    if let Some(cpus) = list("linux.resources.cpu.cpus", cpu.cpus().as_ref())? {
        writes.push(Write::new("cpuset", "cpuset.cpus", cpus).check(Check::List));
    }
    if let Some(mems) = list("linux.resources.cpu.mems", cpu.mems().as_ref())? {
        writes.push(Write::new("cpuset", "cpuset.mems", mems).check(Check::List));
    }
    Ok(())
}

pub(super) fn io_writes(block_io: &LinuxBlockIo, writes: &mut Vec<Write>) -> Result<()> {
    const FIELD: &str = "linux.resources.blockIO";
    if let Some(weight) = weight(FIELD, block_io.weight())? {
        let write = Write::new("io", "io.bfq.weight", weight);
        writes.push(write.or("io.weight", format!("default {}", io_weight(weight))));
    }
    for entry in block_io.weight_device().iter().flatten() {
        if let Some(weight) = weight(FIELD, entry.weight())? {
            let device = device(FIELD, entry.major(), entry.minor())?;
            let write = Write::new("io", "io.bfq.weight", format!("{device} {weight}"));
            writes.push(write.or("io.weight", format!("{device} {}", io_weight(weight))));
        }
    }
    let throttles: [(&str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
        ("rbps", block_io.throttle_read_bps_device()),
        ("wbps", block_io.throttle_write_bps_device()),
        ("riops", block_io.throttle_read_iops_device()),
        ("wiops", block_io.throttle_write_iops_device()),
    ];
    for (key, entries) in throttles {
        for entry in entries.iter().flatten() {
            let device = device(FIELD, entry.major(), entry.minor())?;
            let rate = if entry.rate() == 0 { "max".to_owned() } else { entry.rate().to_string() };
            writes.push(Write::new("io", "io.max", format!("{device} {key}={rate}")));
        }
    }
    Ok(())
}

/// `rdma.max`, the same file in both versions.
pub(super) fn rdma_writes(rdma: Option<&HashMap<String, LinuxRdma>>, writes: &mut Vec<Write>) {
    let mut devices: Vec<_> = rdma.into_iter().flatten().collect();
    devices.sort_unstable_by_key(|(name, _)| *name);
    for (name, limits) in devices {
        let mut value = name.clone();
        if let Some(handles) = limits.hca_handles() {
            value.push_str(&format!(" hca_handle={handles}"));
        }
        if let Some(objects) = limits.hca_objects() {
            value.push_str(&format!(" hca_object={objects}"));
        }
        writes.push(Write::new("rdma", "rdma.max", value));
    }
}

/// Files whose order matters: a partition needs its CPUs first, a memory limit its
/// protections last.
const UNIFIED_ORDER: [&str; 12] = [
    "cpuset.cpus",
    "cpuset.mems",
    "cpuset.cpus.exclusive",
    "cpuset.cpus.partition",
    "memory.swap.max",
    "memory.max",
    "memory.high",
    "memory.low",
    "memory.min",
    "cpu.idle",
    "cpu.max",
    "cpu.max.burst",
];

/// The only core files that are limits; the others move processes or change the tree.
const CORE_LIMITS: [&str; 3] = ["cgroup.max.depth", "cgroup.max.descendants", "cgroup.pressure"];

/// The raw settings of `unified`, after everything else so that they have the last word.
pub(super) fn unified_writes(
    unified: Option<&HashMap<String, String>>,
    writes: &mut Vec<Write>,
) -> Result<()> {
    let mut entries: Vec<(&String, &String)> = unified.into_iter().flatten().collect();
    let rank = |file: &str| {
        let known = UNIFIED_ORDER.iter().position(|known| *known == file);
        known.unwrap_or(UNIFIED_ORDER.len())
    };
    entries.sort_unstable_by(|a, b| (rank(a.0), a.0).cmp(&(rank(b.0), b.0)));
    for (file, value) in entries {
        let refuse = |reason: &str| {
            Err(Error::Invalid {
                field: "linux.resources.unified",
                reason: format!("{file:?} {reason}"),
            })
        };
        let Some((controller, parameter)) = file.split_once('.') else {
            return refuse("is not of the form controller.parameter");
        };
        if file.contains(['/', '\0']) || controller.is_empty() || parameter.is_empty() {
            return refuse("must be a plain file name");
        }
        if controller == "cgroup" && !CORE_LIMITS.contains(&file.as_str()) {
            return refuse("is not a limit");
        }
        let check = match file.as_str() {
            "cpuset.cpus" | "cpuset.mems" => Check::List,
            _ => Check::None,
        };
        // The kernel takes one device per write.
        for line in value.lines().map(str::trim).filter(|line| !line.is_empty()) {
            writes.push(Write {
                controller: controller.to_owned().into(),
                file: file.clone().into(),
                value: line.to_owned(),
                need: Need::Required,
                check,
                instead: None,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Layout, writes as plan_writes};
    use super::*;

    fn plan(json: &str) -> Result<Vec<String>> {
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        let sizes = [("2MB".to_owned(), 2 << 20), ("1GB".to_owned(), 1 << 30)];
        let writes = plan_writes(&resources, &sizes, Layout::V2, |_| false)?;
        Ok(writes.iter().map(|write| format!("{}={}", write.file, write.value)).collect())
    }

    #[test]
    fn every_section_becomes_its_v2_files() {
        let json = r#"{
            "memory":{"limit":1073741824,"reservation":536870912,"swap":2147483648},
            "cpu":{"shares":1024,"quota":50000,"period":100000,"burst":20000,"idle":0,
                   "cpus":"2-3","mems":"1"},
            "pids":{"limit":64},
            "blockIO":{"weight":500,"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1024}],
                "throttleWriteIOPSDevice":[{"major":8,"minor":16,"rate":0}]},
            "hugepageLimits":[{"pageSize":"2MB","limit":4194304}],
            "rdma":{"mlx5_1":{"hcaHandles":3,"hcaObjects":10000}}}"#;
        assert_eq!(
            plan(json).unwrap(),
            [
                "cpuset.cpus=2-3",
                "cpuset.mems=1",
                "hugetlb.2MB.rsvd.max=4194304",
                "hugetlb.2MB.max=4194304",
                "memory.swap.max=1073741824",
                "memory.max=1073741824",
                "memory.low=536870912",
                "cpu.idle=0",
                "cpu.weight=100",
                "cpu.max.burst=20000",
                "cpu.max=50000 100000",
                "cpu.max.burst=20000",
                "pids.max=64",
                "io.bfq.weight=500",
                "io.max=8:0 rbps=1024",
                "io.max=8:16 wiops=max",
                "rdma.max=mlx5_1 hca_handle=3 hca_object=10000",
            ]
        );
    }

    #[test]
    fn minus_one_lifts_a_limit_and_zero_leaves_it_alone() {
        assert_eq!(
            plan(r#"{"memory":{"limit":-1},"pids":{"limit":-1},"cpu":{"quota":-1}}"#).unwrap(),
            ["memory.swap.max=max", "memory.max=max", "cpu.max=max 100000", "pids.max=max"]
        );
        assert_eq!(
            plan(r#"{"memory":{"limit":0},"cpu":{"quota":0,"shares":0,"cpus":""}}"#).unwrap(),
            Vec::<String>::new()
        );
    }

    #[test]
    fn an_idle_group_is_given_no_weight() {
        assert_eq!(plan(r#"{"cpu":{"idle":1,"shares":512}}"#).unwrap(), ["cpu.idle=1"]);
    }

    #[test]
    fn raw_settings_come_in_an_order_that_works_and_last() {
        let json = r#"{"cpu":{"cpus":"0-1"},"unified":{"cpuset.cpus.partition":"isolated",
            "io.max":"8:0 rbps=1\n8:16 rbps=2","cpuset.cpus":"2-3","memory.high":"1G",
            "cpuset.cpus.exclusive":"2-3","memory.max":"2G"}}"#;
        assert_eq!(
            plan(json).unwrap(),
            [
                "cpuset.cpus=0-1",
                "cpuset.cpus=2-3",
                "cpuset.cpus.exclusive=2-3",
                "cpuset.cpus.partition=isolated",
                "memory.max=2G",
                "memory.high=1G",
                "io.max=8:0 rbps=1",
                "io.max=8:16 rbps=2",
            ]
        );
    }

    #[test]
    fn nonsense_is_refused_before_anything_is_written() {
        for json in [
            r#"{"cpu":{"quota":500}}"#,
            r#"{"cpu":{"period":10}}"#,
            r#"{"cpu":{"period":2000000}}"#,
            r#"{"cpu":{"quota":10000,"burst":20000}}"#,
            r#"{"cpu":{"cpus":"3-1"}}"#,
            r#"{"cpu":{"mems":"x"}}"#,
            r#"{"cpu":{"cpus":","}}"#,
            r#"{"cpu":{"realtimeRuntime":1000}}"#,
            r#"{"memory":{"limit":-2}}"#,
            r#"{"memory":{"limit":100,"swap":50}}"#,
            r#"{"memory":{"disableOOMKiller":true}}"#,
            r#"{"blockIO":{"weight":5}}"#,
            r#"{"blockIO":{"throttleReadBpsDevice":[{"major":-1,"minor":0,"rate":1}]}}"#,
            r#"{"hugepageLimits":[{"pageSize":"3MB","limit":1}]}"#,
            r#"{"hugepageLimits":[{"pageSize":"2MB","limit":-5}]}"#,
            r#"{"network":{"classID":5}}"#,
            r#"{"unified":{"../memory.max":"1"}}"#,
            r#"{"unified":{"memory":"1"}}"#,
            r#"{"unified":{"cgroup.procs":"1"}}"#,
            r#"{"unified":{"cgroup.subtree_control":"+cpu"}}"#,
        ] {
            let error = plan(json).unwrap_err();
            assert!(
                matches!(error, Error::Invalid { .. } | Error::Unsupported { .. }),
                "{json}: {error}"
            );
        }
    }

    #[test]
    fn no_pages_of_a_size_the_kernel_does_not_have_holds_by_itself() {
        let json = r#"{"hugepageLimits":[{"pageSize":"16GB","limit":0}]}"#;
        assert_eq!(plan(json).unwrap(), Vec::<String>::new());
    }
}
