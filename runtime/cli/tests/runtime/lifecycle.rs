use serde_json::Value;

use crate::bundle::{Bundle, eventually, output, runtime};

#[test]
fn a_container_goes_through_created_running_and_stopped_to_nothing() {
    let bundle = Bundle::new("cat /tmp/go; sleep 0.2");
    bundle.create();
    let state = bundle.state();
    assert_eq!(state["status"], "created");
    assert_eq!(state["id"], bundle.id.as_str());
    assert_eq!(state["ociVersion"].as_str().unwrap().split('.').next(), Some("1"));
    assert_eq!(state["bundle"], bundle.path().to_str().unwrap());
    assert_eq!(state["rootfs"], bundle.rootfs().to_str().unwrap());
    assert!(state["created"].as_str().unwrap().ends_with('Z'));
    assert!(state["pid"].as_i64().unwrap() > 1);
    bundle.start();
    bundle.wait_for("stopped");
    assert_eq!(bundle.state()["pid"], 0);
    bundle.verb(&["delete", &bundle.id]).ok();
    bundle.verb(&["state", &bundle.id]).fails_with("container does not exist");
    bundle.assert_nothing_left();
}

#[test]
fn the_program_does_not_run_before_start() {
    let mut bundle = Bundle::new("echo ran > /out/ran");
    let out = bundle.path().join("out");
    std::fs::create_dir(&out).unwrap();
    bundle.mount("/out", "bind", out.to_str().unwrap(), &["bind"]);
    bundle.create();
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(!out.join("ran").exists());
    bundle.start();
    eventually(|| out.join("ran").exists());
}

#[test]
fn run_returns_the_exit_code_and_leaves_nothing() {
    for (script, code) in [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)] {
        let mut bundle = Bundle::new(script);
        // The first process of a PID namespace ignores signals from within.
        let namespaces = bundle.config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "pid");
        assert_eq!(bundle.run().code, Some(code), "{script}");
        bundle.assert_nothing_left();
    }
}

#[test]
fn run_forwards_signals_to_the_program() {
    let bundle = Bundle::new("trap 'exit 33' TERM; echo ready; while true; do sleep 0.05; done");
    bundle.write_config();
    let mut child = bundle.command(&["run", &bundle.id]).spawn().unwrap();
    eventually(|| bundle.verb(&["state", &bundle.id]).stdout.contains("running"));
    std::thread::sleep(std::time::Duration::from_millis(300));
    std::process::Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(33));
    bundle.assert_nothing_left();
}

#[test]
fn run_detached_returns_while_the_program_runs() {
    let bundle = Bundle::new("sleep 100");
    bundle.write_config();
    let pid_file = bundle.path().join("pid");
    bundle.verb(&["run", "--detach", "--pid-file", pid_file.to_str().unwrap(), &bundle.id]).ok();
    assert_eq!(bundle.status(), "running");
    assert_eq!(std::fs::read_to_string(&pid_file).unwrap(), bundle.pid().to_string());
    bundle.verb(&["kill", &bundle.id, "KILL"]).ok();
    bundle.wait_for("stopped");
}

#[test]
fn delete_wants_a_stopped_container_unless_forced() {
    let bundle = Bundle::new("sleep 100");
    bundle.launch();
    bundle.verb(&["delete", &bundle.id]).fails_with("that is not stopped: running");
    bundle.verb(&["delete", "--force", &bundle.id]).ok();
    bundle.assert_nothing_left();
    bundle.verb(&["delete", "--force", &bundle.id]).ok();
    bundle.verb(&["delete", &bundle.id]).fails_with("container does not exist");
}

#[test]
fn a_container_that_was_never_started_can_be_deleted() {
    let bundle = Bundle::new("true");
    bundle.create();
    bundle.verb(&["delete", &bundle.id]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn signals_reach_the_first_process_by_number_and_name() {
    for signal in ["10", "USR1", "SIGUSR1", "sigusr1"] {
        let bundle =
            Bundle::new("trap 'exit 5' USR1; touch /tmp/up; while true; do sleep 0.02; done");
        bundle.launch();
        eventually(|| bundle.rootfs().join("tmp/up").exists());
        bundle.verb(&["kill", &bundle.id, signal]).ok();
        bundle.wait_for("stopped");
    }
}

#[test]
fn kill_all_reaches_every_process() {
    let mut bundle = Bundle::new("sleep 100 & sleep 100 & touch /tmp/up; wait");
    let namespaces = bundle.config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "pid");
    bundle.launch();
    eventually(|| bundle.rootfs().join("tmp/up").exists());
    bundle.verb(&["kill", "--all", &bundle.id, "KILL"]).ok();
    bundle.wait_for("stopped");
    let listed = |bundle: &Bundle| bundle.verb(&["ps", "--format", "json", &bundle.id]).ok();
    eventually(|| matches!(listed(&bundle).trim(), "[]" | "null"));
}

#[test]
fn list_shows_containers_as_table_json_and_names() {
    let bundle = Bundle::new("sleep 100");
    bundle.launch();
    let table = bundle.verb(&["list"]).ok();
    let header: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(header, ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]);
    assert!(table.lines().nth(1).unwrap().starts_with(&bundle.id));
    assert_eq!(bundle.verb(&["list", "-q"]).ok().trim(), bundle.id);
    let json: Value = serde_json::from_str(&bundle.verb(&["list", "-f", "json"]).ok()).unwrap();
    assert_eq!(json[0]["id"], bundle.id.as_str());
    assert_eq!(json[0]["status"], "running");
    assert_eq!(json[0]["owner"], "root");
}

#[test]
fn ps_lists_the_processes_of_the_container() {
    let bundle = Bundle::new("sleep 1234");
    bundle.launch();
    let pids: Vec<i32> =
        serde_json::from_str(&bundle.verb(&["ps", "--format", "json", &bundle.id]).ok()).unwrap();
    assert!(pids.contains(&bundle.pid()), "{pids:?}");
    let table = bundle.verb(&["ps", &bundle.id]).ok();
    assert!(table.lines().next().unwrap().contains("PID"), "{table}");
    assert!(table.contains(&bundle.pid().to_string()), "{table}");
}

#[test]
fn version_and_features_describe_the_runtime() {
    let version = output(std::process::Command::new(runtime()).arg("--version"));
    let text = String::from_utf8(version.stdout).unwrap();
    assert!(text.lines().next().unwrap().contains(" version "), "{text}");
    assert!(text.lines().any(|line| line.starts_with("spec: 1.")), "{text}");
    let features = output(std::process::Command::new(runtime()).arg("features"));
    let json: Value = serde_json::from_slice(&features.stdout).unwrap();
    assert_eq!(json["ociVersionMin"], "1.0.0");
    for (list, entry) in [
        (&json["hooks"], "createRuntime"),
        (&json["mountOptions"], "rro"),
        (&json["linux"]["namespaces"], "cgroup"),
        (&json["linux"]["capabilities"], "CAP_SYS_ADMIN"),
        (&json["linux"]["seccomp"]["actions"], "SCMP_ACT_ERRNO"),
    ] {
        assert!(list.as_array().unwrap().iter().any(|e| e == entry), "{entry}");
    }
}

#[test]
fn the_configuration_of_spec_runs() {
    let mut bundle = Bundle::new("");
    bundle.verb(&["spec"]).ok();
    bundle.verb(&["spec"]).fails_with("exists");
    let text = std::fs::read_to_string(bundle.path().join("config.json")).unwrap();
    let path = bundle.config["linux"]["cgroupsPath"].clone();
    bundle.config = serde_json::from_str(&text).unwrap();
    bundle.config["linux"]["cgroupsPath"] = path;
    bundle.config["process"]["terminal"] = false.into();
    bundle.config["process"]["args"] = serde_json::json!(["sh", "-c", "exit 3"]);
    bundle.config["process"]["env"] = serde_json::json!(["PATH=/bin"]);
    assert_eq!(bundle.run().code, Some(3));
}
