//! What `LinuxResources` means in the v1 hierarchies.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxNetwork, LinuxThrottleDevice};

use super::v2::PAGE;
use super::values::{amount, device, weight};
use super::{Check, Need, Write, cpu_bandwidth};
use crate::{Error, Result};

/// The names of the two limits on huge pages; see [`super::v2::HUGETLB_FILES`].
pub(super) const HUGETLB_FILES: [&str; 2] = ["rsvd.limit_in_bytes", "limit_in_bytes"];

pub(super) fn memory_writes(memory: &LinuxMemory, writes: &mut Vec<Write>) -> Result<()> {
    let limit = amount("linux.resources.memory.limit", memory.limit())?;
    let mut swap = amount("linux.resources.memory.swap", memory.swap())?;
    if let (Some(limit @ 1..), Some(swap @ 1..)) = (limit, swap)
        && swap < limit
    {
        return Err(Error::Invalid {
            field: "linux.resources.memory.swap",
            reason: format!("{swap} is less than the memory limit {limit}, which it includes"),
        });
    }
    let mut swap_need = Need::Required;
    if limit == Some(-1) && swap.is_none() {
        // The kernel refuses a swap limit below an unlimited memory limit.
        swap = Some(-1);
        swap_need = Need::IfPresent;
    }
    let swap = swap.map(|swap| Write::new("memory", "memory.memsw.limit_in_bytes", swap));
    // memsw may never be below the limit: raising needs memsw first, lowering the limit.
    writes.extend(swap.clone().map(|write| write.need(Need::Attempt)));
    if let Some(limit) = limit {
        let write = Write::new("memory", "memory.limit_in_bytes", limit);
        writes.push(write.check(Check::Bytes(PAGE)));
    }
    writes.extend(swap.map(|write| write.need(swap_need)));
    if let Some(soft) = amount("linux.resources.memory.reservation", memory.reservation())? {
        writes.push(Write::new("memory", "memory.soft_limit_in_bytes", soft));
    }
    if let Some(tcp) = amount("linux.resources.memory.kernelTCP", memory.kernel_tcp())? {
        writes.push(Write::new("memory", "memory.kmem.tcp.limit_in_bytes", tcp));
    }
    if memory.disable_oom_killer() == Some(true) {
        writes.push(Write::new("memory", "memory.oom_control", 1));
    }
    match memory.swappiness() {
        None => Ok(()),
        Some(swappiness @ 0..=100) => {
            writes.push(Write::new("memory", "memory.swappiness", swappiness));
            Ok(())
        }
        Some(swappiness) => Err(Error::Invalid {
            field: "linux.resources.memory.swappiness",
            reason: format!("{swappiness} is above 100"),
        }),
    }
}

pub(super) fn cpu_writes(cpu: &LinuxCpu, writes: &mut Vec<Write>) -> Result<()> {
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        writes.push(Write::new("cpu", "cpu.shares", shares));
    }
    let bandwidth = cpu_bandwidth(cpu)?;
    let burst = bandwidth.burst.map(|burst| Write::new("cpu", "cpu.cfs_burst_us", burst));
    let period = bandwidth.period.map(|period| Write::new("cpu", "cpu.cfs_period_us", period));
    // Each of the three is refused when it does not fit the other two's old values; what
    // fails at first goes in once the quota is set.
    writes.extend(burst.clone().map(|write| write.need(Need::Attempt)));
    writes.extend(period.clone().map(|write| write.need(Need::Attempt)));
    if let Some(quota) = bandwidth.quota {
        writes.push(Write::new("cpu", "cpu.cfs_quota_us", quota.max(-1)));
    }
    writes.extend(period);
    writes.extend(burst);
    if let Some(period) = cpu.realtime_period().filter(|period| *period != 0) {
        writes.push(Write::new("cpu", "cpu.rt_period_us", period));
    }
    if let Some(runtime) = cpu.realtime_runtime().filter(|runtime| *runtime != 0) {
        writes.push(Write::new("cpu", "cpu.rt_runtime_us", runtime));
    }
    if let Some(idle) = cpu.idle() {
        writes.push(Write::new("cpu", "cpu.idle", idle));
    }
    Ok(())
}

/// `net_cls` and `net_prio`, which v2 does not have.
pub(super) fn network_writes(network: &LinuxNetwork, writes: &mut Vec<Write>) {
    if let Some(class) = network.class_id().filter(|class| *class != 0) {
        writes.push(Write::new("net_cls", "net_cls.classid", class));
    }
    for entry in network.priorities().iter().flatten() {
        let value = format!("{} {}", entry.name(), entry.priority());
        writes.push(Write::new("net_prio", "net_prio.ifpriomap", value));
    }
}

pub(super) fn blkio_writes(block_io: &LinuxBlockIo, writes: &mut Vec<Write>) -> Result<()> {
    const FIELD: &str = "linux.resources.blockIO";
    if let Some(value) = weight(FIELD, block_io.weight())? {
        writes.push(Write::new("blkio", "blkio.weight", value).or("blkio.bfq.weight", value));
    }
    if let Some(value) = weight(FIELD, block_io.leaf_weight())? {
        writes.push(Write::new("blkio", "blkio.leaf_weight", value));
    }
    for entry in block_io.weight_device().iter().flatten() {
        let device = device(FIELD, entry.major(), entry.minor())?;
        if let Some(value) = weight(FIELD, entry.weight())? {
            let value = format!("{device} {value}");
            let write = Write::new("blkio", "blkio.weight_device", &value);
            writes.push(write.or("blkio.bfq.weight_device", value));
        }
        if let Some(value) = weight(FIELD, entry.leaf_weight())? {
            let value = format!("{device} {value}");
            writes.push(Write::new("blkio", "blkio.leaf_weight_device", value));
        }
    }
    let throttles: [(&str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
        ("blkio.throttle.read_bps_device", block_io.throttle_read_bps_device()),
        ("blkio.throttle.write_bps_device", block_io.throttle_write_bps_device()),
        ("blkio.throttle.read_iops_device", block_io.throttle_read_iops_device()),
        ("blkio.throttle.write_iops_device", block_io.throttle_write_iops_device()),
    ];
    for (file, entries) in throttles {
        for entry in entries.iter().flatten() {
            let device = device(FIELD, entry.major(), entry.minor())?;
            writes.push(Write::new("blkio", file, format!("{device} {}", entry.rate())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Layout, writes as plan_writes};
    use super::*;
    use oci_spec::runtime::LinuxResources;

    fn plan(json: &str) -> Result<Vec<String>> {
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        let sizes = [("2MB".to_owned(), 2 << 20)];
        let writes = plan_writes(&resources, &sizes, Layout::V1, |_| true)?;
        Ok(writes.iter().map(|write| format!("{}={}", write.file, write.value)).collect())
    }

    #[test]
    fn every_section_becomes_its_v1_files() {
        let json = r#"{
            "memory":{"limit":1000,"reservation":500,"swap":2000,"swappiness":10,"kernelTCP":7,
                      "disableOOMKiller":true},
            "cpu":{"shares":1024,"quota":50000,"period":100000,"burst":20000,"idle":0,
                   "realtimePeriod":1000000,"realtimeRuntime":900,"cpus":"0-1","mems":"0"},
            "pids":{"limit":64},
            "blockIO":{"weight":500,"leafWeight":100,
                "weightDevice":[{"major":8,"minor":0,"weight":20,"leafWeight":30}],
                "throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1024}]},
            "hugepageLimits":[{"pageSize":"2MB","limit":4194304}],
            "network":{"classID":1048577,"priorities":[{"name":"eth0","priority":5}]}}"#;
        assert_eq!(
            plan(json).unwrap(),
            [
                "cpuset.cpus=0-1",
                "cpuset.mems=0",
                "hugetlb.2MB.rsvd.limit_in_bytes=4194304",
                "hugetlb.2MB.limit_in_bytes=4194304",
                "memory.memsw.limit_in_bytes=2000",
                "memory.limit_in_bytes=1000",
                "memory.memsw.limit_in_bytes=2000",
                "memory.soft_limit_in_bytes=500",
                "memory.kmem.tcp.limit_in_bytes=7",
                "memory.oom_control=1",
                "memory.swappiness=10",
                "cpu.shares=1024",
                "cpu.cfs_burst_us=20000",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=50000",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_burst_us=20000",
                "cpu.rt_period_us=1000000",
                "cpu.rt_runtime_us=900",
                "cpu.idle=0",
                "pids.max=64",
                "blkio.weight=500",
                "blkio.leaf_weight=100",
                "blkio.weight_device=8:0 20",
                "blkio.leaf_weight_device=8:0 30",
                "blkio.throttle.read_bps_device=8:0 1024",
                "net_cls.classid=1048577",
                "net_prio.ifpriomap=eth0 5",
            ]
        );
    }

    #[test]
    fn a_controller_that_lives_on_v2_gets_its_v2_files() {
        let json = r#"{"hugepageLimits":[{"pageSize":"2MB","limit":0}],"memory":{"limit":5},
            "pids":{"limit":3}}"#;
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        let sizes = [("2MB".to_owned(), 2 << 20)];
        let on_v1 = |controller: &str| controller != "hugetlb";
        let writes = plan_writes(&resources, &sizes, Layout::V1, on_v1).unwrap();
        let files: Vec<&str> = writes.iter().map(|write| write.file.as_ref()).collect();
        assert_eq!(
            files,
            ["hugetlb.2MB.rsvd.max", "hugetlb.2MB.max", "memory.limit_in_bytes", "pids.max"]
        );
    }

    #[test]
    fn lifting_the_memory_limit_lifts_the_swap_limit_with_it() {
        assert_eq!(
            plan(r#"{"memory":{"limit":-1}}"#).unwrap(),
            [
                "memory.memsw.limit_in_bytes=-1",
                "memory.limit_in_bytes=-1",
                "memory.memsw.limit_in_bytes=-1"
            ]
        );
    }

    #[test]
    fn raw_v2_settings_and_impossible_amounts_are_refused() {
        for json in [
            r#"{"unified":{"memory.max":"1"}}"#,
            r#"{"memory":{"swappiness":101}}"#,
            r#"{"memory":{"limit":10,"swap":5}}"#,
            r#"{"cpu":{"quota":-1,"period":5}}"#,
        ] {
            assert!(plan(json).is_err(), "{json}");
        }
    }
}
