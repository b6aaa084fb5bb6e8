//! `update`

use std::io::Read;
use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};
use pinion_cgroup::Cgroup;
use pinion_container::Error as ContainerError;
use pinion_container::state::StateDir;
use pinion_container::status::Status;

use crate::args::Update;
use crate::{Context, Error};

pub(crate) fn run(context: &Context, args: &Update) -> Result<i32, Error> {
    let resources = match &args.resources {
        Some(path) => from_file(path)?,
        None => from_flags(args),
    };
    let directory = StateDir::of(&context.root, &args.id)?;
    let _lock = directory.lock_exclusive()?;
    let mut record = directory.load()?;
    if directory.status(&record) == Status::Stopped {
        return Err(ContainerError::NotRunning.into());
    }
    let (l3, memory) = (args.l3_cache_schema.as_deref(), args.mem_bw_schema.as_deref());
    if l3.is_some() || memory.is_some() {
        let paths = record.cgroup.clone().ok_or(ContainerError::NotRunning)?;
        let pids = Cgroup::open(paths).pids(true)?;
        pinion_container::rdt::update((l3, memory), &mut record, &directory, &pids)?;
    }
    pinion_container::isolation::update(&resources, &mut record, &directory)?;
    Ok(0)
}

fn from_file(path: &Path) -> Result<LinuxResources, Error> {
    let failed = |source| Error::Io { what: format!("read {}", path.display()), source };
    let mut text = String::new();
    if path == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).map_err(failed)?;
    } else {
        text = std::fs::read_to_string(path).map_err(failed)?;
    }
    serde_json::from_str(&text).map_err(|error| failed(error.into()))
}

fn from_flags(args: &Update) -> LinuxResources {
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(args.cpu_share)
        .set_quota(args.cpu_quota)
        .set_burst(args.cpu_burst)
        .set_period(args.cpu_period)
        .set_idle(args.cpu_idle)
        .set_realtime_runtime(args.cpu_rt_runtime)
        .set_realtime_period(args.cpu_rt_period)
        .set_cpus(args.cpuset_cpus.clone())
        .set_mems(args.cpuset_mems.clone());
    let mut memory = LinuxMemory::default();
    memory
        .set_limit(args.memory)
        .set_reservation(args.memory_reservation)
        .set_swap(args.memory_swap);
    let mut resources = LinuxResources::default();
    if cpu != LinuxCpu::default() {
        resources.set_cpu(Some(cpu));
    }
    if memory != LinuxMemory::default() {
        resources.set_memory(Some(memory));
    }
    if let Some(limit) = args.pids_limit {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        resources.set_pids(Some(pids));
    }
    if let Some(weight) = args.blkio_weight {
        let mut block = LinuxBlockIo::default();
        block.set_weight(Some(weight));
        resources.set_block_io(Some(block));
    }
    resources
}
