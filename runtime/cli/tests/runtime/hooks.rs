use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use crate::bundle::{Bundle, eventually, is_pinion, is_runc_since};

/// Adds a hook of each kind that notes its kind, its place and the status it was told.
fn with_all_hooks(bundle: &mut Bundle) -> std::path::PathBuf {
    let out = bundle.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::set_permissions(&out, PermissionsExt::from_mode(0o777)).unwrap();
    bundle.mount("/out", "bind", out.to_str().unwrap(), &["bind"]);
    let log = out.join("log");
    let host = |kind: &str| {
        let script = format!(
            "s=$(cat | tr -d ' \\n' | grep -o '\"status\":\"[a-z]*\"' | cut -d'\"' -f4); echo {kind} $s >> {}",
            log.display()
        );
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"] }])
    };
    let inside = json!([{ "path": "/bin/sh", "env": ["PATH=/bin"],
        "args": ["sh", "-c", "s=$(cat | grep -o '\"status\":\"[a-z]*\"' | cut -d'\"' -f4); echo startContainer $s >> /out/log"] }]);
    bundle.config["hooks"] = json!({
        "prestart": host("prestart"), "createRuntime": host("createRuntime"),
        "createContainer": host("createContainer"), "startContainer": inside,
        "poststart": host("poststart"), "poststop": host("poststop"),
    });
    log
}

#[test]
fn hooks_run_in_order_with_the_state_on_standard_input() {
    let mut bundle = Bundle::new("echo program >> /out/log; sleep 0.3");
    let log = with_all_hooks(&mut bundle);
    bundle.create();
    let kinds = || -> Vec<String> {
        let text = std::fs::read_to_string(&log).unwrap();
        text.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
    };
    // runc 1.1 runs poststart hooks at create.
    let early: Vec<_> =
        kinds().into_iter().filter(|kind| is_pinion() || kind != "poststart").collect();
    assert_eq!(early, ["prestart", "createRuntime", "createContainer"]);
    bundle.start();
    bundle.wait_for("stopped");
    bundle.verb(&["delete", &bundle.id]).ok();
    let all = kinds();
    assert!(all.contains(&"startContainer".to_owned()));
    assert_eq!(all.last().unwrap(), "poststop");
    assert!(all.contains(&"poststart".to_owned()) && all.contains(&"program".to_owned()));
    if is_pinion() {
        let text = std::fs::read_to_string(&log).unwrap();
        for line in [
            "createRuntime creating",
            "startContainer created",
            "poststart running",
            "poststop stopped",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }
}

#[test]
fn the_state_names_container_bundle_process_and_annotations() {
    let mut bundle = Bundle::new("true");
    let file = bundle.path().join("state-seen");
    let script = format!("cat > {}", file.display());
    bundle.config["hooks"] = json!({ "createRuntime": [
        { "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"] } ] });
    bundle.config["annotations"] = json!({ "some.key": "value" });
    bundle.create();
    let state: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(state["id"], bundle.id.as_str());
    assert_eq!(state["bundle"], bundle.path().to_str().unwrap());
    assert_eq!(state["pid"], bundle.pid());
    assert_eq!(state["annotations"]["some.key"], "value");
}

#[test]
fn a_failing_hook_before_the_start_ends_the_creation_and_leaves_nothing() {
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let mut bundle = Bundle::new("true");
        bundle.config["hooks"] = json!({ kind: [
            { "path": "/bin/sh", "args": ["sh", "-c", "echo reason >&2; exit 3"], "env": ["PATH=/bin"] } ] });
        bundle.write_config();
        let outcome = bundle.verb(&["create", &bundle.id]);
        outcome.fails_with("hook");
        outcome.fails_with("reason");
        bundle.assert_nothing_left();
    }
}

#[test]
fn a_hook_over_its_time_is_killed() {
    let mut bundle = Bundle::new("true");
    bundle.config["hooks"] = json!({ "createRuntime": [
        { "path": "/bin/sleep", "args": ["sleep", "100"], "timeout": 1 } ] });
    bundle.write_config();
    let begin = std::time::Instant::now();
    assert_ne!(bundle.verb(&["create", &bundle.id]).code, Some(0));
    assert!(begin.elapsed().as_secs() < 20);
    bundle.assert_nothing_left();
}

#[test]
fn a_failing_start_container_hook_fails_the_start() {
    if !is_pinion() {
        return;
    }
    let mut bundle = Bundle::new("touch /tmp/ran");
    bundle.config["hooks"] = json!({ "startContainer": [
        { "path": "/bin/false", "args": ["false"], "env": [] } ] });
    bundle.create();
    bundle.verb(&["start", &bundle.id]).fails_with("startContainer hook #0");
    eventually(|| bundle.status() == "stopped");
    assert!(!bundle.rootfs().join("tmp/ran").exists());
}

#[test]
fn hooks_inherit_nothing_of_the_callers_environment() {
    let mut bundle = Bundle::new("true");
    let file = bundle.path().join("env-seen");
    let script = format!("export -p > {}", file.display());
    bundle.config["hooks"] = json!({ "createRuntime": [
        { "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["ONLY=this"] } ] });
    bundle.write_config();
    let mut command = bundle.command(&["create", &bundle.id]);
    command.env("LD_PRELOAD", "/evil.so").env("SECRET", "x");
    assert!(command.stderr(std::process::Stdio::null()).status().unwrap().success());
    let seen = std::fs::read_to_string(&file).unwrap();
    assert!(seen.contains("ONLY=") && !seen.contains("SECRET"), "{seen}");
    assert!(!seen.contains("LD_PRELOAD"), "{seen}");
}

#[test]
fn a_failing_poststart_hook_stops_the_container() {
    // Before runtime-spec 1.2 it was but a warning.
    if !is_runc_since(4) {
        return;
    }
    let mut bundle = Bundle::new("sleep 100");
    bundle.config["hooks"] = json!({ "poststart": [
        { "path": "/bin/false", "args": ["false"], "env": [] } ] });
    bundle.create();
    bundle.verb(&["start", &bundle.id]).fails_with("poststart hook");
    eventually(|| bundle.status() == "stopped");
    bundle.verb(&["delete", &bundle.id]).ok();
    bundle.run().fails_with("poststart hook");
    bundle.assert_nothing_left();
}

#[test]
fn a_start_container_hook_without_an_environment_has_that_of_the_process() {
    let mut bundle = Bundle::new("cat /tmp/seen");
    bundle.config["process"]["env"] = json!(["PATH=/bin", "ONE=two"]);
    let script = "env > /tmp/seen";
    bundle.config["hooks"] = json!({ "startContainer": [
        { "path": "/bin/sh", "args": ["sh", "-c", script] } ] });
    let seen = bundle.run().ok();
    assert!(seen.contains("ONE=two\n") && seen.contains("HOME=/root\n"), "{seen}");
}

#[test]
fn the_filter_holds_for_hooks_that_are_programs_of_the_container() {
    let mut bundle = Bundle::new("true");
    bundle.config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL" }],
    });
    bundle.config["hooks"] = json!({ "startContainer": [
        { "path": "/bin/mkdir", "args": ["mkdir", "/tmp/made"] } ] });
    bundle.run().fails_with("bad system call");
    assert!(!bundle.rootfs().join("tmp/made").exists());
}
