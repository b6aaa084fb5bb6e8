//! `pinion-agent`: the first process of a guest.
//!
//! ```text
//!   kernel ──▶ boot: mounts, modules, a root of its own
//!                │
//!                ├─ main thread:  the monitor's core, as on a host; as PID 1 it reaps orphans
//!                └─ bridge thread: channel to the host ⇄ clients of the core, one per call
//! ```
//!
//! The host's monitor speaks to the core through the bridge: the same verbs, with streams in
//! place of descriptors. When the channel or the core is gone the machine is switched off:
//! without its host a guest has no purpose.

mod boot;
mod bridge;
mod conduct;
mod error;
mod rootfs;
mod setup;
mod share;
mod usage;

use std::io::Write;
use std::process::ExitCode;

use pinion_monitor::daemon::OomScore;
use pinion_monitor::journal::Journal;
use pinion_monitor::options::Options;
use pinion_monitor::pod::Pod;

use crate::error::{Context, Error};

/// The core's directory, with its socket.
pub(crate) const CORE: &str = "/run/pinion/core";
/// The OCI runtime.
const RUNTIME: &str = "/bin/pinion";
/// The runtime's state.
const RUNTIME_ROOT: &str = "/run/pinion/runtime";

fn main() -> ExitCode {
    if !rustix::process::getpid().is_init() {
        let version = env!("CARGO_PKG_VERSION");
        let text = format!(
            "pinion-agent {version}\nIt is the first process of a guest and does nothing elsewhere.\n"
        );
        let asked = std::env::args().nth(1).is_some_and(|argument| argument == "--version");
        drop(std::io::stdout().write_all(text.as_bytes()));
        return if asked { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    if let Err(error) = run() {
        complain(&error);
    }
    boot::power_off();
    ExitCode::FAILURE
}

fn run() -> Result<(), Error> {
    boot::prepare()?;
    let channel = boot::open_channel()?;
    std::fs::create_dir_all(CORE).context(|| format!("create {CORE}"))?;
    let log = format!("{CORE}/monitor.log");
    let mut journal = Journal::open(log.as_ref()).context(|| format!("open {log}"))?;
    let shield = OomScore::shield(&mut journal);
    let options = Options {
        pod: "guest".into(),
        dir: CORE.into(),
        runtime: RUNTIME.into(),
        runtime_root: RUNTIME_ROOT.into(),
        systemd_cgroup: false,
        foreground: true,
        machine: None,
    };
    // Blocks the signals it waits for, so before there is another thread.
    let core = Pod::new(options, journal, shield)
        .map_err(|error| Error::Failed(format!("start the core: {error}")))?;
    let bridge = move || {
        if let Err(error) = bridge::run(channel) {
            complain(&error);
        }
        boot::power_off();
    };
    std::thread::Builder::new()
        .name("bridge".into())
        .spawn(bridge)
        .context(|| "start the bridge".into())?;
    core.run().map_err(|error| Error::Failed(format!("the core ended: {error}")))
}

/// The last words, on the console.
fn complain(error: &Error) {
    let mut line = format!("pinion-agent: {error}");
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        line.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    drop(writeln!(std::io::stderr(), "{line}"));
}
