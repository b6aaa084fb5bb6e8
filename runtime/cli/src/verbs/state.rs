//! `state`

use std::collections::HashMap;
use std::path::Path;

use pinion_container::state::{Record, StateDir};
use pinion_container::status::Status;
use serde::Serialize;

use super::print_json;
use crate::{Context, Error};

/// A container as runc prints it in `state` and `list`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Listed<'a> {
    oci_version: &'a str,
    pub(crate) id: &'a str,
    pub(crate) pid: i32,
    pub(crate) status: Status,
    pub(crate) bundle: &'a Path,
    rootfs: &'a Path,
    pub(crate) created: &'a str,
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    annotations: &'a HashMap<String, String>,
    pub(crate) owner: String,
}

impl<'a> Listed<'a> {
    pub(crate) fn new(record: &'a Record, status: Status, owner: String) -> Self {
        let pid = match (record.init, status) {
            (Some(init), status) if status != Status::Stopped => init.pid,
            _ => 0,
        };
        Self {
            oci_version: &record.oci_version,
            id: &record.id,
            pid,
            status,
            bundle: &record.bundle,
            rootfs: &record.rootfs,
            created: &record.created,
            annotations: &record.annotations,
            owner,
        }
    }
}

pub(crate) fn run(context: &Context, id: &str) -> Result<i32, Error> {
    let directory = StateDir::of(&context.root, id)?;
    let record = directory.load()?;
    let status = directory.status(&record);
    print_json(&Listed::new(&record, status, String::new()), true)?;
    Ok(0)
}
