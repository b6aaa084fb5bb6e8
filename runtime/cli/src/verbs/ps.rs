//! `ps`

use std::process::Command;

use pinion_cgroup::Cgroup;
use pinion_container::state::StateDir;
use pinion_container::{Error as ContainerError, kill};

use super::print_json;
use crate::args::{Format, Ps};
use crate::{Context, Error};

pub(crate) fn run(context: &Context, args: &Ps) -> Result<i32, Error> {
    let record = StateDir::of(&context.root, &args.id)?.load()?;
    if record.has_no_cgroup() {
        return Err(ContainerError::Unsupported(kill::NO_CGROUP.into()).into());
    }
    let paths = record.cgroup.ok_or(ContainerError::NotRunning)?;
    let mut pids = Cgroup::open(paths).pids(true)?;
    pids.sort_unstable();
    match args.format {
        Format::Json => print_json(&pids, false)?,
        Format::Table => print_table(&pids, &args.options)?,
    }
    Ok(0)
}

/// The lines of the host's ps(1) that belong to the container, as runc does it.
fn print_table(pids: &[i32], options: &[String]) -> Result<(), Error> {
    let default = ["-ef".to_owned()];
    let options = if options.is_empty() { &default[..] } else { options };
    let output = Command::new("ps")
        .args(options)
        .output()
        .map_err(|source| Error::Io { what: "run ps".into(), source })?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr);
        return Err(Error::Usage(format!("ps: {}: {}", output.status, reason.trim_end())));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let column = header
        .split_whitespace()
        .position(|title| title == "PID")
        .ok_or_else(|| Error::Usage("couldn't find PID field in ps output".into()))?;
    println!("{header}");
    for line in lines {
        let pid = line.split_whitespace().nth(column).and_then(|field| field.parse().ok());
        if pid.is_some_and(|pid: i32| pids.binary_search(&pid).is_ok()) {
            println!("{line}");
        }
    }
    Ok(())
}
