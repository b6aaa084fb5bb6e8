//! The record of an attachment: what DEL needs, on disk before ADD starts.
//!
//! One file per pod, replaced atomically. It is a hint: when a file is damaged, DEL goes on
//! with the configuration in force and the pod as the caller knows it.

use super::PluginResult;
use super::config::NetworkList;
use crate::error::NetworkError;
use crate::guard::{Claims, tables_of};
use crate::pod::Attachment;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::io;
use std::path::{Path, PathBuf};

/// What was, or is about to be, attached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The configuration ADD used.
    pub(crate) network: NetworkList,
    /// Name of the interface in the pod.
    pub(crate) interface: String,
    /// `CNI_NETNS` of ADD.
    pub(crate) netns: PathBuf,
    /// `CNI_ARGS` of ADD.
    pub(crate) args: String,
    /// Capability data of ADD.
    pub(crate) capabilities: Map<String, Value>,
    /// The chain's result as the last plugin printed it; `None` until ADD has succeeded.
    pub(crate) result: Option<Value>,
    /// The same, digested.
    pub(crate) attachment: Option<Attachment>,
}

impl Record {
    /// Notes what ADD returned.
    ///
    /// # Errors
    /// A result that gives the pod no address.
    pub(crate) fn attached(
        &mut self,
        value: Value,
        result: PluginResult,
    ) -> Result<Attachment, NetworkError> {
        let attachment = Attachment::from_result(&self.network.name, &self.interface, result);
        self.result = Some(value);
        if attachment.ips.is_empty() {
            let last = self.network.plugins.last().map(|plugin| plugin.kind.clone());
            return Err(NetworkError::BadOutput {
                plugin: last.unwrap_or_default(),
                command: "ADD",
                reason: format!("the result gives {} no address", self.interface),
            });
        }
        self.attachment = Some(attachment.clone());
        Ok(attachment)
    }
}

impl Record {
    /// What of the node's network is this attachment's: see [`crate::guard`].
    pub(crate) fn claims(&self, pod: &str, last: bool) -> Claims {
        let mut claims = Claims { last, ..Default::default() };
        if let Some(attachment) = &self.attachment {
            claims.ips.clone_from(&attachment.ips);
            let outside = attachment.result.interfaces.iter().filter(|i| i.sandbox.is_empty());
            claims.links.extend(outside.map(|interface| interface.name.clone()));
        }
        claims.links.insert(crate::native::host_name(&self.network.name, pod, &self.interface));
        for plugin in self.network.plugins.iter().filter(|plugin| plugin.kind == "bridge") {
            let bridge = plugin.object.get("bridge").and_then(Value::as_str);
            claims.links.insert(bridge.unwrap_or("cni0").to_owned());
        }
        claims.tables = tables_of(self.network.plugins.iter().map(|p| p.kind.as_str()));
        claims
    }
}

/// What is found under a pod's name.
#[derive(Debug, PartialEq)]
pub(crate) enum Stored {
    /// The pod is not attached, or its record was deleted.
    Missing,
    /// The pod was attached, but how is lost.
    Damaged,
    /// The record.
    Sound(Box<Record>),
}

/// The directory of records.
#[derive(Debug, Clone)]
pub(crate) struct Records {
    pub(crate) dir: PathBuf,
}

impl Records {
    fn path(&self, pod: &str) -> PathBuf {
        self.dir.join(format!("{pod}.json"))
    }

    /// Writes a record that outlives this process and not the power: for chains whose DEL can
    /// do without it, as the built-in ones can. Blocks for microseconds.
    pub(crate) fn write_volatile(&self, pod: &str, record: &Record) -> Result<(), NetworkError> {
        let path = self.path(pod);
        let written = serde_json::to_vec(record).map_err(io::Error::other).and_then(|bytes| {
            match pinion_sys::atomic_file::write_volatile(&path, &bytes, 0o600) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    std::fs::create_dir_all(&self.dir)?;
                    pinion_sys::atomic_file::write_volatile(&path, &bytes, 0o600)
                }
                outcome => outcome,
            }
        });
        written.map_err(|source| failed("write", &path, source))
    }

    /// Returns when the record is durable; the wait for the disk is not the caller's thread's.
    pub(crate) async fn write(&self, pod: &str, record: &Record) -> Result<(), NetworkError> {
        let (dir, path) = (self.dir.clone(), self.path(pod));
        let bytes = serde_json::to_vec(record)
            .map_err(|error| failed("write", &path, io::Error::other(error)))?;
        let target = path.clone();
        let written = tokio::task::spawn_blocking(move || {
            std::fs::create_dir_all(dir)?;
            pinion_sys::atomic_file::write(&target, &bytes, 0o600)
        });
        let written = written.await.map_err(io::Error::other).and_then(|outcome| outcome);
        written.map_err(|source| failed("write", &path, source))
    }

    /// The pod's record. A copy of a damaged one is kept as `<pod>.json.bad` for inspection.
    pub(crate) fn read(&self, pod: &str) -> Result<Stored, NetworkError> {
        let path = self.path(pod);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Stored::Missing),
            Err(source) => return Err(failed("read", &path, source)),
        };
        match serde_json::from_slice(&bytes) {
            Ok(record) => Ok(Stored::Sound(Box::new(record))),
            Err(_unreadable) => {
                let aside = self.dir.join(format!("{pod}.json.bad"));
                std::fs::write(&aside, bytes).map_err(|source| failed("write", &aside, source))?;
                Ok(Stored::Damaged)
            }
        }
    }

    pub(crate) fn remove(&self, pod: &str) -> Result<(), NetworkError> {
        let path = self.path(pod);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove", &path, error))
            }
            _ => Ok(()),
        }
    }

    /// Removes what a process that was killed while writing has left beside the records.
    pub(crate) fn sweep(&self) {
        for dir in [self.dir.clone(), self.dir.join("results")] {
            let Ok(entries) = std::fs::read_dir(dir) else { continue };
            for entry in entries.flatten() {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                if name.starts_with('.') && name.ends_with(".tmp") {
                    let _ = std::fs::remove_file(entry.path());
                }
            }
        }
    }

    /// Pods with a record, in order.
    pub(crate) fn pods(&self) -> Result<Vec<String>, NetworkError> {
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(failed("read", &self.dir, source)),
        };
        let mut pods: Vec<_> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                Some(name.strip_suffix(".json")?.to_owned())
            })
            .collect();
        pods.sort();
        Ok(pods)
    }
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> NetworkError {
    NetworkError::Record { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cni::Version;

    fn record() -> Record {
        Record {
            network: NetworkList {
                version: Version::V1_0_0,
                name: "net".to_owned(),
                disable_check: false,
                plugins: Vec::new(),
            },
            interface: "eth0".to_owned(),
            netns: "/run/ns".into(),
            args: "A=1".to_owned(),
            capabilities: Map::new(),
            result: None,
            attachment: None,
        }
    }

    #[tokio::test]
    async fn records_are_kept_replaced_listed_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records { dir: dir.path().join("cni") };
        assert!(records.pods().unwrap().is_empty());
        assert_eq!(records.read("p1").unwrap(), Stored::Missing);
        records.write("p1", &record()).await.unwrap();
        let done = Record { args: "B=2".to_owned(), ..record() };
        records.write("p1", &done).await.unwrap();
        assert_eq!(records.pods().unwrap(), ["p1"]);
        assert_eq!(records.read("p1").unwrap(), Stored::Sound(Box::new(done)));
        records.remove("p1").unwrap();
        records.remove("p1").unwrap();
        assert!(records.pods().unwrap().is_empty());
    }

    #[test]
    fn a_damaged_record_is_told_apart_and_kept_for_inspection() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records { dir: dir.path().to_owned() };
        std::fs::write(dir.path().join("p1.json"), "{\"network\":").unwrap();
        assert_eq!(records.read("p1").unwrap(), Stored::Damaged);
        assert!(dir.path().join("p1.json.bad").exists());
        assert_eq!(records.pods().unwrap(), ["p1"], "still to be detached");
    }
}
