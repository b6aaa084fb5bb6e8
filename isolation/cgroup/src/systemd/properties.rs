//! Unit properties for a container, as runc sets them (systemd.resource-control(5)).

use oci_spec::runtime::LinuxResources;

use super::wire::{Property, Value};
use crate::path::Unit;
use crate::resources::{cpu_bandwidth, cpu_shares_to_weight, swap_on_v2};
use crate::{Error, Result, lists};

/// systemd's "no limit".
const INFINITY: u64 = u64::MAX;

/// The properties a unit is started with.
pub(super) fn of_unit(unit: &Unit, pid: Option<i32>) -> Vec<Property> {
    let mut properties =
        vec![("Description", Value::Text(format!("container cgroup {}", unit.name)))];
    if unit.name.ends_with(".slice") {
        properties.push(("Wants", Value::Texts(vec![unit.slice.clone()])));
    } else {
        properties.push(("Slice", Value::Text(unit.slice.clone())));
        properties.push(("Delegate", Value::Bool(true)));
    }
    if let Some(pid) = pid.and_then(|pid| u32::try_from(pid).ok()) {
        properties.push(("PIDs", Value::Numbers(vec![pid])));
    }
    for accounting in ["MemoryAccounting", "CPUAccounting", "IOAccounting", "TasksAccounting"] {
        properties.push((accounting, Value::Bool(true)));
    }
    properties.push(("DefaultDependencies", Value::Bool(false)));
    properties
}

/// The limits systemd has a property for.
pub(super) fn of_resources(resources: &LinuxResources, v2: bool) -> Result<Vec<Property>> {
    let mut properties = Vec::new();
    let mut put = |name, value| properties.push((name, Value::Number(value)));
    let limit = |value: i64| if value < 0 { INFINITY } else { value as u64 };
    if let Some(memory) = resources.memory() {
        if let Some(value) = memory.limit().filter(|value| *value != 0) {
            put(if v2 { "MemoryMax" } else { "MemoryLimit" }, limit(value));
        }
        if v2 {
            if let Some(value) = memory.reservation().filter(|value| *value != 0) {
                put("MemoryLow", limit(value));
            }
            if let Some(swap) = swap_on_v2(memory.limit(), memory.swap())? {
                put("MemorySwapMax", swap.unwrap_or(INFINITY));
            }
        }
    }
    if let Some(pids) = resources.pids()
        && pids.limit() != 0
    {
        put("TasksMax", limit(pids.limit()));
    }
    let mut sets = Vec::new();
    if let Some(cpu) = resources.cpu() {
        let idle = v2 && cpu.idle() == Some(1);
        if idle {
            put("CPUWeight", 0); // systemd 252: cpu.idle
        } else if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            let (name, value) = if v2 {
                ("CPUWeight", cpu_shares_to_weight(shares))
            } else {
                ("CPUShares", shares)
            };
            put(name, value);
        }
        let bandwidth = cpu_bandwidth(cpu)?;
        if let Some(period) = bandwidth.period {
            put("CPUQuotaPeriodUSec", period);
        }
        if bandwidth.quota.is_some() || bandwidth.period.is_some() {
            put("CPUQuotaPerSecUSec", quota_per_second(bandwidth.quota, bandwidth.period));
        }
        if v2 {
            sets.push(("linux.resources.cpu.cpus", "AllowedCPUs", cpu.cpus()));
            sets.push(("linux.resources.cpu.mems", "AllowedMemoryNodes", cpu.mems()));
        }
    }
    for (field, property, text) in sets {
        let Some(text) = text.as_deref().filter(|text| !text.trim().is_empty()) else {
            continue;
        };
        let members = lists::parse(text).ok_or_else(|| Error::Invalid {
            field,
            reason: format!("{text:?} is not a list like 0-3,7"),
        })?;
        properties.push((property, Value::Bytes(lists::to_bits(&members))));
    }
    Ok(properties)
}

/// Microseconds of CPU time per second, rounded up to whole percents as systemd keeps them,
/// so that it never allows less than the file we write.
fn quota_per_second(quota: Option<i64>, period: Option<u64>) -> u64 {
    match quota {
        Some(quota @ 1..) => {
            let per_second = (quota as u64).saturating_mul(1_000_000) / period.unwrap_or(100_000);
            per_second.div_ceil(10_000) * 10_000
        }
        _ => INFINITY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str, v2: bool) -> Vec<Property> {
        of_resources(&serde_json::from_str(json).unwrap(), v2).unwrap()
    }

    #[test]
    fn a_scope_is_delegated_and_placed_in_its_slice() {
        let unit = Unit { name: "x-c1.scope".into(), slice: "a-b.slice".into() };
        let properties = of_unit(&unit, Some(42));
        assert!(properties.contains(&("Slice", Value::Text("a-b.slice".into()))));
        assert!(properties.contains(&("Delegate", Value::Bool(true))));
        assert!(properties.contains(&("PIDs", Value::Numbers(vec![42]))));
        assert!(properties.contains(&("DefaultDependencies", Value::Bool(false))));
    }

    #[test]
    fn a_slice_is_wanted_by_its_parent_and_has_no_processes() {
        let unit = Unit { name: "a-b-c.slice".into(), slice: "a-b.slice".into() };
        let properties = of_unit(&unit, None);
        assert!(properties.contains(&("Wants", Value::Texts(vec!["a-b.slice".into()]))));
        assert!(!properties.iter().any(|(name, _)| *name == "Delegate" || *name == "PIDs"));
    }

    #[test]
    fn limits_become_the_properties_runc_sends() {
        let properties = of(
            r#"{"memory":{"limit":1048576,"reservation":524288,"swap":1048576},
                "cpu":{"shares":1024,"quota":12345,"period":100000,"cpus":"0,4-7","mems":"1"},
                "pids":{"limit":-1}}"#,
            true,
        );
        assert_eq!(
            properties,
            [
                ("MemoryMax", Value::Number(1_048_576)),
                ("MemoryLow", Value::Number(524_288)),
                ("MemorySwapMax", Value::Number(0)),
                ("TasksMax", Value::Number(u64::MAX)),
                ("CPUWeight", Value::Number(100)),
                ("CPUQuotaPeriodUSec", Value::Number(100_000)),
                ("CPUQuotaPerSecUSec", Value::Number(130_000)),
                ("AllowedCPUs", Value::Bytes(vec![0xf1])),
                ("AllowedMemoryNodes", Value::Bytes(vec![0x02])),
            ]
        );
    }

    #[test]
    fn v1_units_have_the_old_names_and_unlimited_quota_is_infinite() {
        assert_eq!(
            of(r#"{"memory":{"limit":-1},"cpu":{"shares":512,"quota":-1,"cpus":"0"}}"#, false),
            [
                ("MemoryLimit", Value::Number(u64::MAX)),
                ("CPUShares", Value::Number(512)),
                ("CPUQuotaPerSecUSec", Value::Number(u64::MAX)),
            ]
        );
        assert!(of("{}", true).is_empty());
    }
}
