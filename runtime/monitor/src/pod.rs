//! The loop, and all that one pod's monitor knows.

mod attach;
mod clients;
mod execs;
mod guest;
mod lifecycle;
mod runtime;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::fs::inotify::{CreateFlags, WatchFlags};

use self::clients::Reply;
use self::execs::Exec;
use self::guest::Guest;
use self::runtime::Invocation;
use crate::connection::Connection;
use crate::container::Phase;
use crate::daemon::OomScore;
use crate::error::{Context, Error};
use crate::event::{Key, Owner, Shared, Source, Timer};
use crate::journal::Journal;
use crate::oom::OomWatch;
use crate::options::Options;
use crate::reactor::{Interest, Ready};
use crate::reap::Children;
use crate::socket::listen;
use crate::stdio::Stdio;

/// How often to look whether the pod's directory is gone, once its socket is.
const DIRECTORY_CHECK: Duration = Duration::from_millis(500);

/// What a child process is to us.
#[derive(Debug)]
enum Child {
    /// The runtime, doing something.
    Runtime(Invocation),
    /// The init of a container.
    Init(Key),
    /// An exec.
    Exec(Key),
    /// The virtual machine.
    Machine,
    /// The process that serves files to it.
    Share,
}

/// A container and what we keep for it.
#[derive(Debug)]
struct Container {
    id: String,
    directory: PathBuf,
    phase: Phase,
    /// Pid of its init while it lives, else 0.
    pid: i32,
    deleting: bool,
    stdio: Option<Stdio>,
    oom: Option<OomWatch>,
}

/// The monitor of a pod.
#[derive(Debug)]
pub struct Pod {
    options: Options,
    journal: Journal,
    oom_score: OomScore,
    shared: Shared,
    listener: OwnedFd,
    signals: SignalFd,
    directory: OwnedFd,
    null: OwnedFd,
    children: Children<Child>,
    containers: BTreeMap<Key, Container>,
    execs: BTreeMap<Key, Exec>,
    clients: BTreeMap<Key, Connection>,
    /// The virtual machine the containers run in, if they do.
    guest: Option<Box<Guest>>,
    last_key: Key,
    /// Asked to leave once nothing is alive.
    leaving: bool,
    /// Nobody can connect any more.
    orphaned: bool,
}

impl Pod {
    /// Listens on `monitor.sock` in the pod's directory.
    ///
    /// # Errors
    /// When a descriptor the loop needs cannot be made.
    pub fn new(options: Options, journal: Journal, oom_score: OomScore) -> Result<Self, Error> {
        let mut shared = Shared::new().context(|| "create epoll".to_owned())?;
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            mask.add(signal);
        }
        mask.thread_block().context(|| "block signals".to_owned())?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .context(|| "create signalfd".to_owned())?;
        let directory = rustix::fs::inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .context(|| "create inotify".to_owned())?;
        rustix::fs::inotify::add_watch(&directory, &options.dir, WatchFlags::DELETE)
            .context(|| format!("watch {:?}", options.dir))?;
        let null = File::options().read(true).write(true).open("/dev/null");
        let null = null.context(|| "open /dev/null".to_owned())?.into();
        let path = options.dir.join("monitor.sock");
        // We hold the pod's lock: a socket that is there is a dead monitor's.
        drop(fs::remove_file(&path));
        let listener = listen(&path, 16).context(|| format!("listen on {path:?}"))?;
        let watched = [
            (listener.as_fd(), Source::Listener),
            (signals.as_fd(), Source::Signals),
            (directory.as_fd(), Source::Directory),
        ];
        for (fd, source) in watched {
            let added = shared.reactor.add(fd, Interest::Read, source);
            added.context(|| format!("watch {source:?}"))?;
        }
        Ok(Self {
            options,
            journal,
            oom_score,
            shared,
            listener,
            signals,
            directory,
            null,
            children: Children::default(),
            containers: BTreeMap::new(),
            execs: BTreeMap::new(),
            clients: BTreeMap::new(),
            guest: None,
            last_key: 0,
            leaving: false,
            orphaned: false,
        })
    }

    /// Starts the pod's virtual machine, if it is to have one.
    ///
    /// # Errors
    /// When its plan cannot be read or carried out; whether the guest comes up is told to those
    /// who say hello.
    pub fn with_machine(mut self) -> Result<Self, Error> {
        if let Some(plan) = self.options.machine.clone() {
            self.start_machine(&plan)?;
        }
        Ok(self)
    }

    /// Serves until there is nothing left to do.
    ///
    /// # Errors
    /// When waiting for events fails.
    pub fn run(mut self) -> Result<(), Error> {
        let mut ready = Vec::new();
        while !self.is_over() {
            self.shared.reactor.wait(&mut ready).context(|| "wait for events".to_owned())?;
            for (token, what) in &ready {
                if let Some(source) = self.shared.reactor.source(*token) {
                    self.serve(source, *what);
                }
            }
            while let Some(timer) = self.shared.reactor.expired() {
                self.expire(timer);
            }
            self.end_idle_machine();
        }
        for container in self.containers.values_mut() {
            if let Some(stdio) = &mut container.stdio {
                stdio.close(&mut self.shared);
            }
        }
        Ok(())
    }

    fn serve(&mut self, source: Source, ready: Ready) {
        match source {
            Source::Listener => self.accept(),
            Source::Signals => self.signalled(),
            Source::Directory => self.directory_changed(),
            Source::Client(client) => self.serve_client(client, ready),
            Source::Stdio(owner, part) => {
                let (stdio, shared) = self.stdio(owner);
                if let Some(stdio) = stdio {
                    stdio.ready(part, ready, shared);
                }
                self.conclude(owner);
            }
            Source::Oom(container) => self.memory_changed(container),
            Source::Link(part) => self.link_ready(part, ready),
            Source::Console => self.console_ready(),
            Source::Control => self.control_ready(),
        }
    }

    fn expire(&mut self, timer: Timer) {
        match timer {
            Timer::Runtime(pid) => self.runtime_overdue(pid),
            Timer::Deadline(exec) => self.exec_overdue(exec),
            Timer::Stall(owner) => {
                let (stdio, shared) = self.stdio(owner);
                if let Some(stdio) = stdio {
                    stdio.cut_stalled(shared);
                }
                self.conclude(owner);
            }
            Timer::Oom(container) => self.tell_oom(container),
            Timer::Directory => self.check_directory(),
            Timer::Shutdown => {
                self.journal.note("leaving although containers would not die");
                self.orphaned = true;
                for container in self.containers.values_mut() {
                    container.pid = 0;
                }
            }
            Timer::Boot => self.boot_overdue(),
            Timer::Held => self.look(),
        }
    }

    fn stdio(&mut self, owner: Owner) -> (Option<&mut Stdio>, &mut Shared) {
        let stdio = match owner {
            Owner::Container(key) => {
                self.containers.get_mut(&key).and_then(|container| container.stdio.as_mut())
            }
            Owner::Exec(key) => self.execs.get_mut(&key).and_then(|exec| exec.stdio.as_mut()),
        };
        (stdio, &mut self.shared)
    }

    fn conclude(&mut self, owner: Owner) {
        if let Owner::Exec(key) = owner {
            self.conclude_exec(key);
        }
    }

    fn signalled(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let signal = i32::try_from(info.ssi_signo).unwrap_or(0);
            if signal != Signal::SIGCHLD as i32 {
                self.journal.note(format_args!(
                    "signal {signal} from pid {}: leaving when no container is alive",
                    info.ssi_pid
                ));
                self.leaving = true;
            }
        }
        self.reap();
    }

    fn directory_changed(&mut self) {
        let mut events = [0; 1024];
        while rustix::io::read(&self.directory, &mut events).is_ok_and(|n| n > 0) {}
        if !self.options.dir.join("monitor.sock").exists() {
            self.check_directory();
        }
    }

    /// Looks again and again once the socket is gone: nobody can tell us to leave.
    fn check_directory(&mut self) {
        self.orphaned = !self.options.dir.exists();
        if !self.orphaned {
            self.shared.reactor.after(DIRECTORY_CHECK, Timer::Directory);
        }
    }

    fn is_over(&self) -> bool {
        (self.leaving || self.orphaned) && !self.is_anything_alive() && !self.has_machine()
    }

    /// Ends the machine once it is all that keeps us here.
    fn end_idle_machine(&mut self) {
        if (self.leaving || self.orphaned) && !self.is_anything_alive() && self.has_machine() {
            self.quit_machine();
        }
    }

    /// Whether a container lives or is about to.
    fn is_anything_alive(&self) -> bool {
        self.containers
            .values()
            .any(|container| container.pid != 0 || matches!(container.phase, Phase::Creating))
    }

    fn new_key(&mut self) -> Key {
        self.last_key += 1;
        self.last_key
    }

    fn container_key(&self, id: &str) -> Result<Key, Error> {
        let found = self.containers.iter().find(|(_, container)| container.id == id);
        found
            .map(|(key, _)| *key)
            .ok_or_else(|| Error::NotFound { what: "container", id: id.to_owned() })
    }
}
