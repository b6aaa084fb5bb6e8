//! The crates' own tests that want a kernel: built on a host with the sources, run inside
//! the virtual node, which has cgroup v2, two NUMA nodes and huge pages.
//!
//! A test that cannot show its point on a machine prints `not possible here: <reason>` and
//! passes. Such a line is counted apart, with its reason in the summary: a pass that proves
//! nothing must not look like one that does.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::command;
use crate::error::{During, Error, Result, ensure};

/// The packages whose integration tests go into the node: those that see another kernel
/// interface there (cgroup v2, NUMA, hugepages, shared mounts) than on most hosts.
const PACKAGES: [&str; 5] =
    ["pinion-placement", "pinion-cgroup", "pinion", "pinion-monitor", "piniond"];
/// Where the node has them.
pub(crate) const NODE_DIR: &str = "/usr/local/lib/pinion-tests/crates";
/// A busybox without libraries, which the bundles of the tests are made of.
pub(crate) const NODE_BUSYBOX: &str = "/usr/local/lib/pinion-tests/busybox";
/// Where the tests look for it.
const BUSYBOX: &str = "/bin/busybox";
const BINARIES: &str = "/usr/local/bin";
/// The longest one test program may take.
const LONGEST: Duration = Duration::from_secs(600);
/// What a test says instead of proving something.
const MOOT: &str = "not possible here: ";

/// A test program and its name: package and target.
pub(crate) type Program = (String, PathBuf);

/// One line of cargo's JSON.
#[derive(Debug, Deserialize)]
struct Message {
    reason: String,
    #[serde(default)]
    package_id: String,
    target: Option<Target>,
    executable: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// Builds the test programs from the sources in the current directory.
pub(crate) fn build() -> Result<Vec<Program>> {
    ensure(Path::new("Cargo.toml").exists(), || {
        "the crates' own tests are built from the sources: run this in their directory".into()
    })?;
    let mut cargo = Command::new("cargo");
    // The whole workspace, as the unit tests do: another selection has other features, and
    // everything below would be built again.
    cargo.args(["test", "--release", "--locked", "--workspace", "--no-run"]);
    cargo.args(["--message-format=json-render-diagnostics", "--quiet"]);
    let programs = programs_in(&command::text(&mut cargo)?)?;
    ensure(!programs.is_empty(), || "cargo built no test program".into())?;
    Ok(programs)
}

fn programs_in(messages: &str) -> Result<Vec<Program>> {
    let mut programs = Vec::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Message =
            serde_json::from_str(line).during(|| format!("decode cargo's message {line}"))?;
        let (Some(target), Some(path)) = (message.target, message.executable) else { continue };
        let package = package(&message.package_id);
        if message.reason == "compiler-artifact"
            && target.kind == ["test"]
            && PACKAGES.contains(&package)
        {
            programs.push((format!("{package}-{}", target.name), path));
        }
    }
    Ok(programs)
}

/// The name in a package id, `path+file:///src/isolation/cgroup#pinion-cgroup@0.1.0`.
fn package(id: &str) -> &str {
    let name = id.rsplit('#').next().unwrap_or(id);
    name.split('@').next().unwrap_or(name)
}

/// What one program's tests came to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: usize,
    failed: usize,
    /// Reasons, and how often each was given.
    moot: BTreeMap<String, usize>,
}

impl Tally {
    /// Reads a program's output: libtest's last line, and what tests said of themselves.
    fn of(output: &str) -> Result<Self> {
        let mut tally = Self::default();
        for line in output.lines() {
            // with --nocapture it follows `test name ... `
            if let Some((_, reason)) = line.split_once(MOOT) {
                *tally.moot.entry(reason.to_owned()).or_default() += 1;
            }
        }
        let result = output.lines().rev().find(|line| line.starts_with("test result: "));
        let result = result.ok_or_else(|| Error::check("no result line"))?;
        let count = |word: &str| {
            let mut words = result.split([' ', ';', '.']).filter(|word| !word.is_empty());
            let mut last = "";
            words.find_map(|next| {
                let number = (next == word).then(|| last.parse().ok()).flatten();
                last = next;
                number
            })
        };
        let missing = || Error::check(format!("not understood: {result}"));
        tally.failed = count("failed").ok_or_else(missing)?;
        let passed: usize = count("passed").ok_or_else(missing)?;
        tally.passed = passed.saturating_sub(tally.moot.values().sum());
        if let Some(ignored @ 1..) = count("ignored") {
            *tally.moot.entry("ignored".into()).or_default() += ignored;
        }
        Ok(tally)
    }

    fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        for (reason, count) in other.moot {
            *self.moot.entry(reason).or_default() += count;
        }
    }
}

/// Runs every program in the node.
pub(crate) fn run() -> Result<()> {
    let listing = fs::read_dir(NODE_DIR).during(|| format!("list {NODE_DIR}"))?;
    let mut programs: Vec<PathBuf> = listing.flatten().map(|entry| entry.path()).collect();
    programs.sort();
    ensure(!programs.is_empty(), || format!("{NODE_DIR} is empty"))?;
    let _busybox = Cover::put()?;
    let mut total = Tally::default();
    for program in programs {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let began = Instant::now();
        let tally = one(&program).unwrap_or_else(|error| {
            println!("{name}: {}", error.chain());
            Tally { failed: 1, ..Tally::default() }
        });
        let moot: usize = tally.moot.values().sum();
        println!(
            "{:>5.0} s  {name}: {} passed, {} failed, {moot} not possible here",
            began.elapsed().as_secs_f32(),
            tally.passed,
            tally.failed
        );
        total.add(tally);
    }
    for (reason, count) in &total.moot {
        println!("not possible here, {count} times: {reason}");
    }
    let moot: usize = total.moot.values().sum();
    println!("{} passed, {} failed, {moot} not possible here", total.passed, total.failed);
    ensure(total.failed == 0, || format!("{} tests of crates failed", total.failed))
}

/// Runs one program; a failure's output is shown.
fn one(program: &Path) -> Result<Tally> {
    let binaries = Path::new(BINARIES);
    let output = Command::new("timeout")
        .arg(LONGEST.as_secs().to_string())
        .arg(program)
        .args(["--test-threads=1", "--nocapture"])
        .env("PINION_TEST_EMULATED", "1")
        .env("PINION_TEST_BIN", binaries)
        .env("PINION_RUNTIME", binaries.join("pinion"))
        .env("PINION_TEST_RUNTIME", binaries.join("pinion"))
        .env("PINION_TEST_MONITOR", binaries.join("pinion-monitor"))
        .stdin(Stdio::null())
        .output()
        .during(|| format!("run {}", program.display()))?;
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    if !output.status.success() {
        println!("{}\n{}", text[0], text[1]);
    }
    let tally = Tally::of(&text.concat())?;
    ensure(output.status.success() || tally.failed > 0, || {
        format!("ended with {}", output.status)
    })?;
    Ok(tally)
}

/// The static busybox over the node's own, for as long as this lives.
#[derive(Debug)]
struct Cover;

impl Cover {
    fn put() -> Result<Self> {
        let flags = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some(NODE_BUSYBOX), BUSYBOX, None::<&str>, flags, None::<&str>)
            .during(|| format!("bind {NODE_BUSYBOX} over {BUSYBOX}"))?;
        Ok(Self)
    }
}

impl Drop for Cover {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(BUSYBOX, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_integration_tests_are_taken_and_named_by_their_package() {
        let messages = r#"
{"reason":"compiler-artifact","package_id":"path+file:///s/cgroup#pinion-cgroup@0.1.0","target":{"name":"real","kind":["test"]},"executable":"/t/real-1"}
{"reason":"compiler-artifact","package_id":"path+file:///s/cli#pinion@0.1.0","target":{"name":"pinion","kind":["bin"]},"executable":"/t/pinion"}
{"reason":"compiler-artifact","package_id":"path+file:///s/cgroup#pinion-cgroup@0.1.0","target":{"name":"pinion_cgroup","kind":["lib"]},"executable":null}
{"reason":"build-finished","success":true}"#;
        let expected = [("pinion-cgroup-real".to_owned(), PathBuf::from("/t/real-1"))];
        assert_eq!(programs_in(messages).unwrap(), expected);
    }

    #[test]
    fn a_test_that_proved_nothing_is_not_a_pass() {
        let output = "running 3 tests\ntest a ... ok\ntest b ... not possible here: no runc\nok\n\
                      test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1.2s\n";
        let moot = BTreeMap::from([("no runc".to_owned(), 1), ("ignored".to_owned(), 1)]);
        assert_eq!(Tally::of(output).unwrap(), Tally { passed: 2, failed: 0, moot });
        assert!(Tally::of("killed\n").is_err());
    }
}
