//! Finding out what became of a pod's containers while nobody listened: after the monitor's
//! connection broke, and after a restart of the server.
//!
//! What counts, in this order: what the kernel shows, the exit file, the monitor's word, the
//! store. A container whose monitor is gone cannot be kept: nobody would learn of its end
//! or read its output. It is killed by its cgroup and marked as exited.

use std::fs;
use std::sync::Arc;

use pinion_monitor_proto::message::{self, Cause, ContainerState};
use serde::Deserialize;
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::ids;
use crate::monitor::{self, Client, Notice};
use crate::node::Node;
use crate::paths::ContainerDirectory;
use crate::record::{Container, Exit, Holding, Sandbox};
use crate::services::blocking;

/// The pod after it was looked at.
#[derive(Debug)]
pub(crate) struct Reconnected {
    /// The monitor that serves the pod now, the old one or a new one.
    pub(crate) monitor: Result<Client>,
    /// Containers that turn out to have ended.
    pub(crate) ended: Vec<(String, Exit)>,
    /// Containers that turn out to have been started.
    pub(crate) started: Vec<String>,
    /// Why the pod's machine is gone, if it had one and it is.
    pub(crate) machine_ended: Option<String>,
}

/// Connects to the pod's monitor, or starts another in its place.
pub(crate) async fn reconnect(
    node: Arc<Node>,
    sandbox: Sandbox,
    containers: Vec<Container>,
    notices: mpsc::UnboundedSender<Notice>,
) -> Reconnected {
    let directory = node.paths.pod(&sandbox.id);
    let live = containers.into_iter().filter(|c| c.exit.is_none());
    let mut result = Reconnected {
        monitor: Err(no_monitor()),
        ended: Vec::new(),
        started: Vec::new(),
        machine_ended: None,
    };
    let known = match Client::connect(directory.path(), notices.clone()).await {
        Ok((client, hello)) => {
            result.monitor = Ok(client);
            let ended = hello.guest.and_then(|guest| guest.ended);
            result.machine_ended = ended.map(|ended| ended.message);
            hello.containers
        }
        Err(error) => {
            tracing::warn!(pod = sandbox.id, error = %error.chain(), "monitor not reachable");
            Vec::new()
        }
    };
    for container in live {
        let state = known.iter().find(|state| state.id == container.id);
        match fate(state, exit_file(&directory.container(&container.id))) {
            Fate::Created => {}
            Fate::Running if container.started_at == 0 => result.started.push(container.id),
            Fate::Running => {}
            Fate::Ended(exit) => result.ended.push((container.id, exit)),
            Fate::Lost => {
                let exit = kill_lost(&node, &container).await;
                result.ended.push((container.id, exit));
            }
        }
    }
    if result.monitor.is_err() && sandbox.guest.is_some() {
        // A machine dies with its monitor.
        result.machine_ended = Some("the pod's monitor, and with it the machine, is gone".into());
    } else if result.monitor.is_err() && sandbox.holdings.contains(&Holding::Monitor) {
        result.monitor = replace(&node, &sandbox, notices).await;
    }
    result
}

/// The absence of a monitor.
pub(crate) fn no_monitor() -> Error {
    Error::internal("the pod has no monitor")
}

/// What is known of a container's life.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Created,
    Running,
    Ended(Exit),
    Lost,
}

fn fate(state: Option<&ContainerState>, file: Option<Exit>) -> Fate {
    match (file, state) {
        (Some(exit), _) => Fate::Ended(exit),
        (None, None) => Fate::Lost,
        (None, Some(state)) => match (&state.exited, state.started) {
            (Some(exited), _) => Fate::Ended(exit(exited)),
            (None, true) => Fate::Running,
            (None, false) => Fate::Created,
        },
    }
}

/// The monitor's report of an exit, as a record keeps it.
pub(crate) fn exit(exited: &message::Exited) -> Exit {
    Exit {
        code: exited.code,
        finished_at: if exited.finished_at == 0 { ids::now() } else { exited.finished_at },
        oom_killed: exited.oom_killed,
        reason: reason(exited.cause()).map(str::to_string),
        message: reason(exited.cause()).map_or_else(String::new, |_| MACHINE_GONE.to_string()),
    }
}

/// What a person reads of a container whose machine ended under it; the machine's own words
/// are in the pod's status.
const MACHINE_GONE: &str = "the pod's virtual machine ended; `crictl inspectp` says why";

/// CRI's reason for an end that was not the container's own.
fn reason(cause: Cause) -> Option<&'static str> {
    match cause {
        Cause::Own => None,
        Cause::VmmGone => Some("MachineEnded"),
        Cause::GuestPanic => Some("GuestPanic"),
        Cause::GuestBroken => Some("GuestBroken"),
    }
}

/// The monitor's `exit.json`; keys this server does not use are none of its business.
#[derive(Debug, Deserialize)]
struct ExitFile {
    code: i32,
    #[serde(default)]
    finished_at: i64,
    #[serde(default)]
    oom_killed: bool,
    #[serde(default)]
    cause: String,
}

fn exit_file(directory: &ContainerDirectory) -> Option<Exit> {
    let bytes = fs::read(directory.exit()).ok()?;
    let file: ExitFile = serde_json::from_slice(&bytes)
        .inspect_err(
            |error| tracing::warn!(path = %directory.exit().display(), %error, "bad exit file"),
        )
        .ok()?;
    let cause = match file.cause.as_str() {
        "vmm-gone" => Cause::VmmGone,
        "guest-panic" => Cause::GuestPanic,
        "guest-broken" => Cause::GuestBroken,
        _ => Cause::Own,
    };
    Some(exit(&message::Exited {
        code: file.code,
        finished_at: file.finished_at,
        oom_killed: file.oom_killed,
        cause: cause.into(),
        ..Default::default()
    }))
}

/// Kills what is left of a container that lost its monitor.
async fn kill_lost(node: &Arc<Node>, container: &Container) -> Exit {
    let (kill, path, id) = (node.clone(), container.cgroups_path.clone(), container.id.clone());
    let killed = blocking(move || kill.cgroups.kill(&path, &id)).await;
    if let Err(error) = killed {
        tracing::error!(container = container.id, error = %error.chain(), "cannot kill a container without monitor");
    }
    Exit::lost()
}

/// Starts a monitor in place of a lost one.
async fn replace(
    node: &Arc<Node>,
    sandbox: &Sandbox,
    notices: mpsc::UnboundedSender<Notice>,
) -> Result<Client> {
    let directory = node.paths.pod(&sandbox.id);
    monitor::end(directory.path()).await?;
    node.start_monitor(&sandbox.id, None).await?;
    Ok(Client::connect(directory.path(), notices).await?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(started: bool, code: Option<i32>) -> ContainerState {
        let exited = code.map(|code| message::Exited { code, ..Default::default() });
        ContainerState { id: "c".into(), pid: 7, started, exited }
    }

    #[test]
    fn the_exit_file_counts_more_than_the_monitor_s_word() {
        let file = Exit { code: 3, ..Default::default() };
        let told = fate(Some(&state(true, None)), Some(file.clone()));
        assert_eq!(told, Fate::Ended(file));
    }

    #[test]
    fn what_no_one_knows_of_is_lost() {
        assert_eq!(fate(None, None), Fate::Lost);
    }

    #[test]
    fn the_monitor_s_word_is_taken_otherwise() {
        assert_eq!(fate(Some(&state(false, None)), None), Fate::Created);
        assert_eq!(fate(Some(&state(true, None)), None), Fate::Running);
        assert!(matches!(fate(Some(&state(true, Some(5))), None), Fate::Ended(e) if e.code == 5));
    }
}
