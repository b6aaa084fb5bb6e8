//! Whatever is in a file or a packet: a plan, or an error that names what is wrong; never a
//! panic, a hang, or a path outside.
//!
//! Documents of the corpus are changed in random places to odd values, and bytes are cut and
//! flipped. proptest shrinks a failure and keeps it in `hostile_input.proptest-regressions`,
//! which every later run tries first.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's helpers end the test")]

use std::os::fd::OwnedFd;
use std::path::{Component, Path};
use std::sync::LazyLock;

use pinion_cgroup::{Cgroup, CgroupPaths, Driver};
use pinion_container::config::{Parsed, Spec, load_exec_view, load_process, load_spec};
use pinion_container::error::chain;
use pinion_container::plan::{Facts, Plan};
use pinion_container::process::ProcessPlan;
use pinion_container::protocol::Channel;
use pinion_container::state::{self, StateDir};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use rustix::thread::CapabilitySet;
use serde_json::{Value, json};

/// Configurations that touch every section, one of them the usual one of a container.
static CORPUS: LazyLock<Vec<Value>> = LazyLock::new(|| {
    [
        include_str!("corpus/usual.json"),
        include_str!("corpus/everything.json"),
        include_str!("corpus/smallest.json"),
    ]
    .iter()
    .map(|text| serde_json::from_str(text).unwrap())
    .collect()
});

fn odd_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!(true)),
        prop::sample::select(vec![0, 1, -1, i64::MAX, i64::MIN, 1 << 32, 4096])
            .prop_map(Value::from),
        Just(json!(u64::MAX)),
        Just(json!(1.5e300)),
        prop::sample::select(vec![
            "",
            ".",
            "..",
            "/",
            "/..",
            "../../x",
            "/proc",
            "/proc/self/exe",
            "/dev/../etc",
            "a\0b",
            "0-",
            "-1",
            "0-99999999999",
            "1,,2",
            "=",
            "CAP_X",
            "user",
            "c",
            "rwm",
            "unbindable",
            "\u{1F980}",
            "MPOL_BIND",
            "SCMP_ACT_NOTIFY",
            "L3:0=f",
            "%s%n",
        ])
        .prop_map(Value::from),
        "[ -~]{0,40}".prop_map(Value::from),
        (1usize..5000).prop_map(|length| Value::from("x".repeat(length))),
        Just(json!([])),
        Just(json!({})),
        Just(json!([null])),
        (1usize..30).prop_map(|depth| (0..depth).fold(json!(0), |inner, _| json!([inner]))),
    ]
}

/// What is done to a document: at the n-th of its values, counted modulo their number.
#[derive(Clone, Debug)]
enum Change {
    Replace(u32, Value),
    Remove(u32),
    Double(u32),
    Rename(u32, String),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (any::<u32>(), odd_value()).prop_map(|(at, value)| Change::Replace(at, value)),
        2 => any::<u32>().prop_map(Change::Remove),
        1 => any::<u32>().prop_map(Change::Double),
        1 => (any::<u32>(), "[a-zA-Z]{0,8}").prop_map(|(at, name)| Change::Rename(at, name)),
    ]
}

/// JSON pointers to every value of a document.
fn pointers(value: &Value, here: &str, all: &mut Vec<String>) {
    all.push(here.to_owned());
    let escaped = |name: &str| name.replace('~', "~0").replace('/', "~1");
    match value {
        Value::Object(map) => {
            for (name, member) in map {
                pointers(member, &format!("{here}/{}", escaped(name)), all);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                pointers(item, &format!("{here}/{index}"), all);
            }
        }
        _ => {}
    }
}

fn apply(document: &mut Value, change: &Change) {
    let mut all = Vec::new();
    pointers(document, "", &mut all);
    let (Change::Replace(at, _) | Change::Remove(at) | Change::Double(at) | Change::Rename(at, _)) =
        change;
    let pointer = &all[*at as usize % all.len()];
    if let Change::Replace(_, value) = change {
        if let Some(place) = document.pointer_mut(pointer) {
            *place = value.clone();
        }
        return;
    }
    let Some((parent, last)) = pointer.rsplit_once('/') else { return };
    let last = last.replace("~1", "/").replace("~0", "~");
    match document.pointer_mut(parent) {
        Some(Value::Object(map)) => {
            let old = map.remove(&last);
            if let (Change::Rename(_, name), Some(old)) = (change, old) {
                map.insert(name.clone(), old);
            }
        }
        Some(Value::Array(items)) => {
            let Ok(index) = last.parse::<usize>() else { return };
            match change {
                Change::Double(_) => items.insert(index, items[index].clone()),
                _ => drop(items.remove(index)),
            }
        }
        _ => {}
    }
}

/// A document of the corpus after some changes.
fn document() -> impl Strategy<Value = Value> {
    let changes = prop::collection::vec(change(), 0..6);
    (0..CORPUS.len(), changes).prop_map(|(index, changes)| {
        let mut document = CORPUS[index].clone();
        changes.iter().for_each(|change| apply(&mut document, change));
        document
    })
}

/// The bytes of a document, some of them changed or cut off.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let flips = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (document(), flips, prop::option::of(any::<prop::sample::Index>())).prop_map(
        |(document, flips, cut)| {
            let mut bytes = serde_json::to_vec(&document).unwrap();
            for (at, byte) in flips {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            bytes
        },
    )
}

fn facts() -> Facts {
    Facts { capabilities: CapabilitySet::all(), privileged: true }
}

/// No `..` and no relative path may come out of a plan.
fn is_clean(path: &Path) -> bool {
    path.is_absolute() && path.components().all(|part| !matches!(part, Component::ParentDir))
}

fn check_plan(spec: &Spec) -> Result<(), TestCaseError> {
    let first = Plan::new(spec, Path::new("/bundle"), facts());
    let again = Plan::new(spec, Path::new("/bundle"), facts());
    prop_assert_eq!(first.is_ok(), again.is_ok(), "the verdict changes");
    match first {
        Err(error) => prop_assert!(chain(&error).len() > 8, "{:?} says nothing", error),
        Ok(plan) => {
            for mount in &plan.mounts {
                prop_assert!(is_clean(&mount.destination), "{:?}", mount.destination);
                prop_assert!(mount.destination != Path::new("/"));
            }
            for path in plan.masked.iter().chain(&plan.read_only) {
                prop_assert!(is_clean(path), "{:?}", path);
            }
            for device in plan.devices.iter().flatten() {
                prop_assert!(is_clean(&Path::new("/dev").join(&device.path)), "{:?}", device.path);
            }
            prop_assert!(is_clean(&plan.process.cwd) && !plan.process.args.is_empty());
            prop_assert!(plan.process.uid != u32::MAX && plan.process.gid != u32::MAX);
            check_limits(&plan);
        }
    }
    Ok(())
}

/// Writes limits where no cgroup is: they are planned, and the first write fails.
fn check_limits(plan: &Plan) {
    let directory = tempfile::tempdir().unwrap();
    let group = |v1: &[&str]| {
        let place = directory.path().join("group");
        Cgroup::open(CgroupPaths {
            driver: Driver::Cgroupfs,
            unified: v1.is_empty().then(|| place.clone()),
            v1: v1.iter().map(|name| ((*name).to_owned(), place.clone())).collect(),
            unit: None,
        })
    };
    let mut limits = plan.resources.clone();
    limits.set_devices(None);
    let _ = group(&[]).update(&limits);
    let _ = group(&["cpu", "cpuset", "memory", "pids", "blkio", "hugetlb"]).update(&limits);
    assert!(std::fs::read_dir(directory.path()).unwrap().next().is_none());
}

fn written(bytes: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    std::fs::write(&path, bytes).unwrap();
    (directory, path)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 500,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("proptest-regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_configuration_becomes_a_plan_or_an_error(document in document()) {
        let (_directory, path) = written(&serde_json::to_vec(&document).unwrap());
        if let Ok((Parsed { value, .. }, _)) = load_spec(&path) {
            check_plan(&value)?;
        }
    }

    #[test]
    fn damaged_bytes_become_a_plan_or_an_error(bytes in bytes()) {
        let (_directory, path) = written(&bytes);
        match load_spec(&path) {
            Ok((Parsed { value, .. }, _)) => check_plan(&value)?,
            Err(error) => prop_assert!(chain(&error).contains("config.json")),
        }
        let _ = load_exec_view(&path);
    }

    #[test]
    fn the_file_of_exec_becomes_a_process_or_an_error(document in document()) {
        let process = document.get("process").unwrap_or(&document);
        let (_directory, path) = written(&serde_json::to_vec(process).unwrap());
        if let Ok(Parsed { value, .. }) = load_process(&path)
            && let Ok((plan, _)) = ProcessPlan::plan(&value, CapabilitySet::all())
        {
            prop_assert!(is_clean(&plan.cwd) && !plan.args.is_empty());
        }
    }

    #[test]
    fn a_damaged_state_file_is_an_error_or_a_record(changes in prop::collection::vec(change(), 0..4), cut in prop::option::of(any::<prop::sample::Index>())) {
        let root = tempfile::tempdir().unwrap();
        let directory = StateDir::of(root.path(), "c1").unwrap();
        let _lock = directory.create().unwrap();
        let spec: Spec = serde_json::from_value(CORPUS[2].clone()).unwrap();
        let plan = Plan::new(&spec, Path::new("/bundle"), facts()).unwrap();
        directory.save(&state::Record::new("c1", &spec, Path::new("/bundle"), &plan)).unwrap();
        let file = std::fs::read_dir(directory.path()).unwrap().flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|end| end == "json"))
            .unwrap();
        let mut document: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        changes.iter().for_each(|change| apply(&mut document, change));
        let mut bytes = serde_json::to_vec(&document).unwrap();
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        std::fs::write(&file, &bytes).unwrap();
        if let Ok(record) = directory.load() {
            let _ = directory.status(&record);
            directory.save(&record).unwrap();
            prop_assert!(directory.load().is_ok(), "what was read cannot be read back");
        }
        prop_assert!(state::list(root.path()).is_ok(), "one bad container hides the others");
    }

    #[test]
    fn nonsense_on_the_channel_is_an_error(packet in prop::collection::vec(any::<u8>(), 1..600), text in "[ -~]{1,200}") {
        for bytes in [packet, text.into_bytes()] {
            let (ours, theirs) = Channel::pair().unwrap();
            let raw: &OwnedFd = &rustix::io::dup(&theirs).unwrap();
            rustix::io::write(raw, &bytes).unwrap();
            drop(theirs);
            prop_assert!(ours.hear().is_err());
            let (ours, theirs) = Channel::pair().unwrap();
            rustix::io::write(rustix::io::dup(&theirs).unwrap(), &bytes).unwrap();
            prop_assert!(ours.await_proceed().is_ok_and(|state| state.len() < bytes.len()));
        }
    }
}
