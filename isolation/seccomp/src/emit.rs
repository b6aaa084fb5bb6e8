//! Instructions for a policy.
//!
//! Classic BPF jumps only forward, so the program is built from its last instruction to its
//! first: whatever is jumped to already exists and its distance is known. Conditional jumps
//! reach 255 instructions; a target farther away is repeated (a return) or relayed through
//! an unconditional jump, whichever it is costing one instruction.

use std::collections::HashMap;

use libc::sock_filter;

use crate::Error;
use crate::profile::{Action, Condition, Fate, Policy, Rule, Test};
use crate::ranges::{self, Run};

const MAX_INSTRUCTIONS: usize = 4096;

/// A run of at most this many lone numbers is found by comparing each in turn.
const LONERS: usize = 3;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

// linux/bpf_common.h; libc has these as u32.
const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const IF_GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const IF_NOT_LESS: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K

/// The program of a policy: architecture, then number, then arguments.
pub(crate) fn program(policy: &Policy) -> Result<Vec<sock_filter>, Error> {
    let mut assembler = Assembler::default();
    let mut sections = Vec::new();
    for (audit_arch, runs) in ranges::by_architecture(policy).into_iter().rev() {
        let entry = assembler.section(&runs, policy.default);
        sections.push((audit_arch, entry));
    }
    let mut entry = assembler.returning(ranges::FOREIGN);
    for (audit_arch, section) in sections {
        // The native section comes last out of the loop, so it is tested first.
        entry = assembler.branch(IF_EQUAL, audit_arch, section, entry);
    }
    assembler.load(ARCHITECTURE, entry);
    assembler.finish()
}

/// An instruction, counted from the program's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Label(usize);

#[derive(Default)]
struct Assembler {
    /// The program, last instruction first.
    reversed: Vec<sock_filter>,
    /// The nearest return of each value; there are only a few.
    returns: Vec<(Action, Label)>,
}

impl Assembler {
    fn finish(self) -> Result<Vec<sock_filter>, Error> {
        let mut program = self.reversed;
        if program.len() > MAX_INSTRUCTIONS {
            return Err(Error::TooLong { instructions: program.len() });
        }
        program.reverse();
        Ok(program)
    }

    fn push(&mut self, code: u16, jt: u8, jf: u8, k: u32) -> Label {
        self.reversed.push(sock_filter { code, jt, jf, k });
        Label(self.reversed.len() - 1)
    }

    /// How many instructions the next one would have to skip to get to `label`.
    fn distance(&self, label: Label) -> usize {
        self.reversed.len() - 1 - label.0
    }

    /// Something that does what `label` does, at most `limit` away from the next instruction.
    fn within(&mut self, label: Label, limit: usize) -> Label {
        let distance = self.distance(label);
        if distance <= limit {
            return label;
        }
        let target = self.reversed[label.0];
        if target.code == RETURN {
            let near = self.push(RETURN, 0, 0, target.k);
            self.returns.retain(|(action, _)| *action != target.k);
            self.returns.push((target.k, near));
            near
        } else {
            self.push(JUMP, 0, 0, distance as u32)
        }
    }

    fn returning(&mut self, action: Action) -> Label {
        if let Some((_, label)) = self.returns.iter().find(|(known, _)| *known == action) {
            return *label;
        }
        let label = self.push(RETURN, 0, 0, action);
        self.returns.push((action, label));
        label
    }

    fn branch(&mut self, code: u16, k: u32, yes: Label, no: Label) -> Label {
        if yes == no {
            return yes;
        }
        // One place is kept free: making `no` near may push `yes` one farther away.
        let yes = self.within(yes, usize::from(u8::MAX) - 1);
        let no = self.within(no, usize::from(u8::MAX));
        let (jt, jf) = (self.distance(yes) as u8, self.distance(no) as u8);
        self.push(code, jt, jf, k)
    }

    /// Loads a word of `seccomp_data` and goes on at `next`.
    fn load(&mut self, offset: u32, next: Label) -> Label {
        self.within(next, 0);
        self.push(LOAD, 0, 0, offset)
    }

    /// Keeps the loaded bits of `mask` and goes on at `next`.
    fn and(&mut self, mask: u32, next: Label) -> Label {
        self.within(next, 0);
        self.push(AND, 0, 0, mask)
    }

    /// One architecture: load the number, find its run, act.
    fn section(&mut self, runs: &[Run], default: Action) -> Label {
        let mut chains: HashMap<&[Rule], Label> = HashMap::new();
        for run in runs {
            if let Fate::Depends(rules) = &run.fate
                && !chains.contains_key(rules.as_slice())
            {
                let label = self.chain(rules, default);
                chains.insert(rules, label);
            }
        }
        let search = self.search(runs, &chains);
        self.load(NUMBER, search)
    }

    /// Binary search over runs.
    fn search(&mut self, runs: &[Run], chains: &HashMap<&[Rule], Label>) -> Label {
        if let [run] = runs {
            return self.fate(&run.fate, chains);
        }
        if let Some((rest, loners)) = loners(runs) {
            let mut entry = self.fate(rest, chains);
            for run in loners {
                let target = self.fate(&run.fate, chains);
                entry = self.branch(IF_EQUAL, run.low, target, entry);
            }
            return entry;
        }
        let (left, right) = runs.split_at(runs.len() / 2);
        let boundary = right[0].low;
        let right = self.search(right, chains);
        let left = self.search(left, chains);
        self.branch(IF_NOT_LESS, boundary, right, left)
    }

    fn fate(&mut self, fate: &Fate, chains: &HashMap<&[Rule], Label>) -> Label {
        match fate {
            Fate::Always(action) => self.returning(*action),
            Fate::Depends(rules) => chains[rules.as_slice()],
        }
    }

    /// The rules of one syscall, in order, ending in the default action.
    fn chain(&mut self, rules: &[Rule], default: Action) -> Label {
        let mut miss = self.returning(default);
        for rule in rules.iter().rev() {
            let mut hit = self.returning(rule.action);
            for condition in rule.conditions.iter().rev() {
                hit = self.condition(*condition, hit, miss);
            }
            miss = hit;
        }
        miss
    }

    /// One comparison of an argument.
    fn condition(&mut self, condition: Condition, yes: Label, no: Label) -> Label {
        let low_word = ARGUMENTS + u32::from(condition.index) * 8 + if BIG_ENDIAN { 4 } else { 0 };
        let high_word = ARGUMENTS + u32::from(condition.index) * 8 + if BIG_ENDIAN { 0 } else { 4 };
        let high = (!condition.narrow).then_some(high_word);
        match condition.test {
            Test::Masked { mask, value, equal } => {
                let (yes, no) = if equal { (yes, no) } else { (no, yes) };
                let low = self.masked_word(low_word, mask as u32, value as u32, yes, no);
                if mask >> 32 == 0 {
                    return low;
                }
                self.masked_word(high_word, (mask >> 32) as u32, (value >> 32) as u32, low, no)
            }
            Test::Greater { value, holds } => {
                let (yes, no) = if holds { (yes, no) } else { (no, yes) };
                self.ordered(IF_GREATER, value, low_word, high, yes, no)
            }
            Test::GreaterOrEqual { value, holds } => {
                let (yes, no) = if holds { (yes, no) } else { (no, yes) };
                self.ordered(IF_NOT_LESS, value, low_word, high, yes, no)
            }
        }
    }

    fn masked_word(&mut self, word: u32, mask: u32, value: u32, yes: Label, no: Label) -> Label {
        if mask == 0 {
            return yes; // `value` was masked too, so both sides are zero
        }
        let mut entry = self.branch(IF_EQUAL, value, yes, no);
        if mask != u32::MAX {
            entry = self.and(mask, entry);
        }
        self.load(word, entry)
    }

    /// `argument > value` or `>=`, decided by the high word unless it is equal.
    fn ordered(
        &mut self,
        low_test: u16,
        value: u64,
        low_word: u32,
        high_word: Option<u32>,
        yes: Label,
        no: Label,
    ) -> Label {
        let low = self.branch(low_test, value as u32, yes, no);
        let low = self.load(low_word, low);
        let Some(high_word) = high_word else {
            return low;
        };
        let high = (value >> 32) as u32;
        let equal = self.branch(IF_EQUAL, high, low, no);
        let greater = self.branch(IF_GREATER, high, yes, equal);
        self.load(high_word, greater)
    }
}

const BIG_ENDIAN: bool = cfg!(target_endian = "big");

/// Splits runs into one common fate and a few lone numbers that differ from it: one
/// comparison per loner instead of two boundaries.
fn loners(runs: &[Run]) -> Option<(&Fate, Vec<&Run>)> {
    if runs.len() > 2 * LONERS + 1 {
        return None;
    }
    runs.iter().map(|run| &run.fate).find_map(|rest| {
        let others: Vec<&Run> = runs.iter().filter(|run| run.fate != *rest).collect();
        let few = others.len() <= LONERS && others.len() < runs.len() - 1;
        (few && others.iter().all(|run| run.low == run.high)).then_some((rest, others))
    })
}
