//! CPUs chosen by Pinion itself, for nodes whose kubelet has no static CPU manager.
//!
//! | annotation of the pod | meaning |
//! |---|---|
//! | `cpu.pinion.dev/count` | exclusive CPUs, chosen here; `….count.<container>` for one container |
//! | `cpu.pinion.dev/numa` | the NUMA node they must be on |
//!
//! The choice is made under one lock over everybody's CPUs, written into the request as
//! kubelet would have written it, and stored with the intent as a holding; from there on the
//! container is like any other with a CPU list.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use pinion_cri_proto::v1;
use pinion_placement::{CpuDemand, CpuSupply, allocate};
use pinion_topology::{CpuSet, NodeSet, PageSize, Topology, cache};

use super::{devices, topology};
use crate::error::{Context, Error, Kind, Result};
use crate::node::Node;
use crate::record::{Holding, Sandbox};
use crate::services::blocking;

const COUNT: &str = "cpu.pinion.dev/count";
const NUMA: &str = "cpu.pinion.dev/numa";

/// CPUs chosen here, by container.
#[derive(Debug, Default)]
pub(crate) struct Chosen(Mutex<BTreeMap<String, CpuSet>>);

impl Chosen {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, CpuSet>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a container's CPUs back.
    pub(crate) fn release(&self, container: &str) {
        self.lock().remove(container);
    }

    /// Takes over what a container held before a restart of the server.
    pub(crate) fn restore(&self, holdings: &[Holding]) {
        for holding in holdings {
            if let Holding::Cpus { container, cpus } = holding {
                self.lock().insert(container.clone(), cpus.clone());
            }
        }
    }
}

/// What the pod's annotations ask for on behalf of one container.
pub(crate) fn wanted(
    annotations: &HashMap<String, String>,
    container: &str,
) -> Result<Option<CpuDemand>> {
    let get = |key: &str| annotations.get(&format!("{key}.{container}")).or(annotations.get(key));
    let number = |key: &str| {
        let parse = |text: &String| {
            text.parse::<u32>().map_err(|_not_one| {
                Error::invalid(format!("annotation {key}: {text:?} is not a number"))
            })
        };
        get(key).map(parse).transpose()
    };
    let node = number(NUMA)?;
    match number(COUNT)? {
        Some(count) => Ok(Some(CpuDemand { count: count as usize, node })),
        None if node.is_some() => {
            Err(Error::invalid(format!("annotation {NUMA} is of use only beside {COUNT}")))
        }
        None => Ok(None),
    }
}

/// The request with CPUs chosen, if it asks for that, and what the container then holds.
pub(crate) async fn choose(
    node: &Arc<Node>,
    sandbox: &Sandbox,
    id: &str,
    config: &v1::ContainerConfig,
) -> Result<(v1::ContainerConfig, Option<Holding>)> {
    let name = config.metadata.as_ref().map_or("", |m| m.name.as_str());
    let mut config = config.clone();
    let Some(demand) = wanted(&sandbox.config.annotations, name)? else {
        return Ok((config, None));
    };
    let resources = config.linux.get_or_insert_default().resources.get_or_insert_default();
    if !resources.cpuset_cpus.is_empty() {
        return Err(Error::invalid(format!(
            "annotation {COUNT}: the request names CPUs {} already; use one or the other",
            resources.cpuset_cpus
        )));
    }
    let functions = devices::functions(&sandbox.config.annotations, name)?;
    let (chooser, container, resources_then) = (node.clone(), id.to_string(), resources.clone());
    let asked = config.clone();
    let (cpus, mems) = blocking(move || {
        let topology = topology()?;
        let mut prefer = devices::nodes(&asked, &functions);
        if prefer.is_empty() {
            prefer = with_pages(&topology, &resources_then)?;
        }
        let cpus = pick(&chooser, &container, demand, &topology, &prefer)?;
        let mems = topology.nodes_of(&cpus);
        Ok((cpus, mems))
    })
    .await?;
    let resources = config.linux.get_or_insert_default().resources.get_or_insert_default();
    resources.cpuset_cpus = cpus.to_string();
    if resources.cpuset_mems.is_empty() {
        resources.cpuset_mems = mems.to_string();
    }
    let holding = Holding::Cpus { container: id.to_string(), cpus };
    Ok((config, Some(holding)))
}

fn pick(
    node: &Node,
    container: &str,
    demand: CpuDemand,
    topology: &Topology,
    prefer: &NodeSet,
) -> Result<CpuSet> {
    let caches = cache::last_level(Path::new("/")).context(|| "read the caches".to_string())?;
    let mut chosen = node.cpus.lock();
    // A list of all CPUs is no claim to any.
    let partial = |(_, cpus): &(String, CpuSet)| !topology.online.is_subset(cpus);
    let mut taken: Vec<(String, CpuSet)> =
        super::decide::others(node, container).into_iter().filter(partial).collect();
    taken.extend(chosen.iter().map(|(id, cpus)| (id.chars().take(12).collect(), cpus.clone())));
    let supply =
        CpuSupply { topology, caches: &caches, reserved: &node.profile.reserved(), taken: &taken };
    let cpus = allocate(demand, &supply, prefer)
        .map_err(|refusal| Error::from_foreign(Kind::Refused, refusal))?;
    chosen.insert(container.to_string(), cpus.clone());
    Ok(cpus)
}

/// Nodes whose free pages are enough for the container's limits.
fn with_pages(topology: &Topology, resources: &v1::LinuxContainerResources) -> Result<NodeSet> {
    let mut enough = NodeSet::new();
    let limits: Vec<_> = resources.hugepage_limits.iter().filter(|l| l.limit > 0).collect();
    if limits.is_empty() {
        return Ok(enough);
    }
    for node in &topology.nodes {
        let mut fits = true;
        for limit in &limits {
            let size: PageSize = limit
                .page_size
                .parse()
                .kind(Kind::Invalid, || format!("page size {:?}", limit.page_size))?;
            let free = topology.pool(node.id, size).map_or(0, |pool| pool.free);
            fits &= free >= limit.limit / size.bytes();
        }
        if fits {
            enough.insert(node.id).context(|| "collect nodes".to_string())?;
        }
    }
    Ok(enough)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_s_own_number_wins_and_a_node_alone_is_an_error() {
        let map = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
        };
        let both = map(&[(COUNT, "2"), ("cpu.pinion.dev/count.main", "4"), (NUMA, "1")]);
        assert_eq!(wanted(&both, "main").unwrap(), Some(CpuDemand { count: 4, node: Some(1) }));
        assert_eq!(wanted(&both, "side").unwrap().unwrap().count, 2);
        assert_eq!(wanted(&map(&[]), "main").unwrap(), None);
        assert!(wanted(&map(&[(NUMA, "1")]), "main").is_err());
        assert!(wanted(&map(&[(COUNT, "two")]), "main").is_err());
    }

    #[test]
    fn what_was_held_before_a_restart_is_held_again() {
        let chosen = Chosen::default();
        let cpus: CpuSet = "4-5".parse().unwrap();
        chosen.restore(&[Holding::Cpus { container: "c".into(), cpus: cpus.clone() }]);
        assert_eq!(chosen.lock().get("c"), Some(&cpus));
        chosen.release("c");
        assert!(chosen.lock().is_empty());
    }
}
