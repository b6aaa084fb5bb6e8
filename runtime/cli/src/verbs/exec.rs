//! `exec`

use oci_spec::runtime::Capability;
use pinion_container::config::{ExecView, Process};
use pinion_container::exec::{ExecOptions, Executed, exec, template};
use pinion_container::foreground::{self, Signals};
use pinion_container::{Error as ContainerError, capability, config, paths};

use crate::args::Exec;
use crate::{Context, Error};

pub(crate) fn run(context: &Context, args: &Exec) -> Result<i32, Error> {
    execute(context, args).map_err(|error| Error::Exec(Box::new(error)))
}

fn execute(context: &Context, args: &Exec) -> Result<i32, Error> {
    let view = template(&context.root, &args.id)?;
    let process = process(args, &view)?;
    let terminal = process.terminal;
    if let Some(path) = &args.console_socket {
        if !terminal {
            return Err(Error::Usage(
                "cannot use console socket if runc will not detach or allocate tty".into(),
            ));
        }
        let console = paths::connect(path).map_err(ContainerError::from)?;
        let executed = begin(context, args, &process, &view, Some(console))?;
        return finish(args, &executed, None);
    }
    if args.detach {
        if terminal {
            return Err(Error::Usage(
                "cannot allocate tty if runc will detach without setting console socket".into(),
            ));
        }
        begin(context, args, &process, &view, None)?;
        return Ok(0);
    }
    let signals = Signals::collect()?;
    if !terminal {
        let executed = begin(context, args, &process, &view, None)?;
        return finish(args, &executed, Some((signals, None)));
    }
    let (ours, theirs) = foreground::console_pair()?;
    let executed = begin(context, args, &process, &view, Some(theirs))?;
    let master = foreground::receive_console(&ours)?;
    finish(args, &executed, Some((signals, Some(master))))
}

fn begin(
    context: &Context,
    args: &Exec,
    process: &Process,
    view: &ExecView,
    console: Option<std::os::fd::OwnedFd>,
) -> Result<Executed, Error> {
    let options = ExecOptions {
        root: &context.root,
        id: &args.id,
        pid_file: args.pid_file.as_deref(),
        console,
        line_feeds: args.console_socket.is_none(),
        pidfd_socket: args.pidfd_socket.as_deref(),
        cgroups: &args.cgroup,
        ignore_paused: args.ignore_paused,
        no_new_keyring: args.no_new_keyring,
        preserve_fds: args.preserve_fds,
    };
    let executed = exec(&options, process, view)?;
    executed.warnings.iter().for_each(|warning| context.log.warn(warning));
    Ok(executed)
}

fn finish(
    args: &Exec,
    executed: &Executed,
    watch: Option<(Signals, Option<std::os::fd::OwnedFd>)>,
) -> Result<i32, Error> {
    if args.detach {
        return Ok(0);
    }
    let exit = match watch {
        Some((signals, terminal)) => foreground::attend(&executed.child, &signals, terminal)?,
        None => executed
            .child
            .wait()
            .map_err(|source| Error::Io { what: "wait for the process".into(), source })?,
    };
    Ok(exit.shell_code())
}

/// The process to execute: the file's, or the container's own changed by the flags.
fn process(args: &Exec, view: &ExecView) -> Result<Process, Error> {
    if let Some(path) = &args.process {
        return Ok(config::load_process(path).map_err(ContainerError::from)?.value);
    }
    let missing = || Error::Usage("process args cannot be empty".into());
    if args.command.is_empty() {
        return Err(missing());
    }
    let mut process = view.process.clone().ok_or_else(missing)?;
    process.args = Some(args.command.clone());
    process.terminal = args.tty;
    process.console_size = None;
    if let Some(cwd) = &args.cwd {
        process.cwd.clone_from(cwd);
    }
    process.env.get_or_insert_default().extend(args.env.iter().cloned());
    if args.process_label.is_some() {
        process.selinux_label.clone_from(&args.process_label);
    }
    if args.apparmor.is_some() {
        process.apparmor_profile.clone_from(&args.apparmor);
    }
    process.no_new_privileges |= args.no_new_privs;
    set_user(&mut process, args)?;
    add_capabilities(&mut process, &args.cap)?;
    Ok(process)
}

fn set_user(process: &mut Process, args: &Exec) -> Result<(), Error> {
    let user = &mut process.user;
    if let Some(text) = &args.user {
        let (uid, gid) = parse_user(text)?;
        user.set_uid(uid);
        if let Some(gid) = gid {
            user.set_gid(gid);
        }
    }
    if !args.additional_gids.is_empty() {
        let mut groups = user.additional_gids().clone().unwrap_or_default();
        groups.extend(&args.additional_gids);
        user.set_additional_gids(Some(groups));
    }
    Ok(())
}

/// `uid[:gid]`, numbers only and to the last character: a lenient parse of the user has
/// meant root before (CVE-2026-30892).
fn parse_user(text: &str) -> Result<(u32, Option<u32>), Error> {
    let number = |part: &str, what: &str| {
        let digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        part.parse::<u32>()
            .ok()
            .filter(|id| digits && *id != u32::MAX)
            .ok_or_else(|| Error::Usage(format!("parsing {part:?} as int for {what} failed")))
    };
    match text.split_once(':') {
        None => Ok((number(text, "uid")?, None)),
        Some((uid, gid)) => Ok((number(uid, "uid")?, Some(number(gid, "gid")?))),
    }
}

fn add_capabilities(process: &mut Process, names: &[String]) -> Result<(), Error> {
    if names.is_empty() {
        return Ok(());
    }
    let parse = |name: &String| {
        capability::parse(name).ok_or_else(|| Error::Usage(format!("unknown capability {name:?}")))
    };
    let added: Vec<Capability> = names.iter().map(parse).collect::<Result<_, _>>()?;
    let mut sets = match &process.capabilities {
        Some(sets) => sets.clone(),
        None => serde_json::from_str("{}")
            .map_err(|error| Error::Usage(format!("capabilities: {error}")))?,
    };
    // Never inheritable: that would let other programs gain them.
    let extended = |set: &Option<std::collections::HashSet<Capability>>| {
        let mut set = set.clone().unwrap_or_default();
        set.extend(&added);
        Some(set)
    };
    let (bounding, effective, permitted) =
        (extended(sets.bounding()), extended(sets.effective()), extended(sets.permitted()));
    if sets.inheritable().is_some() {
        // As runc: a container with inheritable capabilities means its ambient ones, too. The
        // kernel raises those of them that are inheritable.
        let ambient = extended(sets.ambient());
        sets.set_ambient(ambient);
    }
    sets.set_bounding(bounding).set_effective(effective).set_permitted(permitted);
    process.capabilities = Some(sets);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_parsed_to_the_last_character() {
        assert_eq!(parse_user("1").unwrap(), (1, None));
        assert_eq!(parse_user("1:2").unwrap(), (1, Some(2)));
        for bad in [
            "",
            "1:",
            ":1",
            "a",
            "1a",
            "+1",
            "-1",
            " 1",
            "4294967295",
            "4294967296",
            "1:2:3",
            "0x0",
        ] {
            assert!(parse_user(bad).is_err(), "{bad:?}");
        }
    }
}
