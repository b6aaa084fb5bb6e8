//! The server dies while pods run: nothing is lost, nothing is left behind.
//!
//! Twenty pods run; some containers end while the server is dead. After the restart every
//! pod is there, what ran still runs as the same process, what ended has its exit code, its
//! time and all of its log, and removing everything leaves the machine as it was. Then the
//! server dies again in the middle of making pods, and of every call that changes something
//! ([`crate::torn`]).

use std::fs;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pinion_cri_proto::v1::{ContainerState, PodSandboxState};

use crate::assets::Assets;
use crate::cri::{Container, Cri, Pod};
use crate::error::{Error, Result, ensure};
use crate::image::catalogue;
use crate::leaks::{self, Snapshot};
use crate::server::Kind;
use crate::site::Site;

const PODS: usize = 20;
/// Every fourth pod's container ends while the server is dead.
const ENDING: usize = 4;
const EXIT_CODE: i32 = 7;
const CLEANUP: Duration = Duration::from_secs(20);

struct Running {
    pod: Pod,
    container: Container,
    pod_id: String,
    id: String,
    started_at: i64,
    ends: bool,
}

/// Runs the suite against a server.
pub(crate) fn run(assets: &Assets, kind: Kind, budget: Duration, every: bool) -> Result<()> {
    let mut site = Site::open(assets, kind)?;
    let cri = site.connect()?;
    site.warm_up(&cri)?;
    let before = Snapshot::take();

    let gate = site.scratch.path("gate");
    fs::create_dir_all(&gate).map_err(|source| Error::Io { what: "make a gate".into(), source })?;
    let pods: Vec<Running> =
        (0..PODS).map(|number| launch(&site, &cri, number)).collect::<Result<_>>()?;
    println!("{PODS} pods run");
    let survivors = workload_processes(&pods)?;

    drop(cri);
    site.server.kill()?;
    let died = SystemTime::now();
    println!("server killed");
    fs::write(gate.join("open"), "")
        .map_err(|source| Error::Io { what: "open the gate".into(), source })?;
    std::thread::sleep(Duration::from_secs(2));
    ensure(workload_processes(&pods)? == survivors, || "a container died with the server".into())?;

    let took = site.server.restart()?;
    println!("server answers again after {:.0} ms", took.as_secs_f64() * 1e3);
    ensure(took <= budget, || format!("restart took {took:?}, the budget is {budget:?}"))?;

    let cri = site.connect()?;
    check_pods(&cri, &pods)?;
    check_containers(&site, &cri, &pods, died)?;
    ensure(workload_processes(&pods)? == survivors, || "the restart disturbed a container".into())?;
    cri.remove_all()?;
    leaks::nothing_since(&before, CLEANUP)?;
    println!("all pods kept, all exits and logs kept, nothing left behind");

    die_while_making_pods(&mut site)?;
    leaks::nothing_since(&before, CLEANUP)?;
    println!("killed while making pods: nothing left behind");
    if kind == Kind::Piniond {
        crate::torn::run(&mut site, every)?;
    }
    Ok(())
}

fn launch(site: &Site, cri: &Cri, number: usize) -> Result<Running> {
    let pod = site.pod(&format!("crash-{number}"))?;
    let ends = number.is_multiple_of(ENDING);
    let script = format!(
        "echo before; while [ ! -e /gate/open ]; do sleep 0.1; done; echo after; exit {EXIT_CODE}"
    );
    let mut container = if ends {
        Container::new("main", catalogue::WORKLOAD, &["sh", "-c", &script])
    } else {
        let marker = format!("crash-{number}");
        Container::new("main", catalogue::WORKLOAD, &["pinion-workload", "wait", &marker])
    };
    container.mounts.push((site.scratch.path("gate"), "/gate".into()));
    let pod_id = cri.run_pod(&pod)?;
    let id = cri.launch(&pod_id, &pod, &container)?;
    let started_at = cri.status(&id)?.started_at;
    Ok(Running { pod, container, pod_id, id, started_at, ends })
}

/// The processes of the containers that keep running.
fn workload_processes(pods: &[Running]) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for running in pods.iter().filter(|running| !running.ends) {
        let wanted = format!("pinion-workload wait {}", running.pod.name);
        let pid = leaks::process_with(&wanted)
            .ok_or_else(|| Error::check(format!("no process runs `{wanted}`")))?;
        found.push(pid);
    }
    Ok(found)
}

fn check_pods(cri: &Cri, pods: &[Running]) -> Result<()> {
    let listed = cri.pods()?;
    ensure(listed.len() == pods.len(), || format!("{} pods are listed", listed.len()))?;
    for running in pods {
        let found = listed.iter().find(|pod| pod.id == running.pod_id);
        ensure(found.is_some_and(|pod| pod.state() == PodSandboxState::SandboxReady), || {
            format!("pod {} is {found:?}", running.pod.name)
        })?;
    }
    Ok(())
}

fn check_containers(site: &Site, cri: &Cri, pods: &[Running], died: SystemTime) -> Result<()> {
    for running in pods {
        let name = &running.pod.name;
        let status = if running.ends {
            cri.wait_exited(&running.id, Duration::from_secs(10))?
        } else {
            cri.status(&running.id)?
        };
        ensure(status.started_at == running.started_at, || {
            format!("{name}: started_at changed from {}", running.started_at)
        })?;
        if !running.ends {
            ensure(status.state() == ContainerState::ContainerRunning, || {
                format!("{name} is {:?}", status.state())
            })?;
            let said = cri.exec(&running.id, &["echo", "alive"])?;
            ensure(said.code == 0 && said.stdout == "alive\n", || format!("{name}: {said:?}"))?;
            continue;
        }
        ensure(status.exit_code == EXIT_CODE, || {
            format!("{name} ended with {}, not {EXIT_CODE}", status.exit_code)
        })?;
        let died = died.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let finished = u128::from(status.finished_at.unsigned_abs());
        ensure(finished > died && finished < died + 2_000_000_000, || {
            format!("{name} finished at {finished}, the server died at {died}")
        })?;
        let log = site.log(&running.pod, &running.container);
        ensure(log == "before\nafter\n", || format!("{name} logged {log:?}"))?;
    }
    Ok(())
}

/// Kills the server at several moments of RunPodSandbox and CreateContainer. What is listed
/// afterwards can be removed; what is not listed is gone.
fn die_while_making_pods(site: &mut Site) -> Result<()> {
    for (round, delay) in [1_u64, 5, 10, 20, 40, 80, 160].into_iter().enumerate() {
        let socket = site.server.socket.clone();
        let pod = site.pod(&format!("torn-{round}"))?;
        let maker = std::thread::spawn(move || -> Result<()> {
            let cri = Cri::connect(&socket)?;
            let id = cri.run_pod(&pod)?;
            let container = Container::new("main", catalogue::WORKLOAD, &["sleep", "600"]);
            cri.launch(&id, &pod, &container)?;
            Ok(())
        });
        std::thread::sleep(Duration::from_millis(delay));
        site.server.kill()?;
        // the call fails or has succeeded: both are fine, a panic is not
        if maker.join().is_err() {
            return Err(Error::check("the client panicked"));
        }
        let started = Instant::now();
        site.server.restart()?;
        let cri = site.connect()?;
        cri.remove_all()?;
        let left = cri.containers()?;
        ensure(left.is_empty(), || format!("{left:?} are left after {delay} ms"))?;
        println!("killed after {delay} ms: tidy again in {:?}", started.elapsed());
    }
    Ok(())
}
