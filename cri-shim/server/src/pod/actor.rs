//! The actor of one pod: takes commands and notices, runs operations, applies what they did.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use pinion_cri_proto::v1::{self, ContainerEventType};
use tokio::sync::{mpsc, watch};

use super::Command;
use super::operations::{self, Done, Held};
use super::reconnect::{self, Reconnected};
use super::schedule::{Schedule, Scope};
use crate::admission::{Admission, Admit};
use crate::contract::settings;
use crate::error::{Error, Kind, Result};
use crate::events::Note;
use crate::monitor::{Client, Notice};
use crate::node::Node;
use crate::record::{CONTAINERS, Container, Exit, Phase, SANDBOXES, Sandbox};
use crate::registry::PodView;
use crate::ticket::{Completion, Ticket, ticket};
use crate::{ids, nri, status};

/// Commands that may wait for the actor; more make their senders wait.
const QUEUE: usize = 64;

/// A pod's state as handed to a new actor.
#[derive(Debug)]
pub(crate) struct Seed {
    pub(crate) sandbox: Sandbox,
    pub(crate) containers: Vec<Container>,
    pub(crate) monitor: Option<Client>,
    pub(crate) notices: (mpsc::UnboundedSender<Notice>, mpsc::UnboundedReceiver<Notice>),
}

/// Starts the actor of a pod and publishes its first view.
pub(crate) fn spawn(node: Arc<Node>, seed: Seed) {
    let (sender, commands) = mpsc::channel(QUEUE);
    let mut names = Admission::default();
    for container in &seed.containers {
        names.restore(name(&container.config), container.asked().clone(), &container.id);
    }
    let containers = seed.containers.into_iter().map(|c| (c.id.clone(), Member::new(c))).collect();
    let mut actor = Actor {
        node,
        sandbox: seed.sandbox,
        containers,
        names,
        schedule: Schedule::default(),
        running: FuturesUnordered::new(),
        monitor: seed.monitor,
        notices: seed.notices.0,
        sender,
        early: HashMap::new(),
        stopping: false,
        removed: false,
    };
    actor.publish();
    let ended: Vec<String> = actor.containers.keys().cloned().collect();
    ended.into_iter().for_each(|id| actor.settle(id));
    tokio::spawn(actor.run(commands, seed.notices.1));
}

/// A container and the signal that it has ended.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) record: Container,
    ended: watch::Sender<bool>,
}

impl Member {
    pub(super) fn new(record: Container) -> Self {
        Self { ended: watch::Sender::new(record.exit.is_some()), record }
    }
}

/// A command that was let in.
#[derive(Debug)]
enum Work {
    Create { id: String, config: Box<v1::ContainerConfig>, completion: Completion<String> },
    Settle { id: String },
    Command(Command),
}

pub(super) struct Actor {
    pub(super) node: Arc<Node>,
    pub(super) sandbox: Sandbox,
    pub(super) containers: BTreeMap<String, Member>,
    pub(super) names: Admission<(String, u32), v1::ContainerConfig, Ticket<String>>,
    schedule: Schedule<Work>,
    pub(super) running: FuturesUnordered<BoxFuture<'static, (Option<Scope>, Done)>>,
    pub(super) monitor: Option<Client>,
    pub(super) notices: mpsc::UnboundedSender<Notice>,
    pub(super) sender: mpsc::Sender<Command>,
    /// Exits reported before their container's creation was applied.
    pub(super) early: HashMap<String, Exit>,
    /// The pod is being stopped, and its monitor with it.
    pub(super) stopping: bool,
    pub(super) removed: bool,
}

/// What is unique among the containers of a pod.
pub(super) fn name(config: &v1::ContainerConfig) -> (String, u32) {
    let metadata = config.metadata.clone().unwrap_or_default();
    (metadata.name, metadata.attempt)
}

impl Actor {
    async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut notices: mpsc::UnboundedReceiver<Notice>,
    ) {
        while !self.removed {
            tokio::select! {
                // Exits first: an operation's result may depend on one.
                biased;
                Some(notice) = notices.recv() => self.notice(notice).await,
                Some((scope, done)) = self.running.next() => {
                    self.apply(done).await;
                    if let Some(scope) = scope {
                        self.schedule.done(&scope);
                    }
                }
                Some(command) = commands.recv() => self.admit(command),
                // The actor holds a sender of its own, so its channels never close.
                else => return,
            }
            while !self.removed
                && let Some((scope, work)) = self.schedule.next()
            {
                let operation = self.begin(work);
                self.running.push(Box::pin(async move { (Some(scope), operation.await) }));
            }
        }
    }

    /// Lets a command in, or answers it.
    fn admit(&mut self, command: Command) {
        let scope = match &command {
            Command::Create { .. } => return self.admit_create(command),
            Command::Start { container, .. }
            | Command::Remove { container, .. }
            | Command::Update { container, .. }
            | Command::Heal { container, .. }
            | Command::ReopenLog { container, .. } => Scope::Container(container.clone()),
            Command::Stop { container, .. } => Scope::Stop(container.clone()),
            Command::UpdatePod { .. }
            | Command::Checkpoint { .. }
            | Command::StopPod { .. }
            | Command::RemovePod { .. } => Scope::Pod,
        };
        self.schedule.push(scope, Work::Command(command));
    }

    fn admit_create(&mut self, command: Command) {
        let Command::Create { config, reply } = command else { return };
        // Whoever asked may be gone; the answer then goes nowhere.
        let _ = reply.send(self.create_ticket(config));
    }

    fn create_ticket(&mut self, config: Box<v1::ContainerConfig>) -> Result<Ticket<String>> {
        let name = name(&config);
        if name.0.is_empty() {
            return Err(Error::invalid("metadata.name: a container needs a name"));
        }
        if !self.sandbox.ready {
            return Err(Error::precondition(format!(
                "pod sandbox {} is not ready",
                self.sandbox.id
            )));
        }
        let id = ids::random_id()?;
        let (completion, mine) = ticket();
        match self.names.admit(name.clone(), (*config).clone(), &id, mine.clone()) {
            Admit::Start => {
                let scope = Scope::Create(id.clone());
                self.schedule.push(scope, Work::Create { id, config, completion });
                Ok(mine)
            }
            Admit::Join(theirs) => Ok(theirs),
            Admit::Made(id) => {
                completion.complete(Ok(id));
                Ok(mine)
            }
            Admit::Taken { id, in_progress } => {
                let state = if in_progress { "is being created" } else { "exists" };
                let (name, attempt) = name;
                Err(Error::new(
                    Kind::AlreadyExists,
                    format!(
                        "container {name} (attempt {attempt}) {state} as {id} with another configuration"
                    ),
                ))
            }
        }
    }

    /// Whether the removal of a container was asked for and has not begun yet.
    pub(super) fn removal_waits(&self, id: &str) -> bool {
        let removes = |work: &Work| matches!(work, Work::Command(Command::Remove { container, .. }) if container == id);
        self.schedule.waiting().any(removes)
    }

    /// The operation of a command, on copies of the state as it is now.
    fn begin(&mut self, work: Work) -> BoxFuture<'static, Done> {
        let context = operations::Context {
            node: self.node.clone(),
            sandbox: self.sandbox.clone(),
            monitor: self.monitor.clone(),
        };
        let command = match work {
            Work::Create { id, config, completion } => {
                return Box::pin(operations::create(context, id, config, completion));
            }
            Work::Settle { id } => {
                let member = self.member(&id);
                return Box::pin(operations::settle(context, id, member));
            }
            Work::Command(command) => command,
        };
        match command {
            Command::Create { .. } => Box::pin(async { Done::Nothing }),
            Command::Start { container, reply } => {
                let member = self.member(&container);
                Box::pin(operations::start(context, container, member, reply))
            }
            Command::Stop { container, grace, reply } => {
                let member = self.member(&container);
                Box::pin(operations::stop(context, member, grace, reply))
            }
            Command::Remove { container, reply } => {
                let member = self.member(&container);
                Box::pin(operations::remove(context, container, member, reply))
            }
            Command::Update { container, resources, told, reply } => {
                let member = self.member(&container);
                let change = operations::Change { resources, told };
                Box::pin(operations::update(context, container, member, change, reply))
            }
            Command::Heal { container, reply } => {
                let member = self.member(&container);
                Box::pin(operations::heal(context, member, reply))
            }
            Command::UpdatePod { overhead, resources, reply } => {
                let members = self.members();
                Box::pin(operations::update_pod(context, members, overhead, resources, reply))
            }
            Command::Checkpoint { containers, place, limit, whole, reply } => {
                let chosen = self.chosen(containers);
                let wish = operations::Wish { chosen, place, limit, whole };
                Box::pin(operations::checkpoint(context, wish, reply))
            }
            Command::ReopenLog { container, reply } => {
                let member = self.member(&container);
                Box::pin(operations::reopen_log(context, member, reply))
            }
            Command::StopPod { reply } => {
                self.stopping = true;
                Box::pin(operations::stop_pod(context, self.members(), false, reply))
            }
            Command::RemovePod { reply } => {
                self.stopping = true;
                Box::pin(operations::stop_pod(context, self.members(), true, reply))
            }
        }
    }

    fn member(&self, id: &str) -> Result<Held> {
        let member =
            self.containers.get(id).ok_or_else(|| Error::not_found(format!("container {id}")))?;
        Ok(Held { record: member.record.clone(), ended: member.ended.subscribe() })
    }

    /// The named containers of the pod, or all that run.
    fn chosen(&self, named: Option<Vec<String>>) -> Result<Vec<Arc<Container>>> {
        let record = |m: &Member| Arc::new(m.record.clone());
        let Some(named) = named else {
            let running = self.containers.values().filter(|m| m.record.phase() == Phase::Running);
            return Ok(running.map(record).collect());
        };
        let found = |id: &String| {
            let member = self.containers.get(id).map(record);
            member.ok_or_else(|| {
                Error::not_found(format!("container {id} of pod sandbox {}", self.sandbox.id))
            })
        };
        named.iter().map(found).collect()
    }

    fn members(&self) -> Vec<Held> {
        let held = |m: &Member| Held { record: m.record.clone(), ended: m.ended.subscribe() };
        self.containers.values().map(held).collect()
    }

    async fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Exited { id, exit } => self.exited(&id, reconnect::exit(&exit)).await,
            Notice::Oom { id } => tracing::warn!(container = id, "out of memory"),
            Notice::GuestEnded { reason } => self.machine_ended(reason).await,
            Notice::Lost if self.stopping || !self.sandbox.ready => self.monitor = None,
            Notice::Lost => {
                tracing::warn!(pod = self.sandbox.id, "lost the pod's monitor, reconnecting");
                self.monitor = None;
                self.publish();
                let records = self.containers.values().map(|m| m.record.clone()).collect();
                let work = reconnect::reconnect(
                    self.node.clone(),
                    self.sandbox.clone(),
                    records,
                    self.notices.clone(),
                );
                self.running
                    .push(Box::pin(async move { (None, Done::Reconnected(Box::new(work.await))) }));
            }
        }
    }

    pub(super) async fn exited(&mut self, id: &str, exit: Exit) {
        let Some(member) = self.containers.get_mut(id) else {
            self.early.insert(id.to_string(), exit);
            return;
        };
        if member.record.exit.is_some() {
            return;
        }
        // What cannot be written now is read from exit.json at the next start.
        let end = |container: &mut Container| {
            container.end(exit);
        };
        if let Err(error) = self.change(id, end).await {
            tracing::error!(container = id, error = %error.chain(), "exit not stored");
        }
        // Now and not at the removal: nobody may come for a container that ended by itself.
        if let Err(error) = settings::release(&self.node, id).await {
            tracing::error!(container = id, error = %error.chain(), "node settings not given back");
        }
        self.settle(id.to_string());
        self.announce(id, ContainerEventType::ContainerStoppedEvent);
        if let Some(member) = self.containers.get(id) {
            nri::stop_container(&self.node, &self.sandbox, &member.record).await;
        }
    }

    /// Has a container that has ended give back what only a living one needs: its CPUs and
    /// hugepages may be promised to its successor long before it is removed.
    pub(super) fn settle(&mut self, id: String) {
        let costs =
            |c: &Container| c.exit.is_some() && c.holdings.iter().any(|h| !h.outlives_stop());
        if self.containers.get(&id).is_some_and(|m| costs(&m.record)) {
            self.schedule.push(Scope::Settle(id.clone()), Work::Settle { id });
        }
    }

    /// The pod's machine is gone: what was in it has ended, and nothing new can start.
    async fn machine_ended(&mut self, reason: String) {
        if self.stopping {
            return;
        }
        tracing::warn!(pod = self.sandbox.id, reason, "the pod's virtual machine has ended");
        self.sandbox.ready = false;
        if let Some(guest) = &mut self.sandbox.guest {
            guest.ended = Some(reason);
        }
        if let Err(error) = self.commit_sandbox().await {
            tracing::error!(pod = self.sandbox.id, error = %error.chain(), "pod not stored");
        }
    }

    pub(super) async fn reconnected(&mut self, reconnected: Reconnected) {
        if let Some(reason) = reconnected.machine_ended {
            self.machine_ended(reason).await;
        }
        for id in reconnected.started {
            if let Err(error) = self.change(&id, |c| c.start(ids::now())).await {
                tracing::error!(container = id, error = %error.chain(), "start not stored");
            }
        }
        for (id, exit) in reconnected.ended {
            self.exited(&id, exit).await;
        }
        match reconnected.monitor {
            Ok(monitor) => self.monitor = Some(monitor),
            Err(error) => {
                tracing::error!(pod = self.sandbox.id, error = %error.chain(), "the pod has no monitor");
                self.sandbox.ready = false;
                if let Err(error) = self.commit_sandbox().await {
                    tracing::error!(pod = self.sandbox.id, error = %error.chain(), "pod not stored");
                }
            }
        }
        self.publish();
    }

    /// Changes a container's record: in the store, here, and in the view.
    pub(super) async fn change(
        &mut self,
        id: &str,
        edit: impl FnOnce(&mut Container),
    ) -> Result<()> {
        let Some(member) = self.containers.get_mut(id) else {
            return Err(Error::not_found(format!("container {id}")));
        };
        edit(&mut member.record);
        let record = member.record.clone();
        let ended = record.exit.is_some();
        let written = self.node.write(move |tx| tx.put(CONTAINERS, &record.id, &record)).await;
        if ended && let Some(member) = self.containers.get(id) {
            member.ended.send_replace(true);
        }
        self.publish();
        written
    }

    pub(super) async fn commit_sandbox(&mut self) -> Result<()> {
        let record = self.sandbox.clone();
        let written = self.node.write(move |tx| tx.put(SANDBOXES, &record.id, &record)).await;
        self.publish();
        written
    }

    fn view(&self) -> PodView {
        let containers = self
            .containers
            .iter()
            .map(|(id, member)| (id.clone(), Arc::new(member.record.clone())))
            .collect();
        PodView {
            sandbox: Arc::new(self.sandbox.clone()),
            containers,
            monitor: self.monitor.clone(),
            commands: self.sender.clone(),
        }
    }

    pub(super) fn publish(&self) {
        self.node.registry.publish(self.view());
    }

    pub(super) fn announce(&self, id: &str, what: ContainerEventType) {
        if let Some(member) = self.containers.get(id) {
            self.announce_record(&member.record, what);
        }
    }

    pub(super) fn announce_record(&self, container: &Container, what: ContainerEventType) {
        self.send_event(&container.id, what);
    }

    pub(super) fn announce_pod(&self, what: ContainerEventType) {
        self.send_event(&self.sandbox.id, what);
    }

    fn send_event(&self, id: &str, what: ContainerEventType) {
        let note = Note { pod: self.sandbox.id.clone(), id: id.to_string(), what, at: ids::now() };
        let at = note.at;
        self.node.events.tell(note, || v1::ContainerEventResponse {
            container_id: id.to_string(),
            container_event_type: what.into(),
            created_at: at,
            pod_sandbox_status: Some(status::sandbox_status(&self.sandbox)),
            containers_statuses: status::container_statuses(&self.view()),
        });
    }
}
