//! Scheduling policies, I/O priorities and CPU affinity, read from the kernel.

use serde_json::{Value, json};

use crate::bundle::{Bundle, is_pinion, is_runc_since};

fn output_of(script: &str, change: impl FnOnce(&mut Value)) -> String {
    let mut bundle = Bundle::new(script);
    change(&mut bundle.config);
    bundle.run().ok().trim().to_owned()
}

/// `nice`, `rt_priority` and `policy` of /proc/PID/stat.
const SCHEDULING: &str = "cut -d' ' -f19,40,41 /proc/self/stat";

#[test]
fn every_ordinary_policy_is_set() {
    if !is_runc_since(2) {
        return;
    }
    for (scheduler, seen) in [
        (json!({ "policy": "SCHED_OTHER", "nice": 7 }), "7 0 0"),
        (json!({ "policy": "SCHED_BATCH", "nice": 5 }), "5 0 3"),
        (json!({ "policy": "SCHED_IDLE" }), "0 0 5"),
    ] {
        let text = output_of(SCHEDULING, |config| config["process"]["scheduler"] = scheduler);
        assert_eq!(text, seen);
    }
}

#[test]
fn real_time_policies_are_set_or_the_kernels_refusal_is_told() {
    if !is_runc_since(2) {
        return;
    }
    for (scheduler, seen) in [
        (json!({ "policy": "SCHED_FIFO", "priority": 10 }), "0 10 1"),
        (
            json!({ "policy": "SCHED_RR", "priority": 20, "flags": ["SCHED_FLAG_RESET_ON_FORK"] }),
            "0 20 2",
        ),
        (
            json!({ "policy": "SCHED_DEADLINE", "runtime": 1_000_000, "deadline": 10_000_000,
                "period": 10_000_000 }),
            "0 0 6",
        ),
    ] {
        // The program itself, for a deadline task cannot have children.
        let mut bundle = Bundle::new("");
        bundle.config["process"]["args"] = json!(["cut", "-d ", "-f19,40,41", "/proc/self/stat"]);
        bundle.config["process"]["scheduler"] = scheduler.clone();
        let outcome = bundle.run();
        if outcome.code == Some(0) {
            assert_eq!(outcome.stdout.trim(), seen, "{scheduler}");
        } else {
            crate::bundle::moot!("{scheduler}: {}", outcome.stderr);
            outcome.fails_with("error setting scheduler");
        }
    }
}

#[test]
fn contradicting_parameters_are_refused() {
    if !is_pinion() {
        return;
    }
    for scheduler in [
        json!({ "policy": "SCHED_OTHER", "priority": 5 }),
        json!({ "policy": "SCHED_BATCH", "nice": 20 }),
        json!({ "policy": "SCHED_FIFO", "priority": 5, "runtime": 1 }),
    ] {
        let mut bundle = Bundle::new("true");
        bundle.config["process"]["scheduler"] = scheduler;
        bundle.run().fails_with("scheduler");
        bundle.assert_nothing_left();
    }
}

#[test]
fn io_priorities_are_set() {
    if !is_runc_since(2) {
        return;
    }
    // ionice(1) of the host asks about the container's process.
    for (class, priority, seen) in [
        ("IOPRIO_CLASS_BE", 6, "best-effort: prio 6"),
        ("IOPRIO_CLASS_IDLE", 0, "idle"),
        ("IOPRIO_CLASS_RT", 3, "realtime: prio 3"),
    ] {
        let mut bundle = Bundle::new("sleep 100");
        bundle.config["process"]["ioPriority"] = json!({ "class": class, "priority": priority });
        bundle.launch();
        let mut command = std::process::Command::new("ionice");
        let asked = crate::bundle::output(command.arg("-p").arg(bundle.pid().to_string()));
        let text = String::from_utf8(asked.stdout).unwrap();
        assert_eq!(text.trim(), seen);
    }
}

#[test]
fn exec_has_the_containers_scheduling_unless_told_otherwise() {
    if !is_runc_since(2) {
        return;
    }
    let mut bundle = Bundle::new("sleep 100");
    bundle.config["process"]["scheduler"] = json!({ "policy": "SCHED_BATCH", "nice": 3 });
    bundle.launch();
    assert_eq!(bundle.exec(SCHEDULING).ok().trim(), "3 0 3");
    let mut process = bundle.config["process"].clone();
    process["args"] = json!(["/bin/sh", "-c", SCHEDULING]);
    process["scheduler"] = json!({ "policy": "SCHED_IDLE" });
    process["ioPriority"] = json!({ "class": "IOPRIO_CLASS_IDLE", "priority": 0 });
    let file = bundle.path().join("process.json");
    std::fs::write(&file, process.to_string()).unwrap();
    let outcome = bundle.verb(&["exec", "--process", file.to_str().unwrap(), &bundle.id]);
    assert_eq!(outcome.ok().trim(), "0 0 5");
}

const AFFINITY: &str = "grep Cpus_allowed_list /proc/self/status | tr -d '\\t' | cut -d: -f2";

fn processors() -> usize {
    std::thread::available_parallelism().unwrap().get()
}

#[test]
fn exec_is_bound_to_its_final_processors() {
    if !is_runc_since(3) || processors() < 2 {
        crate::bundle::moot!("there is one processor");
        return;
    }
    let bundle = Bundle::new("sleep 100");
    bundle.launch();
    for (affinity, seen) in
        [(json!({ "initial": "0", "final": "1" }), "1"), (json!({ "final": "0" }), "0")]
    {
        let mut process = bundle.config["process"].clone();
        process["args"] = json!(["/bin/sh", "-c", AFFINITY]);
        process["execCPUAffinity"] = affinity;
        let file = bundle.path().join("process.json");
        std::fs::write(&file, process.to_string()).unwrap();
        let outcome = bundle.verb(&["exec", "--process", file.to_str().unwrap(), &bundle.id]);
        assert_eq!(outcome.ok().trim(), seen);
    }
    let mut process = bundle.config["process"].clone();
    process["execCPUAffinity"] = json!({ "final": "1-" });
    let file = bundle.path().join("process.json");
    std::fs::write(&file, process.to_string()).unwrap();
    let outcome = bundle.verb(&["exec", "--process", file.to_str().unwrap(), &bundle.id]);
    assert_ne!(outcome.code, Some(0));
}

#[test]
fn the_callers_processors_are_not_those_of_the_container() {
    if !is_runc_since(3) || processors() < 2 {
        crate::bundle::moot!("there is one processor");
        return;
    }
    let bundle = Bundle::new(&format!("{AFFINITY}; sleep 100"));
    bundle.write_config();
    let out = bundle.path().join("out");
    let run = bundle.command(&["run", "--detach", &bundle.id]);
    let mut command = std::process::Command::new("taskset");
    command.args(["-c", "0"]).arg(run.get_program()).args(run.get_args());
    command.current_dir(bundle.path()).stdout(std::fs::File::create(&out).unwrap());
    assert!(command.status().unwrap().success());
    crate::bundle::eventually(|| std::fs::read_to_string(&out).unwrap().contains('\n'));
    assert_ne!(std::fs::read_to_string(&out).unwrap().trim(), "0");
    assert_ne!(bundle.exec(AFFINITY).ok().trim(), "0");
}
