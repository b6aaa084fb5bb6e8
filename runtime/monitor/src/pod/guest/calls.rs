//! The verbs that are calls to the agent instead of runs of the runtime.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pinion_microvm::driver::{Disk, Driver};
use pinion_microvm::qemu::Qemu;
use pinion_monitor_proto::guest::{Call, packet::What};
use pinion_monitor_proto::message::error::Kind;
use pinion_monitor_proto::message::request::Verb;
use pinion_monitor_proto::message::response::Outcome;
use pinion_monitor_proto::message::{
    self, ContainerOom, ContainerUsage, Create, Delete, Dial, Done, Exec, Hello, Request, Response,
    Started, Update, Usage, UsageReply, event::What as News,
};

use super::{Creation, HeldAnswer, Inside, Pending, Script, State, tamed};
use crate::container::{Change, Phase, Verb as Admitted};
use crate::error::{Context, Error};
use crate::event::{Key, Owner};
use crate::exit;
use crate::pod::attach::by_name;
use crate::pod::clients::{Answer, done};
use crate::pod::lifecycle::{change, check, check_id, check_path, open_log, pipes};
use crate::pod::{Container, Pod, Reply};
use crate::socket::set_nonblocking;
use crate::stdio::{Manner, Stdio, check_pollable};

/// Largest configuration of a container or process that is passed on, in bytes.
const MAX_DOCUMENT: u64 = 512 * 1024;

/// Kills told of at most this often for a container.
const OOM_PAUSE: Duration = Duration::from_millis(100);

impl Pod {
    /// Carries out a verb in the guest that there is; hands back one that needs none.
    pub(in crate::pod) fn carry_out_inside(
        &mut self,
        verb: Verb,
        fds: Vec<OwnedFd>,
        reply: Reply,
    ) -> Result<Answer, Box<(Verb, Vec<OwnedFd>)>> {
        Ok(match verb {
            Verb::Hello(hello) if self.is_coming_up() => self.wait_for_guest(&hello, reply),
            Verb::Create(create) => self.create_inside(create, reply),
            Verb::Start(start) => self.start_inside(&start.id, reply),
            Verb::Signal(signal) => self.signal_inside(signal, reply),
            Verb::Update(update) => self.update_inside(&update, reply),
            Verb::Delete(delete) => self.delete_inside(delete, reply),
            Verb::Exec(exec) => self.exec_inside(exec, fds, reply),
            Verb::KillExec(kill) => self.pass_on(Verb::KillExec(kill), reply),
            Verb::Resize(resize) => self.pass_on(Verb::Resize(resize), reply),
            Verb::Usage(usage) => self.usage_inside(usage, reply),
            Verb::Dial(dial) => self.dial_inside(dial, fds, reply),
            other => return Err(Box::new((other, fds))),
        })
    }

    /// Whether the guest may still become one that takes calls.
    fn is_coming_up(&mut self) -> bool {
        self.guest().is_some_and(|g| matches!(g.state, State::Booting | State::SettingUp))
    }

    fn wait_for_guest(&mut self, hello: &Hello, reply: Reply) -> Answer {
        self.hello(hello, reply)?;
        if let Some(guest) = self.guest() {
            guest.waiting.push(reply);
        }
        Ok(None)
    }

    /// Sends a call and remembers what its answer is for.
    fn call(
        &mut self,
        verb: Verb,
        document: Vec<u8>,
        streams: [u32; 3],
        pending: Pending,
    ) -> Result<(), Error> {
        let Some(guest) = self.guest() else { return Ok(()) };
        if let State::Ended(ended) = &guest.state {
            let text = format!("the pod's virtual machine has ended: {}", ended.message);
            return Err(Error::Invalid(text));
        }
        guest.last_call += 1;
        let id = guest.last_call;
        guest.calls.insert(id, pending);
        let [stdin, stdout, stderr] = streams;
        let request = Some(Request { id, verb: Some(verb) });
        self.say(What::Call(Call { request, document, stdin, stdout, stderr }));
        Ok(())
    }

    fn pass_on(&mut self, verb: Verb, reply: Reply) -> Answer {
        self.call(verb, Vec::new(), [0; 3], Pending::Plain(reply))?;
        Ok(None)
    }

    /// Plugs in the container's disk; the call follows when it is in.
    fn create_inside(&mut self, create: Create, reply: Reply) -> Answer {
        check(&create)?;
        check_path(&create.disk)?;
        if self.container_key(&create.id).is_ok() {
            return Err(Error::Exists { what: "container", id: create.id });
        }
        let document = document(&Path::new(&create.bundle).join("config.json"))?;
        let disk = File::open(&create.disk).context(|| format!("open {:?}", create.disk))?;
        let log = open_log(&create)?;
        let (mut ends, theirs) = pipes(create.stdin)?;
        let mut outputs: Vec<OwnedFd> =
            [theirs.stdout, theirs.stderr].into_iter().flatten().collect();
        if create.terminal {
            // All output of a terminal is one stream.
            outputs.truncate(1);
            ends.stderr = None;
        }
        let key = self.new_key();
        let Some(guest) = self.guest() else { return Ok(None) };
        let slot = guest.free_slot().ok_or_else(|| {
            Error::Invalid("every slot for a disk of this machine is taken".to_owned())
        })?;
        guest.inside.insert(key, Inside { slot, ..Inside::default() });
        let serial = create.id.chars().take(20).collect();
        let script = Qemu.add_disk(Disk { serial, slot, image: disk.into() });
        let container = Container {
            id: create.id.clone(),
            directory: PathBuf::from(&create.directory),
            phase: Phase::Creating,
            pid: 0,
            deleting: false,
            stdio: None,
            oom: None,
        };
        let manner = Manner { stdin_once: create.stdin_once, hang_up: false };
        let theirs = (theirs.stdin, outputs);
        let creation = Creation { reply, create, document, ends, theirs, manner, log };
        self.containers.insert(key, container);
        if let Err(error) = self.lend(key, &creation.create) {
            let slot = self.release_inside(key);
            if let (Some(guest), Some(slot)) = (self.guest(), slot) {
                guest.slots.remove(&slot);
            }
            return Err(error);
        }
        self.drive(|guest| guest.session.push(Script::Plug(key, Box::new(creation)), script));
        Ok(None)
    }

    /// Shares what a container is to have of the host's files.
    fn lend(&mut self, key: Key, create: &Create) -> Result<(), Error> {
        for share in &create.shares {
            let Some(guest) = self.guest.as_deref_mut() else { return Ok(()) };
            let (Some(files), Some(inside)) =
                (guest.files_shared.as_mut(), guest.inside.get_mut(&key))
            else {
                return Err(Error::Invalid(
                    "volumes: no virtiofsd was found when the machine was started; install it, or \
                     set vm.virtiofsd"
                        .to_owned(),
                ));
            };
            inside.shares.push(share.name.clone());
            files.lend(&share.name, Path::new(&share.source), share.read_only)?;
        }
        Ok(())
    }

    /// The container's disk is in the machine, or is not.
    pub(super) fn plugged(
        &mut self,
        key: Key,
        mut creation: Creation,
        plugged: Result<(), String>,
    ) {
        let reply = creation.reply;
        let called = plugged
            .map_err(|why| Error::Invalid(format!("plug in the root filesystem: {}", tamed(&why))))
            .and_then(|()| {
                let streams = self.open_streams(key, &mut creation)?;
                let mut create = Create {
                    disk: creation.create.id.chars().take(20).collect(),
                    ..creation.create.clone()
                };
                // Where they come from is no business of the guest's.
                create.shares.iter_mut().for_each(|share| share.source.clear());
                let document = std::mem::take(&mut creation.document);
                self.call(
                    Verb::Create(create),
                    document,
                    streams,
                    Pending::Create(key, Box::new(creation)),
                )
            });
        if let Err(error) = called {
            self.drop_inside(key);
            self.fail(reply, &error);
        }
    }

    /// Makes streams of the guest's ends of a container's pipes.
    fn open_streams(&mut self, key: Key, creation: &mut Creation) -> Result<[u32; 3], Error> {
        let what = || "open the container's streams".to_owned();
        let (input, outputs) = std::mem::take(&mut creation.theirs);
        let Some(guest) = self.guest.as_deref_mut() else { return Ok([0; 3]) };
        let reactor = &mut self.shared.reactor;
        let mut streams = [0; 3];
        if let Some(fd) = input {
            set_nonblocking(&fd).context(what)?;
            let id = guest.new_stream();
            guest.link.open_reader(id, fd, reactor).context(what)?;
            streams[0] = id;
        }
        for (slot, fd) in streams.iter_mut().skip(1).zip(outputs) {
            set_nonblocking(&fd).context(what)?;
            let id = guest.new_stream();
            guest.link.open_writer(id, fd, reactor).context(what)?;
            *slot = id;
        }
        if let Some(inside) = guest.inside.get_mut(&key) {
            inside.outputs = streams.iter().skip(1).copied().filter(|id| *id != 0).collect();
        }
        Ok(streams)
    }

    fn start_inside(&mut self, id: &str, reply: Reply) -> Answer {
        let key = self.container_key(id)?;
        self.admitted(key, Admitted::Start)?;
        let verb = Verb::Start(message::Start { id: id.to_owned() });
        self.call(verb, Vec::new(), [0; 3], Pending::Start(key, reply))?;
        if let Some(container) = self.containers.get_mut(&key) {
            change(container, Change::Start);
        }
        Ok(None)
    }

    fn signal_inside(&mut self, signal: message::Signal, reply: Reply) -> Answer {
        let key = self.container_key(&signal.id)?;
        self.admitted(key, Admitted::Signal)?;
        self.pass_on(Verb::Signal(signal), reply)
    }

    fn update_inside(&mut self, update: &Update, reply: Reply) -> Answer {
        check_path(&update.resources)?;
        let key = self.container_key(&update.id)?;
        self.admitted(key, Admitted::Signal)?;
        let document = document(Path::new(&update.resources))?;
        let verb = Verb::Update(Update { id: update.id.clone(), resources: String::new() });
        self.call(verb, document, [0; 3], Pending::Plain(reply))?;
        Ok(None)
    }

    fn delete_inside(&mut self, delete: Delete, reply: Reply) -> Answer {
        check_id(&delete.id)?;
        let key = match self.container_key(&delete.id) {
            Ok(key) => key,
            // It can live in this machine only, and this machine knows it only through us.
            Err(_) if delete.force => return done(),
            Err(error) => return Err(error),
        };
        let verb = if delete.force { Admitted::ForceDelete } else { Admitted::Delete };
        self.admitted(key, verb)?;
        if self.guest().is_some_and(|guest| matches!(guest.state, State::Ended(_))) {
            self.drop_inside(key);
            return done();
        }
        self.call(Verb::Delete(delete), Vec::new(), [0; 3], Pending::Delete(key, reply))?;
        if let Some(container) = self.containers.get_mut(&key) {
            container.deleting = true;
        }
        Ok(None)
    }

    fn exec_inside(&mut self, exec: Exec, fds: Vec<OwnedFd>, reply: Reply) -> Answer {
        check_id(&exec.exec_id)?;
        check_path(&exec.process)?;
        let key = self.container_key(&exec.id)?;
        self.admitted(key, Admitted::Exec)?;
        let document = document(Path::new(&exec.process))?;
        let fds = by_name(fds, [exec.stdin, exec.stdout, exec.stderr]);
        let what = || "use a client's pipes".to_owned();
        let Some(guest) = self.guest.as_deref_mut() else { return Ok(None) };
        let mut streams = [0; 3];
        for (at, (slot, fd)) in streams.iter_mut().zip(fds).enumerate() {
            let Some(fd) = fd else { continue };
            check_pollable(&fd).context(what)?;
            let id = guest.new_stream();
            let reactor = &mut self.shared.reactor;
            if at == 0 {
                guest.link.open_reader(id, fd, reactor).context(what)?;
            } else {
                guest.link.open_writer(id, fd, reactor).context(what)?;
            }
            *slot = id;
        }
        let open = streams.iter().copied().filter(|id| *id != 0).collect();
        let pending = Pending::Exec { reply, streams: open, started: false };
        self.call(Verb::Exec(exec), document, streams, pending)?;
        Ok(None)
    }

    fn usage_inside(&mut self, usage: Usage, reply: Reply) -> Answer {
        let mut ids = usage.ids;
        if ids.is_empty() {
            ids = self.containers.values().map(|container| container.id.clone()).collect();
        }
        ids.retain(|id| self.container_key(id).is_ok());
        self.call(Verb::Usage(Usage { ids }), Vec::new(), [0; 3], Pending::Usage(reply))?;
        Ok(None)
    }

    fn dial_inside(&mut self, dial: Dial, fds: Vec<OwnedFd>, reply: Reply) -> Answer {
        let what = || "use a client's socket".to_owned();
        let Some(socket) = fds.into_iter().next() else {
            return Err(Error::Invalid("dial without a socket".to_owned()));
        };
        check_pollable(&socket).context(what)?;
        let other = socket.try_clone().context(what)?;
        let Some(guest) = self.guest.as_deref_mut() else { return Ok(None) };
        let (up, down) = (guest.new_stream(), guest.new_stream());
        guest.link.open_reader(up, socket, &mut self.shared.reactor).context(what)?;
        guest.link.open_writer(down, other, &mut self.shared.reactor).context(what)?;
        let pending = Pending::Dial { reply, streams: vec![up, down] };
        self.call(Verb::Dial(dial), Vec::new(), [up, down, 0], pending)?;
        Ok(None)
    }

    /// The agent answers a call, or tells of something.
    pub(super) fn answered(&mut self, response: Response) -> Result<(), &'static str> {
        let outcome = response.outcome.ok_or("an answer that says nothing")?;
        if response.request == 0 {
            let Outcome::Event(event) = outcome else { return Err("an event that is none") };
            return self.told(event.what.ok_or("an event that says nothing")?);
        }
        let Some(guest) = self.guest() else { return Ok(()) };
        let pending = guest.calls.remove(&response.request).ok_or("an answer to no call")?;
        match (pending, outcome) {
            (pending, Outcome::Error(error)) => self.call_failed(pending, &error),
            (Pending::Create(key, creation), Outcome::Created(started)) => {
                self.created_inside(key, *creation, started.pid);
            }
            (Pending::Start(key, reply), Outcome::Done(_)) => self.started(key, reply, Ok(())),
            (Pending::Plain(reply), Outcome::Done(_)) => {
                self.reply(reply, Outcome::Done(Done {}));
            }
            (Pending::Delete(key, reply), Outcome::Done(_)) => {
                self.drop_inside(key);
                self.reply(reply, Outcome::Done(Done {}));
            }
            (Pending::Exec { reply, streams, started: false }, Outcome::ExecStarted(told)) => {
                let again = Pending::Exec { reply, streams, started: true };
                if let Some(guest) = self.guest() {
                    guest.calls.insert(response.request, again);
                }
                self.reply(reply, Outcome::ExecStarted(Started { pid: told.pid }));
            }
            (Pending::Exec { reply, streams, started: true }, Outcome::ExecExited(exited)) => {
                let exited = ours(&exited);
                let held = HeldAnswer { reply, exited, streams, since: Instant::now() };
                if let Some(guest) = self.guest() {
                    guest.held.push(held);
                }
            }
            (Pending::Usage(reply), Outcome::Usage(usage)) => {
                let usage = self.known_usage(usage);
                self.reply(reply, Outcome::Usage(usage));
            }
            (Pending::Dial { reply, .. }, Outcome::Done(_)) => {
                self.reply(reply, Outcome::Done(Done {}));
            }
            _ => return Err("an answer of another kind than the call"),
        }
        Ok(())
    }

    /// News of a container. One that is not known (any more) is none of ours.
    fn told(&mut self, news: News) -> Result<(), &'static str> {
        match news {
            News::Exited(told) => {
                let Ok(key) = self.container_key(&told.id) else { return Ok(()) };
                let exited = ours(&told.exited.ok_or("an exit that says nothing")?);
                if let Some(inside) = self.guest().and_then(|guest| guest.inside.get_mut(&key)) {
                    inside.ended.get_or_insert((exited, Instant::now()));
                }
                Ok(())
            }
            News::Oom(told) => {
                let Ok(key) = self.container_key(&told.id) else { return Ok(()) };
                let Some(inside) = self.guest().and_then(|guest| guest.inside.get_mut(&key)) else {
                    return Ok(());
                };
                let soon = inside.oom_told.is_some_and(|at| at.elapsed() < OOM_PAUSE);
                if told.count > inside.oom_count && !soon {
                    inside.oom_count = told.count;
                    inside.oom_told = Some(Instant::now());
                    self.tell(News::Oom(ContainerOom { id: told.id, count: told.count }));
                }
                Ok(())
            }
            News::GuestEnded(_) => Err("news of its own end"),
        }
    }

    fn created_inside(&mut self, key: Key, creation: Creation, pid: i32) {
        let Creation { reply, ends, manner, log, .. } = creation;
        let stdio = Stdio::new(Owner::Container(key), manner, ends, log, &mut self.shared)
            .context(|| "watch the container's stdio".to_owned());
        match stdio {
            Ok(stdio) => {
                if let Some(container) = self.containers.get_mut(&key) {
                    container.stdio = Some(stdio);
                    // A number of the guest's; here it says only that there is a process.
                    container.pid = pid.max(1);
                    change(container, Change::Created);
                }
                self.reply(reply, Outcome::Created(Started { pid: 0 }));
            }
            Err(error) => {
                self.drop_inside(key);
                self.fail(reply, &error);
            }
        }
    }

    fn call_failed(&mut self, pending: Pending, error: &message::Error) {
        let message = tamed(&error.message);
        let reply = match pending {
            Pending::Create(key, creation) => {
                self.drop_inside(key);
                creation.reply
            }
            Pending::Start(key, reply) => {
                if let Some(container) = self.containers.get_mut(&key) {
                    change(container, Change::StartFailed);
                }
                reply
            }
            Pending::Delete(key, reply) => {
                if let Some(container) = self.containers.get_mut(&key) {
                    container.deleting = false;
                }
                reply
            }
            Pending::Exec { reply, streams, .. } | Pending::Dial { reply, streams } => {
                self.close_streams(&streams);
                reply
            }
            Pending::Plain(reply) | Pending::Usage(reply) => reply,
        };
        let kind = Kind::try_from(error.kind).unwrap_or(Kind::Internal);
        self.reply(reply, Outcome::Error(message::Error { kind: kind.into(), message }));
    }

    pub(super) fn close_streams(&mut self, streams: &[u32]) {
        for stream in streams {
            let Some(guest) = self.guest.as_deref_mut() else { return };
            let closed = guest.link.close(*stream, &mut self.shared.reactor);
            if closed.is_err() {
                return self.after_link(closed);
            }
        }
    }

    /// Forgets a container, its streams and its disk.
    pub(super) fn drop_inside(&mut self, key: Key) {
        let Some(slot) = self.release_inside(key) else { return };
        let script = Qemu.remove_disk(slot);
        if self.guest().is_some_and(|guest| !matches!(guest.state, State::Ended(_))) {
            self.drive(|guest| guest.session.push(Script::Unplug(slot), script));
        }
    }

    /// Forgets a container, its streams and what was lent to it; its slot is the caller's.
    fn release_inside(&mut self, key: Key) -> Option<u8> {
        self.forget(key);
        let inside = self.guest().and_then(|guest| guest.inside.remove(&key))?;
        self.close_streams(&inside.outputs);
        for name in &inside.shares {
            let files = self.guest.as_deref_mut().and_then(|guest| guest.files_shared.as_mut());
            let taken = files.map_or(Ok(()), |files| files.take_back(name));
            self.journal.noted("take back a shared file", taken);
        }
        Some(inside.slot)
    }

    /// Only containers of ours, each once.
    fn known_usage(&self, usage: UsageReply) -> UsageReply {
        let mut containers: Vec<ContainerUsage> = Vec::new();
        for one in usage.containers {
            let twice = containers.iter().any(|other| other.id == one.id);
            if self.container_key(&one.id).is_ok() && !twice {
                containers.push(one);
            }
        }
        let whole = usage.whole.map(|whole| ContainerUsage { id: String::new(), ..whole });
        UsageReply { containers, whole }
    }
}

/// A guest's word on an end, with the host's time and possible numbers.
fn ours(exited: &message::Exited) -> message::Exited {
    message::Exited {
        code: exited.code.clamp(0, 255),
        signal: exited.signal.clamp(0, 64),
        finished_at: exit::now(),
        oom_killed: exited.oom_killed,
        timed_out: exited.timed_out,
        cause: message::Cause::Own.into(),
    }
}

fn document(path: &Path) -> Result<Vec<u8>, Error> {
    let bytes = fs::read(path).context(|| format!("read {path:?}"))?;
    if bytes.len() as u64 > MAX_DOCUMENT {
        return Err(Error::Invalid(format!("{path:?} has more than {MAX_DOCUMENT} bytes")));
    }
    Ok(bytes)
}
