//! Huge pages on two nodes: every way in which the kernel was seen to kill a container with
//! SIGBUS must be a refusal before it starts.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use pinion_placement::{
    HugepageDemand, Ledger, NodePool, Reason, Request, Target, TermName, Verdict, hugepages_held,
};
use pinion_topology::{NodeSet, PageSize, Topology};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::tree::{Tree, isolated, pages, place, read};

const MIB2: u64 = 2 << 20;

fn two_mb() -> PageSize {
    "2MB".parse().unwrap()
}

fn free(node: u32, size: &str) -> u64 {
    let path = format!("/sys/devices/system/node/node{node}/hugepages/hugepages-{size}");
    read(&Path::new(&path).join("free_hugepages")).parse().unwrap()
}

fn proving(grants: Vec<pinion_placement::Grant>, strict: bool) -> Request {
    Request { prefault: grants, strict, ..Request::default() }
}

/// A hugetlbfs of our own, unmounted when dropped.
struct Hugetlbfs(PathBuf);

impl Hugetlbfs {
    fn new(name: &str, options: &std::ffi::CStr) -> Self {
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(&dir).unwrap();
        mount("hugetlbfs", &dir, "hugetlbfs", MountFlags::empty(), Some(options)).unwrap();
        Self(dir)
    }
}

impl Drop for Hugetlbfs {
    fn drop(&mut self) {
        unmount(&self.0, UnmountFlags::DETACH).unwrap();
        fs::remove_dir(&self.0).unwrap();
    }
}

/// A process inside a group that holds pages of a hugetlbfs file.
struct Holder {
    child: Child,
    file: PathBuf,
}

impl Holder {
    fn new(tree: &Tree, group: &str, mount: &Hugetlbfs, pages: u64) -> Self {
        let file = mount.0.join(group.replace('/', "-"));
        let mut child = Command::new(std::env::current_exe().unwrap())
            .arg("hold")
            .arg(tree.dir(group).join("cgroup.procs"))
            .arg(&file)
            .arg((pages * MIB2).to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "holding\n");
        Self { child, file }
    }

    fn alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
        fs::remove_file(&self.file).unwrap();
    }
}

/// The child of [`Holder`]: enter the group, take the pages, wait for the end of input.
pub(crate) fn hold(arguments: &[String]) {
    let [procs, file, bytes] = arguments else { panic!("hold PROCS FILE BYTES") };
    fs::write(procs, "0").unwrap();
    let file: File = OpenOptions::new().write(true).create_new(true).open(file).unwrap();
    fallocate(&file, FallocateFlags::empty(), 0, bytes.parse().unwrap()).unwrap();
    println!("holding");
    std::io::stdout().flush().unwrap();
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

pub(crate) fn granted_pages_are_proven_on_their_node_and_released() {
    let tree = Tree::new(&["pod1/c1"]);
    let before = (free(0, "2048kB"), free(1, "2048kB"), free(1, "1048576kB"));
    let mut target = tree.target("pod1/c1", "4-5", "1");
    target.hugepages = [(two_mb(), 64 * MIB2), ("1GB".parse().unwrap(), 1 << 30)].into();
    for (file, limit) in [("2MB", 64 * MIB2), ("1GB", 1 << 30)] {
        tree.write("pod1/c1", &format!("hugetlb.{file}.max"), &limit.to_string());
        tree.write("pod1/c1", &format!("hugetlb.{file}.rsvd.max"), &limit.to_string());
    }
    let request =
        Request { prefault: vec![pages(1, "2MB", 64), pages(1, "1GB", 1)], ..isolated(true) };
    let placed = place(&target, &request).unwrap();
    println!("{}", placed.receipt.render());
    assert_eq!(placed.receipt.verdict, Verdict::Aligned);
    let term = placed.receipt.term(TermName::Hugepages).unwrap();
    let proof = "64 pages of 2MB for node 1: N1=64; 1 pages of 1GB for node 1: N1=1";
    assert_eq!(term.evidence["proof"], proof);
    assert_eq!((free(0, "2048kB"), free(1, "2048kB"), free(1, "1048576kB")), before);
    assert_eq!(tree.read("pod1/c1", "hugetlb.2MB.current"), "0");
    let events = tree.read("pod1/c1", "hugetlb.2MB.events");
    assert_eq!(events, "max 0");
    placed.undo();
}

/// Limits are enforced again whenever they change, while the container has its pages: what
/// it holds is not asked for a second time.
pub(crate) fn pages_in_use_are_not_proven_again() {
    let tree = Tree::new(&["pod1/c1"]);
    let mount = Hugetlbfs::new("pinion-test-again", c"pagesize=2M");
    tree.write("pod1/c1", "cpuset.mems", "1");
    for file in ["max", "rsvd.max"] {
        tree.write("pod1/c1", &format!("hugetlb.2MB.{file}"), &(32 * MIB2).to_string());
    }
    let target = tree.target("pod1/c1", "4-5", "1");
    let request = proving(vec![pages(1, "2MB", 32)], true);
    place(&target, &request).unwrap();
    let mut holder = Holder::new(&tree, "pod1/c1", &mount, 24);
    let placed = place(&target, &request).unwrap();
    let term = placed.receipt.term(TermName::Hugepages).unwrap();
    assert_eq!(term.evidence["proof"], "8 pages of 2MB for node 1: N1=8");
    assert!(holder.alive());
}

/// Both mappings would succeed, and the second container would die at its first touch.
pub(crate) fn the_second_claimant_of_a_node_is_refused_and_the_first_unharmed() {
    let tree = Tree::new(&["pod1/c1", "pod2/c1"]);
    let mount = Hugetlbfs::new("pinion-test-hp", c"pagesize=2M");
    for group in ["pod1/c1", "pod2/c1"] {
        tree.write(group, "cpuset.mems", "1");
    }
    let total = free(1, "2048kB");
    let topology = Topology::read().unwrap();
    let mut ledger = Ledger::new(NodePool::observed(&topology, &Default::default()));
    let demand =
        |pages| HugepageDemand { size: two_mb(), pages, nodes: Some("1".parse().unwrap()) };
    let first = ledger.grant("pod1/c1", &[demand(total - 8)], &NodeSet::new()).unwrap();
    place(&tree.target("pod1/c1", "4-5", "1"), &proving(first, true)).unwrap();
    let refusal = ledger.grant("pod2/c1", &[demand(16)], &NodeSet::new()).unwrap_err();
    println!("{refusal}");
    assert!(
        refusal.detail.contains(&format!("{} granted to pod1/c1, 8 left, 16 asked", total - 8))
    );

    // Without the ledger, the proof is the second line of defence.
    let mut holder = Holder::new(&tree, "pod1/c1", &mount, total - 8);
    assert_eq!(free(1, "2048kB"), 8);
    let target = tree.target("pod2/c1", "6-7", "1");
    let refusal = place(&target, &proving(vec![pages(1, "2MB", 16)], true)).err().unwrap();
    println!("{refusal}");
    assert_eq!(refusal.reason, Reason::PoolExhausted);
    assert!(
        refusal.detail.starts_with(&format!("node 1 has {total} pages of 2MB, 8 free, 16 asked"))
    );
    assert!(holder.alive());
    place(&target, &proving(vec![pages(1, "2MB", 8)], true)).unwrap();
    assert_eq!(free(1, "2048kB"), 8);
}

/// With `.max` alone a mapping succeeds and the touch kills; with `.rsvd.max` the mapping
/// fails. Either is a failed proof that names the limit, and kills nobody here.
pub(crate) fn limits_that_would_kill_the_container_fail_the_proof() {
    let tree = Tree::new(&["pod1/c1"]);
    let request = proving(vec![pages(1, "2MB", 3)], true);
    let target = tree.target("pod1/c1", "4-5", "1");
    tree.write("pod1/c1", "cpuset.mems", "1");
    tree.write("pod1/c1", "hugetlb.2MB.max", &MIB2.to_string());
    let refusal = place(&target, &request).err().unwrap();
    println!("{refusal}");
    assert_eq!(refusal.reason, Reason::ProofFailed);
    assert!(refusal.detail.contains("populate for 3 pages"), "{refusal}");
    assert!(refusal.detail.contains("hugetlb.2MB.max is 2097152"), "{refusal}");
    tree.write("pod1/c1", "hugetlb.2MB.rsvd.max", &MIB2.to_string());
    let refusal = place(&target, &request).err().unwrap();
    println!("{refusal}");
    assert_eq!(refusal.reason, Reason::ProofFailed);
    assert!(refusal.detail.contains("map for 3 pages"), "{refusal}");
    assert!(refusal.detail.contains("hugetlb.2MB.rsvd.max is 2097152"), "{refusal}");
    let limits = Target { hugepages: [(two_mb(), 3 * MIB2)].into(), ..target };
    let receipt = place(&limits, &proving(vec![], false)).unwrap().receipt;
    let term = receipt.term(TermName::Hugepages).unwrap();
    assert_eq!((receipt.verdict, term.code), (Verdict::Degraded, Some(Reason::HugepageLimit)));
}

/// Reservations are for the whole machine: pages of the node look free and are promised.
pub(crate) fn reservations_of_neighbours_are_seen_although_pages_look_free() {
    let tree = Tree::new(&["pod1/c1"]);
    let (near, far) = (free(0, "2048kB"), free(1, "2048kB"));
    let reserved = near + far - 16;
    let options = format!("pagesize=2M,min_size={}", reserved * MIB2);
    let options = std::ffi::CString::new(options).unwrap();
    let _mount = Hugetlbfs::new("pinion-test-min", &options);
    assert_eq!(free(0, "2048kB"), near, "the pages look free");
    let target = tree.target("pod1/c1", "2-3", "0");
    tree.write("pod1/c1", "cpuset.mems", "0");
    let refusal = place(&target, &proving(vec![pages(0, "2MB", 32)], true)).err().unwrap();
    println!("{refusal}");
    assert_eq!(refusal.reason, Reason::ProofFailed);
    let shown = format!("{reserved} reserved by mappings anywhere on the machine");
    assert!(refusal.detail.contains(&shown), "{refusal}");
    place(&target, &proving(vec![pages(0, "2MB", 16)], true)).unwrap();
}

/// An unbound neighbour takes node 0 first; the container bound to node 0 must not start.
pub(crate) fn a_neighbour_that_took_the_node_first_is_a_refusal() {
    let tree = Tree::new(&["pod1/c1", "pod2/c1"]);
    let mount = Hugetlbfs::new("pinion-test-hp", c"pagesize=2M");
    tree.write("pod2/c1", "cpuset.cpus", "0");
    let total = free(0, "2048kB");
    tree.write("pod2/c1", "cpuset.mems", "0-1");
    let mut neighbour = Holder::new(&tree, "pod2/c1", &mount, total);
    assert!(free(0, "2048kB") < total);
    tree.write("pod1/c1", "cpuset.mems", "0");
    let target = tree.target("pod1/c1", "2-3", "0");
    let request = proving(vec![pages(0, "2MB", total)], true);
    let refusal = place(&target, &request).err().unwrap();
    println!("{refusal}");
    assert_eq!(refusal.reason, Reason::PoolExhausted);
    assert!(neighbour.alive());
    drop(neighbour);
    place(&target, &request).unwrap();
}

pub(crate) fn a_node_outside_the_memory_nodes_is_refused() {
    let tree = Tree::new(&["pod1/c1"]);
    tree.write("pod1/c1", "cpuset.mems", "0");
    let request = proving(vec![pages(1, "2MB", 1)], true);
    let refusal = place(&tree.target("pod1/c1", "2-3", "0"), &request).err().unwrap();
    assert_eq!(refusal.reason, Reason::NodeNotAllowed);
    // The same when only the kernel knows.
    let unsaid = Target { mems: None, ..tree.target("pod1/c1", "2-3", "0") };
    let refusal = place(&unsaid, &request).err().unwrap();
    println!("{refusal}");
    assert!(refusal.detail.contains("cpuset.mems does not allow the node"), "{refusal}");
    let giant = proving(vec![pages(0, "1GB", 1)], true);
    let refusal = place(&unsaid, &giant).err().unwrap();
    println!("{refusal}");
    assert_eq!(refusal.reason, Reason::PoolExhausted);
}

pub(crate) fn the_ledger_tells_granted_pages_from_strangers() {
    let tree = Tree::new(&["pod1/c1", "pod2/c1"]);
    let mount = Hugetlbfs::new("pinion-test-hp", c"pagesize=2M");
    for group in ["pod1/c1", "pod2/c1"] {
        tree.write(group, "cpuset.mems", "1");
    }
    let total = free(1, "2048kB");
    let _mine = Holder::new(&tree, "pod1/c1", &mount, 10);
    let _stranger = Holder::new(&tree, "pod2/c1", &mount, 5);
    let topology = Topology::read().unwrap();
    let held = hugepages_held(&tree.dir("pod1/c1"), &topology);
    assert_eq!(held, [((1, two_mb()), 10)].into());
    let pools = NodePool::observed(&topology, &held);
    let pool = pools.iter().find(|pool| pool.node == 1 && pool.size == two_mb()).unwrap();
    assert_eq!((pool.total, pool.foreign), (total, 5));
}

pub(crate) fn a_strict_container_without_its_pages_keeps_no_partition() {
    let tree = Tree::new(&["pod1/c1"]);
    let before = tree.snapshot();
    let request = Request { prefault: vec![pages(0, "2MB", 100_000)], ..isolated(true) };
    let refusal = place(&tree.target("pod1/c1", "2-3", "0"), &request).err().unwrap();
    assert_eq!(refusal.term, TermName::Hugepages);
    assert_eq!(tree.snapshot(), before);
    let lenient = Request { strict: false, ..request };
    let placed = place(&tree.target("pod1/c1", "2-3", "0"), &lenient).unwrap();
    assert_eq!(placed.receipt.verdict, Verdict::Degraded);
    assert!(placed.receipt.term(TermName::ExclusiveCpus).unwrap().in_force);
    assert!(!placed.receipt.term(TermName::Hugepages).unwrap().in_force);
    placed.undo();
    assert_eq!(tree.snapshot(), before);
}
