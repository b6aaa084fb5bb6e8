//! Clients that die, break the rules or never come; the end of the monitor; its memory.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use pinion_monitor_proto::message::{Hello, Shutdown, error::Kind, request::Verb};

use crate::rig::{Rig, alive, read_until, wait_until};

/// Most proportional set size of the monitor of a pod with one container, in KiB, on a node
/// with [`PODS`] pods: they share the program's pages.
const PSS_BUDGET: u64 = 400;
const PODS: u64 = 8;

/// Most memory that is a monitor's alone, in KiB, however many there are.
const PRIVATE_BUDGET: u64 = 160;

#[test]
fn containers_outlive_clients_and_what_happened_meanwhile_is_told() {
    let mut rig = Rig::new();
    rig.run_shell("ends", "while ! [ -e /tmp/end ]; do usleep 5000; done; echo bye; exit 6");
    rig.run("stays", &["/bin/sleep", "1000"]);
    // A request whose client does not wait for the answer.
    let create = rig.bundle("late", &["/bin/sleep", "1000"], |_| {});
    rig.send(Verb::Create(create), &[]);
    rig.disconnect();
    fs::write(rig.dir.path().join("rootfs/tmp/end"), "").unwrap();
    wait_until("it has ended", || rig.exit_file_exists("ends"));
    wait_until("the other one is created", || {
        rig.connect().iter().any(|container| container.id == "late" && container.pid != 0)
    });
    let states = rig.connect();
    let state = |id: &str| states.iter().find(|state| state.id == id).unwrap().clone();
    assert_eq!(state("ends").exited.unwrap().code, 6);
    assert!(state("stays").started && state("stays").exited.is_none());
    assert!(!state("late").started);
    assert!(fs::read_to_string(rig.log_path("ends")).unwrap().ends_with("stdout F bye\n"));
}

#[test]
fn an_exec_goes_on_when_the_connection_is_lost() {
    let mut rig = Rig::new();
    rig.run("c", &["/bin/sleep", "1000"]);
    let running = rig.exec_shell(
        "c",
        "e",
        "echo begun; while ! [ -e /tmp/end ]; do usleep 5000; done; echo end",
    );
    read_until(&running.out, "begun");
    rig.connect();
    fs::write(rig.dir.path().join("rootfs/tmp/end"), "").unwrap();
    assert_eq!(running.output().trim_start(), "end\n");
}

#[test]
fn a_client_that_breaks_the_protocol_loses_its_connection_only() {
    let mut rig = Rig::new();
    rig.run("c", &["/bin/sleep", "1000"]);
    for garbage in [&[0xff; 64][..], &[4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], &[0, 0, 1, 0]] {
        let mut stream = UnixStream::connect(rig.pod.join("monitor.sock")).unwrap();
        stream.write_all(garbage).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut end = Vec::new();
        std::io::Read::read_to_end(&mut stream, &mut end).ok();
    }
    let wrong = rig.error(Verb::Hello(Hello { version: 99, subscribe: true }));
    assert_eq!(wrong.kind(), Kind::Invalid);
    assert!(rig.connect()[0].started);
}

#[test]
fn the_socket_is_ours_alone_and_the_monitor_leads_its_session() {
    let rig = Rig::new();
    let socket = fs::metadata(rig.pod.join("monitor.sock")).unwrap();
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
    assert_eq!(socket.uid(), 0);
    let pid = rig.monitor_pid();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    assert_eq!(fields[3], pid.to_string(), "session");
    assert_ne!(fields[1], std::process::id().to_string(), "parent");
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap().to_str(), Some("/"));
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/comm")).unwrap(), "pinion-monitor\n");
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
    assert_eq!(threads, 1);
}

#[test]
fn descriptors_leaked_by_the_caller_reach_neither_monitor_nor_container() {
    let rig = Rig::without_monitor();
    let script = "exec 7</etc/passwd 8</ 9>/dev/null; exec \"$@\"";
    let launcher = rig.launcher();
    let status = Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(launcher.get_program())
        .args(launcher.get_args())
        .status()
        .unwrap();
    assert!(status.success());
    let links = fs::read_dir(format!("/proc/{}/fd", rig.monitor_pid())).unwrap();
    for link in links {
        // What the monitor has open for a moment only may be closed by now.
        let Ok(target) = fs::read_link(link.unwrap().path()) else { continue };
        let target = target.to_str().unwrap().to_owned();
        assert!(target != "/etc/passwd" && target != "/", "{target}");
    }
    let mut rig = rig;
    rig.connect();
    rig.run_shell("c", "ls /proc/self/fd");
    rig.exit_of("c");
    let log = fs::read_to_string(rig.log_path("c")).unwrap();
    // 3 is the directory that ls itself reads.
    let seen: Vec<&str> = log.lines().map(|line| line.rsplit(' ').next().unwrap()).collect();
    assert_eq!(seen, ["0", "1", "2", "3"]);
}

#[test]
fn a_second_monitor_for_a_pod_does_not_come_up() {
    let rig = Rig::new();
    let second = rig.launcher().stderr(Stdio::piped()).output().unwrap();
    assert!(!second.status.success());
    let complaint = String::from_utf8(second.stderr).unwrap();
    assert!(complaint.contains("has a monitor already"), "{complaint}");
    assert!(alive(rig.monitor_pid()));
    UnixStream::connect(rig.pod.join("monitor.sock")).unwrap();
}

#[test]
fn a_dead_monitors_socket_is_taken_over() {
    let mut rig = Rig::new();
    let pid = rig.monitor_pid();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).unwrap();
    wait_until("it is dead", || !alive(pid));
    rig.launch();
    assert!(rig.connect().is_empty());
}

#[test]
fn a_launch_that_cannot_work_says_why() {
    let rig = Rig::without_monitor();
    let dir = rig.dir.path().join("missing");
    let output = Command::new(rig.launcher().get_program())
        .args(["--pod", "x", "--runtime", "/bin/true", "--runtime-root", "/run/x", "--dir"])
        .arg(&dir)
        .output()
        .unwrap();
    assert!(!output.status.success());
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert!(complaint.contains("missing") && complaint.contains("No such file"), "{complaint}");
}

#[test]
fn shutdown_waits_for_containers_unless_forced() {
    let mut rig = Rig::new();
    let init = rig.run("c", &["/bin/sleep", "1000"]);
    let pid = rig.monitor_pid();
    let refused = rig.error(Verb::Shutdown(Shutdown { force: false }));
    assert_eq!(refused.kind(), Kind::Invalid);
    rig.done(Verb::Shutdown(Shutdown { force: true }));
    wait_until("both are gone", || !alive(init) && !alive(pid));
    assert_eq!(rig.exit_file("c")["signal"], 9);
    assert!(!rig.pod.join("monitor.sock").exists());
}

#[test]
fn a_monitor_nobody_can_reach_leaves_when_its_containers_have() {
    let mut rig = Rig::new();
    let pid = rig.monitor_pid();
    let init = rig.run("c", &["/bin/sleep", "1000"]);
    fs::remove_dir_all(&rig.pod).unwrap();
    std::thread::sleep(Duration::from_millis(1200));
    assert!(alive(pid) && alive(init));
    rig.kill("c", 9);
    wait_until("it leaves", || !alive(pid));
}

#[test]
fn sigterm_is_obeyed_only_when_no_container_is_alive() {
    let mut rig = Rig::new();
    let pid = rig.monitor_pid();
    rig.run("c", &["/bin/sleep", "1000"]);
    let terminate = nix::sys::signal::SIGTERM;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), terminate).unwrap();
    assert!(rig.connect()[0].started);
    rig.kill("c", 9);
    wait_until("it leaves", || !alive(pid));
    assert_eq!(rig.exit_file("c")["signal"], 9);
}

#[test]
fn an_idle_pod_costs_no_time() {
    let mut rig = Rig::new();
    rig.run("c", &["/bin/sleep", "1000"]);
    let pid = rig.monitor_pid();
    let switches = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
        lines.map(|line| line.rsplit('\t').next().unwrap().parse::<u64>().unwrap()).sum::<u64>()
    };
    // The end of `start` may still be on its way through the loop.
    std::thread::sleep(Duration::from_millis(100));
    let before = switches();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(switches(), before);
}

#[test]
fn a_pod_costs_little_memory() {
    let rigs: Vec<Rig> = (0..PODS)
        .map(|_| {
            let mut rig = Rig::new();
            rig.run_shell("c", "seq 1 20000; sleep 1000");
            wait_until("all is logged", || {
                fs::read_to_string(rig.log_path("c")).unwrap().ends_with(" 20000\n")
            });
            rig
        })
        .collect();
    let figures = rigs.iter().map(|rig| {
        let path = format!("/proc/{}/smaps_rollup", rig.monitor_pid());
        let rollup = fs::read_to_string(path).unwrap();
        let figure = |name: &str| {
            let line = rollup.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
        };
        (figure("Rss:"), figure("Pss:"), figure("Pss_Anon:"))
    });
    for (rss, pss, private) in figures {
        println!("KiB with {PODS} pods: RSS {rss}, PSS {pss}, private {private}");
        assert!(pss < PSS_BUDGET && private < PRIVATE_BUDGET);
    }
}
