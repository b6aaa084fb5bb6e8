//! `checkpoint` and `restore`

use std::path::Path;

use pinion_container::checkpoint::{CgroupsMode, CriuOptions, RestoreOptions, checkpoint, restore};
use pinion_container::foreground::{self, Signals};
use pinion_container::{Error as ContainerError, config, paths};

use super::create::warn_all;
use super::run::{attend, become_subreaper};
use crate::args::{Checkpoint, Criu, Restore};
use crate::{Context, Error};

/// Where images are without `--image-path`, as in runc.
const DEFAULT_IMAGES: &str = "checkpoint";

pub(crate) fn run(context: &Context, args: &Checkpoint) -> Result<i32, Error> {
    let mut options = options(&args.criu)?;
    options.parent =
        args.parent_path.as_deref().map(|path| check_parent(&options.images, path)).transpose()?;
    options.leave_running = args.leave_running;
    options.tcp_skip_in_flight = args.tcp_skip_in_flight;
    options.link_remap = args.link_remap;
    options.pre_dump = args.pre_dump;
    options.status_fd = check_status_fd(args.status_fd)?;
    options.page_server = args.page_server.as_deref().map(parse_server).transpose()?;
    warn_all(context, &checkpoint(&context.root, &args.id, &options)?);
    Ok(0)
}

pub(crate) fn run_restore(context: &Context, args: &Restore) -> Result<i32, Error> {
    let mut criu = options(&args.criu)?;
    criu.lsm_profile.clone_from(&args.lsm_profile);
    criu.lsm_mount_context.clone_from(&args.lsm_mount_context);
    let console = match &args.console_socket {
        Some(path) => Some(paths::connect(path).map_err(ContainerError::from)?),
        None => None,
    };
    if args.detach || console.is_some() {
        let restored = restore(&restore_options(context, args, &criu, console))?;
        return match args.detach {
            true => Ok(0),
            false => attend(context, &args.id, false, &restored, None),
        };
    }
    if !args.no_subreaper {
        become_subreaper()?;
    }
    let signals = Signals::collect()?;
    if !wants_terminal(&args.bundle)? {
        let restored = restore(&restore_options(context, args, &criu, None))?;
        return attend(context, &args.id, false, &restored, Some((signals, None)));
    }
    let (ours, theirs) = foreground::console_pair()?;
    let restored = restore(&restore_options(context, args, &criu, Some(theirs)))?;
    let master = foreground::receive_console(&ours)?;
    attend(context, &args.id, false, &restored, Some((signals, Some(master))))
}

fn restore_options<'a>(
    context: &'a Context,
    args: &'a Restore,
    criu: &'a CriuOptions,
    console: Option<std::os::fd::OwnedFd>,
) -> RestoreOptions<'a> {
    RestoreOptions {
        root: &context.root,
        id: &args.id,
        bundle: &args.bundle,
        driver: context.driver,
        pid_file: args.pid_file.as_deref(),
        console,
        criu,
    }
}

fn wants_terminal(bundle: &Path) -> Result<bool, Error> {
    let view = config::load_exec_view(&bundle.join("config.json")).map_err(ContainerError::from)?;
    Ok(view.value.process.is_some_and(|process| process.terminal))
}

fn options(args: &Criu) -> Result<CriuOptions, Error> {
    let images = args.image_path.clone().filter(|path| !path.as_os_str().is_empty());
    let set = |path: &Option<std::path::PathBuf>| {
        path.clone().filter(|path| !path.as_os_str().is_empty())
    };
    let mut empty = 0;
    for name in &args.empty_ns {
        match name.as_str() {
            "network" => empty |= libc::CLONE_NEWNET as u64,
            other => return Err(Error::Usage(format!("namespace {other:?} is not supported"))),
        }
    }
    Ok(CriuOptions {
        images: images.unwrap_or_else(|| DEFAULT_IMAGES.into()),
        work: set(&args.work_path),
        tcp_established: args.tcp_established,
        ext_unix_sk: args.ext_unix_sk,
        shell_job: args.shell_job,
        file_locks: args.file_locks,
        cgroups: CgroupsMode::parse(&args.manage_cgroups_mode)?,
        empty_namespaces: empty,
        auto_dedup: args.auto_dedup,
        lazy_pages: args.lazy_pages,
        ..CriuOptions::default()
    })
}

fn check_parent(images: &Path, parent: &Path) -> Result<std::path::PathBuf, Error> {
    if parent.is_absolute() {
        return Err(Error::Usage("--parent-path must be relative".into()));
    }
    let real = images.join(parent);
    match std::fs::metadata(&real) {
        Ok(found) if found.is_dir() => Ok(parent.to_owned()),
        Ok(_) => Err(Error::Usage(format!(
            "invalid --parent-path: stat {}: not a directory",
            real.display()
        ))),
        Err(source) => Err(Error::Io {
            what: format!("invalid --parent-path: stat {}", real.display()),
            source,
        }),
    }
}

fn check_status_fd(number: i32) -> Result<Option<i32>, Error> {
    if number < 0 {
        return Ok(None);
    }
    let bad = |why: &str| Error::Usage(format!("invalid --status-fd argument {number}: {why}"));
    let fd = pinion_sys::fd::borrow(number).ok_or_else(|| bad("bad file descriptor"))?;
    let flags = rustix::fs::fcntl_getfl(fd).map_err(|errno| bad(&errno.to_string()))?;
    let writable = flags.intersects(rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::RDWR);
    if writable { Ok(Some(number)) } else { Err(bad("not writable")) }
}

fn parse_server(text: &str) -> Result<(String, u16), Error> {
    let usage = || Error::Usage("Use --page-server ADDRESS:PORT to specify page server".into());
    let (address, port) = text.rsplit_once(':').ok_or_else(usage)?;
    let address = address.trim_start_matches('[').trim_end_matches(']');
    if address.is_empty() || port.is_empty() {
        return Err(usage());
    }
    let port = port.parse().map_err(|_number| Error::Usage("Invalid port number".into()))?;
    Ok((address.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_servers_are_an_address_and_a_port() {
        assert_eq!(parse_server("10.0.0.1:80").unwrap(), ("10.0.0.1".into(), 80));
        assert_eq!(parse_server("[::1]:80").unwrap(), ("::1".into(), 80));
        for bad in ["", "1", ":1", "a:", "a:b", "a:70000"] {
            assert!(parse_server(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_parent_is_a_directory_beside_the_images() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("parent")).unwrap();
        std::fs::create_dir(directory.path().join("images")).unwrap();
        std::fs::write(directory.path().join("file"), "").unwrap();
        let images = directory.path().join("images");
        assert!(check_parent(&images, Path::new("../parent")).is_ok());
        for bad in ["/parent", "../none", "../file"] {
            assert!(check_parent(&images, Path::new(bad)).is_err(), "{bad}");
        }
    }
}
