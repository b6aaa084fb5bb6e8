//! `events`

use pinion_cgroup::{Cgroup, Stats};
use pinion_container::Error as ContainerError;
use pinion_container::state::StateDir;
use pinion_container::status::Status;
use serde::Serialize;

use super::print_json;
use crate::args::Events;
use crate::{Context, Error};

#[derive(Debug, Serialize)]
struct Event<'a> {
    r#type: &'static str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Data>,
}

/// runc's document: the controllers' numbers and two parts that are always empty here.
#[derive(Debug, Serialize)]
struct Data {
    #[serde(flatten)]
    stats: Stats,
    intel_rdt: serde_json::Map<String, serde_json::Value>,
    network_interfaces: Option<()>,
}

pub(crate) fn run(context: &Context, args: &Events) -> Result<i32, Error> {
    let directory = StateDir::of(&context.root, &args.id)?;
    let record = directory.load()?;
    if directory.status(&record) == Status::Stopped {
        return Err(ContainerError::NotRunning.into());
    }
    let cgroup = Cgroup::open(record.cgroup.clone().ok_or(ContainerError::NotRunning)?);
    print_stats(&args.id, &cgroup)?;
    if args.stats {
        return Ok(0);
    }
    let mut kills = cgroup.oom_kill_count()?;
    loop {
        std::thread::sleep(args.interval);
        if directory.status(&record) == Status::Stopped {
            return Ok(0);
        }
        let now = cgroup.oom_kill_count()?;
        if now > kills {
            print_json(&Event { r#type: "oom", id: &args.id, data: None }, false)?;
        }
        kills = now;
        print_stats(&args.id, &cgroup)?;
    }
}

fn print_stats(id: &str, cgroup: &Cgroup) -> Result<(), Error> {
    let data = Data {
        stats: cgroup.stats()?,
        intel_rdt: serde_json::Map::new(),
        network_interfaces: None,
    };
    print_json(&Event { r#type: "stats", id, data: Some(data) }, false)
}
