//! Instructions for a policy.
//!
//! Classic BPF jumps only forward, so the program is built from its last instruction to its
//! first: whatever is jumped to already exists and its distance is known. Conditional jumps
//! reach 255 instructions; a target farther away is repeated (a return) or relayed through
//! an unconditional jump, whichever it is costing one instruction.

use libc::sock_filter;
use seccompiler::{BpfProgram, SeccompCondition, SeccompRule};

use crate::Error;
use crate::profile::{Action, Fate, Policy, Rule};
use crate::ranges::{self, Run};

const MAX_INSTRUCTIONS: usize = 4096;

/// A run of at most this many lone numbers is found by comparing each in turn.
const LONERS: usize = 3;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

// linux/bpf_common.h; libc has these as u32.
const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const IF_NOT_LESS: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K

/// The program of a policy: architecture, then number, then arguments.
pub(crate) fn program(policy: &Policy) -> Result<Vec<sock_filter>> {
    let mut assembler = Assembler::default();
    let mut sections = Vec::new();
    for (audit_arch, runs) in ranges::by_architecture(policy).into_iter().rev() {
        let entry = assembler.section(&runs, policy.default)?;
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

type Result<T> = std::result::Result<T, Error>;

/// A run of numbers, with its rules emitted.
struct Span {
    low: u32,
    high: u32,
    target: Target,
}

/// What a number leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Return(Action),
    Rules(Label),
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
    fn finish(self) -> Result<Vec<sock_filter>> {
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
    fn section(&mut self, runs: &[Run], default: Action) -> Result<Label> {
        // A profile has a handful of different rule lists.
        let mut chains: Vec<(&[Rule], Label)> = Vec::new();
        let mut spans = Vec::with_capacity(runs.len());
        for run in runs {
            let target = match &run.fate {
                Fate::Always(action) => Target::Return(*action),
                Fate::Depends(rules) => match chains.iter().find(|(known, _)| known == rules) {
                    Some((_, label)) => Target::Rules(*label),
                    None => {
                        let label = self.chain(rules, default)?;
                        chains.push((rules, label));
                        Target::Rules(label)
                    }
                },
            };
            spans.push(Span { low: run.low, high: run.high, target });
        }
        let search = self.search(&spans);
        Ok(self.load(NUMBER, search))
    }

    /// Binary search over runs.
    fn search(&mut self, spans: &[Span]) -> Label {
        if let [span] = spans {
            return self.target(span.target);
        }
        if let Some((rest, loners)) = loners(spans) {
            let mut entry = self.target(rest);
            for span in loners {
                let target = self.target(span.target);
                entry = self.branch(IF_EQUAL, span.low, target, entry);
            }
            return entry;
        }
        let (left, right) = spans.split_at(spans.len() / 2);
        let boundary = right[0].low;
        let right = self.search(right);
        let left = self.search(left);
        self.branch(IF_NOT_LESS, boundary, right, left)
    }

    fn target(&mut self, target: Target) -> Label {
        match target {
            Target::Return(action) => self.returning(action),
            Target::Rules(label) => label,
        }
    }

    /// The rules of one syscall, in order, ending in the default action.
    fn chain(&mut self, rules: &[Rule], default: Action) -> Result<Label> {
        let mut miss = self.returning(default);
        for rule in rules.iter().rev() {
            let hit = self.returning(rule.action);
            miss = self.rule(&rule.conditions, hit, miss)?;
        }
        Ok(miss)
    }

    /// Goes on at `hit` when all conditions hold, else at `miss`.
    ///
    /// seccompiler compiles the comparisons. Its block starts with two jumps around each
    /// other that nothing needs here, leaves by its end on a match, and by skipping one more
    /// instruction (its own return) on a mismatch. The rest is linked anew, last instruction
    /// first, so that returns are shared and long distances relayed as everywhere else.
    fn rule(&mut self, conditions: &[SeccompCondition], hit: Label, miss: Label) -> Result<Label> {
        let block = BpfProgram::from(SeccompRule::new(conditions.to_vec())?);
        let end = block.len();
        let mut labels = vec![hit; end + 2];
        labels[end + 1] = miss;
        for (index, instruction) in block.iter().enumerate().skip(PREAMBLE).rev() {
            let next = labels[index + 1];
            let after = |skipped: usize| labels[index + 1 + skipped];
            labels[index] = match instruction.code {
                JUMP => after(instruction.k as usize),
                LOAD => self.load(instruction.k, next),
                AND => self.and(instruction.k, next),
                code => {
                    let (yes, no) = (after(instruction.jt.into()), after(instruction.jf.into()));
                    self.branch(code, instruction.k, yes, no)
                }
            };
        }
        Ok(labels[PREAMBLE])
    }
}

/// The two jumps at the start of seccompiler's block for a rule.
const PREAMBLE: usize = 2;

/// Splits runs into one common target and a few lone numbers that differ from it: one
/// comparison per loner instead of two boundaries.
fn loners(spans: &[Span]) -> Option<(Target, Vec<&Span>)> {
    if spans.len() > 2 * LONERS + 1 {
        return None;
    }
    spans.iter().map(|span| span.target).find_map(|rest| {
        let others: Vec<&Span> = spans.iter().filter(|span| span.target != rest).collect();
        let few = others.len() <= LONERS && others.len() < spans.len() - 1;
        (few && others.iter().all(|span| span.low == span.high)).then_some((rest, others))
    })
}
