//! What the actor does with the result of an operation: store, then view, then answer.

use pinion_cri_proto::v1::{self, ContainerEventType};

use pinion_image::Images;

use super::Reply;
use super::actor::{Actor, Member, name};
use super::operations::{Done, Failed};
use crate::admission::Settled;
use crate::error::{Error, Kind, Result};
use crate::nri;
use crate::record::{CONTAINERS, Container, Exit, Holding, Phase, SANDBOXES};

impl Actor {
    /// Applies what an operation did: store, then view, then answer.
    pub(super) async fn apply(&mut self, done: Done) {
        match done {
            Done::Nothing => {}
            Done::Created { id, config, result, completion, creation } => {
                let result = self.created(&id, &config, result).await;
                drop(creation);
                completion.complete(result);
            }
            Done::Started { id, result, reply } => {
                let result = match result {
                    Ok(at) => self.change(&id, |c| c.start(at)).await,
                    Err(error) => {
                        self.not_started(&id, &error).await;
                        Err(error)
                    }
                };
                if result.is_ok() {
                    self.announce(&id, ContainerEventType::ContainerStartedEvent);
                }
                answer(reply, result);
            }
            Done::Answered { result, reply } => answer(reply, result),
            Done::Updated { id, result, reply } => {
                let result = match result {
                    Ok(resources) => self.change(&id, |c| c.limit(*resources)).await,
                    Err(e) => Err(e),
                };
                answer(reply, result);
            }
            Done::PodUpdated { overhead, resources, reply } => {
                let linux = self.sandbox.config.0.linux.get_or_insert_default();
                linux.overhead = overhead.map(|r| *r).or(linux.overhead.take());
                linux.resources = resources.map(|r| *r).or(linux.resources.take());
                answer(reply, self.commit_sandbox().await);
            }
            // What is about to be removed needs no record of what it holds still: what the
            // store lists beyond that is given back once more after a crash.
            Done::Settled { id, left, result: Ok(()) } if self.removal_waits(&id) => {
                if let Some(member) = self.containers.get_mut(&id) {
                    member.record.give_back(left);
                }
            }
            Done::Settled { id, left, result } => {
                let settled = self.released(&id, left, false).await;
                if let Err(error) = result.and(settled) {
                    let error = error.chain();
                    tracing::error!(
                        container = id,
                        error,
                        "not all given back, its removal tries again"
                    );
                }
            }
            Done::Removed { id, left, result, reply } => {
                let settled = self.released(&id, left, true).await;
                answer(reply, result.and(settled));
            }
            Done::PodStopped { containers, left, remove, result, reply } => {
                let settled = self.pod_stopped(containers, left, remove).await;
                answer(reply, result.and(settled));
            }
            Done::Reconnected(reconnected) => self.reconnected(*reconnected).await,
        }
    }

    async fn created(
        &mut self,
        id: &str,
        config: &v1::ContainerConfig,
        result: Result<Box<Container>, Failed>,
    ) -> Result<String> {
        let name = name(config);
        match result {
            Ok(mut record) => {
                if let Some(exit) = self.early.remove(id) {
                    record.end(exit);
                }
                self.names.settle(&name, Settled::Made);
                self.containers.insert(id.to_string(), Member::new(*record));
                self.publish();
                self.announce(id, ContainerEventType::ContainerCreatedEvent);
                self.settle(id.to_string());
                Ok(id.to_string())
            }
            Err(failed) => {
                self.early.remove(id);
                match failed.left {
                    None => self.names.settle(&name, Settled::Undone),
                    Some(record) => {
                        // It stays visible, so that its removal is tried again.
                        self.names.settle(&name, Settled::Made);
                        self.containers.insert(id.to_string(), Member::new(*record));
                        self.publish();
                    }
                }
                Err(failed.error)
            }
        }
    }

    /// Takes over what a release left, and forgets a removed container that left nothing.
    async fn released(&mut self, id: &str, left: Vec<Holding>, remove: bool) -> Result<()> {
        if !(remove && left.is_empty()) {
            return self.change(id, |c| c.give_back(left)).await;
        }
        let key = id.to_string();
        let forgotten = self.node.write(move |tx| {
            tx.delete(CONTAINERS, &key)?;
            Images::forget_rootfs(tx, &key)
        });
        forgotten.await?;
        self.node.empty_trash();
        if let Some(member) = self.containers.remove(id) {
            self.names.release(&name(&member.record.config), id);
            self.node.samples.forget(id);
            self.node.histories.forget(id);
            self.publish();
            self.announce_record(&member.record, ContainerEventType::ContainerDeletedEvent);
            nri::remove_container(&self.node, &self.sandbox, &member.record).await;
        }
        Ok(())
    }

    async fn pod_stopped(
        &mut self,
        containers: Vec<(String, Vec<Holding>)>,
        left: Vec<Holding>,
        remove: bool,
    ) -> Result<()> {
        let was_ready = std::mem::replace(&mut self.sandbox.ready, false);
        self.stopping = false;
        self.monitor = None;
        let mut outcome = Ok(());
        for (id, left) in containers {
            outcome = outcome.and(self.released(&id, left, remove).await);
        }
        self.sandbox.holdings = left;
        if remove && self.sandbox.holdings.is_empty() && self.containers.is_empty() {
            return outcome.and(self.forget().await);
        }
        outcome = outcome.and(self.commit_sandbox().await);
        if was_ready {
            self.announce_pod(ContainerEventType::ContainerStoppedEvent);
        }
        outcome
    }

    /// The end of the pod and its actor.
    async fn forget(&mut self) -> Result<()> {
        let id = self.sandbox.id.clone();
        self.node.write(move |tx| tx.delete(SANDBOXES, &id).map(drop)).await?;
        self.removed = true;
        self.node.registry.withdraw(&self.sandbox.id);
        self.node.release_name(&self.sandbox);
        self.node.samples.forget(&self.sandbox.id);
        self.announce_pod(ContainerEventType::ContainerDeletedEvent);
        nri::remove_pod(&self.node, &self.sandbox).await;
        Ok(())
    }

    /// A created container that could not be started has come to its end, and why is told
    /// in its status.
    async fn not_started(&mut self, id: &str, error: &Error) {
        let created = self.containers.get(id).is_some_and(|m| m.record.phase() == Phase::Created);
        // Without a monitor nothing was tried.
        if created && error.kind() != Kind::Unavailable {
            self.exited(id, Exit::not_started(error.chain())).await;
        }
    }
}

fn answer(reply: Reply<()>, result: Result<()>) {
    // Whoever asked may be gone.
    let _ = reply.send(result);
}
