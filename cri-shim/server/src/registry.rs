//! The published state of all pods.
//!
//! Each pod's actor publishes a new immutable view after every change it has committed; list
//! and status calls read the latest one and never wait for a pod.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::{mpsc, watch};

use crate::error::{Error, Result};
use crate::ids;
use crate::monitor::Client;
use crate::pod::Command;
use crate::record::{Container, Sandbox};

/// One pod as it was after its last committed change.
#[derive(Debug, Clone)]
pub(crate) struct PodView {
    pub(crate) sandbox: Arc<Sandbox>,
    pub(crate) containers: BTreeMap<String, Arc<Container>>,
    /// The pod's monitor, for calls that change nothing here, such as ExecSync.
    pub(crate) monitor: Option<Client>,
    /// Where the pod's actor takes commands.
    pub(crate) commands: mpsc::Sender<Command>,
}

/// All pods at one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Snapshot {
    pods: BTreeMap<String, Arc<PodView>>,
    /// Container id to pod id.
    owners: BTreeMap<String, String>,
}

impl Snapshot {
    /// Every pod, by id.
    pub(crate) fn pods(&self) -> impl Iterator<Item = &Arc<PodView>> {
        self.pods.values()
    }

    /// Every container with its pod.
    pub(crate) fn containers(&self) -> impl Iterator<Item = (&Arc<PodView>, &Arc<Container>)> {
        self.pods.values().flat_map(|pod| pod.containers.values().map(move |c| (pod, c)))
    }

    /// The pod with an id, or with the only id that begins so.
    pub(crate) fn pod(&self, id: &str) -> Result<&Arc<PodView>> {
        let id = ids::check_id(id)?;
        find(&self.pods, id, "pod sandbox").map(|(_, pod)| pod)
    }

    /// The container with an id, or with the only id that begins so.
    pub(crate) fn container(&self, id: &str) -> Result<(&Arc<PodView>, &Arc<Container>)> {
        let id = ids::check_id(id)?;
        let (id, owner) = find(&self.owners, id, "container")?;
        let gone = || Error::not_found(format!("container {id}"));
        let pod = self.pods.get(owner).ok_or_else(gone)?;
        Ok((pod, pod.containers.get(id).ok_or_else(gone)?))
    }

    fn withdraw(&mut self, pod: &str) {
        if let Some(old) = self.pods.remove(pod) {
            for container in old.containers.keys() {
                self.owners.remove(container);
            }
        }
    }
}

/// The exact key, else the only key that starts with `id`.
fn find<'a, V>(map: &'a BTreeMap<String, V>, id: &str, what: &str) -> Result<(&'a str, &'a V)> {
    if let Some((key, value)) = map.get_key_value(id) {
        return Ok((key, value));
    }
    let mut matches = map
        .range::<str, _>((Bound::Included(id), Bound::Unbounded))
        .take_while(|(key, _)| key.starts_with(id));
    match (matches.next(), matches.next()) {
        (None, _) => Err(Error::not_found(format!("{what} {id}"))),
        (Some((key, value)), None) => Ok((key, value)),
        (Some((a, _)), Some((b, _))) => {
            Err(Error::invalid(format!("{what} {id} could be {a} or {b}")))
        }
    }
}

/// Holds the latest snapshot.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    latest: RwLock<Arc<Snapshot>>,
    changes: watch::Sender<()>,
}

impl Registry {
    /// The latest snapshot.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.latest.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces a pod's view.
    pub(crate) fn publish(&self, view: PodView) {
        self.change(|snapshot| {
            let id = view.sandbox.id.clone();
            snapshot.withdraw(&id);
            for container in view.containers.keys() {
                snapshot.owners.insert(container.clone(), id.clone());
            }
            snapshot.pods.insert(id, Arc::new(view));
        });
    }

    /// Takes a pod off the lists.
    pub(crate) fn withdraw(&self, pod: &str) {
        self.change(|snapshot| snapshot.withdraw(pod));
    }

    fn change(&self, edit: impl FnOnce(&mut Snapshot)) {
        let mut latest = self.latest.write().unwrap_or_else(PoisonError::into_inner);
        edit(Arc::make_mut(&mut latest));
        drop(latest);
        self.changes.send_replace(());
    }

    /// Tells of every change of the snapshot after the call.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(pod: &str, containers: &[&str]) -> PodView {
        let sandbox = Sandbox { id: pod.into(), ..Default::default() };
        let containers = containers
            .iter()
            .map(|id| {
                let container = Container { id: id.to_string(), ..Default::default() };
                (id.to_string(), Arc::new(container))
            })
            .collect();
        let commands = mpsc::channel(1).0;
        PodView { sandbox: Arc::new(sandbox), containers, monitor: None, commands }
    }

    #[test]
    fn an_unambiguous_prefix_finds_its_owner() {
        let registry = Registry::default();
        registry.publish(view("abc1", &["c1", "c2"]));
        registry.publish(view("abd1", &["d1"]));
        let s = registry.snapshot();
        assert_eq!(s.pod("abc").unwrap().sandbox.id, "abc1");
        assert_eq!(s.container("d").unwrap().0.sandbox.id, "abd1");
        assert_eq!(s.pod("ab").unwrap_err().kind(), crate::error::Kind::Invalid);
        assert_eq!(s.pod("x").unwrap_err().kind(), crate::error::Kind::NotFound);
    }

    #[test]
    fn an_old_snapshot_does_not_change_under_its_reader() {
        let registry = Registry::default();
        registry.publish(view("a", &["c"]));
        let before = registry.snapshot();
        registry.withdraw("a");
        assert!(before.container("c").is_ok());
        assert!(registry.snapshot().container("c").is_err());
    }

    #[test]
    fn a_container_no_longer_in_the_view_is_gone() {
        let registry = Registry::default();
        registry.publish(view("a", &["c1", "c2"]));
        registry.publish(view("a", &["c2"]));
        assert!(registry.snapshot().container("c1").is_err());
        assert_eq!(registry.snapshot().containers().count(), 1);
    }
}
