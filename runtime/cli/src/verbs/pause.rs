//! `pause` and `resume`

use pinion_cgroup::Cgroup;
use pinion_container::state::StateDir;
use pinion_container::status::Status;
use pinion_container::{Error as ContainerError, kill};

use crate::{Context, Error};

pub(crate) fn pause(context: &Context, id: &str) -> Result<i32, Error> {
    let (status, cgroup) = look(context, id)?;
    match status {
        Status::Running | Status::Created => cgroup.freeze()?,
        other => return Err(ContainerError::NotAlive(other).into()),
    }
    Ok(0)
}

pub(crate) fn resume(context: &Context, id: &str) -> Result<i32, Error> {
    let (status, cgroup) = look(context, id)?;
    if status != Status::Paused {
        return Err(ContainerError::NotPaused.into());
    }
    cgroup.thaw()?;
    Ok(0)
}

fn look(context: &Context, id: &str) -> Result<(Status, Cgroup), Error> {
    let directory = StateDir::of(&context.root, id)?;
    let _lock = directory.lock_exclusive()?;
    let record = directory.load()?;
    if record.has_no_cgroup() {
        return Err(ContainerError::Unsupported(kill::NO_CGROUP.into()).into());
    }
    let paths = record.cgroup.clone().ok_or(ContainerError::NotRunning)?;
    Ok((directory.status(&record), Cgroup::open(paths)))
}
