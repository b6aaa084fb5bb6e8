//! Clients: accepting, requests, replies and events.

use std::io;
use std::os::fd::OwnedFd;

use pinion_monitor_proto::VERSION;
use pinion_monitor_proto::message::{
    self, ContainerState, Done, Event, Hello, HelloReply, Request, Response, Shutdown, event::What,
    request::Verb, response::Outcome,
};
use rustix::net::SocketFlags;

use super::{Child, Pod};
use crate::connection::{Closed, Connection};
use crate::container::Phase;
use crate::error::Error;
use crate::event::{Key, Source, Timer};
use crate::reactor::Ready;
use crate::socket::check_peer;

/// Connections at a time; piniond has one, people's tools a few.
const MAX_CLIENTS: usize = 64;

/// How long a forced shutdown waits for containers to die.
const SHUTDOWN_WAIT: std::time::Duration = std::time::Duration::from_secs(10);

/// Where an answer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reply {
    client: Key,
    request: u64,
}

/// What a verb comes to: an answer now, or none yet.
pub(super) type Answer = Result<Option<Outcome>, Error>;

/// The answer that says no more than that it was done.
pub(super) fn done() -> Answer {
    Ok(Some(Outcome::Done(Done {})))
}

/// The answer to what only a guest can do.
pub(super) fn no_machine() -> Error {
    Error::Invalid("the pod has no virtual machine".to_owned())
}

impl Pod {
    /// Accepts every client that waits.
    pub(super) fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(socket) = rustix::net::accept_with(&self.listener, flags) {
            let admitted = check_peer(&socket).and_then(|()| {
                if self.clients.len() < MAX_CLIENTS {
                    Ok(())
                } else {
                    Err(io::Error::other("too many clients"))
                }
            });
            if self.journal.noted("client refused", admitted).is_some() {
                self.connected(socket);
            }
        }
    }

    fn connected(&mut self, socket: OwnedFd) {
        let client = self.new_key();
        let mut connection = Connection::new(socket);
        let watched = connection.watch(&mut self.shared.reactor, Source::Client(client));
        if self.journal.noted("client lost", watched).is_some() {
            self.clients.insert(client, connection);
        }
    }

    /// Reads a client's requests and carries them out.
    pub(super) fn serve_client(&mut self, client: Key, ready: Ready) {
        let Some(connection) = self.clients.get_mut(&client) else { return };
        let mut requests = Vec::new();
        let mut result = if ready.writable() { connection.flush() } else { Ok(()) };
        if result.is_ok() && ready.readable() {
            result = connection.receive(&mut requests);
        }
        self.after_io(client, result);
        for (request, descriptors) in requests {
            let reply = Reply { client, request: request.id };
            match self.carry_out(request, descriptors, reply) {
                Ok(Some(outcome)) => self.reply(reply, outcome),
                Ok(None) => {}
                Err(error) => self.fail(reply, &error),
            }
        }
    }

    fn carry_out(&mut self, request: Request, fds: Vec<OwnedFd>, reply: Reply) -> Answer {
        if request.id == 0 {
            return Err(Error::Invalid("request id 0 is for events".to_owned()));
        }
        let Some(verb) = request.verb else {
            return Err(Error::Invalid("request without a known verb".to_owned()));
        };
        let (verb, fds) = if self.guest.is_none() {
            (verb, fds)
        } else {
            match self.carry_out_inside(verb, fds, reply) {
                Ok(answer) => return answer,
                Err(outside) => *outside,
            }
        };
        match verb {
            Verb::Hello(hello) => self.hello(&hello, reply),
            Verb::Create(create) => self.create(create, reply),
            Verb::Start(start) => self.start(&start.id, reply),
            Verb::Signal(signal) => self.signal(&signal, reply),
            Verb::Update(update) => self.update(&update, reply),
            Verb::Delete(delete) => self.delete(&delete, reply),
            Verb::Exec(exec) => self.exec(&exec, fds, reply),
            Verb::KillExec(kill) => self.kill_exec(&kill),
            Verb::Attach(attach) => self.attach(&attach, fds),
            Verb::Resize(resize) => self.resize(&resize),
            Verb::ReopenLog(reopen) => self.reopen_log(&reopen.id),
            Verb::Shutdown(shutdown) => self.shutdown(&shutdown),
            Verb::Usage(_) | Verb::Dial(_) => Err(no_machine()),
        }
    }

    pub(super) fn hello(&mut self, hello: &Hello, reply: Reply) -> Answer {
        if hello.version != VERSION {
            let theirs = hello.version;
            return Err(Error::Invalid(format!(
                "protocol {theirs} is not {VERSION}, which I speak"
            )));
        }
        if let Some(connection) = self.clients.get_mut(&reply.client) {
            connection.subscribed = hello.subscribe;
        }
        Ok(Some(self.greeting()))
    }

    /// What there is to know at first.
    pub(super) fn greeting(&self) -> Outcome {
        let containers = self.containers.values().map(|container| {
            let (started, exited) = match &container.phase {
                Phase::Creating | Phase::Created | Phase::Starting => (false, None),
                Phase::Running => (true, None),
                Phase::Exited { exited, started } => (*started, Some(*exited)),
            };
            ContainerState { id: container.id.clone(), pid: container.pid, started, exited }
        });
        Outcome::Hello(HelloReply {
            version: VERSION,
            pid: rustix::process::getpid().as_raw_nonzero().get(),
            containers: containers.collect(),
            guest: self.guest.as_ref().map(|guest| guest.about.clone()),
        })
    }

    fn shutdown(&mut self, shutdown: &Shutdown) -> Answer {
        if self.is_anything_alive() {
            if !shutdown.force {
                return Err(Error::Invalid("containers are alive".to_owned()));
            }
            for (pid, child) in self.children.iter() {
                if matches!(child, Child::Init(_) | Child::Exec(_)) {
                    // One that has just ended is reaped next.
                    drop(super::lifecycle::send_signal(pid, libc::SIGKILL));
                }
            }
            self.shared.reactor.after(SHUTDOWN_WAIT, Timer::Shutdown);
        }
        self.leaving = true;
        if self.has_machine() {
            self.quit_machine();
        }
        done()
    }

    /// Answers a request, if its client is still there.
    pub(super) fn reply(&mut self, reply: Reply, outcome: Outcome) {
        let response = Response { request: reply.request, outcome: Some(outcome) };
        if let Some(connection) = self.clients.get_mut(&reply.client) {
            let result = connection.send(&response);
            self.after_io(reply.client, result);
        }
    }

    /// Answers a request with an error.
    pub(super) fn fail(&mut self, reply: Reply, error: &Error) {
        self.reply(reply, Outcome::Error(message::Error::from(error)));
    }

    /// Tells all subscribers.
    pub(super) fn tell(&mut self, what: What) {
        let outcome = Some(Outcome::Event(Event { what: Some(what) }));
        let response = Response { request: 0, outcome };
        let mut results = Vec::new();
        for (client, connection) in &mut self.clients {
            if connection.subscribed {
                results.push((*client, connection.send(&response)));
            }
        }
        for (client, result) in results {
            self.after_io(client, result);
        }
    }

    /// Keeps a connection's registration true, or ends the connection.
    fn after_io(&mut self, client: Key, result: Result<(), Closed>) {
        let Some(connection) = self.clients.get_mut(&client) else { return };
        let result = result
            .and_then(|()| Ok(connection.watch(&mut self.shared.reactor, Source::Client(client))?));
        let Err(reason) = result else { return };
        if !matches!(reason, Closed::Left) {
            self.journal.note(format_args!("connection closed: {reason}"));
        }
        if let Some(mut connection) = self.clients.remove(&client) {
            connection.unwatch(&mut self.shared.reactor);
        }
    }
}
