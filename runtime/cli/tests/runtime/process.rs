use serde_json::{Value, json};

use crate::bundle::{Bundle, capabilities};

/// Runs `script` after `change` and returns its output.
#[track_caller]
fn output_of(script: &str, change: impl FnOnce(&mut Value)) -> String {
    let mut bundle = Bundle::new(script);
    change(&mut bundle.config);
    bundle.run().ok().trim().to_owned()
}

#[test]
fn the_environment_is_the_configured_one_plus_home() {
    let env = output_of("env | grep -v -e SHLVL -e PWD | sort", |config| {
        config["process"]["env"] = json!(["PATH=/bin", "A=1", "A=2"]);
    });
    assert_eq!(env, "A=2\nHOME=/root\nPATH=/bin");
}

#[test]
fn an_ambient_capability_that_cannot_be_raised_is_told() {
    let mut bundle = Bundle::new("grep CapAmb /proc/self/status");
    bundle.config["process"]["capabilities"] = json!({
        "bounding": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL", "CAP_CHOWN"],
        "effective": ["CAP_KILL"], "inheritable": ["CAP_KILL"],
        "ambient": ["CAP_KILL", "CAP_CHOWN"],
    });
    let outcome = bundle.run();
    assert!(outcome.stdout.contains("0000000000000020"), "{outcome:?}");
    let warning = "can't raise ambient capability CAP_CHOWN";
    assert!(outcome.stderr.contains(warning), "{outcome:?}");
}

#[test]
fn user_groups_and_umask_are_set() {
    let text = output_of("id -u; id -g; id -G; umask; echo $HOME", |config| {
        config["process"]["user"] =
            json!({ "uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o077 });
    });
    assert_eq!(text, "1000\n1001\n1001 5 6\n0077\n/home/user");
}

#[test]
fn a_missing_working_directory_is_created() {
    let text = output_of("pwd", |config| config["process"]["cwd"] = json!("/new/deep"));
    assert_eq!(text, "/new/deep");
}

#[test]
fn capabilities_are_exactly_those_of_the_configuration() {
    let sets = output_of("grep Cap /proc/self/status", |config| {
        config["process"]["capabilities"] = capabilities(&["CAP_CHOWN", "CAP_KILL"]);
    });
    for line in sets.lines() {
        let (name, value) = line.split_once(":\t").unwrap();
        let expected = match name {
            "CapInh" | "CapAmb" => "0000000000000000",
            _ => "0000000000000021",
        };
        assert_eq!(value, expected, "{name}");
    }
}

#[test]
fn ambient_capabilities_reach_an_unprivileged_program() {
    let sets = output_of("grep Cap /proc/self/status", |config| {
        let one = json!(["CAP_NET_BIND_SERVICE"]);
        config["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
        config["process"]["capabilities"] = json!({
            "bounding": one, "effective": one, "permitted": one, "inheritable": one, "ambient": one,
        });
    });
    assert!(sets.lines().all(|line| line.ends_with("0000000000000400")), "{sets}");
}

#[test]
fn without_capabilities_there_are_none() {
    let sets = output_of("grep Cap /proc/self/status", |config| {
        config["process"].as_object_mut().unwrap().remove("capabilities");
    });
    assert!(sets.lines().all(|line| line.ends_with("0000000000000000")), "{sets}");
}

#[test]
fn no_new_privileges_is_set_or_not_as_asked() {
    for (asked, seen) in [(true, "1"), (false, "0")] {
        let text = output_of("grep NoNewPrivs /proc/self/status", |config| {
            config["process"]["noNewPrivileges"] = json!(asked);
        });
        assert!(text.ends_with(seen), "{asked}: {text}");
    }
}

#[test]
fn resource_limits_are_set() {
    let text = output_of("ulimit -n; ulimit -Hn; ulimit -c", |config| {
        config["process"]["rlimits"] = json!([
            { "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
        ]);
    });
    assert_eq!(text, "100\n200\n0");
}

#[test]
fn a_limit_the_runtime_may_not_set_is_an_error() {
    let mut bundle = Bundle::new("true");
    bundle.config["process"]["rlimits"] =
        json!([{ "type": "RLIMIT_NOFILE", "soft": 1, "hard": 1u64 << 40 }]);
    let outcome = bundle.run();
    outcome.fails_with("error setting rlimit");
    bundle.assert_nothing_left();
}

#[test]
fn the_oom_score_is_set_or_its_refusal_reported() {
    let text = output_of("cat /proc/self/oom_score_adj", |config| {
        config["process"]["oomScoreAdj"] = json!(321);
    });
    assert_eq!(text, "321");
    let mut bundle = Bundle::new("cat /proc/self/oom_score_adj");
    bundle.config["process"]["oomScoreAdj"] = json!(-500);
    let outcome = bundle.run();
    if outcome.code == Some(0) {
        assert_eq!(outcome.stdout.trim(), "-500");
    } else {
        crate::bundle::moot!("lowering it needs CAP_SYS_RESOURCE");
        outcome.fails_with("oom_score_adj");
    }
}

#[test]
fn host_and_domain_names_are_those_of_the_container() {
    let text = output_of("hostname; cat /proc/sys/kernel/domainname", |config| {
        config["hostname"] = json!("inside");
        config["domainname"] = json!("example.net");
    });
    // runc 1.1 does not know domainname.
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("inside"));
    if crate::bundle::is_pinion() {
        assert_eq!(lines.next(), Some("example.net"));
    }
}

#[test]
fn namespaced_kernel_parameters_are_set() {
    let text = output_of("cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni", |config| {
        config["linux"]["sysctl"] = json!({ "net.ipv4.ip_forward": "1", "kernel.shmmni": "777" });
    });
    assert_eq!(text, "1\n777");
}

#[test]
fn the_system_call_filter_is_in_force() {
    for no_new_privileges in [true, false] {
        let text = output_of(
            "grep Seccomp: /proc/self/status; mkdir /tmp/x 2>&1; echo $?",
            |config| {
                config["process"]["noNewPrivileges"] = json!(no_new_privileges);
                config["linux"]["seccomp"] = json!({
                    "defaultAction": "SCMP_ACT_ALLOW",
                    "architectures": ["SCMP_ARCH_X86_64"],
                    "syscalls": [
                        { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28 },
                    ],
                });
            },
        );
        assert!(text.contains("Seccomp:\t2"), "{text}");
        assert!(text.contains("No space left on device") && text.ends_with('1'), "{text}");
    }
}

#[test]
fn a_filter_without_no_new_privileges_leaves_no_capability_behind() {
    let text =
        output_of("grep CapEff /proc/self/status; grep CapBnd /proc/self/status", |config| {
            config["process"]["noNewPrivileges"] = json!(false);
            config["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
            config["process"]["capabilities"] = json!({ "bounding": ["CAP_KILL"] });
            config["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            { "names": ["mkdir"], "action": "SCMP_ACT_ERRNO" } ] });
        });
    assert_eq!(text, "CapEff:\t0000000000000000\nCapBnd:\t0000000000000020");
}

#[test]
fn signals_have_their_default_action_and_none_is_blocked() {
    let text = output_of("", |config| {
        // Not in the shell, which ignores signals itself.
        config["process"]["args"] =
            json!(["grep", "-e", "SigBlk", "-e", "SigIgn", "/proc/self/status"]);
    });
    assert_eq!(text, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000");
}

#[test]
fn the_session_keyring_is_its_own() {
    let bundle = Bundle::new("grep _ses /proc/keys || cat /proc/keys");
    let own = bundle.run();
    assert_eq!(own.code, Some(0), "{own:?}");
    assert!(
        own.stdout.is_empty() || own.stdout.contains(&format!("_ses.{}", bundle.id)),
        "{own:?}"
    );
}
