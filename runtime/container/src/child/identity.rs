//! The last steps of every container process: limits, ids, capabilities, the filter, execve.
//!
//! Order matters: whatever needs privileges comes first; the system call filter comes last,
//! so that a profile need not allow what the runtime does.

use std::convert::Infallible;
use std::ffi::CString;

use pinion_seccomp::Program;
use rustix::thread::{CapabilitySet, CapabilitySets as ThreadSets};

use super::{During, Step, Stopped, program};
use crate::capability;
use crate::error::{Doing, Failure};
use crate::process::ProcessPlan;
use crate::protocol::{Channel, Message};
use crate::rootfs::Proc;

/// Gives this process the rights and limits of the plan. `keep` is the number of
/// descriptors after the standard ones that the program shall have.
///
/// # Errors
/// Names what failed.
pub(crate) fn adopt(
    plan: &ProcessPlan,
    filter: Option<&Program>,
    keep: u32,
) -> Result<(), Failure> {
    scheduling(plan)?;
    for (resource, limit) in &plan.rlimits {
        rustix::process::setrlimit(*resource, *limit)
            .doing(|| format!("error setting rlimit {resource:?}"))?;
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(plan.umask));
    let first = i32::try_from(keep).unwrap_or(i32::MAX).saturating_add(3);
    pinion_sys::fd::cloexec_from(first).doing(|| "close_range".into())?;
    capability::limit(plan.capabilities.bounding)?;
    rustix::thread::set_keep_capabilities(true).doing(|| "PR_SET_KEEPCAPS".into())?;
    match pinion_sys::process::set_groups(&plan.groups) {
        // Where setgroups is denied (an unprivileged user namespace), there are none to drop.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) && plan.groups.is_empty() => {}
        other => other.doing(|| "setgroups".into())?,
    }
    pinion_sys::process::set_ids(plan.uid, plan.gid)
        .doing(|| format!("become user {} and group {}", plan.uid, plan.gid))?;
    raise(plan, filter)
}

fn scheduling(plan: &ProcessPlan) -> Result<(), Failure> {
    if let Some(scheduler) = plan.scheduler {
        pinion_sys::process::set_scheduler(scheduler).map_err(|error| {
            let hint = match error.raw_os_error() {
                Some(libc::EPERM) if scheduler.policy == libc::SCHED_DEADLINE as u32 => {
                    " (deadline: the process scheduler can't be used together with AllowedCPUs)"
                }
                _ => "",
            };
            Failure { what: format!("error setting scheduler{hint}"), source: Some(error) }
        })?;
    }
    if let Some((class, level)) = plan.io_priority {
        pinion_sys::process::set_io_priority(class, level)
            .doing(|| "failed to set io priority".into())?;
    }
    Ok(())
}

/// Sets the remaining capability sets. While a filter is still to be loaded without
/// `no_new_privs`, `CAP_SYS_ADMIN` stays; execve(2) computes the sets anew from the bounding,
/// inheritable and ambient ones and drops it.
fn raise(plan: &ProcessPlan, filter: Option<&Program>) -> Result<(), Failure> {
    let sets = &plan.capabilities;
    let lent = if filter.is_some() && !plan.no_new_privileges {
        CapabilitySet::SYS_ADMIN
    } else {
        CapabilitySet::empty()
    };
    let thread = ThreadSets {
        effective: sets.effective | lent,
        permitted: sets.permitted | lent,
        inheritable: sets.inheritable,
    };
    rustix::thread::set_capabilities(None, thread)
        .doing(|| "error applying capabilities".into())?;
    capability::set_ambient(sets.ambient)
}

/// Has the kernel apply the plan's security labels at execve(2).
///
/// # Errors
/// When the label's security module is not there, or does not know the label.
pub(crate) fn label(
    plan: &ProcessPlan,
    proc: impl FnOnce() -> Result<Proc, Failure>,
) -> Result<(), Failure> {
    if plan.apparmor.is_none() && plan.selinux.is_none() {
        return Ok(());
    }
    let proc = proc()?;
    if let Some(profile) = &plan.apparmor {
        let value = format!("exec {profile}");
        let modern = proc.write("self/attr/apparmor/exec", &value);
        let applied = match modern {
            Err(failure) if failure.errno() == Some(libc::ENOENT) => {
                proc.write("self/attr/exec", &value)
            }
            other => other,
        };
        applied.map_err(|failure| Failure {
            what: format!(
                "unable to apply apparmor profile {profile:?}{}: {}",
                // The file is there: it is the profile that is not.
                if failure.errno() == Some(libc::ENOENT) { " (is it loaded?)" } else { "" },
                failure.what
            ),
            ..failure
        })?;
    }
    if let Some(label) = &plan.selinux {
        proc.write("self/attr/exec", label).map_err(|failure| Failure {
            what: format!("unable to apply selinux label: {}", failure.what),
            ..failure
        })?;
    }
    Ok(())
}

/// A program found and ready to be executed.
#[derive(Debug)]
pub(crate) struct Prepared {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Prepared {
    /// What the program will find in its environment.
    pub(crate) fn environment(&self) -> &[CString] {
        &self.env
    }
}

/// Finds the program with the rights this process has now, and completes its environment.
///
/// # Errors
/// See [`program::find`].
pub(crate) fn prepare(plan: &ProcessPlan, extra_env: &[CString]) -> Result<Prepared, Failure> {
    let path = program::find(&plan.args[0], &plan.search_path)?;
    let to_c = |text: &String| {
        CString::new(text.as_str()).map_err(|_nul| Failure::refused("an argument contains NUL"))
    };
    let args = plan.args.iter().map(to_c).collect::<Result<_, _>>()?;
    let mut env = plan.env.clone();
    if !plan.has_home {
        env.extend(CString::new(format!("HOME={}", program::home_of(plan.uid))).ok());
    }
    env.extend_from_slice(extra_env);
    Ok(Prepared { path, args, env })
}

/// Puts `no_new_privs` and the filter in force: after this, only what they allow.
///
/// # Errors
/// As prctl(2) and seccomp(2).
pub(crate) fn confine(
    plan: &ProcessPlan,
    filter: Option<&Program>,
    channel: &Channel,
) -> Result<(), Stopped> {
    if plan.no_new_privileges {
        rustix::thread::set_no_new_privs(true)
            .doing(|| "PR_SET_NO_NEW_PRIVS".into())
            .during(Step::Identity)?;
    }
    if let Some(filter) = filter {
        load(filter, channel).during(Step::Seccomp)?;
    }
    Ok(())
}

/// Executes the program; returns only on failure. The process is to be confined already.
pub(crate) fn execute(prepared: &Prepared) -> Result<Infallible, Stopped> {
    pinion_sys::signal::reset_for_exec();
    let error = match nix::unistd::execve(&prepared.path, &prepared.args, &prepared.env) {
        Ok(never) => match never {},
        Err(errno) => errno,
    };
    // Found, and still not executed: its interpreter is missing, or it is no program.
    let what = || format!("exec {}", prepared.path.to_string_lossy());
    Err(std::io::Error::from(error)).doing(what).during(Step::Execute)
}

fn load(filter: &Program, channel: &Channel) -> Result<(), Failure> {
    let listener = pinion_sys::seccomp::load(&filter.instructions, filter.flags)
        .doing(|| format!("seccomp with {} instructions", filter.instructions.len()))?;
    if let Some(listener) = listener {
        use std::os::fd::AsRawFd;
        // The runtime takes the descriptor out of this process; only write(2) and read(2)
        // may be needed from here on.
        channel
            .say(&Message::Listener(listener.as_raw_fd()))
            .doing(|| "report the listener".into())?;
        channel.await_proceed().doing(|| "wait for the listener to be taken".into())?;
    }
    Ok(())
}
