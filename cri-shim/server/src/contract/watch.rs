//! Keeps exclusive CPUs exclusive: sees when a partition is lost, and asks for it again.
//!
//! ```text
//!  inotify on the partition's files ─┐
//!  a pod's state changed ────────────┼─▶ quick look ──lost──▶ Heal to the pod's actor
//!  every few seconds ────────────────┘        │                  │ waits for a resize in
//!                                             └ in force: done   │ progress, looks again
//!                                                                ▼
//!                                             [`heal::take_back`]: as few writes as it takes
//!                                                                │ not in force
//!                                                                ▼
//!                                             `pinion update {}`: plan, apply, read back
//! ```
//!
//! Invariants: a repair has its undo in a journal before its first write; a repair and a resize of the same container never run at once; a loss is
//! counted, logged and told in receipt and metrics whether it could be repaired or not; a
//! fight with somebody who keeps breaking it is fought at a bounded rate.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pinion_placement::{Host, Refusal, lost, watched};
use rustix::fs::inotify;
use tokio::sync::mpsc;

use super::heal;
use super::view::{host, sketch};
use crate::error::{Context, Result};
use crate::node::Node;
use crate::pod::{self, Command};
use crate::record::{Container, Phase};
use crate::services::blocking;

/// What no event tells is seen by then.
const AUDIT: Duration = Duration::from_secs(5);
/// Failures in a row after which only every [`SELDOM`]th audit tries again; events always do.
const PATIENCE: u32 = 3;
const SELDOM: u32 = 12;
/// Repairs of one container in a row before the next audit is waited for.
const BURST: u32 = 20;

/// What became of one container's exclusivity.
#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    /// How often it was lost.
    pub(crate) lost: u64,
    /// How often it was there again afterwards.
    pub(crate) repaired: u64,
    /// Whether it is lost now.
    pub(crate) missing: bool,
    /// Repairs in a row that did not help.
    failures: u32,
    /// The last loss, and what was done, for people.
    pub(crate) last: String,
    /// Milliseconds from seeing the last loss to its repair.
    pub(crate) millis: u64,
}

/// Histories by container; those without a loss have none.
#[derive(Debug, Default)]
pub(crate) struct Histories(Mutex<BTreeMap<String, History>>);

impl Histories {
    /// The history of a container.
    pub(crate) fn of(&self, container: &str) -> Option<History> {
        self.lock().get(container).cloned()
    }

    /// Forgets a container that is gone.
    pub(crate) fn forget(&self, container: &str) {
        self.lock().remove(container);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, History>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a container's partition is in force; why not otherwise.
pub(crate) async fn look(node: &Arc<Node>, container: &Container) -> Result<Option<Refusal>> {
    let (node, container) = (node.clone(), container.clone());
    blocking(move || Ok(lost(host()?, &sketch(&node, &container)?))).await
}

/// Asks for what a container has lost; the actor runs this while no other work is done on
/// the container.
pub(crate) async fn heal(node: &Arc<Node>, container: &Container) -> Result<()> {
    let seen = Instant::now();
    let Some(loss) = look(node, container).await? else {
        settled(node, &container.id);
        return Ok(());
    };
    let known = noticed(node, &container.id, &loss);
    let (quick, record) = (node.clone(), container.clone());
    let mut outcome = blocking(move || heal::take_back(&quick, &record)).await;
    let mut still = look(node, container).await?;
    if still.is_some() || outcome.is_err() {
        outcome = node.programs.update(&container.id, &Default::default()).await;
        still = look(node, container).await?;
    }
    let millis = u64::try_from(seen.elapsed().as_millis()).unwrap_or(u64::MAX);
    let id = &container.id;
    let mut histories = node.histories.lock();
    let history = histories.entry(id.clone()).or_default();
    history.missing = still.is_some();
    history.failures = if history.missing { history.failures.saturating_add(1) } else { 0 };
    history.millis = millis;
    match (still, outcome) {
        (None, _) => {
            history.repaired += 1;
            history.last = format!("{}; in force again after {millis} ms", loss.detail);
            tracing::warn!(container = id, %loss, millis, "exclusive CPUs were lost, and are in force again");
        }
        (Some(_), Ok(())) => history.last = format!("{}; asking again did not help", loss.detail),
        (Some(_), Err(error)) => history.last = format!("{}; {}", loss.detail, error.chain()),
    }
    // Once per loss, not with every attempt.
    if history.missing && !known {
        tracing::error!(container = id, reason = history.last, "exclusive CPUs are lost");
    }
    Ok(())
}

/// Counts a loss before anything is done about it, so that nobody reads an old history
/// meanwhile; whether it was known before.
fn noticed(node: &Node, id: &str, loss: &Refusal) -> bool {
    let mut histories = node.histories.lock();
    let history = histories.entry(id.to_owned()).or_default();
    let known = std::mem::replace(&mut history.missing, true);
    history.lost += u64::from(!known);
    history.last.clone_from(&loss.detail);
    known
}

/// What was missing is there again without our doing.
fn settled(node: &Node, id: &str) {
    let mut histories = node.histories.lock();
    if let Some(history) = histories.get_mut(id).filter(|history| history.missing) {
        history.missing = false;
        history.failures = 0;
        history.repaired += 1;
        tracing::info!(container = id, "exclusive CPUs are in force again");
    }
}

/// Watches over every exclusive container for as long as the server runs.
pub(crate) async fn run(node: Arc<Node>) {
    let opened = host().and_then(|host| Ok((host, Watches::open()?)));
    let (host, mut watches) = match opened {
        Ok(opened) => opened,
        Err(error) => return node.find(format!("partitions are not watched: {}", error.chain())),
    };
    if host.v2_with_cpuset().is_none() {
        return; // nothing here can be a partition
    }
    let mut changes = node.registry.changes();
    let mut audit = tokio::time::interval(AUDIT);
    audit.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut audits: u32 = 0;
    let mut spent: HashMap<String, u32> = HashMap::new();
    loop {
        let suspects: BTreeSet<String> = tokio::select! {
            changed = changes.changed() => match changed {
                Ok(()) => watches.follow(&node, host),
                Err(_) => return,
            },
            suspects = watches.events() => suspects,
            _ = audit.tick() => {
                audits = audits.wrapping_add(1);
                spent.clear();
                watches.follow(&node, host);
                let hopeless = |id: &&String| {
                    let history = node.histories.of(id);
                    history.is_some_and(|h| h.failures > PATIENCE && !audits.is_multiple_of(SELDOM))
                };
                watches.by_container.keys().filter(|id| !hopeless(id)).cloned().collect()
            }
        };
        for id in suspects {
            let repairs = spent.entry(id.clone()).or_default();
            if *repairs < BURST && examine(&node, host, &id).await {
                *repairs += 1;
            }
        }
    }
}

/// Looks at a container and has it healed if need be; whether there was need.
async fn examine(node: &Arc<Node>, host: &'static Host, id: &str) -> bool {
    let snapshot = node.registry.snapshot();
    let Ok((pod, container)) = snapshot.container(id) else { return false };
    if container.phase() == Phase::Exited {
        return false;
    }
    let (looked, container) = (node.clone(), container.clone());
    let found = blocking(move || Ok(lost(host, &sketch(&looked, &container)?))).await;
    let was_missing = || node.histories.of(id).is_some_and(|history| history.missing);
    match found {
        Ok(None) if !was_missing() => return false,
        Ok(_) => {}
        Err(error) => {
            tracing::warn!(container = id, error = %error.chain(), "cannot look at a partition");
            return false;
        }
    }
    let (commands, container) = (pod.commands.clone(), id.to_owned());
    let heal = pod::ask(&commands, |reply| Command::Heal { container, reply }).await;
    if let Err(error) = heal {
        tracing::debug!(container = id, error = %error.chain(), "not healed");
    }
    true
}

/// The kernel's files under watch, by container.
#[derive(Debug)]
struct Watches {
    inotify: Arc<OwnedFd>,
    /// Watch descriptors of changed files, from the thread that waits for them.
    changed: mpsc::UnboundedReceiver<i32>,
    by_container: BTreeMap<String, Vec<PathBuf>>,
    /// Watch descriptors; containers share those of the groups above them.
    descriptors: BTreeMap<PathBuf, i32>,
}

impl Watches {
    fn open() -> Result<Self> {
        let what = || "watch files with inotify".to_owned();
        let inotify = Arc::new(inotify::init(inotify::CreateFlags::CLOEXEC).context(what)?);
        let (sender, changed) = mpsc::unbounded_channel();
        let reader = inotify.clone();
        // It waits in read(2) for as long as the server lives.
        let wait = move || tell(&reader, &sender);
        std::thread::Builder::new().name("inotify".into()).spawn(wait).context(what)?;
        let (by_container, descriptors) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { inotify, changed, by_container, descriptors })
    }

    /// Watches the exclusive containers there are now and no others; those that are new.
    fn follow(&mut self, node: &Node, host: &Host) -> BTreeSet<String> {
        let snapshot = node.registry.snapshot();
        let live: BTreeMap<&String, &Arc<Container>> = snapshot
            .containers()
            .filter(|(_, c)| c.contract.exclusive && c.phase() != Phase::Exited)
            .map(|(_, c)| (&c.id, c))
            .collect();
        let before = self.by_container.len();
        self.by_container.retain(|id, _| live.contains_key(id));
        let mut changed = before != self.by_container.len();
        let mut new = BTreeSet::new();
        for (id, container) in live {
            if self.by_container.contains_key(id) {
                continue;
            }
            let Ok(subject) = sketch(node, container) else { continue };
            self.by_container.insert(id.clone(), watched(host, &subject));
            new.insert(id.clone());
            changed = true;
        }
        if changed {
            self.align();
        }
        new
    }

    /// Makes the kernel's watches those of the containers.
    fn align(&mut self) {
        let wanted: BTreeSet<&PathBuf> = self.by_container.values().flatten().collect();
        self.descriptors.retain(|path, descriptor| {
            let keep = wanted.contains(path);
            if !keep {
                // The file may be gone, and its watch with it.
                let _gone = inotify::remove_watch(&self.inotify, *descriptor);
            }
            keep
        });
        for path in wanted {
            if self.descriptors.contains_key(path) {
                continue;
            }
            match inotify::add_watch(&self.inotify, path, inotify::WatchFlags::MODIFY) {
                Ok(descriptor) => drop(self.descriptors.insert(path.clone(), descriptor)),
                Err(error) => tracing::debug!(path = %path.display(), %error, "not watched"),
            }
        }
    }

    /// Waits for a change; the containers it may concern.
    async fn events(&mut self) -> BTreeSet<String> {
        let Some(first) = self.changed.recv().await else {
            return std::future::pending().await; // the audit is left
        };
        let mut touched = BTreeSet::from([first]);
        while let Ok(more) = self.changed.try_recv() {
            touched.insert(more);
        }
        let hit = |path: &PathBuf| self.descriptors.get(path).is_some_and(|d| touched.contains(d));
        let concerned = self.by_container.iter().filter(|(_, paths)| paths.iter().any(hit));
        concerned.map(|(id, _)| id.clone()).collect()
    }
}

/// Passes on which files were modified, until nobody listens.
fn tell(inotify: &OwnedFd, changed: &mpsc::UnboundedSender<i32>) {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(inotify, &mut buffer);
    loop {
        match reader.next() {
            Ok(event) if changed.send(event.wd()).is_ok() => {}
            Ok(_) => return,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "partitions are seen by the periodic audit only");
                return;
            }
        }
    }
}
