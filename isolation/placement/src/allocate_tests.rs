//! The choice of CPUs on machines made of data: whole cores, one node, never a taken one.

use proptest::prelude::*;

use super::*;
use crate::testtree::Tree;

/// Two sockets of `cores` cores of two threads, numbered one after the other.
fn machine(cores: u32, isolated: &str) -> Topology {
    let tree = Tree::new();
    let dir = "sys/devices/system";
    let last = cores * 4 - 1;
    tree.file(&format!("{dir}/cpu/present"), &format!("0-{last}"));
    tree.file(&format!("{dir}/cpu/online"), &format!("0-{last}"));
    tree.file(&format!("{dir}/cpu/isolated"), isolated);
    for cpu in 0..=last {
        let topology = format!("{dir}/cpu/cpu{cpu}/topology");
        let first = cpu & !1;
        tree.file(&format!("{topology}/core_id"), &(cpu / 2).to_string());
        tree.file(&format!("{topology}/physical_package_id"), &(cpu / (cores * 2)).to_string());
        tree.file(&format!("{topology}/thread_siblings_list"), &format!("{first}-{}", first + 1));
    }
    for node in 0..2 {
        let cpus = format!("{}-{}", node * cores * 2, (node + 1) * cores * 2 - 1);
        tree.file(&format!("{dir}/node/node{node}/cpulist"), &cpus);
        tree.file(&format!("{dir}/node/node{node}/meminfo"), "Node 0 MemTotal: 1024 kB");
    }
    Topology::read_from(&tree.host("6.12").root).unwrap()
}

fn set(text: &str) -> CpuSet {
    text.parse().unwrap()
}

struct Case {
    topology: Topology,
    caches: Vec<CpuSet>,
    reserved: CpuSet,
    taken: Vec<(String, CpuSet)>,
}

impl Case {
    fn new() -> Self {
        let topology = machine(4, "");
        Self { topology, caches: Vec::new(), reserved: CpuSet::new(), taken: Vec::new() }
    }

    fn ask(&self, count: usize, node: Option<u32>, prefer: &str) -> Result<String, Refusal> {
        let supply = CpuSupply {
            topology: &self.topology,
            caches: &self.caches,
            reserved: &self.reserved,
            taken: &self.taken,
        };
        let demand = CpuDemand { count, node };
        allocate(demand, &supply, &prefer.parse().unwrap()).map(|cpus| cpus.to_string())
    }
}

#[test]
fn one_node_is_filled_before_the_other_and_the_boot_core_is_kept() {
    let mut case = Case::new();
    assert_eq!(case.ask(4, None, "").unwrap(), "2-5", "the tighter node");
    assert_eq!(case.ask(4, Some(1), "").unwrap(), "8-11");
    assert_eq!(case.ask(4, None, "1").unwrap(), "8-11", "beside a device");
    assert_eq!(case.ask(8, None, "0").unwrap(), "8-15", "only node 1 has four whole cores");
    assert_eq!(case.ask(10, None, "").unwrap(), "2-3,8-15");
    case.reserved = set("2-3,8-9");
    case.taken = vec![("a/b".into(), set("10"))];
    assert_eq!(case.ask(4, None, "").unwrap(), "4-7");
    assert_eq!(
        case.ask(4, Some(1), "").unwrap(),
        "12-15",
        "a core of which a thread is taken is not free"
    );
}

#[test]
fn a_cache_that_holds_the_set_is_taken_before_two() {
    let mut case = Case::new();
    case.caches = vec![set("0-3"), set("4-7"), set("8-9"), set("10-15")];
    assert_eq!(case.ask(4, Some(0), "").unwrap(), "4-7");
    assert_eq!(case.ask(2, Some(1), "").unwrap(), "8-9", "the tightest cache");
    assert_eq!(case.ask(8, Some(1), "").unwrap(), "8-15");
    assert_eq!(case.ask(4, Some(1), "").unwrap(), "10-13");
}

#[test]
fn cpus_isolated_at_boot_come_first_and_are_never_mixed() {
    let mut case = Case::new();
    case.topology = machine(4, "12-15");
    assert_eq!(case.ask(2, None, "0").unwrap(), "12-13");
    assert_eq!(case.ask(4, Some(1), "").unwrap(), "12-15");
    assert_eq!(case.ask(6, None, "").unwrap(), "2-7", "too many for the isolated ones");
    assert!(case.ask(8, Some(1), "").is_err(), "half isolated, half not");
}

#[test]
fn refusals_carry_the_numbers() {
    let mut case = Case::new();
    case.taken = vec![("ns/pod/main".into(), set("8-13"))];
    let refusal = case.ask(4, Some(1), "").unwrap_err();
    assert_eq!(refusal.reason, Reason::CpusExhausted);
    assert!(
        refusal
            .detail
            .contains("node 1 has 8 CPUs, 8-13 of ns/pod/main, 2 in free whole cores; 4 asked"),
        "{refusal}"
    );
    let odd = case.ask(3, None, "").unwrap_err();
    assert_eq!(odd.reason, Reason::NotWholeCores);
    assert!(odd.detail.contains("ask for 2 or 4"), "{odd}");
    assert!(case.ask(0, None, "").is_err());
    assert!(case.ask(2, Some(7), "").unwrap_err().detail.contains("no NUMA node 7"));
}

proptest! {
    #[test]
    fn what_is_given_is_whole_free_and_as_much_as_was_asked(
        cores in 1usize..8,
        reserved in prop::collection::vec(0u32..16, 0..6),
        taken in prop::collection::vec(0u32..16, 0..6),
        node in prop::option::of(0u32..2),
    ) {
        let collect = |ids: Vec<u32>| ids.into_iter().fold(CpuSet::new(), |mut all, id| {
            all.insert(id).unwrap();
            all
        });
        let case = Case { reserved: collect(reserved), taken: vec![("x".into(), collect(taken))], ..Case::new() };
        if let Ok(text) = case.ask(cores * 2, node, "") {
            let given = set(&text);
            prop_assert_eq!(given.len(), cores * 2);
            prop_assert!(case.topology.whole_cores(&given));
            prop_assert!(given.is_disjoint(&case.reserved) && given.is_disjoint(&case.taken[0].1));
            prop_assert!(!given.contains(0));
            prop_assert_eq!(case.ask(cores * 2, node, "").unwrap(), text, "the same again");
        }
    }
}
