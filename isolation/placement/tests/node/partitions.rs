//! Exclusive CPUs on a kernel with remote partitions: what the kernel was seen to do silently
//! must be prevented, or noticed and healed.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use pinion_placement::{PartitionKind, Reason, Request, Subject, TermName, Verdict, audit};

use pinion_topology::Topology;

use crate::tree::{Tree, host, isolated, place, read};

/// A process of somebody else, in the root group, free to run anywhere it is allowed to.
struct Bystander(Child);

impl Bystander {
    fn new() -> Self {
        Self(Command::new("sleep").arg("300").stdin(Stdio::null()).spawn().unwrap())
    }

    fn cpus(&self) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        line.unwrap().trim().to_owned()
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn domains(cpu: u32) -> usize {
    let schedstat = fs::read_to_string("/proc/schedstat").unwrap();
    let lines = schedstat.lines().skip_while(|line| !line.starts_with(&format!("cpu{cpu} ")));
    lines.skip(1).take_while(|line| line.starts_with("domain")).count()
}

fn lost(subject: &Subject) -> (Verdict, Reason, String) {
    let receipt = audit(&host(), subject);
    let term = receipt.term(TermName::ExclusiveCpus).unwrap();
    let reason = term.reason.clone().unwrap_or_default();
    (receipt.verdict, term.code.unwrap_or_else(|| panic!("{}", receipt.render())), reason)
}

pub(crate) fn a_container_deep_in_the_tree_gets_an_isolated_partition() {
    let tree = Tree::new(&["pod1/c1", "pod1/c2", "pod2/c1"]);
    let bystander = Bystander::new();
    let boot_isolated = Topology::read().unwrap().isolated.contains(2);
    let snapshot = || {
        let mut settings = tree.snapshot();
        if boot_isolated {
            // Linux 6.12 forgets boot isolation when a partition over such CPUs is left.
            settings.remove("cpuset.cpus.isolated");
        }
        settings
    };
    let (before, balanced) = (snapshot(), domains(2));
    assert_eq!(balanced == 0, boot_isolated);
    let placed = place(&tree.target("pod1/c1", "2-3", "0"), &isolated(true)).unwrap();
    println!("{}", placed.receipt.render());
    assert_eq!(placed.receipt.verdict, Verdict::Aligned);
    assert_eq!(tree.read("pod1/c1", "cpuset.cpus.partition"), "isolated");
    assert_eq!(tree.root("cpuset.cpus.isolated"), "2-3");
    assert_eq!(tree.read("pod1/c2", "cpuset.cpus.effective"), "0-1,4-7");
    assert_eq!((domains(2), domains(3)), (0, 0));
    assert_eq!(bystander.cpus(), "0-1,4-7");
    placed.undo();
    assert_eq!(snapshot(), before);
    placed.undo();
    assert_eq!(snapshot(), before, "undo is idempotent");
    assert_eq!(domains(2), balanced);
}

pub(crate) fn two_containers_share_ancestors_and_leave_independently() {
    let tree = Tree::new(&["pod1/c1", "pod1/c2", "pod2/c1"]);
    let before = tree.snapshot();
    let target = |group, cpus, mems| tree.target(group, cpus, mems);
    let first = place(&target("pod1/c1", "2-3", "0"), &isolated(true)).unwrap();
    let second = place(&target("pod2/c1", "6-7", "1"), &isolated(true)).unwrap();
    let third = place(&target("pod1/c2", "4-5", "1"), &isolated(true)).unwrap();
    assert_eq!(tree.root("cpuset.cpus.isolated"), "2-7");
    first.undo();
    for (group, cpus) in [("pod2/c1", "6-7"), ("pod1/c2", "4-5")] {
        assert_eq!(tree.read(group, "cpuset.cpus.partition"), "isolated");
        assert_eq!(tree.read(group, "cpuset.cpus.effective"), cpus);
    }
    assert_eq!(tree.read("pod1", "cpuset.cpus.exclusive"), "4-5");
    assert_eq!(tree.read("", "cpuset.cpus.exclusive"), "4-7");
    third.undo();
    second.undo();
    assert_eq!(tree.snapshot(), before);
}

pub(crate) fn rewrites_of_the_cpu_list_by_others_do_not_end_exclusivity() {
    let tree = Tree::new(&["pod1/c1", "pod2/c1"]);
    let target = tree.target("pod1/c1", "2-3", "0");
    let placed = place(&target, &isolated(true)).unwrap();
    let subject = Subject::new(&target, &isolated(true));
    for rewrite in ["2-3", "2-5", "4-5"] {
        tree.write("pod1/c1", "cpuset.cpus", rewrite);
        tree.write("pod2/c1", "cpuset.cpus", "0-7");
        assert_eq!(tree.read("pod1/c1", "cpuset.cpus.partition"), "isolated", "{rewrite}");
        assert_eq!(tree.read("pod1/c1", "cpuset.cpus.effective"), "2-3", "{rewrite}");
        assert_eq!(tree.read("pod2/c1", "cpuset.cpus.effective"), "0-1,4-7", "{rewrite}");
        assert_eq!(audit(&host(), &subject).verdict, Verdict::Aligned, "{rewrite}");
    }
    placed.undo();
}

pub(crate) fn growing_and_moving_keep_the_neighbour_and_trim_the_ancestors() {
    let tree = Tree::new(&["pod1/c1", "pod2/c1"]);
    let neighbour = place(&tree.target("pod2/c1", "6-7", "1"), &isolated(true)).unwrap();
    let before = tree.snapshot();
    let mut journals = Vec::new();
    for (cpus, mems, ancestors) in [
        ("2-3", "0", "2-3,6-7"),
        ("2-5", "0-1", "2-7"),
        ("4-5", "1", "4-7"),
        ("2-3", "0", "2-3,6-7"),
    ] {
        let placed = place(&tree.target("pod1/c1", cpus, mems), &isolated(true)).unwrap();
        assert_eq!(placed.receipt.verdict, Verdict::Aligned, "{}", placed.receipt.render());
        assert_eq!(tree.read("pod1/c1", "cpuset.cpus.effective"), cpus);
        assert_eq!(tree.read("", "cpuset.cpus.exclusive"), ancestors);
        assert_eq!(tree.read("pod2/c1", "cpuset.cpus.partition"), "isolated");
        journals.push(placed);
    }
    journals.iter().rev().for_each(|placed| placed.undo());
    assert_eq!(tree.snapshot(), before);
    neighbour.undo();
}

pub(crate) fn an_ancestor_overwritten_by_somebody_is_noticed_and_healed() {
    let tree = Tree::new(&["pod1/c1"]);
    let bystander = Bystander::new();
    let (target, request) = (tree.target("pod1/c1", "2-3", "0"), isolated(true));
    let placed = place(&target, &request).unwrap();
    let subject = Subject::new(&target, &request);
    tree.write("", "cpuset.cpus.exclusive", "6-7");
    let (verdict, code, reason) = lost(&subject);
    assert_eq!((verdict, code), (Verdict::Violated, Reason::PartitionInvalid));
    assert!(reason.contains(r#"the partition is "member", not isolated"#), "{reason}");
    assert!(reason.contains("tasks of others may run on the CPUs"), "{reason}");
    assert_eq!(bystander.cpus(), "0-7");
    let start = Instant::now();
    let healed = place(&target, &request).unwrap();
    println!("healed in {:?}", start.elapsed());
    assert_eq!(healed.receipt.verdict, Verdict::Aligned);
    assert_eq!(bystander.cpus(), "0-1,4-7");
    healed.undo();
    placed.undo();
}

pub(crate) fn an_emptied_ancestor_does_not_keep_cpus_isolated_for_nobody() {
    let tree = Tree::new(&["pod1/c1"]);
    let before = tree.snapshot();
    let placed = place(&tree.target("pod1/c1", "2-3", "0"), &isolated(true)).unwrap();
    for group in ["pod1", ""] {
        tree.write(group, "cpuset.cpus.exclusive", "");
        // The kernel says that all is well, and it is, until the partition is left.
        assert_eq!(tree.read("pod1/c1", "cpuset.cpus.partition"), "isolated");
    }
    placed.undo();
    assert_eq!(tree.snapshot(), before);
    place(&tree.target("pod1/c1", "2-3", "0"), &isolated(true)).unwrap().undo();
}

pub(crate) fn a_sibling_that_takes_the_cpus_is_noticed_named_and_healed() {
    let tree = Tree::new(&["pod1/c1", "pod1/c2"]);
    let (target, request) = (tree.target("pod1/c1", "2-3", "0"), isolated(true));
    let placed = place(&target, &request).unwrap();
    let subject = Subject::new(&target, &request);
    for overlap in ["0-7", "2-3"] {
        tree.write("pod1/c2", "cpuset.cpus", overlap);
        if tree.read("pod1/c1", "cpuset.cpus.partition") == "isolated" {
            println!("not possible here: this kernel shrinks the sibling instead");
            continue;
        }
        let (verdict, code, reason) = lost(&subject);
        assert_eq!((verdict, code), (Verdict::Violated, Reason::PartitionInvalid));
        assert!(reason.contains("declares the partition invalid"), "{reason}");
        if overlap == "0-7" {
            // It has other CPUs, so it can do without these.
            let healed = place(&target, &request).unwrap();
            assert_eq!(healed.receipt.verdict, Verdict::Aligned);
            assert_eq!(tree.read("pod1/c2", "cpuset.cpus"), "0-1,4-7");
            healed.undo();
            assert_eq!(tree.read("pod1/c2", "cpuset.cpus"), "0-7");
        } else {
            let refusal = place(&target, &request).err().unwrap();
            assert_eq!(refusal.reason, Reason::PartitionInvalid);
            assert!(refusal.detail.contains(&format!("pod1/c2 ({overlap})")), "{refusal}");
        }
        assert_eq!(tree.root("cpuset.cpus.isolated"), "", "no CPU stays isolated for nobody");
        tree.write("pod1/c2", "cpuset.cpus", "");
        place(&target, &request).unwrap();
        // The same without a failed attempt in between: asking again for a partition that is
        // still invalid would leave its CPUs isolated for nobody.
        tree.write("pod1/c2", "cpuset.cpus", overlap);
        tree.write("pod1/c2", "cpuset.cpus", "");
        let healed = place(&target, &request).unwrap();
        assert_eq!(healed.receipt.verdict, Verdict::Aligned, "{overlap}");
    }
    placed.undo();
    assert_eq!(tree.root("cpuset.cpus.isolated"), "");
}

pub(crate) fn half_a_core_is_refused_until_its_sibling_is_offline() {
    let tree = Tree::new(&["pod1/c1"]);
    let before = tree.snapshot();
    let target = tree.target("pod1/c1", "6", "1");
    let refusal = place(&target, &isolated(true)).err().unwrap();
    assert_eq!((refusal.term, refusal.reason), (TermName::WholeCores, Reason::NotWholeCores));
    assert!(refusal.detail.contains("share cores with CPUs 7"), "{refusal}");
    assert_eq!(tree.snapshot(), before);
    let lenient = place(&target, &isolated(false)).unwrap();
    assert_eq!(lenient.receipt.verdict, Verdict::Degraded);
    assert!(lenient.receipt.term(TermName::ExclusiveCpus).unwrap().in_force);
    lenient.undo();
    fs::write("/sys/devices/system/cpu/cpu7/online", "0").unwrap();
    let placed = place(&target, &isolated(true)).map(|placed| placed.undo());
    fs::write("/sys/devices/system/cpu/cpu7/online", "1").unwrap();
    placed.unwrap();
}

pub(crate) fn quotas_are_lifted_and_come_back() {
    let tree = Tree::new(&["pod1/c1", "pod1/c2"]);
    tree.write("pod1/c1", "cpu.max", "200000 100000");
    tree.write("pod1", "cpu.max", "400000 50000");
    let before = tree.snapshot();
    let first = place(&tree.target("pod1/c1", "2-3", "0"), &isolated(true)).unwrap();
    let second = place(&tree.target("pod1/c2", "4-5", "1"), &isolated(true)).unwrap();
    assert_eq!(tree.read("pod1/c1", "cpu.max"), "max 100000");
    assert_eq!(tree.read("pod1", "cpu.max"), "max 50000");
    assert!(first.receipt.term(TermName::NoThrottling).unwrap().in_force);
    first.undo();
    assert_eq!(tree.read("pod1", "cpu.max"), "max 50000", "the second still needs it");
    second.undo();
    first.undo();
    assert_eq!(tree.snapshot(), before);
    tree.write("", "cpu.max", "400000 100000");
    let refusal = place(&tree.target("pod1/c1", "2-3", "0"), &isolated(true)).err().unwrap();
    assert_eq!(refusal.reason, Reason::Quota, "{refusal}");
}

pub(crate) fn sets_that_cannot_be_are_refused_and_leave_no_trace() {
    let tree = Tree::new(&["pod1/c1", "pod2/c1"]);
    let holder = place(&tree.target("pod2/c1", "6-7", "1"), &isolated(true)).unwrap();
    let before = tree.snapshot();
    for (cpus, mems, reason) in [
        ("4-7", "1", Reason::CpusHeld),
        ("0-5", "0-1", Reason::NoCpusLeft),
        ("2-3,64", "0", Reason::CpusOffline),
        ("2-3", "1", Reason::MemoryNotLocal),
        ("2-3", "0-1", Reason::MemoryNotLocal),
    ] {
        let refusal = place(&tree.target("pod1/c1", cpus, mems), &isolated(true)).err().unwrap();
        println!("{refusal}");
        assert_eq!(refusal.reason, reason, "{refusal}");
        assert_eq!(tree.snapshot(), before, "{refusal}");
    }
    let lenient = place(&tree.target("pod1/c1", "4-7", "1"), &isolated(false)).unwrap();
    assert_eq!(lenient.receipt.verdict, Verdict::Degraded);
    assert_eq!(tree.read("pod2/c1", "cpuset.cpus.effective"), "6-7", "never taken from a holder");
    lenient.undo();
    holder.undo();
}

pub(crate) fn a_container_below_the_root_gets_a_local_partition() {
    let tree = Tree::new(&[]);
    fs::create_dir(&tree.top).unwrap();
    let target = pinion_placement::Target {
        cgroup: Some("/pinion-test".into()),
        ..tree.target("", "4-5", "1")
    };
    let placed = place(&target, &isolated(true)).unwrap();
    assert_eq!(placed.receipt.verdict, Verdict::Aligned, "{}", placed.receipt.render());
    assert_eq!(read(&tree.top.join("cpuset.cpus.partition")), "isolated");
    assert_eq!(tree.root("cpuset.cpus.effective"), "0-3,6-7");
    placed.undo();
    assert_eq!(tree.root("cpuset.cpus.effective"), "0-7");
}

pub(crate) fn a_root_partition_keeps_its_scheduling_domain() {
    let tree = Tree::new(&["pod1/c1"]);
    let request = Request { partition: Some(PartitionKind::Root), ..isolated(true) };
    let placed = place(&tree.target("pod1/c1", "4-7", "1"), &request).unwrap();
    assert_eq!(placed.receipt.verdict, Verdict::Aligned, "{}", placed.receipt.render());
    assert_eq!(tree.read("pod1/c1", "cpuset.cpus.partition"), "root");
    assert!(domains(4) > 0, "load is balanced within the partition");
    assert_eq!(tree.root("cpuset.cpus.effective"), "0-3");
    // The same container asks for the other kind: one write, without leaving in between.
    let isolated = place(&tree.target("pod1/c1", "4-7", "1"), &isolated(true)).unwrap();
    assert_eq!(isolated.journal.len(), 1);
    assert_eq!(tree.root("cpuset.cpus.isolated"), "4-7");
    placed.undo();
    assert_eq!(tree.root("cpuset.cpus.effective"), "0-7");
}
