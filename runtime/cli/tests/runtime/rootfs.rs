use std::os::unix::fs::{PermissionsExt, symlink};

use serde_json::json;

use crate::bundle::Bundle;

/// The line of the container's mountinfo whose mountpoint is `place`.
fn mount_line(text: &str, place: &str) -> Option<String> {
    text.lines().rev().find(|line| line.split(' ').nth(4) == Some(place)).map(str::to_owned)
}

#[test]
fn the_standard_devices_and_links_are_there() {
    let script = "cd /dev; stat -c '%n %F %t:%T %a' null zero full random urandom tty; \
                  for l in fd stdin stdout stderr ptmx; do readlink $l; done; cd /";
    let bundle = Bundle::new(script);
    let text = bundle.run().ok();
    for (name, numbers) in [
        ("null", "1:3"),
        ("zero", "1:5"),
        ("full", "1:7"),
        ("random", "1:8"),
        ("urandom", "1:9"),
        ("tty", "5:0"),
    ] {
        assert!(text.contains(&format!("{name} character special file {numbers} 666")), "{text}");
    }
    let links = "/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\n";
    assert!(text.contains(links), "{text}");
    assert!(text.trim_end().ends_with("pts/ptmx"), "{text}");
}

#[test]
fn configured_devices_are_made_with_mode_and_owner() {
    let mut bundle = Bundle::new("stat -c '%F %t:%T %a %u:%g' /dev/sub/mine /dev/pipe");
    bundle.config["linux"]["devices"] = json!([
        { "path": "/dev/sub/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 5, "gid": 6 },
        { "path": "/dev/pipe", "type": "p", "fileMode": 0o622 },
    ]);
    bundle.config["linux"]["devices"][1]["major"] = 0.into();
    bundle.config["linux"]["devices"][1]["minor"] = 0.into();
    let text = bundle.run().ok();
    assert_eq!(text, "character special file 1:3 640 5:6\nfifo 0:0 622 0:0\n");
}

#[test]
fn a_read_only_root_cannot_be_written() {
    let mut bundle = Bundle::new("touch /x 2>&1; touch /tmp/y && echo tmp");
    bundle.config["root"]["readonly"] = true.into();
    bundle.mount("/tmp", "tmpfs", "tmpfs", &["nosuid"]);
    let text = bundle.run().ok();
    assert!(text.contains("Read-only file system") && text.contains("tmp\n"), "{text}");
}

#[test]
fn masked_paths_are_empty_and_read_only_paths_reject_writes() {
    let mut bundle = Bundle::new(
        "head -c1 /secret | wc -c; ls /private | wc -l; touch /private/x 2>&1; \
         echo x 2>&1 > /fixed/file; cat /fixed/file; echo 1 2>&1 > /proc/sys/net/ipv4/ip_forward",
    );
    let rootfs = bundle.rootfs();
    std::fs::write(rootfs.join("secret"), "secret").unwrap();
    for directory in ["private", "private2", "fixed"] {
        std::fs::create_dir(rootfs.join(directory)).unwrap();
        std::fs::write(rootfs.join(directory).join("file"), "content").unwrap();
    }
    bundle.config["linux"]["maskedPaths"] = json!(["/secret", "/private", "/private2", "/no/such"]);
    bundle.config["linux"]["readonlyPaths"] = json!(["/fixed", "/proc/sys", "/no/such"]);
    let outcome = bundle.run();
    let text = format!("{}{}", outcome.stdout, outcome.stderr);
    assert!(outcome.stdout.starts_with("0\n0\n"), "{text}");
    assert!(outcome.stdout.contains("content"), "{text}");
    assert_eq!(text.matches("Read-only file system").count(), 3, "{text}");
}

#[test]
fn bind_mounts_carry_their_options() {
    let mut bundle =
        Bundle::new("cat /proc/self/mountinfo; touch /ro/x 2>&1; touch /rw/x; cat /file");
    let source = bundle.path().join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("file"), "from the host").unwrap();
    let text = source.to_str().unwrap().to_owned();
    bundle.mount("/ro", "bind", &text, &["rbind", "ro", "nosuid", "nodev", "noexec"]);
    bundle.mount("/rw", "bind", "source", &["bind", "rw"]);
    bundle.mount("/file", "none", &source.join("file").to_string_lossy(), &["bind", "ro"]);
    let text = bundle.run().ok();
    let line = mount_line(&text, "/ro").unwrap();
    let options: Vec<&str> = line.split(' ').nth(5).unwrap().split(',').collect();
    for option in ["ro", "nosuid", "nodev", "noexec"] {
        assert!(options.contains(&option), "{line}");
    }
    assert!(text.contains("/ro/x: Read-only file system"), "{text}");
    assert!(source.join("x").exists());
    assert!(text.ends_with("from the host"), "{text}");
}

#[test]
fn tmpfs_options_and_mode_are_applied() {
    let mut bundle = Bundle::new("stat -c %a /t /kept; grep -e ' /t ' /proc/self/mountinfo");
    let kept = bundle.rootfs().join("kept");
    std::fs::create_dir(&kept).unwrap();
    std::fs::set_permissions(&kept, PermissionsExt::from_mode(0o711)).unwrap();
    bundle.mount("/t", "tmpfs", "tmpfs", &["mode=700", "size=64k", "noexec", "strictatime"]);
    bundle.mount("/kept", "tmpfs", "tmpfs", &["size=64k"]);
    let text = bundle.run().ok();
    assert!(text.starts_with("700\n711\n"), "{text}");
    assert!(text.contains("size=64k") && text.contains("noexec"), "{text}");
}

#[test]
fn a_tmpfs_with_tmpcopyup_keeps_what_the_image_has() {
    let mut bundle = Bundle::new("cat /data/dir/file; readlink /data/link; echo more > /data/new");
    let data = bundle.rootfs().join("data");
    std::fs::create_dir_all(data.join("dir")).unwrap();
    std::fs::write(data.join("dir/file"), "image\n").unwrap();
    symlink("dir/file", data.join("link")).unwrap();
    bundle.mount("/data", "tmpfs", "tmpfs", &["tmpcopyup"]);
    assert_eq!(bundle.run().ok(), "image\ndir/file\n");
    assert!(!data.join("new").exists());
}

#[test]
fn propagation_is_private_to_the_container_unless_asked() {
    let script = "grep -e ' / / ' -e ' /shared ' -e ' /plain ' /proc/self/mountinfo; true";
    let mut bundle = Bundle::new(script);
    bundle.mount("/shared", "tmpfs", "tmpfs", &["rshared"]);
    bundle.mount("/plain", "tmpfs", "tmpfs", &[]);
    let text = bundle.run().ok();
    assert!(mount_line(&text, "/shared").unwrap().contains("shared:"), "{text}");
    assert!(!mount_line(&text, "/plain").unwrap().contains("shared:"), "{text}");
}

#[test]
fn the_mounts_of_the_host_are_neither_visible_nor_changed() {
    let before = std::fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count();
    let bundle = Bundle::new("cat /proc/self/mountinfo | wc -l; ls /");
    let text = bundle.run().ok();
    let count: usize = text.lines().next().unwrap().parse().unwrap();
    assert!(count < 12, "{text}");
    // Other tests mount in namespaces of their own, never here.
    assert_eq!(std::fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count(), before);
}

#[test]
fn no_pivot_works_too() {
    let bundle = Bundle::new("ls /; cat /proc/self/mountinfo | wc -l");
    bundle.write_config();
    let text = bundle.verb(&["run", "--no-pivot", &bundle.id]).ok();
    assert!(text.contains("busybox") || text.contains("bin"), "{text}");
}

#[test]
fn dangling_links_of_the_image_are_completed_inside_the_root() {
    let mut bundle = Bundle::new("cat /var/run/secrets/here");
    let rootfs = bundle.rootfs();
    std::fs::create_dir(rootfs.join("var")).unwrap();
    symlink("/run", rootfs.join("var/run")).unwrap();
    let source = bundle.path().join("secrets");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("here"), "found").unwrap();
    bundle.mount("/var/run/secrets", "bind", source.to_str().unwrap(), &["rbind", "ro"]);
    assert_eq!(bundle.run().ok(), "found");
    assert!(rootfs.join("run/secrets").is_dir());
}

#[test]
fn the_cgroup_mount_shows_the_container_its_own_cgroup() {
    for namespaced in [false, true] {
        let mut bundle = Bundle::new(
            "cat /proc/self/cgroup; echo --; ls /sys/fs/cgroup; touch /sys/fs/cgroup/x 2>&1; true",
        );
        bundle.mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]);
        bundle.mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        );
        if namespaced {
            let list = bundle.config["linux"]["namespaces"].as_array_mut().unwrap();
            list.push(json!({ "type": "cgroup" }));
        }
        let text = bundle.run().ok();
        let (own, view) = text.split_once("--\n").unwrap_or_else(|| panic!("{text:?}"));
        assert!(view.contains("pids") || view.contains("cgroup.procs"), "{text}");
        let refused = view.contains("Read-only file system") || view.contains("Permission denied");
        assert!(refused, "{text}");
        if namespaced {
            assert!(own.lines().all(|line| line.ends_with(":/") || line.contains("/..")), "{own}");
        } else {
            assert!(own.contains("/pinion-test-"), "{own}");
        }
    }
}
