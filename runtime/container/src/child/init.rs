//! The first process of a container, from its birth to the user's program.

use std::convert::Infallible;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use oci_spec::runtime::LinuxNamespaceType;
use pinion_cgroup::{Cgroup, Hierarchies};
use pinion_sys::tty::Pty;
use rustix::fs::Mode;
use rustix::process::{DumpableBehavior, Signal};

use super::{During, Step, Stopped, identity, terminal};
use crate::error::{Doing, Failure};
use crate::hooks;
use crate::memory_policy::MemoryPolicy;
use crate::plan::Plan;
use crate::protocol::{Channel, Message, Report};
use crate::rootfs::{self, CgroupSource, Proc, Root, Rootfs};

/// How a process gets into its cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Join {
    /// It was born there, or its parent is in it.
    Done,
    /// It was born in the v2 cgroup and joins the v1 hierarchies.
    V1,
    /// It joins every hierarchy.
    All,
}

impl Join {
    /// To be called by the process itself, while it still sees the host's hierarchies.
    ///
    /// # Errors
    /// Names the cgroup file.
    pub fn carry_out(self, cgroup: &Cgroup) -> Result<(), Failure> {
        let joined = match self {
            Join::Done => Ok(()),
            Join::V1 => cgroup.join_self_v1(),
            Join::All => cgroup.join_self(),
        };
        joined.map_err(|error| Failure::refused(crate::error::chain(&error)))
    }
}

/// What the runtime made for the process before it was born.
#[derive(Debug)]
pub struct Init<'a> {
    /// The decisions.
    pub plan: &'a Plan,
    /// The container's name, for its keyring.
    pub id: &'a str,
    /// Where `start` will connect.
    pub listener: OwnedFd,
    /// The container's cgroup.
    pub cgroup: &'a Cgroup,
    /// The hierarchies it is in.
    pub hierarchies: &'a Hierarchies,
    /// How the process gets into its cgroup.
    pub join: Join,
    /// Existing namespaces, in the order to join them.
    pub namespaces: Vec<OwnedFd>,
    /// Detached source trees, by position in the plan's mounts.
    pub prepared: Vec<Option<OwnedFd>>,
    /// The same of the root, for a process that will be root in a user namespace only.
    pub prepared_root: Option<OwnedFd>,
    /// Where the master of the terminal goes.
    pub console: Option<OwnedFd>,
    /// See [`CreateOptions`](crate::create::CreateOptions).
    pub line_feeds: bool,
    /// `--no-pivot`.
    pub no_pivot: bool,
    /// False with `--no-new-keyring`.
    pub new_keyring: bool,
    /// Descriptors after the standard ones to pass on.
    pub keep_fds: u32,
    /// `LISTEN_FDS` and `LISTEN_PID`.
    pub extra_env: Vec<CString>,
}

impl Init<'_> {
    /// True when the process stops before the change of the root, so that hooks can run.
    #[must_use]
    pub fn reports_rootfs(plan: &Plan) -> bool {
        let hooks = &plan.hooks;
        !(hooks.prestart.is_empty()
            && hooks.create_runtime.is_empty()
            && hooks.create_container.is_empty())
    }
}

/// Runs the process on `channel`; returns its exit code if it does not become the program.
pub fn run(init: Init<'_>, mut channel: Channel) -> i32 {
    let own = [init.listener.as_raw_fd()].into_iter();
    let optional = init.prepared.iter().flatten().chain(&init.prepared_root);
    let optional = optional.chain(&init.namespaces).chain(&init.console);
    let own: Vec<RawFd> = own.chain(optional.map(AsRawFd::as_raw_fd)).collect();
    let outcome = keep_only(&own, &channel, init.keep_fds)
        .during(Step::Enter)
        .and_then(|()| become_program(init, &mut channel));
    match outcome {
        Ok(never) => match never {},
        Err(Stopped { step, failure }) => {
            // Nobody is left to be told if this fails too.
            let _ = channel.say(&Message::Failed(Report::new(step, &failure)));
            1
        }
    }
}

fn become_program(mut init: Init<'_>, channel: &mut Channel) -> Result<Infallible, Stopped> {
    let plan = init.plan;
    enter(&init, channel).during(Step::Enter)?;
    let (root, proc, pty) = build_root(&mut init, channel)?;
    settle(plan, &root, &proc).during(Step::Settings)?;
    if let (Some(pty), Some(socket)) = (pty, init.console.take()) {
        rootfs::attach_console(&root, pty.slave.as_fd()).during(Step::Terminal)?;
        terminal::offer(pty.master.as_fd(), socket.as_fd(), &plan.process, init.line_feeds)
            .and_then(|()| terminal::take(pty.slave.as_fd()))
            .during(Step::Terminal)?;
    }
    terminal::own_null(&root).during(Step::Terminal)?;
    terminal::own_stdio(plan.process.uid).during(Step::Terminal)?;
    identity::label(&plan.process, || Ok(proc)).during(Step::Identity)?;
    // No descriptor of a directory may be left that the working directory could name.
    drop(root);
    let late_directory = change_directory(&plan.process.cwd, true).during(Step::Identity)?;
    identity::adopt(&plan.process, plan.seccomp.as_ref(), init.keep_fds).during(Step::Identity)?;
    if late_directory {
        change_directory(&plan.process.cwd, false).during(Step::Identity)?;
    }
    let prepared = identity::prepare(&plan.process, &init.extra_env).during(Step::Program)?;
    let state = wait_for_start(&init.listener, channel).during(Step::Enter)?;
    drop(init.listener);
    // The hooks are programs of the container, whose filter holds for them too.
    identity::confine(&plan.process, plan.seccomp.as_ref(), channel)?;
    run_hooks("startContainer", &plan.hooks.start_container, &state, prepared.environment())?;
    identity::execute(&prepared)
}

/// Closes what the process was copied with but does not need: locks, the runtime's end of
/// the channel, descriptors the caller forgot to close.
pub(super) fn keep_only(own: &[RawFd], channel: &Channel, preserved: u32) -> Result<(), Failure> {
    let passed_on = 0..3i32.saturating_add_unsigned(preserved);
    let keep: Vec<RawFd> =
        passed_on.chain(own.iter().copied()).chain([channel.as_fd().as_raw_fd()]).collect();
    pinion_sys::fd::close_all_except(&keep).doing(|| "close_range".into())
}

/// Namespaces, cgroups and ids.
fn enter(init: &Init<'_>, channel: &Channel) -> Result<(), Failure> {
    let plan = init.plan;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .doing(|| "PR_SET_PDEATHSIG".into())?;
    // Whoever is in a user namespace may not lower it: there the runtime or a midwife has.
    if let Some(score) = plan.process.oom_score_adj
        && !plan.namespaces.has(LinuxNamespaceType::User)
    {
        set_own_oom_score(score)?;
    }
    init.join.carry_out(init.cgroup)?;
    settle_affinity(None)?;
    let _ = rustix::thread::set_name(c"pinion:init");
    if !plan.namespaces.creates(LinuxNamespaceType::Pid) {
        hide_memory()?;
    }
    if plan.namespaces.mappings.is_some() {
        channel.await_proceed().doing(|| "wait for the id mappings".into())?;
    }
    // In a new PID namespace only now: a plain user's runtime may write the mappings of a
    // process that is dumpable, and nobody else is there yet.
    hide_memory()?;
    for namespace in &init.namespaces {
        pinion_sys::clone::setns(namespace.as_fd(), 0).doing(|| "join a namespace".into())?;
    }
    if plan.namespaces.has(LinuxNamespaceType::User) {
        become_root_inside()?;
    }
    if plan.namespaces.creates(LinuxNamespaceType::Cgroup) {
        // Only now: the namespace's root is the cgroup the process is in when it is made.
        pinion_sys::clone::unshare(libc::CLONE_NEWCGROUP as u64)
            .doing(|| "unshare the cgroup namespace".into())?;
    }
    rustix::process::setsid().doing(|| "setsid".into())?;
    if init.new_keyring {
        join_keyring(init.id)?;
    }
    Ok(())
}

/// Keeps other processes of the container from looking into this one until it executes its
/// program, unless they may trace whatever they see.
pub(super) fn hide_memory() -> Result<(), Failure> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .doing(|| "PR_SET_DUMPABLE".into())
}

/// Binds the process to the processors of `mask`, or to all its cgroup gives it: since Linux
/// 6.2 the mask of whoever called the runtime would otherwise stay in force.
pub(super) fn settle_affinity(mask: Option<&[u64]>) -> Result<(), Failure> {
    /// The kernel ignores processors beyond its own and takes the cpuset's of the rest.
    const ALL: [u64; 128] = [u64::MAX; 128];
    match (mask, pinion_sys::process::set_affinity(mask.unwrap_or(&ALL))) {
        (Some(_), outcome) => outcome.doing(|| "set the final CPU affinity".into()),
        // A sandbox may forbid it; then the process runs where its parent did.
        (None, _) => Ok(()),
    }
}

/// Root of the user namespace; it may lack the right to drop groups, which is then moot.
pub(super) fn become_root_inside() -> Result<(), Failure> {
    match pinion_sys::process::set_groups(&[]) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
        other => other.doing(|| "setgroups".into())?,
    }
    pinion_sys::process::set_ids(0, 0).doing(|| "become root of the user namespace".into())
}

/// For the calling process, through the host's procfs.
pub(crate) fn set_own_oom_score(score: i32) -> Result<(), Failure> {
    std::fs::write("/proc/self/oom_score_adj", score.to_string())
        .doing(|| format!("write {score} to /proc/self/oom_score_adj"))
}

/// A session keyring of its own; kernels without keyrings need none.
pub(super) fn join_keyring(id: &str) -> Result<(), Failure> {
    let name = CString::new(format!("_ses.{id}"))
        .map_err(|_nul| Failure::refused("the id contains NUL"))?;
    match pinion_sys::keyring::join_session_keyring(&name) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        other => other.doing(|| "unable to join session keyring".into()),
    }
}

/// Mounts, devices, hooks and the change of the root.
fn build_root(
    init: &mut Init<'_>,
    channel: &Channel,
) -> Result<(Root, Proc, Option<Pty>), Stopped> {
    let plan = init.plan;
    rustix::process::umask(Mode::empty());
    let cgroups = CgroupSource {
        hierarchies: init.hierarchies,
        paths: init.cgroup.paths(),
        namespaced: plan.namespaces.has(LinuxNamespaceType::Cgroup),
    };
    let mut rootfs =
        Rootfs::enter(&plan.root, cgroups, init.prepared_root.take()).during(Step::Rootfs)?;
    let mut prepared = std::mem::take(&mut init.prepared).into_iter();
    for mount in &plan.mounts {
        rootfs.mount(mount, prepared.next().flatten()).during(Step::Rootfs)?;
    }
    if let Some(nodes) = &plan.devices {
        rootfs.fill_dev(nodes).during(Step::Rootfs)?;
    }
    let pty = match plan.process.terminal {
        true => Some(rootfs.open_terminal().during(Step::Terminal)?),
        false => None,
    };
    if Init::reports_rootfs(plan) {
        channel.say(&Message::RootfsReady).doing(|| "report".into()).during(Step::Hooks)?;
        let state =
            channel.await_proceed().doing(|| "wait for hooks".into()).during(Step::Hooks)?;
        run_hooks("createContainer", &plan.hooks.create_container, &state, &[])?;
    }
    let (root, proc) = rootfs.finish().during(Step::Rootfs)?;
    rootfs::change_root(&root, &plan.root.path, init.no_pivot).during(Step::Rootfs)?;
    Ok((root, proc, pty))
}

fn run_hooks(
    kind: &'static str,
    list: &[oci_spec::runtime::Hook],
    state: &[u8],
    inherited: &[CString],
) -> Result<(), Stopped> {
    let outcome = hooks::run_inheriting(kind, list, state, Path::new("/"), inherited);
    outcome.map_err(|error| Failure::refused(crate::error::chain(&error))).during(Step::Hooks)
}

/// Names, kernel parameters, masks: what needs the new root and all privileges.
fn settle(plan: &Plan, root: &Root, proc: &Proc) -> Result<(), Failure> {
    if let Some(hostname) = &plan.hostname {
        rustix::system::sethostname(hostname.as_bytes())
            .doing(|| format!("sethostname {hostname:?}"))?;
    }
    if let Some(domain) = &plan.domainname {
        rustix::system::setdomainname(domain.as_bytes())
            .doing(|| format!("setdomainname {domain:?}"))?;
    }
    for parameter in &plan.sysctl {
        proc.write(&format!("sys/{}", parameter.path), &parameter.value)?;
    }
    rootfs::protect(root, &plan.read_only)?;
    rootfs::mask(root, &plan.masked)?;
    set_domain(plan.personality, plan.memory_policy.as_ref())?;
    if plan.process.cwd != Path::new("/") {
        // As runc: a missing working directory is made, unless the file system forbids it,
        // which chdir will then report.
        let _ = root.directory(&plan.process.cwd);
    }
    rootfs::finish_root(root, &plan.root)
}

/// The execution domain and the NUMA policy, which every process of a container has.
pub(super) fn set_domain(
    personality: Option<u64>,
    policy: Option<&MemoryPolicy>,
) -> Result<(), Failure> {
    if let Some(persona) = personality {
        pinion_sys::process::set_personality(persona)
            .doing(|| format!("personality({persona:#x})"))?;
    }
    if let Some(policy) = policy {
        pinion_sys::process::set_memory_policy(policy.mode, &policy.nodes)
            .doing(|| format!("set_mempolicy({:#x}, nodes {:?})", policy.mode, policy.nodes))?;
    }
    Ok(())
}

/// Changes to `cwd`; true when only the user itself may enter it and it is to be tried
/// again later.
///
/// # Errors
/// As chdir(2), and when the directory is not below the root (CVE-2024-21626).
pub(super) fn change_directory(cwd: &Path, may_retry: bool) -> Result<bool, Failure> {
    let what =
        || format!("chdir to cwd ({:?}) set in config.json failed", cwd.display().to_string());
    match rustix::process::chdir(cwd) {
        Err(rustix::io::Errno::ACCESS) if may_retry => return Ok(true),
        other => other.doing(what)?,
    }
    let current = rustix::process::getcwd(Vec::new()).doing(|| "getcwd".into())?;
    if current.to_bytes().first() != Some(&b'/') {
        return Err(Failure::refused(
            "current working directory is outside of container mount namespace root -- possible container breakout detected",
        ));
    }
    Ok(false)
}

/// Tells `create` that all is well and waits for `start`; its connection becomes the channel.
fn wait_for_start(listener: &OwnedFd, channel: &mut Channel) -> Result<Vec<u8>, Failure> {
    // The runtime goes away now, and that is no longer a reason to die.
    rustix::process::set_parent_process_death_signal(None).doing(|| "PR_SET_PDEATHSIG".into())?;
    channel.say(&Message::Ready).doing(|| "report".into())?;
    loop {
        let flags = rustix::net::SocketFlags::CLOEXEC;
        let connection = rustix::io::retry_on_intr(|| rustix::net::accept_with(listener, flags))
            .doing(|| "accept".into())?;
        let starter = Channel::over(connection);
        // Someone who connects and leaves has not started anything.
        if let Ok(state) = starter.await_proceed() {
            *channel = starter;
            return Ok(state);
        }
    }
}
