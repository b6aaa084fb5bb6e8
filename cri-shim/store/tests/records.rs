//! Records, transactions and intents, compared with a plain map over reopenings.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed test panics")]

use std::collections::BTreeMap;

use pinion_store::{Error, INTENTS, Intent, Store, Table};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Pod {
    name: String,
    attempt: u32,
}

/// The same table as an older build sees it: a field is missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct OlderPod {
    name: String,
}

const PODS: Table<Pod> = Table::new("pods");
const OLDER_PODS: Table<OlderPod> = Table::new("pods");
const NAMES: Table<String> = Table::new("names");

fn pod(name: &str) -> Pod {
    Pod { name: name.to_owned(), attempt: 1 }
}

fn open(dir: &tempfile::TempDir) -> Store {
    let opened = Store::open(dir.path().join("store.redb")).unwrap();
    assert_eq!(opened.quarantined, None);
    opened.store
}

#[test]
fn what_was_written_is_there_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    open(&dir)
        .write(|tx| {
            tx.put(PODS, "a", &pod("one"))?;
            tx.put(NAMES, "one", &"a".to_owned())?;
            assert_eq!(tx.get(PODS, "a")?, Some(pod("one")), "a transaction sees its own writes");
            Ok(())
        })
        .unwrap();
    let store = open(&dir);
    assert_eq!(store.get(PODS, "a").unwrap(), Some(pod("one")));
    assert_eq!(store.get(NAMES, "one").unwrap().as_deref(), Some("a"));
    assert_eq!(store.get(PODS, "b").unwrap(), None);
}

#[test]
fn a_transaction_that_fails_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let refused = store.write(|tx| {
        tx.put(PODS, "a", &pod("one"))?;
        tx.append_step("no such intent", json!({}))
    });
    assert!(matches!(refused, Err(Error::NoIntent { .. })));
    assert!(store.list(PODS).unwrap().records.is_empty());
}

#[test]
fn a_table_that_was_never_written_lists_as_empty() {
    let dir = tempfile::tempdir().unwrap();
    let listing = open(&dir).list(PODS).unwrap();
    assert!(listing.records.is_empty() && listing.bad.is_empty());
}

#[test]
fn records_of_another_version_are_listed_as_bad_beside_the_good_ones() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    store.write(|tx| tx.put(PODS, "good", &pod("one"))).unwrap();
    store.write(|tx| tx.put(OLDER_PODS, "old", &OlderPod { name: "two".into() })).unwrap();

    let listing = store.list(PODS).unwrap();
    assert_eq!(listing.records, [("good".to_owned(), pod("one"))]);
    assert_eq!(listing.bad.len(), 1);
    assert_eq!(listing.bad[0].0, "old");
    assert!(listing.bad[0].1.contains("attempt"), "{}", listing.bad[0].1);
    assert!(matches!(store.get(PODS, "old"), Err(Error::Decode { .. })));

    assert!(store.write(|tx| tx.set_aside(PODS, "old")).unwrap());
    assert!(store.list(PODS).unwrap().bad.is_empty());
    let kept = store.get(Table::<OlderPod>::new("set-aside"), "pods/old").unwrap();
    assert_eq!(kept, Some(OlderPod { name: "two".into() }));
}

#[test]
fn an_intent_survives_until_it_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = {
        let store = open(&dir);
        let first = store.begin_intent("run-pod-sandbox", "pod-1").unwrap();
        let second = store.begin_intent("create-container", "ctr-1").unwrap();
        store.append_step(&first.id, json!({"mount": "/run/x"})).unwrap();
        store.append_step(&first.id, json!({"cgroup": "/kubepods/x"})).unwrap();
        store.finish_intent(&second.id).unwrap();
        (first, second)
    };
    assert!(first.id < second.id, "ids sort by age");
    let store = open(&dir);
    let open = store.unfinished_intents().unwrap();
    let steps = vec![json!({"mount": "/run/x"}), json!({"cgroup": "/kubepods/x"})];
    assert_eq!(open.records, [(first.id.clone(), Intent { steps, ..first.clone() })]);

    store.finish_intent(&first.id).unwrap();
    store.finish_intent(&first.id).unwrap(); // undo may be repeated
    assert!(store.unfinished_intents().unwrap().records.is_empty());
    assert!(matches!(store.append_step(&first.id, json!(1)), Err(Error::NoIntent { .. })));
    assert!(store.begin_intent("again", "pod-1").unwrap().id > second.id, "ids are never reused");
}

#[test]
fn a_damaged_intent_counter_does_not_reuse_an_open_id() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let first = store.begin_intent("k", "s").unwrap();
    store.write(|tx| tx.put(Table::new("intent-sequence"), "last", &"text".to_owned())).unwrap();
    assert!(store.begin_intent("k", "s").unwrap().id > first.id);
    assert_eq!(store.list(INTENTS).unwrap().records.len(), 2);
}

#[test]
fn many_threads_write_one_after_another() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let store = store.clone();
            scope.spawn(move || {
                for n in 0..20 {
                    let key = format!("{thread}-{n}");
                    store.write(|tx| tx.put(PODS, &key, &pod(&key))).unwrap();
                    assert!(store.get(PODS, &key).unwrap().is_some());
                }
            });
        }
    });
    assert_eq!(store.list(PODS).unwrap().records.len(), 160);
}

#[derive(Debug, Clone)]
enum Step {
    Put(String, u32),
    Delete(String),
    Aborted(String),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let key = "[a-d]{0,2}";
    prop_oneof![
        4 => (key, any::<u32>()).prop_map(|(k, v)| Step::Put(k, v)),
        2 => key.prop_map(Step::Delete),
        1 => key.prop_map(Step::Aborted),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn the_store_behaves_as_a_map(steps in prop::collection::vec(step(), 1..30)) {
        let dir = tempfile::tempdir().unwrap();
        let numbers = Table::<u32>::new("numbers");
        let mut store = open(&dir);
        let mut model = BTreeMap::new();
        for step in steps {
            match step {
                Step::Put(key, value) => {
                    store.write(|tx| tx.put(numbers, &key, &value)).unwrap();
                    model.insert(key, value);
                }
                Step::Delete(key) => {
                    let was = store.write(|tx| tx.delete(numbers, &key)).unwrap();
                    prop_assert_eq!(was, model.remove(&key).is_some());
                }
                Step::Aborted(key) => {
                    let aborted: Result<(), _> = store.try_write(|tx| {
                        tx.delete(numbers, &key)?;
                        Err(Error::NoIntent { id: key.clone() })
                    });
                    prop_assert!(aborted.is_err());
                }
                Step::Reopen => {
                    drop(store);
                    store = open(&dir);
                }
            }
            let listing = store.list(numbers).unwrap();
            prop_assert_eq!(listing.records, model.clone().into_iter().collect::<Vec<_>>());
        }
    }
}
