//! Whether pods can be attached, and by whom.

use crate::cni::chain;
use crate::cni::config::{self, NetworkList};
use crate::engine::Engine;
use crate::error;
use crate::network::Network;
use std::sync::PoisonError;

/// Whether pods can be attached; the `NetworkReady` condition of CRI's Status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkStatus {
    /// Pods can be attached.
    pub ready: bool,
    /// One word for machines; empty when ready with a configured network.
    pub reason: String,
    /// A sentence for people: what is wrong and where.
    pub message: String,
    /// No configuration: pods get loopback and nothing else.
    pub loopback_only: bool,
    /// Who attaches pods; `None` while nobody does.
    pub engine: Option<Engine>,
}

impl Network {
    /// Whether an ADD would work now: a sound configuration, every binary in place and
    /// speaking the version, and no plugin reporting trouble (STATUS, CNI 1.1).
    pub async fn status(&self) -> NetworkStatus {
        let not_ready = |reason: &str, message: String| NetworkStatus {
            ready: false,
            reason: reason.to_owned(),
            message,
            loopback_only: false,
            engine: None,
        };
        let shared = &self.shared;
        let list = match config::load(&shared.conf_dir) {
            Ok(Some((_, list))) => list,
            Ok(None) => {
                let place = shared.conf_dir.display();
                let message = format!("no CNI configuration in {place}");
                if !shared.loopback_only {
                    return not_ready("NetworkPluginNotReady", message);
                }
                return NetworkStatus {
                    ready: true,
                    reason: "LoopbackOnly".to_owned(),
                    message: format!("{message}: pods get loopback only"),
                    loopback_only: true,
                    engine: None,
                };
            }
            Err(error) => return not_ready("NetworkConfigInvalid", error::chain(&error)),
        };
        let engine = match shared.choice.plan(&list) {
            Ok(_) => Engine::Native,
            Err(reason) => Engine::Plugins { reason },
        };
        if engine == Engine::Native {
            return ready(engine);
        }
        for plugin in &list.plugins {
            for binary in [Some(plugin.kind.as_str()), plugin.ipam()].into_iter().flatten() {
                if let Err(error) = shared.executor.find(binary) {
                    return not_ready("NetworkPluginMissing", error::chain(&error));
                }
            }
            if let Some(message) = self.mute(&plugin.kind, &list).await {
                return not_ready("NetworkPluginVersion", message);
            }
        }
        if list.version.has_status()
            && let Err(error) = chain::status(&shared.executor, &list).await
        {
            return not_ready("NetworkPluginNotReady", error::chain(&error));
        }
        ready(engine)
    }

    /// Whether the choice is another one than that of the last call: for a log that says each
    /// change once.
    pub fn is_news(&self, engine: &Engine) -> bool {
        self.shared.choice.report(engine)
    }

    /// Why a plugin cannot talk with this network's version, if it cannot.
    async fn mute(&self, plugin: &str, list: &NetworkList) -> Option<String> {
        let path = self.shared.executor.find(plugin).ok()?;
        let changed = std::fs::metadata(&path).and_then(|meta| meta.modified()).ok()?;
        let known = {
            let spoken = self.shared.spoken.lock().unwrap_or_else(PoisonError::into_inner);
            spoken.get(&path).filter(|(then, _)| *then == changed).map(|(_, list)| list.clone())
        };
        let versions = match known {
            Some(versions) => versions,
            None => match chain::versions(&self.shared.executor, plugin, list).await {
                Ok(versions) => {
                    let mut spoken =
                        self.shared.spoken.lock().unwrap_or_else(PoisonError::into_inner);
                    spoken.insert(path, (changed, versions.clone()));
                    versions
                }
                Err(error) => return Some(error::chain(&error)),
            },
        };
        let wanted = list.version.as_str();
        (!versions.iter().any(|version| version == wanted)).then(|| {
            let all = versions.join(", ");
            format!("CNI plugin {plugin:?} speaks {all}, network {:?} wants {wanted}", list.name)
        })
    }
}

fn ready(engine: Engine) -> NetworkStatus {
    NetworkStatus {
        ready: true,
        reason: String::new(),
        message: String::new(),
        loopback_only: false,
        engine: Some(engine),
    }
}
