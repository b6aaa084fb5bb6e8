//! The systemd driver: a transient unit per container, made over D-Bus.
//!
//! A scope cannot be empty, and the container's process does not exist yet when its cgroup
//! is made: a placeholder process starts the scope and is killed once the container is in.
//! The unit is delegated, so everything below its directory stays ours; limits are told to
//! systemd too, because it writes its own idea of them on every reload.

mod bus;
mod properties;
mod wire;

use std::io;
use std::time::Duration;

use oci_spec::runtime::LinuxResources;
use pinion_sys::clone::{Child, Clone, spawn};
use rustix::process::Signal;

use crate::path::Unit;
use crate::{Error, Result};
use bus::{Bus, Failure};

const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";

/// A unit just started, with the process that keeps it.
#[derive(Debug)]
pub(crate) struct Scope {
    unit: Unit,
    placeholder: Option<Child>,
}

impl Scope {
    /// Starts the unit. A failed unit of the same name is cleared away first.
    pub(crate) fn start(unit: &Unit) -> Result<Self> {
        let fail = |source| Error::Systemd { unit: unit.name.clone(), action: "start", source };
        let mut bus = Bus::connect().map_err(fail)?;
        // A slice may be empty, a scope may not.
        let placeholder = if unit.name.ends_with(".slice") {
            None
        } else {
            Some(spawn(&Clone::default(), wait_for_the_end).map_err(fail)?)
        };
        let scope = Self { unit: unit.clone(), placeholder };
        let pid = scope.placeholder.as_ref().map(|child| child.pid.as_raw_nonzero().get());
        let properties = properties::of_unit(unit, pid);
        match bus.start_transient_unit(&unit.name, &properties) {
            Err(Failure::Refused { name, .. }) if name == UNIT_EXISTS => {
                // A leftover of a failed container; systemd drops it once it is reset.
                let _ = bus.reset_failed_unit(&unit.name);
                bus.start_transient_unit(&unit.name, &properties)
            }
            outcome => outcome,
        }
        .map_err(|failure| fail(failure.into()))?;
        Ok(scope)
    }

    /// Stops the unit again.
    pub(crate) fn stop(&self) -> Result<()> {
        stop(&self.unit)
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        if let Some(child) = self.placeholder.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What the placeholder does. It must not outlive us, whatever becomes of us.
fn wait_for_the_end() -> i32 {
    if rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).is_err() {
        return 1;
    }
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Stops a unit; one that does not exist is stopped.
pub(crate) fn stop(unit: &Unit) -> Result<()> {
    let fail = |source| Error::Systemd { unit: unit.name.clone(), action: "stop", source };
    let mut bus = Bus::connect().map_err(fail)?;
    match bus.stop_unit(&unit.name) {
        Ok(()) => {}
        Err(Failure::Refused { name, .. }) if name == NO_SUCH_UNIT => return Ok(()),
        Err(failure) => return Err(fail(failure.into())),
    }
    // In case it failed (an OOM kill does that): otherwise the name stays taken.
    let _ = bus.reset_failed_unit(&unit.name);
    Ok(())
}

/// Tells systemd the limits it knows about; the files are written by the caller.
pub(crate) fn set_resources(unit: &Unit, resources: &LinuxResources, v2: bool) -> Result<()> {
    let properties = properties::of_resources(resources, v2)?;
    if properties.is_empty() {
        return Ok(());
    }
    let fail = |source| Error::Systemd { unit: unit.name.clone(), action: "set", source };
    let mut bus = Bus::connect().map_err(fail)?;
    bus.set_unit_properties(&unit.name, &properties)
        .map_err(|failure| fail(io::Error::from(failure)))
}
