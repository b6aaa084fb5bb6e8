//! One plugin, from its connection to the events it wants.

use std::sync::Arc;

use pinion_nri_proto::RUNTIME;
use pinion_nri_proto::api::{
    ConfigureRequest, ConfigureResponse, Container, ContainerUpdate, Empty, Event, PodSandbox,
    RegisterPluginRequest, StateChangeEvent, SynchronizeRequest, SynchronizeResponse,
    UpdateContainersRequest, UpdateContainersResponse,
};
use prost::Message;
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot};

use crate::frame::MAX_PAYLOAD;
use crate::link::{CallError, Incoming, Link};
use crate::plugins::{Config, State};

/// Room for the envelope around a synchronize message.
const SYNC_PAYLOAD: usize = MAX_PAYLOAD - (64 << 10);

/// Every event there is (`Event::Last` is none).
const ALL_EVENTS: i32 = (1 << (Event::Last as i32 - 1)) - 1;

/// A plugin that has registered.
#[derive(Debug)]
pub(crate) struct Plugin {
    /// `NN-name`: also the order of calling.
    pub(crate) name: String,
    link: Link,
    events: i32,
    config: Arc<Config>,
    /// The process, if it was started here; it ends with this value.
    _process: Option<Child>,
}

/// Why a connection became no plugin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unfit {
    #[error("it did not register within {0:?}")]
    Silent(std::time::Duration),
    #[error("it ended before it registered")]
    Gone,
    #[error("{0:?} is not a plugin index of two digits")]
    Index(String),
    #[error("{0:?} is not a plugin name")]
    Name(String),
    #[error("it subscribes to events that do not exist (mask {0:#x})")]
    Events(i32),
    #[error("configure")]
    Configure(#[source] CallError),
    #[error("synchronize")]
    Synchronize(#[source] CallError),
    #[error("it does not take the node's state in parts")]
    Parts,
}

/// A plugin that was started here.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) index: String,
    pub(crate) name: String,
    pub(crate) settings: String,
    pub(crate) process: Child,
}

impl Plugin {
    /// Waits for the plugin to register, and configures it.
    pub(crate) async fn meet(
        socket: UnixStream,
        launched: Option<Launched>,
        config: &Arc<Config>,
        state: &Arc<dyn State>,
    ) -> Result<Self, Unfit> {
        let (link, incoming) = Link::new(socket);
        let (registered, registration) = oneshot::channel();
        tokio::spawn(serve(incoming, registered, state.clone()));
        let limit = config.registration_timeout;
        let request = tokio::time::timeout(limit, registration)
            .await
            .map_err(|_late| Unfit::Silent(limit))?
            .map_err(|_gone| Unfit::Gone)?;
        // The name of a program that was started here is that of its file.
        let (index, name, settings, process) = match launched {
            Some(l) => (l.index, l.name, l.settings, Some(l.process)),
            None => (request.plugin_idx, request.plugin_name, String::new(), None),
        };
        check_name(&index, &name)?;
        let milliseconds = |d: std::time::Duration| i64::try_from(d.as_millis()).unwrap_or(0);
        let configure = ConfigureRequest {
            config: settings,
            runtime_name: "pinion".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            registration_timeout: milliseconds(config.registration_timeout),
            request_timeout: milliseconds(config.request_timeout),
            nri_version: "0.12.0".into(),
        };
        let answer: ConfigureResponse = link
            .call("Configure", &configure, config.request_timeout)
            .await
            .map_err(Unfit::Configure)?;
        if answer.events & !ALL_EVENTS != 0 {
            return Err(Unfit::Events(answer.events));
        }
        let events = if answer.events == 0 { ALL_EVENTS } else { answer.events };
        let name = format!("{index}-{name}");
        Ok(Self { name, link, events, config: config.clone(), _process: process })
    }

    /// Tells the plugin what exists; the changes it asks for.
    pub(crate) async fn synchronize(
        &self,
        pods: Vec<PodSandbox>,
        containers: Vec<Container>,
    ) -> Result<Vec<ContainerUpdate>, Unfit> {
        let parts = parts(pods, containers, SYNC_PAYLOAD);
        let mut updates = Vec::new();
        for part in parts {
            // As long as for registering: it may have to look at a whole node.
            let answer: SynchronizeResponse = self
                .link
                .call("Synchronize", &part, self.config.registration_timeout)
                .await
                .map_err(Unfit::Synchronize)?;
            if part.more && !answer.more {
                return Err(Unfit::Parts);
            }
            updates.extend(answer.update);
        }
        Ok(updates)
    }

    /// Whether the plugin wants an event.
    pub(crate) fn wants(&self, event: Event) -> bool {
        self.events & (1 << (event as i32 - 1)) != 0
    }

    /// Calls the method of an event.
    pub(crate) async fn call<A: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<A, CallError> {
        self.link.call(method, request, self.config.request_timeout).await
    }

    /// Tells of an event to which there is no answer; older plugins have one method for all.
    pub(crate) async fn tell(
        &self,
        event: Event,
        method: &str,
        request: &impl Message,
        pod: Option<&PodSandbox>,
        container: Option<&Container>,
    ) -> Result<(), CallError> {
        match self.call::<Empty>(method, request).await {
            Err(CallError::Unimplemented) => {
                let change = StateChangeEvent {
                    event: event.into(),
                    pod: pod.cloned(),
                    container: container.cloned(),
                };
                match self.call::<Empty>("StateChange", &change).await {
                    Err(CallError::Unimplemented) => Ok(()),
                    other => other.map(drop),
                }
            }
            other => other.map(drop),
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.link.is_closed()
    }

    pub(crate) fn close(&self) {
        self.link.close();
    }
}

/// The state in messages that fit.
fn parts(
    pods: Vec<PodSandbox>,
    containers: Vec<Container>,
    most: usize,
) -> Vec<SynchronizeRequest> {
    let mut parts = vec![SynchronizeRequest::default()];
    let mut size = 0;
    let mut room = |parts: &mut Vec<SynchronizeRequest>, length: usize| {
        if size > 0 && size + length > most {
            if let Some(last) = parts.last_mut() {
                last.more = true;
            }
            parts.push(SynchronizeRequest::default());
            size = 0;
        }
        size += length + 16;
    };
    for pod in pods {
        room(&mut parts, pod.encoded_len());
        if let Some(last) = parts.last_mut() {
            last.pods.push(pod);
        }
    }
    for container in containers {
        room(&mut parts, container.encoded_len());
        if let Some(last) = parts.last_mut() {
            last.containers.push(container);
        }
    }
    parts
}

fn check_name(index: &str, name: &str) -> Result<(), Unfit> {
    let show = |text: &str| text.chars().take(80).collect();
    if index.len() != 2 || !index.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Unfit::Index(show(index)));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > 128 || !name.chars().all(plain) {
        return Err(Unfit::Name(show(name)));
    }
    Ok(())
}

/// Answers the plugin's own calls, until it goes away.
async fn serve(
    mut incoming: mpsc::Receiver<Incoming>,
    registered: oneshot::Sender<RegisterPluginRequest>,
    state: Arc<dyn State>,
) {
    let mut registered = Some(registered);
    while let Some(call) = incoming.recv().await {
        let result = match call.method.as_str() {
            "RegisterPlugin" => match RegisterPluginRequest::decode(call.payload.as_slice()) {
                Ok(request) => match registered.take() {
                    Some(waiting) => {
                        // Whoever waited may have given up.
                        let _ = waiting.send(request);
                        Ok(Empty::default().encode_to_vec())
                    }
                    None => Err("it has registered before".to_owned()),
                },
                Err(error) => Err(error.to_string()),
            },
            "UpdateContainers" => match UpdateContainersRequest::decode(call.payload.as_slice()) {
                Ok(request) => {
                    let evict = request.evict.into_iter().map(|e| (e.container_id, e.reason));
                    let failed = state.update(request.update, evict.collect()).await;
                    Ok(UpdateContainersResponse { failed }.encode_to_vec())
                }
                Err(error) => Err(error.to_string()),
            },
            other => Err(format!("{RUNTIME} has no method {other:?}")),
        };
        call.reply.send(result).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_node_is_told_in_parts() {
        let pod = |n: usize| PodSandbox { id: format!("{n:0100}"), ..Default::default() };
        let container = |n: usize| Container { id: format!("{n:0100}"), ..Default::default() };
        let pods: Vec<_> = (0..50).map(pod).collect();
        let containers: Vec<_> = (0..100).map(container).collect();
        let parts = parts(pods.clone(), containers.clone(), 1000);
        assert!(parts.len() > 10);
        let (last, first) = parts.split_last().unwrap();
        assert!(first.iter().all(|part| part.more) && !last.more);
        assert!(parts.iter().all(|part| part.encoded_len() <= 1100));
        let found: Vec<_> = parts.iter().flat_map(|part| part.pods.clone()).collect();
        assert_eq!(found, pods);
        let found: Vec<_> = parts.iter().flat_map(|part| part.containers.clone()).collect();
        assert_eq!(found, containers);
        assert_eq!(super::parts(Vec::new(), Vec::new(), 1000).len(), 1, "an empty node is told");
    }

    #[test]
    fn names_are_an_index_and_a_word() {
        check_name("00", "logger").unwrap();
        for (index, name) in [("0", "a"), ("abc", "a"), ("1x", "a"), ("10", ""), ("10", "a/b")] {
            assert!(check_name(index, name).is_err(), "{index} {name}");
        }
    }

    #[test]
    fn the_mask_of_all_events_has_a_bit_for_each() {
        assert_eq!(ALL_EVENTS.count_ones(), 14);
    }
}
