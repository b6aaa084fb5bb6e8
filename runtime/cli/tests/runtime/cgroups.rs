use std::path::PathBuf;

use serde_json::{Value, json};

use crate::bundle::{Bundle, eventually, has_controller, is_pinion, is_runc_since};

/// The value of the first of these cgroup files that exists.
fn value(bundle: &Bundle, files: &[&str]) -> Option<String> {
    let candidates = bundle.cgroups().into_iter();
    let mut paths = candidates.flat_map(|directory| files.iter().map(move |f| directory.join(f)));
    paths.find_map(|path: PathBuf| std::fs::read_to_string(path).ok()).map(|v| v.trim().to_owned())
}

#[test]
fn limits_are_in_force_before_the_program_and_change_on_update() {
    if !(has_controller("cpu") && has_controller("pids")) {
        return;
    }
    let mut bundle = Bundle::new("sleep 100");
    bundle.config["linux"]["resources"] = json!({
        "pids": { "limit": 50 }, "cpu": { "shares": 512, "quota": 20000, "period": 100_000 },
    });
    bundle.create();
    assert_eq!(value(&bundle, &["pids.max"]).as_deref(), Some("50"));
    let quota = value(&bundle, &["cpu.max", "cpu.cfs_quota_us"]).unwrap();
    assert!(quota.starts_with("20000"), "{quota}");
    bundle.start();
    bundle.verb(&["update", "--pids-limit", "77", &bundle.id]).ok();
    assert_eq!(value(&bundle, &["pids.max"]).as_deref(), Some("77"));
    let file = bundle.path().join("resources.json");
    std::fs::write(&file, r#"{"cpu":{"quota":30000,"period":100000}}"#).unwrap();
    bundle.verb(&["update", "--resources", file.to_str().unwrap(), &bundle.id]).ok();
    let quota = value(&bundle, &["cpu.max", "cpu.cfs_quota_us"]).unwrap();
    assert!(quota.starts_with("30000"), "{quota}");
    let mut command = bundle.command(&["update", "--resources=-", &bundle.id]);
    command.stdin(std::fs::File::open(&file).unwrap());
    assert!(command.status().unwrap().success());
}

#[test]
fn the_program_and_its_children_are_in_the_cgroup() {
    let bundle = Bundle::new("sleep 100 & sleep 100");
    bundle.launch();
    let directories = bundle.cgroups();
    assert!(!directories.is_empty());
    for directory in directories {
        eventually(|| {
            let text = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap();
            text.lines().count() >= 2
        });
    }
}

#[test]
fn pause_stops_every_process_and_resume_lets_them_go_on() {
    let bundle =
        Bundle::new("i=0; while true; do i=$((i+1)); echo $i > /tmp/count; sleep 0.01; done");
    bundle.launch();
    let count = || std::fs::read_to_string(bundle.rootfs().join("tmp/count")).unwrap_or_default();
    eventually(|| !count().is_empty());
    bundle.verb(&["pause", &bundle.id]).ok();
    assert_eq!(bundle.status(), "paused");
    let frozen = count();
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(count(), frozen);
    bundle.verb(&["exec", &bundle.id, "true"]).fails_with("cannot exec in a paused container");
    bundle.verb(&["resume", &bundle.id]).ok();
    assert_eq!(bundle.status(), "running");
    eventually(|| count() != frozen);
}

#[test]
fn a_paused_container_can_be_deleted_by_force() {
    let bundle = Bundle::new("sleep 100");
    bundle.launch();
    bundle.verb(&["pause", &bundle.id]).ok();
    bundle.verb(&["delete", "--force", &bundle.id]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn statistics_have_the_shape_clients_parse() {
    let bundle = Bundle::new("sleep 100");
    bundle.launch();
    let text = bundle.verb(&["events", "--stats", &bundle.id]).ok();
    let event: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(event["type"], "stats");
    assert_eq!(event["id"], bundle.id.as_str());
    let data = &event["data"];
    assert!(data["cpu"]["usage"]["total"].as_u64().unwrap() > 0, "{data}");
    if has_controller("pids") {
        assert!(data["pids"]["current"].as_u64().unwrap() >= 1, "{data}");
    }
    for part in ["memory", "blkio", "hugetlb", "intel_rdt"] {
        assert!(data[part].is_object(), "{part}");
    }
}

#[test]
fn device_rules_decide_what_can_be_opened() {
    let script = "head -c1 /dev/zero | wc -c; head -c1 /dev/fuse 2>&1; mknod /tmp/f c 10 229 && echo made; \
                  head -c1 /tmp/f 2>&1; true";
    let mut bundle = Bundle::new(script);
    bundle.config["linux"]["devices"] =
        json!([{ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229 }]);
    bundle.config["process"]["capabilities"] = crate::bundle::capabilities(&["CAP_MKNOD"]);
    bundle.config["linux"]["resources"] =
        json!({ "devices": [{ "allow": false, "access": "rwm" }] });
    let text = bundle.run().ok();
    assert!(text.starts_with("1\n"), "{text}");
    assert!(text.contains("made"), "{text}");
    assert_eq!(text.matches("Operation not permitted").count(), 2, "{text}");
}

#[test]
fn cgroup_paths_cannot_leave_the_hierarchy() {
    let mut bundle = Bundle::new("true");
    for path in ["../../x", "/..", "/pinion-test/../../x"] {
        bundle.config["linux"]["cgroupsPath"] = json!(path);
        bundle.write_config();
        let outcome = bundle.verb(&["create", &bundle.id]);
        if outcome.code == Some(0) {
            // runc cleans the path instead of refusing it.
            assert!(!crate::bundle::is_pinion(), "{path}");
            bundle.verb(&["delete", "--force", &bundle.id]).ok();
        }
    }
}

#[test]
fn no_further_process_is_a_limit_of_none() {
    if !has_controller("pids") || !is_runc_since(4) {
        return;
    }
    let mut bundle = Bundle::new("sleep 100");
    bundle.config["linux"]["resources"] = json!({ "pids": { "limit": 20 } });
    bundle.launch();
    bundle.verb(&["update", "--pids-limit", "0", &bundle.id]).ok();
    assert_eq!(value(&bundle, &["pids.max"]).as_deref(), Some("1"));
    bundle.verb(&["update", "--pids-limit", "-1", &bundle.id]).ok();
    assert_eq!(value(&bundle, &["pids.max"]).as_deref(), Some("max"));
}

#[test]
fn disabled_cgroups_are_not_made_and_limits_then_refused() {
    if !is_pinion() {
        return;
    }
    let mut bundle = Bundle::new("sleep 100");
    bundle.write_config();
    bundle.verb(&["--cgroup-manager", "disabled", "create", &bundle.id]).ok();
    bundle.start();
    assert_eq!(bundle.cgroups(), Vec::<PathBuf>::new());
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    let its = std::fs::read_to_string(format!("/proc/{}/cgroup", bundle.pid())).unwrap();
    assert_eq!(its, own);
    bundle.exec("true").ok();
    bundle.verb(&["pause", &bundle.id]).fails_with("has no cgroup");
    bundle.verb(&["ps", &bundle.id]).fails_with("has no cgroup");
    bundle.verb(&["kill", "--all", &bundle.id, "TERM"]).fails_with("has no cgroup");
    // The end of the first process is that of all in its PID namespace.
    bundle.verb(&["kill", "--all", &bundle.id, "KILL"]).ok();
    eventually(|| bundle.status() == "stopped");
    bundle.verb(&["delete", &bundle.id]).ok();
    bundle.config["linux"]["resources"] = json!({ "pids": { "limit": 20 } });
    bundle.write_config();
    bundle
        .verb(&["--cgroup-manager", "disabled", "create", &bundle.id])
        .fails_with("cgroups are disabled");
    bundle.assert_nothing_left();
}
