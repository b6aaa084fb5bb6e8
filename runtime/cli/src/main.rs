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
    /// Whether the caller named it.
    root_is_given: bool,
    /// None when the container is to stay in the caller's cgroup.
    driver: Option<Driver>,
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
    Exec(#[source] Box<Error>),
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
    let root_is_given = cli.global.root.is_some();
    let driver = cli.global.cgroup_driver();
    let root = cli.global.root.unwrap_or_else(default_root);
    let context = Context { root, root_is_given, driver, log };
    let arguments = || std::env::args_os().skip(1).collect::<Vec<_>>();
    context.log.debug(|| format!("asked for {:?}", arguments()));
    let outcome = run(&context, cli.verb);
    context.log.debug(|| match &outcome {
        Ok(code) => format!("ended with {code}"),
        Err(error) => format!("failed: {}", chain(error)),
    });
    match outcome {
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

/// Who the runtime is, as far as it decides where containers are kept.
#[derive(Clone, Copy, Debug)]
struct Caller {
    root: bool,
    first_user_namespace: bool,
    /// `USER=root`: root in a container of its own, who has `/run` for itself.
    named_root: bool,
    /// podman and buildah say so when they work for a plain user (containers/storage, unshare).
    configured_by_podman: bool,
}

impl Caller {
    fn this() -> Self {
        Self {
            root: rustix::process::geteuid().is_root(),
            first_user_namespace: pinion_sys::userns::is_first(),
            named_root: std::env::var_os("USER").is_some_and(|name| name == "root"),
            configured_by_podman: std::env::var_os("_CONTAINERS_USERNS_CONFIGURED")
                .is_some_and(|value| !value.is_empty()),
        }
    }

    /// As runc: `XDG_RUNTIME_DIR` is for plain users, who are root in a user namespace when a
    /// client calls the runtime for them.
    fn has_own_runtime_directory(self) -> bool {
        !self.root || !self.first_user_namespace && (!self.named_root || self.configured_by_podman)
    }
}

fn default_root() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|directory| !directory.is_empty()) {
        Some(directory) if Caller::this().has_own_runtime_directory() => {
            PathBuf::from(directory).join("pinion/runtime")
        }
        _ => PathBuf::from("/run/pinion/runtime"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_user_has_a_place_of_its_own_also_as_root_of_a_user_namespace() {
        let host = Caller {
            root: true,
            first_user_namespace: true,
            named_root: false,
            configured_by_podman: false,
        };
        assert!(!host.has_own_runtime_directory());
        assert!(Caller { root: false, ..host }.has_own_runtime_directory());
        let inside = Caller { first_user_namespace: false, ..host };
        assert!(inside.has_own_runtime_directory());
        let named = Caller { named_root: true, ..inside };
        assert!(!named.has_own_runtime_directory());
        assert!(Caller { configured_by_podman: true, ..named }.has_own_runtime_directory());
    }
}
