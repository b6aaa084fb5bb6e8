//! `create`

use std::os::fd::OwnedFd;

use pinion_container::create::{CreateOptions, create};
use pinion_container::{Error as ContainerError, error, paths};

use crate::args::Create;
use crate::{Context, Error};

pub(crate) fn run(context: &Context, args: &Create) -> Result<i32, Error> {
    let console = match &args.console_socket {
        Some(path) => Some(paths::connect(path).map_err(ContainerError::from)?),
        None => None,
    };
    let created = create(options(context, args, console))?;
    created.warnings.iter().for_each(|warning| context.log.warn(warning));
    Ok(0)
}

/// The library's options for these flags.
pub(crate) fn options<'a>(
    context: &'a Context,
    args: &'a Create,
    console: Option<OwnedFd>,
) -> CreateOptions<'a> {
    CreateOptions {
        root: &context.root,
        id: &args.id,
        bundle: &args.bundle,
        driver: context.driver,
        pid_file: args.pid_file.as_deref(),
        console,
        line_feeds: false,
        pidfd_socket: args.pidfd_socket.as_deref(),
        no_pivot: args.no_pivot,
        no_new_keyring: args.no_new_keyring,
        preserve_fds: args.preserve_fds,
    }
}

/// Logs errors that are not fatal.
pub(crate) fn warn_all(context: &Context, errors: &[ContainerError]) {
    errors.iter().for_each(|problem| context.log.warn(&error::chain(problem)));
}
