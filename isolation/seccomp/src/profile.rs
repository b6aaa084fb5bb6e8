//! From the profile's names to what each ABI does with each syscall number.

use std::collections::HashMap;

use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator, LinuxSyscall,
};

use crate::Error;
use crate::abi::Abi;
use crate::ranges::Runs;

/// A value a filter returns: `SECCOMP_RET_*` with its data.
pub(crate) type Action = u32;

/// A whole profile, resolved.
#[derive(Debug)]
pub(crate) struct Policy {
    pub(crate) default: Action,
    /// The ABIs that get a section; everything else is killed.
    pub(crate) tables: Vec<Table>,
    pub(crate) notifies: bool,
}

/// The rules of one ABI.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) abi: Abi,
    /// What differs from the default action.
    pub(crate) runs: Runs,
    /// Numbers above this one answer `ENOSYS`.
    pub(crate) last_known: Option<u32>,
}

/// What happens to one syscall number.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Fate {
    /// The same for every call.
    Always(Action),
    /// The first rule whose conditions all hold, else the default action.
    Depends(Vec<Rule>),
}

/// Conditions that must all hold, and what then happens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Rule {
    pub(crate) conditions: Vec<Condition>,
    pub(crate) action: Action,
}

/// One comparison of an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Condition {
    /// 0 to 5.
    pub(crate) index: u8,
    /// Only the low 32 bits count.
    pub(crate) narrow: bool,
    pub(crate) test: Test,
}

/// The comparison, after rewriting to the few forms BPF has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Test {
    /// `(argument & mask) == value`, or its opposite.
    Masked { mask: u64, value: u64, equal: bool },
    /// `argument > value`, or its opposite.
    Greater { value: u64, holds: bool },
    /// `argument >= value`, or its opposite.
    GreaterOrEqual { value: u64, holds: bool },
}

/// Resolves names and actions for every ABI of the profile that `native` can report.
pub(crate) fn resolve(native: Abi, profile: &LinuxSeccomp) -> Result<Policy, Error> {
    if profile.default_action() == LinuxSeccompAction::ScmpActNotify {
        return Err(Error::NotifyByDefault);
    }
    let default = action(profile.default_action(), profile.default_errno_ret());
    let syscalls = profile.syscalls().as_deref().unwrap_or_default();
    for syscall in syscalls {
        check(syscall)?;
    }

    let index = Index::new(syscalls);
    let listed: Vec<Abi> = profile
        .architectures()
        .iter()
        .flatten()
        .filter_map(|arch| Abi::from_oci(*arch, native))
        .collect();
    let mut abis = vec![native];
    for abi in &listed {
        if !abis.contains(abi) {
            abis.push(*abi);
        }
    }

    let answers_enosys = denies(profile.default_action())
        && profile.default_errno_ret() != Some(libc::ENOSYS as u32);
    let tables: Vec<Table> = abis
        .into_iter()
        .map(|abi| {
            let mut table = table(abi, &index, default);
            if !(answers_enosys && listed.contains(&abi)) {
                table.last_known = None;
            }
            table
        })
        .collect();
    let notifies = tables.iter().flat_map(|table| &table.runs.0).any(|run| run.fate.notifies());
    Ok(Policy { default, tables, notifies })
}

impl Fate {
    fn notifies(&self) -> bool {
        match self {
            Self::Always(action) => *action == libc::SECCOMP_RET_USER_NOTIF,
            Self::Depends(rules) => {
                rules.iter().any(|rule| rule.action == libc::SECCOMP_RET_USER_NOTIF)
            }
        }
    }
}

/// What can be wrong with a rule on its own.
fn check(syscall: &LinuxSyscall) -> Result<(), Error> {
    let name = || syscall.names().first().cloned().unwrap_or_default();
    if syscall.action() == LinuxSeccompAction::ScmpActNotify
        && syscall.names().iter().any(|name| name == "write")
    {
        return Err(Error::NotifyOnWrite);
    }
    for argument in syscall.args().iter().flatten() {
        if argument.index() > 5 {
            return Err(Error::ArgumentIndex { syscall: name(), index: argument.index() });
        }
    }
    Ok(())
}

/// Actions for which an unknown syscall number is better answered with `ENOSYS`, so that a
/// C library newer than the profile falls back. A tracer is expected to handle new calls.
fn denies(action: LinuxSeccompAction) -> bool {
    !matches!(
        action,
        LinuxSeccompAction::ScmpActAllow
            | LinuxSeccompAction::ScmpActLog
            | LinuxSeccompAction::ScmpActTrace
    )
}

/// The `SECCOMP_RET_*` value of an OCI action; errno defaults to `EPERM`.
pub(crate) fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Action {
    let data = errno.unwrap_or(libc::EPERM as u32) & libc::SECCOMP_RET_DATA;
    match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            libc::SECCOMP_RET_KILL_THREAD
        }
        LinuxSeccompAction::ScmpActKillProcess => libc::SECCOMP_RET_KILL_PROCESS,
        LinuxSeccompAction::ScmpActTrap => libc::SECCOMP_RET_TRAP,
        LinuxSeccompAction::ScmpActErrno => libc::SECCOMP_RET_ERRNO | data,
        LinuxSeccompAction::ScmpActNotify => libc::SECCOMP_RET_USER_NOTIF,
        LinuxSeccompAction::ScmpActTrace => libc::SECCOMP_RET_TRACE | data,
        LinuxSeccompAction::ScmpActLog => libc::SECCOMP_RET_LOG,
        LinuxSeccompAction::ScmpActAllow => libc::SECCOMP_RET_ALLOW,
    }
}

/// The entries that mention a name, in the profile's order. Built once: looking every name
/// up in every ABI's table would cost more than loading the filter.
struct Index<'a>(HashMap<&'a str, (&'a LinuxSyscall, Vec<&'a LinuxSyscall>)>);

impl<'a> Index<'a> {
    fn new(syscalls: &'a [LinuxSyscall]) -> Self {
        let names = syscalls.iter().map(|syscall| syscall.names().len()).sum();
        let mut index = HashMap::with_capacity(names);
        for syscall in syscalls {
            for name in syscall.names() {
                index
                    .entry(name.as_str())
                    .and_modify(|(_, more): &mut (_, Vec<_>)| more.push(syscall))
                    .or_insert((syscall, Vec::new()));
            }
        }
        Self(index)
    }

    fn of(&self, name: &str) -> impl Iterator<Item = &'a LinuxSyscall> {
        let entry = self.0.get(name);
        entry.into_iter().flat_map(|(first, more)| std::iter::once(first).chain(more)).copied()
    }
}

fn table(abi: Abi, index: &Index<'_>, default: Action) -> Table {
    let mut runs = Runs::default();
    let mut last_known = None;
    abi.each_call(&mut |name, number| {
        let mut fate = None;
        for syscall in index.of(name) {
            last_known = Some(number);
            let action = action(syscall.action(), syscall.errno_ret());
            if action != default {
                fate = Some(combine(fate.take(), action, alternatives(abi, syscall, action)));
            }
        }
        if let Some(fate) = fate {
            runs.push(number, number, fate);
        }
    });
    // Number 0 alone says nothing about the profile's age.
    Table { abi, runs, last_known: last_known.filter(|last| *last != 0) }
}

/// One more entry for the same number: an unconditional one replaces conditional ones and is
/// never replaced.
fn combine(fate: Option<Fate>, action: Action, rules: Vec<Rule>) -> Fate {
    match fate {
        Some(Fate::Always(first)) => Fate::Always(first),
        _ if rules.is_empty() => Fate::Always(action),
        Some(Fate::Depends(mut existing)) => {
            existing.extend(rules);
            Fate::Depends(existing)
        }
        None => Fate::Depends(rules),
    }
}

/// The rules of one entry: empty without arguments, one rule with all conditions, or one
/// rule per condition when an argument is named twice.
fn alternatives(abi: Abi, syscall: &LinuxSyscall, action: Action) -> Vec<Rule> {
    let arguments = syscall.args().as_deref().unwrap_or_default();
    let mut seen = [false; 6];
    let mut repeated = false;
    for argument in arguments {
        if let Some(slot) = seen.get_mut(argument.index()) {
            repeated |= std::mem::replace(slot, true);
        }
    }
    let conditions: Vec<Condition> =
        arguments.iter().map(|argument| condition(abi, argument)).collect();
    if conditions.is_empty() {
        Vec::new()
    } else if repeated {
        conditions
            .into_iter()
            .map(|condition| Rule { conditions: vec![condition], action })
            .collect()
    } else {
        vec![Rule { conditions, action }]
    }
}

fn condition(abi: Abi, argument: &LinuxSeccompArg) -> Condition {
    let narrow = |value: u64| if abi.narrow_arguments() { value & 0xFFFF_FFFF } else { value };
    let full = narrow(u64::MAX);
    let value = narrow(argument.value());
    let test = match argument.op() {
        LinuxSeccompOperator::ScmpCmpEq => Test::Masked { mask: full, value, equal: true },
        LinuxSeccompOperator::ScmpCmpNe => Test::Masked { mask: full, value, equal: false },
        LinuxSeccompOperator::ScmpCmpGt => Test::Greater { value, holds: true },
        LinuxSeccompOperator::ScmpCmpLe => Test::Greater { value, holds: false },
        LinuxSeccompOperator::ScmpCmpGe => Test::GreaterOrEqual { value, holds: true },
        LinuxSeccompOperator::ScmpCmpLt => Test::GreaterOrEqual { value, holds: false },
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            let datum = narrow(argument.value_two().unwrap_or(0));
            Test::Masked { mask: value, value: datum & value, equal: true }
        }
    };
    Condition { index: argument.index() as u8, narrow: abi.narrow_arguments(), test }
}
