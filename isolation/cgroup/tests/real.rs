//! The whole life of a cgroup on the kernel this runs on, in groups of its own. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a panic is the report

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxResources};
use pinion_cgroup::{Cgroup, CgroupPaths, Driver, Error, ErrorKind, Hierarchies, Mode};

/// A cgroup below `/pinion-test-PID/`, removed at the end of the test with its parent.
struct Fixture {
    hierarchies: Hierarchies,
    cgroup: Cgroup,
    processes: Vec<Child>,
}

impl Fixture {
    fn new(name: &str) -> Self {
        let hierarchies = Hierarchies::detect().unwrap();
        let path = format!("/pinion-test-{}-{name}/c1", std::process::id());
        let paths =
            Cgroup::plan(&hierarchies, Driver::Cgroupfs, Some(&path), "c1").expect("a plan");
        let cgroup = Cgroup::create(&hierarchies, &paths).expect("these tests need root");
        Self { hierarchies, cgroup, processes: Vec::new() }
    }

    fn v2(&self) -> bool {
        self.hierarchies.mode() == Mode::V2
    }

    /// What a file holds, named for the version its controller lives on.
    fn held(&self, controller: &str, v1: &str, v2: &str) -> String {
        let paths = self.cgroup.paths();
        let path = match paths.v1.get(controller) {
            Some(directory) => directory.join(v1),
            None => paths.unified.clone().unwrap().join(v2),
        };
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path:?}: {error}")).trim().into()
    }

    /// A process in the cgroup that runs `script`.
    fn run(&mut self, script: &str) -> i32 {
        let child = Command::new("/bin/sh").args(["-c", script]).spawn().unwrap();
        let pid = child.id() as i32;
        self.processes.push(child);
        self.cgroup.join(pid).unwrap();
        pid
    }

    fn apply(&self, json: &str) -> Result<(), Error> {
        self.cgroup.apply(&serde_json::from_str::<LinuxResources>(json).unwrap())
    }

    fn update(&self, json: &str) -> Result<(), Error> {
        self.cgroup.update(&serde_json::from_str::<LinuxResources>(json).unwrap())
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = self.cgroup.thaw();
        let _ = self.cgroup.kill_all(9);
        for process in &mut self.processes {
            let _ = process.wait();
        }
        let removed = self.cgroup.remove();
        let paths = self.cgroup.paths();
        for directory in paths.unified.iter().chain(paths.v1.values()) {
            let parent = directory.parent().unwrap();
            if parent.exists() {
                let _ = fs::remove_dir(parent);
            }
        }
        if !std::thread::panicking() {
            removed.unwrap();
            assert!(!self.cgroup.exists());
        }
    }
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.trim().chars().next()
}

#[test]
fn limits_are_held_by_the_kernel() {
    let fixture = Fixture::new("limits");
    fixture
        .apply(
            r#"{"memory":{"limit":67108864,"reservation":33554432},
                "cpu":{"shares":2048,"quota":20000,"period":50000,"cpus":"0","mems":"0"},
                "pids":{"limit":17}}"#,
        )
        .unwrap();
    let held = |controller, v1, v2| fixture.held(controller, v1, v2);
    assert_eq!(held("memory", "memory.limit_in_bytes", "memory.max"), "67108864");
    assert_eq!(held("memory", "memory.soft_limit_in_bytes", "memory.low"), "33554432");
    assert_eq!(held("pids", "pids.max", "pids.max"), "17");
    assert_eq!(held("cpuset", "cpuset.cpus", "cpuset.cpus"), "0");
    assert_eq!(held("cpuset", "cpuset.mems", "cpuset.mems"), "0");
    if fixture.v2() {
        assert_eq!(held("cpu", "", "cpu.max"), "20000 50000");
        assert_eq!(held("cpu", "", "cpu.weight"), "174");
    } else {
        assert_eq!(held("cpu", "cpu.shares", ""), "2048");
        assert_eq!(held("cpu", "cpu.cfs_quota_us", ""), "20000");
        assert_eq!(held("cpu", "cpu.cfs_period_us", ""), "50000");
    }
    // Down and up again, in an order the kernel takes.
    fixture.update(r#"{"cpu":{"quota":5000,"period":10000},"memory":{"limit":33554432}}"#).unwrap();
    assert_eq!(held("memory", "memory.limit_in_bytes", "memory.max"), "33554432");
    fixture.update(r#"{"cpu":{"quota":-1},"memory":{"limit":-1},"pids":{"limit":-1}}"#).unwrap();
    assert_eq!(held("pids", "pids.max", "pids.max"), "max");
    if !fixture.v2() {
        assert_eq!(held("cpu", "cpu.cfs_quota_us", ""), "-1");
    }
}

#[test]
fn an_update_the_kernel_refuses_changes_nothing() {
    let fixture = Fixture::new("rollback");
    fixture.apply(r#"{"cpu":{"cpus":"0","mems":"0"},"pids":{"limit":20}}"#).unwrap();
    // v2 accepts CPUs that are offline and node 900 is never there on either version.
    let error =
        fixture.update(r#"{"pids":{"limit":5},"cpu":{"cpus":"0","mems":"900"}}"#).unwrap_err();
    assert!(matches!(error, Error::Write { .. } | Error::NotInForce { .. }), "unexpected: {error}");
    assert_eq!(fixture.held("pids", "pids.max", "pids.max"), "20");
    assert_eq!(fixture.held("cpuset", "cpuset.mems", "cpuset.mems"), "0");
}

#[test]
fn hugepage_limits_are_in_force_or_the_missing_controller_is_named() {
    let fixture = Fixture::new("hugetlb");
    let Some((size, bytes)) = pinion_cgroup::hugepage_sizes().into_iter().next() else {
        println!("not possible here: this kernel has no huge pages");
        return;
    };
    let limits = format!(r#"{{"hugepageLimits":[{{"pageSize":"{size}","limit":{}}}]}}"#, bytes * 3);
    let outcome = fixture.apply(&limits);
    if fixture.hierarchies.controllers().unwrap().iter().any(|name| name == "hugetlb") {
        outcome.unwrap();
        for kind in [("limit_in_bytes", "max"), ("rsvd.limit_in_bytes", "rsvd.max")] {
            let held = fixture.held(
                "hugetlb",
                &format!("hugetlb.{size}.{}", kind.0),
                &format!("hugetlb.{size}.{}", kind.1),
            );
            assert_eq!(held, (bytes * 3).to_string());
        }
        let stats = fixture.cgroup.stats().unwrap();
        assert_eq!(stats.hugetlb[&size].rsvd_limit, bytes * 3);
    } else {
        println!("not possible here: no hugetlb controller");
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("hugetlb is not available"), "{error}");
    }
    let absent = r#"{"hugepageLimits":[{"pageSize":"3MB","limit":1}]}"#;
    assert_eq!(fixture.apply(absent).unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn devices_outside_the_rules_cannot_be_opened() {
    let mut fixture = Fixture::new("devices");
    let outcome = fixture.apply(
        r#"{"devices":[{"allow":false,"access":"rwm"},
            {"allow":true,"type":"c","major":10,"minor":200,"access":"rwm"}]}"#,
    );
    if let Err(Error::DeviceProgram { source, .. }) = &outcome
        && source.raw_os_error() == Some(1)
    {
        println!("not possible here: bpf(2): {source}");
        return;
    }
    outcome.unwrap();
    // A process that reads /dev/null (always allowed) and /dev/kmsg (1:11, not allowed) once
    // it is in the cgroup, and says by its exit code which of them opened.
    let probe = "while [ -z \"$go\" ]; do grep -q pinion-test /proc/self/cgroup && go=1; done; \
        code=0; (: < /dev/null) 2>/dev/null && code=1; \
        (: < /dev/kmsg) 2>/dev/null && code=$((code + 2)); exit $code";
    let opened = |fixture: &mut Fixture| {
        fixture.run(probe);
        fixture.processes.pop().unwrap().wait().unwrap().code().unwrap()
    };
    assert_eq!(opened(&mut fixture), 1, "only /dev/null");
    let more: Vec<LinuxDeviceCgroup> =
        serde_json::from_str(r#"[{"allow":true,"type":"c","major":1,"minor":11,"access":"r"}]"#)
            .unwrap();
    fixture.cgroup.set_devices(&more).unwrap();
    assert_eq!(opened(&mut fixture), 3, "both");
    fixture.cgroup.set_devices(&[]).unwrap();
    assert_eq!(opened(&mut fixture), 1, "only /dev/null again");
    // An update that does not mention devices leaves them alone.
    fixture.update(r#"{"pids":{"limit":50}}"#).unwrap();
    assert_eq!(opened(&mut fixture), 1);
}

#[test]
fn frozen_processes_stand_still_until_thawed() {
    let mut fixture = Fixture::new("freeze");
    let pid = fixture.run("while :; do :; done");
    fixture.cgroup.freeze().unwrap();
    assert!(fixture.cgroup.is_frozen().unwrap());
    let used = |fixture: &Fixture| fixture.cgroup.usage().unwrap().cpu_nanoseconds;
    let before = used(&fixture);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(used(&fixture), before, "a frozen process used the CPU");
    fixture.cgroup.thaw().unwrap();
    assert!(!fixture.cgroup.is_frozen().unwrap());
    eventually("it runs again", || used(&fixture) > before);
    assert!(state(pid).is_some());
}

#[test]
fn a_fork_bomb_is_killed_whole_even_when_frozen() {
    let mut fixture = Fixture::new("kill");
    fixture.apply(r#"{"pids":{"limit":30}}"#).unwrap();
    fixture.run("bomb() { bomb & bomb & sleep 60; }; sleep 0.1; bomb 2>/dev/null");
    eventually("it multiplies", || fixture.cgroup.pids(true).unwrap().len() > 10);
    let _ = fixture.cgroup.freeze();
    fixture.cgroup.kill_all(9).unwrap();
    let _ = fixture.cgroup.thaw();
    eventually("nobody is left", || fixture.cgroup.pids(true).unwrap().is_empty());
}

#[test]
fn other_signals_reach_every_process_below_too() {
    let mut fixture = Fixture::new("signal");
    let below = fixture.cgroup.paths().child("exec").unwrap();
    let child = Cgroup::create(&fixture.hierarchies, &below).unwrap();
    let process = Command::new("/bin/sleep").arg("60").spawn().unwrap();
    // v2 keeps processes out of inner cgroups only once controllers are enabled below.
    child.join(process.id() as i32).unwrap();
    fixture.processes.push(process);
    assert!(fixture.cgroup.pids(false).unwrap().is_empty());
    assert_eq!(fixture.cgroup.pids(true).unwrap().len(), 1);
    fixture.cgroup.kill_all(15).unwrap();
    let status = fixture.processes.pop().unwrap().wait().unwrap();
    assert_eq!(status.signal(), Some(15));
    // remove() takes the one below along.
    fixture.cgroup.remove().unwrap();
    assert!(!child.exists());
}

#[test]
fn statistics_count_what_the_processes_do() {
    let mut fixture = Fixture::new("stats");
    fixture.apply(r#"{"pids":{"limit":40},"memory":{"limit":134217728}}"#).unwrap();
    fixture.run("x=$(head -c 4000000 /dev/zero | tr '\\0' x); while :; do :; done");
    let enough = |usage: pinion_cgroup::Usage| usage.memory_bytes > 1 << 20;
    eventually("memory is charged", || enough(fixture.cgroup.usage().unwrap()));
    eventually("time is charged", || fixture.cgroup.usage().unwrap().cpu_nanoseconds > 30_000_000);
    let stats = fixture.cgroup.stats().unwrap();
    assert!(stats.cpu.usage.total > 0 && stats.cpu.usage.user + stats.cpu.usage.kernel > 0);
    assert_eq!(stats.memory.usage.limit, 134_217_728);
    assert!(stats.memory.usage.usage > 0 && stats.memory.raw.len() > 10);
    assert_eq!(stats.pids.limit, 40);
    assert!(stats.pids.current >= 1);
    assert!(!stats.cpuset.cpus.is_empty());
    let usage = fixture.cgroup.usage().unwrap();
    assert!(usage.working_set_bytes <= usage.memory_bytes && usage.pids >= 1);
    assert_eq!(usage.memory_limit_bytes, 134_217_728);
}

#[test]
fn running_out_of_memory_is_counted() {
    let mut fixture = Fixture::new("oom");
    fixture.apply(r#"{"memory":{"limit":8388608,"swap":8388608}}"#).unwrap();
    assert_eq!(fixture.cgroup.oom_kill_count().unwrap(), 0);
    fixture.run("sleep 0.2; x=$(head -c 100000000 /dev/zero | tr '\\0' x); exit 3");
    let status = fixture.processes.pop().unwrap().wait().unwrap();
    assert!(!status.success());
    assert!(fixture.cgroup.oom_kill_count().unwrap() >= 1);
}

#[test]
fn a_cgroup_with_somebody_in_it_is_not_taken_over() {
    let mut fixture = Fixture::new("occupied");
    fixture.run("sleep 60");
    let error = Cgroup::create(&fixture.hierarchies, fixture.cgroup.paths()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(fixture.cgroup.exists(), "what was there stays");
}

#[test]
fn a_cgroup_that_is_gone_is_no_error_to_clean_up() {
    let fixture = Fixture::new("gone");
    fixture.cgroup.remove().unwrap();
    fixture.cgroup.kill_all(9).unwrap();
    assert!(fixture.cgroup.pids(true).unwrap().is_empty());
    assert_eq!(fixture.cgroup.oom_kill_count().unwrap(), 0);
    fixture.cgroup.remove().unwrap();
}

#[test]
fn paths_survive_the_state_file() {
    let fixture = Fixture::new("state");
    let json = serde_json::to_string(fixture.cgroup.paths()).unwrap();
    let paths: CgroupPaths = serde_json::from_str(&json).unwrap();
    assert_eq!(&paths, fixture.cgroup.paths());
    assert!(Cgroup::open(paths).exists());
}

#[test]
fn systemd_is_used_where_it_runs_and_missed_by_name_where_it_does_not() {
    let hierarchies = Hierarchies::detect().unwrap();
    let unit = format!("system.slice:pinion-test:{}", std::process::id());
    let paths = Cgroup::plan(&hierarchies, Driver::Systemd, Some(&unit), "c1").unwrap();
    if !Path::new("/run/systemd/system").exists() {
        println!("not possible here: systemd does not run");
        let error = Cgroup::create(&hierarchies, &paths).unwrap_err();
        assert!(matches!(error, Error::Systemd { action: "start", .. }), "{error}");
        return;
    }
    println!("systemd runs here; its driver is exercised by a single-threaded program");
}
