//! Directories that stand in for cgroup trees, sysfs and procfs.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{Host, Kernel};

pub(crate) struct Tree(tempfile::TempDir);

impl Tree {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    pub(crate) fn file(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Like the kernel's files: what a shorter write leaves of an older value does not show.
    pub(crate) fn text(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap().trim().to_owned()
    }

    pub(crate) fn host(&self, release: &str) -> Host {
        let v2 = self.path("cgroup");
        Host {
            v2: v2.exists().then_some(v2),
            v1: ["cpu", "cpuset", "hugetlb"]
                .into_iter()
                .map(|name| (name.to_owned(), self.path(&format!("v1/{name}"))))
                .filter(|(_, dir)| dir.exists())
                .collect(),
            root: self.0.path().to_owned(),
            kernel: Kernel::parse(release),
        }
    }

    /// Eight CPUs on two nodes, two threads per core, 64 pages of 2 MiB a node.
    pub(crate) fn with_machine() -> Self {
        let tree = Self::new();
        let cpu = "sys/devices/system/cpu";
        tree.file(&format!("{cpu}/present"), "0-7");
        tree.file(&format!("{cpu}/online"), "0-7");
        for id in 0..8 {
            let first = id / 2 * 2;
            let dir = format!("{cpu}/cpu{id}/topology");
            tree.file(&format!("{dir}/core_id"), &(id % 4 / 2).to_string());
            tree.file(&format!("{dir}/physical_package_id"), &(id / 4).to_string());
            tree.file(&format!("{dir}/thread_siblings_list"), &format!("{first}-{}", first + 1));
        }
        for (node, cpus) in [(0, "0-3"), (1, "4-7")] {
            let dir = format!("sys/devices/system/node/node{node}");
            tree.file(&format!("{dir}/cpulist"), cpus);
            tree.file(&format!("{dir}/distance"), if node == 0 { "10 21" } else { "21 10" });
            tree.file(&format!("{dir}/meminfo"), &format!("Node {node} MemTotal: 2097152 kB"));
            let pool = format!("{dir}/hugepages/hugepages-2048kB");
            tree.file(&format!("{pool}/nr_hugepages"), "64");
            tree.file(&format!("{pool}/free_hugepages"), "64");
        }
        tree
    }

    /// A v2 group as a kernel with remote partitions shows it, with nothing set.
    pub(crate) fn group(&self, path: &str) {
        let dir = format!("cgroup/{path}");
        for (name, text) in [
            ("cpuset.cpus", ""),
            ("cpuset.cpus.effective", "0-7"),
            ("cpuset.cpus.exclusive", ""),
            ("cpuset.cpus.partition", "member"),
            ("cpuset.mems", ""),
            ("cpuset.mems.effective", "0-1"),
            ("cpu.max", "max 100000"),
        ] {
            self.file(&format!("{dir}/{name}"), text);
        }
    }

    /// The root group, a two-level tree of workloads, and two containers in one of them.
    pub(crate) fn with_groups() -> Self {
        let tree = Self::with_machine();
        tree.file("cgroup/cgroup.controllers", "cpuset cpu memory hugetlb");
        tree.file("cgroup/cpuset.cpus.effective", "0-7");
        tree.file("cgroup/cpuset.cpus.isolated", "");
        for path in ["k", "k/b", "k/b/p1", "k/b/p1/c1", "k/b/p1/c2", "k/b/p2", "k/b/p2/c1"] {
            tree.group(path);
        }
        tree
    }
}

pub(crate) fn relative(path: &str) -> Option<PathBuf> {
    Some(Path::new("/").join(path))
}
