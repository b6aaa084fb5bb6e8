//! What containers use, as the guest's kernel counts it.

use std::fs;

use pinion_cgroup::{Cgroup, Driver, Hierarchies};
use pinion_monitor_proto::message::{ContainerUsage, UsageReply};

use crate::error::Error;

/// The cgroup of a container, as its configuration names it.
pub(crate) fn cgroup_path(id: &str) -> String {
    format!("/pinion/{id}")
}

/// Use of each container that has a cgroup, and of the guest as a whole.
pub(crate) fn read(ids: &[String]) -> Result<UsageReply, Error> {
    let failed = |error: pinion_cgroup::Error| Error::Failed(format!("read cgroups: {error}"));
    let hierarchies = Hierarchies::detect().map_err(failed)?;
    let mut reply = UsageReply::default();
    for id in ids {
        let path = cgroup_path(id);
        let paths = Cgroup::plan(&hierarchies, Driver::Cgroupfs, Some(path.as_str()), id)
            .map_err(failed)?;
        let group = Cgroup::open(paths);
        // One that ended a moment ago has none.
        if group.exists()
            && let Ok(usage) = group.usage()
        {
            reply.containers.push(ContainerUsage {
                id: id.clone(),
                cpu_nanoseconds: usage.cpu_nanoseconds,
                memory_bytes: usage.memory_bytes,
                working_set_bytes: usage.working_set_bytes,
                memory_limit_bytes: usage.memory_limit_bytes,
                rss_bytes: usage.rss_bytes,
                page_faults: usage.page_faults,
                major_page_faults: usage.major_page_faults,
                pids: usage.pids,
            });
        }
    }
    reply.whole = Some(whole());
    Ok(reply)
}

/// Memory as /proc/meminfo has it.
fn whole() -> ContainerUsage {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kilobytes = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        number.unwrap_or(0) << 10
    };
    let total = kilobytes("MemTotal:");
    ContainerUsage {
        memory_bytes: total.saturating_sub(kilobytes("MemFree:")),
        working_set_bytes: total.saturating_sub(kilobytes("MemAvailable:")),
        memory_limit_bytes: total,
        rss_bytes: kilobytes("AnonPages:"),
        ..ContainerUsage::default()
    }
}
