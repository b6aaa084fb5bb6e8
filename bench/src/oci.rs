//! The life of a container through OCI runtimes.
//!
//! Per round, configuration and runtime: create, start, wait, delete of `/bin/true`; then a
//! sleeping container for exec and state. The peers take turns at going first. On a machine
//! that does other things too, CPU time and system calls say more than wall time.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use pinion_cgroup::{Hierarchies, Mode};

use crate::bundle::{self, Shape};
use crate::process::{peak_memory, timed};
use crate::report::{Collector, Report};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// What a tracer may need to write its last lines.
const SETTLE: Duration = Duration::from_millis(50);

/// How often memory is measured; it hardly varies.
const MEMORY_ROUNDS: usize = 3;

/// Compares runtimes given by name and program.
pub(crate) fn compare(
    runtimes: &[(String, String)],
    rounds: usize,
    busybox: &Path,
) -> Outcome<Report> {
    hide_v2_beside_v1()?;
    // The containers' processes become our children once their runtime has exited.
    nix::sys::prctl::set_child_subreaper(true)?;
    let bench = Bench::new(busybox)?;
    let names = runtimes.iter().map(|(name, _)| name.clone()).collect();
    let title = format!("OCI runtimes, {rounds} rounds, interleaved");
    let mut collector = Collector::new(title, names);
    let outcome = bench.rounds(runtimes, rounds, &mut collector);
    bench.remove();
    outcome.map(|()| collector.report())
}

/// crun refuses hosts that have both versions: everybody then runs without the v2 mount, in
/// a mount namespace of our own.
fn hide_v2_beside_v1() -> Outcome<()> {
    let hierarchies = Hierarchies::detect()?;
    if let (Mode::Hybrid, Some(root)) = (hierarchies.mode(), hierarchies.v2_root()) {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
        umount2(root, MntFlags::MNT_DETACH)?;
    }
    Ok(())
}

struct Bench {
    directory: PathBuf,
    cgroup: String,
}

impl Bench {
    fn new(busybox: &Path) -> Outcome<Self> {
        let name = format!("pinion-bench-{}", std::process::id());
        let directory = std::env::temp_dir().join(&name);
        fs::create_dir_all(&directory)?;
        let bench = Self { directory, cgroup: format!("/{name}") };
        let rootfs = bundle::rootfs(&bench.directory, busybox)?;
        for shape in Shape::ALL {
            for (program, arguments) in
                [("true", vec!["/bin/true"]), ("sleep", vec!["/bin/sleep", "1000"])]
            {
                let bundle = bench.bundle(shape, program);
                let cgroup = format!("{}/{}-{program}", bench.cgroup, shape.name());
                bundle::write(&bundle, &rootfs, shape, &arguments, &cgroup)?;
            }
        }
        Ok(bench)
    }

    fn bundle(&self, shape: Shape, program: &str) -> PathBuf {
        self.directory.join(format!("{}-{program}", shape.name()))
    }

    /// Takes away what containers leave: the common parent of their cgroups.
    fn remove(&self) {
        let _ = fs::remove_dir_all(&self.directory);
        let Ok(hierarchies) = Hierarchies::detect() else {
            return;
        };
        let mut roots: Vec<PathBuf> =
            hierarchies.v2_root().map(Path::to_owned).into_iter().collect();
        for controller in hierarchies.controllers().unwrap_or_default() {
            roots.extend(hierarchies.v1_root(&controller));
        }
        roots.extend(hierarchies.v1_root("name=systemd"));
        for root in roots {
            let _ = fs::remove_dir(root.join(self.cgroup.trim_start_matches('/')));
        }
    }

    fn rounds(
        &self,
        runtimes: &[(String, String)],
        rounds: usize,
        collector: &mut Collector,
    ) -> Outcome<()> {
        for shape in Shape::ALL {
            for round in 0..=rounds {
                for turn in 0..runtimes.len() {
                    let peer = (round + turn) % runtimes.len();
                    let (name, program) = &runtimes[peer];
                    let times = self
                        .one_life(program, shape)
                        .and_then(|life| Ok([life, self.one_guest(program, shape)?].concat()))
                        .map_err(|error| format!("{name}, {}: {error}", shape.name()))?;
                    // The first round fills caches.
                    for (measure, value) in times.into_iter().filter(|_| round > 0) {
                        collector.add(shape.name(), measure, "ms", peer, value);
                    }
                }
            }
            for _ in 0..MEMORY_ROUNDS {
                for (peer, (_, program)) in runtimes.iter().enumerate() {
                    let value = self.peak_of_create(program, shape)?;
                    collector.add(shape.name(), "create peak memory", "KiB", peer, value);
                }
            }
            for (peer, (_, program)) in runtimes.iter().enumerate() {
                for (measure, count) in self.calls(program, shape)? {
                    collector.add(shape.name(), measure, "calls", peer, count);
                }
            }
        }
        for (peer, (name, program)) in runtimes.iter().enumerate() {
            let path = on_path(program).ok_or_else(|| format!("{name}: no {program}"))?;
            let size = fs::metadata(&path)?.len() as f64 / 1024.0;
            collector.add("program", "size", "KiB", peer, size);
        }
        Ok(())
    }

    /// System calls of a verb, the container's process until its program included.
    fn calls(&self, program: &str, shape: Shape) -> Outcome<Vec<(&'static str, f64)>> {
        let bundle = self.bundle(shape, "sleep");
        let pid_file = self.directory.join("pid");
        let create =
            ["create", "--bundle", text(&bundle)?, "--pid-file", text(&pid_file)?, "bench"];
        let mut counts = vec![("create calls", self.traced(program, &create)?)];
        let pid: i32 = fs::read_to_string(&pid_file)?.trim().parse()?;
        counts.push(("start calls", self.traced(program, &["start", "bench"])?));
        counts.push(("exec calls", self.traced(program, &["exec", "bench", "/bin/true"])?));
        counts.push(("state calls", self.traced(program, &["state", "bench"])?));
        self.run(program, &["kill", "bench", "KILL"])?;
        waitpid(Pid::from_raw(pid), None)?;
        counts.push(("delete calls", self.traced(program, &["delete", "bench"])?));
        Ok(counts)
    }

    /// The tracer is nobody's parent (`-D`): a container that was made keeps it alive.
    fn traced(&self, program: &str, arguments: &[&str]) -> Outcome<f64> {
        // A file for each verb: the tracer of `create` goes on writing for the container.
        let trace = self.directory.join(format!("trace-{}", arguments[0]));
        let command = self.command(program, arguments);
        let mut traced = Command::new("strace");
        traced.args(["-D", "-f", "-qq", "-o"]).arg(&trace);
        traced.arg(command.get_program()).args(command.get_args());
        timed(&mut traced, &self.directory.join("log"))?;
        std::thread::sleep(SETTLE);
        let lines = fs::read_to_string(&trace)?;
        let whole = |line: &&str| {
            !(line.contains("resumed>") || line.contains("+++") || line.contains("---"))
        };
        Ok(lines.lines().filter(whole).count() as f64)
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.arg("--root").arg(self.directory.join("state")).args(arguments);
        command
    }

    /// One command of a runtime, in milliseconds.
    fn run(&self, program: &str, arguments: &[&str]) -> Outcome<f64> {
        timed(&mut self.command(program, arguments), &self.directory.join("log"))
    }

    fn create(&self, program: &str, shape: Shape, what: &str) -> Outcome<(f64, Pid)> {
        let bundle = self.bundle(shape, what);
        let pid_file = self.directory.join("pid");
        let arguments =
            ["create", "--bundle", text(&bundle)?, "--pid-file", text(&pid_file)?, "bench"];
        let elapsed = self.run(program, &arguments)?;
        let pid = fs::read_to_string(&pid_file)?.trim().parse()?;
        Ok((elapsed, Pid::from_raw(pid)))
    }

    /// create, start, wait and delete of a program that ends at once.
    fn one_life(&self, program: &str, shape: Shape) -> Outcome<Vec<(&'static str, f64)>> {
        let spent = processor_time()?;
        let began = Instant::now();
        let (create, pid) = self.create(program, shape, "true")?;
        let outcome = (|| {
            let start = self.run(program, &["start", "bench"])?;
            waitpid(pid, None)?;
            let delete = self.run(program, &["delete", "bench"])?;
            let life = began.elapsed().as_secs_f64() * 1000.0;
            let spent = processor_time()? - spent;
            Ok(vec![
                ("life", life),
                ("create", create),
                ("start", start),
                ("delete", delete),
                ("life CPU time", spent),
            ])
        })();
        if outcome.is_err() {
            let _ = self.run(program, &["delete", "--force", "bench"]);
        }
        outcome
    }

    /// exec and state beside a container that sleeps.
    fn one_guest(&self, program: &str, shape: Shape) -> Outcome<Vec<(&'static str, f64)>> {
        let (_, pid) = self.create(program, shape, "sleep")?;
        let outcome = (|| {
            self.run(program, &["start", "bench"])?;
            let exec = self.run(program, &["exec", "bench", "/bin/true"])?;
            let state = self.run(program, &["state", "bench"])?;
            Ok(vec![("exec", exec), ("state", state)])
        })();
        let kill = self.run(program, &["kill", "bench", "KILL"]);
        if kill.is_ok() {
            waitpid(pid, None)?;
        }
        self.run(program, &["delete", "--force", "bench"])?;
        outcome
    }

    fn peak_of_create(&self, program: &str, shape: Shape) -> Outcome<f64> {
        let bundle = self.bundle(shape, "true");
        let pid_file = self.directory.join("pid");
        let create = self.command(
            program,
            &["create", "--bundle", text(&bundle)?, "--pid-file", text(&pid_file)?, "bench"],
        );
        let peak = peak_memory(&create);
        let pid: i32 = fs::read_to_string(&pid_file)?.trim().parse()?;
        self.run(program, &["delete", "--force", "bench"])?;
        waitpid(Pid::from_raw(pid), None)?;
        peak
    }
}

/// Milliseconds of CPU that all children waited for so far have used.
fn processor_time() -> Outcome<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let milliseconds = |time: nix::sys::time::TimeVal| {
        time.tv_sec() as f64 * 1000.0 + time.tv_usec() as f64 / 1000.0
    };
    Ok(milliseconds(usage.user_time()) + milliseconds(usage.system_time()))
}

/// Where the shell would find `program`.
fn on_path(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(program.into());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(program)).find(|path| path.exists())
}

fn text(path: &Path) -> Outcome<&str> {
    path.to_str().ok_or_else(|| format!("{} is not UTF-8", path.display()).into())
}
