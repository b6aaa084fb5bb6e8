//! Attributes of whole trees, id mappings and propagation, read from the kernel.

use std::os::unix::fs::{MetadataExt, chown};

use serde_json::{Value, json};

use crate::bundle::{Bundle, is_pinion, is_runc_since};

/// A host directory with a mount below it, in a mount namespace that ends with the test's
/// command: the runtime itself is started inside.
fn with_tree(bundle: &Bundle) -> std::path::PathBuf {
    let source = bundle.path().join("source");
    std::fs::create_dir_all(source.join("sub")).unwrap();
    source
}

/// Runs the container where a tmpfs is mounted at `source/sub`.
fn run_with_submount(bundle: &Bundle) -> crate::bundle::Outcome {
    bundle.write_config();
    let run = bundle.command(&["run", &bundle.id]);
    let mut words = vec![run.get_program().to_string_lossy().into_owned()];
    words.extend(run.get_args().map(|word| word.to_string_lossy().into_owned()));
    let script = format!("mount -t tmpfs tmpfs source/sub && exec {}", words.join(" "));
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    crate::bundle::finish(command.current_dir(bundle.path()), bundle.path())
}

/// The options of the mount at `path` in a mountinfo table.
fn options_of(table: &str, path: &str) -> String {
    let line = table.lines().rfind(|line| line.split(' ').nth(4) == Some(path));
    line.unwrap_or_else(|| panic!("no {path} in {table}")).split(' ').nth(5).unwrap().to_owned()
}

#[test]
fn recursive_attributes_cover_what_is_mounted_below() {
    if !is_runc_since(2) {
        return;
    }
    for (option, flag) in [
        ("rro", "ro"),
        ("rnosuid", "nosuid"),
        ("rnodev", "nodev"),
        ("rnoexec", "noexec"),
        ("rnoatime", "noatime"),
        ("rnodiratime", "nodiratime"),
        ("rnosymfollow", "nosymfollow"),
    ] {
        let mut bundle = Bundle::new("cat /proc/self/mountinfo");
        let source = with_tree(&bundle);
        bundle.mount("/data", "bind", source.to_str().unwrap(), &["rbind", option]);
        let table = run_with_submount(&bundle).ok();
        for path in ["/data", "/data/sub"] {
            let options = options_of(&table, path);
            assert!(options.split(',').any(|has| has == flag), "{option}: {path}: {options}");
        }
    }
}

#[test]
fn plain_attributes_stop_at_the_mount_itself() {
    let mut bundle = Bundle::new("touch /data/top 2>&1; touch /data/sub/deep && echo written");
    let source = with_tree(&bundle);
    bundle.mount("/data", "bind", source.to_str().unwrap(), &["rbind", "ro"]);
    let text = run_with_submount(&bundle).ok();
    assert_eq!(text.matches("Read-only file system").count(), 1, "{text}");
    assert!(text.contains("written"), "{text}");
}

#[test]
fn a_recursive_attribute_can_be_taken_away() {
    if !is_runc_since(2) {
        return;
    }
    let mut bundle = Bundle::new("cat /proc/self/mountinfo");
    let source = with_tree(&bundle);
    bundle.mount(
        "/data",
        "bind",
        source.to_str().unwrap(),
        &["rbind", "rro", "rrw", "rnoexec", "rexec"],
    );
    let table = run_with_submount(&bundle).ok();
    for path in ["/data", "/data/sub"] {
        let options = options_of(&table, path);
        assert!(options.starts_with("rw") && !options.contains("noexec"), "{path}: {options}");
    }
}

fn map(container: u32, host: u32, size: u32) -> Value {
    json!([{ "containerID": container, "hostID": host, "size": size }])
}

fn bind(bundle: &mut Bundle, source: &std::path::Path, word: &str, mappings: Option<&Value>) {
    let mut mount = json!({
        "destination": "/data", "type": "bind", "source": source.to_str().unwrap(),
        "options": ["rbind", word],
    });
    if let Some(mappings) = mappings {
        mount["uidMappings"] = mappings.clone();
        mount["gidMappings"] = mappings.clone();
    }
    bundle.config["mounts"].as_array_mut().unwrap().push(mount);
}

/// True when the file system of temporary directories cannot be id-mapped.
fn is_impossible(outcome: &crate::bundle::Outcome) -> bool {
    let impossible = outcome.stderr.contains("MOUNT_ATTR_IDMAP") && is_pinion();
    if impossible {
        crate::bundle::moot!("the file system has no id-mapped mounts");
    }
    impossible
}

#[test]
fn an_id_mapped_mount_shows_other_owners() {
    if !is_runc_since(2) {
        return;
    }
    let mut bundle = Bundle::new("stat -c %u:%g /data/file /data/sub/deep; touch /data/new");
    let source = with_tree(&bundle);
    for file in ["file", "sub/deep"] {
        std::fs::write(source.join(file), "").unwrap();
        chown(source.join(file), Some(0), Some(0)).unwrap();
    }
    bind(&mut bundle, &source, "idmap", Some(&map(0, 5000, 1000)));
    let outcome = bundle.run();
    if is_impossible(&outcome) {
        return;
    }
    assert_eq!(outcome.stdout, "5000:5000\n5000:5000\n", "{outcome:?}");
    let owner = std::fs::metadata(source.join("new"));
    assert!(owner.is_err() || owner.unwrap().uid() < 5000);
}

#[test]
fn the_mapping_covers_mounts_below_only_if_asked() {
    if !is_runc_since(2) {
        return;
    }
    for (word, below) in [("idmap", "0:0"), ("ridmap", "5000:5000")] {
        let mut bundle = Bundle::new("stat -c %u:%g /data /data/sub");
        let source = with_tree(&bundle);
        chown(&source, Some(0), Some(0)).unwrap();
        bind(&mut bundle, &source, word, Some(&map(0, 5000, 1000)));
        let outcome = run_with_submount(&bundle);
        if is_impossible(&outcome) {
            return;
        }
        assert_eq!(outcome.stdout, format!("5000:5000\n{below}\n"), "{word}: {outcome:?}");
    }
}

#[test]
fn without_mappings_of_its_own_a_mount_takes_those_of_the_user_namespace() {
    if !is_runc_since(2) {
        return;
    }
    const BASE: u32 = 300_000;
    let mut bundle = Bundle::new("stat -c %u:%g /data; touch /data/new; id -u");
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(bundle.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = std::process::Command::new("chown");
    command.args(["-hR", &format!("{BASE}:{BASE}")]).arg(bundle.rootfs());
    assert!(command.status().unwrap().success());
    let source = with_tree(&bundle);
    chown(&source, Some(0), Some(0)).unwrap();
    let linux = &mut bundle.config["linux"];
    linux["uidMappings"] = map(0, BASE, 65_536);
    linux["gidMappings"] = map(0, BASE, 65_536);
    linux["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
    bind(&mut bundle, &source, "idmap", None);
    let outcome = bundle.run();
    if is_impossible(&outcome) {
        return;
    }
    assert_eq!(outcome.stdout, "0:0\n0\n", "{outcome:?}");
    // Root inside has made a file of root outside, in this mount alone.
    assert_eq!(std::fs::metadata(source.join("new")).unwrap().uid(), 0);
}

#[test]
fn a_mapping_for_a_new_file_system_is_refused() {
    if !is_runc_since(2) {
        return;
    }
    let mut bundle = Bundle::new("true");
    bundle.mount("/data", "tmpfs", "tmpfs", &["idmap"]);
    bundle.run().fails_with("id");
    bundle.assert_nothing_left();
}

fn check_root_propagation(run: impl Fn(&Bundle) -> crate::bundle::Outcome) {
    for (asked, word) in
        [("shared", Some("shared:")), ("private", None), ("unbindable", Some("unbindable"))]
    {
        let mut bundle = Bundle::new("grep ' / / \\|/rootfs / ' /proc/self/mountinfo");
        bundle.config["linux"]["rootfsPropagation"] = json!(asked);
        let text = run(&bundle).ok();
        let fields = text.lines().last().unwrap().split(" - ").next().unwrap().to_owned();
        match word {
            Some(word) => assert!(fields.contains(word), "{asked}: {text}"),
            None => assert!(!fields.contains("shared:") && !fields.contains("master:"), "{text}"),
        }
    }
}

#[test]
fn the_root_has_the_propagation_that_is_asked_for() {
    check_root_propagation(Bundle::run);
    let mut bundle = Bundle::new("true");
    bundle.config["linux"]["rootfsPropagation"] = json!("sideways");
    bundle.run().fails_with("ropagation");
}

#[test]
fn the_root_has_its_propagation_where_the_mounts_of_the_host_are_shared() {
    // runc 1.1 leaves a root that is to be shared private there
    if is_pinion() {
        check_root_propagation(|bundle| bundle.run_on_shared_mounts("", ""));
    }
}

#[test]
fn a_read_only_dev_and_tmpfs_still_get_what_belongs_in_them() {
    let mut bundle = Bundle::new(
        "test -c /dev/null && test -c /dev/pts/ptmx && cat /t/sub/file; touch /dev/x; touch /t/x; true",
    );
    for mount in bundle.config["mounts"].as_array_mut().unwrap() {
        if mount["destination"] == "/dev" {
            mount["options"].as_array_mut().unwrap().push("ro".into());
        }
    }
    let source = bundle.path().join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("file"), "below\n").unwrap();
    bundle.mount("/t", "tmpfs", "tmpfs", &["ro"]);
    bundle.mount("/t/sub", "bind", source.to_str().unwrap(), &["bind"]);
    let outcome = bundle.run();
    assert_eq!(outcome.stdout, "below\n", "{outcome:?}");
    assert_eq!(outcome.stderr.matches("Read-only file system").count(), 2, "{outcome:?}");
}

#[test]
fn a_mountpoint_named_by_its_path_on_the_host_is_the_one_inside() {
    let mut bundle = Bundle::new("cat /final/file");
    let source = bundle.path().join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("file"), "there\n").unwrap();
    let destination = bundle.rootfs().join("final");
    bundle.mount(destination.to_str().unwrap(), "bind", source.to_str().unwrap(), &["bind"]);
    assert_eq!(bundle.run().ok(), "there\n");
}

#[test]
fn a_path_masked_twice_is_covered_once() {
    if !is_runc_since(4) {
        return;
    }
    let mut bundle = Bundle::new("grep -c ' /tmp/hidden ' /proc/self/mountinfo");
    std::fs::create_dir(bundle.rootfs().join("tmp/hidden")).unwrap();
    bundle.config["linux"]["maskedPaths"] = json!(["/tmp/hidden", "/tmp/hidden", "/tmp/hidden/"]);
    assert_eq!(bundle.run().ok(), "1\n");
}
