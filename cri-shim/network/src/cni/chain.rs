//! A network's plugins, called in order for ADD and CHECK, in reverse for DEL.

use super::PluginResult;
use super::config::{NetworkList, PluginConfig};
use super::exec::{Call, Executor};
use super::record::Record;
use super::request;
use crate::error::NetworkError;
use serde_json::{Map, Value, json};

/// One pod's attachment and the means to work on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chain<'a> {
    pub(crate) executor: &'a Executor,
    pub(crate) pod: &'a str,
    pub(crate) record: &'a Record,
}

impl Chain<'_> {
    /// Each plugin gets the result of the one before; the last result is the chain's.
    pub(crate) async fn add(&self) -> Result<(Value, PluginResult), NetworkError> {
        let mut last: Option<(Value, PluginResult)> = None;
        for plugin in &self.record.network.plugins {
            let previous = last.as_ref().map(|(value, _)| value);
            let answer = self.call(plugin, "ADD", previous).await?;
            if answer.is_null() {
                continue; // a plugin that only looks leaves the result as it was
            }
            let result = PluginResult::parse(&answer).map_err(|reason| bad(plugin, reason))?;
            last = Some((answer, result));
        }
        match (last, self.record.network.plugins.last()) {
            (Some(last), _) => Ok(last),
            (None, Some(plugin)) => Err(bad(plugin, "no plugin returned a result".to_owned())),
            (None, None) => Err(NetworkError::BadOutput {
                plugin: String::new(),
                command: "ADD",
                reason: "the chain is empty".to_owned(),
            }),
        }
    }

    /// Calls every plugin, last first, whatever happens; the failures, if any.
    pub(crate) async fn del(&self) -> Vec<NetworkError> {
        let mut failures = Vec::new();
        for plugin in self.record.network.plugins.iter().rev() {
            let previous = self.previous();
            if let Err(error) = self.call(plugin, "DEL", previous).await {
                failures.push(error);
            }
        }
        failures
    }

    /// Asks every plugin whether the attachment is still as it was made.
    pub(crate) async fn check(&self) -> Result<(), NetworkError> {
        for plugin in &self.record.network.plugins {
            self.call(plugin, "CHECK", self.previous()).await?;
        }
        Ok(())
    }

    fn previous(&self) -> Option<&Value> {
        let has_check = self.record.network.version.has_check();
        self.record.result.as_ref().filter(|value| has_check && !value.is_null())
    }

    async fn call(
        &self,
        plugin: &PluginConfig,
        command: &'static str,
        previous: Option<&Value>,
    ) -> Result<Value, NetworkError> {
        let record = self.record;
        let stdin = request::stdin(&record.network, plugin, &record.capabilities, previous);
        let variables = [
            ("CNI_CONTAINERID", self.pod.to_owned()),
            ("CNI_NETNS", record.netns.to_string_lossy().into_owned()),
            ("CNI_IFNAME", record.interface.clone()),
            ("CNI_ARGS", record.args.clone()),
        ];
        let call = Call { plugin: &plugin.kind, command, variables: &variables, stdin: &stdin };
        self.executor.call(call).await
    }
}

fn bad(plugin: &PluginConfig, reason: String) -> NetworkError {
    NetworkError::BadOutput { plugin: plugin.kind.clone(), command: "ADD", reason }
}

/// Asks every plugin whether it could serve an ADD now (CNI 1.1).
pub(crate) async fn status(executor: &Executor, list: &NetworkList) -> Result<(), NetworkError> {
    for plugin in &list.plugins {
        let stdin = request::stdin(list, plugin, &Map::new(), None);
        let call = Call { plugin: &plugin.kind, command: "STATUS", variables: &[], stdin: &stdin };
        executor.call(call).await?;
    }
    Ok(())
}

/// Tells every plugin which pods still exist, so that it can free what others left (CNI 1.1).
/// All plugins are called; the failures, if any.
pub(crate) async fn gc(
    executor: &Executor,
    list: &NetworkList,
    valid: &[(String, String)],
) -> Vec<NetworkError> {
    let attachments: Vec<_> = valid
        .iter()
        .map(|(pod, interface)| json!({"containerID": pod, "ifname": interface}))
        .collect();
    let mut failures = Vec::new();
    for plugin in &list.plugins {
        let mut stdin = request::stdin(list, plugin, &Map::new(), None);
        if let Some(object) = stdin.as_object_mut() {
            object.insert("cni.dev/valid-attachments".to_owned(), json!(attachments));
        }
        let call = Call { plugin: &plugin.kind, command: "GC", variables: &[], stdin: &stdin };
        if let Err(error) = executor.call(call).await {
            failures.push(error);
        }
    }
    failures
}

/// The versions a plugin says it speaks (`VERSION`).
pub(crate) async fn versions(
    executor: &Executor,
    plugin: &str,
    list: &NetworkList,
) -> Result<Vec<String>, NetworkError> {
    let stdin = json!({"cniVersion": list.version});
    let call = Call { plugin, command: "VERSION", variables: &[], stdin: &stdin };
    let answer = executor.call(call).await?;
    let listed = answer.get("supportedVersions").and_then(Value::as_array);
    let listed = listed.ok_or_else(|| NetworkError::BadOutput {
        plugin: plugin.to_owned(),
        command: "VERSION",
        reason: "no supportedVersions".to_owned(),
    })?;
    Ok(listed.iter().filter_map(Value::as_str).map(str::to_owned).collect())
}
