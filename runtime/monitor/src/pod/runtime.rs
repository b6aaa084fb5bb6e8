//! Invocations of the runtime in the loop: started here, finished when SIGCHLD tells.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::WaitStatus;

use super::execs::Exec;
use super::lifecycle::{Creation, send_signal};
use super::{Child, Pod, Reply};
use crate::console::ConsoleSocket;
use crate::error::{Context, Error};
use crate::event::{Key, Timer};
use crate::reactor::TimerId;
use crate::reap::{Children, Moment};
use crate::spawn::{RuntimeLog, Verb, arguments, spawn};

/// A runtime that takes longer is killed.
const PATIENCE: Duration = Duration::from_secs(120);

/// What an invocation is for, with all that its end needs.
#[derive(Debug)]
pub(super) enum Job {
    Create(Key, Box<Creation>),
    Start(Key, Reply),
    /// Anything that changes nothing here.
    Plain(Reply),
    Delete(Option<Key>, Reply),
    Exec(Key, Box<Starting>),
    /// Removing what a failed create has left.
    CleanUp,
}

/// Files of an exec that is being started.
#[derive(Debug)]
pub(super) struct Starting {
    pub(super) reply: Reply,
    pub(super) pid_file: PathBuf,
    pub(super) console: Option<ConsoleSocket>,
    pub(super) fds: [Option<std::os::fd::OwnedFd>; 3],
}

/// A running runtime.
#[derive(Debug)]
pub(super) struct Invocation {
    job: Job,
    verb: &'static str,
    log: RuntimeLog,
    overdue: TimerId,
    timed_out: bool,
    /// Exits before this one have nothing to do with what the runtime starts.
    pub(super) since: Moment,
}

impl Job {
    /// Whether a pid will be named by the invocation's pid file.
    fn names_pid(&self) -> bool {
        matches!(self, Self::Create(..) | Self::Exec(..))
    }
}

impl Pod {
    /// Starts the runtime on container `id`; `job` is what to do when it has finished.
    pub(super) fn invoke(
        &mut self,
        id: &str,
        log: PathBuf,
        verb: &Verb<'_>,
        stdio: [Option<BorrowedFd<'_>>; 3],
        job: Job,
    ) -> Result<(), Error> {
        let log = RuntimeLog::from_now(log);
        let command = arguments(&self.options, log.path(), id, verb);
        let stdio = stdio.map(|fd| fd.unwrap_or(self.null.as_fd()));
        let since = self.children.now();
        let spawned = self.oom_score.exposed(|| spawn(&command, stdio));
        let pid = spawned.context(|| format!("start {:?}", self.options.runtime))?;
        let overdue = self.shared.reactor.after(PATIENCE, Timer::Runtime(pid));
        let invocation =
            Invocation { job, verb: verb.name(), log, overdue, timed_out: false, since };
        self.children.insert(pid, Child::Runtime(invocation));
        Ok(())
    }

    /// Kills a runtime that hangs; its end is then handled as any other.
    pub(super) fn runtime_overdue(&mut self, pid: i32) {
        if let Some(Child::Runtime(invocation)) = self.children.get_mut(pid) {
            invocation.timed_out = true;
            drop(send_signal(pid, libc::SIGKILL));
        }
    }

    /// Collects ended children. Runtimes come last, so that what they report about a
    /// process that has ended in the meantime finds its exit.
    pub(super) fn reap(&mut self) {
        let mut runtimes = Vec::new();
        for (pid, status) in Children::<Child>::collect() {
            match self.children.ended(pid, status) {
                Some(Child::Runtime(invocation)) => runtimes.push((invocation, status)),
                Some(Child::Init(key)) => self.init_exited(key, status),
                Some(Child::Exec(key)) => self.exec_ended(key, status),
                Some(Child::Machine) => self.machine_ended(status),
                Some(Child::Share) => self.share_ended(status),
                None => {}
            }
        }
        for (invocation, status) in runtimes {
            self.finished(invocation, status);
        }
        let expected = self.children.iter().any(
            |(_, child)| matches!(child, Child::Runtime(invocation) if invocation.job.names_pid()),
        );
        if !expected {
            self.children.forget_unclaimed();
        }
    }

    fn finished(&mut self, invocation: Invocation, status: WaitStatus) {
        self.shared.reactor.cancel(invocation.overdue);
        let Invocation { job, verb, log, timed_out, since, .. } = invocation;
        let result = if status.exit_status() == Some(0) {
            Ok(())
        } else if timed_out {
            Err(Error::Timeout { verb, seconds: PATIENCE.as_secs() })
        } else {
            Err(Error::Runtime(log.last_error().unwrap_or_else(|| ending(verb, status))))
        };
        match job {
            Job::Create(key, creation) => {
                let clean = status.signaled();
                self.created(key, *creation, since, clean, result);
            }
            Job::Start(key, reply) => self.started(key, reply, result),
            Job::Plain(reply) => self.answer_done(reply, result),
            Job::Delete(key, reply) => self.deleted(key, reply, result),
            Job::Exec(key, starting) => {
                drop(std::fs::remove_file(log.path()));
                self.exec_started(key, *starting, since, result);
            }
            Job::CleanUp => drop(self.journal.noted("clean up", result)),
        }
    }

    /// Answers with done or the error.
    pub(super) fn answer_done(&mut self, reply: Reply, result: Result<(), Error>) {
        match result.and_then(|()| super::clients::done()) {
            Ok(Some(outcome)) => self.reply(reply, outcome),
            Ok(None) => {}
            Err(error) => self.fail(reply, &error),
        }
    }

    /// Where the runtime logs what it does to a container: beside the container's other
    /// files while that directory exists.
    pub(super) fn runtime_log(&self, directory: Option<&Path>) -> PathBuf {
        let own = directory.filter(|directory| directory.is_dir());
        own.unwrap_or(&self.options.dir).join("runtime.log")
    }

    /// How a process that the runtime has started ended, if it has; an error if it is no
    /// child of ours, so that its end would never be seen.
    pub(super) fn claim(&mut self, pid: i32, since: Moment) -> Result<Option<WaitStatus>, Error> {
        use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
        if let Some(status) = self.children.claim(pid, since) {
            return Ok(Some(status));
        }
        let flags = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let ours = Pid::from_raw(pid).is_some_and(|pid| waitid(WaitId::Pid(pid), flags).is_ok());
        if ours {
            Ok(None)
        } else {
            Err(Error::Runtime(format!("runtime started process {pid}, which is not our child")))
        }
    }

    /// The exec of this name in a container, while it runs.
    pub(super) fn exec_by_id(&self, container: Key, id: &str) -> Option<Key> {
        let is = |exec: &Exec| exec.container == container && exec.id == id;
        self.execs.iter().find(|(_, exec)| is(exec)).map(|(key, _)| *key)
    }
}

fn ending(verb: &str, status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("runtime {verb} failed with exit code {code} and no message"),
        (_, Some(signal)) => format!("runtime {verb} was killed by signal {signal}"),
        _ => format!("runtime {verb} ended in an unknown way"),
    }
}
