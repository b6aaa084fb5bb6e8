//! Verbs whose execution fails at one system call after the other.
//!
//! strace injects an error, or a SIGKILL, at the n-th call of a kind in the runtime and in
//! the container's process; n grows until nothing was hit. Whatever happens, `delete
//! --force` must then work and leave nothing. A sample is run unless `PINION_FAULTS=all`;
//! `PINION_FAULTS=<number>` seeds the sample.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::bundle::{Bundle, Outcome, eventually, finish, is_pinion, runtime};

/// What a container's life is made of.
const CALLS: &[&str] = &[
    "open",
    "openat",
    "openat2",
    "read",
    "write",
    "clone3",
    "mkdir",
    "mkdirat",
    "fsopen",
    "fsconfig",
    "fsmount",
    "move_mount",
    "open_tree",
    "mount_setattr",
    "setns",
    "socket",
    "socketpair",
    "bind",
    "listen",
    "connect",
    "sendto",
    "accept4",
    "rename",
    "fstat",
    "fstatfs",
    "symlinkat",
    "mknodat",
    "pivot_root",
    "fchdir",
    "chdir",
    "umount2",
    "prctl",
    "capget",
    "capset",
    "setresuid",
    "setresgid",
    "setgroups",
    "setsid",
    "sethostname",
    "keyctl",
    "execve",
    "unlink",
    "rmdir",
    "poll",
    "pidfd_open",
    "pidfd_send_signal",
    "flock",
    "getcwd",
    "close_range",
];
/// The largest number of calls of one kind before the test itself is at fault.
const MOST: u32 = 400;
/// How many faults a sample tries, per verb and kind of fault.
const SAMPLE: usize = 24;
/// What a sample may take, per verb and kind of fault.
const TIME: Duration = Duration::from_secs(20);

/// The points at which a verb is to fail.
struct Points {
    all: bool,
    seed: u64,
}

impl Points {
    fn chosen() -> Self {
        let asked = std::env::var("PINION_FAULTS").unwrap_or_default();
        let seed = asked.parse().unwrap_or_else(|_| u64::from(std::process::id()));
        if asked != "all" {
            println!("a sample with PINION_FAULTS={seed}");
        }
        Self { all: asked == "all", seed }
    }

    /// A step of a linear congruential generator, for repeatable choices.
    fn next(&mut self, below: u64) -> u64 {
        self.seed = self
            .seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 33) % below
    }

    /// Tries `at` (call, number) → whether the fault was hit, at every point or some.
    fn each(mut self, mut at: impl FnMut(&str, u32) -> bool) {
        if self.all {
            for call in CALLS {
                let hit = (1..MOST).take_while(|number| at(call, *number)).count();
                println!("{call}: {hit} points");
            }
            return;
        }
        let end = Instant::now() + TIME;
        for _ in 0..SAMPLE {
            let call = CALLS[self.next(CALLS.len() as u64) as usize];
            let number = 1 + self.next(12) as u32;
            at(call, number);
            if Instant::now() > end {
                return;
            }
        }
    }
}

/// A verb under strace, which lets go of the terminal of the test (`-D`): a container that
/// was made stays traced for as long as it lives.
fn with_fault(
    bundle: &Bundle,
    call: &str,
    fault: &str,
    number: u32,
    verb: &[&str],
) -> (Outcome, bool) {
    let trace = bundle.path().join("trace");
    let _ = std::fs::remove_file(&trace);
    let mut command = Command::new("strace");
    command.args(["-D", "-f", "-qq", "-o"]).arg(&trace);
    command.arg("-e").arg(format!("trace={call}"));
    command.arg("-e").arg(format!("inject={call}:{fault}:when={number}"));
    command.arg(runtime()).arg("--root").arg(bundle.state_root()).args(verb);
    command.stdin(Stdio::null()).current_dir(bundle.path());
    let outcome = finish(&mut command, bundle.path());
    let text = std::fs::read_to_string(&trace).unwrap_or_default();
    (outcome, text.contains("INJECTED") || text.contains("killed by"))
}

/// Whether a process of the test's container is there.
fn processes_of(bundle: &Bundle) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().into_string().ok());
    pids.filter(|pid| pid.bytes().all(|byte| byte.is_ascii_digit()))
        .filter(|pid| {
            let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup"));
            cgroup.is_ok_and(|text| {
                text.lines().any(|line| line.ends_with(&format!("/{}", bundle.id)))
            })
        })
        .collect()
}

/// `verb` fails at one point after the other; nothing must be left by what follows.
fn fail_everywhere(verb: &str, fault: &str) {
    if !is_pinion() {
        return;
    }
    Points::chosen().each(|call, number| {
        let bundle = Bundle::new("sleep 100");
        bundle.write_config();
        let id = bundle.id.as_str();
        if verb != "create" {
            bundle.verb(&["create", id]).ok();
        }
        if verb == "exec" || verb == "delete" {
            bundle.verb(&["start", id]).ok();
        }
        let arguments: &[&str] = match verb {
            "exec" => &["exec", id, "/bin/true"],
            "delete" => &["delete", "--force", id],
            other => &[other, id],
        };
        let (outcome, hit) = with_fault(&bundle, call, fault, number, arguments);
        let where_ = format!("{verb} with {fault} at {call} {number}: {outcome:?}");
        let gone = bundle.verb(&["delete", "--force", id]);
        assert_eq!(gone.code, Some(0), "{where_}: then {gone:?}");
        eventually(|| processes_of(&bundle).is_empty());
        let left = std::fs::read_dir(bundle.state_root()).map_or(0, Iterator::count);
        assert_eq!(left, 0, "{where_}: state is left");
        assert_eq!(bundle.cgroups(), Vec::<std::path::PathBuf>::new(), "{where_}");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&*bundle.path().to_string_lossy()), "{where_}: mounts are left");
        hit
    });
}

#[test]
fn a_create_that_fails_anywhere_leaves_nothing() {
    fail_everywhere("create", "error=EIO");
}

#[test]
fn a_create_that_is_killed_anywhere_leaves_what_delete_can_remove() {
    fail_everywhere("create", "signal=SIGKILL");
}

#[test]
fn a_start_that_fails_anywhere_leaves_what_delete_can_remove() {
    fail_everywhere("start", "error=EIO");
}

#[test]
fn a_start_that_is_killed_anywhere_leaves_what_delete_can_remove() {
    fail_everywhere("start", "signal=SIGKILL");
}

#[test]
fn an_exec_that_fails_anywhere_leaves_what_delete_can_remove() {
    fail_everywhere("exec", "error=EIO");
}

#[test]
fn a_delete_that_fails_anywhere_can_be_repeated() {
    fail_everywhere("delete", "error=EIO");
}

#[test]
fn a_delete_that_is_killed_anywhere_can_be_repeated() {
    fail_everywhere("delete", "signal=SIGKILL");
}
