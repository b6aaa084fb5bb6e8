//! One call of the host, carried out by a thread that may wait.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use pinion_monitor_proto::channel::Channel;
use pinion_monitor_proto::guest::Call;
use pinion_monitor_proto::message::error::Kind;
use pinion_monitor_proto::message::request::Verb;
use pinion_monitor_proto::message::response::Outcome;
use pinion_monitor_proto::message::{self, Attach, Create, Done, Exec, Request, Response};

use crate::bridge::{Word, Words};
use crate::error::{Context, Error};
use crate::{CORE, rootfs, share, usage};

/// How long a connection to a port of the guest may take.
const CONNECT: Duration = Duration::from_secs(5);

/// A call and what it needs.
#[derive(Debug)]
pub(crate) struct Conduct {
    pub(crate) call: Call,
    /// The far ends of its stdin, stdout and stderr.
    pub(crate) fds: [Option<OwnedFd>; 3],
    /// Its output streams.
    pub(crate) after: Vec<u32>,
    pub(crate) words: Words,
}

/// Carries a call out and says all its answers.
pub(crate) fn conduct(mut conduct: Conduct) {
    let request = conduct.call.request.take().unwrap_or_default();
    let words = conduct.words.clone();
    let answer = |outcome: Outcome, after: Vec<u32>| {
        let response = Response { request: request.id, outcome: Some(outcome) };
        words.say(Word::Answer { response: Box::new(response), after });
    };
    let after = conduct.after.clone();
    let result = match request.verb {
        Some(Verb::Create(create)) => create_container(&mut conduct, &create),
        Some(Verb::Exec(exec)) => {
            execute(&mut conduct, exec, |started| answer(started, Vec::new()))
        }
        Some(Verb::Delete(delete)) => delete_container(&delete),
        Some(Verb::Update(update)) => change_limits(&conduct, &update.id),
        Some(Verb::Usage(asked)) => usage::read(&asked.ids).map(Outcome::Usage),
        Some(Verb::Dial(dial)) => connect(&conduct, dial.port),
        Some(verb @ (Verb::Start(_) | Verb::Signal(_) | Verb::KillExec(_) | Verb::Resize(_))) => {
            core().and_then(|mut core| ask(&mut core, verb, &[]))
        }
        _ => Err(Error::Invalid("a verb that is not for a guest".into())),
    };
    match result {
        // The streams of an answer end with it; a container's are only about to begin.
        Ok(outcome @ Outcome::Created(_)) => answer(outcome, Vec::new()),
        Ok(outcome) => answer(outcome, after),
        Err(error) => {
            let kind = match error {
                Error::Invalid(_) => Kind::Invalid,
                Error::System { .. } | Error::Failed(_) => Kind::Internal,
            };
            let error = message::Error { kind: kind.into(), message: error.text() };
            answer(Outcome::Error(error), after);
        }
    }
    words.say(Word::Over);
}

fn core() -> Result<Channel, Error> {
    let path = format!("{CORE}/monitor.sock");
    Channel::connect(Path::new(&path)).context(|| format!("connect to {path}"))
}

/// One question to the core; an error it answers with is an outcome like others.
fn ask(core: &mut Channel, verb: Verb, fds: &[&OwnedFd]) -> Result<Outcome, Error> {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    core.send(&Request { id: 1, verb: Some(verb) }, &fds)
        .map_err(|error| Error::Failed(format!("ask the core: {error}")))?;
    next(core)
}

fn next(core: &mut Channel) -> Result<Outcome, Error> {
    let answer = core.receive().map_err(|error| Error::Failed(format!("the core: {error}")))?;
    answer
        .and_then(|response| response.outcome)
        .ok_or_else(|| Error::Failed("the core has closed the connection".into()))
}

/// Mounts the root filesystem, creates the container, and joins its stdio for good.
fn create_container(conduct: &mut Conduct, create: &Create) -> Result<Outcome, Error> {
    let id = create.id.clone();
    check_id(&id)?;
    let created = rootfs::mount_rootfs(&id, &create.disk)
        .and_then(|()| share::enter(&create.shares))
        .and_then(|()| write(&id, "config.json", &conduct.call.document))
        .and_then(|()| create_in_core(conduct, create));
    if !matches!(created, Ok(Outcome::Created(_))) {
        drop(rootfs::remove(&id));
        share::leave(&id);
    }
    created
}

fn create_in_core(conduct: &mut Conduct, create: &Create) -> Result<Outcome, Error> {
    let id = create.id.clone();
    let directory = rootfs::directory(&id).to_string_lossy().into_owned();
    let [stdin, stdout, stderr] = std::mem::take(&mut conduct.fds);
    let verb = Create {
        id: id.clone(),
        bundle: directory.clone(),
        directory,
        log_path: String::new(),
        // The host decides when input ends, by ending its stream.
        stdin_once: true,
        cgroup: format!("/sys/fs/cgroup{}", usage::cgroup_path(&id)),
        memory_cgroup: String::new(),
        disk: String::new(),
        shares: Vec::new(),
        ..create.clone()
    };
    let mut core = core()?;
    let created = ask(&mut core, Verb::Create(verb), &[])?;
    if !matches!(created, Outcome::Created(_)) {
        return Ok(created);
    }
    let attach = Attach {
        id: id.clone(),
        stdin: stdin.is_some(),
        stdout: stdout.is_some(),
        stderr: stderr.is_some(),
        patient: true,
    };
    let fds: Vec<&OwnedFd> = [&stdin, &stdout, &stderr].into_iter().flatten().collect();
    match ask(&mut core, Verb::Attach(attach), &fds)? {
        Outcome::Done(Done {}) => Ok(created),
        refused => {
            let delete = message::Delete { id, force: true };
            drop(ask(&mut core, Verb::Delete(delete), &[]));
            Ok(refused)
        }
    }
}

fn delete_container(delete: &message::Delete) -> Result<Outcome, Error> {
    check_id(&delete.id)?;
    let outcome = ask(&mut core()?, Verb::Delete(delete.clone()), &[])?;
    if matches!(outcome, Outcome::Done(_)) {
        rootfs::remove(&delete.id)?;
        share::leave(&delete.id);
    }
    Ok(outcome)
}

/// Changes a container's limits to those of the call's document.
fn change_limits(conduct: &Conduct, id: &str) -> Result<Outcome, Error> {
    check_id(id)?;
    let name = "resources.json";
    write(id, name, &conduct.call.document)?;
    let resources = rootfs::directory(id).join(name).to_string_lossy().into_owned();
    ask(&mut core()?, Verb::Update(message::Update { id: id.to_owned(), resources }), &[])
}

/// Runs a process in a container: says when it runs, and returns how it ended.
fn execute(
    conduct: &mut Conduct,
    exec: Exec,
    started: impl FnOnce(Outcome),
) -> Result<Outcome, Error> {
    check_id(&exec.id)?;
    check_id(&exec.exec_id)?;
    let name = format!("{}.json", exec.exec_id);
    write(&exec.id, &name, &conduct.call.document)?;
    let process = rootfs::directory(&exec.id).join(name);
    let fds = std::mem::take(&mut conduct.fds);
    let verb = Exec {
        process: process.to_string_lossy().into_owned(),
        stdin: fds[0].is_some(),
        stdout: fds[1].is_some(),
        stderr: fds[2].is_some(),
        ..exec
    };
    let mut core = core()?;
    let first = {
        let given: Vec<&OwnedFd> = fds.iter().flatten().collect();
        ask(&mut core, Verb::Exec(verb), &given)
    };
    // Ours would keep the pipes open.
    drop(fds);
    drop(std::fs::remove_file(&process));
    match first? {
        running @ Outcome::ExecStarted(_) => {
            started(running);
            next(&mut core)
        }
        refused => Ok(refused),
    }
}

/// Connects a pair of streams to a port on the loopback; IPv4 first.
fn connect(conduct: &Conduct, port: u32) -> Result<Outcome, Error> {
    let port = u16::try_from(port).map_err(|_large| Error::Invalid(format!("port {port}")))?;
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let [v4, v6] = loopback.map(|address| SocketAddr::new(address, port));
    let socket = TcpStream::connect_timeout(&v4, CONNECT)
        .or_else(|first| TcpStream::connect_timeout(&v6, CONNECT).map_err(|_second| first))
        .context(|| format!("connect to port {port}"))?;
    socket.set_nonblocking(true).context(|| format!("use the connection to port {port}"))?;
    let (read, written) = (conduct.call.stdout, conduct.call.stdin);
    conduct.words.say(Word::Connected { socket: socket.into(), read, written });
    Ok(Outcome::Done(Done {}))
}

fn write(id: &str, name: &str, bytes: &[u8]) -> Result<(), Error> {
    let path = rootfs::directory(id).join(name);
    std::fs::write(&path, bytes).context(|| format!("write {}", path.display()))
}

/// Ids name directories here; the host's are plain, but nothing else should be relied on.
fn check_id(id: &str) -> Result<(), Error> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if !id.is_empty() && id.len() <= 255 && id.chars().all(plain) {
        Ok(())
    } else {
        Err(Error::Invalid(format!("bad id {id:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_are_paths_are_refused() {
        for id in ["", ".", "..", "a/b", "a.b", "a\0", "/etc"] {
            assert!(check_id(id).is_err(), "{id:?}");
        }
        assert!(check_id("0af3-x_1").is_ok());
    }
}
