//! `pinion`: the OCI runtime's command line, a drop-in for runc.
//!
//! One verb, one container, then the process ends. Errors go to standard error and to the
//! log file in the form clients of runc read back; the exit code is 1, or that of the
//! program for `run` and `exec` in the foreground.

mod args;
mod log;
mod verbs;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use pinion_cgroup::Driver;
use pinion_container::error::chain;

use args::{Cli, Verb};
use log::Log;

#[global_allocator]
static ALLOCATOR: pinion_sys::arena::Arena = pinion_sys::arena::Arena::new();

/// What a verb needs besides its own flags.
#[derive(Debug)]
struct Context {
    root: PathBuf,
    driver: Driver,
    log: Log,
}

/// The error of a verb: one of the container's life, or of the command line itself.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Container(#[from] pinion_container::Error),
    #[error("cgroup")]
    Cgroup(#[from] pinion_cgroup::Error),
    #[error("exec failed")]
    Exec(#[source] pinion_container::Error),
    #[error("{0}")]
    Usage(String),
    #[error("{what}")]
    Io {
        what: String,
        #[source]
        source: std::io::Error,
    },
}

const EXEC_FAILED: u8 = 255;

fn main() -> ExitCode {
    if enters_a_container()
        && let Err(error) = pinion_sys::exe::ensure_sealed()
    {
        eprintln!("pinion: cannot protect its own executable from the container: {error}");
        return ExitCode::FAILURE;
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors; runc answers wrong usage with 1.
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    let log = Log::new(&cli.global);
    let root = cli.global.root.unwrap_or_else(default_root);
    let driver = if cli.global.systemd_cgroup { Driver::Systemd } else { Driver::Cgroupfs };
    let context = Context { root, driver, log };
    match run(&context, cli.verb) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(255)),
        Err(error) => {
            context.log.error(&chain(&error));
            // As runc: callers tell a failed exec from a program that ended with 1.
            let code = if matches!(error, Error::Exec(_)) { EXEC_FAILED } else { 1 };
            ExitCode::from(code)
        }
    }
}

fn run(context: &Context, verb: Verb) -> Result<i32, Error> {
    match verb {
        Verb::Create(create) => verbs::create::run(context, &create),
        Verb::Start(id) => verbs::start::run(context, &id.id),
        Verb::Run(run) => verbs::run::run(context, &run),
        Verb::State(id) => verbs::state::run(context, &id.id),
        Verb::Kill(kill) => verbs::kill::run(context, &kill),
        Verb::Delete(delete) => verbs::delete::run(context, &delete),
        Verb::Exec(exec) => verbs::exec::run(context, &exec),
        Verb::List(list) => verbs::list::run(context, &list),
        Verb::Ps(ps) => verbs::ps::run(context, &ps),
        Verb::Pause(id) => verbs::pause::pause(context, &id.id),
        Verb::Resume(id) => verbs::pause::resume(context, &id.id),
        Verb::Update(update) => verbs::update::run(context, &update),
        Verb::Events(events) => verbs::events::run(context, &events),
        Verb::Spec(spec) => verbs::spec::run(&spec),
        Verb::Features => verbs::features::run(),
        Verb::Checkpoint(checkpoint) => verbs::checkpoint::run(context, &checkpoint),
        Verb::Restore(restore) => verbs::checkpoint::run_restore(context, &restore),
    }
}

/// Decided before the arguments are parsed, for sealing starts the program anew. A mere
/// operand of that name costs half a millisecond.
fn enters_a_container() -> bool {
    std::env::args_os().skip(1).any(|arg| arg == "create" || arg == "run" || arg == "exec")
}

fn default_root() -> PathBuf {
    let own = rustix::process::geteuid().is_root();
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(directory) if !own => PathBuf::from(directory).join("pinion/runtime"),
        _ => PathBuf::from("/run/pinion/runtime"),
    }
}
