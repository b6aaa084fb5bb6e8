//! One process of a container, decided: everything between the namespaces and execve(2).

use std::collections::HashSet;
use std::ffi::CString;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{IOPriorityClass, LinuxSchedulerPolicy};
use pinion_sys::process::SchedulerAttributes;
use pinion_topology::CpuSet;
use rustix::process::{Resource, Rlimit};
use rustix::thread::CapabilitySet;

use crate::capability::CapabilitySets;
use crate::config::{Process, Scheduler};
use crate::error::{Error, Result};

/// What a process shall be.
#[derive(Debug)]
pub struct ProcessPlan {
    /// The arguments; never empty.
    pub args: Vec<String>,
    /// `NAME=value` strings; later ones win.
    pub env: Vec<CString>,
    /// The directories of `PATH` in `env`.
    pub search_path: String,
    /// True when `env` names a home directory.
    pub has_home: bool,
    /// The working directory, absolute.
    pub cwd: PathBuf,
    /// True when it shall have a terminal of its own.
    pub terminal: bool,
    /// Rows and columns of the terminal.
    pub console_size: Option<(u16, u16)>,
    /// User id inside.
    pub uid: u32,
    /// Primary group id inside.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// File mode creation mask.
    pub umask: u32,
    /// Capabilities; without any in the configuration, none.
    pub capabilities: CapabilitySets,
    /// Resource limits.
    pub rlimits: Vec<(Resource, Rlimit)>,
    /// Forbid gaining privileges by executing a file.
    pub no_new_privileges: bool,
    /// AppArmor profile.
    pub apparmor: Option<String>,
    /// SELinux label.
    pub selinux: Option<String>,
    /// `oom_score_adj`.
    pub oom_score_adj: Option<i32>,
    /// Class and level for ioprio_set(2).
    pub io_priority: Option<(u16, u16)>,
    /// For sched_setattr(2).
    pub scheduler: Option<SchedulerAttributes>,
    /// Processors to bind to before and after joining the cgroup, as masks.
    pub affinity: (Option<Vec<u64>>, Option<Vec<u64>>),
}

impl ProcessPlan {
    /// Checks `process` and converts it. `available` are the capabilities the runtime can
    /// pass on; the second value holds warnings.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the field's name.
    pub fn plan(process: &Process, available: CapabilitySet) -> Result<(Self, Vec<String>)> {
        let args = process.args.clone().unwrap_or_default();
        if args.first().is_none_or(String::is_empty) {
            return Err(invalid("process.args must not be empty"));
        }
        if args.iter().any(|arg| arg.contains('\0')) {
            return Err(invalid("process.args contains a NUL byte"));
        }
        if !process.cwd.is_absolute() {
            return Err(invalid("Cwd must be an absolute path"));
        }
        let env = process.env.as_deref().unwrap_or_default();
        let (capabilities, warnings) = match &process.capabilities {
            Some(asked) => CapabilitySets::plan(asked, available),
            None => (CapabilitySets::none(), Vec::new()),
        };
        let user = &process.user;
        let plan = Self {
            args,
            env: environment(env)?,
            search_path: last_value(env, "PATH").unwrap_or_default().to_owned(),
            has_home: last_value(env, "HOME").is_some_and(|home| !home.is_empty()),
            cwd: clean(&process.cwd),
            terminal: process.terminal,
            console_size: process.console_size.map(|size| {
                let fit = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
                (fit(size.height()), fit(size.width()))
            }),
            uid: id(user.uid(), "uid")?,
            gid: id(user.gid(), "gid")?,
            groups: user.additional_gids().clone().unwrap_or_default(),
            umask: user.umask().unwrap_or(0o022) & 0o777,
            capabilities,
            rlimits: rlimits(process)?,
            no_new_privileges: process.no_new_privileges,
            apparmor: label(process.apparmor_profile.as_ref()),
            selinux: label(process.selinux_label.as_ref()),
            oom_score_adj: process.oom_score_adj.map(oom_score).transpose()?,
            io_priority: io_priority(process)?,
            scheduler: process.scheduler.as_ref().map(scheduler).transpose()?,
            affinity: affinity(process)?,
        };
        Ok((plan, warnings))
    }
}

/// As runc: of variables set twice the last one counts, where it stands, and an empty `HOME`
/// is none.
fn environment(env: &[String]) -> Result<Vec<CString>> {
    let mut seen = HashSet::with_capacity(env.len());
    let mut kept = Vec::with_capacity(env.len());
    for entry in env.iter().rev() {
        let (name, value) = match entry.split_once('=') {
            Some((name, value)) if !name.is_empty() => (name, value),
            _ => return Err(invalid(format!("invalid environment variable: {entry:?}"))),
        };
        let text = CString::new(entry.as_str())
            .map_err(|_nul| invalid("process.env contains a NUL byte"))?;
        if seen.insert(name) && !(name == "HOME" && value.is_empty()) {
            kept.push(text);
        }
    }
    kept.reverse();
    Ok(kept)
}

fn last_value<'a>(env: &'a [String], name: &str) -> Option<&'a str> {
    env.iter().rev().find_map(|e| e.strip_prefix(name)?.strip_prefix('='))
}

/// 2^32 - 1 means "leave as it is" to the kernel and must never be asked for.
fn id(id: u32, field: &str) -> Result<u32> {
    if id == u32::MAX {
        Err(invalid(format!("process.user.{field} is out of range")))
    } else {
        Ok(id)
    }
}

fn label(text: Option<&String>) -> Option<String> {
    text.filter(|text| !text.is_empty()).cloned()
}

fn oom_score(score: i32) -> Result<i32> {
    if (-1000..=1000).contains(&score) {
        Ok(score)
    } else {
        Err(invalid(format!("process.oomScoreAdj {score} is not within -1000 and 1000")))
    }
}

fn rlimits(process: &Process) -> Result<Vec<(Resource, Rlimit)>> {
    use oci_spec::runtime::PosixRlimitType as Type;
    let mut limits = Vec::new();
    for limit in process.rlimits.iter().flatten() {
        let resource = match limit.typ() {
            Type::RlimitCpu => Resource::Cpu,
            Type::RlimitFsize => Resource::Fsize,
            Type::RlimitData => Resource::Data,
            Type::RlimitStack => Resource::Stack,
            Type::RlimitCore => Resource::Core,
            Type::RlimitRss => Resource::Rss,
            Type::RlimitNproc => Resource::Nproc,
            Type::RlimitNofile => Resource::Nofile,
            Type::RlimitMemlock => Resource::Memlock,
            Type::RlimitAs => Resource::As,
            Type::RlimitLocks => Resource::Locks,
            Type::RlimitSigpending => Resource::Sigpending,
            Type::RlimitMsgqueue => Resource::Msgqueue,
            Type::RlimitNice => Resource::Nice,
            Type::RlimitRtprio => Resource::Rtprio,
            Type::RlimitRttime => Resource::Rttime,
        };
        if limits.iter().any(|(seen, _)| *seen == resource) {
            return Err(invalid(format!("rlimit {} is given twice", limit.typ())));
        }
        if limit.soft() > limit.hard() {
            return Err(invalid(format!("rlimit {}: soft is above hard", limit.typ())));
        }
        // The kernel's infinity is the largest number, which rustix spells None.
        let value = |n: u64| (n != u64::MAX).then_some(n);
        limits.push((
            resource,
            Rlimit { current: value(limit.soft()), maximum: value(limit.hard()) },
        ));
    }
    Ok(limits)
}

fn io_priority(process: &Process) -> Result<Option<(u16, u16)>> {
    let Some(asked) = process.io_priority else { return Ok(None) };
    let class = match asked.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    match u16::try_from(asked.priority()) {
        Ok(level @ 0..=7) => Ok(Some((class, level))),
        _ => Err(invalid(format!(
            "process.ioPriority.priority {} is not within 0 and 7",
            asked.priority()
        ))),
    }
}

/// sched_setattr(2).
const SCHEDULER_FLAGS: [(&str, u64); 7] = [
    ("SCHED_FLAG_RESET_ON_FORK", 0x01),
    ("SCHED_FLAG_RECLAIM", 0x02),
    ("SCHED_FLAG_DL_OVERRUN", 0x04),
    ("SCHED_FLAG_KEEP_POLICY", 0x08),
    ("SCHED_FLAG_KEEP_PARAMS", 0x10),
    ("SCHED_FLAG_UTIL_CLAMP_MIN", 0x20),
    ("SCHED_FLAG_UTIL_CLAMP_MAX", 0x40),
];

fn scheduler(asked: &Scheduler) -> Result<SchedulerAttributes> {
    let policy = match asked.policy {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
    };
    let real_time = policy == libc::SCHED_FIFO || policy == libc::SCHED_RR;
    let priority = asked.priority.unwrap_or(0);
    if priority != 0 && !real_time {
        return Err(invalid(
            "scheduler.priority can only be specified for SchedFIFO or SchedRR policy",
        ));
    }
    let nice = asked.nice.unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        return Err(invalid(format!("invalid scheduler.nice: {nice}")));
    }
    let deadline = [asked.runtime, asked.deadline, asked.period];
    if policy != libc::SCHED_DEADLINE && deadline.iter().any(|n| n.is_some_and(|n| n != 0)) {
        return Err(invalid(
            "scheduler runtime/deadline/period can only be specified for SchedDeadline policy",
        ));
    }
    let flags = asked.flags.iter().flatten().try_fold(0, |flags, name| {
        match SCHEDULER_FLAGS.iter().find(|(known, _)| known == name) {
            Some((_, bit)) => Ok(flags | bit),
            None => Err(invalid(format!("invalid scheduler.flags: {name:?}"))),
        }
    })?;
    Ok(SchedulerAttributes {
        policy: policy as u32,
        flags,
        nice,
        priority: u32::try_from(priority)
            .map_err(|_negative| invalid("scheduler.priority is negative"))?,
        runtime: deadline[0].unwrap_or(0),
        deadline: deadline[1].unwrap_or(0),
        period: deadline[2].unwrap_or(0),
        ..SchedulerAttributes::default()
    })
}

type Affinity = (Option<Vec<u64>>, Option<Vec<u64>>);

fn affinity(process: &Process) -> Result<Affinity> {
    let Some(asked) = &process.exec_cpu_affinity else { return Ok((None, None)) };
    let mask = |list: &Option<String>| list.as_deref().map(cpu_mask).transpose();
    Ok((mask(&asked.initial)?, mask(&asked.r#final)?))
}

fn cpu_mask(list: &str) -> Result<Vec<u64>> {
    match list.parse::<CpuSet>() {
        Ok(set) if !set.is_empty() => Ok(set.words().to_vec()),
        Ok(_) => Err(invalid("execCPUAffinity: the CPU list is empty")),
        Err(error) => Err(invalid(format!("execCPUAffinity: {error}"))),
    }
}

/// `path` made absolute without `.`, `..` and doubled slashes, by its text alone.
#[must_use]
pub fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

fn invalid(text: impl Into<String>) -> Error {
    Error::Invalid(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(extra: &str) -> Result<ProcessPlan> {
        let json = format!(
            r#"{{"args":["sh"],"cwd":"/","user":{{"uid":0,"gid":0}},"env":["PATH=/a","PATH=/b"]{extra}}}"#
        );
        let process: Process = serde_json::from_str(&json).unwrap();
        ProcessPlan::plan(&process, CapabilitySet::all()).map(|(plan, _)| plan)
    }

    #[test]
    fn the_last_of_two_variables_wins() {
        let plan = plan("").unwrap();
        assert_eq!(plan.search_path, "/b");
        assert_eq!(plan.env, [c"PATH=/b".to_owned()]);
    }

    #[test]
    fn variables_stand_once_and_an_empty_home_not_at_all() {
        let kept = |list: &[&str]| {
            let list: Vec<String> = list.iter().map(ToString::to_string).collect();
            environment(&list).map(|kept| {
                kept.iter().map(|entry| entry.to_str().unwrap().to_owned()).collect::<Vec<_>>()
            })
        };
        assert_eq!(kept(&["A=1", "B=2", "A=3", "C="]).unwrap(), ["B=2", "A=3", "C="]);
        assert_eq!(kept(&["HOME=/a", "A=1", "HOME="]).unwrap(), ["A=1"]);
        for bad in ["A", "", "=x", "A=\0"] {
            assert!(kept(&["A=1", bad]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn out_of_range_values_are_refused() {
        for extra in [
            r#","oomScoreAdj":1001"#,
            r#","ioPriority":{"class":"IOPRIO_CLASS_BE","priority":8}"#,
            r#","rlimits":[{"type":"RLIMIT_NOFILE","soft":2,"hard":1}]"#,
            r#","rlimits":[{"type":"RLIMIT_CPU","soft":1,"hard":1},{"type":"RLIMIT_CPU","soft":1,"hard":1}]"#,
            r#","scheduler":{"policy":"SCHED_OTHER","priority":5}"#,
            r#","scheduler":{"policy":"SCHED_OTHER","nice":20}"#,
            r#","scheduler":{"policy":"SCHED_OTHER","flags":["SCHED_FLAG_NONE"]}"#,
        ] {
            assert!(matches!(plan(extra), Err(Error::Invalid(_))), "{extra}");
        }
    }

    #[test]
    fn scheduler_flags_have_the_names_of_the_specification() {
        let json = r#","scheduler":{"policy":"SCHED_DEADLINE","runtime":1,"deadline":2,"period":3,
            "flags":["SCHED_FLAG_RESET_ON_FORK","SCHED_FLAG_DL_OVERRUN"]}"#;
        let scheduler = plan(json).unwrap().scheduler.unwrap();
        assert_eq!((scheduler.policy, scheduler.flags), (6, 0x05));
        assert_eq!((scheduler.runtime, scheduler.deadline, scheduler.period), (1, 2, 3));
    }

    #[test]
    fn malformed_environment_and_relative_directories_are_refused() {
        for json in [
            r#"{"args":["a"],"cwd":"/","user":{"uid":0,"gid":0},"env":["NOEQUALS"]}"#,
            r#"{"args":["a"],"cwd":"/","user":{"uid":0,"gid":0},"env":["=x"]}"#,
            r#"{"args":["a"],"cwd":"x","user":{"uid":0,"gid":0}}"#,
            r#"{"args":[],"cwd":"/","user":{"uid":0,"gid":0}}"#,
            r#"{"args":["a"],"cwd":"/","user":{"uid":4294967295,"gid":0}}"#,
        ] {
            let process: Process = serde_json::from_str(json).unwrap();
            assert!(ProcessPlan::plan(&process, CapabilitySet::all()).is_err(), "{json}");
        }
    }

    #[test]
    fn cleaning_never_leaves_the_root() {
        assert_eq!(clean(Path::new("../../a/./b/../c//")), Path::new("/a/c"));
        assert_eq!(clean(Path::new("/..")), Path::new("/"));
    }
}
