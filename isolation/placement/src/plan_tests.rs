//! Tests of planning: plans compared as data, and whole runs over directories of files.

use proptest::prelude::*;

use super::*;
use crate::testtree::{Tree, relative};
use crate::{EnforceError, Verdict, enforce, undo};

fn cpus(list: &str) -> CpuSet {
    list.parse().unwrap()
}

fn target(cgroup: &str, list: &str) -> Target {
    Target {
        cgroup: relative(cgroup),
        cpus: Some(cpus(list)),
        mems: Some("0".parse().unwrap()),
        ..Target::default()
    }
}

fn isolated(strict: bool) -> Request {
    Request { partition: Some(PartitionKind::Isolated), strict, ..Request::default() }
}

fn planned(
    tree: &Tree,
    release: &str,
    target: &Target,
    request: &Request,
) -> Result<Plan, Refusal> {
    plan(&Facts::read(&tree.host(release), target).unwrap(), target, request)
}

fn writes(tree: &Tree, plan: &Plan) -> Vec<String> {
    let root = tree.path("cgroup");
    let path =
        |step: &Step| step.path.strip_prefix(&root).unwrap_or(&step.path).display().to_string();
    plan.steps.iter().map(|step| format!("{} = {}", path(step), step.value)).collect()
}

#[test]
fn a_remote_partition_is_widened_from_the_top_and_asked_for_last() {
    let tree = Tree::with_groups();
    let plan = planned(&tree, "6.12", &target("k/b/p1/c1", "2-3"), &isolated(true)).unwrap();
    assert_eq!(
        writes(&tree, &plan),
        [
            "k/cpuset.cpus.exclusive = 2-3",
            "k/b/cpuset.cpus.exclusive = 2-3",
            "k/b/p1/cpuset.cpus.exclusive = 2-3",
            "k/b/p1/c1/cpuset.cpus.exclusive = 2-3",
            "k/b/p1/c1/cpuset.cpus = 2-3",
            "k/b/p1/c1/cpuset.mems = 0",
            "k/b/p1/c1/cpuset.cpus.partition = isolated",
        ]
    );
    assert!(plan.release.is_empty() && plan.shortfalls.is_empty());
}

#[test]
fn what_others_hold_is_kept_when_widening_and_undone_without_touching_it() {
    let tree = Tree::with_groups();
    for group in ["k", "k/b", "k/b/p2", "k/b/p2/c1"] {
        tree.file(&format!("cgroup/{group}/cpuset.cpus.exclusive"), "6-7");
    }
    let plan = planned(&tree, "6.12", &target("k/b/p1/c1", "2-3"), &isolated(true)).unwrap();
    assert_eq!(
        writes(&tree, &plan)[..3],
        [
            "k/cpuset.cpus.exclusive = 2-3,6-7",
            "k/b/cpuset.cpus.exclusive = 2-3,6-7",
            "k/b/p1/cpuset.cpus.exclusive = 2-3",
        ]
    );
    let mut journal = Vec::new();
    crate::apply(&plan, &mut |step| {
        journal.push(step.clone());
        Ok(())
    })
    .unwrap();
    assert_eq!(journal.len(), plan.steps.len());
    undo(&tree.host("6.12"), &journal).unwrap();
    assert_eq!(tree.text("cgroup/k/cpuset.cpus.exclusive"), "6-7");
    assert_eq!(tree.text("cgroup/k/b/cpuset.cpus.exclusive"), "6-7");
    assert_eq!(tree.text("cgroup/k/b/p1/cpuset.cpus.exclusive"), "");
    assert_eq!(tree.text("cgroup/k/b/p1/c1/cpuset.cpus.partition"), "member");
    assert_eq!(tree.text("cgroup/k/b/p2/c1/cpuset.cpus.exclusive"), "6-7");
}

#[test]
fn a_partition_in_force_needs_no_write_and_a_move_shrinks_last() {
    let tree = Tree::with_groups();
    for group in ["k", "k/b", "k/b/p1", "k/b/p1/c1"] {
        tree.file(&format!("cgroup/{group}/cpuset.cpus.exclusive"), "2-3");
    }
    tree.file("cgroup/k/b/p1/c1/cpuset.cpus", "2-3");
    tree.file("cgroup/k/b/p1/c1/cpuset.mems", "0");
    tree.file("cgroup/k/b/p1/c1/cpuset.cpus.partition", "isolated");
    let plan = planned(&tree, "6.12", &target("k/b/p1/c1", "2-3"), &isolated(true)).unwrap();
    assert_eq!(writes(&tree, &plan), Vec::<String>::new());

    let plan = planned(&tree, "6.12", &target("k/b/p1/c1", "4-5"), &isolated(true)).unwrap();
    assert_eq!(
        writes(&tree, &plan),
        [
            "k/cpuset.cpus.exclusive = 2-5",
            "k/b/cpuset.cpus.exclusive = 2-5",
            "k/b/p1/cpuset.cpus.exclusive = 2-5",
            "k/b/p1/c1/cpuset.cpus.exclusive = 4-5",
            "k/b/p1/c1/cpuset.cpus = 4-5",
        ]
    );
    crate::apply(&plan, &mut |_| Ok(())).unwrap();
    undo(&tree.host("6.12"), &plan.release).unwrap();
    for group in ["k", "k/b", "k/b/p1"] {
        assert_eq!(tree.text(&format!("cgroup/{group}/cpuset.cpus.exclusive")), "4-5");
    }
}

#[test]
fn an_invalid_partition_is_left_before_it_is_asked_for_again() {
    let tree = Tree::with_groups();
    tree.file("cgroup/k/b/p1/c1/cpuset.cpus.partition", "isolated invalid (some reason)");
    let plan = planned(&tree, "6.12", &target("k/b/p1/c1", "2-3"), &isolated(true)).unwrap();
    let writes = writes(&tree, &plan);
    assert_eq!(
        writes[writes.len() - 2..],
        ["k/b/p1/c1/cpuset.cpus.partition = member", "k/b/p1/c1/cpuset.cpus.partition = isolated",]
    );
}

#[test]
fn quotas_are_lifted_where_the_workload_owns_them_and_reported_above() {
    let tree = Tree::with_groups();
    tree.file("cgroup/k/b/p1/c1/cpu.max", "200000 100000");
    tree.file("cgroup/k/b/p1/cpu.max", "210000 100000");
    let owned = planned(&tree, "6.12", &target("k/b/p1/c1", "2-3"), &isolated(true)).unwrap();
    let quota: Vec<_> =
        owned.steps.iter().filter(|step| step.term == TermName::NoThrottling).collect();
    assert_eq!(quota.len(), 2);
    assert_eq!(quota[0].path, tree.path("cgroup/k/b/p1/cpu.max"));
    assert_eq!(quota[0].check, Check::Text("max 100000".to_owned()));
    assert!(matches!(&quota[0].undo, UndoStep::RestoreQuota { old, .. } if old == "210000 100000"));
    assert!(matches!(&quota[1].undo, UndoStep::Restore { old, .. } if old == "200000 100000"));

    let request = Request { owned_levels: 0, ..isolated(true) };
    let refusal = planned(&tree, "6.12", &target("k/b/p1/c1", "2-3"), &request).unwrap_err();
    assert_eq!((refusal.term, refusal.reason), (TermName::NoThrottling, Reason::Quota));
    assert!(refusal.detail.contains(r#"k/b/p1/cpu.max limits"#), "{}", refusal.detail);
    let request = Request { owned_levels: 0, ..isolated(false) };
    let plan = planned(&tree, "6.12", &target("k/b/p1/c1", "2-3"), &request).unwrap();
    assert_eq!(plan.shortfalls.len(), 1);
}

fn refusal(tree: &Tree, release: &str, cgroup: &str, list: &str) -> (Reason, String) {
    let refusal = planned(tree, release, &target(cgroup, list), &isolated(true)).unwrap_err();
    (refusal.reason, refusal.detail)
}

#[test]
fn impossible_sets_are_refused_with_names_and_numbers() {
    let tree = Tree::with_groups();
    tree.file("cgroup/k/b/p2/cpuset.cpus.exclusive", "6-7");
    tree.file("cgroup/k/b/p2/c1/cpuset.cpus.exclusive", "6-7");
    let (reason, detail) = refusal(&tree, "6.12", "k/b/p1/c1", "4-7");
    assert_eq!(reason, Reason::CpusHeld);
    assert!(detail.starts_with("CPUs 6-7 of 4-7 are held exclusively by"), "{detail}");
    assert!(detail.contains("k/b/p2/c1;"), "the deepest holder is named: {detail}");
    assert_eq!(refusal(&tree, "6.12", "k/b/p1/c1", "8-9").0, Reason::CpusOffline);
    assert_eq!(refusal(&tree, "6.12", "k/b/p1/c1", "").0, Reason::NoCpus);
    tree.file("cgroup/cpuset.cpus.effective", "0-5");
    assert_eq!(refusal(&tree, "6.12", "k/b/p1/c1", "0-5").0, Reason::NoCpusLeft);
    let (reason, detail) = refusal(&tree, "6.12", "k/b/p1/c1", "3-4");
    assert_eq!(reason, Reason::NotWholeCores);
    assert!(detail.contains("share cores with CPUs 2,5"), "{detail}");
    tree.file("sys/devices/system/cpu/isolated", "2,5");
    planned(&tree, "6.12", &target("k/b/p1/c1", "3-4"), &isolated(true)).unwrap();
}

#[test]
fn kernels_without_the_needed_partitions_are_told_apart() {
    let tree = Tree::with_groups();
    let drop_file = |name: &str| {
        for group in ["k", "k/b", "k/b/p1", "k/b/p1/c1"] {
            std::fs::remove_file(tree.path(&format!("cgroup/{group}/{name}"))).unwrap();
        }
    };
    drop_file("cpuset.cpus.exclusive");
    assert_eq!(refusal(&tree, "6.1.0", "k/b/p1/c1", "2-3").0, Reason::NoRemotePartitions);
    let local = planned(&tree, "6.1.0", &target("k", "2-3"), &isolated(true)).unwrap();
    assert_eq!(
        writes(&tree, &local),
        ["k/cpuset.cpus = 2-3", "k/cpuset.mems = 0", "k/cpuset.cpus.partition = isolated"]
    );
    assert_eq!(refusal(&tree, "5.15.0", "k", "2-3").0, Reason::NoPartitions);
    let root = Request { partition: Some(PartitionKind::Root), ..isolated(true) };
    planned(&tree, "5.15.0", &target("k", "2-3"), &root).unwrap();
    drop_file("cpuset.cpus.partition");
    assert_eq!(refusal(&tree, "4.19.0", "k/b/p1/c1", "2-3").0, Reason::NoPartitions);
    drop_file("cpuset.cpus");
    assert_eq!(refusal(&tree, "6.12", "k/b/p1/c1", "2-3").0, Reason::NoCpusetController);
}

#[test]
fn on_v1_strict_is_refused_and_otherwise_only_quotas_are_lifted() {
    let tree = Tree::with_machine();
    tree.file("v1/cpu/k/c1/cpu.cfs_quota_us", "200000");
    tree.file("v1/cpu/k/cpu.cfs_quota_us", "-1");
    tree.file("v1/cpuset/k/c1/cpuset.cpus", "2-3");
    let controllers = ["cpu", "cpuset"];
    let v1 =
        controllers.map(|name| (name.to_owned(), tree.path(&format!("v1/{name}/k/c1")))).into();
    let target = Target { cgroup: None, v1, ..target("", "2-3") };
    let refused = planned(&tree, "6.18", &target, &isolated(true)).unwrap_err();
    assert_eq!((refused.term, refused.reason), (TermName::ExclusiveCpus, Reason::CgroupV1));
    let plan = planned(&tree, "6.18", &target, &isolated(false)).unwrap();
    assert_eq!(plan.shortfalls, [refused]);
    assert_eq!(plan.steps.len(), 1);
    assert_eq!(plan.steps[0].path, tree.path("v1/cpu/k/c1/cpu.cfs_quota_us"));
    assert_eq!(plan.steps[0].value, "-1");
}

#[test]
fn hugepage_wishes_that_cannot_be_are_refused_before_any_proof() {
    let tree = Tree::with_groups();
    let prefault = |node, size: &str, pages| Request {
        prefault: vec![crate::Grant { node, size: size.parse().unwrap(), pages }],
        strict: true,
        ..Request::default()
    };
    let mut target = Target { mems: None, ..target("k/b/p1/c1", "2-3") };
    let reason = |target: &Target, request: &Request| {
        planned(&tree, "6.12", target, request).unwrap_err().reason
    };
    assert_eq!(reason(&target, &prefault(3, "2MB", 1)), Reason::NoSuchPool);
    assert_eq!(reason(&target, &prefault(0, "1GB", 1)), Reason::NoSuchPool);
    target.mems = Some("0".parse().unwrap());
    assert_eq!(reason(&target, &prefault(1, "2MB", 1)), Reason::NodeNotAllowed);
    target.hugepages.insert("2MB".parse().unwrap(), 2 << 20);
    assert_eq!(reason(&target, &prefault(0, "2MB", 2)), Reason::HugepageLimit);
    planned(&tree, "6.12", &target, &prefault(0, "2MB", 1)).unwrap();
    tree.file("sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages", "0");
    assert_eq!(reason(&target, &prefault(0, "2MB", 1)), Reason::PoolExhausted);
}

/// Files take every write, so a plan "succeeds" while nothing else of a kernel follows.
#[test]
fn writes_that_change_nothing_are_found_out_and_undone_if_strict() {
    let tree = Tree::with_groups();
    let (host, target) = (tree.host("6.12"), target("k/b/p1/c1", "2-3"));
    let mut journal = Vec::new();
    let mut record = |step: &UndoStep| {
        journal.push(step.clone());
        Ok(())
    };
    let error = enforce(&host, &target, &isolated(true), &mut record).unwrap_err();
    let EnforceError::Refused { refusal, failures } = error else { panic!("{error}") };
    assert_eq!(refusal.reason, Reason::EffectiveDiffers, "{refusal}");
    assert!(failures.is_empty());
    assert_eq!(journal.len(), 7);
    assert_eq!(tree.text("cgroup/k/cpuset.cpus.exclusive"), "");
    assert_eq!(tree.text("cgroup/k/b/p1/c1/cpuset.cpus"), "");
    let receipt = enforce(&host, &target, &isolated(false), &mut |_| Ok(())).unwrap();
    assert_eq!(receipt.verdict, Verdict::Degraded);
    let term = receipt.term(TermName::ExclusiveCpus).unwrap();
    assert!(term.reason.as_ref().unwrap().contains("other groups have the CPUs"));
}

#[test]
fn a_journal_that_fails_midway_leaves_nothing_behind() {
    let tree = Tree::with_groups();
    let mut left = 4;
    let error =
        enforce(&tree.host("6.12"), &target("k/b/p1/c1", "2-3"), &isolated(false), &mut |_| {
            left -= 1;
            if left == 0 { Err(std::io::Error::other("disk full")) } else { Ok(()) }
        });
    assert!(matches!(error, Err(EnforceError::Journal(_))), "{error:?}");
    for group in ["k", "k/b", "k/b/p1", "k/b/p1/c1"] {
        assert_eq!(tree.text(&format!("cgroup/{group}/cpuset.cpus.exclusive")), "");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn undo_restores_any_tree_exactly(
        wanted in prop::collection::btree_set(1u32..8, 1..4),
        held in prop::collection::btree_set(1u32..8, 0..4),
        upto in 0usize..8,
    ) {
        let set = |ids: &std::collections::BTreeSet<u32>| {
            let mut set = CpuSet::new();
            ids.iter().for_each(|&id| set.insert(id).unwrap());
            set
        };
        let (wanted, held) = (set(&wanted), set(&held));
        let tree = Tree::with_groups();
        let shared = ["k", "k/b"];
        for group in shared.iter().chain(&["k/b/p2", "k/b/p2/c1"]) {
            tree.file(&format!("cgroup/{group}/cpuset.cpus.exclusive"), &held.to_string());
        }
        let result = planned(&tree, "6.12", &target("k/b/p1/c1", &wanted.to_string()), &isolated(false));
        let plan = result.unwrap();
        let held_refused = plan.shortfalls.iter().any(|shortfall| shortfall.reason == Reason::CpusHeld);
        prop_assert_eq!(held_refused, !wanted.is_disjoint(&held));
        // A crash after any number of steps must be as undoable as a completed plan.
        let cut = Plan { steps: plan.steps[..upto.min(plan.steps.len())].to_vec(), ..plan };
        let mut journal = Vec::new();
        crate::apply(&cut, &mut |step| { journal.push(step.clone()); Ok(()) }).unwrap();
        for group in shared {
            let now: CpuSet = tree.text(&format!("cgroup/{group}/cpuset.cpus.exclusive")).parse().unwrap();
            prop_assert!(held.is_subset(&now), "others keep what they hold");
        }
        undo(&tree.host("6.12"), &journal).unwrap();
        for group in shared {
            let now = tree.text(&format!("cgroup/{group}/cpuset.cpus.exclusive"));
            prop_assert_eq!(now, held.to_string());
        }
        for file in ["cpuset.cpus", "cpuset.cpus.exclusive", "cpuset.mems"] {
            prop_assert_eq!(tree.text(&format!("cgroup/k/b/p1/c1/{file}")), "");
        }
    }
}
