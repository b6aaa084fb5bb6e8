use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use crate::bundle::Bundle;

/// Ids nobody uses on the host.
const BASE: u32 = 200_000;

fn in_user_namespace(script: &str) -> Bundle {
    let mut bundle = Bundle::new(script);
    let map = json!([{ "containerID": 0, "hostID": BASE, "size": 65_536 }]);
    let linux = &mut bundle.config["linux"];
    linux["uidMappings"] = map.clone();
    linux["gidMappings"] = map;
    linux["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
    // The mapped root must reach its root file system, and own it.
    std::fs::set_permissions(bundle.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let status = std::process::Command::new("chown")
        .args(["-hR", &format!("{BASE}:{BASE}")])
        .arg(bundle.rootfs())
        .status()
        .unwrap();
    assert!(status.success());
    bundle
}

#[test]
fn root_inside_is_somebody_else_outside() {
    let bundle =
        in_user_namespace("id -u; cat /proc/self/uid_map; head -c1 /dev/zero | wc -c; sleep 100");
    bundle.write_config();
    let out = bundle.path().join("out");
    let mut command = bundle.command(&["run", "--detach", &bundle.id]);
    let status = command.stdout(std::fs::File::create(&out).unwrap()).status().unwrap();
    assert!(status.success());
    crate::bundle::eventually(|| std::fs::read_to_string(&out).unwrap().lines().count() == 3);
    let text = std::fs::read_to_string(&out).unwrap();
    let words: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(words, ["0", "0", "200000", "65536", "1"]);
    let status = std::fs::read_to_string(format!("/proc/{}/status", bundle.pid())).unwrap();
    assert!(status.contains(&format!("Uid:\t{BASE}\t{BASE}")), "{status}");
    assert_eq!(bundle.exec("id -u; readlink /proc/self/ns/user").ok(), {
        let own = std::fs::read_link(format!("/proc/{}/ns/user", bundle.pid())).unwrap();
        format!("0\n{}\n", own.display())
    });
}

#[test]
fn what_is_mounted_below_a_tree_of_the_host_stays_inside() {
    let mut bundle = in_user_namespace("ls /tree/sub; grep -c ' /tree/sub ' /proc/self/mountinfo");
    let tree = bundle.path().join("tree");
    std::fs::create_dir_all(tree.join("sub")).unwrap();
    std::fs::write(tree.join("sub/of-the-host"), "").unwrap();
    bundle.mount("/tree", "bind", tree.to_str().unwrap(), &["rbind"]);
    bundle.mount("/tree/sub", "tmpfs", "tmpfs", &["size=1m"]);
    let look = format!("ls {}; wc -l </proc/self/mountinfo", tree.join("sub").display());
    let text = bundle.run_on_shared_mounts(&look, &look).ok();
    let lines: Vec<&str> = text.lines().collect();
    let [before, mounts, inside, after, mounts_after] = lines[..] else { panic!("{text}") };
    assert_eq!((before, inside, after), ("of-the-host", "1", "of-the-host"));
    assert_eq!(mounts, mounts_after, "the host's mounts changed");
}

#[test]
fn a_user_inside_is_mapped_and_the_oom_score_set() {
    let mut bundle = in_user_namespace("id -u; id -g; cat /proc/self/oom_score_adj");
    bundle.config["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
    bundle.config["process"]["oomScoreAdj"] = json!(100);
    assert_eq!(bundle.run().ok(), "1000\n1000\n100\n");
    bundle.assert_nothing_left();
}

#[test]
fn an_existing_user_namespace_can_be_joined() {
    let first = in_user_namespace("sleep 100");
    first.launch();
    let pid = first.pid();
    let mut second =
        in_user_namespace("id -u; readlink /proc/self/ns/user; readlink /proc/self/ns/net");
    let linux = &mut second.config["linux"];
    linux["namespaces"] = json!([
        { "type": "pid" }, { "type": "mount" }, { "type": "uts" },
        { "type": "user", "path": format!("/proc/{pid}/ns/user") },
        { "type": "network", "path": format!("/proc/{pid}/ns/net") },
        { "type": "ipc", "path": format!("/proc/{pid}/ns/ipc") },
    ]);
    let link = |kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    let text = second.run().ok();
    assert_eq!(text, format!("0\n{}\n{}\n", link("user").display(), link("net").display()));
    second.assert_nothing_left();
}

#[test]
fn existing_namespaces_of_every_kind_can_be_joined() {
    let first = Bundle::new("sleep 100");
    first.launch();
    let pid = first.pid();
    let kinds = [("pid", "pid"), ("network", "net"), ("ipc", "ipc"), ("uts", "uts")];
    let mut second =
        Bundle::new("for n in pid net ipc uts; do readlink /proc/self/ns/$n; done; sleep 100");
    second.config.as_object_mut().unwrap().remove("hostname");
    let mut namespaces: Vec<_> = kinds
        .iter()
        .map(|(kind, file)| json!({ "type": kind, "path": format!("/proc/{pid}/ns/{file}") }))
        .collect();
    namespaces.push(json!({ "type": "mount" }));
    second.config["linux"]["namespaces"] = namespaces.into();
    second.write_config();
    let out = second.path().join("out");
    let mut command = second.command(&["run", "--detach", &second.id]);
    assert!(command.stdout(std::fs::File::create(&out).unwrap()).status().unwrap().success());
    crate::bundle::eventually(|| std::fs::read_to_string(&out).unwrap().lines().count() == 4);
    let expected: String = kinds
        .iter()
        .map(|(_, file)| std::fs::read_link(format!("/proc/{pid}/ns/{file}")).unwrap())
        .map(|link| format!("{}\n", link.display()))
        .collect();
    assert_eq!(std::fs::read_to_string(&out).unwrap(), expected);
    second.verb(&["delete", "--force", &second.id]).ok();
    assert_eq!(first.status(), "running");
}
