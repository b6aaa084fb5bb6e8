//! The command line against a list of runc's own (1.3): every flag is taken, before and
//! after the container's name.

use std::process::Command;

use crate::bundle::{Bundle, is_pinion, is_runc_since, output, runtime};

/// Verb and flags as `runc VERB --help` lists them; `=` marks those with a value.
const FLAGS: &str = include_str!("runc-flags.txt");

fn flags() -> impl Iterator<Item = (&'static str, Vec<&'static str>)> {
    FLAGS.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let (verb, flags) = line.split_once(':')?;
        Some((verb, flags.split_whitespace().collect()))
    })
}

fn help(verb: &str) -> String {
    let mut command = Command::new(runtime());
    if verb != "global" {
        command.arg(verb);
    }
    let shown = output(command.arg("--help"));
    assert!(shown.status.success(), "{verb}: {shown:?}");
    String::from_utf8(shown.stdout).unwrap()
}

#[test]
fn every_flag_of_runc_is_in_the_help_of_its_verb() {
    if !is_runc_since(3) {
        return;
    }
    for (verb, flags) in flags() {
        let text = help(verb);
        let words: Vec<&str> =
            text.split(|c: char| c.is_whitespace() || c == ',' || c == '=').collect();
        for flag in flags {
            let name = flag.trim_end_matches('=');
            assert!(words.contains(&name), "{verb} {name} is not in the help:\n{text}");
        }
    }
}

#[test]
fn every_flag_of_runc_is_taken_before_and_after_the_name() {
    if !is_pinion() {
        return;
    }
    let bundle = Bundle::new("true");
    for (verb, flags) in flags().filter(|(verb, _)| *verb != "global") {
        for flag in flags.iter().filter(|flag| !["--help", "-h"].contains(flag)) {
            let name = flag.trim_end_matches('=');
            let mut words = vec![name.to_owned()];
            if flag.ends_with('=') {
                words.push(value_for(verb, name).to_owned());
            }
            let takes_name = !["list", "spec", "features"].contains(&verb);
            let orders = match takes_name {
                true => vec![
                    [vec!["no-such".to_owned()], words.clone()],
                    [words.clone(), vec!["no-such".to_owned()]],
                ],
                false => vec![[words.clone(), Vec::new()]],
            };
            for order in orders {
                let line: Vec<String> =
                    [verb.to_owned()].into_iter().chain(order.concat()).collect();
                let outcome = bundle.verb(&line);
                for words in ["unexpected argument", "invalid value", "required"] {
                    assert!(!outcome.stderr.contains(words), "{line:?}: {outcome:?}");
                }
                let _ = std::fs::remove_file(bundle.path().join("config.json"));
            }
        }
    }
}

/// A value the flag accepts.
fn value_for(verb: &str, flag: &str) -> &'static str {
    match (verb, flag) {
        (_, "--format" | "-f") => "json",
        (_, "--interval") => "1s",
        (_, "--user" | "-u") => "1:2",
        (_, "--env" | "-e") => "A=b",
        (_, "--cap" | "-c") => "CAP_KILL",
        (_, "--additional-gids" | "-g" | "--status-fd" | "--preserve-fds") => "0",
        (_, "--page-server") => "127.0.0.1:1",
        (_, "--manage-cgroups-mode") => "soft",
        (_, "--empty-ns") => "network",
        (_, "--cpuset-cpus" | "--cpuset-mems") => "0",
        ("update", "--l3-cache-schema") => "L3:0=f",
        ("update", "--mem-bw-schema") => "MB:0=50",
        (_, "--bundle" | "-b") => ".",
        ("update", "--resources" | "-r") => "/dev/null",
        ("update", _) => "100",
        _ => "x",
    }
}

#[test]
fn global_flags_take_their_value_either_way() {
    let bundle = Bundle::new("sleep 100");
    bundle.launch();
    let root = bundle.state_root();
    for words in [
        vec![format!("--root={}", root.display())],
        vec!["--root".into(), root.display().to_string()],
    ] {
        let listed = output(Command::new(runtime()).args(words).args(["list", "-q"]));
        assert_eq!(String::from_utf8_lossy(&listed.stdout).trim(), bundle.id);
    }
    for words in
        ["--rootless=auto", "--rootless=false", "--debug", "--log-format=json", "--log=/dev/null"]
    {
        let state = output(
            Command::new(runtime()).arg(words).arg("--root").arg(&root).args(["state", &bundle.id]),
        );
        assert!(state.status.success(), "{words}: {state:?}");
    }
}

#[test]
fn what_clients_parse_has_runcs_form() {
    let bundle = Bundle::new("sleep 100");
    bundle.launch();
    // `list -f json` is one line, `state` is indented, `ps -f json` is a list of numbers.
    let list = bundle.verb(&["list", "-f", "json"]).ok();
    assert_eq!(list.lines().count(), 1, "{list}");
    let state = bundle.verb(&["state", &bundle.id]).ok();
    assert!(state.starts_with("{\n  \"ociVersion\": \""), "{state}");
    let keys: Vec<&str> =
        state.lines().filter_map(|line| line.trim().strip_prefix('"')?.split('"').next()).collect();
    let expected = ["ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "owner"];
    assert_eq!(keys, expected);
    let events = bundle.verb(&["events", "--stats", &bundle.id]).ok();
    assert!(
        events.starts_with(&format!("{{\"type\":\"stats\",\"id\":\"{}\",\"data\":{{", bundle.id)),
        "{events}"
    );
    let ps = bundle.verb(&["ps", "-f", "json", &bundle.id]).ok();
    assert_eq!(ps.trim(), format!("[{}]", bundle.pid()));
}

#[test]
fn errors_and_exit_codes_are_those_clients_match_on() {
    let bundle = Bundle::new("sleep 100");
    for verb in ["state", "start", "delete", "kill", "pause", "resume", "ps"] {
        let outcome = bundle.verb(&[verb, "no-such"]);
        assert_eq!(outcome.code, Some(1), "{verb}: {outcome:?}");
        outcome.fails_with("container does not exist");
    }
    bundle.launch();
    bundle.verb(&["create", &bundle.id]).fails_with("container with given ID already exists");
    bundle.verb(&["start", &bundle.id]).fails_with("cannot start an already running container");
    bundle.verb(&["resume", &bundle.id]).fails_with("container not paused");
    bundle.verb(&["kill", &bundle.id, "NOSUCH"]).fails_with("unknown signal");
    let exec = bundle.verb(&["exec", &bundle.id, "/no/such"]);
    assert_eq!(exec.code, Some(255), "{exec:?}");
    assert_eq!(bundle.exec("exit 9").code, Some(9));
    assert_eq!(bundle.exec("kill -9 $$").code, Some(137));
    bundle.verb(&["kill", &bundle.id, "KILL"]).ok();
    bundle.wait_for("stopped");
    bundle.verb(&["kill", &bundle.id, "KILL"]).fails_with("container not running");
    bundle.verb(&["exec", &bundle.id, "true"]).fails_with("stopped container");
    bundle.verb(&["start", &bundle.id]).fails_with("cannot start a container that has stopped");
}

#[test]
fn a_state_directory_that_is_named_must_exist_to_be_listed() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    let list = |root: &std::path::Path| {
        let mut command = std::process::Command::new(crate::bundle::runtime());
        crate::bundle::output(command.arg("--root").arg(root).arg("list")).status.success()
    };
    assert!(list(directory.path()));
    assert!(!list(&missing));
}

#[test]
fn debug_says_what_was_asked_and_how_it_ended() {
    let bundle = crate::bundle::Bundle::new("true");
    bundle.write_config();
    let log = bundle.path().join("log");
    let words = ["--debug", "--log", log.to_str().unwrap(), "--log-format", "json", "run"];
    bundle.verb(&[&words[..], &[bundle.id.as_str()]].concat()).ok();
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.lines().count() > 1 && text.contains("\"level\":\"debug\""), "{text}");
}
