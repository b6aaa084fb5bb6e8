//! Groups for one test, removed with everything in them when dropped.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use pinion_placement::{
    EnforceError, Grant, Host, PartitionKind, Receipt, Refusal, Request, Target, UndoStep, enforce,
    undo,
};

pub(crate) fn host() -> Host {
    Host::detect().unwrap()
}

const CONTROLLERS: [&str; 4] = ["cpuset", "cpu", "hugetlb", "memory"];

/// Hands the controllers down from the root group.
pub(crate) fn prepare(host: &Host) {
    let root = host.v2.clone().unwrap();
    for controller in CONTROLLERS {
        enable(&root, controller);
    }
}

fn enable(dir: &Path, controller: &str) {
    fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"))
        .unwrap_or_else(|error| panic!("enable {controller} below {}: {error}", dir.display()));
}

/// `pinion-test/qos/<pod>/<container>`: a tree as orchestrators build it.
pub(crate) struct Tree {
    root: PathBuf,
    pub(crate) top: PathBuf,
}

impl Tree {
    pub(crate) fn new(containers: &[&str]) -> Self {
        let root = host().v2.unwrap();
        let tree = Self { top: root.join("pinion-test"), root };
        for container in containers {
            let leaf = tree.dir(container);
            fs::create_dir_all(&leaf).unwrap();
            let parents: Vec<&Path> =
                leaf.ancestors().skip(1).take_while(|dir| *dir != tree.root).collect();
            for dir in parents.into_iter().rev() {
                CONTROLLERS.iter().for_each(|controller| enable(dir, controller));
            }
        }
        tree
    }

    pub(crate) fn dir(&self, group: &str) -> PathBuf {
        if group.is_empty() { self.top.clone() } else { self.top.join("qos").join(group) }
    }

    pub(crate) fn read(&self, group: &str, file: &str) -> String {
        read(&self.dir(group).join(file))
    }

    pub(crate) fn write(&self, group: &str, file: &str, value: &str) {
        let path = self.dir(group).join(file);
        let value = if value.is_empty() { "\n" } else { value };
        fs::write(&path, value).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    pub(crate) fn target(&self, group: &str, cpus: &str, mems: &str) -> Target {
        Target {
            cgroup: Some(Path::new("/").join(self.dir(group).strip_prefix(&self.root).unwrap())),
            cpus: Some(cpus.parse().unwrap()),
            mems: Some(mems.parse().unwrap()),
            ..Target::default()
        }
    }

    /// Every cpuset and quota setting of the tree, and the root's view.
    pub(crate) fn snapshot(&self) -> BTreeMap<String, String> {
        let mut settings = BTreeMap::new();
        let mut pending = vec![self.top.clone()];
        while let Some(dir) = pending.pop() {
            for file in [
                "cpuset.cpus",
                "cpuset.cpus.exclusive",
                "cpuset.cpus.effective",
                "cpuset.cpus.partition",
                "cpuset.mems",
                "cpu.max",
            ] {
                let path = dir.join(file);
                settings.insert(path.display().to_string(), read(&path));
            }
            let children = fs::read_dir(&dir).unwrap().flatten();
            pending.extend(children.filter(|e| e.file_type().unwrap().is_dir()).map(|e| e.path()));
        }
        for file in ["cpuset.cpus.effective", "cpuset.cpus.isolated"] {
            settings.insert(file.to_owned(), read(&self.root.join(file)));
        }
        settings
    }

    pub(crate) fn root(&self, file: &str) -> String {
        read(&self.root.join(file))
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        remove(&self.top);
    }
}

fn remove(dir: &Path) {
    for child in fs::read_dir(dir).into_iter().flatten().flatten() {
        if child.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&child.path());
        }
    }
    if dir.exists() {
        fs::write(dir.join("cgroup.kill"), "1").unwrap();
        for _ in 0..100 {
            if fs::remove_dir(dir).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        eprintln!("left behind: {}", dir.display());
    }
}

pub(crate) fn read(path: &Path) -> String {
    let text = fs::read_to_string(path);
    text.unwrap_or_else(|error| panic!("{}: {error}", path.display())).trim().to_owned()
}

pub(crate) fn isolated(strict: bool) -> Request {
    Request { partition: Some(PartitionKind::Isolated), strict, ..Request::default() }
}

pub(crate) fn pages(node: u32, size: &str, pages: u64) -> Grant {
    Grant { node, size: size.parse().unwrap(), pages }
}

/// A receipt and the journal that takes everything back.
pub(crate) struct Placed {
    pub(crate) receipt: Receipt,
    pub(crate) journal: Vec<UndoStep>,
}

impl Placed {
    pub(crate) fn undo(&self) {
        undo(&host(), &self.journal).unwrap();
    }
}

pub(crate) fn place(target: &Target, request: &Request) -> Result<Placed, Refusal> {
    let mut journal = Vec::new();
    let placed = enforce(&host(), target, request, &mut |step| {
        journal.push(step.clone());
        Ok(())
    });
    match placed {
        Ok(receipt) => Ok(Placed { receipt, journal }),
        Err(EnforceError::Refused { refusal, failures }) => {
            assert!(failures.is_empty(), "{failures:?}");
            Err(refusal)
        }
        Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
    }
}
