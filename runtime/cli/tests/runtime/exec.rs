use serde_json::json;

use crate::bundle::{Bundle, capabilities, eventually};

fn running() -> Bundle {
    let bundle = Bundle::new("sleep 1000");
    bundle.launch();
    bundle
}

#[test]
fn a_further_process_runs_in_all_namespaces_and_the_cgroup() {
    let bundle = running();
    let script =
        "for n in mnt pid net ipc uts; do readlink /proc/self/ns/$n; readlink /proc/1/ns/$n; done";
    let text = bundle.exec(script).ok();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 10, "{text}");
    assert!(lines.chunks(2).all(|pair| pair[0] == pair[1]), "{text}");
    let text = bundle.exec("cat /proc/self/cgroup").ok();
    assert!(text.lines().filter(|line| line.contains(&bundle.id)).count() > 0, "{text}");
    let own = bundle.exec("cat /proc/self/cgroup").ok();
    assert_eq!(own, bundle.exec("cat /proc/1/cgroup").ok());
}

#[test]
fn exit_codes_and_signals_are_returned() {
    let bundle = running();
    assert_eq!(bundle.exec("exit 42").code, Some(42));
    assert_eq!(bundle.exec("kill -15 $$").code, Some(143));
}

#[test]
fn flags_change_user_directory_environment_and_groups() {
    let bundle = running();
    let text = bundle
        .verb(&[
            "exec",
            "--user",
            "1000:1001",
            "--cwd",
            "/tmp",
            "--env",
            "A=b",
            "--env",
            "C=d",
            "--additional-gids",
            "77",
            &bundle.id,
            "/bin/sh",
            "-c",
            "id -u; id -G; pwd; echo $A$C",
        ])
        .ok();
    assert_eq!(text, "1000\n1001 77\n/tmp\nbd\n");
}

#[test]
fn capabilities_can_be_added_and_are_not_inheritable() {
    let bundle = running();
    let text = bundle
        .verb(&[
            "exec",
            "--cap",
            "CAP_SYS_ADMIN",
            &bundle.id,
            "/bin/grep",
            "Cap",
            "/proc/self/status",
        ])
        .ok();
    for line in text.lines() {
        let expected = match line.split(':').next().unwrap() {
            "CapInh" | "CapAmb" => "0000000000000000",
            _ => "0000000000200021",
        };
        assert!(line.ends_with(expected), "{text}");
    }
}

#[test]
fn a_process_file_is_obeyed() {
    let bundle = running();
    let file = bundle.path().join("process.json");
    let process = json!({
        "args": ["/bin/sh", "-c", "id -u; pwd; echo $X; grep CapEff /proc/self/status"],
        "cwd": "/tmp", "user": { "uid": 3, "gid": 4 }, "env": ["PATH=/bin", "X=y"],
        "capabilities": capabilities(&["CAP_KILL"]), "noNewPrivileges": true,
    });
    std::fs::write(&file, process.to_string()).unwrap();
    let text = bundle.verb(&["exec", "--process", file.to_str().unwrap(), &bundle.id]).ok();
    assert_eq!(text, "3\n/tmp\ny\nCapEff:\t0000000000000000\n");
}

#[test]
fn a_detached_process_goes_on_and_its_id_is_in_the_file() {
    let bundle = running();
    let file = bundle.path().join("exec.pid");
    let path = file.to_str().unwrap();
    bundle.verb(&["exec", "--detach", "--pid-file", path, &bundle.id, "/bin/sleep", "500"]).ok();
    let pid = std::fs::read_to_string(&file).unwrap();
    // runc writes the file before the program runs.
    eventually(|| {
        let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        command.contains("sleep\x00500")
    });
}

#[test]
fn programs_that_do_not_exist_are_reported() {
    let bundle = running();
    let outcome = bundle.verb(&["exec", &bundle.id, "no-such"]);
    outcome.fails_with("exec: \"no-such\": executable file not found in $PATH");
    assert_eq!(outcome.code, Some(255));
}

#[test]
fn the_filter_of_the_container_holds_for_further_processes() {
    let mut bundle = Bundle::new("sleep 1000");
    bundle.config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28 }],
    });
    bundle.launch();
    let text = bundle.exec("mkdir /tmp/x 2>&1; grep Seccomp: /proc/self/status").ok();
    assert!(text.contains("No space left on device") && text.contains("\t2"), "{text}");
}

#[test]
fn standard_input_and_output_are_those_of_the_caller() {
    let bundle = running();
    let input = bundle.path().join("input");
    std::fs::write(&input, "through").unwrap();
    let mut command = bundle.command(&["exec", &bundle.id, "/bin/cat"]);
    command.stdin(std::fs::File::open(&input).unwrap());
    let outcome = crate::bundle::finish(&mut command, bundle.path());
    assert_eq!(outcome.stdout, "through");
}

#[test]
fn a_created_container_accepts_further_processes() {
    let bundle = Bundle::new("sleep 1000");
    bundle.create();
    assert_eq!(bundle.exec("echo early").ok(), "early\n");
}

#[test]
fn many_processes_at_once_all_succeed() {
    let bundle = running();
    let children: Vec<_> = (0..12)
        .map(|_| bundle.command(&["exec", &bundle.id, "/bin/true"]).spawn().unwrap())
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let alive = || bundle.verb(&["ps", "-f", "json", &bundle.id]).ok().matches(',').count();
    eventually(|| alive() == 0);
}

#[test]
fn whatever_keeps_exec_from_running_is_code_255() {
    let bundle = Bundle::new("sleep 100");
    let unknown = bundle.exec("true");
    assert_eq!(unknown.code, Some(255), "{unknown:?}");
    unknown.fails_with("exec failed: container does not exist");
    bundle.launch();
    let script = bundle.rootfs().join("run.sh");
    std::fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let outcome = bundle.verb(&["exec", &bundle.id, "/run.sh"]);
    assert_eq!(outcome.code, Some(255), "{outcome:?}");
    outcome.fails_with("exec /run.sh: no such file or directory");
}

#[test]
fn capabilities_added_to_an_exec_are_ambient_where_they_are_inheritable() {
    let mut bundle = Bundle::new("sleep 100");
    bundle.config["process"]["capabilities"] = json!({
        "bounding": ["CAP_KILL", "CAP_CHOWN", "CAP_SYSLOG"], "effective": ["CAP_KILL"],
        "permitted": ["CAP_KILL", "CAP_CHOWN"], "inheritable": ["CAP_CHOWN", "CAP_SYSLOG"],
        "ambient": ["CAP_CHOWN"],
    });
    bundle.launch();
    let added = ["exec", "--cap", "CAP_SYSLOG", &bundle.id, "grep", "CapAmb", "/proc/self/status"];
    assert!(bundle.verb(&added).ok().contains("0000000400000001"));
    let without = ["exec", "--cap", "CAP_FOWNER", &bundle.id, "grep", "Cap", "/proc/self/status"];
    let sets = bundle.verb(&without).ok();
    assert!(sets.contains("CapAmb:\t0000000000000001"), "{sets}");
}
