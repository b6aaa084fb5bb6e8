//! Execs: processes a client runs in a container, and their deadlines.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use pinion_monitor_proto::message::{
    Exec as Request, Exited, KillExec, Started, response::Outcome,
};
use rustix::process::WaitStatus;

use super::attach::{admit, by_name};
use super::clients::{Answer, done};
use super::lifecycle::{check_id, check_path, send_signal, terminal};
use super::runtime::{Job, Starting};
use super::{Child, Pod, Reply};
use crate::container::Verb as Admitted;
use crate::error::{Context, Error};
use crate::event::{Key, Owner, Timer};
use crate::exit;
use crate::log::Log;
use crate::oom::OomWatch;
use crate::reactor::TimerId;
use crate::reap::Moment;
use crate::spawn::{Verb, read_pid};
use crate::stdio::{Manner, Stdio};
use crate::tree::{Family, link_of};

/// A process in a container.
#[derive(Debug)]
pub(super) struct Exec {
    pub(super) container: Key,
    pub(super) id: String,
    /// Relay of its terminal; without one the client's pipes are its own.
    pub(super) stdio: Option<Stdio>,
    reply: Reply,
    /// 0 until it runs and once it has ended.
    pid: i32,
    family: Family,
    timeout: Duration,
    deadline: Option<TimerId>,
    timed_out: bool,
    kills_before: u64,
    exited: Option<Exited>,
}

impl Pod {
    pub(super) fn exec(&mut self, request: &Request, fds: Vec<OwnedFd>, reply: Reply) -> Answer {
        check_id(&request.exec_id)?;
        check_path(&request.process)?;
        let container_key = self.container_key(&request.id)?;
        if self.exec_by_id(container_key, &request.exec_id).is_some() {
            return Err(Error::Exists { what: "exec", id: request.exec_id.clone() });
        }
        let Some(container) = self.containers.get(&container_key) else { return Ok(None) };
        admit(container, Admitted::Exec)?;
        let kills_before = container.oom.as_ref().map_or(0, OomWatch::kills);
        let directory = container.directory.clone();

        let key = self.new_key();
        let fds = by_name(fds, [request.stdin, request.stdout, request.stderr]);
        let console = request.terminal.then(|| self.console(key)).transpose()?;
        let pid_file = directory.join(format!("exec-{key}.pid"));
        let socket = console.as_ref().map(|console| console.path().to_owned());
        let verb = Verb::Exec {
            process: Path::new(&request.process),
            pid_file: &pid_file.clone(),
            console: socket.as_deref(),
        };
        // With a terminal they are ours to relay, without they are the process's alone.
        let (relayed, handed) =
            if request.terminal { (fds, [None, None, None]) } else { ([None, None, None], fds) };
        let starting = Box::new(Starting { reply, pid_file, console, fds: relayed });
        let log = directory.join(format!("exec-{key}.log"));
        let outputs = handed.iter().skip(1).flatten().filter_map(link_of).collect();
        let stdio = handed.each_ref().map(|fd| fd.as_ref().map(AsFd::as_fd));
        self.invoke(&request.id, log, &verb, stdio, Job::Exec(key, starting))?;
        let exec = Exec {
            container: container_key,
            id: request.exec_id.clone(),
            stdio: None,
            reply,
            pid: 0,
            family: Family { outputs, ..Family::default() },
            timeout: Duration::from_millis(request.timeout_ms),
            deadline: None,
            timed_out: false,
            kills_before,
            exited: None,
        };
        self.execs.insert(key, exec);
        Ok(None)
    }

    /// `pinion exec` has ended.
    pub(super) fn exec_started(
        &mut self,
        key: Key,
        starting: Starting,
        since: Moment,
        result: Result<(), Error>,
    ) {
        let reply = starting.reply;
        let pid = read_pid(&starting.pid_file);
        drop(std::fs::remove_file(&starting.pid_file));
        let result = result.and_then(|()| {
            let pid = pid.as_ref().copied().map_err(|error| error.kind());
            let pid = pid.context(|| format!("read pid file {:?}", starting.pid_file))?;
            let ended = self.claim(pid, since)?;
            self.relay(key, starting)?;
            Ok((pid, ended))
        });
        match result {
            Ok((pid, ended)) => self.exec_runs(key, pid, ended),
            Err(error) => {
                // A runtime that was killed may have started it all the same.
                if let Some(pid) = pid.ok().filter(|pid| self.claim(*pid, since).is_ok()) {
                    Family::of(pid, Vec::new()).kill();
                }
                self.execs.remove(&key);
                self.fail(reply, &error);
            }
        }
    }

    /// Connects the terminal of an exec with its client.
    fn relay(&mut self, key: Key, starting: Starting) -> Result<(), Error> {
        let (Some(console), Some(exec)) = (&starting.console, self.execs.get_mut(&key)) else {
            return Ok(());
        };
        let ends = terminal(console, true)?;
        let manner = Manner { stdin_once: false, hang_up: true };
        let owner = Owner::Exec(key);
        let mut stdio = Stdio::new(owner, manner, ends, Log::discard(), &mut self.shared)
            .context(|| "relay the terminal".to_owned())?;
        if let Err(error) = stdio.attach(starting.fds, false, &mut self.shared) {
            stdio.close(&mut self.shared);
            return Err(Error::Invalid(format!("exec: {error}")));
        }
        exec.stdio = Some(stdio);
        Ok(())
    }

    fn exec_runs(&mut self, key: Key, pid: i32, ended: Option<WaitStatus>) {
        let Some(exec) = self.execs.get_mut(&key) else { return };
        let reply = exec.reply;
        if ended.is_none() {
            exec.pid = pid;
            exec.family = Family::of(pid, std::mem::take(&mut exec.family.outputs));
            if !exec.timeout.is_zero() {
                let timer = Timer::Deadline(key);
                exec.deadline = Some(self.shared.reactor.after(exec.timeout, timer));
            }
            self.children.insert(pid, Child::Exec(key));
        }
        self.reply(reply, Outcome::ExecStarted(Started { pid }));
        if let Some(status) = ended {
            self.exec_ended(key, status);
        }
    }

    /// An exec's process has ended.
    pub(super) fn exec_ended(&mut self, key: Key, status: WaitStatus) {
        let Some(exec) = self.execs.get_mut(&key) else { return };
        if let Some(timer) = exec.deadline.take() {
            self.shared.reactor.cancel(timer);
        }
        let mut exited = exit::exited(status);
        exited.timed_out = exec.timed_out;
        let oom = self.containers.get(&exec.container).and_then(|c| c.oom.as_ref());
        let kills = oom.map_or(0, OomWatch::kills);
        exited.oom_killed = exited.signal == libc::SIGKILL && kills > exec.kills_before;
        exec.pid = 0;
        exec.exited = Some(exited);
        if let Some(stdio) = &mut exec.stdio {
            stdio.settle(&mut self.shared);
        }
        self.conclude_exec(key);
    }

    /// Answers for the last time once the client has all output.
    pub(super) fn conclude_exec(&mut self, key: Key) {
        let Some(exec) = self.execs.get_mut(&key) else { return };
        let Some(exited) = exec.exited else { return };
        if let Some(stdio) = &mut exec.stdio {
            if !stdio.is_settled() {
                return;
            }
            stdio.close(&mut self.shared);
        }
        let reply = exec.reply;
        self.execs.remove(&key);
        self.reply(reply, Outcome::ExecExited(exited));
    }

    /// Kills an exec that is past its deadline, whole.
    pub(super) fn exec_overdue(&mut self, key: Key) {
        if let Some(exec) = self.execs.get_mut(&key).filter(|exec| exec.pid != 0) {
            exec.timed_out = true;
            exec.deadline = None;
            exec.family.kill();
        }
    }

    pub(super) fn kill_exec(&mut self, kill: &KillExec) -> Answer {
        let container = self.container_key(&kill.id)?;
        let key = self.exec_key(container, &kill.exec_id)?;
        let Some(exec) = self.execs.get(&key).filter(|exec| exec.pid != 0) else {
            let (id, phase) = (kill.exec_id.clone(), "starting or exited");
            return Err(Error::NotRunning { id, phase });
        };
        match kill.signal {
            0 => drop(exec.family.kill()),
            signal => send_signal(exec.pid, signal)
                .context(|| format!("send signal {signal} to {}", exec.pid))?,
        }
        done()
    }

    pub(super) fn exec_key(&self, container: Key, id: &str) -> Result<Key, Error> {
        let key = self.exec_by_id(container, id);
        key.ok_or_else(|| Error::NotFound { what: "exec", id: id.to_owned() })
    }
}
