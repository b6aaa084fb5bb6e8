//! Starting the process that is a virtual machine.
//!
//! ```text
//!   monitor ── posix_spawn ──▶ monitor --become-machine … ── exec ──▶ QEMU
//!                               enters its cgroups, gives up rights, asks to die with us
//! ```
//!
//! The step between is a process of one thread that does nothing else, so it may do what a
//! forked copy of a larger one may not. All the machine inherits are the descriptors it is
//! told of, from 3 on, and an error output of which the end is kept.

use std::ffi::{CString, OsString};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use pinion_microvm::driver::Launch;
use pinion_microvm::plan::{Jail, Plan};
use rustix::io::fcntl_dupfd_cloexec;

use crate::{jail, share};

/// The first argument of the step between.
pub const BECOME: &str = "--become-machine";

/// Descriptors are moved above this before they are put where the machine expects them.
const OUT_OF_THE_WAY: i32 = 200;

/// Where a process starts.
#[derive(Debug, Default, Clone, Copy)]
pub struct Place<'a> {
    /// Directories of cgroups that it enters.
    pub cgroups: &'a [PathBuf],
    /// User and group that it becomes.
    pub user: Option<(u32, u32)>,
    /// CPUs that it starts on; all when empty.
    pub cpus: &'a str,
    /// Confined to this.
    pub jail: Option<&'a Jail>,
    /// In a mount namespace of its own, with descriptor 3, a mount, at this directory.
    pub tree: Option<&'a Path>,
}

impl<'a> Place<'a> {
    /// That of a plan's machine.
    #[must_use]
    pub fn of_machine(plan: &'a Plan) -> Self {
        Self {
            cgroups: &plan.cgroups,
            user: plan.user,
            cpus: &plan.cpus,
            jail: plan.jail.as_ref(),
            tree: None,
        }
    }

    /// That of the process that serves files to a plan's machine.
    #[must_use]
    pub fn of_share(plan: &'a Plan, directory: &'a Path) -> Self {
        Self { user: None, jail: None, tree: Some(directory), ..Self::of_machine(plan) }
    }
}

/// The command line of the step between.
fn command(place: &Place<'_>, launch: &Launch, parent: i32) -> Vec<CString> {
    let program = std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
    let mut words: Vec<OsString> = vec![program.into(), BECOME.into(), parent.to_string().into()];
    for directory in place.cgroups {
        words.push("--cgroup".into());
        words.push(directory.into());
    }
    if let Some((uid, gid)) = place.user {
        words.push("--user".into());
        words.push(format!("{uid}:{gid}").into());
    }
    if !place.cpus.is_empty() {
        words.push("--cpus".into());
        words.push(place.cpus.into());
    }
    if let Some(jail) = place.jail {
        words.push("--jail".into());
        words.push(jail.root.clone().into());
        for path in &jail.visible {
            words.push("--see".into());
            words.push(path.into());
        }
        if let Some(group) = jail.group {
            words.push("--group".into());
            words.push(group.to_string().into());
        }
    }
    if let Some(directory) = place.tree {
        words.push("--tree".into());
        words.push(directory.into());
    }
    words.push("--".into());
    words.push(launch.program.clone().into());
    words.extend(launch.arguments.iter().cloned());
    words.into_iter().filter_map(|word| CString::new(word.into_vec()).ok()).collect()
}

/// Starts a machine. It gets `ends` as descriptors from 3 on, in their order, and `errors` as
/// its standard error; its pid is returned.
///
/// # Errors
/// Those of fcntl(2) and posix_spawn(3).
pub fn start(
    place: &Place<'_>,
    launch: &Launch,
    ends: &[OwnedFd],
    null: BorrowedFd<'_>,
    errors: BorrowedFd<'_>,
) -> io::Result<i32> {
    let mut actions = PosixSpawnFileActions::init()?;
    for (target, fd) in [(0, null), (1, null), (2, errors)] {
        actions.add_dup2(fd.as_raw_fd(), target)?;
    }
    let mut moved = Vec::new();
    for (target, end) in (3..).zip(ends) {
        let high = fcntl_dupfd_cloexec(end, OUT_OF_THE_WAY)?;
        actions.add_dup2(high.as_raw_fd(), target)?;
        moved.push(high);
    }
    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_sigdefault(&SigSet::all())?;
    attributes.set_sigmask(&SigSet::empty())?;
    attributes.set_flags(
        PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK,
    )?;
    let command = command(place, launch, rustix::process::getpid().as_raw_nonzero().get());
    let mut environment = vec![CString::new("PATH=/usr/sbin:/usr/bin:/sbin:/bin")?];
    for (name, value) in &launch.environment {
        let pair = [name.as_bytes(), b"=", value.as_os_str().as_bytes()].concat();
        environment.push(CString::new(pair)?);
    }
    let program = command.first().ok_or(io::ErrorKind::InvalidInput)?;
    let spawn = || {
        let pid = posix_spawn(program.as_c_str(), &actions, &attributes, &command, &environment)?;
        Ok::<_, io::Error>(pid)
    };
    let pid = match place.jail {
        Some(_) => jail::in_new_pid_namespace(spawn)?,
        None => spawn()?,
    };
    Ok(pid.as_raw())
}

/// What the step between is told.
#[derive(Debug, Default, PartialEq, Eq)]
struct Orders {
    parent: i32,
    cgroups: Vec<PathBuf>,
    user: Option<(u32, u32)>,
    cpus: Option<String>,
    jail: Option<PathBuf>,
    visible: Vec<PathBuf>,
    groups: Vec<u32>,
    tree: Option<PathBuf>,
    command: Vec<OsString>,
}

/// The step between: never returns unless it fails, with the words to say.
#[must_use]
pub fn become_machine(arguments: impl Iterator<Item = OsString>) -> String {
    let Some(orders) = parse(arguments) else {
        return format!("{BECOME} is how a monitor starts a machine; it is of no other use");
    };
    match carry_out(&orders) {
        Ok(never) => match never {},
        Err((what, error)) => format!("{what}: {error}"),
    }
}

fn parse(mut arguments: impl Iterator<Item = OsString>) -> Option<Orders> {
    let parent = arguments.next()?.to_str()?.parse().ok()?;
    let mut orders = Orders { parent, ..Orders::default() };
    while let Some(word) = arguments.next() {
        match word.to_str()? {
            "--cgroup" => orders.cgroups.push(arguments.next()?.into()),
            "--user" => {
                let text = arguments.next()?.into_string().ok()?;
                let (uid, gid) = text.split_once(':')?;
                orders.user = Some((uid.parse().ok()?, gid.parse().ok()?));
            }
            "--jail" => orders.jail = Some(arguments.next()?.into()),
            "--see" => orders.visible.push(arguments.next()?.into()),
            "--group" => orders.groups.push(arguments.next()?.to_str()?.parse().ok()?),
            "--tree" => orders.tree = Some(arguments.next()?.into()),
            "--cpus" => orders.cpus = Some(arguments.next()?.into_string().ok()?),
            "--" => {
                orders.command = arguments.collect();
                return (!orders.command.is_empty()).then_some(orders);
            }
            _ => return None,
        }
    }
    None
}

fn carry_out(orders: &Orders) -> Result<std::convert::Infallible, (String, io::Error)> {
    let step = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| (what, error)
    };
    for directory in &orders.cgroups {
        enter(directory).map_err(step(&format!("enter cgroup {}", directory.display())))?;
    }
    if let Some(cpus) = &orders.cpus {
        let mask = mask(cpus).ok_or(io::ErrorKind::InvalidInput.into());
        mask.and_then(|mask| pinion_sys::process::set_affinity(&mask))
            .map_err(step(&format!("run on CPUs {cpus}")))?;
    } else {
        // Whoever started us may be confined to CPUs for infrastructure, and the machine is
        // none; where it cannot be lifted, it stays.
        let _ = pinion_sys::process::set_affinity(&[u64::MAX; 128]);
    }
    if let Some(directory) = &orders.tree {
        unshare_mounts().map_err(step("make a mount namespace"))?;
        share::place_tree(directory)
            .map_err(step(&format!("mount what is shared at {}", directory.display())))?;
    }
    if let Some(root) = &orders.jail {
        jail::enter(root, orders.visible.iter().map(PathBuf::as_path))?;
    }
    // No core file with the guest's memory in it.
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(|e| step("limit core files")(e.into()))?;
    nix::sys::prctl::set_no_new_privs().map_err(|e| step("set no_new_privs")(e.into()))?;
    if let Some((uid, gid)) = orders.user {
        pinion_sys::process::set_groups(&orders.groups).map_err(step("leave all groups"))?;
        pinion_sys::process::set_ids(uid, gid).map_err(step(&format!("become user {uid}")))?;
    }
    // After the change of user, which would have cleared it.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
        .map_err(|e| step("ask to die with the monitor")(e.into()))?;
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
    let orphaned = match orders.jail {
        Some(_) => !jail::monitor_lives(),
        None => parent != Some(orders.parent),
    };
    if orphaned {
        return Err(("the monitor is gone".into(), io::ErrorKind::NotFound.into()));
    }
    let text = |bytes: Vec<u8>| CString::new(bytes).unwrap_or_default();
    let words: Vec<CString> =
        orders.command.iter().map(|word| text(word.clone().into_vec())).collect();
    let environment: Vec<CString> = std::env::vars_os()
        .map(|(name, value)| text([name.as_bytes(), b"=", value.as_bytes()].concat()))
        .collect();
    let program = words.first().cloned().unwrap_or_default();
    nix::unistd::execve(&program, &words, &environment)
        .map_err(|error| (format!("execute {program:?}"), error.into()))
}

/// A mount namespace of its own: nothing that is mounted from now on is seen elsewhere, nor
/// the other way round.
fn unshare_mounts() -> io::Result<()> {
    use rustix::mount::{MountPropagationFlags, mount_change};
    pinion_sys::clone::unshare(libc::CLONE_NEWNS as u64)?;
    Ok(mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?)
}

fn enter(directory: &Path) -> io::Result<()> {
    let file = directory.join("cgroup.procs");
    std::fs::OpenOptions::new().write(true).open(file)?.write_all(b"0")
}

/// A list such as `0-1,4` as the mask of sched_setaffinity(2).
fn mask(list: &str) -> Option<Vec<u64>> {
    let mut mask = vec![0u64; 16];
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        for cpu in first.parse::<usize>().ok()?..=last.parse::<usize>().ok()? {
            *mask.get_mut(cpu / 64)? |= 1 << (cpu % 64);
        }
    }
    Some(mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Option<Orders> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn orders_survive_the_command_line() {
        let orders = parsed("7 --cgroup /a --cgroup /b --user 5:6 --cpus 0-1 -- /q -x").unwrap();
        assert_eq!(orders.cgroups, [PathBuf::from("/a"), "/b".into()]);
        assert_eq!((orders.parent, orders.user), (7, Some((5, 6))));
        assert_eq!(orders.cpus.as_deref(), Some("0-1"));
        assert_eq!(orders.command, ["/q", "-x"]);
        for bad in ["", "x -- /q", "7", "7 --", "7 --user 5 -- /q", "7 --other -- /q"] {
            assert_eq!(parsed(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn lists_of_cpus_are_masks() {
        let mask_ = mask("0-1,64").unwrap();
        assert_eq!((mask_[0], mask_[1]), (3, 1));
        assert!(mask("").is_none() && mask("a").is_none() && mask("99999").is_none());
    }
}
