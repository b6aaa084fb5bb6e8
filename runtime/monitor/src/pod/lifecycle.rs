//! Containers: create, start, signal, delete, and their end.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pinion_monitor_proto::message::{
    ContainerExited, ContainerOom, Create, Delete, Exited, Signal, Started, Update, event::What,
    response::Outcome,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::WaitStatus;

use super::attach::admit;
use super::clients::{Answer, done};
use super::runtime::Job;
use super::{Child, Container, Pod, Reply};
use crate::console::ConsoleSocket;
use crate::container::{Change, Phase, Verb as Admitted};
use crate::error::{Context, Error};
use crate::event::{Key, Owner, Source, Timer};
use crate::exit;
use crate::log::{DEFAULT_MAX_LINE, Log};
use crate::oom::OomWatch;
use crate::reap::Moment;
use crate::spawn::{Verb, read_pid};
use crate::stdio::{Ends, Manner, Stdio};

/// Longest line a log may hold in one record, in bytes.
const MAX_MAX_LINE: u64 = 1024 * 1024;

/// The kernel notifies before it kills; the count is looked at again this much later.
const OOM_RECHECK: Duration = Duration::from_millis(100);

/// A container being created: all that is needed once the runtime has done its part.
#[derive(Debug)]
pub(super) struct Creation {
    reply: Reply,
    pid_file: PathBuf,
    console: Option<ConsoleSocket>,
    ends: Ends,
    stdin: bool,
    manner: Manner,
    log: Log,
    cgroup: String,
    memory_cgroup: String,
}

/// Ends of the pipes that the container gets.
#[derive(Default)]
pub(super) struct TheirEnds {
    pub(super) stdin: Option<OwnedFd>,
    pub(super) stdout: Option<OwnedFd>,
    pub(super) stderr: Option<OwnedFd>,
}

impl Pod {
    pub(super) fn create(&mut self, create: Create, reply: Reply) -> Answer {
        check(&create)?;
        if self.container_key(&create.id).is_ok() {
            return Err(Error::Exists { what: "container", id: create.id });
        }
        let key = self.new_key();
        let log = open_log(&create)?;
        let (ends, theirs) =
            if create.terminal { Default::default() } else { pipes(create.stdin)? };
        let console = create.terminal.then(|| self.console(key)).transpose()?;
        let directory = PathBuf::from(create.directory);
        let pid_file = directory.join("pid");
        let socket = console.as_ref().map(|console| console.path().to_owned());
        let verb = Verb::Create {
            bundle: Path::new(&create.bundle),
            pid_file: &pid_file.clone(),
            console: socket.as_deref(),
        };
        let creation = Creation {
            reply,
            pid_file,
            console,
            ends,
            stdin: create.stdin,
            manner: Manner { stdin_once: create.stdin_once, hang_up: false },
            log,
            cgroup: create.cgroup,
            memory_cgroup: create.memory_cgroup,
        };
        let stdio =
            [&theirs.stdin, &theirs.stdout, &theirs.stderr].map(|fd| fd.as_ref().map(AsFd::as_fd));
        let runtime_log = self.runtime_log(Some(&directory));
        let job = Job::Create(key, Box::new(creation));
        self.invoke(&create.id, runtime_log, &verb, stdio, job)?;
        let container = Container {
            id: create.id,
            directory,
            phase: Phase::Creating,
            pid: 0,
            deleting: false,
            stdio: None,
            oom: None,
        };
        self.containers.insert(key, container);
        Ok(None)
    }

    /// A socket for the terminal of process `key`, in the pod's directory: the container's
    /// own may be too deep for a socket address.
    pub(super) fn console(&self, key: Key) -> Result<ConsoleSocket, Error> {
        let path = self.options.dir.join(format!("console-{key}.sock"));
        ConsoleSocket::bind(&path).context(|| format!("listen on {path:?}"))
    }

    /// `pinion create` has ended; `killed` if it could not clean up after itself.
    pub(super) fn created(
        &mut self,
        key: Key,
        creation: Creation,
        since: Moment,
        killed: bool,
        result: Result<(), Error>,
    ) {
        let reply = creation.reply;
        let ran = result.is_ok();
        match result.and_then(|()| self.take_over(key, creation, since)) {
            Ok((pid, ended)) => {
                self.reply(reply, Outcome::Created(Started { pid }));
                if let Some(status) = ended {
                    self.init_exited(key, status);
                }
            }
            Err(error) => {
                if let Some(container) = self.forget(key).filter(|_| ran || killed) {
                    self.clean_up(&container.id);
                }
                self.fail(reply, &error);
            }
        }
    }

    /// Takes over the stdio, pid and memory cgroup of a created container.
    fn take_over(
        &mut self,
        key: Key,
        creation: Creation,
        since: Moment,
    ) -> Result<(i32, Option<WaitStatus>), Error> {
        let pid = read_pid(&creation.pid_file)
            .context(|| format!("read pid file {:?}", creation.pid_file))?;
        let ended = self.claim(pid, since)?;
        let ends = match &creation.console {
            None => creation.ends,
            Some(console) => terminal(console, creation.stdin)?,
        };
        let owner = Owner::Container(key);
        let stdio = Stdio::new(owner, creation.manner, ends, creation.log, &mut self.shared)
            .context(|| "watch the container's stdio".to_owned())?;
        let oom = OomWatch::open(&creation.cgroup, &creation.memory_cgroup).and_then(|watch| {
            let Some(mut watch) = watch else { return Ok(None) };
            watch.watch(&mut self.shared.reactor, Source::Oom(key))?;
            Ok(Some(watch))
        });
        // Without it a container is as good, only its end is explained less well.
        let oom = self.journal.noted("OOM kills will not be seen", oom).flatten();
        if let Some(container) = self.containers.get_mut(&key) {
            container.stdio = Some(stdio);
            container.oom = oom;
            change(container, Change::Created);
            if ended.is_none() {
                container.pid = pid;
                self.children.insert(pid, Child::Init(key));
            }
        }
        Ok((pid, ended))
    }

    fn clean_up(&mut self, id: &str) {
        let log = self.runtime_log(None);
        let verb = Verb::Delete { force: true };
        let started = self.invoke(id, log, &verb, [None; 3], Job::CleanUp);
        self.journal.noted("clean up after a failed create", started.map_err(|e| e.to_string()));
    }

    pub(super) fn start(&mut self, id: &str, reply: Reply) -> Answer {
        let key = self.container_key(id)?;
        self.admitted(key, Admitted::Start)?;
        let log = self.runtime_log(self.directory_of(key).as_deref());
        self.invoke(id, log, &Verb::Start, [None; 3], Job::Start(key, reply))?;
        if let Some(container) = self.containers.get_mut(&key) {
            change(container, Change::Start);
        }
        Ok(None)
    }

    pub(super) fn started(&mut self, key: Key, reply: Reply, result: Result<(), Error>) {
        let exited = self.containers.get_mut(&key).is_some_and(|container| {
            let started = result.is_ok();
            change(container, if started { Change::Started } else { Change::StartFailed });
            !container.phase.is_alive()
        });
        self.answer_done(reply, result);
        if exited {
            // Held back so that nobody hears of the end before the beginning.
            self.tell_exit(key);
        }
    }

    pub(super) fn signal(&mut self, signal: &Signal, reply: Reply) -> Answer {
        let key = self.container_key(&signal.id)?;
        self.admitted(key, Admitted::Signal)?;
        let Signal { signal: number, all, .. } = *signal;
        if !(1..=64).contains(&number) {
            return Err(Error::Invalid(format!("signal {number} does not exist")));
        }
        let pid = self.containers.get(&key).map_or(0, |container| container.pid);
        // Its parent can signal it without a doubt about who it is, and without a process.
        if !all && is_named(number) {
            send_signal(pid, number).context(|| format!("send signal {number} to {pid}"))?;
            return done();
        }
        let log = self.runtime_log(self.directory_of(key).as_deref());
        let verb = Verb::Kill { signal: number, all };
        self.invoke(&signal.id, log, &verb, [None; 3], Job::Plain(reply))?;
        Ok(None)
    }

    /// Changes the limits of a container that is alive.
    pub(super) fn update(&mut self, update: &Update, reply: Reply) -> Answer {
        check_path(&update.resources)?;
        let key = self.container_key(&update.id)?;
        // What can be signalled can be limited.
        self.admitted(key, Admitted::Signal)?;
        let log = self.runtime_log(self.directory_of(key).as_deref());
        let verb = Verb::Update { resources: Path::new(&update.resources) };
        self.invoke(&update.id, log, &verb, [None; 3], Job::Plain(reply))?;
        Ok(None)
    }

    /// Removes a container. By force also one that we know nothing of: the runtime may.
    pub(super) fn delete(&mut self, delete: &Delete, reply: Reply) -> Answer {
        let force = delete.force;
        let key = match self.container_key(&delete.id) {
            Ok(key) => Some(key),
            Err(_) if force => None,
            Err(error) => return Err(error),
        };
        check_id(&delete.id)?;
        if let Some(key) = key {
            self.admitted(key, if force { Admitted::ForceDelete } else { Admitted::Delete })?;
        }
        let log = self.runtime_log(key.and_then(|key| self.directory_of(key)).as_deref());
        let job = Job::Delete(key, reply);
        self.invoke(&delete.id, log, &Verb::Delete { force }, [None; 3], job)?;
        if let Some(container) = key.and_then(|key| self.containers.get_mut(&key)) {
            container.deleting = true;
        }
        Ok(None)
    }

    pub(super) fn deleted(&mut self, key: Option<Key>, reply: Reply, result: Result<(), Error>) {
        if let Some(key) = key {
            if result.is_ok() {
                self.forget(key);
            } else if let Some(container) = self.containers.get_mut(&key) {
                container.deleting = false;
            }
        }
        self.answer_done(reply, result);
    }

    /// Drops all we keep for a container.
    pub(super) fn forget(&mut self, key: Key) -> Option<Container> {
        let mut container = self.containers.remove(&key)?;
        if let Some(mut stdio) = container.stdio.take() {
            stdio.close(&mut self.shared);
        }
        if let Some(mut oom) = container.oom.take() {
            oom.unwatch(&mut self.shared.reactor);
        }
        Some(container)
    }

    /// A container's init is a child of ours, and has ended.
    pub(super) fn init_exited(&mut self, key: Key, status: WaitStatus) {
        let Some(container) = self.containers.get(&key) else { return };
        let mut exited = exit::exited(status);
        // An exit code of 0 says that it got over the loss of a process.
        let kills = container.oom.as_ref().map_or(0, OomWatch::kills);
        exited.oom_killed = kills > 0 && exited.code != 0;
        self.init_ended(key, exited);
    }

    /// A container's init has ended: its output is logged, its exit recorded, then told.
    pub(super) fn init_ended(&mut self, key: Key, exited: Exited) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        if let Some(stdio) = &mut container.stdio {
            stdio.settle(&mut self.shared);
        }
        let recorded = exit::record(&container.directory, &exited);
        let starting = container.phase == Phase::Starting;
        container.pid = 0;
        change(container, Change::Exited(exited));
        self.journal.noted("exit.json", recorded);
        self.tell_oom(key);
        if !starting {
            self.tell_exit(key);
        }
    }

    fn tell_exit(&mut self, key: Key) {
        let Some(container) = self.containers.get(&key) else { return };
        if let Phase::Exited { exited, .. } = container.phase {
            let id = container.id.clone();
            self.tell(What::Exited(ContainerExited { id, exited: Some(exited) }));
        }
    }

    /// The kernel has something to say about a container's memory cgroup.
    pub(super) fn memory_changed(&mut self, key: Key) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let Some(oom) = &mut container.oom else { return };
        if oom.acknowledge().is_err() {
            // The cgroup is gone.
            oom.unwatch(&mut self.shared.reactor);
            return;
        }
        self.shared.reactor.after(OOM_RECHECK, Timer::Oom(key));
        self.tell_oom(key);
    }

    /// Tells of kills that were not told yet.
    pub(super) fn tell_oom(&mut self, key: Key) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        if let Some(count) = container.oom.as_mut().and_then(OomWatch::news) {
            let id = container.id.clone();
            self.tell(What::Oom(ContainerOom { id, count }));
        }
    }

    pub(super) fn admitted(&self, key: Key, verb: Admitted) -> Result<(), Error> {
        self.containers.get(&key).map_or(Ok(()), |container| admit(container, verb))
    }

    pub(super) fn directory_of(&self, key: Key) -> Option<PathBuf> {
        self.containers.get(&key).map(|container| container.directory.clone())
    }
}

pub(super) fn change(container: &mut Container, change: Change) {
    let phase = std::mem::replace(&mut container.phase, Phase::Creating);
    container.phase = phase.after(change);
}

/// Sends a signal that has a name to a child that was not waited for.
pub(super) fn send_signal(pid: i32, signal: i32) -> std::io::Result<()> {
    let signal = nix::sys::signal::Signal::try_from(signal)?;
    if pid <= 1 {
        return Err(rustix::io::Errno::SRCH.into());
    }
    Ok(nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal)?)
}

fn is_named(signal: i32) -> bool {
    nix::sys::signal::Signal::try_from(signal).is_ok()
}

/// Our ends of new pipes, and the container's.
pub(super) fn pipes(stdin: bool) -> Result<(Ends, TheirEnds), Error> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC).context(|| "create a pipe".to_owned());
    let ((our_out, their_out), (our_err, their_err)) = (pipe()?, pipe()?);
    let (their_in, our_in) = stdin.then(pipe).transpose()?.unzip();
    let ours = Ends { stdin: our_in, stdout: Some(our_out), stderr: Some(our_err) };
    let theirs = TheirEnds { stdin: their_in, stdout: Some(their_out), stderr: Some(their_err) };
    Ok((ours, theirs))
}

/// Both directions of the terminal a runtime has sent, or only its output.
pub(super) fn terminal(console: &ConsoleSocket, stdin: bool) -> Result<Ends, Error> {
    let ends = console.take_master().and_then(Ends::terminal);
    let ends = ends.context(|| "take the terminal over from the runtime".to_owned())?;
    Ok(if stdin { ends } else { Ends { stdin: None, ..ends } })
}

pub(super) fn open_log(create: &Create) -> Result<Log, Error> {
    if create.log_path.is_empty() {
        return Ok(Log::discard());
    }
    let max_line = match create.max_log_line {
        0 => DEFAULT_MAX_LINE,
        bytes => usize::try_from(bytes.min(MAX_MAX_LINE)).unwrap_or(DEFAULT_MAX_LINE),
    };
    Ok(Log::open(Path::new(&create.log_path), max_line)?)
}

pub(super) fn check(create: &Create) -> Result<(), Error> {
    check_id(&create.id)?;
    let paths = [&create.bundle, &create.directory];
    let optional = [&create.log_path, &create.cgroup, &create.memory_cgroup];
    let given = optional.into_iter().filter(|path| !path.is_empty());
    paths.into_iter().chain(given).try_for_each(|path| check_path(path))?;
    for share in &create.shares {
        check_id(&share.name)?;
        check_path(&share.source)?;
        if share.name.strip_prefix(&create.id).is_none_or(|rest| !rest.starts_with('-')) {
            return Err(Error::Invalid(format!(
                "{:?} names no share of {:?}",
                share.name, create.id
            )));
        }
    }
    Ok(())
}

/// Ids become arguments and file names.
pub(super) fn check_id(id: &str) -> Result<(), Error> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '+');
    let good = id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id.len() <= 255
        && id.chars().all(plain);
    if good { Ok(()) } else { Err(Error::Invalid(format!("bad id {id:?}"))) }
}

/// Paths become arguments.
pub(super) fn check_path(path: &str) -> Result<(), Error> {
    let good = path.starts_with('/') && path.len() < 4096 && !path.contains('\0');
    if good { Ok(()) } else { Err(Error::Invalid(format!("path {path:?} is not absolute"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_are_options_or_paths_are_refused() {
        for id in ["", "-f", "--force", "a/b", "..", ".", "a b", "a\0", "é", &"x".repeat(256)] {
            assert!(check_id(id).is_err(), "{id:?}");
        }
        for id in ["a", "0af3", "web_1.2-x"] {
            assert!(check_id(id).is_ok(), "{id:?}");
        }
    }

    #[test]
    fn relative_paths_are_refused() {
        assert!(check_path("").is_err() && check_path("a").is_err() && check_path("/a\0").is_err());
        assert!(check_path("/run/x").is_ok());
    }
}
