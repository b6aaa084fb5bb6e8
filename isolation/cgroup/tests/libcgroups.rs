//! Limits as libcgroups writes them, against ours, on directories of plain files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a panic is the report

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use libcgroups::common::{CgroupManager, CgroupSetup, ControllerOpt, get_cgroup_setup};
use libcgroups::v2::manager::Manager;
use oci_spec::runtime::LinuxResources;
use pinion_cgroup::{Cgroup, CgroupPaths, Driver, Hierarchies, Mode};
use proptest::prelude::*;
use serde_json::{Value, json};

const FILES: [&str; 13] = [
    "cpu.weight",
    "cpu.max",
    "cpu.max.burst",
    "cpu.idle",
    "cpuset.cpus",
    "cpuset.mems",
    "memory.max",
    "memory.low",
    "memory.high",
    "memory.swap.max",
    "pids.max",
    "io.bfq.weight",
    "io.max",
];

type Contents = BTreeMap<&'static str, String>;

/// What a v2 cgroup of empty files holds after `set` has written to it.
fn after(set: impl FnOnce(&Path, &Path)) -> Contents {
    let root = tempfile::tempdir().unwrap();
    let group = root.path().join("c1");
    fs::create_dir(&group).unwrap();
    fs::write(root.path().join("cgroup.controllers"), "cpu cpuset io memory pids\n").unwrap();
    for file in FILES {
        fs::write(group.join(file), "").unwrap();
    }
    set(root.path(), &group);
    FILES.iter().map(|file| (*file, fs::read_to_string(group.join(file)).unwrap())).collect()
}

fn ours(resources: &LinuxResources) -> Contents {
    after(|_, group| {
        let paths = CgroupPaths {
            driver: Driver::Cgroupfs,
            unified: Some(group.to_owned()),
            v1: BTreeMap::new(),
            unit: None,
        };
        Cgroup::open(paths).update(resources).unwrap();
    })
}

fn theirs(resources: &LinuxResources) -> Contents {
    after(|root, _| {
        let options = ControllerOpt {
            resources,
            disable_oom_killer: false,
            oom_score_adj: None,
            freezer_state: None,
        };
        Manager::new(root.to_owned(), "c1".into()).unwrap().apply(&options).unwrap();
    })
}

/// Every difference there is, with its reason.
fn reconciled(mut theirs: Contents, resources: &LinuxResources) -> Contents {
    let cpu = resources.cpu().clone().unwrap_or_default();
    // A quota alone: they leave the period to the kernel, we write its default, as runc does.
    let quota = theirs["cpu.max"].clone();
    if !quota.is_empty() && !quota.contains(' ') {
        theirs.insert("cpu.max", format!("{quota} 100000"));
    }
    // A period alone: they keep whatever quota there was, which here is nothing at all.
    if let (None, Some(period)) = (cpu.quota(), cpu.period()) {
        theirs.insert("cpu.max", format!("max {period}"));
    }
    // An idle group has no weight: the kernel refuses the write.
    if cpu.idle() == Some(1) {
        theirs.insert("cpu.weight", String::new());
    }
    theirs
}

fn cpu() -> impl Strategy<Value = Value> {
    (
        prop::option::of(0u64..300_000),
        prop::option::of(prop_oneof![Just(-1i64), 1_000i64..1_000_000]),
        prop::option::of(1_000u64..1_000_000),
        prop::option::of(0i64..2),
        prop::option::of(prop::sample::select(vec!["0", "0-3", "1,3", "0-1,6-7"])),
    )
        .prop_map(|(shares, quota, period, idle, cpus)| {
            let all = [
                ("shares", json!(shares)),
                ("quota", json!(quota)),
                ("period", json!(period)),
                ("idle", json!(idle)),
                ("cpus", json!(cpus)),
                ("mems", json!(cpus.map(|_| "0"))),
            ];
            present(all)
        })
}

fn memory() -> impl Strategy<Value = Value> {
    let pages = || 1i64..100_000;
    (
        prop::option::of(prop_oneof![1 => Just(-1i64), 4 => pages().prop_map(|p| p << 16)]),
        prop::option::of(pages().prop_map(|p| p << 16)),
        prop::option::of(prop_oneof![1 => Just(None), 3 => pages().prop_map(Some)]),
    )
        .prop_map(|(limit, reservation, swap)| {
            // Memory and swap together: unlimited, or above a limit there is. Equal means no
            // swap, where they write nothing and we write 0 as runc does.
            let swap = match (limit, swap) {
                (Some(limit @ 1..), Some(Some(more))) => Some(limit + (more << 16)),
                (Some(_), Some(None)) => Some(-1),
                _ => None,
            };
            present([
                ("limit", json!(limit)),
                ("reservation", json!(reservation)),
                ("swap", json!(swap)),
            ])
        })
}

fn present<const N: usize>(members: [(&str, Value); N]) -> Value {
    let given = members.into_iter().filter(|(_, value)| !value.is_null());
    Value::Object(given.map(|(name, value)| (name.to_owned(), value)).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    #[test]
    fn both_write_the_same_limits(
        cpu in cpu(), memory in memory(),
        pids in prop_oneof![Just(-1i64), 1i64..5_000_000],
        weight in 10u16..=1000, rate in 1u64..1 << 40,
    ) {
        let device = json!({"major": 8, "minor": 16, "rate": rate});
        let resources: LinuxResources = serde_json::from_value(json!({
            "cpu": cpu, "memory": memory, "pids": {"limit": pids},
            "blockIO": {"weight": weight, "throttleReadBpsDevice": [device]},
            "unified": {"memory.high": "1073741824"},
        })).unwrap();
        prop_assert_eq!(ours(&resources), reconciled(theirs(&resources), &resources));
    }
}

/// Their formula is private; their manager shows it.
#[test]
fn every_weight_is_theirs() {
    for shares in (0..64).chain((64..4096).step_by(61)).chain((4096..270_000).step_by(9973)) {
        let resources: LinuxResources =
            serde_json::from_value(json!({"cpu": {"shares": shares}})).unwrap();
        assert_eq!(ours(&resources)["cpu.weight"], theirs(&resources)["cpu.weight"], "{shares}");
    }
}

/// They look at `/sys/fs/cgroup` only; where that is all there is, both see the same.
#[test]
fn the_hierarchies_of_this_host_are_of_the_same_kind() {
    let theirs = get_cgroup_setup().unwrap();
    match Hierarchies::detect().unwrap().mode() {
        Mode::V2 => assert!(matches!(theirs, CgroupSetup::Unified), "{theirs:?}"),
        Mode::Hybrid => assert!(matches!(theirs, CgroupSetup::Hybrid), "{theirs:?}"),
        Mode::V1 => assert!(matches!(theirs, CgroupSetup::Legacy), "{theirs:?}"),
    }
}
