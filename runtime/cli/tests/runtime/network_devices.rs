//! `linux.netDevices`. Every test has a network namespace of its own for a host, so nothing
//! of the machine's network is touched; runc does this from 1.4 on.

use serde_json::{Value, json};

use crate::bundle::{Bundle, Outcome, has_full_program, has_program, is_runc_since};

/// A pair of virtual devices, one of them with everything a device can keep.
const HOST: &str = "set -e
    ip link add v0 type veth peer name peer0
    ip link set v0 address 02:00:00:00:00:42 mtu 1400
    ip addr add 198.51.100.7/24 brd + dev v0
    ip addr add 198.51.100.8/32 dev v0 scope link
    ip link set v0 up; ip link set peer0 up
    ip -6 addr add 2001:db8::7/64 dev v0 nodad 2>/dev/null || true";

fn can() -> bool {
    is_runc_since(4) && has_full_program("ip") && has_program("unshare")
}

/// Runs `before`, the container and `after` in a new network namespace.
fn run_between(bundle: &Bundle, before: &str, after: &str) -> Outcome {
    bundle.write_config();
    let run = bundle.command(&["run", &bundle.id]);
    let mut words = vec![run.get_program().to_string_lossy().into_owned()];
    words.extend(run.get_args().map(|word| word.to_string_lossy().into_owned()));
    let script = format!("{before}\nset +e\n{}\nstatus=$?\n{after}\nexit $status", words.join(" "));
    let mut command = std::process::Command::new("unshare");
    command.args(["--net", "sh", "-c", &script]);
    crate::bundle::finish(command.current_dir(bundle.path()), bundle.path())
}

fn with_devices(script: &str, devices: Value) -> Bundle {
    let mut bundle = Bundle::new(script);
    bundle.config["linux"]["netDevices"] = devices;
    bundle
}

#[test]
fn a_device_keeps_its_attributes_and_global_addresses() {
    if !can() {
        return;
    }
    let bundle = with_devices("ip addr show v0", json!({ "v0": {} }));
    let text = run_between(&bundle, HOST, "").ok();
    for word in ["mtu 1400", "02:00:00:00:00:42", "198.51.100.7/24 brd 198.51.100.255", ",UP"] {
        assert!(text.contains(word), "{word} in {text}");
    }
    assert!(!text.contains("198.51.100.8"), "an address of link scope came along: {text}");
    if std::path::Path::new("/proc/sys/net/ipv6").exists() {
        assert!(text.contains("2001:db8::7/64"), "{text}");
    }
}

#[test]
fn a_device_is_renamed_and_gone_from_the_host() {
    if !can() {
        return;
    }
    let bundle = with_devices("ip -o link", json!({ "v0": { "name": "data0" } }));
    let text = run_between(&bundle, HOST, "echo host:; ip -o link").ok();
    let (inside, host) = text.split_once("host:").unwrap();
    assert!(inside.contains("data0") && !inside.contains("v0"), "{text}");
    assert!(!host.contains("v0@"), "{text}");
}

#[test]
fn a_template_gets_a_number_from_the_kernel() {
    if !can() {
        return;
    }
    let before = format!("{HOST}\nip link add w0 type veth peer name peer1");
    let devices = json!({ "v0": { "name": "net%d" }, "w0": { "name": "net%d" } });
    let bundle = with_devices("ip addr", devices);
    let text = run_between(&bundle, &before, "").ok();
    assert!(text.contains("net0") && text.contains("net1"), "{text}");
    assert!(text.contains("198.51.100.7/24"), "{text}");
}

#[test]
fn a_device_moves_into_an_existing_namespace_too() {
    if !can() {
        return;
    }
    let holder = Bundle::new("sleep 100");
    holder.launch();
    // Both ends: one would end with the namespace of the other.
    let mut bundle = with_devices("ip -o link", json!({ "v0": { "name": "x0" }, "peer0": {} }));
    let path = format!("/proc/{}/ns/net", holder.pid());
    for namespace in bundle.config["linux"]["namespaces"].as_array_mut().unwrap() {
        if namespace["type"] == "network" {
            namespace["path"] = json!(path);
        }
    }
    let text = run_between(&bundle, HOST, "").ok();
    assert!(text.contains("x0"), "{text}");
    assert!(holder.exec("ip -o link").ok().contains("x0"), "it stays with the namespace");
    // The name is taken now.
    bundle.config["linux"]["netDevices"] = json!({ "v0": { "name": "x0" } });
    let again = run_between(&bundle, HOST, "ip -o addr show v0");
    again.fails_with("x0");
    assert!(again.stdout.contains("198.51.100.7"), "it is still on the host: {again:?}");
}

#[test]
fn a_failed_creation_gives_every_device_back_as_it_was() {
    if !can() || !crate::bundle::is_pinion() {
        return;
    }
    let devices = json!({ "v0": { "name": "x0" } });
    let mut bundle = with_devices("true", devices);
    bundle.config["hooks"] = json!({ "createRuntime": [{ "path": "/bin/false" }] });
    let outcome = run_between(&bundle, HOST, "ip addr show v0");
    outcome.fails_with("hook");
    for word in ["mtu 1400", "02:00:00:00:00:42", "198.51.100.7/24", ",UP"] {
        assert!(outcome.stdout.contains(word), "{word} in {outcome:?}");
    }
    bundle.assert_nothing_left();
    // The second of two devices does not exist: the first comes home.
    let bundle = with_devices("true", json!({ "v0": {}, "zz9": {} }));
    let outcome = run_between(&bundle, HOST, "ip addr show v0");
    outcome.fails_with("zz9");
    assert!(outcome.stdout.contains("198.51.100.7/24"), "{outcome:?}");
    bundle.assert_nothing_left();
}

#[test]
fn impossible_requests_are_refused_by_name() {
    if !can() {
        return;
    }
    for devices in
        [json!({ "lo": {} }), json!({ "nosuch0": {} }), json!({ "v0": { "name": "a/b" } })]
    {
        let bundle = with_devices("true", devices.clone());
        let outcome = run_between(&bundle, HOST, "");
        assert!(outcome.code.is_some_and(|code| code != 0), "{devices}: {outcome:?}");
        bundle.assert_nothing_left();
    }
    let mut bundle = with_devices("true", json!({ "v0": {} }));
    let namespaces = bundle.config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "network");
    run_between(&bundle, HOST, "").fails_with("NET namespace");
}
