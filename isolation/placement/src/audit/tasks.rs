//! Which tasks may run on a set of CPUs, from `/proc/<pid>/task/<tid>/status`.
//!
//! Kernel threads are left out: the per-CPU ones cannot be moved, and the kernel moves the
//! others itself when a partition is made.

use std::fs;
use std::path::Path;

use pinion_topology::CpuSet;

use super::Subject;
use crate::{Host, files};

/// `PF_KTHREAD` in the flags of `/proc/<pid>/stat`.
const KERNEL_THREAD: u64 = 0x0020_0000;
const EXAMPLES: usize = 3;

/// The groups whose tasks are the container's.
pub(super) struct Own {
    v2: Option<String>,
    v1_cpuset: Option<String>,
}

impl Own {
    pub(super) fn nobody() -> Self {
        Self { v2: None, v1_cpuset: None }
    }

    pub(super) fn of(host: &Host, subject: &Subject) -> Self {
        let rooted = |path: &Path| Path::new("/").join(path).to_string_lossy().into_owned();
        let v1 = subject.v1.get("cpuset").zip(host.v1.get("cpuset"));
        Self {
            v2: subject.cgroup.as_deref().map(rooted),
            v1_cpuset: v1.and_then(|(dir, root)| dir.strip_prefix(root).ok()).map(rooted),
        }
    }

    /// Whether a `/proc/<pid>/cgroup` shows the group or one below it.
    fn contains(&self, cgroups: &str) -> bool {
        cgroups.lines().any(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next().unwrap_or(""), fields.next().unwrap_or(""));
            let own = match controllers {
                "" => &self.v2,
                list if list.split(',').any(|name| name == "cpuset") => &self.v1_cpuset,
                _ => &None,
            };
            let below = |own: &String| {
                path.strip_prefix(own.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            };
            // The root group is nobody's own.
            own.as_ref().filter(|own| own.len() > 1).is_some_and(below)
        })
    }
}

/// Tasks of others that may run somewhere.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Foreign {
    pub(super) count: usize,
    /// `pid name (CPUs)` of the first few.
    pub(super) examples: Vec<String>,
}

pub(super) fn foreign(proc: &Path, own: &Own, cpus: &CpuSet) -> Foreign {
    let mut foreign = Foreign::default();
    for process in numbered(proc) {
        for task in numbered(&process.join("task")) {
            if let Some(example) = may_run(&task, own, cpus) {
                foreign.count += 1;
                if foreign.examples.len() < EXAMPLES {
                    foreign.examples.push(example);
                }
            }
        }
    }
    foreign
}

/// The first process of this name.
pub(super) fn named(proc: &Path, name: &str) -> Option<u32> {
    let is = |dir: &std::path::PathBuf| {
        files::read(&dir.join("comm")).ok().flatten().is_some_and(|comm| comm == name)
    };
    numbered(proc).into_iter().find(is)?.file_name()?.to_str()?.parse().ok()
}

fn numbered(dir: &Path) -> Vec<std::path::PathBuf> {
    let is_number = |entry: &fs::DirEntry| {
        let name = entry.file_name();
        name.to_str().is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(is_number).map(|entry| entry.path()).collect()
}

/// Describes the task if it is foreign and may run there. Tasks that end meanwhile do not.
fn may_run(task: &Path, own: &Own, cpus: &CpuSet) -> Option<String> {
    let status = files::read(&task.join("status")).ok()??;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let allowed: CpuSet = field("Cpus_allowed_list:")?.parse().ok()?;
    if allowed.is_disjoint(cpus) || field("State:").is_some_and(|state| state.contains('Z')) {
        return None;
    }
    let stat = files::read(&task.join("stat")).ok()??;
    // The name in parentheses may contain anything, parentheses included.
    let flags = stat.rsplit_once(')')?.1.split_whitespace().nth(6)?;
    if flags.parse::<u64>().ok()? & KERNEL_THREAD != 0 {
        return None;
    }
    if own.contains(&files::read(&task.join("cgroup")).ok()??) {
        return None;
    }
    let tid = task.file_name()?.to_string_lossy().into_owned();
    Some(format!("{tid} {} ({allowed})", field("Name:").unwrap_or_default().trim()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testtree::Tree;

    fn task(tree: &Tree, pid: u32, tid: u32, name: &str, cpus: &str, flags: u64, cgroup: &str) {
        let dir = format!("proc/{pid}/task/{tid}");
        let status = format!("Name:\t{name}\nState:\tS (sleeping)\nCpus_allowed_list:\t{cpus}\n");
        tree.file(&format!("{dir}/status"), &status);
        tree.file(&format!("{dir}/stat"), &format!("{tid} (a) b) S 1 1 1 0 -1 {flags} 0 0"));
        tree.file(&format!("{dir}/cgroup"), cgroup);
    }

    fn own(v2: &str) -> Own {
        Own { v2: Some(v2.to_owned()), v1_cpuset: None }
    }

    #[test]
    fn only_user_tasks_of_other_groups_that_may_run_there_count() {
        let tree = Tree::new();
        task(&tree, 10, 10, "systemd", "0-1,4-7", 0, "0::/init.scope\n");
        task(&tree, 20, 20, "dpdk", "2-3", 0, "0::/k/pod/ctr\n");
        task(&tree, 20, 21, "dpdk", "2-3", 0, "0::/k/pod/ctr/sub\n");
        task(&tree, 30, 30, "ksoftirqd/2", "2", KERNEL_THREAD | 0x40, "0::/\n");
        task(&tree, 40, 40, "thief", "0-7", 0, "0::/k/pod/ctr2\n");
        let found = foreign(&tree.path("proc"), &own("/k/pod/ctr"), &"2-3".parse().unwrap());
        assert_eq!(found, Foreign { count: 1, examples: vec!["40 thief (0-7)".to_owned()] });
        let found = foreign(&tree.path("proc"), &Own::nobody(), &"2-3".parse().unwrap());
        assert_eq!(found.count, 3);
    }

    #[test]
    fn v1_groups_are_told_by_their_controller() {
        let own = Own { v2: Some("/u".to_owned()), v1_cpuset: Some("/k/ctr".to_owned()) };
        assert!(own.contains("5:memory:/x\n4:cpu,cpuset:/k/ctr\n0::/"));
        assert!(!own.contains("5:memory:/k/ctr\n4:cpuset:/k\n0::/"));
        assert!(own.contains("0::/u"));
        assert!(!Own { v2: Some("/".to_owned()), v1_cpuset: None }.contains("0::/x"));
    }
}
