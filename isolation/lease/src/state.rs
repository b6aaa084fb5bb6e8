//! Leases and undo together, and the loop that makes the kernel agree with them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;

use pinion_topology::CpuSet;

use crate::{Entry, Leases, Move, Setting, Want, decide, files, irq, quiet_cpus, wanted};

/// A change of the undo journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// Keep this entry under its setting.
    Put(Entry),
    /// The setting owes nothing any more.
    Drop(Setting),
}

/// A wish the kernel does not grant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The value it was to have; empty if there was none.
    pub value: String,
    /// What the kernel answered.
    pub reason: String,
}

/// What one pass did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Settings written.
    pub written: Vec<Setting>,
    /// Settings that have their old value again.
    pub restored: Vec<Setting>,
    /// Settings that were refused in this pass and not before.
    pub refused: Vec<(Setting, String)>,
    /// Old values that could not be written; their entries stay.
    pub stuck: Vec<(Setting, String)>,
}

/// Why a pass was not made.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// The undo could not be recorded. Nothing was written.
    #[error("record the old values of {count} settings, {first} first")]
    Journal {
        /// How many.
        count: usize,
        /// One of them.
        first: Setting,
        /// What the journal answered.
        #[source]
        source: io::Error,
    },
    /// The machine's CPUs could not be read.
    #[error("read {path}")]
    Online {
        /// The file.
        path: std::path::PathBuf,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
}

/// See the crate's documentation.
#[derive(Debug, Default)]
pub struct State {
    leases: Leases,
    entries: BTreeMap<Setting, Entry>,
    refused: BTreeMap<Setting, Refused>,
    boot: String,
}

impl State {
    /// Takes over what was remembered. Entries of another boot than `boot` are left out and
    /// returned, to be dropped from the journal.
    #[must_use]
    pub fn restore(
        boot: &str,
        leases: Leases,
        entries: impl IntoIterator<Item = Entry>,
    ) -> (Self, Vec<Setting>) {
        let (here, gone): (Vec<_>, Vec<_>) =
            entries.into_iter().partition(|entry| entry.boot == boot);
        let entries = here.into_iter().map(|entry| (entry.setting.clone(), entry)).collect();
        let state = Self { leases, entries, refused: BTreeMap::new(), boot: boot.to_owned() };
        (state, gone.into_iter().map(|entry| entry.setting).collect())
    }

    /// Notes what an owner wants from now on, in place of what it wanted before.
    pub fn lease(&mut self, owner: &str, wishes: Vec<crate::Wish>) {
        if wishes.is_empty() {
            self.leases.remove(owner);
        } else {
            self.leases.insert(owner.to_owned(), wishes);
        }
    }

    /// Forgets what an owner wanted; false if it wanted nothing.
    pub fn release(&mut self, owner: &str) -> bool {
        self.leases.remove(owner).is_some()
    }

    /// Wishes by owner.
    #[must_use]
    pub fn leases(&self) -> &Leases {
        &self.leases
    }

    /// The undo of every setting that is not as it was.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    /// What the kernel does not grant, by setting.
    #[must_use]
    pub fn refused(&self) -> &BTreeMap<Setting, Refused> {
        &self.refused
    }

    /// Whether there is anything to watch over.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.leases.is_empty() && self.entries.is_empty()
    }

    /// Makes every setting below `root` say what it should. `record` has its changes on disk
    /// when it returns.
    pub fn reconcile(
        &mut self,
        root: &Path,
        record: &mut dyn FnMut(&[Record]) -> io::Result<()>,
    ) -> Result<Report, ReconcileError> {
        let mut report = Report::default();
        if self.is_idle() {
            self.refused.clear();
            return Ok(report);
        }
        let online = online(root)?;
        let before = self.entries.clone();
        let mut pass = Pass::default();
        self.adopt_newborn(root, &mut pass);
        let wants = self.wants(root);
        let settings: BTreeSet<Setting> =
            wants.keys().chain(self.entries.keys()).cloned().collect();
        self.refused.retain(|setting, _| settings.contains(setting));
        for setting in settings {
            self.look(root, &setting, wants.get(&setting), &online, &mut pass, &mut report);
        }
        if let Err(error) = commit(&pass, record) {
            self.entries = before; // what is not on disk does not exist
            return Err(error);
        }
        let mut drops = pass.drops;
        for (setting, old, value) in pass.writes {
            match write_checked(root, &setting, &value) {
                Ok(()) => report.written.push(setting),
                Err(reason) => {
                    let untouched = files::read(&setting.path(root)).ok().flatten();
                    if untouched.is_none_or(|now| setting.same(&now, &old)) {
                        drops.push(setting.clone());
                    }
                    self.refuse(setting, value, reason, &mut report);
                }
            }
        }
        for (setting, value) in pass.restores {
            match write_checked(root, &setting, &value) {
                Ok(()) => {
                    drops.push(setting.clone());
                    report.restored.push(setting);
                }
                Err(_) if !setting.path(root).exists() => drops.push(setting),
                Err(reason) => report.stuck.push((setting, reason)),
            }
        }
        drops.iter().for_each(|setting| drop(self.entries.remove(setting)));
        let records: Vec<Record> = drops.into_iter().map(Record::Drop).collect();
        if !records.is_empty() {
            // An entry that stays on disk is found to owe nothing by the next start.
            let _later = record(&records);
        }
        Ok(report)
    }

    /// What every setting is to say, interrupts included.
    fn wants(&self, root: &Path) -> BTreeMap<Setting, Want> {
        let mut wants = wanted(&self.leases);
        let quiet = quiet_cpus(&self.leases);
        if !quiet.is_empty() {
            let irqs = irq::numbers(root).into_iter().map(|irq| Setting::IrqAffinity { irq });
            let all = irqs.chain([Setting::DefaultIrqAffinity]);
            wants.extend(all.map(|setting| (setting, Want::Avoid(quiet.clone()))));
        }
        wants
    }

    /// Interrupts that came up under our default affinity owe the old one.
    fn adopt_newborn(&mut self, root: &Path, pass: &mut Pass) {
        let default = Setting::DefaultIrqAffinity;
        let Some(parent) = self.entries.get(&default).cloned() else { return };
        let sets = |texts: &[String]| -> Vec<CpuSet> {
            texts.iter().filter_map(|text| default.cpus(text)).collect()
        };
        let (ours, Some(old)) = (sets(&parent.ours), default.cpus(&parent.old)) else { return };
        for number in irq::numbers(root) {
            let setting = Setting::IrqAffinity { irq: number };
            if parent.present.contains(&number) || self.entries.contains_key(&setting) {
                continue;
            }
            let Ok(Some(current)) = files::read(&setting.path(root)) else { continue };
            let born =
                setting.cpus(&current).is_some_and(|cpus| cpus != old && ours.contains(&cpus));
            if born {
                let entry = Entry {
                    old: setting.text_of(&old),
                    ours: vec![current],
                    present: Vec::new(),
                    setting: setting.clone(),
                    ..parent.clone()
                };
                self.entries.insert(setting, entry.clone());
                pass.puts.push(entry);
            }
        }
    }

    fn look(
        &mut self,
        root: &Path,
        setting: &Setting,
        want: Option<&Want>,
        online: &CpuSet,
        pass: &mut Pass,
        report: &mut Report,
    ) {
        let current = match files::read(&setting.path(root)) {
            Ok(Some(current)) => current,
            Ok(None) => {
                if self.entries.contains_key(setting) {
                    pass.drops.push(setting.clone());
                }
                if let Some(Want::Is(value)) = want {
                    let reason = "this machine has no such file".to_owned();
                    self.refuse(setting.clone(), value.clone(), reason, report);
                }
                return;
            }
            Err(error) => {
                self.refuse(setting.clone(), String::new(), format!("read: {error}"), report);
                return;
            }
        };
        match decide(setting, &current, self.entries.get(setting), want, online) {
            Move::Stay => drop(self.refused.remove(setting)),
            Move::Forget => pass.drops.push(setting.clone()),
            Move::Restore { value } => pass.restores.push((setting.clone(), value)),
            Move::Hopeless => {
                let reason = "no CPU would be left to serve it".to_owned();
                self.refuse(setting.clone(), String::new(), reason, report);
            }
            Move::Write { old, before, value } => {
                // What the kernel refused once it refuses again; asking every second is noise.
                if self.refused.get(setting).is_some_and(|refused| refused.value == value) {
                    return;
                }
                let entry = self.entry(root, setting, old.clone(), vec![before, value.clone()]);
                self.entries.insert(setting.clone(), entry.clone());
                pass.puts.push(entry);
                pass.writes.push((setting.clone(), old, value));
            }
        }
    }

    fn entry(&self, root: &Path, setting: &Setting, old: String, ours: Vec<String>) -> Entry {
        let kept = self.entries.get(setting).filter(|entry| setting.same(&entry.old, &old));
        let present = match (setting, kept) {
            (Setting::DefaultIrqAffinity, Some(entry)) => entry.present.clone(),
            (Setting::DefaultIrqAffinity, None) => irq::numbers(root),
            _ => Vec::new(),
        };
        let owners = self.leases.keys().cloned().collect();
        Entry { setting: setting.clone(), old, ours, owners, boot: self.boot.clone(), present }
    }

    fn refuse(&mut self, setting: Setting, value: String, reason: String, report: &mut Report) {
        let refused = Refused { value, reason: reason.clone() };
        if self.refused.insert(setting.clone(), refused.clone()) != Some(refused) {
            report.refused.push((setting, reason));
        }
    }
}

/// What is to be done, in this order: puts, writes, restores, drops.
#[derive(Debug, Default)]
struct Pass {
    puts: Vec<Entry>,
    /// Setting, old value, new value.
    writes: Vec<(Setting, String, String)>,
    restores: Vec<(Setting, String)>,
    drops: Vec<Setting>,
}

/// Has the undo of every write on disk.
fn commit(
    pass: &Pass,
    record: &mut dyn FnMut(&[Record]) -> io::Result<()>,
) -> Result<(), ReconcileError> {
    let Some(first) = pass.puts.first() else { return Ok(()) };
    let records: Vec<Record> = pass.puts.iter().cloned().map(Record::Put).collect();
    record(&records).map_err(|source| ReconcileError::Journal {
        count: records.len(),
        first: first.setting.clone(),
        source,
    })
}

fn online(root: &Path) -> Result<CpuSet, ReconcileError> {
    let path = root.join("sys/devices/system/cpu/online");
    let failed = |source| ReconcileError::Online { path: path.clone(), source };
    let text = files::read(&path).map_err(failed)?;
    let text = text.ok_or_else(|| failed(io::Error::from(io::ErrorKind::NotFound)))?;
    text.parse().map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))
}

/// Writes and reads back; why not, in the kernel's words.
fn write_checked(root: &Path, setting: &Setting, value: &str) -> Result<(), String> {
    let path = setting.path(root);
    let written = setting.writable(value);
    files::write(&path, written).map_err(|error| format!("write {written:?}: {error}"))?;
    match files::read(&path) {
        Ok(Some(found)) if setting.same(&found, value) => Ok(()),
        Ok(Some(found)) => Err(format!("wrote {written:?}, it says {found:?}")),
        Ok(None) => Err("it is gone".to_owned()),
        Err(error) => Err(format!("read: {error}")),
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
