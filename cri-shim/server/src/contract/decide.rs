//! What a container is to be promised.

use std::collections::BTreeMap;
use std::sync::Arc;

use pinion_cri_proto::v1::{ContainerConfig, LinuxContainerResources};
use pinion_placement::{
    Exclusivity, ExclusivityInputs, HugepageDemand, PartitionKind, Request, SharedWhy, exclusivity,
};
use pinion_topology::{CpuSet, NodeSet, PageSize, Topology};
use serde::{Deserialize, Serialize};

use super::view::topology;
use crate::annotations::Wishes;
use crate::error::{Context, Error, Result};
use crate::node::Node;
use crate::record::{Phase, Sandbox};
use crate::services::blocking;

/// The handler that starts what it can and reports what it cannot give.
pub(crate) const PLAIN: &str = "pinion";
/// The handler that refuses what it cannot give.
pub(crate) const STRICT: &str = "pinion-strict";

/// A RuntimeClass handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handler {
    /// Start, and report.
    Plain,
    /// All or nothing.
    Strict,
}

impl Handler {
    /// The handler of that name; the default one has none.
    pub(crate) fn parse(name: &str) -> Result<Self> {
        match name {
            "" | PLAIN => Ok(Self::Plain),
            STRICT => Ok(Self::Strict),
            other => Err(Error::invalid(format!(
                "runtime handler {other:?} is not known; there are \"\", {PLAIN:?} and {STRICT:?}"
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
    /// Why they are not, or on what ground they are.
    #[serde(default)]
    pub(crate) ground: String,
    /// The CPUs it may run on; all when empty.
    #[serde(default)]
    pub(crate) cpus: CpuSet,
    /// The nodes its memory may come from; all when empty.
    #[serde(default)]
    pub(crate) mems: NodeSet,
    /// Hugepages it may use at most.
    #[serde(default)]
    pub(crate) hugepages: Vec<HugepageDemand>,
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
    if nothing_asked && !strict && wishes.exclusive != Some(true) {
        return Ok(Decision::default());
    }
    let topology = blocking(topology).await?;
    let others = others(node, id);
    let asked = Asked {
        wishes,
        strict,
        infer: node.config.isolation.infer_exclusive,
        resources: &resources,
        others: &others,
    };
    settle(&asked, &topology)
}

/// CPU lists of all other containers that have one.
fn others(node: &Node, id: &str) -> Vec<(String, CpuSet)> {
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
    strict: bool,
    infer: bool,
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
        Exclusivity::Exclusive(basis) => (true, format!("{basis:?}").to_lowercase()),
        Exclusivity::Shared(why) => (false, shared_words(&why)),
    };
    let hugepages = demands(resources, &mems)?;
    let contract = Contract {
        strict: asked.strict,
        exclusive,
        ground,
        cpus: cpus.clone(),
        mems,
        hugepages: hugepages.clone(),
    };
    let request = Request {
        partition: exclusive.then_some(PartitionKind::Isolated),
        strict: asked.strict,
        ..Request::default()
    };
    let asks = exclusive || asked.strict || !hugepages.is_empty();
    Ok(Decision {
        contract,
        prefault: asked.wishes.prefault.unwrap_or(asked.strict),
        prefer: topology.nodes_of(&cpus),
        demands: hugepages,
        annotations: BTreeMap::new(),
        request: asks.then_some(request),
    })
}

fn exclusive(asked: &Asked<'_>, cpus: &CpuSet, topology: &Topology) -> Exclusivity {
    let annotation = asked.wishes.exclusive.map(|wish| wish.then_some(PartitionKind::Isolated));
    // Without inference a container is shared unless someone said otherwise.
    let shares =
        if asked.infer { u64::try_from(asked.resources.cpu_shares).unwrap_or(0) } else { 0 };
    exclusivity(&ExclusivityInputs {
        annotation,
        strict: asked.strict,
        cpus,
        shares,
        online: &topology.online,
        others: asked.others,
    })
}

fn shared_words(why: &SharedWhy) -> String {
    match why {
        SharedWhy::Annotation => "the annotation says shared".into(),
        SharedWhy::NoCpus => "no CPU list was given".into(),
        SharedWhy::AllCpus => "the CPU list is every CPU".into(),
        SharedWhy::Shares { shares, cpus } => {
            format!("{shares} CPU shares are not {cpus} whole CPUs")
        }
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
