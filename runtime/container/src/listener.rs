//! Following a process over its last steps to the program, and handing its seccomp
//! notification descriptor to the agent that answers for it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::process::PidfdGetfdFlags;

use crate::error::{Doing, Error, Failure, Result};
use crate::protocol::{Channel, Message};
use crate::{config, paths};

/// Where notifications of a profile go.
#[derive(Clone, Debug, Default)]
pub struct Agent {
    /// The agent's socket.
    pub path: PathBuf,
    /// Opaque text for it.
    pub metadata: Option<String>,
}

/// Waits until the process `pid` has executed its program, which closes `channel`.
/// `config` is read only if the process reports a listener.
///
/// # Errors
/// What the process reports; what the agent's socket answers.
pub fn until_exec(
    channel: &Channel,
    (pid, pidfd): (i32, &OwnedFd),
    config: &Path,
    state: &[u8],
) -> Result<()> {
    loop {
        match channel.hear()? {
            None => return Ok(()),
            Some(Message::Listener(number)) => {
                let agent = agent_in(config)?;
                hand_over((pid, pidfd), number, &agent, state)?;
                channel.proceed(&[]).doing(|| "let the process go on".into())?;
            }
            Some(other) => return Err(Error::Protocol(format!("{other:?} after the start"))),
        }
    }
}

fn agent_in(path: &Path) -> Result<Agent> {
    let seccomp = config::load_exec_view(path)?.value.linux.and_then(|linux| linux.seccomp);
    let agent = seccomp.and_then(|seccomp| {
        let path = seccomp.listener_path().clone()?;
        Some(Agent { path, metadata: seccomp.listener_metadata().clone() })
    });
    agent.ok_or_else(|| Error::Invalid("linux.seccomp.listenerPath is missing".into()))
}

/// runtime-spec, "The Container Process State", with the descriptor attached.
///
/// Its `pid` is that of the process that loaded the filter, which for `exec` is not the
/// container's first one.
fn hand_over(
    (pid, pidfd): (i32, &OwnedFd),
    number: i32,
    agent: &Agent,
    state: &[u8],
) -> Result<()> {
    let listener = rustix::process::pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty())
        .doing(|| "take the seccomp listener out of the process".into())?;
    let state: serde_json::Value =
        serde_json::from_slice(state).map_err(|error| Error::Protocol(error.to_string()))?;
    let mut document = serde_json::json!({
        "ociVersion": state["ociVersion"],
        "fds": ["seccompFd"],
        "pid": pid,
        "state": state,
    });
    if let Some(metadata) = &agent.metadata {
        document["metadata"] = metadata.as_str().into();
    }
    let socket = paths::connect(&agent.path)?;
    let sent = pinion_sys::scm::send(&socket, document.to_string().as_bytes(), &[listener.as_fd()]);
    sent.doing(|| format!("send the seccomp listener to {}", agent.path.display()))
        .map(drop)
        .map_err(|failure: Failure| failure.into())
}
