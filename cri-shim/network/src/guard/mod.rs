//! The non-interference guard: attaching a pod changes what is the pod's, and nothing else.
//!
//! ```text
//!  begin ─ snapshot ─▶ chain runs ─▶ snapshot ─ end(claims)
//!                                        │ minus what this run and known pods claim
//!                                        ▼
//!                        nothing ◀── what is left ──▶ others run meanwhile?
//!                                                       no: reported
//!                                                       yes: held until they have claimed theirs
//! ```
//!
//! A run claims the links of its result with their addresses and routes, routes to the pod's
//! addresses, and the tables its plugins are known to make. A change that no run overlapping
//! with it claims is foreign: a plugin that meddles, or somebody else at the node; the report
//! says what, and during whose attachment. Nothing is undone.

pub(crate) mod snapshot;

use serde::{Deserialize, Serialize};
use snapshot::{Change, Object, Snapshot};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Links of detached pods are known for so long: the kernel deletes them when it likes.
const MEMORY: Duration = Duration::from_secs(60);
/// Reports that nobody fetches are not kept without end.
const MAX_REPORTS: usize = 1000;

/// Changes to the node's network that nobody answers for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignChanges {
    /// Sandbox ids of the pods that were being attached or detached meanwhile.
    pub pods: Vec<String>,
    /// The changes, as `ip` and `nft` would put them.
    pub changes: Vec<String>,
}

/// Which runs are watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Watch {
    /// None.
    Off,
    /// Those of executed plugins, the foreign code; what is built in costs less than the look.
    Plugins,
    /// All.
    All,
}

/// What belongs to a run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Claims {
    /// Names of links.
    pub(crate) links: BTreeSet<String>,
    /// The pod's addresses.
    pub(crate) ips: Vec<IpAddr>,
    /// Names of nf_tables tables.
    pub(crate) tables: BTreeSet<String>,
    /// The pod is gone after it: its links need not be known for ever.
    pub(crate) last: bool,
}

impl Claims {
    fn cover(&self, change: &Change) -> bool {
        let own_link = !change.link.is_empty() && self.links.contains(&change.link);
        own_link
            || match &change.object {
                Object::Route { to: (prefix, ip), .. } => {
                    let host = *prefix == if ip.is_ipv4() { 32 } else { 128 };
                    host && self.ips.contains(ip)
                }
                Object::Table { name, .. } => self.tables.contains(name),
                Object::Link { .. } | Object::Address { .. } | Object::Rule { .. } => false,
            }
    }
}

/// Tables the plugins of these types make.
pub(crate) fn tables_of<'a>(plugins: impl Iterator<Item = &'a str>) -> BTreeSet<String> {
    let of = |plugin| match plugin {
        "bridge" | "ptp" => &["nat", "cni_plugins_masquerade"][..],
        "portmap" => &["nat", "cni_hostport"],
        "firewall" => &["filter"],
        _ => &[],
    };
    plugins.flat_map(of).map(|name| (*name).to_owned()).collect()
}

/// A run that has begun.
#[derive(Debug)]
pub(crate) struct Run {
    id: u64,
    before: Snapshot,
}

#[derive(Debug)]
struct Held {
    pods: BTreeSet<String>,
    changes: BTreeSet<Change>,
    /// Runs that may still claim them.
    waiting: BTreeSet<u64>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// Runs under way, with their pods.
    open: BTreeMap<u64, String>,
    held: Vec<Held>,
    /// Links of pods, and since when a link's pod is gone.
    known: BTreeMap<String, Option<Instant>>,
    reports: Vec<ForeignChanges>,
}

/// Watches over runs.
#[derive(Debug)]
pub(crate) struct Guard {
    /// The switch of the configuration.
    watch: Watch,
    state: Mutex<State>,
}

impl Guard {
    pub(crate) fn new(watch: Watch) -> Self {
        Self { watch, state: Mutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes links of a pod whose run is not watched: others' runs see them.
    pub(crate) fn know_of(&self, claims: &Claims) {
        if self.watch == Watch::Off {
            return;
        }
        let gone = claims.last.then(Instant::now);
        self.state().known.extend(claims.links.iter().map(|link| (link.clone(), gone)));
    }

    /// Notes links of pods that were attached before this process began.
    pub(crate) fn know(&self, links: impl IntoIterator<Item = String>) {
        self.state().known.extend(links.into_iter().map(|link| (link, None)));
    }

    /// Whether chains that are built in, or not, are watched.
    pub(crate) fn watches(&self, built_in: bool) -> bool {
        match self.watch {
            Watch::Off => false,
            Watch::Plugins => !built_in,
            Watch::All => true,
        }
    }

    /// Begins a run for a pod; `None` when nothing can be seen. Blocks.
    pub(crate) fn begin(&self, pod: &str) -> Option<Run> {
        // Open before the look: what overlaps is then known to overlap.
        let id = {
            let mut state = self.state();
            state.next += 1;
            let id = state.next;
            state.open.insert(id, pod.to_owned());
            id
        };
        match Snapshot::take() {
            Ok(before) => Some(Run { id, before }),
            Err(_) => {
                self.state().close(id, &Claims::default(), BTreeSet::new());
                None
            }
        }
    }

    /// Ends a run. Blocks.
    pub(crate) fn end(&self, run: &Run, claims: &Claims) {
        let changes = match Snapshot::take() {
            Ok(after) => run.before.changes(&after),
            Err(_) => Vec::new(),
        };
        let foreign = changes.into_iter().filter(|change| !claims.cover(change)).collect();
        self.state().close(run.id, claims, foreign);
    }

    /// The reports since the last call.
    pub(crate) fn reports(&self) -> Vec<ForeignChanges> {
        std::mem::take(&mut self.state().reports)
    }
}

impl State {
    fn close(&mut self, id: u64, claims: &Claims, mut foreign: BTreeSet<Change>) {
        let now = Instant::now();
        let pod = self.open.remove(&id).unwrap_or_default();
        self.known.retain(|_, gone| gone.is_none_or(|since| now - since < MEMORY));
        for link in &claims.links {
            self.known.insert(link.clone(), claims.last.then_some(now));
        }
        foreign.retain(|change| !self.known.contains_key(&change.link));
        for held in &mut self.held {
            held.changes.retain(|change| !claims.cover(change));
            held.waiting.remove(&id);
            // Seen by both: one report names both pods.
            let both = foreign.iter().filter(|change| held.changes.contains(*change)).count();
            if both > 0 {
                held.pods.insert(pod.clone());
                held.waiting.extend(self.open.keys());
                foreign.retain(|change| !held.changes.contains(change));
            }
        }
        if !foreign.is_empty() {
            let waiting = self.open.keys().copied().collect();
            self.held.push(Held { pods: [pod].into(), changes: foreign, waiting });
        }
        let known = &self.known;
        for held in &mut self.held {
            held.changes.retain(|change| !known.contains_key(&change.link));
        }
        for held in self.held.extract_if(.., |held| held.waiting.is_empty()) {
            if !held.changes.is_empty() && self.reports.len() < MAX_REPORTS {
                self.reports.push(ForeignChanges {
                    pods: held.pods.into_iter().collect(),
                    changes: held.changes.iter().map(ToString::to_string).collect(),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str) -> Change {
        let object = Object::Link {
            index: 7,
            name: name.to_owned(),
            kind: "veth".to_owned(),
            mtu: 1500,
            master: 0,
            flags: 1,
        };
        Change { added: true, object, link: name.to_owned() }
    }

    fn claims(links: &[&str]) -> Claims {
        Claims { links: links.iter().map(|l| (*l).to_owned()).collect(), ..Default::default() }
    }

    fn open(state: &mut State, pod: &str) -> u64 {
        state.next += 1;
        state.open.insert(state.next, pod.to_owned());
        state.next
    }

    #[test]
    fn what_a_run_beside_it_claims_is_not_reported() {
        let mut state = State::default();
        let (a, b) = (open(&mut state, "a"), open(&mut state, "b"));
        state.close(a, &claims(&["veth-a"]), [link("veth-b")].into());
        assert!(state.reports.is_empty(), "b may claim it yet");
        state.close(b, &claims(&["veth-b"]), BTreeSet::new());
        assert!(state.reports.is_empty() && state.held.is_empty());
    }

    #[test]
    fn what_nobody_claims_is_reported_once_with_all_who_were_there() {
        let mut state = State::default();
        let (a, b) = (open(&mut state, "a"), open(&mut state, "b"));
        state.close(a, &claims(&["veth-a"]), [link("evil")].into());
        state.close(b, &claims(&["veth-b"]), [link("evil"), link("veth-a")].into());
        let expected = ForeignChanges {
            pods: vec!["a".to_owned(), "b".to_owned()],
            changes: vec!["added: link evil veth mtu 1500 up".to_owned()],
        };
        assert_eq!(state.reports, [expected]);
        assert!(state.held.is_empty());
    }

    #[test]
    fn a_lone_run_is_answered_at_once_and_links_of_earlier_pods_are_known() {
        let mut state = State::default();
        let a = open(&mut state, "a");
        state.close(a, &claims(&["veth-a", "br0"]), BTreeSet::new());
        let b = open(&mut state, "b");
        state.close(b, &claims(&[]), [link("veth-a"), link("evil")].into());
        assert_eq!(state.reports.len(), 1);
        assert_eq!(state.reports[0].changes.len(), 1);
    }

    #[test]
    fn routes_to_the_pod_and_tables_of_its_plugins_are_its_own() {
        let mut own = claims(&[]);
        own.ips.push("10.1.0.5".parse().unwrap());
        own.tables = tables_of(["bridge", "unknown"].into_iter());
        let route = |prefix, ip: &str| Change {
            added: true,
            link: "cali1".to_owned(),
            object: Object::Route {
                table: 254,
                to: (prefix, ip.parse().unwrap()),
                gateway: None,
                link: 4,
                priority: 0,
                kind: 1,
            },
        };
        assert!(own.cover(&route(32, "10.1.0.5")));
        assert!(!own.cover(&route(24, "10.1.0.5")));
        assert!(!own.cover(&route(32, "10.1.0.6")));
        let table = |name: &str| Change {
            added: true,
            link: String::new(),
            object: Object::Table { family: 2, name: name.to_owned() },
        };
        assert!(own.cover(&table("nat")));
        assert!(!own.cover(&table("evil")));
    }
}
