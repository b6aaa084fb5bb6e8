//! A process that goes ahead, so that another one is born where it shall live.
//!
//! ```text
//! runtime ──clone3(into cgroup)──▶ midwife ──setns…, clone3(PARENT)──▶ process, a child of the runtime
//!    ▲                                └──────── its pid, or why not ──▶ (pipe) ─┐
//!    └──────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Two things need it. New namespaces must belong to the user namespace that is joined, and
//! whoever has joined one cannot come back. And what enters a running container must not be
//! seen there while its root, its working directory or a descriptor still lead to the host
//! (CVE-2016-9962): the midwife gives all of that up where the container cannot see it, in
//! the PID namespace of the runtime, and only then gives birth in the container's.
//!
//! It stays in the container's cgroup until it is reaped, as one process more: a descriptor
//! of the cgroup's directory, needed to give birth there from outside, would be one of the
//! host's that the process starts with.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use pinion_sys::clone::{Child, Clone, Exit, pidfd_open, spawn};
use rustix::process::{Pid, WaitId, WaitIdOptions};

use crate::child::Step;
use crate::error::{Doing, Error, Failure, Result};
use crate::protocol::Report;

/// Starts a midwife in `cgroup`, which runs `enter`, with the descriptor that it must leave
/// open, and then starts the process with the `CLONE_NEW*` bits of `flags`, which runs `body`.
/// Returns when the midwife is gone. The caller has no other children.
///
/// # Errors
/// What `enter` reports; as clone3(2).
pub(crate) fn give<P>(
    cgroup: Option<BorrowedFd<'_>>,
    flags: u64,
    enter: impl FnOnce(BorrowedFd<'_>) -> Result<P, Report>,
    body: impl FnOnce(P) -> i32,
) -> Result<Child> {
    let (reader, writer) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).doing(|| "pipe".into())?;
    let midwife = spawn(&Clone { flags: 0, cgroup }, || {
        let answer = enter(writer.as_fd()).and_then(|prepared| {
            let flags = flags | libc::CLONE_PARENT as u64;
            spawn(&Clone { flags, cgroup: None }, || body(prepared))
                .map(|child| child.pid.as_raw_nonzero().get())
                .doing(|| "clone the container's process".into())
                .map_err(|failure| Report::new(Step::Enter, &failure))
        });
        let sent = serde_json::to_vec(&answer).map(|bytes| rustix::io::write(&writer, &bytes));
        i32::from(!matches!(sent, Ok(Ok(_))))
    })
    .doing(|| "clone".into())?;
    drop(writer);
    // The answer fits into the pipe. By now it is there: nothing is waited for that others,
    // who may hold the pipe open, could withhold.
    let exit = midwife.wait().doing(|| "wait for the midwife".into())?;
    if exit != Exit::Code(0) {
        return Err(Error::ChildVanished("entering the container"));
    }
    child_in(&reader)
}

/// The process that the answer names. It must be a child of the caller: the process itself,
/// which those in the container may trace, has held the pipe for a moment.
fn child_in(reader: &OwnedFd) -> Result<Child> {
    let mut answer = vec![0; 8192];
    let length = rustix::io::retry_on_intr(|| rustix::io::read(reader, &mut answer));
    answer.truncate(length.doing(|| "read".into())?);
    let answer: Result<i32, Report> =
        serde_json::from_slice(&answer).map_err(|error| Error::Protocol(error.to_string()))?;
    let pid = Pid::from_raw(answer.map_err(Report::into_error)?)
        .ok_or(Error::ChildVanished("being born"))?;
    // Nobody has waited for it: the number is still its own.
    let pidfd = pidfd_open(pid).doing(|| "pidfd_open".into())?;
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    match rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), look) {
        Ok(_) => Ok(Child { pid, pidfd }),
        Err(error) => Err(error)
            .doing(|| format!("look for the child {}", pid.as_raw_nonzero()))
            .map_err(|failure: Failure| failure.into()),
    }
}
