//! UpdatePodSandboxResources: new limits on the cgroup that a pod's containers live under.
//!
//! CRI gives the sum over the pod's containers (`resources`) and what the pod itself costs
//! (`overhead`); the cgroup gets both together. What is zero or empty is left as it is, and
//! -1 takes a limit away. Everything is decided in pure code before the first write, each write
//! is read back, and when one is refused those before it are undone (`pinion-cgroup`).
//!
//! A limit above a container is a limit on the container: what would break a strict container's
//! promise, or a grant of hugepages, is refused before anything is written.

use pinion_cgroup::{Cgroup, ErrorKind};
use pinion_cri_proto::v1::{HugepageLimit, LinuxContainerResources};
use pinion_topology::{CpuSet, PageSize};

use super::operations::Held;
use crate::error::{Error, Kind, Result};
use crate::node::Node;
use crate::record::{Container, Phase, Sandbox};
use crate::resources;

/// The default of `cpu.cfs_period_us`, in microseconds: what a quota without a period is of.
const PERIOD: i64 = 100_000;

/// Puts a pod's new limits in force.
pub(super) fn apply(
    node: &Node,
    sandbox: &Sandbox,
    members: &[Held],
    overhead: Option<&LinuxContainerResources>,
    resources: Option<&LinuxContainerResources>,
) -> Result<()> {
    if overhead.is_none() && resources.is_none() {
        return Err(Error::invalid("the request has neither overhead nor resources"));
    }
    let linux = sandbox.config.linux.as_ref();
    let stored = |of: Option<&LinuxContainerResources>| of.cloned().unwrap_or_default();
    let overhead =
        overhead.cloned().unwrap_or_else(|| stored(linux.and_then(|l| l.overhead.as_ref())));
    let resources =
        resources.cloned().unwrap_or_else(|| stored(linux.and_then(|l| l.resources.as_ref())));
    let wanted = together(&overhead, &resources);
    if wanted == LinuxContainerResources::default() {
        return Ok(());
    }
    let living = members.iter().map(|m| &m.record).filter(|c| c.phase() != Phase::Exited);
    check(living, &wanted)?;
    let mut oci = resources::to_oci(&wanted)?;
    if let Some(memory) = oci.memory_mut() {
        // The kernel would take a limit below the usage, and kill until it fits.
        memory.set_check_before_update(Some(true));
    }
    let parent = &sandbox.cgroup_parent;
    let group = Cgroup::open(node.cgroups.parent(parent)?);
    group.update(&oci).map_err(|error| {
        let kind = match error.kind() {
            ErrorKind::Invalid => Kind::Invalid,
            ErrorKind::Unsupported | ErrorKind::Busy | ErrorKind::NotFound => Kind::Precondition,
            _ => Kind::Internal,
        };
        let message = format!("limit pod sandbox {} in cgroup {parent}", sandbox.id);
        Error::new(kind, message).caused_by(error)
    })
}

/// What the pod's cgroup is to have: the containers' sum and the overhead, each added only to
/// what is limited at all.
fn together(
    overhead: &LinuxContainerResources,
    resources: &LinuxContainerResources,
) -> LinuxContainerResources {
    let sum = |more: i64, limit: i64| match limit {
        ..=0 => limit,
        _ => limit.saturating_add(more.max(0)),
    };
    let mut wanted = resources.clone();
    wanted.cpu_shares = sum(overhead.cpu_shares, resources.cpu_shares);
    wanted.cpu_quota = sum(quota_of(overhead, period(resources)), resources.cpu_quota);
    wanted.memory_limit_in_bytes =
        sum(overhead.memory_limit_in_bytes, resources.memory_limit_in_bytes);
    wanted.memory_swap_limit_in_bytes =
        sum(overhead.memory_limit_in_bytes, resources.memory_swap_limit_in_bytes);
    for more in &overhead.hugepage_limits {
        let limits = &mut wanted.hugepage_limits;
        if let Some(limit) = limits.iter_mut().find(|limit| limit.page_size == more.page_size) {
            limit.limit = limit.limit.saturating_add(more.limit);
        }
    }
    wanted
}

fn period(of: &LinuxContainerResources) -> i64 {
    if of.cpu_period > 0 { of.cpu_period } else { PERIOD }
}

/// The overhead's quota in periods of another length.
fn quota_of(overhead: &LinuxContainerResources, other: i64) -> i64 {
    let quota = i128::from(overhead.cpu_quota.max(0)) * i128::from(other);
    i64::try_from(quota / i128::from(period(overhead))).unwrap_or(i64::MAX)
}

/// Refuses what would take from the pod's living containers what they were promised.
fn check<'a>(
    living: impl Iterator<Item = &'a Container>,
    wanted: &LinuxContainerResources,
) -> Result<()> {
    let cpus: CpuSet = wanted.cpuset_cpus.parse().map_err(|error| {
        Error::invalid(format!("cpuset_cpus {:?}", wanted.cpuset_cpus)).caused_by(error)
    })?;
    let mut pages: Vec<(PageSize, u64)> = Vec::new();
    for container in living {
        let (contract, name) = (&container.contract, container.name());
        let refuse =
            |why: String| Err(Error::new(Kind::Refused, format!("container {name} {why}")));
        if contract.strict && (contract.exclusive || contract.unthrottled) && wanted.cpu_quota > 0 {
            return refuse(format!(
                "was promised not to be throttled; a quota of {} µs on its pod would",
                wanted.cpu_quota
            ));
        }
        if contract.exclusive && !cpus.is_empty() && !contract.cpus.is_subset(&cpus) {
            return refuse(format!(
                "has CPUs {} for itself, and {cpus} on its pod would take some away",
                contract.cpus
            ));
        }
        for demand in &contract.hugepages {
            match pages.iter_mut().find(|(size, _)| *size == demand.size) {
                Some((_, sum)) => *sum += demand.pages,
                None => pages.push((demand.size, demand.pages)),
            }
        }
    }
    wanted.hugepage_limits.iter().try_for_each(|limit| check_pages(limit, &pages))
}

fn check_pages(limit: &HugepageLimit, granted: &[(PageSize, u64)]) -> Result<()> {
    let size: PageSize = limit.page_size.parse().map_err(|error| {
        Error::invalid(format!("page_size {:?}", limit.page_size)).caused_by(error)
    })?;
    let granted = granted.iter().find(|(other, _)| *other == size).map_or(0, |(_, pages)| *pages);
    let bytes = granted.saturating_mul(size.bytes());
    if limit.limit >= bytes {
        return Ok(());
    }
    let message = format!(
        "the pod's containers were granted {granted} pages of {size}, {bytes} bytes; a limit of {} would take some away",
        limit.limit
    );
    Err(Error::new(Kind::Refused, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::Contract;

    fn strict(cpus: &str) -> Container {
        let contract = Contract {
            strict: true,
            exclusive: true,
            cpus: cpus.parse().unwrap(),
            ..Default::default()
        };
        Container { contract, ..Default::default() }
    }

    #[test]
    fn overhead_is_added_to_what_is_limited() {
        let overhead = LinuxContainerResources {
            cpu_shares: 100,
            cpu_quota: 10_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 1 << 20,
            ..Default::default()
        };
        let resources = LinuxContainerResources {
            cpu_shares: 1024,
            cpu_quota: 25_000,
            cpu_period: 50_000,
            ..Default::default()
        };
        let both = together(&overhead, &resources);
        assert_eq!((both.cpu_shares, both.cpu_quota, both.cpu_period), (1124, 30_000, 50_000));
        // No limit on the containers is no limit on the pod.
        assert_eq!(both.memory_limit_in_bytes, 0);
        let free = LinuxContainerResources { cpu_quota: -1, ..Default::default() };
        assert_eq!(together(&overhead, &free).cpu_quota, -1);
    }

    #[test]
    fn what_was_promised_is_not_taken_away() {
        let quota = LinuxContainerResources { cpu_quota: 50_000, ..Default::default() };
        let error = check([&strict("2-3")].into_iter(), &quota).unwrap_err();
        assert_eq!(error.kind(), Kind::Refused);
        check([&Container::default()].into_iter(), &quota).unwrap();
        let cpus =
            |list: &str| LinuxContainerResources { cpuset_cpus: list.into(), ..Default::default() };
        assert!(check([&strict("2-3")].into_iter(), &cpus("0-2")).is_err());
        check([&strict("2-3")].into_iter(), &cpus("0-3")).unwrap();
        assert_eq!(check([].into_iter(), &cpus("x")).unwrap_err().kind(), Kind::Invalid);
    }

    #[test]
    fn granted_hugepages_stay_within_the_pod_s_limit() {
        let mut container = Container::default();
        container.contract.hugepages = vec![pinion_placement::HugepageDemand {
            size: "2MB".parse().unwrap(),
            pages: 4,
            nodes: None,
        }];
        let limit = |limit| LinuxContainerResources {
            hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit }],
            ..Default::default()
        };
        assert!(check([&container].into_iter(), &limit(6 << 20)).is_err());
        check([&container].into_iter(), &limit(8 << 20)).unwrap();
    }
}
