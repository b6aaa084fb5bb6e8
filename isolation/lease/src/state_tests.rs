//! Leases against a tree of files: taken, shared, interrupted at every record, given back.

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::Wish;

/// A machine of files; entries as a store would keep them.
struct Machine {
    dir: tempfile::TempDir,
    store: BTreeMap<Setting, Entry>,
    /// Fails the recording from this one on, counting down; then nothing more is recorded.
    records_left: usize,
}

impl Machine {
    fn new() -> Self {
        let machine =
            Self { dir: tempfile::tempdir().unwrap(), store: BTreeMap::new(), records_left: 1000 };
        machine.file("sys/devices/system/cpu/online", "0-7");
        machine.file("proc/irq/default_smp_affinity", "ff");
        for (irq, cpus) in [(1, "0-7"), (4, "0-1"), (24, "2"), (25, "0-3")] {
            machine.file(&format!("proc/irq/{irq}/smp_affinity_list"), cpus);
        }
        for cpu in 0..8 {
            machine.file(
                &format!("sys/devices/system/cpu/cpu{cpu}/power/pm_qos_resume_latency_us"),
                "0",
            );
        }
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn irq(&self, irq: u32) -> String {
        fs::read_to_string(self.path(&format!("proc/irq/{irq}/smp_affinity_list"))).unwrap()
    }

    /// Every file with its text.
    fn dump(&self) -> BTreeMap<PathBuf, String> {
        let mut dump = BTreeMap::new();
        let mut pending = vec![self.dir.path().to_owned()];
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(dir).unwrap().flatten() {
                if entry.file_type().unwrap().is_dir() {
                    pending.push(entry.path());
                } else {
                    dump.insert(entry.path(), fs::read_to_string(entry.path()).unwrap());
                }
            }
        }
        dump
    }

    fn pass(&mut self, state: &mut State) -> Result<Report, ReconcileError> {
        let (store, left) = (&mut self.store, &mut self.records_left);
        let root = self.dir.path().to_owned();
        state.reconcile(&root, &mut |records| {
            if *left == 0 {
                return Err(io::Error::other("disk full"));
            }
            *left -= 1;
            for record in records {
                match record {
                    Record::Put(entry) => drop(store.insert(entry.setting.clone(), entry.clone())),
                    Record::Drop(setting) => drop(store.remove(setting)),
                }
            }
            Ok(())
        })
    }

    /// A process that starts over what the store has.
    fn restart(&self, leases: Leases) -> State {
        State::restore("boot-1", leases, self.store.values().cloned()).0
    }
}

fn quiet(cpus: &str) -> Vec<Wish> {
    vec![Wish::QuietCpus { cpus: cpus.parse().unwrap() }]
}

#[test]
fn interrupts_leave_and_come_back_exactly() {
    let mut machine = Machine::new();
    let before = machine.dump();
    let mut state = machine.restart(Leases::new());
    state.lease("a", quiet("2-3"));
    let report = machine.pass(&mut state).unwrap();
    assert_eq!(report.written.len(), 4, "{report:?}"); // 1, 24, 25 and the default
    assert_eq!((machine.irq(1), machine.irq(4)), ("0-1,4-7".into(), "0-1".into()));
    assert_eq!((machine.irq(24), machine.irq(25)), ("0-1,4-7".into(), "0-1".into()));
    let default = fs::read_to_string(machine.path("proc/irq/default_smp_affinity")).unwrap();
    assert_eq!(default, "f3");
    assert_eq!(machine.pass(&mut state).unwrap(), Report::default(), "a second pass is idle");
    state.lease("b", quiet("6-7"));
    machine.pass(&mut state).unwrap();
    assert_eq!(machine.irq(1), "0-1,4-5");
    state.release("a");
    machine.pass(&mut state).unwrap();
    assert_eq!((machine.irq(1), machine.irq(24)), ("0-5".into(), "2".into()));
    state.release("b");
    machine.pass(&mut state).unwrap();
    assert_eq!(machine.dump(), before);
    assert!(machine.store.is_empty() && state.is_idle());
}

#[test]
fn a_new_interrupt_is_followed_and_later_gets_the_old_default() {
    let mut machine = Machine::new();
    let mut state = machine.restart(Leases::new());
    state.lease("a", quiet("2-3"));
    machine.pass(&mut state).unwrap();
    machine.file("proc/irq/40/smp_affinity_list", "0-1,4-7"); // born under our default
    machine.file("proc/irq/41/smp_affinity_list", "3"); // its driver chose
    machine.pass(&mut state).unwrap();
    assert_eq!((machine.irq(40), machine.irq(41)), ("0-1,4-7".into(), "0-1,4-7".into()));
    state.release("a");
    machine.pass(&mut state).unwrap();
    assert_eq!((machine.irq(40), machine.irq(41)), ("0-7".into(), "3".into()));
    assert!(machine.store.is_empty());
}

#[test]
fn nothing_is_written_that_is_not_recorded() {
    let mut machine = Machine::new();
    let before = machine.dump();
    machine.records_left = 0;
    let mut state = machine.restart(Leases::new());
    state.lease("a", quiet("2-3"));
    let error = machine.pass(&mut state).unwrap_err();
    assert!(error.to_string().contains("4 settings"), "{error}");
    assert_eq!(machine.dump(), before);
}

#[test]
fn a_missing_file_is_a_refusal_said_once() {
    let mut machine = Machine::new();
    let mut state = machine.restart(Leases::new());
    let cpus: CpuSet = "2".parse().unwrap();
    let governor = "performance".to_owned();
    state.lease("a", vec![Wish::Governor { cpus: cpus.clone(), governor }]);
    let report = machine.pass(&mut state).unwrap();
    assert_eq!(report.refused.len(), 1, "{report:?}");
    assert_eq!(machine.pass(&mut state).unwrap(), Report::default());
    assert!(state.refused()[&Setting::Governor { cpu: 2 }].reason.contains("no such file"));
    state.lease("a", vec![Wish::ResumeLatency { cpus, limit: "n/a".into() }]);
    machine.pass(&mut state).unwrap();
    assert!(state.refused().is_empty());
}

#[test]
fn entries_of_another_boot_are_dropped_unread() {
    let machine = Machine::new();
    let entry = |boot: &str, irq| Entry {
        setting: Setting::IrqAffinity { irq },
        old: "5".into(),
        ours: vec!["0-7".into()],
        owners: vec![],
        boot: boot.into(),
        present: vec![],
    };
    let (state, gone) =
        State::restore("boot-1", Leases::new(), [entry("boot-0", 1), entry("boot-1", 25)]);
    assert_eq!(gone, [Setting::IrqAffinity { irq: 1 }]);
    assert_eq!(state.entries().count(), 1);
    drop(machine);
}

/// Death after any number of recordings, with any part of the writes done: a start over the
/// store gives everything back.
#[test]
fn death_at_any_point_loses_nothing() {
    for records in 0..6 {
        for undone in 0..4 {
            let mut machine = Machine::new();
            let before = machine.dump();
            machine.records_left = records;
            let mut state = machine.restart(Leases::new());
            for (owner, cpus) in [("a", "2-3"), ("b", "4-5")] {
                state.lease(owner, quiet(cpus));
                let _dies = machine.pass(&mut state);
            }
            state.release("a");
            let _dies = machine.pass(&mut state);
            // Some writes never came: those files say what they said before all of it.
            let mut left = undone;
            for (path, text) in &before {
                if left > 0 && fs::read_to_string(path).unwrap() != *text {
                    fs::write(path, text).unwrap();
                    left -= 1;
                }
            }
            machine.records_left = 1000;
            let mut fresh = machine.restart(Leases::new());
            machine.pass(&mut fresh).unwrap();
            assert_eq!(machine.dump(), before, "{records} recordings, {undone} not written");
            assert!(machine.store.is_empty());
        }
    }
}
