//! A further process of a running container (`exec`).

use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use pinion_cgroup::Cgroup;
use pinion_seccomp::Program;
use pinion_sys::tty::Pty;
use rustix::process::{DumpableBehavior, Signal};

use super::{During, Join, Step, Stopped, identity, init, terminal};
use crate::error::{Doing, Failure};
use crate::memory_policy::MemoryPolicy;
use crate::process::ProcessPlan;
use crate::protocol::{Channel, Message, Report};
use crate::rootfs::{Proc, Root, open_path};

/// What the runtime made for the process before it was born.
#[derive(Debug)]
pub struct Tenant<'a> {
    /// The decisions.
    pub process: &'a ProcessPlan,
    /// The container's name, for its keyring.
    pub id: &'a str,
    /// The container's system call filter.
    pub filter: Option<&'a Program>,
    /// The container's execution domain.
    pub personality: Option<u64>,
    /// The container's NUMA policy.
    pub memory_policy: Option<&'a MemoryPolicy>,
    /// The container's first process.
    pub container: OwnedFd,
    /// The `CLONE_NEW*` bits of the namespaces to join, PID namespace excluded.
    pub namespaces: u64,
    /// The container's cgroup.
    pub cgroup: &'a Cgroup,
    /// How the process gets into it.
    pub join: Join,
    /// Where the master of the terminal goes.
    pub console: Option<OwnedFd>,
    /// False with `--no-new-keyring`.
    pub new_keyring: bool,
    /// Descriptors after the standard ones to pass on.
    pub keep_fds: u32,
}

/// Runs the process on `channel`; returns its exit code if it does not become the program.
pub fn run(tenant: &Tenant<'_>, channel: &Channel) -> i32 {
    let own = [&tenant.container].into_iter().chain(&tenant.console);
    let own: Vec<RawFd> = own.map(AsRawFd::as_raw_fd).collect();
    let outcome = init::keep_only(&own, channel, tenant.keep_fds)
        .during(Step::Enter)
        .and_then(|()| become_program(tenant, channel));
    match outcome {
        Ok(never) => match never {},
        Err(Stopped { step, failure }) => {
            let _ = channel.say(&Message::Failed(Report::new(step, &failure)));
            1
        }
    }
}

fn become_program(tenant: &Tenant<'_>, channel: &Channel) -> Result<Infallible, Stopped> {
    let plan = tenant.process;
    enter(tenant).during(Step::Enter)?;
    if let Some(socket) = &tenant.console {
        let pty = open_terminal().during(Step::Terminal)?;
        terminal::install(&pty, socket.as_fd(), plan).during(Step::Terminal)?;
    }
    terminal::own_stdio(plan.uid).during(Step::Terminal)?;
    init::set_domain(tenant.personality, tenant.memory_policy).during(Step::Settings)?;
    identity::label(plan, Proc::detached).during(Step::Identity)?;
    let late = init::change_directory(&plan.cwd, true).during(Step::Identity)?;
    identity::adopt(plan, tenant.filter, tenant.keep_fds).during(Step::Identity)?;
    if late {
        init::change_directory(&plan.cwd, false).during(Step::Identity)?;
    }
    let prepared = identity::prepare(plan, &[]).during(Step::Program)?;
    // From the program on, the fate of the runtime is not that of the process.
    rustix::process::set_parent_process_death_signal(None)
        .doing(|| "PR_SET_PDEATHSIG".into())
        .during(Step::Identity)?;
    identity::execute(&prepared, plan, tenant.filter, channel)
}

fn enter(tenant: &Tenant<'_>) -> Result<(), Failure> {
    let plan = tenant.process;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .doing(|| "PR_SET_PDEATHSIG".into())?;
    if let Some(score) = plan.oom_score_adj {
        init::set_own_oom_score(score)?;
    }
    tenant.join.carry_out(tenant.cgroup)?;
    init::settle_affinity(plan.affinity.1.as_deref())?;
    // A process of the container must not be able to look into this one (CVE-2016-9962).
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .doing(|| "PR_SET_DUMPABLE".into())?;
    let _ = rustix::thread::set_name(c"pinion:exec");
    pinion_sys::clone::setns(tenant.container.as_fd(), tenant.namespaces)
        .doing(|| "join the container's namespaces".into())?;
    if tenant.namespaces & libc::CLONE_NEWUSER as u64 != 0 {
        init::become_root_inside()?;
    }
    rustix::process::setsid().doing(|| "setsid".into())?;
    if tenant.new_keyring {
        init::join_keyring(tenant.id)?;
    }
    Ok(())
}

/// Opens a terminal of the container's devpts, verified to be one.
fn open_terminal() -> Result<Pty, Failure> {
    const DEVPTS_SUPER_MAGIC: rustix::fs::FsWord = 0x1cd1;
    let root = Root::new(open_path(Path::new("/"))?);
    let devpts = root.find_without_links(Path::new("/dev/pts")).doing(|| "open /dev/pts".into())?;
    let kind = rustix::fs::fstatfs(&devpts).doing(|| "statfs /dev/pts".into())?.f_type;
    if kind != DEVPTS_SUPER_MAGIC {
        return Err(Failure::refused("/dev/pts is not devpts"));
    }
    pinion_sys::tty::open_in(devpts.as_fd(), c"ptmx").doing(|| "open a pseudo terminal".into())
}
