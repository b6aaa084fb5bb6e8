//! ExecSync: a command in a container, its output and exit code.
//!
//! The output pipes are made here and their write ends handed to the monitor, so bulk data
//! crosses no protocol. At most [`OUTPUT_LIMIT`] bytes are kept and the rest is read and
//! dropped: the command must neither block on a full pipe nor fill the server's memory.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pinion_cri_proto::v1::{ExecSyncRequest, ExecSyncResponse};
use pinion_monitor_proto::message;
use pinion_monitor_proto::message::request::Verb;
use pinion_monitor_proto::message::response::Outcome;
use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::task::JoinSet;

use crate::error::{Context, Error, Kind, Result};
use crate::monitor::{Client, unexpected};
use crate::node::Node;
use crate::paths::ContainerDirectory;
use crate::record::Phase;
use crate::services::{MAX_MESSAGE, blocking};

/// Bytes of output kept, of both streams together: what fits into one answer.
const OUTPUT_LIMIT: usize = MAX_MESSAGE - (64 << 10);

/// How much of that is kept for standard error: a flood on standard output does not take away
/// what says why.
const ERROR_LIMIT: usize = 256 << 10;

/// How long output may trickle in after the command has ended; something it left behind may
/// hold the pipes open for ever.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// What the monitor is given beyond the command's own timeout before it is not waited for.
const MONITOR_MARGIN: Duration = Duration::from_secs(15);

static EXECS: AtomicU64 = AtomicU64::new(1);

/// Runs the command of a request.
pub(crate) async fn sync(node: &Arc<Node>, request: ExecSyncRequest) -> Result<ExecSyncResponse> {
    let ExecSyncRequest { container_id, cmd, timeout } = request;
    if cmd.is_empty() {
        return Err(Error::invalid("cmd: the command is empty"));
    }
    let (pod, container) = {
        let snapshot = node.registry.snapshot();
        let (pod, container) = snapshot.container(&container_id)?;
        (pod.clone(), container.clone())
    };
    if container.phase() != Phase::Running {
        return Err(Error::precondition(format!("container {} is not running", container.id)));
    }
    let monitor = pod.monitor.clone().ok_or_else(|| {
        Error::new(Kind::Unavailable, format!("pod sandbox {} has no monitor", container.pod))
    })?;
    let directory = node.paths.pod(&container.pod).container(&container.id);
    let timeout = Duration::from_secs(u64::try_from(timeout).unwrap_or(0));
    // A task of its own: it cleans up even if the client goes away.
    let run = run(monitor, directory, container.id.clone(), cmd, timeout);
    match tokio::spawn(run).await {
        Ok(result) => result,
        Err(e) => Err(Error::internal("exec task ended early").caused_by(e)),
    }
}

async fn run(
    monitor: Client,
    directory: ContainerDirectory,
    container: String,
    cmd: Vec<String>,
    timeout: Duration,
) -> Result<ExecSyncResponse> {
    let text = cmd.join(" ");
    let (exec_id, process) = prepare(directory, cmd, false).await?;
    let exec = message::Exec {
        id: container,
        exec_id,
        process: process.to_string_lossy().into_owned(),
        stdout: true,
        stderr: true,
        timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        ..Default::default()
    };
    let result = converse(&monitor, exec, timeout).await;
    // It may never have been written, or the container be gone with it; the answer does not
    // wait for it.
    tokio::task::spawn_blocking(move || std::fs::remove_file(&process));
    let Finished { exited, stdout, stderr } = result?;
    if exited.timed_out {
        let message = format!("command {text:?} timed out: timeout {timeout:?} exceeded");
        return Err(Error::new(Kind::Timeout, message));
    }
    Ok(ExecSyncResponse { stdout, stderr, exit_code: exited.code })
}

/// Writes the OCI process of a command; gives its id and the file.
pub(crate) async fn prepare(
    directory: ContainerDirectory,
    cmd: Vec<String>,
    terminal: bool,
) -> Result<(String, PathBuf)> {
    let exec_id = format!("exec-{}", EXECS.fetch_add(1, Ordering::Relaxed));
    let file = directory.path().join(format!("{exec_id}.json"));
    let path = file.clone();
    blocking(move || write_process(&directory, &path, &cmd, terminal)).await?;
    Ok((exec_id, file))
}

/// The OCI process of an exec: that of the container, with other arguments.
fn write_process(
    directory: &ContainerDirectory,
    path: &std::path::Path,
    cmd: &[String],
    terminal: bool,
) -> Result<()> {
    let config = directory.config();
    let what = || format!("read {}", config.display());
    let bytes = std::fs::read(&config).context(what)?;
    let mut spec: Value = serde_json::from_slice(&bytes).context(what)?;
    let process = spec.get_mut("process").map(Value::take).unwrap_or_default();
    let process = exec_process(process, cmd, terminal)
        .ok_or_else(|| Error::internal(format!("{} has no process", config.display())))?;
    pinion_sys::atomic_file::write_volatile(path, process.to_string().as_bytes(), 0o600)
        .context(|| format!("write {}", path.display()))
}

fn exec_process(mut process: Value, cmd: &[String], terminal: bool) -> Option<Value> {
    let fields = process.as_object_mut()?;
    fields.insert("args".into(), json!(cmd));
    fields.insert("terminal".into(), json!(terminal));
    fields.remove("consoleSize");
    // A container that may not be OOM-killed easily is no reason for its probes not to be.
    fields.remove("oomScoreAdj");
    Some(process)
}

struct Finished {
    exited: message::Exited,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

async fn converse(monitor: &Client, exec: message::Exec, timeout: Duration) -> Result<Finished> {
    let (out_reader, out_writer) = output_pipe()?;
    let (err_reader, err_writer) = output_pipe()?;
    let budget = |bytes| Arc::new(AtomicUsize::new(bytes));
    let (stdout, stderr) = (Output::default(), Output::default());
    let mut reading = JoinSet::new();
    reading.spawn(collect(out_reader, budget(OUTPUT_LIMIT - ERROR_LIMIT), stdout.clone()));
    reading.spawn(collect(err_reader, budget(ERROR_LIMIT), stderr.clone()));
    // The write ends are closed here once they are sent, so the readers see the end.
    let mut answers = monitor.send(Verb::Exec(exec), vec![out_writer, err_writer]);
    let ended = async {
        match answers.next().await? {
            Outcome::ExecStarted(_) => {}
            other => return Err(unexpected("exec", &other)),
        }
        match answers.next().await? {
            Outcome::ExecExited(exited) => Ok(exited),
            other => Err(unexpected("exec", &other)),
        }
    };
    let exited = if timeout.is_zero() {
        ended.await
    } else {
        let late = || "the monitor did not end a command whose time was over".to_string();
        match tokio::time::timeout(timeout + MONITOR_MARGIN, ended).await {
            Ok(exited) => exited,
            Err(e) => Err(Error::new(Kind::Timeout, late()).caused_by(e)),
        }
    };
    let exited = exited?;
    // What still reads when the limit is over ends with the set.
    let all = async { while reading.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(DRAIN_LIMIT, all).await;
    let output =
        |o: &Output| std::mem::take(&mut *o.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(Finished { exited, stdout: output(&stdout), stderr: output(&stderr) })
}

fn output_pipe() -> Result<(pipe::Receiver, OwnedFd)> {
    let what = || "make a pipe for a command's output".to_string();
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).context(what)?;
    Ok((pipe::Receiver::from_owned_fd(reader).context(what)?, writer))
}

/// Output as far as it has come, shared with the task that reads on.
type Output = Arc<Mutex<Vec<u8>>>;

/// Reads to the end, keeping what the budget allows.
async fn collect(mut reader: pipe::Receiver, budget: Arc<AtomicUsize>, output: Output) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(n) = reader.read(&mut buffer).await {
        if n == 0 {
            return;
        }
        let allowed = take(&budget, n);
        let kept = buffer.get(..allowed).unwrap_or_default();
        output.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(kept);
    }
}

/// Takes up to `wanted` from a budget.
fn take(budget: &AtomicUsize, wanted: usize) -> usize {
    let rest = |left: usize| Some(left - left.min(wanted));
    match budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest) {
        Ok(left) | Err(left) => left.min(wanted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_is_the_container_s_process_with_other_arguments() {
        let process = json!({
            "terminal": true, "consoleSize": {"height": 1, "width": 1},
            "user": {"uid": 5, "gid": 6}, "args": ["init"], "cwd": "/x", "oomScoreAdj": -998,
        });
        let exec = exec_process(process, &["ls".into(), "-l".into()], false).unwrap();
        let expected = json!({
            "terminal": false, "user": {"uid": 5, "gid": 6}, "args": ["ls", "-l"], "cwd": "/x",
        });
        assert_eq!(exec, expected);
        assert!(exec_process(Value::Null, &[], false).is_none());
    }

    #[test]
    fn a_budget_is_never_overdrawn() {
        let budget = AtomicUsize::new(5);
        assert_eq!((take(&budget, 3), take(&budget, 3), take(&budget, 3)), (3, 2, 0));
    }

    #[tokio::test]
    async fn output_over_the_limit_is_read_and_dropped() {
        let (reader, writer) = output_pipe().unwrap();
        let output = Output::default();
        let budget = Arc::new(AtomicUsize::new(10));
        let reading = tokio::spawn(collect(reader, budget, output.clone()));
        let mut file = std::fs::File::from(writer);
        tokio::task::spawn_blocking(move || {
            use std::io::Write as _;
            // More than a pipe holds: without a reader this would block.
            file.write_all(&vec![b'x'; 256 << 10]).unwrap();
        })
        .await
        .unwrap();
        reading.await.unwrap();
        assert_eq!(output.lock().unwrap().len(), 10);
    }
}
