//! A machine with cgroup v1: nothing may be claimed that the kernel does not give.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use pinion_placement::{Reason, Request, Target, TermName, Verdict};
use pinion_topology::Topology;

use crate::tree::{host, isolated, pages, place, read};

/// A group per controller, removed when dropped.
struct Groups(BTreeMap<String, PathBuf>);

impl Groups {
    fn new() -> Self {
        let name = format!("pinion-test-{}", std::process::id());
        let here = |controller: &&str| host().v1.contains_key(*controller);
        let controllers = ["cpu", "cpuset", "hugetlb"].into_iter().filter(here);
        let groups = controllers.map(|controller| {
            let dir = host().v1[controller].join(&name);
            fs::create_dir_all(&dir).unwrap();
            (controller.to_owned(), dir)
        });
        let groups = Self(groups.collect());
        let cpuset = &groups.0["cpuset"];
        let root = cpuset.parent().unwrap();
        for file in ["cpuset.cpus", "cpuset.mems"] {
            fs::write(cpuset.join(file), fs::read(root.join(file)).unwrap()).unwrap();
        }
        groups
    }

    fn target(&self) -> Target {
        Target {
            v1: self.0.clone(),
            cpus: Some(Topology::read().unwrap().online),
            ..Target::default()
        }
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        self.0.values().for_each(|dir| fs::remove_dir(dir).unwrap());
    }
}

pub(crate) fn a_lenient_request_starts_degraded_and_says_why() {
    let groups = Groups::new();
    let quota = groups.0["cpu"].join("cpu.cfs_quota_us");
    fs::write(&quota, "150000").unwrap();
    let placed = place(&groups.target(), &isolated(false)).unwrap();
    println!("{}", placed.receipt.render());
    assert_eq!(placed.receipt.verdict, Verdict::Degraded);
    let term = |name| placed.receipt.term(name).unwrap();
    let cpus = term(TermName::ExclusiveCpus);
    assert_eq!((cpus.in_force, cpus.code), (false, Some(Reason::CgroupV1)));
    assert!(cpus.reason.as_ref().unwrap().contains("tasks of others may run on the CPUs"));
    assert!(cpus.evidence["foreign tasks"].parse::<usize>().unwrap() > 0);
    assert!(term(TermName::NoThrottling).in_force);
    assert_eq!(read(&quota), "-1");
    assert!(!term(TermName::Kernel).in_force);
    placed.undo();
    assert_eq!(read(&quota), "150000");
}

pub(crate) fn a_strict_request_is_refused_with_a_code() {
    let groups = Groups::new();
    let quota = groups.0["cpu"].join("cpu.cfs_quota_us");
    fs::write(&quota, "150000").unwrap();
    let refusal = place(&groups.target(), &isolated(true)).err().unwrap();
    println!("{refusal}");
    assert_eq!((refusal.term, refusal.reason), (TermName::ExclusiveCpus, Reason::CgroupV1));
    assert!(refusal.detail.contains("boot with cgroup v2"));
    assert_eq!(read(&quota), "150000", "a refused container changes nothing");
}

pub(crate) fn huge_pages_that_do_not_exist_are_refused() {
    let groups = Groups::new();
    let topology = Topology::read().unwrap();
    let two_mb = "2MB".parse().unwrap();
    let free = topology.pool(0, two_mb).map_or(0, |pool| pool.free);
    let request = |strict| Request {
        prefault: vec![pages(0, "2MB", free + 1)],
        strict,
        ..Request::default()
    };
    let refusal = place(&groups.target(), &request(true)).err().unwrap();
    println!("{refusal}");
    assert_eq!(refusal.term, TermName::Hugepages);
    assert!(matches!(refusal.reason, Reason::PoolExhausted | Reason::NoSuchPool));
    let receipt = place(&groups.target(), &request(false)).unwrap().receipt;
    assert_eq!(receipt.verdict, Verdict::Degraded);
    assert!(!receipt.term(TermName::Hugepages).unwrap().in_force);
}
