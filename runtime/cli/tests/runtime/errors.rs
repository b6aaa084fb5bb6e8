use serde_json::{Value, json};

use crate::bundle::{Bundle, has_controller, is_pinion};

#[test]
fn verbs_on_nothing_say_that_the_container_does_not_exist() {
    let bundle = Bundle::new("true");
    for verb in ["state", "start", "delete", "pause", "resume", "ps", "kill"] {
        bundle.verb(&[verb, "no-such"]).fails_with("container does not exist");
    }
    bundle.verb(&["exec", "no-such", "ls"]).fails_with("container does not exist");
    bundle.verb(&["events", "--stats", "no-such"]).fails_with("container does not exist");
}

#[test]
fn verbs_at_the_wrong_time_say_why() {
    let bundle = Bundle::new("sleep 100");
    bundle.launch();
    bundle.verb(&["create", &bundle.id]).fails_with("container with given ID already exists");
    bundle.verb(&["start", &bundle.id]).fails_with("cannot start an already running container");
    bundle.verb(&["resume", &bundle.id]).fails_with("container not paused");
    bundle.verb(&["kill", &bundle.id, "KILL"]).ok();
    bundle.wait_for("stopped");
    bundle.verb(&["start", &bundle.id]).fails_with("cannot start a container that has stopped");
    bundle.verb(&["kill", &bundle.id, "TERM"]).fails_with("container not running");
    bundle.verb(&["exec", &bundle.id, "ls"]).fails_with("cannot exec in a stopped container");
}

#[test]
fn errors_reach_the_json_log_that_clients_read() {
    let bundle = Bundle::new("true");
    let log = bundle.path().join("log.json");
    let log_text = log.to_str().unwrap();
    bundle
        .verb(&["--log", log_text, "--log-format", "json", "state", "no-such"])
        .fails_with("container does not exist");
    let line = std::fs::read_to_string(&log).unwrap();
    let entry: Value = serde_json::from_str(line.lines().last().unwrap()).unwrap();
    assert_eq!(entry["level"], "error");
    assert_eq!(entry["msg"], "container does not exist");
    assert!(entry["time"].is_string());
}

#[test]
fn programs_that_cannot_run_are_told_at_create_in_runcs_words() {
    for (program, text) in [
        ("no-such", "exec: \"no-such\": executable file not found in $PATH"),
        ("/no/such", "exec: \"/no/such\": stat /no/such: no such file or directory"),
        ("/etc/passwd", "permission denied"),
    ] {
        let mut bundle = Bundle::new("");
        bundle.config["process"]["args"] = json!([program]);
        bundle.write_config();
        bundle.verb(&["create", &bundle.id]).fails_with(text);
        bundle.assert_nothing_left();
    }
}

#[test]
fn bad_configurations_are_refused_and_leave_nothing() {
    type Change = fn(&mut Value);
    let changes: &[(&str, Change)] = &[
        ("args", |config| config["process"]["args"] = json!([])),
        ("cwd", |config| config["process"]["cwd"] = json!("relative")),
        ("rootfs", |config| config["root"]["path"] = json!("no-such")),
        ("hostname", |config| config["linux"]["namespaces"] = json!([{ "type": "mount" }])),
        ("sysctl", |config| config["linux"]["sysctl"] = json!({ "kernel.core_pattern": "x" })),
        ("duplicate namespace", |config| {
            config["linux"]["namespaces"] = json!([{ "type": "mount" }, { "type": "mount" }]);
        }),
        ("user namespace", |config| {
            config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
        }),
        ("mount source", |config| {
            config["mounts"].as_array_mut().unwrap().push(
                json!({ "destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"] }),
            );
        }),
        ("unknown file system", |config| {
            config["mounts"]
                .as_array_mut()
                .unwrap()
                .push(json!({ "destination": "/x", "type": "nosuchfs", "source": "none" }));
        }),
        ("unknown mount option", |config| {
            config["mounts"].as_array_mut().unwrap().push(
                json!({ "destination": "/x", "type": "tmpfs", "source": "t", "options": ["nosuch=1"] }),
            );
        }),
        ("namespace path", |config| {
            config["linux"]["namespaces"]
                .as_array_mut()
                .unwrap()
                .retain(|n| n["type"] != "network");
            let path = json!({ "type": "network", "path": "/etc/passwd" });
            config["linux"]["namespaces"].as_array_mut().unwrap().push(path);
        }),
    ];
    for (name, change) in changes {
        let mut bundle = Bundle::new("true");
        change(&mut bundle.config);
        bundle.write_config();
        let outcome = bundle.verb(&["create", &bundle.id]);
        assert!(outcome.code.is_some_and(|code| code != 0), "{name}: {outcome:?}");
        assert!(!outcome.stderr.is_empty(), "{name}");
        bundle.assert_nothing_left();
    }
}

#[test]
fn a_configuration_for_another_major_version_is_refused() {
    if !is_pinion() {
        return;
    }
    let mut bundle = Bundle::new("true");
    bundle.config["ociVersion"] = json!("2.0.0");
    bundle.write_config();
    bundle.verb(&["create", &bundle.id]).fails_with("ociVersion");
    bundle.assert_nothing_left();
}

#[test]
fn a_mount_inside_proc_is_refused() {
    // runc 1.1 lets this one through.
    if !is_pinion() {
        return;
    }
    let mut bundle = Bundle::new("true");
    bundle.mount("/proc/self/attr", "tmpfs", "tmpfs", &[]);
    bundle.write_config();
    bundle.verb(&["create", &bundle.id]).fails_with("because it is inside /proc");
    bundle.assert_nothing_left();
}

#[test]
fn malformed_json_is_reported_with_file_line_and_column() {
    if !is_pinion() {
        return;
    }
    let bundle = Bundle::new("true");
    std::fs::write(bundle.path().join("config.json"), "{\n  \"ociVersion\" 1 }").unwrap();
    let outcome = bundle.verb(&["create", &bundle.id]);
    outcome.fails_with("config.json");
    outcome.fails_with("line 2 column");
    bundle.assert_nothing_left();
}

#[test]
fn unknown_capabilities_are_left_out_and_the_container_runs() {
    let mut bundle = Bundle::new("exit 4");
    bundle.config["process"]["capabilities"]["bounding"] = json!(["CAP_KILL", "CAP_NO_SUCH"]);
    let outcome = bundle.run();
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
}

#[test]
fn names_that_are_paths_are_refused() {
    let bundle = Bundle::new("true");
    bundle.write_config();
    for id in ["..", "a/b", "../x", "a b"] {
        bundle.verb(&["create", id]).fails_with("invalid");
        bundle.verb(&["state", id]).fails_with("");
    }
}

#[test]
fn a_container_with_a_kernel_of_its_own_never_runs_on_the_hosts() {
    if !is_pinion() {
        return;
    }
    let mut bundle = Bundle::new("true");
    bundle.config["vm"] = json!({ "kernel": { "path": "/boot/guest" } });
    bundle.write_config();
    let outcome = bundle.verb(&["create", &bundle.id]);
    outcome.fails_with("the vm section (kernel /boot/guest)");
    outcome.fails_with("no microVM driver");
    bundle.config["vm"] = json!({ "kernel": { "path": "relative" } });
    bundle.write_config();
    bundle.verb(&["create", &bundle.id]).fails_with("vm.kernel.path");
    bundle.assert_nothing_left();
}

#[test]
fn cache_allocation_without_resctrl_names_the_missing_mount() {
    if !is_pinion() {
        return;
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    if mounts.contains(" - resctrl ") {
        crate::bundle::moot!("there is a resctrl");
        return;
    }
    let mut bundle = Bundle::new("true");
    bundle.config["linux"]["intelRdt"] = json!({ "closID": "x", "schemata": ["L3:0=f"] });
    bundle.write_config();
    bundle.verb(&["create", &bundle.id]).fails_with("mount -t resctrl");
    bundle.assert_nothing_left();
    bundle.config["linux"]["intelRdt"] = json!({ "closID": "a/b" });
    bundle.write_config();
    bundle.verb(&["create", &bundle.id]).fails_with("closID");
    bundle.assert_nothing_left();
}

#[test]
fn a_label_without_its_security_module_is_refused() {
    for (place, field, module) in [
        ("process", "selinuxLabel", "/sys/fs/selinux/enforce"),
        ("linux", "mountLabel", "/sys/fs/selinux/enforce"),
        ("process", "apparmorProfile", "/sys/module/apparmor"),
    ] {
        if std::path::Path::new(module).exists() {
            crate::bundle::moot!("there is a {module}");
            continue;
        }
        let mut bundle = Bundle::new("true");
        bundle.config[place][field] = json!("some_u:some_r:some_t:s0");
        bundle.write_config();
        let outcome = bundle.verb(&["create", &bundle.id]);
        outcome.fails_with(if field == "apparmorProfile" { "apparmor" } else { "selinux" });
        bundle.assert_nothing_left();
    }
}

#[test]
fn a_strict_isolation_request_this_machine_cannot_meet_is_refused() {
    if !is_pinion() || !has_controller("cpuset") {
        return;
    }
    let mut bundle = Bundle::new("true");
    bundle.config["annotations"] =
        json!({ "dev.pinion.strict": "true", "dev.pinion.cpuset.partition": "isolated" });
    bundle.config["linux"]["resources"] = json!({ "cpu": { "cpus": first_core(), "mems": "0" } });
    bundle.write_config();
    let outcome = bundle.verb(&["create", &bundle.id]);
    if std::path::Path::new("/sys/fs/cgroup/cpuset.cpus.isolated").exists()
        && outcome.code == Some(0)
    {
        bundle.verb(&["delete", "--force", &bundle.id]).ok();
    } else {
        outcome.fails_with("isolation refused: exclusive-cpus: ");
    }
    bundle.assert_nothing_left();
}

/// The CPUs of the machine's first core: a part of one would be refused for another reason.
fn first_core() -> String {
    let siblings = "/sys/devices/system/cpu/cpu0/topology/thread_siblings_list";
    std::fs::read_to_string(siblings).map_or_else(|_| "0".into(), |text| text.trim().to_owned())
}
