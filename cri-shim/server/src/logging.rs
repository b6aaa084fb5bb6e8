//! The log, on standard error: text for people or JSON for machines.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::SystemTime;

use crate::config::{Log, LogFormat};
use crate::error::{Context, Error, Kind, Result};

/// Sets up the process's log. Under systemd the journal knows the time.
pub(crate) fn init(log: &Log, journal: bool) -> Result<()> {
    let filter = EnvFilter::try_new(&log.level)
        .kind(Kind::Invalid, || format!("log.level {:?}", log.level))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false);
    let done = match (log.format, journal) {
        (LogFormat::Json, _) => builder.json().with_timer(SystemTime).try_init(),
        (LogFormat::Text, true) => builder.without_time().try_init(),
        (LogFormat::Text, false) => builder.with_timer(SystemTime).try_init(),
    };
    done.map_err(|e| Error::internal(format!("set up the log: {e}")))
}
