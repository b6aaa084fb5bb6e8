//! From the profile's names to what each ABI does with each syscall number.

use std::collections::HashMap;

use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator, LinuxSyscall,
};
use seccompiler::{BackendError, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition};

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
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The same for every call.
    Always(Action),
    /// The first rule whose conditions all hold, else the default action.
    Depends(Vec<Rule>),
}

/// Conditions that must all hold, and what then happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) conditions: Vec<SeccompCondition>,
    pub(crate) action: Action,
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
    let entries = syscalls.iter().map(Entry::new).collect::<Result<Vec<_>, _>>()?;
    let index = Index::new(&entries);
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
            if !(answers_enosys && (abi == native || listed.contains(&abi))) {
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
    let data = errno.unwrap_or(libc::EPERM as u32);
    let action = match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            SeccompAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => SeccompAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => SeccompAction::Trap,
        LinuxSeccompAction::ScmpActErrno => SeccompAction::Errno(data),
        LinuxSeccompAction::ScmpActTrace => SeccompAction::Trace(data),
        LinuxSeccompAction::ScmpActLog => SeccompAction::Log,
        LinuxSeccompAction::ScmpActAllow => SeccompAction::Allow,
        // seccompiler's callers have no supervisor to ask.
        LinuxSeccompAction::ScmpActNotify => return libc::SECCOMP_RET_USER_NOTIF,
    };
    action.into()
}

/// One entry of the profile, compiled for both widths of arguments.
struct Entry<'a> {
    syscall: &'a LinuxSyscall,
    action: Action,
    wide: Vec<Rule>,
    narrow: Vec<Rule>,
}

impl<'a> Entry<'a> {
    fn new(syscall: &'a LinuxSyscall) -> Result<Self, BackendError> {
        let action = action(syscall.action(), syscall.errno_ret());
        let rules = |narrow| alternatives(narrow, syscall, action);
        Ok(Self { syscall, action, wide: rules(false)?, narrow: rules(true)? })
    }

    fn rules(&self, abi: Abi) -> Vec<Rule> {
        if abi.narrow_arguments() { self.narrow.clone() } else { self.wide.clone() }
    }
}

/// The entries that mention a name, in the profile's order. Built once: looking every name
/// up in every ABI's table would cost more than loading the filter.
struct Index<'a>(HashMap<&'a str, (&'a Entry<'a>, Vec<&'a Entry<'a>>)>);

impl<'a> Index<'a> {
    fn new(entries: &'a [Entry<'a>]) -> Self {
        let names = entries.iter().map(|entry| entry.syscall.names().len()).sum();
        let mut index = HashMap::with_capacity(names);
        for entry in entries {
            for name in entry.syscall.names() {
                index
                    .entry(name.as_str())
                    .and_modify(|(_, more): &mut (_, Vec<_>)| more.push(entry))
                    .or_insert((entry, Vec::new()));
            }
        }
        Self(index)
    }

    fn of(&self, name: &str) -> impl Iterator<Item = &'a Entry<'a>> {
        let entry = self.0.get(name);
        entry.into_iter().flat_map(|(first, more)| std::iter::once(first).chain(more)).copied()
    }
}

fn table(abi: Abi, index: &Index<'_>, default: Action) -> Table {
    let mut runs = Runs::default();
    let mut last_known = None;
    abi.each_call(&mut |name, number| {
        let mut fate = None;
        for entry in index.of(name) {
            last_known = Some(number);
            if entry.action != default {
                fate = Some(combine(fate.take(), entry.action, entry.rules(abi)));
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
fn alternatives(
    narrow: bool,
    syscall: &LinuxSyscall,
    action: Action,
) -> Result<Vec<Rule>, BackendError> {
    let arguments = syscall.args().as_deref().unwrap_or_default();
    let mut seen = [false; 6];
    let mut repeated = false;
    for argument in arguments {
        if let Some(slot) = seen.get_mut(argument.index()) {
            repeated |= std::mem::replace(slot, true);
        }
    }
    let conditions: Vec<SeccompCondition> =
        arguments.iter().map(|argument| condition(narrow, argument)).collect::<Result<_, _>>()?;
    Ok(if conditions.is_empty() {
        Vec::new()
    } else if repeated {
        conditions
            .into_iter()
            .map(|condition| Rule { conditions: vec![condition], action })
            .collect()
    } else {
        vec![Rule { conditions, action }]
    })
}

/// One comparison; the values of a narrow ABI are compared by their low half.
fn condition(narrow: bool, argument: &LinuxSeccompArg) -> Result<SeccompCondition, BackendError> {
    let cut = |value: u64| if narrow { value & 0xFFFF_FFFF } else { value };
    let value = cut(argument.value());
    let (operator, value) = match argument.op() {
        LinuxSeccompOperator::ScmpCmpEq => (SeccompCmpOp::Eq, value),
        LinuxSeccompOperator::ScmpCmpNe => (SeccompCmpOp::Ne, value),
        LinuxSeccompOperator::ScmpCmpGt => (SeccompCmpOp::Gt, value),
        LinuxSeccompOperator::ScmpCmpGe => (SeccompCmpOp::Ge, value),
        LinuxSeccompOperator::ScmpCmpLt => (SeccompCmpOp::Lt, value),
        LinuxSeccompOperator::ScmpCmpLe => (SeccompCmpOp::Le, value),
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            (SeccompCmpOp::MaskedEq(value), cut(argument.value_two().unwrap_or(0)))
        }
    };
    // A mask without high bits leaves nothing to compare there, which saves three instructions.
    let low_mask = matches!(operator, SeccompCmpOp::MaskedEq(mask) if mask >> 32 == 0);
    let length = match narrow || low_mask {
        true => SeccompCmpArgLen::Dword,
        false => SeccompCmpArgLen::Qword,
    };
    SeccompCondition::new(argument.index() as u8, length, operator, value)
}
