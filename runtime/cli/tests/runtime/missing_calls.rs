//! A container's life on kernels and in sandboxes that lack newer system calls.
//!
//! A filter on the thread of the test answers `ENOSYS`; the runtime and the container inherit
//! it. runc and crun pass the same tests.

use std::thread;

use pinion_sys::seccomp;
use serde_json::json;

use crate::bundle::{Bundle, eventually, has_controller, is_pinion};

/// Puts the filter in force for the calling thread and what it starts.
fn forbid(calls: &[&str]) {
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{ "names": calls, "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS }],
    });
    let profile = serde_json::from_value(profile).unwrap();
    let filter = pinion_seccomp::compile(&profile).unwrap();
    seccomp::load(&filter.instructions, 0).unwrap();
}

/// Runs `test` on a thread without these calls.
fn without(calls: &'static [&'static str], test: fn()) {
    let run = thread::Builder::new().name(format!("without-{}", calls[0]));
    let outcome = run
        .spawn(move || {
            forbid(calls);
            test();
        })
        .unwrap()
        .join();
    if let Err(panic) = outcome {
        println!("without {calls:?}");
        std::panic::resume_unwind(panic);
    }
}

/// Every verb once, with the mounts a container usually has.
fn a_whole_life() {
    let mut bundle = Bundle::new("echo started; sleep 100");
    let volume = bundle.path().join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("file"), "inside\n").unwrap();
    bundle.mount("/volume", "bind", volume.to_str().unwrap(), &["rbind", "ro"]);
    bundle.mount("/scratch", "tmpfs", "tmpfs", &["nosuid", "nodev", "size=1m"]);
    bundle.mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]);
    bundle.mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "mode=1777"]);
    bundle.config["root"]["readonly"] = json!(true);
    let with_pids = has_controller("pids");
    if with_pids {
        bundle.config["linux"]["resources"] = json!({ "pids": { "limit": 40 } });
    }
    bundle.launch();
    let read = bundle.exec("cat /volume/file");
    assert_eq!(read.stdout, "inside\n", "{read:?}");
    assert!(bundle.exec("touch /volume/x").stderr.contains("Read-only"));
    assert!(bundle.exec("touch /x").stderr.contains("Read-only"));
    assert!(bundle.exec("echo 1 > /proc/sys/vm/swappiness").stderr.contains("Read-only"));
    bundle.exec("touch /scratch/x && test ! -s /proc/kcore && ls /proc/acpi").ok();
    assert_eq!(bundle.exec("exit 7").code, Some(7));
    if with_pids {
        bundle.verb(&["update", "--pids-limit", "50", &bundle.id]).ok();
    }
    bundle.verb(&["pause", &bundle.id]).ok();
    assert_eq!(bundle.status(), "paused");
    bundle.verb(&["resume", &bundle.id]).ok();
    let pids = bundle.verb(&["ps", "--format", "json", &bundle.id]).ok();
    assert!(pids.contains(&bundle.pid().to_string()), "{pids}");
    bundle.verb(&["kill", "--all", &bundle.id, "KILL"]).ok();
    eventually(|| bundle.status() == "stopped");
    bundle.verb(&["delete", &bundle.id]).ok();
    bundle.assert_nothing_left();
}

macro_rules! lives_without {
    ($($name:ident: $calls:expr;)*) => {
        $(#[test]
        fn $name() {
            without(&$calls, a_whole_life);
        })*
    };
}

lives_without! {
    a_container_lives_without_openat2: ["openat2"];
    a_container_lives_without_clone3: ["clone3"];
    a_container_lives_without_open_tree: ["open_tree"];
    a_container_lives_without_move_mount: ["move_mount"];
    a_container_lives_without_mount_setattr: ["mount_setattr"];
    a_container_lives_without_fsopen: ["fsopen", "fsconfig", "fsmount", "fspick"];
    a_container_lives_without_close_range: ["close_range"];
    a_container_lives_without_faccessat2: ["faccessat2"];
    a_container_lives_without_keyrings: ["keyctl", "add_key", "request_key"];
    a_container_lives_without_the_whole_new_mount_api: [
        "open_tree", "move_mount", "mount_setattr", "fsopen", "fsconfig", "fsmount", "fspick",
    ];
    a_container_lives_on_linux_5_5: [
        "openat2", "clone3", "mount_setattr", "close_range", "faccessat2", "open_tree_attr",
        "epoll_pwait2", "pidfd_getfd", "process_madvise", "memfd_secret", "fchmodat2",
    ];
}

#[test]
fn without_pidfd_open_only_exec_is_refused_and_says_why() {
    if !is_pinion() {
        return;
    }
    without(&["pidfd_open"], || {
        let bundle = Bundle::new("sleep 100");
        bundle.launch();
        // To enter a container takes a descriptor of its process.
        bundle.exec("true").fails_with("pidfd_open");
        bundle.verb(&["kill", &bundle.id, "KILL"]).ok();
        eventually(|| bundle.status() == "stopped");
        bundle.verb(&["delete", &bundle.id]).ok();
        let running = Bundle::new("sleep 100");
        running.launch();
        running.verb(&["delete", "--force", &running.id]).ok();
        running.assert_nothing_left();
        bundle.assert_nothing_left();
    });
}
