//! Attacks by images, configurations and containers (rows A, B, C and D of the threat list).

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::bundle::{Bundle, eventually, is_pinion, is_runc_since, runtime};

/// A directory of the host that must not change.
struct Sentinel {
    directory: PathBuf,
}

impl Sentinel {
    fn new(bundle: &Bundle) -> Self {
        let directory = bundle.path().join("sentinel");
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join("ptmx"), "precious").unwrap();
        Self { directory }
    }

    #[track_caller]
    fn assert_untouched(&self) {
        let names: Vec<_> =
            std::fs::read_dir(&self.directory).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(names, ["ptmx"]);
        assert_eq!(std::fs::read(self.directory.join("ptmx")).unwrap(), b"precious");
    }
}

#[test]
fn an_image_whose_dev_is_a_link_to_the_host_changes_nothing_there() {
    // runc 1.1 does create its links there (CVE-2026-41579).
    if !is_pinion() {
        return;
    }
    for with_tmpfs in [false, true] {
        for relative in [false, true] {
            let mut bundle = Bundle::new("true");
            let sentinel = Sentinel::new(&bundle);
            let target = if relative {
                Path::new("../../../../../../../../")
                    .join(sentinel.directory.strip_prefix("/").unwrap())
            } else {
                sentinel.directory.clone()
            };
            std::fs::remove_dir(bundle.rootfs().join("dev")).unwrap();
            symlink(target, bundle.rootfs().join("dev")).unwrap();
            if !with_tmpfs {
                let mounts = bundle.config["mounts"].as_array_mut().unwrap();
                mounts.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
            }
            let _ = bundle.run();
            sentinel.assert_untouched();
            bundle.assert_nothing_left();
        }
    }
}

#[test]
fn proc_and_sys_must_be_ordinary_directories() {
    for place in ["proc", "sys"] {
        let mut bundle = Bundle::new("true");
        bundle.mount("/sys", "sysfs", "sysfs", &["ro"]);
        std::fs::remove_dir(bundle.rootfs().join(place)).unwrap();
        std::fs::create_dir(bundle.rootfs().join("elsewhere")).unwrap();
        symlink("elsewhere", bundle.rootfs().join(place)).unwrap();
        bundle.write_config();
        bundle.verb(&["create", &bundle.id]).fails_with("must be mounted on ordinary directory");
        bundle.assert_nothing_left();
    }
}

#[test]
fn mountpoints_are_not_created_outside_the_root() {
    let mut bundle = Bundle::new("true");
    let sentinel = Sentinel::new(&bundle);
    let rootfs = bundle.rootfs();
    symlink(&sentinel.directory, rootfs.join("absolute")).unwrap();
    symlink("../../../../../../../..", rootfs.join("up")).unwrap();
    let below = sentinel.directory.strip_prefix("/").unwrap().to_str().unwrap().to_owned();
    bundle.mount("/absolute/made", "tmpfs", "tmpfs", &[]);
    bundle.mount(&format!("/up/{below}/made"), "tmpfs", "tmpfs", &[]);
    bundle.mount("/absolute/file", "bind", "/etc/passwd", &["bind", "ro"]);
    bundle.mount("/../../../../escape", "tmpfs", "tmpfs", &[]);
    let outcome = bundle.run();
    sentinel.assert_untouched();
    assert!(!Path::new("/escape").exists());
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
}

#[test]
fn a_working_directory_through_a_descriptor_cannot_leave_the_container() {
    let leaked: Vec<OwnedFd> = (0..16).map(|_| inheritable(Path::new("/"))).collect();
    for number in 3..40 {
        let mut bundle = Bundle::new("pwd; ls; ls ..");
        bundle.config["process"]["cwd"] = json!(format!("/proc/self/fd/{number}"));
        let outcome = bundle.run();
        assert_ne!(outcome.code, Some(0), "{number}: {outcome:?}");
    }
    drop(leaked);
}

#[test]
fn no_descriptor_of_the_caller_or_the_runtime_reaches_the_program() {
    // runc 1.1 leaks one.
    if !is_pinion() {
        return;
    }
    let leaked: Vec<OwnedFd> = (0..32).map(|_| inheritable(Path::new("/etc"))).collect();
    // The inner shell lists the outer one, which has no pipe of its own open meanwhile.
    let listing = "sh -c \"echo \\$(ls /proc/$$/fd)\"";
    let bundle = Bundle::new(&format!("{listing}; sleep 100"));
    bundle.write_config();
    let out = bundle.path().join("out");
    let mut command = bundle.command(&["run", "--detach", &bundle.id]);
    let status = command.stdout(std::fs::File::create(&out).unwrap()).status().unwrap();
    assert!(status.success());
    eventually(|| !std::fs::read_to_string(&out).unwrap().is_empty());
    assert_eq!(std::fs::read_to_string(&out).unwrap().trim(), "0 1 2");
    let text = bundle.exec(&format!("{listing}; true")).ok();
    assert_eq!(text.trim(), "0 1 2");
    drop(leaked);
}

#[test]
fn promised_descriptors_are_passed_on_and_missing_ones_refused() {
    let bundle = Bundle::new("cat <&3; ls /proc/self/fd");
    bundle.write_config();
    let file = bundle.path().join("passed");
    std::fs::write(&file, "passed\n").unwrap();
    let shell = format!("exec 3<{}; exec \"$0\" \"$@\"", file.display());
    let mut command = std::process::Command::new("/bin/sh");
    command.args(["-c", &shell]).arg(runtime()).arg("--root").arg(bundle.state_root());
    command.args(["run", "--preserve-fds", "1", &bundle.id]).current_dir(bundle.path());
    let outcome = crate::bundle::finish(&mut command, bundle.path());
    let (text, count) = outcome.stdout.trim().split_once('\n').unwrap();
    assert_eq!(text, "passed", "{outcome:?}");
    // runc 1.1 leaks two more.
    assert!(count == "0\n1\n2\n3\n4" || !is_pinion(), "{outcome:?}");
    let refused = bundle.verb(&["run", "--preserve-fds", "900", &bundle.id]);
    assert_ne!(refused.code, Some(0));
    bundle.assert_nothing_left();
}

#[test]
fn listen_fds_are_range_checked() {
    if !is_pinion() {
        return;
    }
    for value in ["-1", "0", "2147483647", "x"] {
        let bundle = Bundle::new("echo fds=$LISTEN_FDS; ls /proc/self/fd");
        bundle.write_config();
        let mut command = bundle.command(&["run", &bundle.id]);
        command.env("LISTEN_FDS", value);
        let outcome = crate::bundle::finish(&mut command, bundle.path());
        assert!(
            outcome.code != Some(0) || outcome.stdout == "fds=\n0\n1\n2\n3\n",
            "{value}: {outcome:?}"
        );
    }
}

#[test]
fn the_runtimes_own_executable_cannot_be_written_from_the_container() {
    let bundle = Bundle::new("");
    let copy = bundle.path().join("pinion-copy");
    std::fs::copy(runtime(), &copy).unwrap();
    let before = std::fs::read(&copy).unwrap();
    let mut bundle = bundle;
    bundle.config["process"]["args"] = json!(["/entry"]);
    bundle.config["process"]["capabilities"] =
        crate::bundle::capabilities(&["CAP_DAC_OVERRIDE", "CAP_SYS_PTRACE", "CAP_KILL"]);
    let entry = bundle.rootfs().join("entry");
    std::fs::write(&entry, "#!/proc/self/exe\n").unwrap();
    set_executable(&entry);
    bundle.write_config();
    // The trick of the attack: what runs now is the runtime itself, inside the container.
    let mut command = std::process::Command::new(&copy);
    command.arg("--root").arg(bundle.state_root()).args(["run", &bundle.id]);
    command.current_dir(bundle.path());
    let _ = crate::bundle::finish(&mut command, bundle.path());
    assert_eq!(std::fs::read(&copy).unwrap(), before);
}

#[test]
fn a_process_entering_the_container_cannot_be_used_to_write_the_executable() {
    if !is_pinion() {
        return;
    }
    let mut bundle = Bundle::new(
        "while true; do for p in /proc/[0-9]*; do \
           case \"$(readlink $p/exe)\" in *pinion*) echo x >> $p/exe && echo WROTE >> /tmp/log;; esac; \
         done 2>/dev/null; done",
    );
    bundle.config["process"]["capabilities"] = crate::bundle::capabilities(&[
        "CAP_DAC_OVERRIDE",
        "CAP_SYS_PTRACE",
        "CAP_DAC_READ_SEARCH",
        "CAP_KILL",
    ]);
    let copy = bundle.path().join("pinion-copy");
    std::fs::copy(runtime(), &copy).unwrap();
    let before = std::fs::read(&copy).unwrap();
    bundle.launch();
    for _ in 0..40 {
        let mut command = std::process::Command::new(&copy);
        command.arg("--root").arg(bundle.state_root()).args(["exec", &bundle.id, "/bin/true"]);
        crate::bundle::finish(&mut command, bundle.path()).ok();
    }
    assert!(!bundle.rootfs().join("tmp/log").exists());
    assert_eq!(std::fs::read(&copy).unwrap(), before);
}

#[test]
fn a_bent_null_device_does_not_serve_as_a_mask() {
    let mut bundle = Bundle::new("cat /secret");
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
    std::fs::write(bundle.rootfs().join("secret"), "secret").unwrap();
    std::fs::write(bundle.rootfs().join("other"), "other").unwrap();
    symlink("/other", bundle.rootfs().join("dev/null")).unwrap();
    bundle.config["linux"]["maskedPaths"] = json!(["/secret"]);
    let outcome = bundle.run();
    assert!(outcome.code != Some(0) || !is_pinion(), "{outcome:?}");
    assert!(!outcome.stdout.contains("secret") && !outcome.stdout.contains("other"));
}

#[test]
fn a_faked_device_of_the_image_is_refused() {
    if !is_pinion() {
        return;
    }
    let mut bundle = Bundle::new("true");
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
    std::fs::write(bundle.rootfs().join("dev/zero"), "fake").unwrap();
    bundle.write_config();
    bundle.verb(&["create", &bundle.id]).fails_with("something else is in its place");
    bundle.assert_nothing_left();
}

#[test]
fn devices_outside_dev_are_refused() {
    if !is_pinion() {
        return;
    }
    for path in ["/dev/../etc/x", "/devil", "/dev", "relative"] {
        let mut bundle = Bundle::new("true");
        bundle.config["linux"]["devices"] =
            json!([{ "path": path, "type": "c", "major": 1, "minor": 3 }]);
        bundle.write_config();
        bundle.verb(&["create", &bundle.id]).fails_with("must be below /dev");
        bundle.assert_nothing_left();
    }
}

#[test]
fn a_recycled_process_id_is_not_mistaken_for_the_container() {
    if !is_pinion() {
        return;
    }
    let bundle = Bundle::new("true");
    bundle.launch();
    bundle.wait_for("stopped");
    let path = bundle.state_root().join(&bundle.id).join("state.json");
    let mut record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    // Start times have a resolution of 10 ms.
    std::thread::sleep(std::time::Duration::from_millis(30));
    let mut stranger = std::process::Command::new("sleep").arg("100").spawn().unwrap();
    record["init"]["pid"] = stranger.id().into();
    std::fs::write(&path, record.to_string()).unwrap();
    assert_eq!(bundle.status(), "stopped");
    bundle.verb(&["kill", &bundle.id, "KILL"]).fails_with("container not running");
    bundle.verb(&["delete", "--force", &bundle.id]).ok();
    assert!(stranger.try_wait().unwrap().is_none(), "the stranger was killed");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[test]
fn a_runtime_killed_in_the_middle_leaves_what_delete_can_remove() {
    if !is_pinion() {
        return;
    }
    for delay in [1, 2, 4, 6, 8, 12, 16, 24] {
        let bundle = Bundle::new("sleep 100");
        bundle.write_config();
        let mut create = bundle.command(&["create", &bundle.id]).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(delay));
        let _ = create.kill();
        create.wait().unwrap();
        bundle.verb(&["delete", "--force", &bundle.id]).ok();
        bundle.assert_nothing_left();
    }
}

/// Exchanges two names below `directory` for as long as the value lives: what a container
/// that shares a volume can do while another one is being made.
struct Swapping {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Swapping {
    fn start(one: PathBuf, other: PathBuf) -> Self {
        use std::sync::atomic::Ordering;
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let asked = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut swaps = 0;
            while !asked.load(Ordering::Relaxed) {
                let (cwd, flags) = (rustix::fs::CWD, rustix::fs::RenameFlags::EXCHANGE);
                swaps +=
                    u64::from(rustix::fs::renameat_with(cwd, &one, cwd, &other, flags).is_ok());
            }
            swaps
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Swapping {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let swaps = self.thread.take().map(|thread| thread.join());
        assert!(matches!(swaps, Some(Ok(1..))), "nothing was swapped: {swaps:?}");
    }
}

/// CVE-2021-30465 and CVE-2024-45310.
#[test]
fn a_mountpoint_swapped_for_a_link_leads_nowhere() {
    let mut bundle = Bundle::new("true");
    let sentinel = Sentinel::new(&bundle);
    let shared = bundle.rootfs().join("shared");
    std::fs::create_dir_all(shared.join("place")).unwrap();
    symlink(&sentinel.directory, shared.join("link")).unwrap();
    for number in 0..4 {
        bundle.mount(&format!("/shared/place/directory{number}"), "tmpfs", "tmpfs", &[]);
        bundle.mount(&format!("/shared/place/file{number}"), "bind", "/etc/hostname", &["bind"]);
    }
    let _swapping = Swapping::start(shared.join("place"), shared.join("link"));
    for _ in 0..40 {
        // Made or refused: both are fine.
        let _ = bundle.run();
        let _ = bundle.verb(&["delete", "--force", &bundle.id]);
        sentinel.assert_untouched();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&*bundle.path().to_string_lossy()), "{mounts}");
    }
}

/// A read-only path is bound onto itself: never another directory, and never writable.
#[test]
fn a_read_only_path_swapped_for_a_link_is_never_the_other_directory() {
    if !is_pinion() {
        return;
    }
    let mut bundle = Bundle::new("echo x >/shared/place/new && echo WROTE; cat /shared/place/ptmx");
    let sentinel = Sentinel::new(&bundle);
    let shared = bundle.rootfs().join("shared");
    std::fs::create_dir_all(shared.join("place")).unwrap();
    symlink(&sentinel.directory, shared.join("link")).unwrap();
    bundle.config["linux"]["readonlyPaths"] = json!(["/shared/place"]);
    let _swapping = Swapping::start(shared.join("place"), shared.join("link"));
    for _ in 0..40 {
        let outcome = bundle.run();
        let _ = bundle.verb(&["delete", "--force", &bundle.id]);
        sentinel.assert_untouched();
        assert!(!outcome.stdout.contains("precious"), "{outcome:?}");
    }
}

/// CVE-2025-31133, second form: without a null device nothing could be masked.
#[test]
fn a_missing_null_device_is_no_reason_to_leave_a_path_unmasked() {
    let mut bundle = Bundle::new("cat /secret");
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
    std::fs::write(bundle.rootfs().join("secret"), "hidden").unwrap();
    bundle.config["linux"]["maskedPaths"] = json!(["/secret"]);
    let (null, away) = (bundle.rootfs().join("dev/null"), bundle.rootfs().join("dev/other"));
    symlink("/secret", &away).unwrap();
    std::fs::write(&null, "").unwrap();
    let _swapping = Swapping::start(null, away);
    for _ in 0..20 {
        let outcome = bundle.run();
        let _ = bundle.verb(&["delete", "--force", &bundle.id]);
        assert!(!outcome.stdout.contains("hidden"), "{outcome:?}");
    }
}

/// CVE-2025-52565: the terminal is bound over nothing but the container's own console.
#[test]
fn a_console_of_the_image_that_leads_elsewhere_is_not_bound_over() {
    if !is_pinion() {
        return;
    }
    for fifo in [false, true] {
        let mut bundle = Bundle::new("true");
        let sentinel = Sentinel::new(&bundle);
        let mounts = bundle.config["mounts"].as_array_mut().unwrap();
        mounts.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
        bundle.config["process"]["terminal"] = json!(true);
        let console = bundle.rootfs().join("dev/console");
        if fifo {
            let mode = rustix::fs::Mode::from_raw_mode(0o600);
            rustix::fs::mknodat(rustix::fs::CWD, &console, rustix::fs::FileType::Fifo, mode, 0)
                .unwrap();
        } else {
            symlink(sentinel.directory.join("ptmx"), &console).unwrap();
        }
        let outcome = bundle.run();
        assert_ne!(outcome.code, Some(0), "{outcome:?}");
        assert!(outcome.stderr.contains("/dev/console"), "{outcome:?}");
        sentinel.assert_untouched();
        bundle.assert_nothing_left();
    }
}

/// CVE-2016-9962: what enters the container shows nothing of the host, not even to those
/// inside that may trace whatever they see (`CAP_SYS_PTRACE` outside a user namespace).
#[test]
fn a_process_entering_the_container_shows_no_descriptor_of_the_host() {
    let mut bundle = Bundle::new(
        "while true; do for p in /proc/[0-9]*; do for f in $p/cwd $p/root $p/fd/*; do \
           ls $f/sentinel/ptmx 2>/dev/null && echo $f >>/tmp/log; done; done; done",
    );
    let _sentinel = Sentinel::new(&bundle);
    bundle.config["process"]["capabilities"] =
        crate::bundle::capabilities(&["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH"]);
    let _leaked = inheritable(bundle.path());
    bundle.launch();
    for _ in 0..40 {
        // Its working directory is the bundle, which no path in the container leads to.
        bundle.verb(&["exec", &bundle.id, "/bin/true"]).ok();
    }
    let log = bundle.rootfs().join("tmp/log");
    assert!(!log.exists(), "{:?}", std::fs::read_to_string(log));
}

/// A hook of the container's mount namespace that covers `inside`, a path below the root, by a
/// file of the test.
fn covering_hook(bundle: &Bundle, inside: &str) -> std::path::PathBuf {
    let fake = bundle.path().join("fake");
    std::fs::write(&fake, "untouched\n").unwrap();
    let script = bundle.path().join("cover.sh");
    let target = bundle.rootfs().join(inside);
    let text = format!("#!/bin/sh\nexec mount --bind {} {}\n", fake.display(), target.display());
    std::fs::write(&script, text).unwrap();
    set_executable(&script);
    script
}

#[test]
fn a_kernel_parameter_is_not_written_to_what_was_mounted_over_it() {
    // CVE-2025-52881: runc since 1.2.8 and 1.3.3; the ones before write to the file.
    if !is_runc_since(4) {
        return;
    }
    let mut bundle = Bundle::new("true");
    let hook = covering_hook(&bundle, "proc/sys/net/ipv4/ip_forward");
    bundle.config["linux"]["sysctl"] = json!({ "net.ipv4.ip_forward": "1" });
    bundle.config["hooks"] = json!({ "createContainer": [
        { "path": hook, "args": ["cover.sh"], "env": ["PATH=/usr/bin:/bin"] } ] });
    let outcome = bundle.run();
    assert_ne!(outcome.code, Some(0), "{outcome:?}");
    let text = std::fs::read_to_string(bundle.path().join("fake")).unwrap();
    assert_eq!(text, "untouched\n", "{outcome:?}");
    bundle.assert_nothing_left();
}

#[test]
fn a_volume_over_proc_does_not_hide_the_files_labels_are_written_to() {
    // CVE-2019-16884.
    let mut bundle = Bundle::new("true");
    let source = bundle.path().join("volume");
    std::fs::create_dir_all(source.join("self/attr")).unwrap();
    std::fs::write(source.join("self/attr/exec"), "").unwrap();
    bundle.mount("/proc", "bind", source.to_str().unwrap(), &["rbind"]);
    let outcome = bundle.run();
    assert_ne!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(std::fs::read_to_string(source.join("self/attr/exec")).unwrap(), "");
    bundle.assert_nothing_left();
}

fn set_executable(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
}

/// A descriptor that commands started from here inherit.
fn inheritable(path: &Path) -> OwnedFd {
    let file = std::fs::File::open(path).unwrap();
    let copy = rustix::io::dup(&file).unwrap();
    assert!(copy.as_raw_fd() > 2);
    copy
}
