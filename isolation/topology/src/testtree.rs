//! Directories that look like sysfs, written from code.

use std::fs;
use std::path::Path;

pub(crate) struct Tree(tempfile::TempDir);

impl Tree {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn root(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn file(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    }

    pub(crate) fn dir(&self, path: &str) {
        fs::create_dir_all(self.root().join(path)).unwrap();
    }

    pub(crate) fn remove(&self, path: &str) {
        fs::remove_dir_all(self.root().join(path)).unwrap();
    }

    fn pool(&self, dir: &str, size: u64, total: u64, free: u64) {
        let dir = format!("{dir}/hugepages-{size}kB");
        self.file(&format!("{dir}/nr_hugepages"), &total.to_string());
        self.file(&format!("{dir}/free_hugepages"), &free.to_string());
        self.file(&format!("{dir}/surplus_hugepages"), "0");
    }

    fn node(&self, id: u32, cpulist: &str, distance: &str, total_kib: u64, free_kib: u64) {
        let dir = format!("sys/devices/system/node/node{id}");
        self.file(&format!("{dir}/cpulist"), cpulist);
        self.file(&format!("{dir}/distance"), distance);
        let meminfo =
            format!("Node {id} MemTotal: {total_kib:>10} kB\nNode {id} MemFree: {free_kib:>10} kB");
        self.file(&format!("{dir}/meminfo"), &meminfo);
    }

    fn cpu(&self, id: u32, core: u32, socket: u32, siblings: &str) {
        let dir = format!("sys/devices/system/cpu/cpu{id}/topology");
        self.file(&format!("{dir}/core_id"), &core.to_string());
        self.file(&format!("{dir}/physical_package_id"), &socket.to_string());
        self.file(&format!("{dir}/thread_siblings_list"), siblings);
    }

    fn cpu_lists(&self, present: &str, isolated: &str, nohz_full: Option<&str>) {
        let dir = "sys/devices/system/cpu";
        self.file(&format!("{dir}/present"), present);
        self.file(&format!("{dir}/online"), present);
        self.file(&format!("{dir}/isolated"), isolated);
        if let Some(nohz_full) = nohz_full {
            self.file(&format!("{dir}/nohz_full"), nohz_full);
        }
    }
}

/// Two sockets of two cores of two threads, a node each, pools of 2 MiB and 1 GiB.
pub(crate) fn numa_node() -> Tree {
    let tree = Tree::new();
    tree.cpu_lists("0-7", "", Some("(null)"));
    for id in 0..8 {
        let first = id / 2 * 2;
        tree.cpu(id, id % 4 / 2, id / 4, &format!("{first}-{}", first + 1));
    }
    tree.node(0, "0-3", "10 21", 2 << 20, 3 << 18);
    tree.node(1, "4-7", "21 10", 2 << 20, 1 << 20);
    for (node, free_2m, total_1g) in [(0, 128, 0), (1, 100, 1)] {
        let dir = format!("sys/devices/system/node/node{node}/hugepages");
        tree.pool(&dir, 2048, 128, free_2m);
        tree.pool(&dir, 1_048_576, total_1g, total_1g);
    }
    tree.pool("sys/kernel/mm/hugepages", 2048, 256, 228);
    tree.file("sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages", "3");
    tree.pool("sys/kernel/mm/hugepages", 1_048_576, 1, 1);
    tree
}

/// A small virtual machine: two CPUs, one node, empty pools.
pub(crate) fn this_host() -> Tree {
    let tree = Tree::new();
    tree.cpu_lists("0-1", "", None);
    tree.cpu(0, 0, 0, "0");
    tree.cpu(1, 1, 0, "1");
    tree.node(0, "0-1", "10", 5_335_252, 3_679_960);
    for dir in ["sys/devices/system/node/node0/hugepages", "sys/kernel/mm/hugepages"] {
        tree.pool(dir, 2048, 0, 0);
        tree.pool(dir, 1_048_576, 0, 0);
    }
    for size in [2048, 1_048_576] {
        tree.file(&format!("sys/kernel/mm/hugepages/hugepages-{size}kB/resv_hugepages"), "0");
    }
    tree
}

/// Four sockets of four single-thread cores; the second is isolated at boot.
pub(crate) fn four_sockets() -> Tree {
    let tree = Tree::new();
    tree.cpu_lists("0-15", "4-7", Some("4-7"));
    for id in 0..16 {
        tree.cpu(id, id % 4, id / 4, &id.to_string());
    }
    for node in 0..4 {
        let distances: Vec<&str> =
            (0..4).map(|other| if other == node { "10" } else { "20" }).collect();
        let cpulist = format!("{}-{}", node * 4, node * 4 + 3);
        tree.node(node, &cpulist, &distances.join(" "), 1 << 20, 1 << 19);
    }
    tree
}
