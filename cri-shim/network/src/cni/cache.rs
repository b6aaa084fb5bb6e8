//! The cached result of an attachment, where libcni keeps it: `<dir>/results/<network>-<id>-<if>`.
//!
//! It is written for others (`cnitool`, plugins and daemons that look there) and never read
//! here. Format: `cniCacheV1` of libcni 1.x. A file that cannot be written is no reason to
//! refuse a pod a network, so the failure is the caller's to report.

use super::record::Record;
use base64::Engine;
use serde_json::{Value, json};
use std::io;
use std::path::{Path, PathBuf};

fn path(dir: &Path, pod: &str, record: &Record) -> PathBuf {
    dir.join("results").join(format!("{}-{pod}-{}", record.network.name, record.interface))
}

/// What libcni would have written after ADD.
fn content(pod: &str, record: &Record) -> Value {
    let plugins = record.network.plugins.iter().map(|p| Value::Object(p.object.clone()));
    let list = json!({
        "cniVersion": record.network.version, "name": record.network.name,
        "disableCheck": record.network.disable_check,
        "plugins": plugins.collect::<Vec<_>>(),
    });
    let arguments = record.args.split(';').filter_map(|pair| pair.split_once('='));
    json!({
        "kind": "cniCacheV1",
        "containerId": pod,
        "config": base64::engine::general_purpose::STANDARD.encode(list.to_string()),
        "ifName": record.interface,
        "networkName": record.network.name,
        "netns": record.netns,
        "cniArgs": arguments.map(|(name, value)| json!([name, value])).collect::<Vec<_>>(),
        "capabilityArgs": record.capabilities,
        "result": record.result,
    })
}

/// Writes the file; it need not survive a loss of power, as libcni's does not.
pub(crate) fn write(dir: &Path, pod: &str, record: &Record) -> io::Result<()> {
    let path = path(dir, pod, record);
    let bytes = content(pod, record).to_string().into_bytes();
    match pinion_sys::atomic_file::write_volatile(&path, &bytes, 0o600) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir_all(dir.join("results"))?;
            pinion_sys::atomic_file::write_volatile(&path, &bytes, 0o600)
        }
        outcome => outcome,
    }
}

/// Removes the file; done when there is none.
pub(crate) fn remove(dir: &Path, pod: &str, record: &Record) -> io::Result<()> {
    match std::fs::remove_file(path(dir, pod, record)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
