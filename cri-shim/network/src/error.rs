//! What can go wrong between a pod and its network.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A failed network operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// No network configuration, and loopback-only pods are not allowed.
    #[error("no CNI configuration in {}", conf_dir.display())]
    NotConfigured {
        /// Where it was sought.
        conf_dir: PathBuf,
    },
    /// A configuration file that cannot be read.
    #[error("read CNI configuration {}", path.display())]
    ReadConfig {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A configuration file that is no CNI configuration.
    #[error("CNI configuration {}: {reason}", path.display())]
    BadConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column for JSON errors.
        reason: String,
    },
    /// The pod's own data cannot be passed to plugins.
    #[error("{field} {value:?}: {reason}")]
    BadPod {
        /// Which datum.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A plugin that is nowhere.
    #[error("CNI plugin {plugin:?} not found in {}", join(dirs))]
    PluginMissing {
        /// `type` of the configuration.
        plugin: String,
        /// Where it was sought.
        dirs: Vec<PathBuf>,
    },
    /// A plugin that cannot be run at all.
    #[error("run CNI plugin {}", path.display())]
    PluginStart {
        /// The binary.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A plugin that said no.
    #[error("CNI plugin {plugin:?} {command}: {message} (code {code}){}", tail(details))]
    Plugin {
        /// `type` of the configuration.
        plugin: String,
        /// ADD, DEL, CHECK, STATUS, VERSION or GC.
        command: &'static str,
        /// Code of its error object, or its exit status when it gave none.
        code: u32,
        /// Its message.
        message: String,
        /// Its details, or what it wrote to standard error.
        details: String,
    },
    /// A plugin that did not finish; its process group was killed.
    #[error("CNI plugin {plugin:?} {command}: no answer within {after:?}")]
    Timeout {
        /// `type` of the configuration.
        plugin: String,
        /// The verb.
        command: &'static str,
        /// The deadline.
        after: Duration,
    },
    /// A plugin whose output is not a result.
    #[error("CNI plugin {plugin:?} {command}: {reason}")]
    BadOutput {
        /// `type` of the configuration.
        plugin: String,
        /// The verb.
        command: &'static str,
        /// What is wrong, with the beginning of the output.
        reason: String,
    },
    /// A step of a chain that is done without its plugins.
    #[error("built-in {command}: {step}")]
    Native {
        /// ADD, DEL, CHECK or GC.
        command: &'static str,
        /// What was tried, with its arguments.
        step: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// CHECK found the attachment changed.
    #[error("pod {pod} is no longer attached to network {network:?} as it was: {what}")]
    Changed {
        /// Pod sandbox id.
        pod: String,
        /// Network name.
        network: String,
        /// The first difference.
        what: String,
    },
    /// ADD failed; what had been done was taken back as far as possible.
    #[error("attach pod {pod} to network {network:?}{}", undone(cleanup))]
    Add {
        /// Pod sandbox id.
        pod: String,
        /// Network name.
        network: String,
        /// What failed.
        #[source]
        source: Box<NetworkError>,
        /// What could not be taken back; the record stays, so DEL can be retried.
        cleanup: Option<Box<NetworkError>>,
    },
    /// Some plugins' DEL failed; all were called, the record stays.
    #[error("detach pod {pod} from network {network:?}: {}", list(failures))]
    Del {
        /// Pod sandbox id.
        pod: String,
        /// Network name.
        network: String,
        /// One per plugin.
        failures: Vec<NetworkError>,
    },
    /// The record of an attachment cannot be kept.
    #[error("{action} attachment record {}", path.display())]
    Record {
        /// `write`, `read` or `remove`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A namespace operation.
    #[error("{action}")]
    Namespace {
        /// What was tried: `unshare net,ipc,uts`, `write sysctl net/ipv4/x = "1"`.
        action: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn join(dirs: &[PathBuf]) -> String {
    dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(":")
}

fn tail(details: &str) -> String {
    if details.is_empty() { String::new() } else { format!(": {details}") }
}

fn undone(cleanup: &Option<Box<NetworkError>>) -> String {
    match cleanup {
        None => String::new(),
        Some(error) => format!(" (taking it back failed too: {})", chain(error.as_ref())),
    }
}

fn list(failures: &[NetworkError]) -> String {
    failures.iter().map(|error| chain(error)).collect::<Vec<_>>().join("; ")
}

/// The whole chain of an error on one line, for `NetworkStatus::message`.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    text
}
