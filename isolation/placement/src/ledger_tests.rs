//! Tests of the ledger, the property tests included.

use proptest::prelude::*;

use super::*;

fn size(text: &str) -> PageSize {
    text.parse().unwrap()
}

fn pool(node: u32, total: u64) -> NodePool {
    NodePool { node, size: size("2MB"), total, foreign: 0 }
}

fn demand(pages: u64, nodes: Option<&str>) -> HugepageDemand {
    let nodes = nodes.map(|nodes| nodes.parse().unwrap());
    HugepageDemand { size: size("2MB"), pages, nodes }
}

fn nodes(list: &str) -> NodeSet {
    list.parse().unwrap()
}

#[test]
fn a_second_claimant_of_a_node_is_refused_with_numbers() {
    let mut ledger = Ledger::new([pool(0, 64), pool(1, 64)]);
    ledger.grant("upf/dpdk", &[demand(40, Some("1"))], &nodes("")).unwrap();
    let refusal = ledger.grant("web/app", &[demand(32, Some("1"))], &nodes("")).unwrap_err();
    assert_eq!(refusal.reason, Reason::PoolExhausted);
    assert_eq!(
        refusal.detail,
        "node 1 has 64 pages of 2MB, 40 granted to upf/dpdk, 24 left, 32 asked; \
         ask for fewer, free some, or raise nr_hugepages of the node"
    );
    assert_eq!(ledger.left(1, size("2MB")), 24);
}

#[test]
fn a_demand_without_nodes_goes_near_the_cpus_else_to_the_emptiest_node() {
    let mut ledger = Ledger::new([pool(0, 64), pool(1, 48)]);
    let near = ledger.grant("a", &[demand(16, None)], &nodes("1")).unwrap();
    assert_eq!(near[0].node, 1);
    let far = ledger.grant("b", &[demand(40, None)], &nodes("1")).unwrap();
    assert_eq!(far[0].node, 0, "node 1 has 32 left");
    let spread = ledger.grant("c", &[demand(50, None)], &nodes("")).unwrap();
    assert_eq!(spread.iter().map(|grant| grant.pages).sum::<u64>(), 50);
    assert_eq!(spread.len(), 2, "no single node has 50 left");
}

#[test]
fn pages_in_use_by_strangers_are_not_granted() {
    let mut ledger = Ledger::new([NodePool { foreign: 60, ..pool(0, 64) }]);
    let refusal = ledger.grant("a", &[demand(8, Some("0"))], &nodes("")).unwrap_err();
    assert!(refusal.detail.contains("60 in use outside the ledger, 4 left, 8 asked"));
}

#[test]
fn a_size_or_node_without_a_pool_is_named() {
    let mut ledger = Ledger::new([pool(0, 4)]);
    let giant = HugepageDemand { size: size("1GB"), pages: 1, nodes: None };
    let refusal = ledger.grant("a", &[giant], &nodes("")).unwrap_err();
    assert_eq!(refusal.reason, Reason::NoSuchPool);
    assert_eq!(
        refusal.detail,
        "this machine has no pool of 1GB pages (sizes with a pool: 2MB), 1 asked"
    );
    let refusal = ledger.grant("a", &[demand(1, Some("7"))], &nodes("")).unwrap_err();
    assert!(refusal.detail.starts_with("node 7 has no pool of 2MB"), "{}", refusal.detail);
}

#[test]
fn a_failed_replacement_keeps_the_earlier_grant() {
    let mut ledger = Ledger::new([pool(0, 8)]);
    ledger.grant("a", &[demand(4, None)], &nodes("")).unwrap();
    let before = ledger.clone();
    ledger.grant("a", &[demand(9, None)], &nodes("")).unwrap_err();
    assert_eq!(ledger, before);
    ledger.grant("a", &[demand(8, None)], &nodes("")).unwrap();
    assert_eq!(ledger.left(0, size("2MB")), 0);
}

#[test]
fn a_pool_that_shrinks_below_its_grants_is_reported_with_the_containers() {
    let mut ledger = Ledger::new([pool(0, 8), pool(1, 8)]);
    ledger.grant("a", &[demand(6, Some("0"))], &nodes("")).unwrap();
    let drift = ledger.observe([pool(0, 4), pool(1, 12)]);
    let resized = |node, before, now| Drift::Resized { node, size: size("2MB"), before, now };
    assert_eq!(drift[..2], [resized(0, 8, 4), resized(1, 8, 12)]);
    assert_eq!(
        drift[2],
        Drift::Overcommitted {
            node: 0,
            size: size("2MB"),
            total: 4,
            granted: 6,
            foreign: 0,
            containers: vec!["a".to_owned()],
        }
    );
    assert_eq!(ledger.observe([pool(0, 8), pool(1, 12)]), [resized(0, 4, 8)]);
}

#[test]
fn restored_grants_that_no_longer_fit_are_kept_and_reported() {
    let mut ledger = Ledger::new([pool(0, 4)]);
    let grant = Grant { node: 0, size: size("2MB"), pages: 6 };
    let drift = ledger.restore([("a".to_owned(), vec![grant])]);
    assert!(matches!(drift.as_slice(), [Drift::Overcommitted { granted: 6, .. }]));
    assert_eq!(ledger.release("a"), [grant]);
    assert_eq!(ledger.release("a"), []);
}

#[derive(Debug, Clone)]
enum Op {
    Grant(u8, Vec<HugepageDemand>),
    Release(u8),
}

fn demands() -> impl Strategy<Value = HugepageDemand> {
    let nodes = prop::option::of(prop::collection::btree_set(0u32..4, 1..3));
    (0u64..40, any::<bool>(), nodes).prop_map(|(pages, big, nodes)| HugepageDemand {
        size: size(if big { "1GB" } else { "2MB" }),
        pages,
        nodes: nodes.map(|nodes| {
            let mut set = NodeSet::new();
            nodes.into_iter().for_each(|node| set.insert(node).unwrap());
            set
        }),
    })
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        3 => (0u8..6, prop::collection::vec(demands(), 0..4)).prop_map(|(c, d)| Op::Grant(c, d)),
        1 => (0u8..6).prop_map(Op::Release),
    ];
    prop::collection::vec(op, 0..40)
}

proptest! {
    #[test]
    fn the_sum_of_grants_never_exceeds_a_pool(
        totals in prop::collection::vec((0u64..64, 0u64..16), 8),
        ops in ops(),
    ) {
        let pools: Vec<NodePool> = totals
            .iter()
            .enumerate()
            .map(|(index, &(total, foreign))| NodePool {
                node: index as u32 / 2,
                size: size(if index % 2 == 0 { "2MB" } else { "1GB" }),
                total,
                foreign: foreign.min(total),
            })
            .collect();
        let mut ledger = Ledger::new(pools.clone());
        for op in ops {
            let before = ledger.clone();
            match op {
                Op::Grant(container, demands) => {
                    let name = format!("c{container}");
                    match ledger.grant(&name, &demands, &NodeSet::new()) {
                        Ok(grants) => {
                            let asked: u64 = demands.iter().map(|demand| demand.pages).sum();
                            let given: u64 = grants.iter().map(|grant| grant.pages).sum();
                            prop_assert_eq!(asked, given, "all or nothing");
                        }
                        Err(_) => prop_assert_eq!(&ledger, &before),
                    }
                }
                Op::Release(container) => {
                    ledger.release(&format!("c{container}"));
                }
            }
            for pool in &pools {
                let granted = ledger.granted(pool.node, pool.size);
                prop_assert!(granted + pool.foreign <= pool.total);
                prop_assert_eq!(ledger.left(pool.node, pool.size), pool.total - pool.foreign - granted);
            }
        }
        let names: Vec<String> = ledger.grants().map(|(name, _)| name.to_owned()).collect();
        names.iter().for_each(|name| { ledger.release(name); });
        prop_assert_eq!(ledger, Ledger::new(pools), "releasing everything restores the start");
    }
}
