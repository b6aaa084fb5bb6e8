//! What a container is to be promised.

use std::collections::BTreeMap;
use std::sync::Arc;

use pinion_cri_proto::v1::{ContainerConfig, KeyValue, LinuxContainerResources};
use pinion_lease::Wish;
use pinion_placement::{
    Basis, Exclusivity, ExclusivityInputs, HugepageDemand, IrqQuiet, PartitionKind, Reason,
    Recorded, Refusal, Request, SharedWhy, Source, TermName, exclusivity,
};
use pinion_topology::{CpuSet, NodeSet, PageSize, Topology};
use serde::{Deserialize, Serialize};

use super::allocator;
use super::view::topology;
use crate::annotations::Wishes;
use crate::error::{Context, Error, Kind, Result};
use crate::node::Node;
use crate::record::{Phase, Sandbox};
use crate::services::blocking;

/// The handler that starts what it can and reports what it cannot give.
pub(crate) const PLAIN: &str = "pinion";
/// The handler that refuses what it cannot give.
pub(crate) const STRICT: &str = "pinion-strict";
/// The handler that gives a pod a kernel of its own, or refuses.
pub(crate) const VM: &str = "pinion-vm";

/// A RuntimeClass handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handler {
    /// Start, and report.
    Plain,
    /// All or nothing.
    Strict,
    /// In a virtual machine.
    Vm,
}

impl Handler {
    /// The handler of that name; the default one has none.
    pub(crate) fn parse(name: &str) -> Result<Self> {
        match name {
            "" | PLAIN => Ok(Self::Plain),
            STRICT => Ok(Self::Strict),
            VM => Ok(Self::Vm),
            other => Err(Error::invalid(format!(
                "runtime handler {other:?} is not known; there are \"\", {PLAIN:?}, {STRICT:?} \
                 and {VM:?}"
            ))),
        }
    }
}

/// What a container was promised, as its record keeps it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Contract {
    /// Refused rather than started with less.
    #[serde(default)]
    pub(crate) strict: bool,
    /// Its CPUs are its own.
    #[serde(default)]
    pub(crate) exclusive: bool,
    /// They were asked for in so many words, and are not its own.
    #[serde(default)]
    pub(crate) declined: bool,
    /// Why they are not, or on what ground they are.
    #[serde(default)]
    pub(crate) ground: String,
    /// The CPUs it may run on; all when empty.
    #[serde(default)]
    pub(crate) cpus: CpuSet,
    /// Those of the CPUs that it shares with others beside its own, which are no partition
    /// then; see [`Wishes::shared`].
    #[serde(default)]
    pub(crate) beside: CpuSet,
    /// The nodes its memory may come from; all when empty.
    #[serde(default)]
    pub(crate) mems: NodeSet,
    /// Hugepages it may use at most.
    #[serde(default)]
    pub(crate) hugepages: Vec<HugepageDemand>,
    /// Interrupts kept off its CPUs.
    #[serde(default)]
    pub(crate) irqs: IrqQuiet,
    /// No CPU quota, exclusive or not.
    #[serde(default)]
    pub(crate) unthrottled: bool,
    /// The frequency governor of its CPUs.
    #[serde(default)]
    pub(crate) governor: Option<String>,
    /// The wake-up latency limit of its CPUs, as the kernel writes it.
    #[serde(default)]
    pub(crate) latency: Option<String>,
    /// The device nodes it has.
    #[serde(default)]
    pub(crate) devices: Vec<pinion_device::Demand>,
}

impl Contract {
    /// The CPUs that no other container is to have, isolated by the kernel or not.
    pub(crate) fn own(&self) -> CpuSet {
        match (self.exclusive, self.beside.is_empty()) {
            (true, _) => self.cpus.clone(),
            (false, false) => self.cpus.difference(&self.beside),
            (false, true) => CpuSet::new(),
        }
    }

    /// A CPU list for its own CPUs as the list of all it may run on.
    pub(crate) fn with_shared(&self, own: &str) -> Result<String> {
        let cpus: CpuSet = parse("cpuset_cpus", own)?;
        let none = cpus.is_empty() || self.beside.is_empty();
        Ok(if none { own.to_owned() } else { cpus.union(&self.beside).to_string() })
    }

    /// What tells the processes in a container with both kinds of CPUs which are which; the
    /// names are those that CRI-O gives them.
    pub(crate) fn environment(&self) -> Vec<KeyValue> {
        if self.beside.is_empty() {
            return Vec::new();
        }
        let variable = |key: &str, cpus: &CpuSet| KeyValue {
            key: key.to_owned(),
            value: cpus.to_string().into(),
        };
        let own = variable("OPENSHIFT_ISOLATED_CPUS", &self.own());
        vec![own, variable("OPENSHIFT_SHARED_CPUS", &self.beside)]
    }

    /// The node-wide settings it needs. Only for CPUs of its own: what is set on shared ones
    /// would be set for everybody.
    pub(crate) fn loans(&self) -> Vec<Wish> {
        if !self.exclusive || self.cpus.is_empty() {
            return Vec::new();
        }
        let cpus = || self.cpus.clone();
        let quiet = (self.irqs != IrqQuiet::Any).then(|| Wish::QuietCpus { cpus: cpus() });
        let governor = self.governor.clone();
        let governor = governor.map(|governor| Wish::Governor { cpus: cpus(), governor });
        let limit = self.latency.clone();
        let latency = limit.map(|limit| Wish::ResumeLatency { cpus: cpus(), limit });
        [quiet, governor, latency].into_iter().flatten().collect()
    }

    /// What it has beyond limits, and so must be looked after.
    pub(crate) fn promises(&self) -> bool {
        self.exclusive
            || self.declined
            || self.unthrottled
            || self.irqs != IrqQuiet::Any
            || self.governor.is_some()
            || self.latency.is_some()
            || !self.hugepages.is_empty()
            || !self.devices.is_empty()
    }
}

/// A contract on its way into the runtime.
#[derive(Debug, Clone, Default)]
pub(crate) struct Decision {
    pub(crate) contract: Contract,
    /// For the ledger.
    pub(crate) demands: Vec<HugepageDemand>,
    /// Whether granted pages are proven by touching them.
    pub(crate) prefault: bool,
    /// Nodes the ledger chooses from first.
    pub(crate) prefer: NodeSet,
    /// For the runtime; the grants are added when the ledger has made them.
    pub(crate) annotations: BTreeMap<String, String>,
    request: Option<Request>,
}

impl Decision {
    /// The runtime's request, complete with the pages granted.
    pub(crate) fn with_grants(mut self, grants: &[pinion_placement::Grant]) -> Self {
        if let Some(mut request) = self.request.take() {
            if self.prefault {
                request.prefault = grants.to_vec();
            }
            self.annotations = request.to_annotations();
        }
        self
    }
}

/// Decides the contract of a new container from its request and the node as it is.
pub(crate) async fn decide(
    node: &Arc<Node>,
    sandbox: &Sandbox,
    id: &str,
    config: &ContainerConfig,
) -> Result<Decision> {
    let name = config.metadata.as_ref().map_or("", |m| m.name.as_str());
    let wishes = Wishes::read(&sandbox.config.annotations, name)?;
    let strict =
        Handler::parse(&sandbox.handler)? == Handler::Strict || wishes.strict.unwrap_or(false);
    let resources = config.linux.as_ref().and_then(|l| l.resources.clone()).unwrap_or_default();
    let nothing_asked = resources.cpuset_cpus.is_empty()
        && resources.cpuset_mems.is_empty()
        && resources.hugepage_limits.iter().all(|l| l.limit == 0);
    if nothing_asked && !strict && !wishes.any() {
        return Ok(Decision::default());
    }
    let topology = blocking(topology).await?;
    let others = others(node, id);
    let record = allocator::record(&node.config.isolation, sandbox, config).await;
    let asked = Asked {
        wishes,
        shared: shared_cpus(node),
        record: record.as_ref(),
        strict,
        infer: node.config.isolation.infer_exclusive,
        steer: node.config.isolation.steer_interrupts,
        resources: &resources,
        others: &others,
    };
    settle(&asked, &topology)
}

/// The CPUs for those who ask for shared ones beside their own.
fn shared_cpus(node: &Node) -> CpuSet {
    let configured = node.config.isolation.shared_cpus.parse().unwrap_or_default(); // checked at the start
    if configured == CpuSet::new() { node.profile.reserved() } else { configured }
}

/// CPU lists of all other containers that have one.
pub(super) fn others(node: &Node, id: &str) -> Vec<(String, CpuSet)> {
    let snapshot = node.registry.snapshot();
    snapshot
        .containers()
        .filter(|(_, c)| c.id != id && c.phase() != Phase::Exited && !c.contract.cpus.is_empty())
        .map(|(pod, c)| (format!("{}/{}", pod.sandbox.title(), c.name()), c.contract.cpus.clone()))
        .collect()
}

/// A request and what it is judged by.
struct Asked<'a> {
    wishes: Wishes,
    /// What there is for containers that want shared CPUs beside their own.
    shared: CpuSet,
    record: Option<&'a (Source, CpuSet)>,
    strict: bool,
    infer: bool,
    steer: bool,
    resources: &'a LinuxContainerResources,
    others: &'a [(String, CpuSet)],
}

/// The decision itself. Pure.
fn settle(asked: &Asked<'_>, topology: &Topology) -> Result<Decision> {
    let resources = asked.resources;
    let cpus: CpuSet = parse("cpuset_cpus", &resources.cpuset_cpus)?;
    let mems: NodeSet = parse("cpuset_mems", &resources.cpuset_mems)?;
    let verdict = exclusive(asked, &cpus, topology);
    let (exclusive, ground) = match verdict {
        Exclusivity::Exclusive(basis) => (true, basis_words(basis).to_owned()),
        Exclusivity::Shared(why) => (false, shared_words(&why)),
    };
    let hugepages = demands(resources, &mems)?;
    let both = exclusive && asked.wishes.shared && !asked.strict;
    let beside = if both { asked.shared.difference(&cpus) } else { CpuSet::new() };
    let exclusive = exclusive && beside.is_empty();
    let ground = if both { beside_words(&cpus, &beside) } else { ground };
    let contract = Contract {
        strict: asked.strict,
        exclusive,
        declined: !exclusive && (both || asked.wishes.exclusive == Some(true)),
        ground,
        cpus: cpus.union(&beside),
        beside,
        mems,
        hugepages: hugepages.clone(),
        irqs: asked.wishes.irqs.unwrap_or(if exclusive && asked.steer {
            IrqQuiet::Steerable
        } else {
            IrqQuiet::Any
        }),
        unthrottled: asked.wishes.unthrottled,
        governor: asked.wishes.governor.clone(),
        latency: asked.wishes.latency.clone(),
        devices: Vec::new(),
    };
    if asked.strict {
        of_shared_cpus(&contract, asked.wishes.shared)?;
    }
    let request = Request {
        partition: exclusive.then_some(PartitionKind::Isolated),
        strict: asked.strict,
        unthrottled: asked.wishes.unthrottled,
        ..Request::default()
    };
    let asks = exclusive || asked.strict || asked.wishes.unthrottled || !hugepages.is_empty();
    Ok(Decision {
        contract,
        prefault: asked.wishes.prefault.unwrap_or(asked.strict),
        prefer: topology.nodes_of(&cpus),
        demands: hugepages,
        annotations: BTreeMap::new(),
        request: asks.then_some(request),
    })
}

/// Refuses what can be given on exclusive CPUs only.
fn of_shared_cpus(contract: &Contract, beside: bool) -> Result<()> {
    let refuse = |term, detail| {
        let refusal = Refusal { term, reason: Reason::CpusShared, detail };
        Err(Error::from_foreign(Kind::Refused, refusal))
    };
    if beside {
        let detail = "cpu-shared.crio.io asks for shared CPUs beside the exclusive ones, and no \
                      group can be an isolated partition and have CPUs outside it; put what needs \
                      shared CPUs into a container of its own";
        return refuse(TermName::ExclusiveCpus, detail.to_owned());
    }
    if contract.exclusive {
        return Ok(());
    }
    let why = format!("the CPUs are shared: {}", contract.ground);
    if contract.declined {
        return refuse(TermName::ExclusiveCpus, why);
    }
    if contract.irqs != IrqQuiet::Any {
        return refuse(TermName::IrqQuiet, why);
    }
    if contract.governor.is_some() || contract.latency.is_some() {
        return refuse(TermName::Power, why);
    }
    Ok(())
}

fn exclusive(asked: &Asked<'_>, cpus: &CpuSet, topology: &Topology) -> Exclusivity {
    let annotation = asked.wishes.exclusive.map(|wish| wish.then_some(PartitionKind::Isolated));
    // Without inference a container is shared unless someone said otherwise.
    let shares =
        if asked.infer { u64::try_from(asked.resources.cpu_shares).unwrap_or(0) } else { 0 };
    exclusivity(&ExclusivityInputs {
        annotation,
        record: asked.record.map(|(source, cpus)| Recorded { source: *source, cpus }),
        strict: asked.strict,
        cpus,
        shares,
        online: &topology.online,
        others: asked.others,
    })
}

/// A contract under changed limits. What is exclusive stays so: with new CPUs, not with none.
pub(crate) fn resized(old: &Contract, wanted: &LinuxContainerResources) -> Result<Contract> {
    let cpus: CpuSet = parse("cpuset_cpus", &wanted.cpuset_cpus)?;
    let mems: NodeSet = parse("cpuset_mems", &wanted.cpuset_mems)?;
    let mut new = Contract { cpus, mems, ..old.clone() };
    for demand in &mut new.hugepages {
        if demand.nodes.is_some() && !new.mems.is_empty() {
            demand.nodes = Some(new.mems.clone());
        }
    }
    Ok(new)
}

/// What became of the wish for both kinds of CPUs.
fn beside_words(own: &CpuSet, beside: &CpuSet) -> String {
    if beside.is_empty() {
        return "no CPUs are set aside for cpu-shared.crio.io (isolation.shared_cpus, or the node \
                profile's reserved_cpus), so it has its own alone"
            .to_owned();
    }
    format!(
        "CPUs {own} are its own and {beside} are shared, by cpu-shared.crio.io: no other \
         container has {own}, but the kernel does not isolate them, since no group can be an \
         isolated partition and have CPUs outside it"
    )
}

fn basis_words(basis: Basis) -> &'static str {
    match basis {
        Basis::Record(Source::Answer) => "kubelet's PodResources API",
        Basis::Record(Source::StateFile) => "kubelet's cpu_manager_state",
        Basis::Record(Source::Environment) => "DRA_CPUSET_* in the environment",
        Basis::Annotation => "annotation",
        Basis::Strict => "strict handler and whole CPU shares",
        Basis::Inference => "whole CPU shares of an own CPU list",
    }
}

fn shared_words(why: &SharedWhy) -> String {
    match why {
        SharedWhy::Annotation => "the annotation says shared".into(),
        SharedWhy::NoCpus => "no CPU list was given".into(),
        SharedWhy::AllCpus => "the CPU list is every CPU".into(),
        SharedWhy::Shares { shares, cpus } => {
            format!("{shares} CPU shares are not {cpus} whole CPUs")
        }
        SharedWhy::Record(_) => "kubelet's CPU manager gave it no CPUs of its own".into(),
        SharedWhy::Overlap { with, cpus } => format!("{with} has CPUs {cpus} too"),
    }
}

/// What the hugepage limits come to, in whole pages.
fn demands(resources: &LinuxContainerResources, mems: &NodeSet) -> Result<Vec<HugepageDemand>> {
    let asked = resources.hugepage_limits.iter().filter(|limit| limit.limit > 0);
    asked
        .map(|limit| {
            let size: PageSize = parse("hugepage_limits.page_size", &limit.page_size)?;
            Ok(HugepageDemand {
                size,
                pages: limit.limit / size.bytes(),
                nodes: (!mems.is_empty()).then(|| mems.clone()),
            })
        })
        .filter(|demand| demand.as_ref().map_or(true, |d| d.pages > 0))
        .collect()
}

fn parse<T>(field: &str, text: &str) -> Result<T>
where
    T: std::str::FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    text.parse().kind(crate::error::Kind::Invalid, || format!("linux.resources.{field} {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a container is told that asks for its CPUs by annotation while the allocator has
    /// `own` on record for it and the request names everybody's.
    fn asks(strict: bool, own: &str) -> Result<Decision> {
        let topology = Topology {
            cpus: Vec::new(),
            nodes: Vec::new(),
            hugepages: Vec::new(),
            online: "0-3".parse().unwrap(),
            offline: CpuSet::new(),
            isolated: CpuSet::new(),
            nohz_full: CpuSet::new(),
        };
        let record = (Source::StateFile, own.parse().unwrap());
        let resources = LinuxContainerResources {
            cpuset_cpus: "0-1".into(),
            cpu_shares: 102,
            ..Default::default()
        };
        let wishes = Wishes { exclusive: Some(true), ..Wishes::default() };
        let asked = Asked {
            wishes,
            shared: CpuSet::new(),
            record: Some(&record),
            strict,
            infer: true,
            steer: false,
            resources: &resources,
            others: &[],
        };
        settle(&asked, &topology)
    }

    #[test]
    fn shared_cpus_beside_its_own_cost_the_isolation_and_are_told() {
        let topology = Topology {
            cpus: Vec::new(),
            nodes: Vec::new(),
            hugepages: Vec::new(),
            online: "0-7".parse().unwrap(),
            offline: CpuSet::new(),
            isolated: CpuSet::new(),
            nohz_full: CpuSet::new(),
        };
        let resources = LinuxContainerResources { cpuset_cpus: "4-5".into(), ..Default::default() };
        let ask = |strict, shared: &str| {
            let wishes = Wishes { exclusive: Some(true), shared: true, ..Wishes::default() };
            let asked = Asked {
                wishes,
                shared: shared.parse().unwrap(),
                record: None,
                strict,
                infer: false,
                steer: true,
                resources: &resources,
                others: &[],
            };
            settle(&asked, &topology)
        };
        let contract = ask(false, "0-1").unwrap().contract;
        assert_eq!(
            (contract.cpus.to_string(), contract.own().to_string()),
            ("0-1,4-5".into(), "4-5".into())
        );
        assert!(contract.declined && !contract.exclusive && contract.loans().is_empty());
        assert_eq!(contract.with_shared("4-7").unwrap(), "0-1,4-7");
        let variables: Vec<_> = contract.environment().into_iter().map(|v| v.value).collect();
        assert_eq!(variables, [b"4-5".to_vec(), b"0-1".to_vec()]);
        let alone = ask(false, "").unwrap().contract;
        assert!(alone.exclusive && alone.ground.contains("isolation.shared_cpus"));
        assert!(alone.environment().is_empty());
        let refused = ask(true, "0-1").unwrap_err().to_string();
        assert!(refused.contains("cpu-shared.crio.io"), "{refused}");
    }

    #[test]
    fn the_shared_pool_is_nobody_s_own_however_it_is_asked_for() {
        let refused = asks(true, "").unwrap_err().to_string();
        let why = "exclusive-cpus: the CPUs are shared: kubelet's CPU manager gave it no CPUs";
        assert!(refused.starts_with(why), "{refused}");
        let given = asks(false, "").unwrap().contract;
        assert!(given.declined && given.promises() && !given.exclusive);
        let own = asks(true, "0-1").unwrap().contract;
        assert!(own.exclusive && !own.declined);
    }
}
