//! A conversation with `criu swrk`.
//!
//! ```text
//! runtime ──request──▶ criu
//!         ◀──notify─── (setup-namespaces, post-restore, orphan-pts-master + fd, …)
//!         ──go on────▶
//!         ◀──answer─── ends
//! ```
//!
//! CRIU opens the directories it is given through `/proc/<this process>/fd/N`, while the
//! descriptors it shall hand to restored processes must be inherited.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::rpc::{Encoder, Features, Kind, Notify, Response};
use crate::error::{Doing, Error, Failure, Result};

/// Larger than any answer; go-criu uses the same.
const BUFFER: usize = 40 << 10;

/// A running `criu swrk`.
#[derive(Debug)]
pub(crate) struct Session {
    criu: Child,
    socket: OwnedFd,
}

impl Session {
    /// Starts CRIU; `inherited` descriptors keep their numbers in it.
    ///
    /// # Errors
    /// Says what to install when there is no CRIU.
    pub(crate) fn start(inherited: &[&OwnedFd]) -> Result<Self> {
        let (socket, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .doing(|| "socketpair".into())?;
        for fd in inherited.iter().copied().chain([&theirs]) {
            pinion_sys::fd::set_cloexec(fd.as_raw_fd(), false).doing(|| "fcntl".into())?;
        }
        let started = Command::new("criu").arg("swrk").arg(theirs.as_raw_fd().to_string()).spawn();
        for fd in inherited {
            pinion_sys::fd::set_cloexec(fd.as_raw_fd(), true).doing(|| "fcntl".into())?;
        }
        match started {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::Unsupported(
                "checkpoint and restore need CRIU: exec: \"criu\": executable file not found in $PATH".into(),
            )),
            other => Ok(Self { criu: other.doing(|| "run criu".into())?, socket }),
        }
    }

    /// CRIU's process id, before it has got a request.
    pub(crate) fn pid(&self) -> i32 {
        // The kernel's process ids are positive and fit.
        i32::try_from(self.criu.id()).unwrap_or(0)
    }

    /// Sends a request with its options and answers notifications until CRIU has done it.
    ///
    /// # Errors
    /// What CRIU reports; what `notified` returns, which makes CRIU give up.
    pub(crate) fn ask(
        mut self,
        kind: Kind,
        options: &Encoder,
        mut notified: impl FnMut(&Notify, &[OwnedFd]) -> Result<()>,
    ) -> Result<Response> {
        let mut request = Encoder::default();
        request.number(1, kind as i64).message(2, options);
        let answered = self.converse(&request, &mut notified);
        // Whether it has understood or not: with its peer gone, CRIU ends.
        drop(self.socket);
        let status = self.criu.wait().doing(|| "wait for criu".into())?;
        let response = answered?;
        // After a pre-dump CRIU waits for the dump that would follow, and ends in anger.
        if !status.success() && kind != Kind::PreDump {
            return Err(Failure::refused(format!("criu failed: {status}")).into());
        }
        Ok(response)
    }

    fn converse(
        &self,
        request: &Encoder,
        notified: &mut impl FnMut(&Notify, &[OwnedFd]) -> Result<()>,
    ) -> Result<Response> {
        self.send(request)?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let (length, fds) = pinion_sys::scm::receive(&self.socket, &mut buffer)
                .doing(|| "hear from criu".into())?;
            if length == 0 {
                return Err(Failure::refused("criu ended without an answer").into());
            }
            let response = Response::decode(&buffer[..length])
                .ok_or_else(|| Failure::refused("criu's answer cannot be understood"))?;
            if !response.success {
                return Err(refused(&response).into());
            }
            let Some(notify) = response.notify.as_ref().filter(|_| is(&response, Kind::Notify))
            else {
                return Ok(response);
            };
            let outcome = notified(notify, &fds);
            let mut go_on = Encoder::default();
            go_on.number(1, Kind::Notify as i64).number(3, i64::from(outcome.is_ok()));
            let sent = self.send(&go_on);
            outcome?;
            sent?;
        }
    }

    fn send(&self, message: &Encoder) -> Result<(), Failure> {
        pinion_sys::scm::send(&self.socket, message.finish(), &[])
            .map(drop)
            .doing(|| "speak to criu".into())
    }
}

fn is(response: &Response, kind: Kind) -> bool {
    response.kind == kind as u64
}

fn refused(response: &Response) -> Failure {
    let errno = response.errno.unwrap_or(0);
    let kind = match response.kind {
        kind if kind == Kind::Dump as u64 => "DUMP".to_owned(),
        kind if kind == Kind::Restore as u64 => "RESTORE".to_owned(),
        kind if kind == Kind::PreDump as u64 => "PRE_DUMP".to_owned(),
        other => other.to_string(),
    };
    Failure::refused(format!("criu failed: type {kind} errno {errno}"))
}

/// Asks what CRIU and the kernel can do.
///
/// # Errors
/// As [`Session::ask`].
pub(crate) fn features() -> Result<Features> {
    let session = Session::start(&[])?;
    let mut wanted = Encoder::default();
    wanted.flag(1, true).flag(2, true);
    let mut request = Encoder::default();
    request.number(1, Kind::FeatureCheck as i64).message(5, &wanted);
    let answered = session.converse(&request, &mut |_, _| Ok(()));
    let Session { mut criu, socket } = session;
    drop(socket);
    criu.wait().doing(|| "wait for criu".into())?;
    Ok(answered?.features)
}

/// The errors in CRIU's log, for the message: the last few, without their time stamps.
#[must_use]
pub(crate) fn errors_in(log: &Path) -> String {
    const MOST: usize = 4;
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let errors: Vec<&str> = text.lines().filter(|line| line.contains("Error")).collect();
    let last = errors.iter().skip(errors.len().saturating_sub(MOST));
    let without_time = last.map(|line| line.split_once(") ").map_or(*line, |(_, rest)| rest));
    without_time.collect::<Vec<_>>().join("; ")
}
