//! Containers that the kernel kills for want of memory.

use std::fs;

use pinion_monitor_proto::message::{Create, event::What};
use serde_json::json;

use crate::rig::{Rig, event};

const LIMIT: u64 = 16 * 1024 * 1024;

/// A container with a memory limit, or why there cannot be one here.
fn limited(rig: &Rig, id: &str, script: &str) -> Result<Create, String> {
    let directory = rig.v1_cgroup("memory", id);
    let v2 = fs::exists("/sys/fs/cgroup/cgroup.controllers").unwrap();
    if !v2 && !fs::exists("/sys/fs/cgroup/memory/memory.limit_in_bytes").unwrap() {
        return Err("no memory controller".to_owned());
    }
    let mut create = rig.bundle(id, &["/bin/sh", "-c", script], |config| {
        config["linux"]["resources"] = json!({ "memory": { "limit": LIMIT, "swap": LIMIT } });
    });
    if v2 {
        create.cgroup = rig.v1_cgroup("", id).to_str().unwrap().to_owned();
    } else {
        create.memory_cgroup = directory.to_str().unwrap().to_owned();
    }
    Ok(create)
}

#[test]
fn an_oom_kill_is_an_event_and_part_of_the_exit() {
    let mut rig = Rig::new();
    let create = match limited(&rig, "c", "tail /dev/zero") {
        Ok(create) => create,
        Err(reason) => return println!("not possible here: {reason}"),
    };
    rig.create(create);
    rig.start("c");
    let exited = rig.exit_of("c");
    assert!(exited.oom_killed && exited.code == 137, "{exited:?}");
    let told = rig.receive(|response| matches!(event(response), Some(What::Oom(_))));
    assert!(matches!(event(&told), Some(What::Oom(oom)) if oom.id == "c" && oom.count >= 1));
    assert_eq!(rig.exit_file("c")["oom_killed"], true);
}

#[test]
fn a_container_that_survives_an_oom_kill_is_told_of_at_once() {
    let mut rig = Rig::new();
    let create = match limited(&rig, "c", "sh -c 'tail /dev/zero'; sleep 1000") {
        Ok(create) => create,
        Err(reason) => return println!("not possible here: {reason}"),
    };
    rig.create(create);
    rig.start("c");
    rig.receive(|response| matches!(event(response), Some(What::Oom(oom)) if oom.id == "c"));
    assert!(rig.connect()[0].exited.is_none());
    rig.kill("c", 9);
    assert!(rig.exit_of("c").oom_killed);
}

#[test]
fn a_cgroup_that_cannot_be_watched_does_not_stop_a_container() {
    let mut rig = Rig::new();
    let mut create = rig.bundle("c", &["/bin/sh", "-c", "exit 4"], |_| {});
    create.memory_cgroup = "/nonexistent".to_owned();
    rig.create(create);
    rig.start("c");
    assert_eq!(rig.exit_of("c").code, 4);
}
