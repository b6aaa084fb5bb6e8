//! The server is killed at chosen system calls of every CRI call that changes something.
//!
//! strace sends SIGKILL at the n-th call of a kind, so the server dies between two steps and not
//! at some moment of a timer. Whatever it was doing, after its restart the same request is sent
//! once more, as kubelet does: there is one pod or container and the answer names it, and when
//! all is removed the machine is as it was.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pinion_cri_proto::v1::{ContainerState, PodSandboxState};

use crate::cri::{Container, Cri, Pod};
use crate::error::{During, Error, Result, ensure};
use crate::image::catalogue;
use crate::leaks::{self, Snapshot};
use crate::site::Site;

const CLEANUP: Duration = Duration::from_secs(20);
/// strace must be there by then.
const ATTACH: Duration = Duration::from_secs(10);
/// More calls of one kind than an operation makes.
const MOST: u32 = 60;

/// What is torn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Run,
    Create,
    Start,
    Stop,
    Remove,
    Pull,
}

/// The kinds of system calls at which a step ends: a commit, a place in the file system, a
/// process, a word to the monitor. Each with those of its calls that the short form takes.
type Kinds = &'static [(&'static str, &'static [u32])];

const RUN: Kinds = &[
    ("fdatasync,fsync", &[1, 2, 3]),
    ("mkdir,mkdirat", &[1, 2]),
    ("clone,clone3,vfork", &[1, 2]),
    ("mount,move_mount,open_tree", &[1]),
    ("sendmsg", &[1]),
];
const CREATE: Kinds = &[
    ("fdatasync,fsync", &[1, 2]),
    ("mkdir,mkdirat", &[1, 3]),
    ("mount,move_mount,fsmount,open_tree", &[1]),
    ("sendmsg", &[1]),
];
const START: Kinds = &[("sendmsg", &[1]), ("fdatasync,fsync", &[1])];
const STOP: Kinds = &[
    ("sendmsg", &[1, 2]),
    ("umount2", &[1]),
    ("unlink,unlinkat", &[1]),
    ("fdatasync,fsync", &[1]),
];
const REMOVE: Kinds = &[
    ("sendmsg", &[1]),
    ("umount2", &[1]),
    ("unlink,unlinkat,rmdir", &[1, 2]),
    ("fdatasync,fsync", &[1]),
];
const PULL: Kinds = &[
    ("fdatasync,fsync", &[1, 2]),
    ("rename,renameat,renameat2", &[1, 2]),
    ("mkdir,mkdirat", &[2]),
    ("unlink,unlinkat", &[1]),
];

const STAGES: [(Stage, Kinds); 6] = [
    (Stage::Run, RUN),
    (Stage::Create, CREATE),
    (Stage::Start, START),
    (Stage::Stop, STOP),
    (Stage::Remove, REMOVE),
    (Stage::Pull, PULL),
];

/// Tears every call; at every system call of these kinds if `every`, else at a few.
pub(crate) fn run(site: &mut Site, every: bool) -> Result<()> {
    let before = Snapshot::take();
    let (mut killed, mut survived) = (0, 0);
    for (stage, kinds) in STAGES {
        for (calls, few) in kinds {
            let all: Vec<u32> = (1..=MOST).collect();
            for number in if every { &all } else { *few } {
                let name = format!("torn-{stage:?}-{}", killed + survived).to_lowercase();
                let what = format!("{stage:?} killed at {calls} number {number}");
                if !tear(site, stage, calls, *number, &name).during_check(&what)? {
                    survived += 1;
                    break;
                }
                leaks::nothing_since(&before, CLEANUP).during_check(&what)?;
                killed += 1;
            }
        }
        println!("{stage:?}: killed {killed} times so far");
    }
    // A suite whose injection never hits shows nothing.
    ensure(killed >= 12, || format!("the server was killed only {killed} times"))?;
    println!("killed {killed} times in the middle of a call, {survived} kinds were at their end");
    Ok(())
}

/// One call, torn and then sent again; false if it has fewer such system calls.
fn tear(site: &mut Site, stage: Stage, calls: &str, number: u32, name: &str) -> Result<bool> {
    let cri = site.connect()?;
    let pod = site.pod(name)?;
    let container = Container::new("main", catalogue::WORKLOAD, &["sleep", "600"]);
    let pod_id = match stage {
        Stage::Run | Stage::Pull => String::new(),
        _ => cri.run_pod(&pod)?,
    };
    let id = match stage {
        Stage::Run | Stage::Pull | Stage::Create => String::new(),
        Stage::Start => cri.create(&pod_id, &pod, &container)?,
        Stage::Stop | Stage::Remove => cri.launch(&pod_id, &pod, &container)?,
    };
    if stage == Stage::Pull {
        cri.remove_image(catalogue::BUSYBOX)?;
    }
    let call = |cri: &Cri| match stage {
        Stage::Run => cri.run_pod(&pod).map(drop),
        Stage::Create => cri.create(&pod_id, &pod, &container).map(drop),
        Stage::Start => cri.start(&id),
        Stage::Stop => cri.stop_pod(&pod_id),
        Stage::Remove => cri.remove_pod(&pod_id),
        Stage::Pull => cri.pull(catalogue::BUSYBOX).map(drop),
    };
    let mut tracer = attach(site.server.pid(), calls, number)?;
    let answer = call(&cri);
    drop(cri);
    let killed = !site.server.alive()?;
    let _ = tracer.kill();
    tracer.wait().during(|| "wait for strace".into())?;
    if killed {
        site.server.kill()?;
        site.server.restart()?;
    } else {
        answer?;
    }
    let cri = site.connect()?;
    let again = call(&cri);
    check(&cri, stage, &pod, &pod_id, &id, again)?;
    cri.remove_all()?;
    Ok(killed)
}

/// After the second request: exactly one, in the right state.
fn check(
    cri: &Cri,
    stage: Stage,
    pod: &Pod,
    pod_id: &str,
    id: &str,
    again: Result<()>,
) -> Result<()> {
    let pods = cri.pods()?;
    let containers = cri.containers()?;
    let state = || format!("{stage:?} {}: {pods:?} {containers:?}", pod.name);
    match stage {
        Stage::Run => {
            again?;
            ensure(pods.len() == 1 && pods[0].state() == PodSandboxState::SandboxReady, state)
        }
        Stage::Create => {
            again?;
            ensure(pods.len() == 1 && containers.len() == 1, state)?;
            cri.start(&containers[0].id)?;
            let said = cri.exec(&containers[0].id, &["echo", "alive"])?;
            ensure(said.stdout == "alive\n", || format!("{said:?}"))
        }
        Stage::Start => {
            // It may have been started before the server died; then it is refused.
            if let Err(error) = again {
                let said = error.chain();
                ensure(said.contains("already running"), || said)?;
            }
            let status = cri.status(id)?;
            ensure(status.state() == ContainerState::ContainerRunning, || format!("{status:?}"))
        }
        Stage::Stop => {
            again?;
            ensure(pods.len() == 1 && pods[0].state() == PodSandboxState::SandboxNotready, state)
        }
        Stage::Remove => {
            again?;
            ensure(pods.iter().all(|p| p.id != pod_id), state)
        }
        Stage::Pull => {
            again?;
            let names = cri.image_names()?;
            ensure(names.iter().any(|n| n == catalogue::BUSYBOX), || format!("{names:?}"))
        }
    }
}

/// Has the server killed at the `number`-th of these calls that one of its threads makes.
fn attach(pid: u32, calls: &str, number: u32) -> Result<Child> {
    let tracer = Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-p", &pid.to_string()])
        .args(["-e", &format!("trace={calls}")])
        .args(["-e", &format!("inject={calls}:signal=KILL:when={number}")])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .during(|| "start strace".into())?;
    let deadline = Instant::now() + ATTACH;
    // Every thread, or one that is not traced does the work.
    while !all_traced(pid)? {
        if Instant::now() > deadline {
            return Err(Error::check(format!("strace does not attach to {pid}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(tracer)
}

fn all_traced(pid: u32) -> Result<bool> {
    let place = format!("/proc/{pid}/task");
    let tasks = std::fs::read_dir(&place).during(|| format!("list {place}"))?;
    Ok(tasks.flatten().all(|task| {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
        tracer.is_none_or(|pid| pid.trim() != "0")
    }))
}

/// Says which point a failure belongs to.
trait DuringCheck<T> {
    fn during_check(self, what: &str) -> Result<T>;
}

impl<T> DuringCheck<T> for Result<T> {
    fn during_check(self, what: &str) -> Result<T> {
        self.map_err(|error| Error::check(format!("{what}: {}", error.chain())))
    }
}
