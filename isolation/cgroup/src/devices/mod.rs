//! Which devices a container may open or create.
//!
//! Rules are an ordered list; for each kind of access the last rule that matches decides,
//! and what no rule mentions is denied. On v2 that is a BPF program ([`program`]), on v1 the
//! kernel's own exception list ([`list`]).

mod list;
mod program;
mod rules;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType};

use crate::{Error, Result, file};
use list::Whitelist;

/// The name under which `bpftool prog` shows our programs, and by which we know them again.
const PROGRAM_NAME: &str = "pinion_devices";

/// What every container may use, whatever its rules: creating any device node (using it is
/// another matter), the standard character devices, and terminals. The same list as runc's.
#[must_use]
pub fn default_device_rules() -> Vec<LinuxDeviceCgroup> {
    let any: [(LinuxDeviceType, Option<i64>, Option<i64>, &str); 2] =
        [(LinuxDeviceType::C, None, None, "m"), (LinuxDeviceType::B, None, None, "m")];
    // null, zero, full, random, urandom, tty, ptmx, every pseudo-terminal, and net/tun
    let standard = [
        (1, Some(3)),
        (1, Some(5)),
        (1, Some(7)),
        (1, Some(8)),
        (1, Some(9)),
        (5, Some(0)),
        (5, Some(2)),
        (136, None),
        (10, Some(200)),
    ];
    let standard = standard.map(|(major, minor)| (LinuxDeviceType::C, Some(major), minor, "rwm"));
    any.into_iter()
        .chain(standard)
        .filter_map(|(kind, major, minor, access)| {
            let rule = LinuxDeviceCgroupBuilder::default().allow(true).typ(kind).access(access);
            let rule = match major {
                Some(major) => rule.major(major),
                None => rule,
            };
            let rule = match minor {
                Some(minor) => rule.minor(minor),
                None => rule,
            };
            rule.build().ok()
        })
        .collect()
}

/// Puts `rules` in force on a v2 cgroup, in place of an earlier program of ours.
///
/// The new program is attached before the old one goes: at no moment is access wider than
/// the wider of the two lists.
pub(crate) fn set_v2(directory: &Path, rules: &[LinuxDeviceCgroup]) -> Result<()> {
    let instructions = program::assemble(&rules::normalise(rules)?);
    let fail = |action: &'static str| {
        move |source: io::Error| Error::DeviceProgram { path: directory.to_owned(), action, source }
    };
    let cgroup = File::open(directory).map_err(fail("open for"))?;
    let new =
        pinion_sys::bpf::load_device_program(&instructions, PROGRAM_NAME).map_err(fail("load"))?;
    let old = pinion_sys::bpf::attached_device_programs(cgroup.as_fd()).map_err(fail("query"))?;
    let mut old_fds = Vec::new();
    for id in &old {
        match pinion_sys::bpf::program_by_id(*id) {
            Ok(program) => {
                if pinion_sys::bpf::program_name(program.as_fd()).map_err(fail("inspect"))?
                    == PROGRAM_NAME
                {
                    old_fds.push(program);
                }
            }
            // Gone in the meantime.
            Err(error) if file::is_gone(&error) => {}
            Err(error) => return Err(fail("open")(error)),
        }
    }
    match old_fds.first() {
        Some(first) => {
            pinion_sys::bpf::replace_device_program(cgroup.as_fd(), new.as_fd(), first.as_fd())
        }
        None => pinion_sys::bpf::attach_device_program(cgroup.as_fd(), new.as_fd()),
    }
    .map_err(fail("attach"))?;
    for extra in old_fds.iter().skip(1) {
        pinion_sys::bpf::detach_device_program(cgroup.as_fd(), extra.as_fd())
            .map_err(fail("detach old"))?;
    }
    let new_id = pinion_sys::bpf::program_id(new.as_fd()).map_err(fail("inspect"))?;
    let attached = pinion_sys::bpf::attached_device_programs(cgroup.as_fd());
    if attached.map_err(fail("query"))?.contains(&new_id) {
        Ok(())
    } else {
        Err(Error::NotInForce {
            path: directory.to_owned(),
            asked: format!("device program {new_id}"),
            held: format!("{old:?}"),
        })
    }
}

/// Puts `rules` in force on a v1 `devices` cgroup, changing only what differs, so that an
/// update never takes a device away for a moment.
pub(crate) fn set_v1(directory: &Path, rules: &[LinuxDeviceCgroup]) -> Result<()> {
    let wanted = Whitelist::fold(&rules::normalise(rules)?)?;
    let list = directory.join("devices.list");
    let text = file::read(&list)?;
    let current = Whitelist::parse(&text).ok_or_else(|| Error::Parse {
        path: list.clone(),
        text: text.clone(),
        expected: "a device list",
    })?;
    for change in current.changes_to(&wanted) {
        let name = if change.allow { "devices.allow" } else { "devices.deny" };
        file::write(&directory.join(name), &change.value)?;
    }
    let held = file::read(&list)?;
    // A group that allows by default shows only "a *:* rwm", not what it excepts.
    if wanted.allows_by_default() || Whitelist::parse(&held).as_ref() == Some(&wanted) {
        Ok(())
    } else {
        Err(Error::NotInForce {
            path: list,
            asked: wanted.to_string(),
            held: held.trim().replace('\n', ", "),
        })
    }
}
