//! Several suites in a row, each in a process of its own, and one line of totals.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::assets;
use crate::error::{During, Result, ensure};

/// A suite: what it is called, and the harness's arguments for it.
type Suite = (&'static str, &'static [&'static str]);

/// What runs inside the virtual node.
const IN_NODE: [Suite; 6] = [
    ("the crates' own tests", &["crates"]),
    ("isolation", &["isolation"]),
    ("kubelet", &["kubelet"]),
    ("crash", &["crash", "host"]),
    ("bad input", &["badinput", "host"]),
    ("critest, conformance", &["critest", "host", "--focus", "Conformance"]),
];

/// Everything, from a host.
const ALL: [Suite; 11] = [
    ("size and start of pinion", &["budget"]),
    ("critest on this machine", &["critest", "host"]),
    ("critest over WebSocket, in parallel", &["critest", "host", "--websocket", "--parallel", "4"]),
    ("crash on this machine", &["crash", "host"]),
    ("bad input on this machine", &["badinput", "host"]),
    (
        "pods that come and go, on this machine",
        &["churn", "host", "--in-sequence", "60", "--list-ms", "100"],
    ),
    ("pods in virtual machines", &["vm"]),
    ("demo on this machine", &["demo", "host"]),
    ("devices in the node", &["devices", "node"]),
    ("demo in the node", &["demo", "node"]),
    ("all suites in the node", &["node", "suite"]),
];

/// Runs what is meant for the inside of the node.
pub(crate) fn in_node() -> Result<()> {
    run(&IN_NODE, Vec::new())
}

/// What runs only in a source tree, before the harness's own suites.
const IN_SOURCE: [(&str, &[&str]); 5] = [
    ("format", &["cargo", "fmt", "--all", "--", "--check"]),
    (
        "lints",
        &[
            "cargo",
            "clippy",
            "--release",
            "--locked",
            "--workspace",
            "--all-targets",
            "--",
            "-Dwarnings",
        ],
    ),
    ("layering", &["tests/layering.sh"]),
    ("unit tests", &["cargo", "test", "--release", "--locked", "--workspace", "--no-fail-fast"]),
    ("podman and containerd on pinion", &["tests/clients/run.sh"]),
];

/// Runs everything; in a source tree the checks and tests of the sources too.
pub(crate) fn all() -> Result<()> {
    let mut first = Vec::new();
    if Path::new("Cargo.toml").exists() {
        for (name, words) in IN_SOURCE {
            let mut command = Command::new(words[0]);
            command.args(&words[1..]);
            if name == "podman and containerd on pinion" {
                command.arg(assets::binary("pinion")?);
            }
            first.push((name, command));
        }
    }
    run(&ALL, first)
}

fn run(suites: &[Suite], first: Vec<(&'static str, Command)>) -> Result<()> {
    let own = std::env::current_exe().during(|| "find this executable".into())?;
    let ours = suites.iter().map(|(name, arguments)| {
        let mut command = Command::new(&own);
        command.args(*arguments);
        (*name, command)
    });
    let mut lines = Vec::new();
    let mut failed = 0;
    for (name, mut command) in first.into_iter().chain(ours) {
        println!("\n════ {name}");
        let started = Instant::now();
        let status = command.status().during(|| format!("run the suite {name}"))?;
        failed += usize::from(!status.success());
        let verdict = if status.success() { "ok    " } else { "FAILED" };
        lines.push(format!("{verdict}  {:>5.0} s  {name}", started.elapsed().as_secs_f32()));
    }
    println!("\n{}", lines.join("\n"));
    println!("suites: {} passed, {failed} failed", lines.len() - failed);
    ensure(failed == 0, || format!("{failed} suites failed"))
}
