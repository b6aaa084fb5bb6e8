//! Runs of consecutive syscall numbers that share one fate.

use crate::abi::{Abi, X32_BIT};
use crate::profile::{Action, Fate, Policy, Table};

/// What a foreign ABI gets.
pub(crate) const FOREIGN: Action = libc::SECCOMP_RET_KILL_PROCESS;

const ENOSYS: Action = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

/// The numbers `low..=high`, and what happens to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) low: u32,
    pub(crate) high: u32,
    pub(crate) fate: Fate,
}

/// The runs of every audit architecture, covering all of `0..=u32::MAX` without gaps.
pub(crate) fn by_architecture(policy: &Policy) -> Vec<(u32, Vec<Run>)> {
    let mut sections: Vec<(u32, Vec<Run>)> = Vec::new();
    for table in policy.tables.iter().filter(|table| table.abi != Abi::X32) {
        let mut runs = Runs::default();
        if table.abi == Abi::X86_64 {
            runs.table(table, policy.default, 0, X32_BIT - 1);
            match policy.tables.iter().find(|table| table.abi == Abi::X32) {
                Some(x32) => runs.table(x32, policy.default, X32_BIT, u32::MAX - 1),
                None => runs.push(X32_BIT, u32::MAX - 1, Fate::Always(FOREIGN)),
            }
            // -1 is what a tracer sets to skip a call, in either numbering.
            runs.push(u32::MAX, u32::MAX, Fate::Always(policy.default));
        } else {
            runs.table(table, policy.default, 0, u32::MAX);
        }
        sections.push((table.abi.audit_arch(), runs.0));
    }
    sections
}

/// Runs by ascending number.
#[derive(Debug, Default)]
pub(crate) struct Runs(pub(crate) Vec<Run>);

impl Runs {
    /// Appends `low..=high`, merging with the run before when that ends just below and in
    /// the same way.
    pub(crate) fn push(&mut self, low: u32, high: u32, fate: Fate) {
        match self.0.last_mut() {
            Some(last) if last.fate == fate && last.high + 1 == low => last.high = high,
            _ => self.0.push(Run { low, high, fate }),
        }
    }

    /// Appends everything one table says about `low..=high`, without gaps.
    fn table(&mut self, table: &Table, default: Action, low: u32, high: u32) {
        let mut next = low;
        for run in &table.runs.0 {
            if run.low > next {
                self.push(next, run.low - 1, Fate::Always(default));
            }
            self.push(run.low, run.high, run.fate.clone());
            next = run.high + 1;
        }
        match table.last_known {
            Some(last) if last < high => {
                if last >= next {
                    self.push(next, last, Fate::Always(default));
                }
                self.push(last + 1, high, Fate::Always(ENOSYS));
            }
            _ if next <= high => self.push(next, high, Fate::Always(default)),
            _ => {}
        }
    }
}
