//! From a plan to a guest that takes calls.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use pinion_microvm::driver::{Driver, Ends, Tap};
use pinion_microvm::nic::{self, Carried};
use pinion_microvm::plan::Plan;
use pinion_microvm::qemu::Qemu;
use pinion_microvm::qmp::Session;
use pinion_monitor_proto::VERSION;
use pinion_monitor_proto::guest::{
    Address, AgentHello, File, Interface, Route, Setup, Sysctl, packet::What,
};
use pinion_monitor_proto::message::{self, Cause};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::{Guest, Script, State, Tail, tamed};
use crate::error::{Context, Error};
use crate::event::{Shared, Source, Timer};
use crate::link::Link;
use crate::pod::{Child, Pod};
use crate::reactor::{Interest, Watched};
use crate::share::{Beginning, SharedFiles};
use crate::vmm::{self, Place};

/// Descriptors of a machine count from here.
const FIRST: i32 = 3;

impl Pod {
    /// Starts the machine of the plan at `path`; it is up when its agent says so.
    pub(in crate::pod) fn start_machine(&mut self, path: &Path) -> Result<(), Error> {
        let plan = Plan::read(path).map_err(|error| failed(&error))?;
        let began = Instant::now();
        let files = plan.files.iter().map(|path| file(path)).collect::<Result<Vec<_>, _>>()?;
        let carried = plan.namespace.as_deref().map(nic::carry).transpose();
        let carried = carried.map_err(|error| failed(&error))?.unwrap_or_default();
        let mut ends = Vec::new();
        let mut ours = Vec::new();
        for _ in ["agent", "control", "console"] {
            let (near, far) = socket_pair()?;
            ours.push(near);
            ends.push(far);
        }
        let mut taps = Vec::new();
        let mut interfaces = Vec::new();
        for (fd, one) in (FIRST + 3..).zip(carried) {
            let mac = one.link.mac.first_chunk::<6>().copied().unwrap_or_default();
            taps.push(Tap { fd, mac, mtu: one.link.mtu });
            interfaces.push(interface(&one));
            ends.push(one.tap);
        }
        let files_shared = self.start_share(&plan, ends.get(2))?;
        let mut shared = None;
        let mut share = None;
        if let Some((lent, socket)) = files_shared {
            share = i32::try_from(ends.len()).ok().map(|count| FIRST + count);
            ends.push(socket);
            shared = Some(lent);
        }
        let numbers = Ends { agent: FIRST, control: FIRST + 1, console: FIRST + 2, share, taps };
        let launch = Qemu.launch(&plan.machine, &numbers);
        // What the machine itself complains of is kept with what its guest says.
        let stderr = ends.get(2).map(AsFd::as_fd);
        let stderr = stderr.ok_or_else(|| Error::Invalid("no console".to_owned()))?;
        let null = self.null.as_fd();
        let pid = self
            .oom_score
            .exposed(|| vmm::start(&Place::of_machine(&plan), &launch, &ends, null, stderr));
        let pid = pid.context(|| format!("start {:?}", launch.program))?;
        drop(ends);
        self.children.insert(pid, Child::Machine);
        let told = (interfaces, files);
        let mut guest = converse(&mut self.shared, plan, pid, told, ours, began)?;
        guest.files_shared = shared;
        self.guest = Some(Box::new(guest));
        self.drive(|guest| guest.session.push(Script::Processors, Qemu.processors()));
        Ok(())
    }

    /// Starts the process that serves files to the plan's machine, if it has one.
    fn start_share(
        &mut self,
        plan: &Plan,
        errors: Option<&OwnedFd>,
    ) -> Result<Option<(SharedFiles, OwnedFd)>, Error> {
        let (Some(share), Some(errors)) = (&plan.share, errors) else { return Ok(None) };
        let beginning = Beginning::new(share)?;
        let place = Place::of_share(plan, &share.directory);
        let (null, errors) = (self.null.as_fd(), errors.as_fd());
        let pid = self
            .oom_score
            .exposed(|| vmm::start(&place, &beginning.launch, &beginning.ends, null, errors));
        let pid = pid.context(|| format!("start {:?}", share.program))?;
        self.children.insert(pid, Child::Share);
        Ok(Some(beginning.begun(pid)))
    }

    /// The agent has spoken for the first time.
    pub(super) fn agent_arrived(&mut self, hello: &AgentHello) -> Result<(), &'static str> {
        let Some(guest) = self.guest.as_deref_mut() else { return Ok(()) };
        if guest.state != State::Booting {
            return Err("a second hello");
        }
        if hello.version != VERSION {
            return Err("another version of the protocol");
        }
        let plain = |text: &str| text.chars().all(|c| c.is_ascii_graphic());
        if hello.boot_id.len() != 36 || !plain(&hello.boot_id) {
            return Err("a boot id that is none");
        }
        if hello.release.is_empty() || hello.release.len() > 64 || !plain(&hello.release) {
            return Err("a kernel release that is none");
        }
        guest.phase("boot");
        guest.about.boot_id.clone_from(&hello.boot_id);
        guest.about.release.clone_from(&hello.release);
        guest.state = State::SettingUp;
        let setup = setup(guest);
        self.say(What::Setup(setup));
        Ok(())
    }

    /// The guest is what it was asked to be, or says why not.
    pub(super) fn guest_ready(&mut self, error: &str) -> Result<(), &'static str> {
        let Some(guest) = self.guest.as_deref_mut() else { return Ok(()) };
        if guest.state != State::SettingUp {
            return Err("ready out of turn");
        }
        if !error.is_empty() {
            let text = format!("the guest could not be set up: {}", tamed(error));
            self.kill_machine(Cause::GuestBroken, text);
            return Ok(());
        }
        guest.phase("setup");
        guest.state = State::Up;
        if let Some(timer) = guest.boot.take() {
            self.shared.reactor.cancel(timer);
        }
        let waiting = std::mem::take(&mut guest.waiting);
        for reply in waiting {
            let outcome = self.greeting();
            self.reply(reply, outcome);
        }
        Ok(())
    }

    /// It took too long.
    pub(in crate::pod) fn boot_overdue(&mut self) {
        let Some(guest) = self.guest() else { return };
        guest.boot = None;
        if guest.state == State::Up {
            let text = "the agent has left, and the machine went on without it".to_owned();
            self.kill_machine(Cause::GuestBroken, text);
        } else if matches!(guest.state, State::Booting | State::SettingUp) {
            let limit = Duration::from_millis(guest.plan.boot_limit);
            let (accelerator, stage) = (
                guest.plan.machine.accelerator.name(),
                if guest.state == State::Booting { "started" } else { "been set up" },
            );
            let text = format!(
                "the guest has not {stage} within {limit:?} under {accelerator}; its last words: {}",
                last_words(&guest.tail)
            );
            self.kill_machine(Cause::GuestBroken, text);
        }
    }
}

/// The last lines of the console, for a message.
pub(super) fn last_words(tail: &Tail) -> String {
    let text = tail.text();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last = lines.get(lines.len().saturating_sub(4)..).unwrap_or_default().join(" | ");
    if last.is_empty() { "none".to_owned() } else { tamed(&last) }
}

fn failed(error: &pinion_microvm::Error) -> Error {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    Error::Invalid(text)
}

fn socket_pair() -> Result<(OwnedFd, OwnedFd), Error> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .context(|| "create a socket pair".to_owned())
}

fn converse(
    shared: &mut Shared,
    plan: Plan,
    pid: i32,
    (interfaces, files): (Vec<Interface>, Vec<File>),
    ours: Vec<OwnedFd>,
    began: Instant,
) -> Result<Guest, Error> {
    let what = || "watch the machine's channels".to_owned();
    let mut ours = ours.into_iter();
    let mut next = || ours.next().ok_or_else(|| Error::Invalid("no channel".to_owned()));
    let link = Link::new(next()?, Source::Link, &mut shared.reactor).context(what)?;
    let (mut control, mut console) = (Watched::new(next()?), Watched::new(next()?));
    control.watch(&mut shared.reactor, Interest::Read, Source::Control).context(what)?;
    console.watch(&mut shared.reactor, Interest::Read, Source::Console).context(what)?;
    let boot = shared.reactor.after(Duration::from_millis(plan.boot_limit), Timer::Boot);
    let about = message::Guest {
        vmm_pid: pid,
        accelerator: plan.machine.accelerator.name().into(),
        cpus: plan.machine.processors.count,
        memory_bytes: plan.machine.memory << 20,
        ..message::Guest::default()
    };
    let mut guest = Guest {
        plan,
        pid,
        state: State::Booting,
        link,
        control,
        session: Session::default(),
        console: Some(console),
        tail: Tail::default(),
        interfaces,
        files,
        files_shared: None,
        about,
        waiting: Vec::new(),
        calls: std::collections::BTreeMap::new(),
        last_call: 0,
        last_stream: 0,
        inside: std::collections::BTreeMap::new(),
        held: Vec::new(),
        slots: std::collections::BTreeSet::new(),
        phase_began: began,
        boot: Some(boot),
        looking: false,
        verdict: None,
    };
    guest.phase("launch");
    Ok(guest)
}

fn interface(carried: &Carried) -> Interface {
    let bytes = |ip: std::net::IpAddr| match ip {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let address =
        |a: &pinion_microvm::netlink::Address| Address { ip: bytes(a.ip), prefix: a.prefix.into() };
    let route = |r: &pinion_microvm::netlink::Route| Route {
        destination: r.destination.map(bytes).unwrap_or_default(),
        prefix: r.prefix.into(),
        gateway: r.gateway.map(bytes).unwrap_or_default(),
        scope: r.scope.into(),
        v6: r.v6,
    };
    Interface {
        name: carried.link.name.clone(),
        mac: carried.link.mac.clone(),
        mtu: carried.link.mtu,
        addresses: carried.addresses.iter().map(address).collect(),
        routes: carried.routes.iter().map(route).collect(),
    }
}

/// A file of the pod, as the guest gets it.
fn file(path: &Path) -> Result<File, Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let content = fs::read(path).context(|| format!("read {path:?}"))?;
    Ok(File { name, content })
}

fn setup(guest: &Guest) -> Setup {
    let plan = &guest.plan;
    let sysctl =
        |(name, value): &(String, String)| Sysctl { name: name.clone(), value: value.clone() };
    Setup {
        hostname: plan.hostname.clone(),
        files: guest.files.clone(),
        interfaces: guest.interfaces.clone(),
        sysctls: plan.sysctls.iter().map(sysctl).collect(),
        shm_bytes: plan.shm_bytes,
        share: plan.share.is_some(),
    }
}
