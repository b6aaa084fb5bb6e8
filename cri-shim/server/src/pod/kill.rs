//! Ending a container that may not want to end.
//!
//! ```text
//!   stop signal, grace ─▶ KILL by the monitor ─▶ cgroup.kill by the server ─▶ is anything left?
//!                                                     no: the monitor hangs ─▶ monitor is killed
//!                                                     yes: quarantine, the kernel's words
//! ```
//!
//! Each rung has a limit of its own, so that a monitor that hangs holds nobody up. What does not
//! die of SIGKILL waits in the kernel, on a device or a server that does not answer. Nothing ends
//! it from here: the container stays in quarantine, which means that it is not called exited and
//! keeps its CPUs, hugepages and files, nobody else's call waits for it, and whoever stops it
//! is told which process waits where. The next stop or removal tries again, and succeeds when
//! the process has been let go.

use std::time::Duration;

use super::operations::{Context, Held};
use crate::error::{Error, Kind, Result};
use crate::monitor;
use crate::record::Phase;
use crate::services::blocking;
use crate::signals::KILL;
use crate::stuck;

/// How long after each rung the end may take to be told.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long processes may take to be gone after the last SIGKILL: a large one has much to free.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Ends a container: its stop signal, a wait, then the ladder.
pub(super) async fn end(context: &Context, held: &mut Held, grace: Duration) -> Result<()> {
    if held.record.exit.is_some() || *held.ended.borrow() {
        return Ok(());
    }
    let id = held.record.id.clone();
    // A container that was never started has nothing that could heed a signal.
    if !grace.is_zero() && held.record.phase() == Phase::Running {
        let signal = held.record.stop_signal;
        match by_the_monitor(context, &id, signal, false).await {
            Ok(()) if held.wait(grace).await => return Ok(()),
            Ok(()) => {}
            Err(error) if error.kind() == Kind::Timeout => report(&id, &error),
            Err(error) => return Err(error),
        }
    }
    let answered = match by_the_monitor(context, &id, KILL, true).await {
        Ok(()) => held.wait(PATIENCE).await,
        Err(error) => {
            report(&id, &error);
            false
        }
    };
    if answered { Ok(()) } else { by_the_server(context, held).await }
}

/// Has the monitor send a signal. One that somebody has stopped is continued first.
async fn by_the_monitor(context: &Context, id: &str, signal: i32, all: bool) -> Result<()> {
    let monitor = context.monitor()?;
    let mut sent = monitor.signal(id, signal, all).await;
    if sent.as_ref().is_err_and(|error| error.kind() == Kind::Timeout)
        && monitor::wake(context.node.paths.pod(&context.sandbox.id).path())
    {
        sent = monitor.signal(id, signal, all).await;
    }
    tolerate_ended(sent)
}

/// Nothing was heard of the end: the rungs that do without the monitor.
async fn by_the_server(context: &Context, held: &mut Held) -> Result<()> {
    let (node, record) = (context.node.clone(), held.record.clone());
    let began = std::time::Instant::now();
    let mut told = false;
    let left = loop {
        let (node, path, id) = (node.clone(), record.cgroups_path.clone(), record.id.clone());
        let left = blocking(move || {
            match node.cgroups.kill(&path, &id) {
                Err(error) if !told => report(&id, &error),
                _ => {}
            }
            node.cgroups.processes(&path, &id)
        });
        let left = left.await?;
        told = true;
        if left.is_empty() || began.elapsed() > KILL_LIMIT || *held.ended.borrow() {
            break left;
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    };
    if !left.is_empty() {
        let words = blocking(move || Ok(stuck::describe(&left))).await?;
        let message = format!(
            "container {} is in quarantine: it does not die of SIGKILL; {words}; it keeps what it holds, and stopping or removing it tries again",
            record.id
        );
        return Err(Error::new(Kind::Timeout, message));
    }
    if held.wait(PATIENCE).await {
        return Ok(());
    }
    // Every process is gone, and the monitor has not noticed.
    tracing::warn!(container = record.id, "the pod's monitor hangs, killing it");
    monitor::end(context.node.paths.pod(&context.sandbox.id).path()).await?;
    // A pod that is being stopped has nobody who would tell.
    held.wait(PATIENCE).await;
    Ok(())
}

fn report(container: &str, error: &Error) {
    tracing::warn!(container, error = %error.chain(), "killing goes on by other means");
}

/// A signal to what has just ended did its work.
fn tolerate_ended(result: Result<()>) -> Result<()> {
    match result {
        Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Precondition) => Ok(()),
        other => other,
    }
}
