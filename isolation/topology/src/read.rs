//! Reads a [`Topology`] from `sys` and `proc` below a root directory.
//!
//! A missing file means "this kernel does not have it"; a file that is there and cannot be
//! understood is an error, because deciding on half a topology would misplace containers.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::{Cpu, CpuSet, IdSet, Kind, Memory, Node, PageSize, ParseSetError, Pool, Topology};

/// Why a topology could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A file or directory exists and cannot be read.
    #[error("read {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// A file holds no CPU or node list.
    #[error("{path} holds no list")]
    List {
        /// The file.
        path: PathBuf,
        /// What was wrong with it.
        #[source]
        source: ParseSetError,
    },
    /// A file holds no number.
    #[error("{path} holds {text:?}, not a number")]
    Number {
        /// The file.
        path: PathBuf,
        /// What it holds, cut to 64 characters.
        text: String,
    },
    /// There is no CPU at all below this root.
    #[error("{path} names no CPU: is sysfs mounted?")]
    NoCpus {
        /// The directory.
        path: PathBuf,
    },
}

impl Topology {
    /// Reads the machine this process runs on.
    pub fn read() -> Result<Self, ReadError> {
        Self::read_from(Path::new("/"))
    }

    /// Reads `sys` and `proc` below `root`.
    pub fn read_from(root: &Path) -> Result<Self, ReadError> {
        let cpu_dir = root.join("sys/devices/system/cpu");
        let present = present_cpus(&cpu_dir)?;
        let online = list(&cpu_dir.join("online"))?.unwrap_or_else(|| present.clone());
        if online.is_empty() {
            return Err(ReadError::NoCpus { path: cpu_dir });
        }
        let isolated = list(&cpu_dir.join("isolated"))?.unwrap_or_default();
        let nohz_full = nohz_full(&cpu_dir.join("nohz_full"))?;
        let hugepages = pools(&root.join("sys/kernel/mm/hugepages"))?;
        let nodes = nodes(root, &online, &hugepages)?;
        let mut cpus = Vec::with_capacity(present.len());
        for id in present.iter() {
            let dir = cpu_dir.join(format!("cpu{id}"));
            let node = node_of(id, &dir, &nodes)?;
            let up = online.contains(id);
            cpus.push(Cpu {
                id,
                core: if up { Some(number(&dir, "topology/core_id")?.unwrap_or(id)) } else { None },
                socket: if up {
                    Some(number(&dir, "topology/physical_package_id")?.unwrap_or(0))
                } else {
                    None
                },
                node,
                siblings: if up { siblings(id, &dir)? } else { CpuSet::new() },
                online: up,
                isolated: isolated.contains(id),
                nohz_full: nohz_full.contains(id),
            });
        }
        let offline = present.difference(&online);
        Ok(Self { cpus, nodes, hugepages, online, offline, isolated, nohz_full })
    }
}

/// The text of a file, or nothing where the kernel does not have it.
pub(crate) fn text(path: &Path) -> Result<Option<String>, ReadError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        // sysfs answers ENODEV or EINVAL where an attribute does not apply.
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ReadError::Io { path: path.to_owned(), source }),
    }
}

pub(crate) fn list<K: Kind>(path: &Path) -> Result<Option<IdSet<K>>, ReadError> {
    let parse = |text: String| text.parse();
    let parsed = text(path)?.map(parse).transpose();
    parsed.map_err(|source| ReadError::List { path: path.to_owned(), source })
}

/// A number that fits; negative numbers mean "unknown" in sysfs.
pub(crate) fn number(dir: &Path, name: &str) -> Result<Option<u32>, ReadError> {
    let path = dir.join(name);
    let Some(text) = text(&path)? else { return Ok(None) };
    match text.parse::<i64>() {
        Ok(value) => Ok(u32::try_from(value).ok()),
        Err(_) => Err(ReadError::Number { path, text: text.chars().take(64).collect() }),
    }
}

fn pages(dir: &Path, name: &str) -> Result<Option<u64>, ReadError> {
    let path = dir.join(name);
    let Some(text) = text(&path)? else { return Ok(None) };
    match text.parse() {
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(ReadError::Number { path, text: text.chars().take(64).collect() }),
    }
}

/// Numbers `n` of the entries called `<prefix>n`, in rising order; no entries without `dir`.
pub(crate) fn numbered(dir: &Path, prefix: &str) -> Result<Vec<u32>, ReadError> {
    let failed = |source| ReadError::Io { path: dir.to_owned(), source };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut numbers = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(prefix));
        numbers.extend(number.and_then(|number| number.parse::<u32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn present_cpus(cpu_dir: &Path) -> Result<CpuSet, ReadError> {
    if let Some(present) = list(&cpu_dir.join("present"))? {
        return Ok(present);
    }
    let mut present = CpuSet::new();
    for id in numbered(cpu_dir, "cpu")? {
        let too_large = |source| ReadError::List { path: cpu_dir.to_owned(), source };
        present.insert(id).map_err(too_large)?;
    }
    Ok(present)
}

/// Kernels built with nohz_full and booted without it say `(null)`.
fn nohz_full(path: &Path) -> Result<CpuSet, ReadError> {
    match text(path)?.as_deref() {
        None | Some("(null)") => Ok(CpuSet::new()),
        Some(_) => Ok(list(path)?.unwrap_or_default()),
    }
}

fn siblings(id: u32, dir: &Path) -> Result<CpuSet, ReadError> {
    // core_cpus_list is the newer name of the same set (Linux 5.3).
    for name in ["topology/thread_siblings_list", "topology/core_cpus_list"] {
        let siblings: Option<CpuSet> = list(&dir.join(name))?;
        if let Some(siblings) = siblings.filter(|siblings| siblings.contains(id)) {
            return Ok(siblings);
        }
    }
    CpuSet::single(id).map_err(|source| ReadError::List { path: dir.to_owned(), source })
}

/// Offline CPUs are missing from every node's list and keep only the `nodeN` link.
fn node_of(id: u32, dir: &Path, nodes: &[Node]) -> Result<u32, ReadError> {
    if let Some(node) = nodes.iter().find(|node| node.cpus.contains(id)) {
        return Ok(node.id);
    }
    let linked = numbered(dir, "node")?.first().copied();
    Ok(linked.unwrap_or_else(|| nodes.first().map_or(0, |node| node.id)))
}

fn nodes(root: &Path, online: &CpuSet, whole: &[Pool]) -> Result<Vec<Node>, ReadError> {
    let node_dir = root.join("sys/devices/system/node");
    let ids = numbered(&node_dir, "node")?;
    if ids.is_empty() {
        // A kernel without NUMA: everything is one node.
        return Ok(vec![Node {
            id: 0,
            cpus: online.clone(),
            distances: BTreeMap::from([(0, 10)]),
            memory: memory(&root.join("proc/meminfo"))?,
            hugepages: whole.to_vec(),
        }]);
    }
    let mut nodes = Vec::with_capacity(ids.len());
    for &id in &ids {
        let dir = node_dir.join(format!("node{id}"));
        let mut hugepages = pools(&dir.join("hugepages"))?;
        if let [_] = ids.as_slice() {
            for pool in &mut hugepages {
                let same = whole.iter().find(|whole| whole.size == pool.size);
                pool.reserved = same.and_then(|whole| whole.reserved);
            }
        }
        nodes.push(Node {
            id,
            cpus: list(&dir.join("cpulist"))?.unwrap_or_default(),
            distances: distances(&dir, &ids)?,
            memory: memory(&dir.join("meminfo"))?,
            hugepages,
        });
    }
    Ok(nodes)
}

/// The file has one column per online node, in the order of their numbers.
fn distances(dir: &Path, ids: &[u32]) -> Result<BTreeMap<u32, u32>, ReadError> {
    let path = dir.join("distance");
    let text = text(&path)?.unwrap_or_default();
    let mut distances = BTreeMap::new();
    for (&id, column) in ids.iter().zip(text.split_whitespace()) {
        let number = |_| ReadError::Number { path: path.clone(), text: column.to_owned() };
        distances.insert(id, column.parse().map_err(number)?);
    }
    Ok(distances)
}

/// Reads `MemTotal` and `MemFree` of `/proc/meminfo` or of a node's (`Node 0 MemTotal: …`).
fn memory(path: &Path) -> Result<Memory, ReadError> {
    let text = text(path)?.unwrap_or_default();
    let field = |name: &str| -> u64 {
        let line = text.lines().find(|line| line.split_whitespace().any(|word| word == name));
        let words: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
        let at = words.iter().position(|&word| word == name).map(|at| at + 1);
        let kib: u64 = at.and_then(|at| words.get(at)?.parse().ok()).unwrap_or(0);
        kib.saturating_mul(1024)
    };
    Ok(Memory { total: field("MemTotal:"), free: field("MemFree:") })
}

fn pools(dir: &Path) -> Result<Vec<Pool>, ReadError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(ReadError::Io { path: dir.to_owned(), source }),
    };
    let mut pools = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|source| ReadError::Io { path: dir.to_owned(), source })?;
        let name = entry.file_name();
        let size = name.to_str().and_then(|name| name.strip_prefix("hugepages-"));
        let Some(size) = size.and_then(|size| size.parse::<PageSize>().ok()) else { continue };
        let dir = entry.path();
        pools.push(Pool {
            size,
            total: pages(&dir, "nr_hugepages")?.unwrap_or(0),
            free: pages(&dir, "free_hugepages")?.unwrap_or(0),
            reserved: pages(&dir, "resv_hugepages")?,
            surplus: pages(&dir, "surplus_hugepages")?.unwrap_or(0),
        });
    }
    pools.sort_by_key(|pool| pool.size);
    Ok(pools)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NodeSet;
    use crate::testtree::{Tree, four_sockets, numa_node, this_host};

    fn cpus(list: &str) -> CpuSet {
        list.parse().unwrap()
    }

    #[test]
    fn a_two_node_machine_with_threads_is_read_whole() {
        let tree = numa_node();
        let topology = Topology::read_from(tree.root()).unwrap();
        assert_eq!((topology.cpus.len(), topology.nodes.len()), (8, 2));
        assert_eq!(topology.sockets(), [0, 1]);
        assert_eq!(topology.cores(), [&cpus("0-1"), &cpus("2-3"), &cpus("4-5"), &cpus("6-7")]);
        assert!(topology.has_smt());
        let cpu = topology.cpu(5).unwrap();
        assert_eq!((cpu.core, cpu.socket, cpu.node), (Some(0), Some(1), 1));
        assert_eq!(cpu.siblings, cpus("4-5"));
        let node = topology.node(1).unwrap();
        assert_eq!(node.distances, BTreeMap::from([(0, 21), (1, 10)]));
        assert_eq!(node.memory, Memory { total: 2 << 30, free: 1 << 30 });
        let two_mb = "2MB".parse().unwrap();
        let pool = topology.pool(1, two_mb).unwrap();
        assert_eq!((pool.total, pool.free, pool.reserved, pool.surplus), (128, 100, None, 0));
        assert_eq!(topology.hugepages[0].reserved, Some(3));
        assert_eq!(topology.pool(0, "1GB".parse().unwrap()).unwrap().total, 0);
    }

    #[test]
    fn cores_and_nodes_of_a_set_follow_the_siblings() {
        let topology = Topology::read_from(numa_node().root()).unwrap();
        assert!(topology.whole_cores(&cpus("2-3")));
        assert!(!topology.whole_cores(&cpus("2")));
        assert!(!topology.whole_cores(&cpus("2-3,9")), "an unknown CPU has no whole core");
        assert_eq!(topology.siblings(&cpus("1,4")), cpus("0-1,4-5"));
        assert_eq!(topology.nodes_of(&cpus("3-4")), "0-1".parse::<NodeSet>().unwrap());
        assert_eq!(topology.nodes_of(&CpuSet::new()), NodeSet::new());
    }

    #[test]
    fn one_node_takes_over_the_reservation_count_of_the_machine() {
        let topology = Topology::read_from(this_host().root()).unwrap();
        assert_eq!((topology.cpus.len(), topology.nodes.len()), (2, 1));
        assert!(!topology.has_smt());
        assert_eq!(topology.nodes[0].hugepages.len(), 2);
        assert_eq!(topology.nodes[0].hugepages[0].reserved, Some(0));
        assert!(topology.nohz_full.is_empty());
    }

    #[test]
    fn four_sockets_without_threads_are_four_nodes() {
        let topology = Topology::read_from(four_sockets().root()).unwrap();
        assert_eq!(topology.sockets(), [0, 1, 2, 3]);
        assert_eq!(topology.cores().len(), 16);
        assert_eq!(topology.nodes_of(&cpus("12")), "3".parse().unwrap());
        assert!(topology.whole_cores(&cpus("5")));
        assert_eq!(topology.isolated, cpus("4-7"));
        assert_eq!(topology.nohz_full, cpus("4-7"));
        assert!(topology.cpu(6).unwrap().isolated && !topology.cpu(8).unwrap().isolated);
    }

    #[test]
    fn a_kernel_without_numa_and_topology_files_gets_one_node() {
        let tree = Tree::new();
        tree.file("sys/devices/system/cpu/online", "0-1");
        tree.file("sys/devices/system/cpu/nohz_full", "(null)");
        tree.dir("sys/devices/system/cpu/cpu0");
        tree.dir("sys/devices/system/cpu/cpu1");
        tree.file("proc/meminfo", "MemTotal:        1024 kB\nMemFree:          512 kB");
        let topology = Topology::read_from(tree.root()).unwrap();
        assert_eq!(topology.nodes.len(), 1);
        assert_eq!(topology.nodes[0].cpus, cpus("0-1"));
        assert_eq!(topology.nodes[0].memory, Memory { total: 1 << 20, free: 1 << 19 });
        assert_eq!(topology.cores().len(), 2);
        assert!(topology.hugepages.is_empty());
    }

    #[test]
    fn offline_cpus_keep_their_node_and_lose_their_core() {
        let tree = numa_node();
        tree.file("sys/devices/system/cpu/online", "0-6");
        tree.file("sys/devices/system/node/node1/cpulist", "4-6");
        tree.file("sys/devices/system/cpu/cpu6/topology/thread_siblings_list", "6");
        tree.remove("sys/devices/system/cpu/cpu7/topology");
        tree.dir("sys/devices/system/cpu/cpu7/node1");
        let topology = Topology::read_from(tree.root()).unwrap();
        assert_eq!(topology.offline, cpus("7"));
        let cpu = topology.cpu(7).unwrap();
        assert_eq!((cpu.core, cpu.socket, cpu.node, cpu.online), (None, None, 1, false));
        assert!(topology.whole_cores(&cpus("6")), "an offline sibling disturbs nobody");
        assert!(!topology.whole_cores(&cpus("7")));
    }

    #[test]
    fn nonsense_and_emptiness_are_errors_that_name_the_file() {
        let tree = numa_node();
        tree.file("sys/devices/system/cpu/online", "a-b");
        let error = Topology::read_from(tree.root()).unwrap_err().to_string();
        assert!(error.ends_with("sys/devices/system/cpu/online holds no list"), "{error}");
        tree.file("sys/devices/system/cpu/online", "0-7");
        tree.file("sys/devices/system/cpu/cpu0/topology/core_id", "zero");
        let error = Topology::read_from(tree.root()).unwrap_err().to_string();
        assert!(error.ends_with(r#"core_id holds "zero", not a number"#), "{error}");
        let error = Topology::read_from(Tree::new().root()).unwrap_err().to_string();
        assert!(error.ends_with("names no CPU: is sysfs mounted?"), "{error}");
    }

    #[test]
    fn the_machine_under_the_test_can_be_read() {
        let topology = Topology::read().unwrap();
        assert!(!topology.online.is_empty() && !topology.nodes.is_empty());
        let text = serde_json::to_string(&topology).unwrap();
        assert_eq!(serde_json::from_str::<Topology>(&text).unwrap(), topology);
    }
}
