//! `checkpoint` and `restore` with a real CRIU: what counted goes on counting.

use std::path::PathBuf;
use std::process::Stdio;

use serde_json::json;

use crate::bundle::{Bundle, Outcome, eventually, has_program, is_pinion};

/// True when CRIU is there and this kernel lets it work; otherwise says why the test is moot.
fn can() -> bool {
    if !has_program("criu") {
        return false;
    }
    let check = crate::bundle::output(std::process::Command::new("criu").arg("check"));
    if !check.status.success() {
        let text = String::from_utf8_lossy(&check.stderr).into_owned();
        crate::bundle::moot!("criu check: {text}");
    }
    check.status.success()
}

/// Counts in a file and keeps the count in its memory only.
const COUNTER: &str = "i=0; while true; do i=$((i+1)); echo $i >> /tmp/count; sleep 0.02; done";

struct Counter {
    bundle: Bundle,
    images: PathBuf,
}

impl Counter {
    fn new() -> Self {
        Self::running(COUNTER)
    }

    fn running(script: &str) -> Self {
        let bundle = Bundle::new(script);
        let images = bundle.path().join("images");
        Self { bundle, images }
    }

    fn count(&self) -> u64 {
        let text = std::fs::read_to_string(self.bundle.rootfs().join("tmp/count"));
        // Appended, for a file that is replaced is empty at some moments.
        text.ok().and_then(|text| text.lines().last()?.parse().ok()).unwrap_or(0)
    }

    fn verb(&self, verb: &str, flags: &[&str]) -> Outcome {
        let images = self.images.to_str().unwrap();
        let mut arguments = vec![verb, "--image-path", images];
        arguments.extend(flags);
        arguments.push(&self.bundle.id);
        self.bundle.verb(&arguments)
    }

    /// Starts to count, with nothing of the outside on its standard descriptors.
    #[track_caller]
    fn start(&self) {
        self.bundle.write_config();
        let mut command = self.bundle.command(&["run", "--detach", &self.bundle.id]);
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        assert!(status.success());
        eventually(|| self.count() > 10);
    }

    #[track_caller]
    fn assert_goes_on_from(&self, before: u64) {
        eventually(|| self.count() > before);
        // From the start it could not have come this far yet.
        assert!(self.count() < before + 400, "{} after {before}", self.count());
    }
}

#[test]
fn a_restored_container_goes_on_where_it_was() {
    if !can() {
        return;
    }
    let counter = Counter::new();
    counter.start();
    let log = counter.bundle.path().join("work");
    counter.verb("checkpoint", &["--work-path", log.to_str().unwrap()]).ok();
    let before = counter.count();
    assert!(before > 10);
    assert!(counter.images.join("inventory.img").exists());
    assert!(log.join("dump.log").exists());
    counter.bundle.assert_nothing_left();
    // Nothing counts while it lies in files.
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(counter.count(), before);
    let pid_file = counter.bundle.path().join("pid");
    counter.verb("restore", &["--detach", "--pid-file", pid_file.to_str().unwrap()]).ok();
    counter.assert_goes_on_from(before);
    assert_eq!(counter.bundle.status(), "running");
    let pid = counter.bundle.pid();
    assert_eq!(std::fs::read_to_string(&pid_file).unwrap(), pid.to_string());
    // It is in its cgroup, its namespaces and its root, and takes all the other verbs.
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(cgroup.contains(&counter.bundle.id), "{cgroup}");
    assert_eq!(counter.bundle.exec("hostname; ls /proc/self/fd | wc -l").ok(), "box\n4\n");
    counter.bundle.verb(&["kill", &counter.bundle.id, "KILL"]).ok();
    counter.bundle.wait_for("stopped");
    counter.bundle.verb(&["delete", &counter.bundle.id]).ok();
    counter.bundle.assert_nothing_left();
}

#[test]
fn a_container_can_be_left_running() {
    if !can() {
        return;
    }
    let counter = Counter::new();
    counter.start();
    let pid = counter.bundle.pid();
    counter.verb("checkpoint", &["--leave-running"]).ok();
    assert!(counter.images.join("inventory.img").exists());
    counter.assert_goes_on_from(counter.count());
    assert_eq!((counter.bundle.status().as_str(), counter.bundle.pid()), ("running", pid));
}

#[test]
fn bind_mounts_masks_and_cgroup_mounts_come_back() {
    if !can() {
        return;
    }
    let mut counter = Counter::running(&format!("mkdir -p /tmp; {COUNTER}"));
    let source = counter.bundle.path().join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("file"), "of the host").unwrap();
    let (directory, file) = (source.to_str().unwrap(), source.join("file"));
    counter.bundle.mount("/data", "bind", directory, &["rbind", "ro"]);
    counter.bundle.mount("/etc/one", "bind", file.to_str().unwrap(), &["bind"]);
    counter.bundle.mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]);
    counter.bundle.mount(
        "/sys/fs/cgroup",
        "cgroup",
        "cgroup",
        &["nosuid", "noexec", "nodev", "ro"],
    );
    counter.bundle.config["linux"]["maskedPaths"] =
        json!(["/proc/kcore", "/proc/keys", "/proc/acpi", "/sys/firmware"]);
    counter.start();
    counter.verb("checkpoint", &[]).ok();
    let before = counter.count();
    counter.verb("restore", &["--detach"]).ok();
    counter.assert_goes_on_from(before);
    let script =
        "cat /data/file /etc/one; touch /data/x 2>&1; wc -c < /proc/keys; ls /sys/firmware";
    let text = counter.bundle.exec(script).ok();
    assert_eq!(text.matches("of the host").count(), 2, "{text}");
    assert!(text.contains("Read-only file system") && text.trim_end().ends_with('0'), "{text}");
}

#[test]
fn a_foreground_restore_ends_with_the_programs_code() {
    if !can() {
        return;
    }
    let script = "i=0; while [ ! -e /tmp/end ]; do i=$((i+1)); echo $i >> /tmp/count; sleep 0.02; done; exit 7";
    let counter = Counter::running(script);
    counter.start();
    counter.verb("checkpoint", &[]).ok();
    let rootfs = counter.bundle.rootfs();
    let ender = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(700));
        std::fs::write(rootfs.join("tmp/end"), "").unwrap();
    });
    let outcome = counter.verb("restore", &[]);
    ender.join().unwrap();
    assert_eq!(outcome.code, Some(7), "{outcome:?}");
    counter.bundle.assert_nothing_left();
}

#[test]
fn pipes_of_the_caller_are_exchanged_at_the_restore() {
    if !can() {
        return;
    }
    let counter = Counter::running(
        "i=0; while true; do i=$((i+1)); echo $i >> /tmp/count; echo said $i; sleep 0.02; done",
    );
    counter.bundle.write_config();
    let mut first = counter
        .bundle
        .command(&["run", "--detach", &counter.bundle.id])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    assert!(first.wait().unwrap().success());
    eventually(|| counter.count() > 5);
    counter.verb("checkpoint", &[]).ok();
    drop(first);
    let images = counter.images.to_str().unwrap();
    let mut second = counter
        .bundle
        .command(&["restore", "--detach", "--image-path", images, &counter.bundle.id])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    assert!(second.wait().unwrap().success());
    let mut text = [0; 64];
    let length = std::io::Read::read(second.stdout.as_mut().unwrap(), &mut text).unwrap();
    assert!(String::from_utf8_lossy(&text[..length]).contains("said "));
}

#[test]
fn a_joined_network_namespace_is_referred_to_and_not_dumped() {
    if !can() {
        return;
    }
    let holder = Bundle::new("sleep 100");
    holder.launch();
    let mut counter = Counter::new();
    let path = format!("/proc/{}/ns/net", holder.pid());
    for namespace in counter.bundle.config["linux"]["namespaces"].as_array_mut().unwrap() {
        if namespace["type"] == "network" {
            namespace["path"] = json!(path);
        }
    }
    counter.start();
    counter.verb("checkpoint", &[]).ok();
    let before = counter.count();
    counter.verb("restore", &["--detach"]).ok();
    counter.assert_goes_on_from(before);
    let link = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_eq!(link(counter.bundle.pid()), link(holder.pid()));
}

#[test]
fn a_pre_dump_is_the_parent_of_a_dump_or_says_what_the_kernel_lacks() {
    if !can() {
        return;
    }
    let counter = Counter::new();
    counter.start();
    let parent = counter.bundle.path().join("parent");
    let id = &counter.bundle.id;
    let flags = ["checkpoint", "--pre-dump", "--image-path", parent.to_str().unwrap(), id];
    let outcome = counter.bundle.verb(&flags);
    if outcome.code != Some(0) {
        outcome.fails_with("MemTrack");
        crate::bundle::moot!("{}", outcome.stderr);
        return;
    }
    assert_eq!(counter.bundle.status(), "running");
    counter.verb("checkpoint", &["--parent-path", "../parent"]).ok();
    let before = counter.count();
    counter.verb("restore", &["--detach"]).ok();
    counter.assert_goes_on_from(before);
}

#[test]
fn what_cannot_be_checkpointed_is_refused_in_runcs_words() {
    let bundle = Bundle::new("sleep 100");
    bundle.verb(&["checkpoint", &bundle.id]).fails_with("container does not exist");
    bundle.create();
    let outcome = bundle.verb(&["checkpoint", "--image-path", "/x", &bundle.id]);
    outcome.fails_with("Container cannot be checkpointed in created state");
    bundle.start();
    for (flags, words) in [
        (["--manage-cgroups-mode", "sideways"], "invalid manage-cgroups-mode value"),
        (["--page-server", "nowhere"], "--page-server ADDRESS:PORT"),
        (["--parent-path", "/absolute"], "--parent-path"),
        (["--empty-ns", "ipc"], "is not supported"),
    ] {
        let images = bundle.path().join("images");
        let mut words_of_line = vec!["checkpoint", "--image-path", images.to_str().unwrap()];
        words_of_line.extend(flags);
        words_of_line.push(&bundle.id);
        bundle.verb(&words_of_line).fails_with(words);
        assert_eq!(bundle.status(), "running");
    }
}

#[test]
fn without_criu_the_error_says_so_and_the_container_runs_on() {
    if !is_pinion() {
        return;
    }
    let bundle = Bundle::new("sleep 100");
    bundle.launch();
    let images = bundle.path().join("images");
    let mut command =
        bundle.command(&["checkpoint", "--image-path", images.to_str().unwrap(), &bundle.id]);
    let outcome = crate::bundle::finish(command.env("PATH", "/nowhere"), bundle.path());
    outcome.fails_with("\"criu\": executable file not found in $PATH");
    assert_eq!(bundle.status(), "running");
}

#[test]
fn a_failed_restore_leaves_nothing() {
    if !can() {
        return;
    }
    let counter = Counter::new();
    counter.start();
    counter.verb("checkpoint", &[]).ok();
    std::fs::write(counter.images.join("inventory.img"), "garbage").unwrap();
    let outcome = counter.verb("restore", &["--detach"]);
    assert!(outcome.code.is_some_and(|code| code != 0), "{outcome:?}");
    outcome.fails_with("criu");
    counter.bundle.assert_nothing_left();
}
