//! Labels of security modules, read from the kernel where it has them.

use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::bundle::{Bundle, has_program, output};

fn reads(path: &str, text: &str) -> bool {
    std::fs::read_to_string(path).is_ok_and(|value| value.trim() == text)
}

/// A profile in the kernel until the end of the test.
struct Profile {
    name: String,
    file: tempfile::NamedTempFile,
}

impl Profile {
    /// One that allows everything but to read `/secret`; none where there is no AppArmor.
    fn load() -> Option<Self> {
        if !reads("/sys/module/apparmor/parameters/enabled", "Y") {
            crate::bundle::moot!("AppArmor is not enabled");
            return None;
        }
        if !has_program("apparmor_parser") {
            return None;
        }
        let name = format!("pinion-test-{}-{:?}", std::process::id(), std::thread::current().id())
            .replace(['(', ')'], "-");
        let file = tempfile::NamedTempFile::new().unwrap();
        let rules = "file, capability, network, mount, umount, pivot_root, ptrace, signal, unix,";
        let text = format!("profile {name} {{\n {rules}\n deny /secret r,\n}}\n");
        std::fs::write(file.path(), text).unwrap();
        let profile = Self { name, file };
        profile.parser("--replace");
        Some(profile)
    }

    fn parser(&self, what: &str) {
        let mut command = Command::new("apparmor_parser");
        let loaded = output(command.args(["--skip-cache", what]).arg(self.file.path()));
        assert!(loaded.status.success(), "{loaded:?}");
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        self.parser("--remove");
    }
}

#[test]
fn the_profile_is_that_of_the_program_and_of_what_is_executed_later() {
    let Some(profile) = Profile::load() else { return };
    for no_new_privileges in [true, false] {
        let mut bundle = Bundle::new("cat /proc/self/attr/current > /tmp/label; sleep 100");
        bundle.config["process"]["apparmorProfile"] = json!(profile.name);
        bundle.config["process"]["noNewPrivileges"] = json!(no_new_privileges);
        std::fs::write(bundle.rootfs().join("secret"), "secret\n").unwrap();
        bundle.launch();
        let enforced = format!("{} (enforce)", profile.name);
        let label = |pid: i32| {
            std::fs::read_to_string(format!("/proc/{pid}/attr/current")).unwrap().trim().to_owned()
        };
        assert_eq!(label(bundle.pid()), enforced);
        assert_eq!(bundle.exec("cat /proc/self/attr/current").ok().trim(), enforced);
        let denied = bundle.exec("cat /secret");
        assert!(denied.stderr.contains("Permission denied"), "{denied:?}");
        crate::bundle::eventually(|| {
            let seen = std::fs::read_to_string(bundle.rootfs().join("tmp/label"));
            seen.is_ok_and(|seen| seen.trim() == enforced)
        });
    }
}

#[test]
fn a_process_can_be_executed_under_a_profile_of_its_own() {
    let Some(profile) = Profile::load() else { return };
    let bundle = Bundle::new("sleep 100");
    bundle.launch();
    let words = ["exec", "--apparmor", &profile.name, &bundle.id, "cat", "/proc/self/attr/current"];
    assert_eq!(bundle.verb(&words).ok().trim(), format!("{} (enforce)", profile.name));
    assert!(bundle.exec("cat /proc/self/attr/current").ok().starts_with("unconfined"));
}

#[test]
fn a_profile_that_is_not_there_is_an_error_that_names_it() {
    let mut bundle = Bundle::new("true");
    bundle.config["process"]["apparmorProfile"] = json!("pinion-test-no-such-profile");
    let outcome = bundle.run();
    match reads("/sys/module/apparmor/parameters/enabled", "Y") {
        true => {
            outcome.fails_with("apparmor");
            outcome.fails_with("pinion-test-no-such-profile");
        }
        false => outcome.fails_with("pparmor"),
    }
    bundle.assert_nothing_left();
}

#[test]
fn a_label_without_its_security_module_is_refused() {
    if Path::new("/sys/fs/selinux/enforce").exists() {
        crate::bundle::moot!("SELinux is there");
        return;
    }
    let mut bundle = Bundle::new("true");
    bundle.config["process"]["selinuxLabel"] = json!("system_u:system_r:container_t:s0");
    bundle.run().fails_with("selinux label is specified");
    bundle.assert_nothing_left();
}
