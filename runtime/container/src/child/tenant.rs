//! A further process of a running container (`exec`).
//!
//! In two steps, by two processes: [`Tenant::enter`] gives up the host where the container
//! cannot see it, then [`Entered::run`] becomes the program inside; see
//! [`midwife`](crate::midwife).

use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use pinion_cgroup::Cgroup;
use pinion_seccomp::Program;
use pinion_sys::tty::Pty;
use rustix::process::Signal;

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
    /// The container's first process, until it was joined.
    pub container: Option<OwnedFd>,
    /// The `CLONE_NEW*` bits of the namespaces to join.
    pub namespaces: u64,
    /// The container's cgroup.
    pub cgroup: &'a Cgroup,
    /// How it gets into it.
    pub join: Join,
    /// Where the master of the terminal goes.
    pub console: Option<OwnedFd>,
    /// See [`CreateOptions`](crate::create::CreateOptions).
    pub line_feeds: bool,
    /// False with `--no-new-keyring`.
    pub new_keyring: bool,
    /// Descriptors after the standard ones to pass on.
    pub keep_fds: u32,
}

/// A process that is in the container but for the PID namespace, which its children are in.
#[derive(Debug)]
pub struct Entered<'a> {
    tenant: Tenant<'a>,
    slave: Option<OwnedFd>,
}

impl<'a> Tenant<'a> {
    /// Joins the container; what is left open are the descriptors to pass on, `channel`,
    /// `answer` and a terminal of the container.
    ///
    /// # Errors
    /// A report for the runtime.
    pub fn enter(
        mut self,
        channel: &Channel,
        answer: BorrowedFd<'_>,
    ) -> Result<Entered<'a>, Report> {
        self.join_container(channel, answer)
            .during(Step::Enter)
            .and_then(|()| self.open_console().during(Step::Terminal))
            .map_err(|Stopped { step, failure }| Report::new(step, &failure))
            .map(|slave| Entered { tenant: self, slave })
    }

    fn join_container(&mut self, channel: &Channel, answer: BorrowedFd<'_>) -> Result<(), Failure> {
        let Some(container) = self.container.take() else { return Ok(()) };
        let own = [container.as_raw_fd(), answer.as_raw_fd()].into_iter();
        let own: Vec<RawFd> = own.chain(self.console.iter().map(AsRawFd::as_raw_fd)).collect();
        init::keep_only(&own, channel, self.keep_fds)?;
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
            .doing(|| "PR_SET_PDEATHSIG".into())?;
        if let Some(score) = self.process.oom_score_adj {
            init::set_own_oom_score(score)?;
        }
        self.join.carry_out(self.cgroup)?;
        init::settle_affinity(self.process.affinity.1.as_deref())?;
        let _ = rustix::thread::set_name(c"pinion:exec");
        // Also makes the container's root ours, and our working directory.
        pinion_sys::clone::setns(container.as_fd(), self.namespaces)
            .doing(|| "join the container's namespaces".into())?;
        if self.namespaces & libc::CLONE_NEWUSER as u64 != 0 {
            init::become_root_inside()?;
        }
        // Inherited by the next one, which the container sees (CVE-2016-9962).
        init::hide_memory()
    }

    /// The slave of a new terminal, whose master goes to the console socket.
    fn open_console(&mut self) -> Result<Option<OwnedFd>, Failure> {
        let Some(socket) = self.console.take() else { return Ok(None) };
        let pty = open_terminal()?;
        terminal::offer(pty.master.as_fd(), socket.as_fd(), self.process, self.line_feeds)?;
        Ok(Some(pty.slave))
    }
}

impl Entered<'_> {
    /// Runs the process on `channel`; returns its exit code if it does not become the program.
    #[must_use]
    pub fn run(&self, channel: &Channel) -> i32 {
        match self.become_program(channel) {
            Ok(never) => match never {},
            Err(Stopped { step, failure }) => {
                let _ = channel.say(&Message::Failed(Report::new(step, &failure)));
                1
            }
        }
    }

    fn become_program(&self, channel: &Channel) -> Result<Infallible, Stopped> {
        let (tenant, plan) = (&self.tenant, self.tenant.process);
        self.begin(channel).during(Step::Enter)?;
        if let Some(slave) = &self.slave {
            terminal::take(slave.as_fd()).during(Step::Terminal)?;
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
        identity::confine(plan, tenant.filter, channel)?;
        identity::execute(&prepared)
    }

    fn begin(&self, channel: &Channel) -> Result<(), Failure> {
        let slave: Vec<RawFd> = self.slave.iter().map(AsRawFd::as_raw_fd).collect();
        init::keep_only(&slave, channel, self.tenant.keep_fds)?;
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
            .doing(|| "PR_SET_PDEATHSIG".into())?;
        rustix::process::setsid().doing(|| "setsid".into())?;
        if self.tenant.new_keyring {
            init::join_keyring(self.tenant.id)?;
        }
        Ok(())
    }
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
