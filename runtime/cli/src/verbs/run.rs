//! `run`: create, start and, in the foreground, wait and delete.

use pinion_container::create::{Created, create};
use pinion_container::delete::delete;
use pinion_container::foreground::{self, Signals};
use pinion_container::start::start;
use pinion_container::{Error as ContainerError, config, paths};

use super::create::{options, warn_all};
use crate::args::Run;
use crate::{Context, Error};

pub(crate) fn run(context: &Context, args: &Run) -> Result<i32, Error> {
    let id = &args.create.id;
    if let Some(path) = &args.create.console_socket {
        let console = paths::connect(path).map_err(ContainerError::from)?;
        let created = begin(context, args, Some(console))?;
        return match args.detach {
            true => Ok(0),
            false => attend(context, id, args.keep, &created, None),
        };
    }
    if args.detach {
        begin(context, args, None)?;
        return Ok(0);
    }
    if !args.no_subreaper {
        become_subreaper()?;
    }
    let signals = Signals::collect()?;
    if !wants_terminal(args)? {
        let created = begin(context, args, None)?;
        return attend(context, id, args.keep, &created, Some((signals, None)));
    }
    let (ours, theirs) = foreground::console_pair()?;
    let created = begin(context, args, Some(theirs))?;
    let master = foreground::receive_console(&ours)?;
    attend(context, id, args.keep, &created, Some((signals, Some(master))))
}

fn wants_terminal(args: &Run) -> Result<bool, Error> {
    let view = config::load_exec_view(&args.create.bundle.join("config.json"))
        .map_err(ContainerError::from)?;
    Ok(view.value.process.is_some_and(|process| process.terminal))
}

fn begin(
    context: &Context,
    args: &Run,
    console: Option<std::os::fd::OwnedFd>,
) -> Result<Created, Error> {
    let mut options = options(context, &args.create, console);
    options.line_feeds = args.create.console_socket.is_none();
    let created = create(options)?;
    created.warnings.iter().for_each(|warning| context.log.warn(warning));
    match start(&context.root, &args.create.id) {
        Ok(()) => Ok(created),
        Err(error) => {
            // Its first error is the one to tell.
            let _ = delete(&context.root, &args.create.id, true);
            let _ = created.child.wait();
            Err(error.into())
        }
    }
}

/// Inherits the processes the container leaves behind, to reap them.
pub(crate) fn become_subreaper() -> Result<(), Error> {
    let this = rustix::process::getpid();
    rustix::process::set_child_subreaper(Some(this))
        .map_err(|errno| Error::Io { what: "become a subreaper".into(), source: errno.into() })
}

/// Waits for the container's end and, unless it is to be kept, deletes it.
pub(crate) fn attend(
    context: &Context,
    id: &str,
    keep: bool,
    created: &Created,
    watch: Option<(Signals, Option<std::os::fd::OwnedFd>)>,
) -> Result<i32, Error> {
    let exit = match watch {
        Some((signals, terminal)) => foreground::attend(&created.child, &signals, terminal)?,
        None => created
            .child
            .wait()
            .map_err(|source| Error::Io { what: "wait for the container".into(), source })?,
    };
    if !keep {
        warn_all(context, &delete(&context.root, id, true)?);
    }
    Ok(exit.shell_code())
}
