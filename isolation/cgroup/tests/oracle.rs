//! The same resources through runc and through us must leave the same values in the kernel.
//! Needs root and runc.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a panic is the report

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use oci_spec::runtime::LinuxResources;
use pinion_cgroup::{Cgroup, CgroupPaths, Driver, Hierarchies};

const RESOURCES: &str = r#"{
    "memory":{"limit":67108864,"reservation":33554432,"swap":134217728,"swappiness":20},
    "cpu":{"shares":1536,"quota":25000,"period":50000,"cpus":"0","mems":"0"},
    "pids":{"limit":33},
    "devices":[{"allow":false,"access":"rwm"},
        {"allow":true,"type":"c","major":10,"minor":229,"access":"rw"},
        {"allow":true,"type":"b","major":7,"access":"r"}]}"#;

/// Files of both versions that carry what was asked for.
const FILES: [&str; 17] = [
    "memory.limit_in_bytes",
    "memory.soft_limit_in_bytes",
    "memory.memsw.limit_in_bytes",
    "memory.swappiness",
    "memory.max",
    "memory.low",
    "memory.swap.max",
    "cpu.shares",
    "cpu.cfs_quota_us",
    "cpu.cfs_period_us",
    "cpu.max",
    "cpuset.cpus",
    "cpuset.mems",
    "pids.max",
    "devices.list",
    "cpu.weight",
    "cpu.idle",
];

/// What a cgroup's files hold.
fn held(paths: &CgroupPaths) -> BTreeMap<String, Vec<String>> {
    let mut values = BTreeMap::new();
    for directory in paths.unified.iter().chain(paths.v1.values()) {
        for name in FILES {
            if let Ok(text) = fs::read_to_string(directory.join(name)) {
                let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
                lines.sort();
                values.insert(name.to_owned(), lines);
            }
        }
    }
    values
}

fn bundle(directory: &Path, cgroup: &str) {
    let status = Command::new("runc").args(["spec", "--bundle"]).arg(directory).status().unwrap();
    assert!(status.success());
    // create() only looks whether the program could be executed.
    let program = directory.join("rootfs/bin/sh");
    fs::create_dir_all(program.parent().unwrap()).unwrap();
    fs::copy("/bin/sh", program).unwrap();
    let path = directory.join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config["process"]["terminal"] = false.into();
    config["linux"]["cgroupsPath"] = cgroup.into();
    config["linux"]["resources"] = serde_json::from_str(RESOURCES).unwrap();
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn the_kernel_holds_the_same_values_as_after_runc() {
    if Command::new("runc").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("not possible here: runc is not installed");
        return;
    }
    let hierarchies = Hierarchies::detect().unwrap();
    let parent = format!("/pinion-oracle-{}", std::process::id());
    let plan = |name: &str| {
        let path = format!("{parent}/{name}");
        Cgroup::plan(&hierarchies, Driver::Cgroupfs, Some(&path), name).unwrap()
    };
    let directory = tempfile::tempdir().unwrap();
    bundle(directory.path(), &format!("{parent}/theirs"));
    let id = format!("pinion-oracle-{}", std::process::id());
    let runc = |arguments: &[&str]| {
        let mut command = Command::new("runc");
        command.arg("--root").arg(directory.path().join("state")).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).status().unwrap()
    };
    let created = runc(&["create", "--bundle", directory.path().to_str().unwrap(), &id]);
    let theirs = held(&plan("theirs"));
    runc(&["delete", "--force", &id]);
    assert!(created.success(), "runc create");

    let ours = Cgroup::create(&hierarchies, &plan("ours")).unwrap();
    let applied = ours.apply(&serde_json::from_str::<LinuxResources>(RESOURCES).unwrap());
    let held = held(ours.paths());
    ours.remove().unwrap();
    for directory in ours.paths().unified.iter().chain(ours.paths().v1.values()) {
        let _ = fs::remove_dir(directory.parent().unwrap());
    }
    applied.unwrap();
    println!("{held:#?}");
    assert!(held.len() > 5, "{held:?}");
    for (name, value) in &held {
        // Older runc maps shares to weights by another formula.
        if name != "cpu.weight" {
            assert_eq!(theirs.get(name), Some(value), "{name}");
        }
    }
}
