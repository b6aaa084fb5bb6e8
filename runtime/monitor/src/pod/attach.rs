//! Joining a process's stdio: attach, resize, log reopening.

use std::os::fd::OwnedFd;

use pinion_monitor_proto::message::{Attach, Resize};

use super::clients::{Answer, done};
use super::{Container, Pod};
use crate::container::Verb;
use crate::error::{Context, Error};

impl Pod {
    pub(super) fn attach(&mut self, attach: &Attach, fds: Vec<OwnedFd>) -> Answer {
        let key = self.container_key(&attach.id)?;
        let shared = &mut self.shared;
        let container = self.containers.get_mut(&key);
        container.as_ref().map(|container| admit(container, Verb::Attach)).transpose()?;
        let fds = by_name(fds, [attach.stdin, attach.stdout, attach.stderr]);
        if let Some(stdio) = container.and_then(|container| container.stdio.as_mut()) {
            stdio
                .attach(fds, attach.patient, shared)
                .map_err(|source| Error::Invalid(format!("attach: {source}")))?;
        }
        done()
    }

    pub(super) fn resize(&mut self, resize: &Resize) -> Answer {
        let key = self.container_key(&resize.id)?;
        let stdio = if resize.exec_id.is_empty() {
            let container = self.containers.get(&key);
            container.map(|container| admit(container, Verb::Attach)).transpose()?;
            container.and_then(|container| container.stdio.as_ref())
        } else {
            let exec = self.exec_key(key, &resize.exec_id)?;
            self.execs.get(&exec).and_then(|exec| exec.stdio.as_ref())
        };
        let stdio = stdio.ok_or_else(|| Error::Invalid("process has no terminal".to_owned()))?;
        let size = |value: u32| {
            let size = u16::try_from(value).ok();
            size.ok_or_else(|| Error::Invalid(format!("terminal size {value}")))
        };
        stdio
            .resize(size(resize.width)?, size(resize.height)?)
            .context(|| format!("resize terminal to {}x{}", resize.width, resize.height))?;
        done()
    }

    pub(super) fn reopen_log(&mut self, id: &str) -> Answer {
        let key = self.container_key(id)?;
        if let Some(stdio) = self.containers.get_mut(&key).and_then(|c| c.stdio.as_mut()) {
            stdio.log().reopen()?;
        }
        done()
    }
}

/// Whether the container's phase admits the verb.
pub(super) fn admit(container: &Container, verb: Verb) -> Result<(), Error> {
    use crate::container::Refusal;
    let (id, phase) = (container.id.clone(), container.phase.name());
    if container.deleting {
        return Err(Error::Invalid(format!("container {id:?} is being deleted")));
    }
    container.phase.admits(verb).map_err(|refusal| match refusal {
        Refusal::NotRunning => Error::NotRunning { id, phase },
        Refusal::WrongPhase => Error::Invalid(format!("container {id:?} is {phase}")),
    })
}

/// Descriptors that came in the order stdin, stdout, stderr, for those named.
pub(super) fn by_name(fds: Vec<OwnedFd>, named: [bool; 3]) -> [Option<OwnedFd>; 3] {
    let mut fds = fds.into_iter();
    named.map(|named| if named { fds.next() } else { None })
}
