//! The runtime as a plain user: no rights on the host, root in a user namespace.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::bundle::{Bundle, Outcome, finish, has_full_program};

/// Nobody's id on the host.
const USER: u32 = 54_321;

/// A bundle that a plain user owns, with that one user mapped to root.
fn bundle(script: &str) -> Option<Bundle> {
    if !has_full_program("setpriv") {
        return None;
    }
    let mut bundle = Bundle::new(script);
    std::fs::set_permissions(bundle.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = Command::new("chown");
    command.args(["-hR", &format!("{USER}:{USER}")]).arg(bundle.path());
    assert!(command.status().unwrap().success());
    let map = json!([{ "containerID": 0, "hostID": USER, "size": 1 }]);
    let linux = bundle.config["linux"].as_object_mut().unwrap();
    linux.insert("uidMappings".into(), map.clone());
    linux.insert("gidMappings".into(), map);
    linux.remove("cgroupsPath");
    linux["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
    Some(bundle)
}

/// Runs a verb as the plain user, whose runtime lies where it may reach it.
fn as_user(bundle: &Bundle, arguments: &[&str]) -> Outcome {
    bundle.write_config();
    let run = bundle.command(arguments);
    let copy = bundle.path().join("runtime");
    if !copy.exists() {
        std::fs::copy(run.get_program(), &copy).unwrap();
        std::fs::set_permissions(&copy, PermissionsExt::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new("setpriv");
    let (uid, gid) = (format!("--reuid={USER}"), format!("--regid={USER}"));
    command.args([&uid, &gid, "--clear-groups", "--inh-caps=-all"]).arg(&copy);
    command.args(run.get_args()).current_dir(bundle.path());
    finish(&mut command, bundle.path())
}

/// True where plain users may not make user namespaces.
fn is_forbidden(outcome: &Outcome) -> bool {
    let forbidden = Path::new("/proc/sys/user/max_user_namespaces").exists()
        && std::fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap().trim() == "0";
    if forbidden {
        crate::bundle::moot!("{outcome:?}");
    }
    forbidden
}

#[test]
fn a_plain_user_is_root_inside_only() {
    let Some(bundle) = bundle("id -u; cat /proc/self/uid_map; echo out > /tmp/file; exit 3") else {
        return;
    };
    let outcome = as_user(&bundle, &["run", &bundle.id]);
    if is_forbidden(&outcome) {
        return;
    }
    let words: Vec<&str> = outcome.stdout.split_whitespace().collect();
    assert_eq!(words, ["0", "0", "54321", "1"], "{outcome:?}");
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
    let made = std::fs::metadata(bundle.rootfs().join("tmp/file")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), USER);
}

#[test]
fn every_verb_works_for_a_plain_user() {
    let Some(bundle) = bundle("sleep 100") else { return };
    let id = bundle.id.clone();
    let created = as_user(&bundle, &["create", &id]);
    if is_forbidden(&created) {
        return;
    }
    created.ok();
    as_user(&bundle, &["start", &id]).ok();
    assert!(as_user(&bundle, &["state", &id]).ok().contains("\"running\""));
    assert_eq!(as_user(&bundle, &["exec", &id, "id", "-u"]).ok(), "0\n");
    assert_eq!(as_user(&bundle, &["exec", &id, "sh", "-c", "exit 6"]).code, Some(6));
    assert_eq!(as_user(&bundle, &["list", "-q"]).ok().trim(), id);
    as_user(&bundle, &["kill", &id, "KILL"]).ok();
    crate::bundle::eventually(|| as_user(&bundle, &["state", &id]).ok().contains("\"stopped\""));
    as_user(&bundle, &["delete", &id]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn binds_of_a_plain_user_are_made_and_limits_it_cannot_have_are_refused() {
    let Some(mut bundle) = bundle("cat /data/file; touch /data/x 2>&1; true") else { return };
    let source = bundle.path().join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("file"), "mine\n").unwrap();
    chown(&source, Some(USER), Some(USER)).unwrap();
    bundle.mount("/data", "bind", source.to_str().unwrap(), &["rbind", "ro"]);
    let outcome = as_user(&bundle, &["run", &bundle.id]);
    if is_forbidden(&outcome) {
        return;
    }
    assert!(outcome.stdout.starts_with("mine\n"), "{outcome:?}");
    assert!(outcome.stdout.contains("Read-only file system"), "{outcome:?}");
    bundle.config["linux"]["resources"] = json!({ "pids": { "limit": 10 } });
    let refused = as_user(&bundle, &["run", &bundle.id]);
    assert!(refused.code.is_some_and(|code| code != 0), "{refused:?}");
    refused.fails_with("cgroup");
    bundle.assert_nothing_left();
}

#[test]
fn a_delegated_cgroup_carries_limits_for_a_plain_user() {
    // Only v2 has delegation that is safe.
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        crate::bundle::moot!("the cgroups are not those of v2");
        return;
    }
    let Some(mut bundle) = bundle("cat /proc/self/cgroup; cat /sys/fs/cgroup/pids.max; true")
    else {
        return;
    };
    let enabled = std::fs::read_to_string("/sys/fs/cgroup/cgroup.subtree_control").unwrap();
    if !enabled.contains("pids") {
        std::fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+pids").unwrap();
    }
    let slice = Path::new("/sys/fs/cgroup").join(format!("delegated-{}", bundle.id));
    let session = slice.join("session");
    std::fs::create_dir(&slice).unwrap();
    std::fs::write(slice.join("cgroup.subtree_control"), "+pids").unwrap();
    std::fs::create_dir(&session).unwrap();
    let own = |path: &Path| chown(path, Some(USER), Some(USER)).unwrap();
    for place in [&slice, &session] {
        own(place);
        for file in ["cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
            own(&place.join(file));
        }
    }
    let name = format!("/delegated-{}/{}", bundle.id, bundle.id);
    bundle.config["linux"]["cgroupsPath"] = json!(name);
    bundle.config["linux"]["resources"] = json!({ "pids": { "limit": 33 } });
    bundle.config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "cgroup" }));
    bundle.mount("/sys", "bind", "/sys", &["rbind", "ro"]);
    bundle.mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev"]);
    // The caller is in the delegated subtree, as a login session is.
    bundle.write_config();
    std::fs::copy(crate::bundle::runtime(), bundle.path().join("runtime")).unwrap();
    let script = format!(
        "echo $$ > {}/cgroup.procs; exec setpriv --reuid={USER} --regid={USER} --clear-groups {}/runtime --root {} run {}",
        session.display(),
        bundle.path().display(),
        bundle.state_root().display(),
        bundle.id
    );
    let mut command = Command::new("sh");
    let outcome = finish(command.args(["-c", &script]).current_dir(bundle.path()), bundle.path());
    let removed = std::fs::remove_dir(&session).and_then(|()| std::fs::remove_dir(&slice));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stdout.contains("33"), "{outcome:?}");
    removed.unwrap();
}
