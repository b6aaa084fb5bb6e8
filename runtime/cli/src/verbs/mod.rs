//! One file per verb: from flags to the library's call to output.

pub(crate) mod checkpoint;
pub(crate) mod create;
pub(crate) mod delete;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod features;
pub(crate) mod kill;
pub(crate) mod list;
pub(crate) mod pause;
pub(crate) mod ps;
pub(crate) mod run;
pub(crate) mod spec;
pub(crate) mod start;
pub(crate) mod state;
pub(crate) mod update;

use std::io::Write;

use serde::Serialize;

use crate::Error;

/// Prints one JSON document; a closed pipe is the reader's choice.
fn print_json(value: &impl Serialize, pretty: bool) -> Result<(), Error> {
    let text = if pretty { serde_json::to_vec_pretty(value) } else { serde_json::to_vec(value) };
    let failed = |source| Error::Io { what: "write to standard output".into(), source };
    let mut text = text.map_err(|error| failed(error.into()))?;
    text.push(b'\n');
    match std::io::stdout().write_all(&text) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(failed),
    }
}
