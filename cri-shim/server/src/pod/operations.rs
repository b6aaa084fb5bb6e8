//! The operations of a pod: what runs while the actor goes on.

use std::sync::Arc;
use std::time::Duration;

use pinion_cri_proto::v1;
use pinion_nri::Creation;
use tokio::sync::watch;

use super::reconnect::Reconnected;
use super::release::{self, Release};
use super::{Reply, create, kill, limits};
use crate::contract;
use crate::error::{Error, Kind, Result};
use crate::monitor::Client;
use crate::node::Node;
use crate::record::{Container, Holding, Phase, Sandbox};
use crate::services::blocking;
use crate::signals::KILL;
use crate::ticket::Completion;
use crate::{checkpoint, ids, nri, resources, vm};

/// What every operation starts from: copies of the state when it began.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) node: Arc<Node>,
    pub(crate) sandbox: Sandbox,
    pub(crate) monitor: Option<Client>,
}

impl Context {
    /// The pod's monitor, or an error that says there is none now.
    pub(crate) fn monitor(&self) -> Result<&Client> {
        self.monitor.as_ref().ok_or_else(|| {
            let message = format!("pod sandbox {} has no monitor at the moment", self.sandbox.id);
            Error::new(Kind::Unavailable, message)
        })
    }

    pub(crate) fn release(&self) -> Release {
        Release {
            node: self.node.clone(),
            sandbox: self.sandbox.clone(),
            monitor: self.monitor.clone(),
            forgets_layers: true,
        }
    }
}

/// A container as it was when the operation began, and the signal that it has ended.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    pub(crate) record: Container,
    pub(crate) ended: watch::Receiver<bool>,
}

impl Held {
    /// Waits until the container has ended; false if the time was over first.
    pub(super) async fn wait(&mut self, limit: Duration) -> bool {
        tokio::time::timeout(limit, self.ended.wait_for(|ended| *ended)).await.is_ok()
    }
}

/// A creation that failed.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) error: Error,
    /// What is left of the container, if its undo failed too.
    pub(crate) left: Option<Box<Container>>,
}

/// What an operation did; the actor applies it.
#[derive(Debug)]
pub(crate) enum Done {
    Nothing,
    Created {
        id: String,
        config: Box<v1::ContainerConfig>,
        result: Result<Box<Container>, Failed>,
        completion: Completion<String>,
        /// Until it is listed.
        creation: Option<Creation>,
    },
    Started {
        id: String,
        /// When.
        result: Result<i64>,
        reply: Reply<()>,
    },
    /// Nothing to apply.
    Answered {
        result: Result<()>,
        reply: Reply<()>,
    },
    Updated {
        id: String,
        /// The limits now in force.
        result: Result<Box<v1::LinuxContainerResources>>,
        reply: Reply<()>,
    },
    PodUpdated {
        overhead: Option<Box<v1::LinuxContainerResources>>,
        resources: Option<Box<v1::LinuxContainerResources>>,
        reply: Reply<()>,
    },
    Settled {
        id: String,
        /// What it still holds.
        left: Vec<Holding>,
        result: Result<()>,
    },
    Removed {
        id: String,
        /// What could not be given back.
        left: Vec<Holding>,
        result: Result<()>,
        reply: Reply<()>,
    },
    PodStopped {
        /// What each container still holds.
        containers: Vec<(String, Vec<Holding>)>,
        /// What the pod itself still holds.
        left: Vec<Holding>,
        /// Whether it was to be removed as well.
        remove: bool,
        result: Result<()>,
        reply: Reply<()>,
    },
    Reconnected(Box<Reconnected>),
}

pub(crate) async fn create(
    context: Context,
    id: String,
    config: Box<v1::ContainerConfig>,
    completion: Completion<String>,
) -> Done {
    let creation = nri::creation(&context.node).await;
    let result = create::create(&context, &id, &config).await.map(Box::new);
    Done::Created { id, config, result, completion, creation }
}

pub(crate) async fn start(
    context: Context,
    id: String,
    member: Result<Held>,
    reply: Reply<()>,
) -> Done {
    let work = async {
        let record = member?.record;
        match record.phase() {
            Phase::Created => {}
            Phase::Running => return Err(state_error(&record, "is already running")),
            Phase::Exited => return Err(state_error(&record, "has already exited")),
        }
        let monitor = context.monitor()?;
        let checked = async {
            nri::start_container(&context.node, &context.sandbox, &record).await?;
            contract::check_before_start(&context.node, &record).await
        };
        let started = match checked.await {
            Ok(()) => monitor.start(&id).await,
            refused => refused,
        };
        if let Err(error) = started {
            // It must not go on waiting for a start that will not come again.
            let _ = monitor.signal(&id, KILL, true).await;
            return Err(error);
        }
        contract::report_after_start(&context.node, &record);
        nri::post_start(&context.node, &context.sandbox, &record).await;
        Ok(ids::now())
    };
    let result = work.await;
    Done::Started { id, result, reply }
}

fn state_error(record: &Container, state: &str) -> Error {
    Error::precondition(format!("container {} {state}", record.id))
}

pub(crate) async fn stop(
    context: Context,
    member: Result<Held>,
    grace: Duration,
    reply: Reply<()>,
) -> Done {
    let result = match member {
        Ok(mut held) => kill::end(&context, &mut held, grace).await,
        Err(e) => Err(e),
    };
    Done::Answered { result, reply }
}

pub(crate) async fn remove(
    context: Context,
    id: String,
    member: Result<Held>,
    reply: Reply<()>,
) -> Done {
    let (left, result) = match member {
        Ok(mut held) => give_back(&context, &mut held, |_| true).await,
        Err(error) => return Done::Answered { result: Err(error), reply },
    };
    Done::Removed { id, left, result, reply }
}

/// Gives back what an ended container holds for nothing; its files stay until it is removed.
pub(crate) async fn settle(context: Context, id: String, member: Result<Held>) -> Done {
    let Ok(held) = member else { return Done::Nothing };
    let which: fn(&Holding) -> bool = |holding| !holding.outlives_stop();
    let (left, result) = release::all(&context.release(), held.record.holdings, which).await;
    Done::Settled { id, left, result }
}

/// Kills a container if it runs, then gives back what `which` names of its holdings.
async fn give_back(
    context: &Context,
    held: &mut Held,
    which: fn(&Holding) -> bool,
) -> (Vec<Holding>, Result<()>) {
    // Without a monitor the release kills by cgroup.
    if context.monitor.is_some()
        && let Err(error) = kill::end(context, held, Duration::ZERO).await
    {
        return (held.record.holdings.clone(), Err(error));
    }
    release::all(&context.release(), held.record.holdings.clone(), which).await
}

/// New limits.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) resources: Box<v1::LinuxContainerResources>,
    /// NRI plugins know of it already.
    pub(crate) told: bool,
}

pub(crate) async fn update(
    context: Context,
    id: String,
    member: Result<Held>,
    change: Change,
    reply: Reply<()>,
) -> Done {
    let work = async {
        let record = member?.record;
        if record.exit.is_some() {
            return Err(state_error(&record, "has exited"));
        }
        let Change { resources: change, told } = change;
        let change = match told {
            true => change,
            false => nri::update(&context.node, &context.sandbox, &record, &change).await?,
        };
        let cpuset_cpus = record.contract.with_shared(&change.cpuset_cpus)?;
        let change = v1::LinuxContainerResources { cpuset_cpus, ..*change };
        let wanted = resources::merge(&record.resources, &change);
        contract::check_update(&context.node, &record, &wanted)?;
        let moved = contract::resized(&record.contract, &wanted)?;
        let grants =
            contract::hugepages::regrant(&context.node, &id, &record.cgroups_path, &moved).await?;
        let updated = match &context.sandbox.guest {
            None => context.node.programs.update(&id, &resources::to_oci(&change)?).await,
            Some(guest) => vm::update(&context, guest, &id, &change).await,
        };
        if let Err(error) = updated {
            contract::hugepages::put_back(&context.node, &id, grants).await?;
            return Err(error);
        }
        contract::settings::lease(&context.node, &id, moved.loans()).await?;
        nri::post_update(&context.node, &context.sandbox, &record).await;
        Ok(Box::new(wanted))
    };
    let result = work.await;
    Done::Updated { id, result, reply }
}

/// Asks again for exclusive CPUs that were lost; see [`contract::watch`].
pub(crate) async fn heal(context: Context, member: Result<Held>, reply: Reply<()>) -> Done {
    let work = async {
        let record = member?.record;
        if record.exit.is_some() {
            return Ok(());
        }
        contract::watch::heal(&context.node, &record).await
    };
    let result = work.await;
    Done::Answered { result, reply }
}

/// What is to be checkpointed, and how.
#[derive(Debug)]
pub(crate) struct Wish {
    pub(crate) chosen: Result<Vec<Arc<Container>>>,
    pub(crate) place: std::path::PathBuf,
    pub(crate) limit: Duration,
    pub(crate) whole: bool,
}

pub(crate) async fn checkpoint(context: Context, wish: Wish, reply: Reply<()>) -> Done {
    let work = async {
        let chosen = wish.chosen?;
        let (node, place) = (&context.node, &wish.place);
        if wish.whole {
            return checkpoint::pod(node, &context.sandbox, &chosen, place).await;
        }
        for record in &chosen {
            checkpoint::container(node, record, place, wish.limit).await?;
        }
        Ok(())
    };
    let result = work.await;
    Done::Answered { result, reply }
}

/// Puts new limits on the pod's cgroup. Kubelet has written those of its own pods by then, and
/// the same values once more change nothing.
pub(crate) async fn update_pod(
    context: Context,
    members: Vec<Held>,
    overhead: Option<Box<v1::LinuxContainerResources>>,
    resources: Option<Box<v1::LinuxContainerResources>>,
    reply: Reply<()>,
) -> Done {
    let (node, sandbox) = (&context.node, &context.sandbox);
    let asked = (overhead.as_deref(), resources.as_deref());
    if let Err(error) = nri::update_pod(node, sandbox, asked.0, asked.1).await {
        return Done::Answered { result: Err(error), reply };
    }
    let (worker, pod) = (node.clone(), sandbox.clone());
    let (asked_overhead, asked) = (overhead.clone(), resources.clone());
    let written = blocking(move || {
        limits::apply(&worker, &pod, &members, asked_overhead.as_deref(), asked.as_deref())
    });
    if let Err(error) = written.await {
        return Done::Answered { result: Err(error), reply };
    }
    nri::post_update_pod(node, sandbox).await;
    Done::PodUpdated { overhead, resources, reply }
}

pub(crate) async fn reopen_log(context: Context, member: Result<Held>, reply: Reply<()>) -> Done {
    let work = async {
        let record = member?.record;
        if record.phase() != Phase::Running {
            return Err(state_error(&record, "is not running"));
        }
        context.monitor()?.reopen_log(&record.id).await
    };
    let result = work.await;
    Done::Answered { result, reply }
}

/// Ends every container, then gives back what the pod holds: all of it if it is to be
/// removed, else what a stopped pod does not need.
pub(crate) async fn stop_pod(
    context: Context,
    members: Vec<Held>,
    remove: bool,
    reply: Reply<()>,
) -> Done {
    let which: fn(&Holding) -> bool = if remove { |_| true } else { |h| !h.outlives_stop() };
    let ends = members.into_iter().map(|mut held| {
        let context = context.clone();
        async move {
            let (left, result) = give_back(&context, &mut held, which).await;
            (held.record.id, left, result)
        }
    });
    let mut containers = Vec::new();
    let mut outcome = Ok(());
    for (id, left, result) in futures::future::join_all(ends).await {
        containers.push((id, left));
        outcome = outcome.and(result);
    }
    if context.sandbox.ready && outcome.is_ok() {
        nri::stop_pod(&context.node, &context.sandbox).await;
    }
    // The pod's own things are in use for as long as a container is alive.
    if outcome.is_err() {
        let left = context.sandbox.holdings.clone();
        return Done::PodStopped { containers, left, remove, result: outcome, reply };
    }
    let holdings = context.sandbox.holdings.clone();
    let (left, result) = release::all(&context.release(), holdings, which).await;
    let result = result.map_err(|error| {
        let (id, title) = (&context.sandbox.id, context.sandbox.title());
        Error::new(error.kind(), format!("stop pod sandbox {id} ({title})")).caused_by(error)
    });
    Done::PodStopped { containers, left, remove, result, reply }
}
