//! Pods come and go: many at once, then many in sequence. Nothing leaks, and lists are
//! answered while it happens.
//!
//! What the server holds is counted in the kernel and on disk, not asked of it: processes,
//! mounts, groups, namespaces and links of the machine, descriptors and resident memory of
//! the server's process, files below its directories, bytes of its store. It is counted after
//! a first round, so that what is made once and kept does not look like a leak.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pinion_cri_proto::v1::{ContainerState, PodSandboxState};

use crate::assets::Assets;
use crate::cri::{Container, Cri};
use crate::error::{Error, Result, ensure};
use crate::image::catalogue;
use crate::leaks::{self, Snapshot};
use crate::server::Kind;
use crate::site::Site;

/// Pods that are being made or removed at any time, as kubelet does it.
const IN_FLIGHT: usize = 10;
/// Between two rounds of lists.
const LIST_PAUSE: Duration = Duration::from_millis(20);
/// Pods before anything is counted.
const FIRST: usize = 20;
/// How long what was removed may take to be gone.
const CLEANUP: Duration = Duration::from_secs(20);
/// Resident memory may grow by this much from the first count to the last; a leak of 2 KiB a
/// pod shows in 2,000 pods.
const GROWTH: u64 = 4 << 20;
/// A store of no pods is no larger than this after any number of them.
const STORE: u64 = 4 << 20;

/// How much, and what is asked of it.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Pods at the same time.
    #[arg(long, default_value_t = 110)]
    at_once: usize,
    /// Pods one after another.
    #[arg(long, default_value_t = 2000)]
    in_sequence: usize,
    /// Milliseconds that 99 of 100 lists may take at most while pods come and go.
    #[arg(long, default_value_t = 10)]
    list_ms: u64,
}

impl Options {
    /// The harness's arguments for these.
    pub(crate) fn words(&self) -> [String; 6] {
        let (at_once, sequence, list) = (self.at_once, self.in_sequence, self.list_ms);
        [
            "--at-once".to_owned(),
            at_once.to_string(),
            "--in-sequence".to_owned(),
            sequence.to_string(),
            "--list-ms".to_owned(),
            list.to_string(),
        ]
    }
}

/// Runs the suite.
pub(crate) fn run(assets: &Assets, kind: Kind, options: &Options) -> Result<()> {
    let site = Site::open(assets, kind)?;
    let cri = site.connect()?;
    site.warm_up(&cri)?;
    at_once(&site, FIRST)?;
    let machine = Snapshot::take();
    let before = Held::count(&site)?;
    println!("before: {before}");

    let (made, ended, lists) = at_once(&site, options.at_once)?;
    println!(
        "{} pods at once: all running after {:.1} s, all removed after {:.1} s",
        options.at_once,
        made.as_secs_f64(),
        ended.as_secs_f64()
    );
    lists.check("lists meanwhile", options)?;
    leaks::nothing_since(&machine, CLEANUP)?;
    let after = settled(&site, &before)?;
    println!("after them: {after}");
    ensure_nothing_more(&before, &after)?;

    let (took, lists) = in_sequence(&site, options.in_sequence)?;
    println!(
        "{} pods in sequence: {:.1} s, {:.1} ms each from its sandbox to its removal",
        options.in_sequence,
        took.as_secs_f64(),
        took.as_secs_f64() * 1e3 / options.in_sequence.max(1) as f64
    );
    lists.check("lists meanwhile", options)?;
    leaks::nothing_since(&machine, CLEANUP)?;
    let after = settled(&site, &before)?;
    println!("after them: {after}");
    ensure_nothing_more(&before, &after)
}

/// What a server holds at a moment when it has no pods.
#[derive(Debug, Clone, Default)]
struct Held {
    descriptors: BTreeMap<String, usize>,
    /// Files and directories, by the directory of the server they are below.
    files: BTreeMap<&'static str, usize>,
    resident: u64,
    store: u64,
}

/// Directories below which a server without pods has nothing of any pod.
const PLACES: [&str; 6] = [
    "run/pods",
    "run/runtime",
    "root/snapshots/containers",
    "root/snapshots/trash",
    "cni/cache",
    "cni/leases",
];

impl Held {
    fn count(site: &Site) -> Result<Self> {
        let pid = site.server.pid();
        let mut held = Self::default();
        for entry in read_dir(Path::new(&format!("/proc/{pid}/fd")))? {
            // `socket:[123]`, `/a/path`: the kind, or the path
            let Ok(target) = fs::read_link(&entry) else { continue };
            let target = target.to_string_lossy().into_owned();
            let kind = target.split(":[").next().unwrap_or(&target).to_owned();
            *held.descriptors.entry(kind).or_default() += 1;
        }
        for place in PLACES {
            held.files.insert(place, entries_below(&site.scratch.path(place)));
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        held.resident = kib.ok_or_else(|| Error::check(format!("no VmRSS of {pid}")))? << 10;
        let store = site.scratch.path("root/store.redb");
        held.store = fs::metadata(store).map_or(0, |file| file.len());
        Ok(held)
    }
}

impl std::fmt::Display for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} descriptors, {} files of pods, {:.1} MiB resident, {} KiB of store",
            self.descriptors.values().sum::<usize>(),
            self.files.values().sum::<usize>(),
            self.resident as f64 / f64::from(1 << 20),
            self.store >> 10
        )
    }
}

/// What is held once what ends by itself has ended: connections, idle threads, the trash.
fn settled(site: &Site, before: &Held) -> Result<Held> {
    let deadline = Instant::now() + CLEANUP;
    loop {
        let held = Held::count(site)?;
        if more(before, &held).is_empty() || Instant::now() > deadline {
            return Ok(held);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// What there is more of than before.
fn more(before: &Held, after: &Held) -> Vec<String> {
    let mut found = Vec::new();
    for (kind, count) in &after.descriptors {
        let had = before.descriptors.get(kind).copied().unwrap_or_default();
        if *count > had {
            found.push(format!("{count} descriptors of {kind}, not {had}"));
        }
    }
    for (place, count) in &after.files {
        let had = before.files.get(place).copied().unwrap_or_default();
        if *count > had {
            found.push(format!("{count} entries below {place}, not {had}"));
        }
    }
    found
}

fn ensure_nothing_more(before: &Held, after: &Held) -> Result<()> {
    let mut found = more(before, after);
    if after.resident > before.resident + GROWTH {
        found.push(format!("{} KiB resident, not {}", after.resident >> 10, before.resident >> 10));
    }
    if after.store > before.store.max(STORE) {
        found.push(format!("a store of {} KiB", after.store >> 10));
    }
    ensure(found.is_empty(), || format!("more than before:\n  {}", found.join("\n  ")))
}

fn read_dir(dir: &Path) -> Result<Vec<std::path::PathBuf>> {
    let listing = fs::read_dir(dir)
        .map_err(|source| Error::Io { what: format!("list {}", dir.display()), source })?;
    Ok(listing.flatten().map(|entry| entry.path()).collect())
}

/// Entries of a tree. One that is not there has none.
fn entries_below(dir: &Path) -> usize {
    let Ok(entries) = read_dir(dir) else { return 0 };
    let below = |path: &Path| {
        let is_dir = fs::symlink_metadata(path).is_ok_and(|found| found.is_dir());
        if is_dir { entries_below(path) } else { 0 }
    };
    entries.iter().map(|path| 1 + below(path)).sum()
}

/// Times of lists, in order of their length once they are all there.
struct Lists {
    times: Vec<Duration>,
}

impl Lists {
    fn check(mut self, what: &str, options: &Options) -> Result<()> {
        self.times.sort_unstable();
        let at = |share: f64| {
            let index = (self.times.len() as f64 * share) as usize;
            let time = self.times.get(index.min(self.times.len().saturating_sub(1)));
            time.map_or(0.0, |time| time.as_secs_f64() * 1e3)
        };
        println!(
            "{what}: {} calls, median {:.2} ms, p99 {:.2} ms, longest {:.2} ms",
            self.times.len(),
            at(0.5),
            at(0.99),
            at(1.0)
        );
        ensure(!self.times.is_empty(), || "no list was made".into())?;
        let limit = options.list_ms as f64;
        ensure(at(0.99) < limit, || format!("p99 is {:.2} ms, not below {limit} ms", at(0.99)))
    }
}

/// Makes lists until `done`, as kubelet's relist does.
fn list_until(site: &Site, done: &AtomicBool) -> Result<Lists> {
    let cri = site.connect()?;
    let mut times = Vec::new();
    while !done.load(Ordering::Relaxed) {
        let began = Instant::now();
        cri.pods()?;
        times.push(began.elapsed());
        let began = Instant::now();
        cri.containers()?;
        times.push(began.elapsed());
        std::thread::sleep(LIST_PAUSE);
    }
    Ok(Lists { times })
}

/// Runs `work` while another thread makes lists.
fn with_lists<T>(site: &Site, work: impl FnOnce() -> Result<T>) -> Result<(T, Lists)> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let lists = scope.spawn(|| list_until(site, &done));
        let outcome = work();
        done.store(true, Ordering::Relaxed);
        let lists = lists.join().map_err(|_panic| Error::check("the lister panicked"))?;
        Ok((outcome?, lists?))
    })
}

/// Makes pods until there are so many, looks at them all, removes them.
fn at_once(site: &Site, pods: usize) -> Result<(Duration, Duration, Lists)> {
    let ((made, ended), lists) = with_lists(site, || {
        let began = Instant::now();
        let ids = in_parallel(site, pods, |cri, number| {
            let pod = site.pod(&format!("many-{number}"))?;
            let id = cri.run_pod(&pod)?;
            cri.launch(&id, &pod, &waiting())?;
            Ok(id)
        })?;
        let made = began.elapsed();
        look_at_all(&site.connect()?, pods)?;
        let began = Instant::now();
        in_parallel(site, pods, |cri, number| cri.remove_pod(&ids[number]))?;
        Ok((made, began.elapsed()))
    })?;
    Ok((made, ended, lists))
}

fn waiting() -> Container {
    Container::new("main", catalogue::WORKLOAD, &["sleep", "3600"])
}

fn look_at_all(cri: &Cri, pods: usize) -> Result<()> {
    let ready =
        |pod: &&pinion_cri_proto::v1::PodSandbox| pod.state() == PodSandboxState::SandboxReady;
    let found = cri.pods()?.iter().filter(ready).count();
    ensure(found == pods, || format!("{found} of {pods} pods are ready"))?;
    let running = |container: &&pinion_cri_proto::v1::Container| {
        container.state() == ContainerState::ContainerRunning
    };
    let found = cri.containers()?.iter().filter(running).count();
    ensure(found == pods, || format!("{found} of {pods} containers run"))
}

/// Makes and removes pods one after another; every tenth is looked into, and every other one
/// ends by itself.
fn in_sequence(site: &Site, pods: usize) -> Result<(Duration, Lists)> {
    with_lists(site, || {
        let cri = site.connect()?;
        let began = Instant::now();
        for number in 0..pods {
            let pod = site.pod(&format!("one-{number}"))?;
            let id = cri.run_pod(&pod)?;
            if number.is_multiple_of(2) {
                let container = Container::new("main", catalogue::WORKLOAD, &["true"]);
                let container = cri.launch(&id, &pod, &container)?;
                let status = cri.wait_exited(&container, Duration::from_secs(10))?;
                ensure(status.exit_code == 0, || format!("true ended with {}", status.exit_code))?;
            } else {
                let container = cri.launch(&id, &pod, &waiting())?;
                if number % 10 == 1 {
                    let said = cri.exec(&container, &["echo", "alive"])?;
                    ensure(said.stdout == "alive\n", || format!("pod {number}: {said:?}"))?;
                }
            }
            cri.remove_pod(&id)?;
            let _ = fs::remove_dir_all(&pod.log_dir);
        }
        Ok(began.elapsed())
    })
}

/// Does `work` for every number below `count`, each worker on a connection of its own; the
/// results in order of the numbers.
fn in_parallel<T: Send>(
    site: &Site,
    count: usize,
    work: impl Fn(&Cri, usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let worker = || -> Result<Vec<(usize, T)>> {
        let cri = site.connect()?;
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(done);
            }
            done.push((number, work(&cri, number)?));
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..IN_FLIGHT.min(count)).map(|_| scope.spawn(worker)).collect();
        let mut results = Vec::new();
        for worker in workers {
            let done = worker.join().map_err(|_panic| Error::check("a client panicked"))?;
            results.extend(done?);
        }
        results.sort_by_key(|(number, _)| *number);
        Ok(results.into_iter().map(|(_, result)| result).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_descriptor_more_is_found() {
        let held = |sockets| Held {
            descriptors: BTreeMap::from([("socket".to_owned(), sockets)]),
            ..Held::default()
        };
        assert!(ensure_nothing_more(&held(3), &held(3)).is_ok());
        assert!(ensure_nothing_more(&held(3), &held(2)).is_ok());
        let text = ensure_nothing_more(&held(3), &held(4)).unwrap_err().chain();
        assert!(text.contains("4 descriptors of socket, not 3"), "{text}");
    }

    #[test]
    fn a_tree_is_counted_whole() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/c"), "").unwrap();
        assert_eq!(entries_below(dir.path()), 3);
        assert_eq!(entries_below(&dir.path().join("gone")), 0);
    }
}
