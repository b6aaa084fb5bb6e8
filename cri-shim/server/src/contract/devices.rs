//! The devices of a container: what CRI lists, what CDI adds, what VFIO hands over; planned
//! before anything is made, proven before the start, audited afterwards.
//!
//! ```text
//!  plan    CRI devices · CDI names · vfio annotation ─▶ demands, edits, bindings   refuses
//!  claim   the functions are this container's                                      in memory
//!  (intent committed, with the bindings in its holdings)
//!  bind    the functions to vfio-pci                                               kernel
//!  add     CDI edits, VFIO nodes, memlock limit into the OCI configuration
//!  prove   may each node be opened in the container's group?                       before start
//!  term    what the kernel shows now                                               receipt
//! ```
//!
//! | annotation of the pod | meaning |
//! |---|---|
//! | `device.pinion.dev/vfio` | PCI addresses, separated by commas, handed over by VFIO; `….vfio.<container>` for one container |

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use oci_spec::runtime::{PosixRlimitBuilder, PosixRlimitType, Spec};
use pinion_cri_proto::v1;
use pinion_device::cdi::{self, Edits, Registry};
use pinion_device::vfio::{self, Allowed, Binding};
use pinion_device::{Address, Answer, Demand, Locality, NodeKind, Place, Seen, judge, place};
use pinion_placement::{Reason, Refusal, Term, TermName};
use pinion_spec::HostPaths;
use pinion_topology::{NodeSet, Topology};

use super::Contract;
use crate::error::{Context, Error, Kind, Result};
use crate::node::Node;
use crate::record::{Container, Holding, Phase, Sandbox};
use crate::services::blocking;

const VFIO: &str = "device.pinion.dev/vfio";
const VFIO_CONTAINER: &str = "/dev/vfio/vfio";
/// What was proven before the start, in the container's directory.
const PROOF: &str = "devices.json";
const ROOT: &str = "/";

/// Keys of annotations that name CDI devices begin with this (CDI 1.0, "annotations").
const CDI_ANNOTATIONS: &str = "cdi.k8s.io/";

/// What a container is to have.
#[derive(Debug, Clone, Default)]
pub(crate) struct Devices {
    /// Of its CDI devices.
    pub(crate) edits: Edits,
    /// Functions handed over by VFIO, as they are now.
    pub(crate) bindings: Vec<Binding>,
}

/// CDI files and claimed functions of the node.
#[derive(Debug)]
pub(crate) struct Inventory {
    cdi: Mutex<Registry>,
    /// Functions handed over by VFIO, with their container.
    claims: Mutex<BTreeMap<Address, String>>,
}

impl Inventory {
    pub(crate) fn new(cdi_dirs: Vec<PathBuf>) -> Self {
        Self { cdi: Mutex::new(Registry::new(cdi_dirs)), claims: Mutex::default() }
    }

    /// Devices on offer, and what is wrong with which file. Blocks.
    pub(crate) fn cdi(&self) -> serde_json::Value {
        let mut registry = self.cdi.lock().unwrap_or_else(PoisonError::into_inner);
        let devices = registry.devices();
        let errors: BTreeMap<String, String> = registry
            .errors()
            .iter()
            .map(|(path, errors)| (path.display().to_string(), errors.join("; ")))
            .collect();
        serde_json::json!({ "devices": devices, "errors": errors })
    }

    /// Functions handed over, with their container.
    pub(crate) fn claims(&self) -> BTreeMap<String, String> {
        let claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        claims.iter().map(|(address, holder)| (address.to_string(), holder.clone())).collect()
    }

    /// Makes the functions this container's, all or none.
    pub(crate) fn claim(&self, container: &str, bindings: &[Binding]) -> Result<()> {
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        let other = |binding: &&Binding| {
            claims.get(&binding.address).is_some_and(|holder| holder != container)
        };
        if let Some(taken) = bindings.iter().find(other) {
            let holder = claims.get(&taken.address).cloned().unwrap_or_default();
            let detail = format!("{} belongs to container {holder}", taken.address);
            return Err(refused(Reason::DeviceInUse, detail));
        }
        for binding in bindings {
            claims.insert(binding.address.clone(), container.to_string());
        }
        Ok(())
    }

    /// Forgets the claims of a container.
    pub(crate) fn unclaim(&self, container: &str) {
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        claims.retain(|_, holder| holder != container);
    }

    /// Takes over what a container held before a restart of the server.
    pub(crate) fn restore(&self, holdings: &[Holding]) {
        for holding in holdings {
            if let Holding::Devices { container, bindings } = holding
                && let Err(error) = self.claim(container, bindings)
            {
                tracing::warn!(container, error = %error.chain(), "a function has two holders");
            }
        }
    }
}

/// Decides a container's devices. What a strict container cannot have is refused here, before
/// anything is made.
pub(crate) async fn plan(
    node: &Arc<Node>,
    sandbox: &Sandbox,
    id: &str,
    config: &v1::ContainerConfig,
    contract: &Contract,
) -> Result<Devices> {
    let name = config.metadata.as_ref().map_or("", |m| m.name.as_str());
    let functions = functions(&sandbox.config.annotations, name)?;
    let listed: Vec<String> = config.cdi_devices.iter().map(|d| d.name.clone()).collect();
    // Those of the container, which kubelet writes; a pod's are its user's.
    let annotations: BTreeMap<&str, &str> =
        config.annotations.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let names = cdi::from_annotations(&listed, &annotations, CDI_ANNOTATIONS)
        .map_err(|error| Error::from_foreign(Kind::Invalid, error))?;
    if functions.is_empty() && names.is_empty() && config.devices.is_empty() {
        return Ok(Devices::default());
    }
    let (node, id) = (node.clone(), id.to_string());
    let (config, contract) = (config.clone(), contract.clone());
    blocking(move || {
        let mut devices = Devices::default();
        if !names.is_empty() {
            let mut registry = node.devices.cdi.lock().unwrap_or_else(PoisonError::into_inner);
            let resolved = registry.resolve(&names);
            devices.edits =
                resolved.map_err(|error| Error::from_foreign(Kind::Precondition, error))?;
        }
        if !functions.is_empty() {
            let allowed = Allowed { entries: node.config.device.vfio_allow.clone() };
            devices.bindings = vfio::admit(Path::new(ROOT), &functions, &allowed)
                .map_err(|refusal| Error::from_foreign(Kind::Refused, refusal))?;
        }
        let mut seen = forecast(&devices.bindings)?;
        seen.extend(look(&asked(&config, &devices.edits)?)?);
        let term = judge(&seen, &locality(&node, &id, &contract)?, None);
        match term.refusal() {
            Some(refusal) if contract.strict => Err(Error::from_foreign(Kind::Refused, refusal)),
            _ => Ok(devices),
        }
    })
    .await
}

/// The addresses that the pod's annotations name for one container.
pub(super) fn functions(
    annotations: &HashMap<String, String>,
    container: &str,
) -> Result<Vec<Address>> {
    let own = format!("{VFIO}.{container}");
    let Some(text) = annotations.get(&own).or_else(|| annotations.get(VFIO)) else {
        return Ok(Vec::new());
    };
    let mut addresses: Vec<Address> = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let address = part.parse().kind(Kind::Invalid, || format!("annotation {VFIO}"))?;
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

/// The nodes that CRI lists and CDI adds.
fn asked(config: &v1::ContainerConfig, edits: &Edits) -> Result<Vec<Demand>> {
    let paths = HostPaths::inspect_devices(config)
        .kind(Kind::Precondition, || "look at the request's devices".to_string())?;
    let mut demands = Vec::new();
    for device in &config.devices {
        let access = device
            .permissions
            .parse()
            .map_err(|why: String| Error::invalid(format!("devices: permissions: {why}")))?;
        for (_, node) in paths.get(&device.host_path).into_iter().flatten() {
            let kind = match node.kind {
                oci_spec::runtime::LinuxDeviceType::B => NodeKind::Block,
                _ => NodeKind::Char,
            };
            let (major, minor) = (node.major, node.minor);
            demands.push(Demand { host: node.path.clone(), kind, major, minor, access });
        }
    }
    let added = cdi::demands(edits).map_err(|e| Error::from_foreign(Kind::Precondition, e))?;
    demands.extend(added);
    Ok(demands)
}

/// NUMA nodes of what CRI lists and of functions; what cannot be read has none, and is an
/// error where the devices are planned. Blocks.
pub(super) fn nodes(config: &v1::ContainerConfig, functions: &[Address]) -> NodeSet {
    let root = Path::new(ROOT);
    let mut found: Vec<u32> = Vec::new();
    for address in functions {
        let function = pinion_device::function(root, address).ok().flatten();
        found.extend(function.and_then(|function| function.numa));
    }
    for demand in asked(config, &Edits::default()).unwrap_or_default() {
        match place(root, &demand) {
            Ok(Some(Place::Function(function))) => found.extend(function.numa),
            Ok(Some(Place::Group(_, members))) => {
                found.extend(members.iter().filter_map(|m| m.numa));
            }
            Ok(Some(Place::Other(numa))) => found.extend(numa),
            Ok(Some(Place::Virtual) | None) | Err(_) => {}
        }
    }
    let mut nodes = NodeSet::new();
    for node in found {
        // Numbers of nodes come from the kernel, which has at most 1024.
        let _bounded = nodes.insert(node);
    }
    nodes
}

/// The groups as they will be once their functions are bound.
fn forecast(bindings: &[Binding]) -> Result<Vec<Seen>> {
    let mut seen = Vec::new();
    let node = |host: String, place| {
        let access = pinion_device::Access { read: true, write: true, mknod: false };
        let demand = Demand { host: host.into(), kind: NodeKind::Char, major: 0, minor: 0, access };
        Seen { demand, there: Ok(()), place: Some(place) }
    };
    for group in groups(bindings) {
        let mut members = pinion_device::group_members(Path::new(ROOT), group)
            .context(|| format!("read IOMMU group {group}"))?;
        for member in members.iter_mut().filter(|m| bindings.iter().any(|b| b.address == m.address))
        {
            member.driver = Some("vfio-pci".into());
        }
        seen.push(node(vfio::group_node(group), Place::Group(group, members)));
    }
    if !seen.is_empty() {
        seen.push(node(VFIO_CONTAINER.into(), Place::Virtual));
    }
    Ok(seen)
}

fn groups(bindings: &[Binding]) -> std::collections::BTreeSet<u32> {
    bindings.iter().map(|binding| binding.group).collect()
}

/// What the kernel shows of each node. Blocks.
fn look(demands: &[Demand]) -> Result<Vec<Seen>> {
    let one = |demand: &Demand| {
        let place = place(Path::new(ROOT), demand)
            .context(|| format!("find the device of {}", demand.host.display()))?;
        Ok(Seen { demand: demand.clone(), there: there(demand), place })
    };
    demands.iter().map(one).collect()
}

/// Whether the node on the host is still the one that was given.
fn there(demand: &Demand) -> std::result::Result<(), String> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let meta = demand.host.metadata().map_err(|error| error.to_string())?;
    let kind = match demand.kind {
        NodeKind::Char => meta.file_type().is_char_device(),
        NodeKind::Block => meta.file_type().is_block_device(),
    };
    let number = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    if kind && number == (demand.major, demand.minor) {
        return Ok(());
    }
    Err(format!("it is {}:{} now", number.0, number.1))
}

/// Where the container runs, and which groups others have. Blocks.
fn locality(node: &Node, id: &str, contract: &Contract) -> Result<Locality> {
    let topology = Topology::read().context(|| "read the machine's topology".to_string())?;
    let snapshot = node.registry.snapshot();
    let mut held = BTreeMap::new();
    let others = snapshot.containers().filter(|(_, other)| {
        other.id != id && other.phase() != Phase::Exited && !other.contract.devices.is_empty()
    });
    for (pod, other) in others {
        for demand in &other.contract.devices {
            if let Ok(Some(Place::Group(group, _))) = place(Path::new(ROOT), demand) {
                held.insert(group, format!("{}/{}", pod.sandbox.title(), other.name()));
            }
        }
    }
    Ok(Locality {
        cpus: topology.nodes_of(&contract.cpus),
        mems: contract.mems.clone(),
        uniform: topology.nodes.len() == 1,
        held,
    })
}

impl Devices {
    /// What the container will hold.
    pub(crate) fn holding(&self, container: &str) -> Option<Holding> {
        (!self.bindings.is_empty()).then(|| Holding::Devices {
            container: container.to_string(),
            bindings: self.bindings.clone(),
        })
    }

    /// Binds the functions. The holding must have been stored. Blocks.
    pub(crate) fn bind(&self) -> Result<()> {
        for binding in &self.bindings {
            vfio::bind(Path::new(ROOT), binding)
                .kind(Kind::Precondition, || format!("hand over {}", binding.address))?;
        }
        Ok(())
    }

    /// The request with the nodes of the bound groups among its devices, and their addresses
    /// in its environment.
    pub(crate) fn extend(&self, config: &v1::ContainerConfig) -> v1::ContainerConfig {
        let mut config = config.clone();
        if self.bindings.is_empty() {
            return config;
        }
        let groups = groups(&self.bindings).into_iter().map(vfio::group_node);
        for host in groups.chain([VFIO_CONTAINER.to_string()]) {
            if !config.devices.iter().any(|device| device.host_path == host) {
                config.devices.push(v1::Device {
                    container_path: host.clone(),
                    host_path: host,
                    permissions: "rw".into(),
                });
            }
        }
        let list: Vec<String> =
            self.bindings.iter().map(|b| format!("{}={}", b.address, b.group)).collect();
        let value = list.join(",").into_bytes();
        config.envs.push(v1::KeyValue { key: "PINION_VFIO".into(), value });
        config
    }

    /// Makes the CDI edits and says which nodes the container has. Blocks.
    pub(crate) fn add(&self, spec: &mut Spec, config: &v1::ContainerConfig) -> Result<Vec<Demand>> {
        cdi::apply(spec, &self.edits).map_err(|e| Error::from_foreign(Kind::Precondition, e))?;
        asked(config, &self.edits)
    }
}

/// VFIO pins what it maps for the device, and the kernel counts that against
/// RLIMIT_MEMLOCK: a container with a group may lock all the memory it may have.
pub(crate) fn raise_memlock(
    node: &Node,
    record: &Container,
    demands: &[Demand],
    spec: &mut Spec,
) -> Result<()> {
    let group = |d: &Demand| matches!(place(Path::new(ROOT), d), Ok(Some(Place::Group(..))));
    if !demands.iter().any(group) {
        return Ok(());
    }
    let resources = &record.resources.0;
    let huge = resources.hugepage_limits.iter().fold(0u64, |sum, l| sum.saturating_add(l.limit));
    let memory = u64::try_from(resources.memory_limit_in_bytes).ok().filter(|limit| *limit > 0);
    let wanted = memory.map_or(u64::MAX, |memory| memory.saturating_add(huge));
    let own = rustix::process::getrlimit(rustix::process::Resource::Memlock);
    let hard = own.maximum.unwrap_or(u64::MAX);
    if hard < wanted && !node.facts.bounding.contains("CAP_SYS_RESOURCE") {
        let message = format!(
            "RLIMIT_MEMLOCK cannot be raised from {hard} bytes, for piniond has no \
             CAP_SYS_RESOURCE: VFIO could not map the container's memory"
        );
        if record.contract.strict {
            return Err(refused(Reason::DeviceDenied, message));
        }
        tracing::warn!(container = record.id, "{message}");
        return Ok(());
    }
    let what = || "raise the memlock limit".to_string();
    let limit = PosixRlimitBuilder::default()
        .typ(PosixRlimitType::RlimitMemlock)
        .soft(wanted)
        .hard(wanted)
        .build()
        .context(what)?;
    if let Some(process) = spec.process_mut() {
        let mut limits = process.rlimits().clone().unwrap_or_default();
        limits.retain(|limit| limit.typ() != PosixRlimitType::RlimitMemlock);
        limits.push(limit);
        process.set_rlimits(Some(limits));
    }
    Ok(())
}

fn refused(reason: Reason, detail: impl Into<String>) -> Error {
    Error::from_foreign(Kind::Refused, Refusal::new(TermName::Devices, reason, detail))
}

/// Gives functions back to their drivers; every one is tried.
pub(crate) async fn release(node: &Arc<Node>, container: &str, bindings: &[Binding]) -> Result<()> {
    let (node, bindings, container) = (node.clone(), bindings.to_vec(), container.to_string());
    blocking(move || {
        let mut outcome = Ok(());
        for binding in &bindings {
            let restored = vfio::restore(Path::new(ROOT), binding)
                .context(|| format!("give back {}", binding.address));
            outcome = outcome.and(restored);
        }
        if outcome.is_ok() {
            node.devices.unclaim(&container);
        }
        outcome
    })
    .await
}

/// Asks the kernel, from inside the container's group, whether each node may be opened. The
/// answers are kept in the container's directory. Blocks.
pub(crate) fn prove(node: &Node, container: &Container) -> Result<()> {
    if container.contract.devices.is_empty() {
        return Ok(());
    }
    let paths = node.cgroups.container_paths(&container.cgroups_path, &container.id)?;
    let group = if node.cgroups.is_v2() { paths.unified } else { paths.v1.get("devices").cloned() };
    let group = group.ok_or_else(|| Error::precondition("no devices controller on this host"))?;
    let order = Order {
        entrances: vec![group.join("cgroup.procs")],
        demands: container.contract.devices.clone(),
    };
    let answers = ask(&order)?;
    let path = proof(node, container);
    let bytes = serde_json::to_vec(&answers).context(|| "encode the proof".to_string())?;
    pinion_sys::atomic_file::write_volatile(&path, &bytes, 0o600)
        .context(|| format!("write {}", path.display()))
}

fn proof(node: &Node, container: &Container) -> PathBuf {
    node.paths.pod(&container.pod).container(&container.id).path().join(PROOF)
}

/// What a probing process is told.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Order {
    entrances: Vec<PathBuf>,
    demands: Vec<Demand>,
}

/// Runs [`probe`] in a process of its own.
fn ask(order: &Order) -> Result<Vec<Answer>> {
    let what = || "probe the container's devices".to_string();
    let text = serde_json::to_string(order).context(what)?;
    let mut child = Command::new("/proc/self/exe")
        .arg("probe-devices")
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(what)?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(text.as_bytes()).context(what)?;
    }
    let output = child.wait_with_output().context(what)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
        return Err(Error::internal(format!("{}: {said}", what())));
    }
    Answer::parse(&String::from_utf8_lossy(&output.stdout)).context(what)
}

/// The probing process: reads its order from standard input, enters the groups, answers.
pub(crate) fn probe_stdin() -> std::io::Result<String> {
    let order: Order = serde_json::from_reader(std::io::stdin())?;
    let answers = pinion_device::probe(&order.entrances, &order.demands)?;
    Ok(pinion_device::report(&answers)?)
}

/// The receipt's term; `None` for a container without devices. Blocks.
pub(crate) fn term(node: &Node, container: &Container) -> Result<Option<Term>> {
    let contract = &container.contract;
    if contract.devices.is_empty() {
        return Ok(None);
    }
    let seen = look(&contract.devices)?;
    let answers = std::fs::read(proof(node, container)).ok();
    let answers = answers.and_then(|bytes| serde_json::from_slice::<Vec<Answer>>(&bytes).ok());
    let locality = locality(node, &container.id, contract)?;
    Ok(Some(judge(&seen, &locality, answers.as_deref())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_container_s_own_list_of_functions_wins() {
        let annotations = HashMap::from([
            (VFIO.to_string(), "0000:41:10.0, 0000:41:10.0,".to_string()),
            (format!("{VFIO}.side"), String::new()),
        ]);
        assert_eq!(functions(&annotations, "main").unwrap().len(), 1);
        assert!(functions(&annotations, "side").unwrap().is_empty());
        let bad = HashMap::from([(VFIO.to_string(), "../../x".to_string())]);
        assert_eq!(functions(&bad, "main").unwrap_err().kind(), Kind::Invalid);
    }

    #[test]
    fn a_function_has_one_holder() {
        let inventory = Inventory::new(Vec::new());
        let binding: Binding =
            serde_json::from_str(r#"{"address": "0000:41:10.0", "group": 11}"#).unwrap();
        inventory.claim("a", std::slice::from_ref(&binding)).unwrap();
        inventory.claim("a", std::slice::from_ref(&binding)).unwrap();
        let error = inventory.claim("b", std::slice::from_ref(&binding)).unwrap_err();
        assert!(error.chain().contains("belongs to container a"), "{}", error.chain());
        inventory.unclaim("a");
        inventory.claim("b", &[binding]).unwrap();
    }

    #[test]
    fn vfio_functions_become_nodes_and_an_address_list() {
        let binding: Binding =
            serde_json::from_str(r#"{"address": "0000:41:10.0", "group": 11}"#).unwrap();
        let devices = Devices { bindings: vec![binding], ..Default::default() };
        let config = devices.extend(&v1::ContainerConfig::default());
        let hosts: Vec<&str> = config.devices.iter().map(|d| d.host_path.as_str()).collect();
        assert_eq!(hosts, ["/dev/vfio/11", VFIO_CONTAINER]);
        assert_eq!(config.envs[0].value, b"0000:41:10.0=11");
        assert!(matches!(devices.holding("c"), Some(Holding::Devices { .. })));
        assert!(Devices::default().holding("c").is_none());
    }
}
