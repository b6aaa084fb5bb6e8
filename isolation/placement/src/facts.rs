//! What planning has to know about the machine and the container's place in the group tree.

use std::path::{Path, PathBuf};

use pinion_topology::{CpuSet, Cpus, NodeSet, Nodes, Topology};

use crate::files::{self, ReadFileError};
use crate::{Host, Kernel, PartitionKind, Target};

/// How much exclusivity the machine's cpuset controller can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// Partitions anywhere in the tree (Linux 6.7).
    Remote,
    /// Isolated partitions below the root or another partition (Linux 6.1).
    Local,
    /// Only load-balanced partitions below the root (Linux 5.2).
    LocalRoot,
    /// cgroup v2 without partitions.
    Disjoint,
    /// The controller is on cgroup v1.
    V1,
    /// There is no cpuset controller for the group.
    Absent,
}

/// `cpuset.cpus.partition` as read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum PartitionState {
    /// Not a partition, or the kernel has none.
    #[default]
    Member,
    /// A partition in force.
    Valid(PartitionKind),
    /// Asked for and not in force: the kind and the kernel's reason, if it gave one.
    Invalid(PartitionKind, String),
}

impl PartitionState {
    /// Parses the file's text; the kernel appends ` invalid (reason)`.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let (kind, rest) = text.split_once(' ').unwrap_or((text, ""));
        match (kind.parse::<PartitionKind>(), rest) {
            (Err(_), _) => Self::Member,
            (Ok(kind), "") => Self::Valid(kind),
            (Ok(kind), rest) => {
                let reason = rest.strip_prefix("invalid").unwrap_or(rest).trim();
                Self::Invalid(kind, reason.trim_matches(['(', ')']).to_owned())
            }
        }
    }
}

/// One group between the root and the container, as read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Group {
    /// Its directory, absolute.
    pub dir: PathBuf,
    /// `cpuset.cpus`.
    pub cpus: CpuSet,
    /// `cpuset.cpus.exclusive`.
    pub exclusive: CpuSet,
    /// `cpuset.cpus.effective`.
    pub effective: CpuSet,
    /// `cpuset.cpus.partition`.
    pub partition: PartitionState,
    /// `cpuset.mems`.
    pub mems: NodeSet,
    /// `cpu.max` (v2), or `cpu.cfs_quota_us` (v1); `None` without the controller.
    pub quota: Option<String>,
}

/// Another group that holds CPUs exclusively.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its directory, absolute.
    pub dir: PathBuf,
    /// The CPUs.
    pub cpus: CpuSet,
}

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The running kernel.
    pub kernel: Kernel,
    /// The machine.
    pub topology: Topology,
    /// What the cpuset controller can do.
    pub support: Support,
    /// `cpuset.cpus.effective` of the root group: what is left for everybody else.
    pub root_effective: CpuSet,
    /// The groups from the root's child to the container's own, which is last.
    pub chain: Vec<Group>,
    /// Groups outside the chain that hold CPUs exclusively.
    pub holders: Vec<Holder>,
    /// Groups beside the container's whose CPU list overlaps the target's, with that list.
    pub overlapping: Vec<Holder>,
    /// v1 only: the directories with a CPU quota, topmost first, the container's own last.
    pub quotas_v1: Vec<Group>,
}

/// Why facts could not be collected.
#[derive(Debug, thiserror::Error)]
pub enum FactsError {
    /// The topology could not be read.
    #[error("read the machine's topology")]
    Topology(#[source] pinion_topology::ReadError),
    /// A kernel file could not be read or understood.
    #[error("read {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel answered.
        #[source]
        source: std::io::Error,
    },
}

impl From<ReadFileError> for FactsError {
    fn from(ReadFileError { path, source }: ReadFileError) -> Self {
        Self::File { path, source }
    }
}

impl Facts {
    /// Reads everything planning for this target needs.
    pub fn read(host: &Host, target: &Target) -> Result<Self, FactsError> {
        let topology = Topology::read_from(&host.root).map_err(FactsError::Topology)?;
        let mut facts = Self {
            kernel: host.kernel.clone(),
            topology,
            support: Support::Absent,
            root_effective: CpuSet::new(),
            chain: Vec::new(),
            holders: Vec::new(),
            overlapping: Vec::new(),
            quotas_v1: quotas_v1(host, target)?,
        };
        match (host.v2_with_cpuset(), &target.cgroup) {
            (Some(root), Some(cgroup)) => facts.read_v2(root, cgroup, target)?,
            _ if target.v1.contains_key("cpuset") => facts.support = Support::V1,
            _ => {}
        }
        Ok(facts)
    }

    /// The root's CPUs and the groups down to the container's, whose directory it returns.
    fn read_chain(&mut self, root: &Path, cgroup: &Path) -> Result<PathBuf, FactsError> {
        let effective = files::read_set::<Cpus>(&root.join("cpuset.cpus.effective"))?;
        self.root_effective = effective.unwrap_or_else(|| self.topology.online.clone());
        let mut dir = root.to_owned();
        for name in cgroup.strip_prefix("/").unwrap_or(cgroup) {
            dir.push(name);
            self.chain.push(group(&dir)?);
        }
        self.support = support(&dir, &self.kernel);
        Ok(dir)
    }

    fn read_v2(&mut self, root: &Path, cgroup: &Path, target: &Target) -> Result<(), FactsError> {
        let dir = self.read_chain(root, cgroup)?;
        let wanted = target.cpus.clone().unwrap_or_default();
        for other in files::directories(root) {
            let related = other.starts_with(&dir) || dir.starts_with(&other);
            if related {
                continue;
            }
            let cpus = held(&other)?;
            if !cpus.is_empty() {
                self.holders.push(Holder { dir: other.clone(), cpus });
            }
            let cpus: CpuSet = files::read_set(&other.join("cpuset.cpus"))?.unwrap_or_default();
            if other.parent() == dir.parent() && !cpus.is_disjoint(&wanted) {
                self.overlapping.push(Holder { dir: other, cpus });
            }
        }
        Ok(())
    }

    /// Reads only the groups on the way down to the container's and those directly beside
    /// them, and of the machine only which CPUs are online.
    pub(crate) fn around(host: &Host, target: &Target) -> Result<Self, FactsError> {
        let online = host.root.join("sys/devices/system/cpu/online");
        let mut facts = Self {
            kernel: host.kernel.clone(),
            topology: Topology {
                cpus: Vec::new(),
                nodes: Vec::new(),
                hugepages: Vec::new(),
                online: files::read_set(&online)?.unwrap_or_default(),
                offline: CpuSet::new(),
                isolated: CpuSet::new(),
                nohz_full: CpuSet::new(),
            },
            support: Support::Absent,
            root_effective: CpuSet::new(),
            chain: Vec::new(),
            holders: Vec::new(),
            overlapping: Vec::new(),
            quotas_v1: Vec::new(),
        };
        let (Some(root), Some(cgroup)) = (host.v2_with_cpuset(), &target.cgroup) else {
            return Ok(facts);
        };
        facts.read_chain(root, cgroup)?;
        let wanted = target.cpus.clone().unwrap_or_default();
        let own: Vec<PathBuf> = facts.chain.iter().map(|group| group.dir.clone()).collect();
        let mut parent = root;
        for dir in &own {
            for beside in files::children(parent).into_iter().filter(|child| child != dir) {
                facts.read_beside(&beside, Some(dir) == own.last(), &wanted)?;
            }
            parent = dir;
        }
        Ok(facts)
    }

    /// What a group beside the way down has of the wanted CPUs.
    fn read_beside(
        &mut self,
        beside: &Path,
        of_the_container: bool,
        wanted: &CpuSet,
    ) -> Result<(), FactsError> {
        let set = |name: &str| files::read_set::<Cpus>(&beside.join(name));
        let cpus = set("cpuset.cpus.exclusive")?.unwrap_or_default();
        if !cpus.is_disjoint(wanted) {
            self.holders.push(Holder { dir: beside.to_owned(), cpus });
        }
        if of_the_container {
            let cpus = set("cpuset.cpus")?.unwrap_or_default();
            if !cpus.is_disjoint(wanted) {
                self.overlapping.push(Holder { dir: beside.to_owned(), cpus });
            }
        }
        Ok(())
    }

    /// Whether the container's group is directly below the root group.
    #[must_use]
    pub fn below_root(&self) -> bool {
        self.chain.len() == 1
    }
}

/// CPUs a group outside the chain holds: what it asked for exclusively, or what its valid
/// partition has.
fn held(dir: &Path) -> Result<CpuSet, FactsError> {
    let set = |name: &str| files::read_set::<Cpus>(&dir.join(name));
    let partition = files::read(&dir.join("cpuset.cpus.partition"))?.unwrap_or_default();
    let asked = set("cpuset.cpus.exclusive")?.unwrap_or_default();
    Ok(match PartitionState::parse(&partition) {
        PartitionState::Valid(_) => asked.union(&set("cpuset.cpus.effective")?.unwrap_or_default()),
        PartitionState::Member | PartitionState::Invalid(..) => asked,
    })
}

fn group(dir: &Path) -> Result<Group, FactsError> {
    let set = |name: &str| files::read_set::<Cpus>(&dir.join(name));
    let partition = files::read(&dir.join("cpuset.cpus.partition"))?;
    Ok(Group {
        dir: dir.to_owned(),
        cpus: set("cpuset.cpus")?.unwrap_or_default(),
        exclusive: set("cpuset.cpus.exclusive")?.unwrap_or_default(),
        effective: set("cpuset.cpus.effective")?.unwrap_or_default(),
        partition: PartitionState::parse(&partition.unwrap_or_default()),
        mems: files::read_set::<Nodes>(&dir.join("cpuset.mems"))?.unwrap_or_default(),
        quota: files::read(&dir.join("cpu.max"))?,
    })
}

/// Decided by the files the group has; only the `isolated` kind, which has no file of its
/// own, by the kernel's version.
fn support(dir: &Path, kernel: &Kernel) -> Support {
    let has = |name: &str| dir.join(name).exists();
    if !has("cpuset.cpus") {
        Support::Absent
    } else if has("cpuset.cpus.exclusive") {
        Support::Remote
    } else if !has("cpuset.cpus.partition") {
        Support::Disjoint
    } else if kernel.version >= (6, 1) {
        Support::Local
    } else {
        Support::LocalRoot
    }
}

fn quotas_v1(host: &Host, target: &Target) -> Result<Vec<Group>, FactsError> {
    let (Some(root), Some(leaf)) = (host.v1.get("cpu"), target.v1.get("cpu")) else {
        return Ok(Vec::new());
    };
    let below_root = leaf.ancestors().take_while(|dir| *dir != root && dir.starts_with(root));
    let mut groups = Vec::new();
    for dir in below_root {
        let quota = files::read(&dir.join("cpu.cfs_quota_us"))?;
        groups.push(Group { dir: dir.to_owned(), quota, ..Group::default() });
    }
    groups.reverse();
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partition_states_keep_the_kernels_reason() {
        use PartitionState::{Invalid, Member, Valid};
        assert_eq!(PartitionState::parse("member"), Member);
        assert_eq!(PartitionState::parse(""), Member);
        assert_eq!(PartitionState::parse("isolated"), Valid(PartitionKind::Isolated));
        assert_eq!(
            PartitionState::parse("isolated invalid (Parent is not a partition root)"),
            Invalid(PartitionKind::Isolated, "Parent is not a partition root".to_owned())
        );
        assert_eq!(
            PartitionState::parse("root invalid"),
            Invalid(PartitionKind::Root, String::new())
        );
    }
}
