//! The command line, flag by flag that of runc.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// What `--version` prints after the program's name.
const VERSION: &str = concat!("version ", env!("CARGO_PKG_VERSION"), "\nspec: ", "1.3.0");

/// Open Container Initiative runtime for latency-critical nodes.
///
/// Runs the containers of bundles: directories with a config.json and a root file system.
#[derive(Debug, Parser)]
#[command(name = "pinion", version = VERSION, disable_version_flag = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) verb: Verb,
    /// Print the version
    #[arg(short = 'v', long, action = clap::ArgAction::Version)]
    version: Option<bool>,
}

/// Flags of every verb.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Directory of the containers' state, on a tmpfs
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) root: Option<PathBuf>,
    /// File that errors and warnings are appended to
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// Format of the log
    #[arg(long, global = true, value_enum, default_value = "text")]
    pub(crate) log_format: LogFormat,
    /// Log more
    #[arg(long, global = true)]
    pub(crate) debug: bool,
    /// Let systemd make cgroups; cgroupsPath is then slice:prefix:name
    #[arg(long, global = true)]
    pub(crate) systemd_cgroup: bool,
    /// Accepted for compatibility: true, false or auto
    #[arg(id = "rootless-mode", long = "rootless", value_name = "WHEN", hide = true)]
    rootless: Option<String>,
    /// Accepted for compatibility
    #[arg(long, global = true, value_name = "PATH", hide = true)]
    criu: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Create a container
    Create(Create),
    /// Execute the program of a created container
    Start(Id),
    /// Create and start a container
    Run(Run),
    /// Print the state of a container
    State(Id),
    /// Send a signal to a container's first process
    Kill(Kill),
    /// Delete a container
    Delete(Delete),
    /// Execute a further process in a running container
    Exec(Box<Exec>),
    /// List containers
    List(List),
    /// List the processes of a container
    Ps(Ps),
    /// Freeze all processes of a container
    Pause(Id),
    /// Let a paused container go on
    Resume(Id),
    /// Change the resource limits of a container
    Update(Box<Update>),
    /// Print statistics and out-of-memory events of a container
    Events(Events),
    /// Write a config.json to start from
    Spec(Spec),
    /// Print what this runtime can do
    Features,
    /// Checkpoint a running container (not supported)
    Checkpoint(Anything),
    /// Restore a container from a checkpoint (not supported)
    Restore(Anything),
}

/// A verb that only needs to know the container.
#[derive(Debug, Args)]
pub(crate) struct Id {
    /// Name of the container
    pub(crate) id: String,
}

/// Whatever clients pass to a verb that is refused.
#[derive(Debug, Args)]
pub(crate) struct Anything {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// Flags of `create` and `run`.
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Name of the container
    pub(crate) id: String,
    /// Directory with config.json
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub(crate) bundle: PathBuf,
    /// Socket that receives the master of the container's terminal
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// Socket that receives a descriptor of the first process
    #[arg(long, value_name = "SOCKET")]
    pub(crate) pidfd_socket: Option<PathBuf>,
    /// File for the id of the first process
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Do not use pivot_root, for a root file system on a ramdisk
    #[arg(long)]
    pub(crate) no_pivot: bool,
    /// Keep the caller's session keyring
    #[arg(long)]
    pub(crate) no_new_keyring: bool,
    /// Pass on N more descriptors after the standard ones and those of $LISTEN_FDS
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) preserve_fds: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) create: Create,
    /// Do not wait for the container
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Do not delete the container when it has ended
    #[arg(long)]
    pub(crate) keep: bool,
    /// Do not become the parent of processes the container leaves behind
    #[arg(long)]
    pub(crate) no_subreaper: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Kill {
    /// Name of the container
    pub(crate) id: String,
    /// Number or name of the signal
    #[arg(default_value = "SIGTERM")]
    pub(crate) signal: String,
    /// Send it to all processes of the container
    #[arg(short, long)]
    pub(crate) all: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Name of the container
    pub(crate) id: String,
    /// Kill it if it is running; none of that name is no error
    #[arg(short, long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Name of the container
    pub(crate) id: String,
    /// Program and arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
    /// File with the process to execute
    #[arg(short, long, value_name = "FILE")]
    pub(crate) process: Option<PathBuf>,
    /// Socket that receives the master of the process's terminal
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// Socket that receives a descriptor of the process
    #[arg(long, value_name = "SOCKET")]
    pub(crate) pidfd_socket: Option<PathBuf>,
    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<PathBuf>,
    /// Add a variable to the environment
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// Give the process a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// User and group
    #[arg(short, long, value_name = "UID[:GID]")]
    pub(crate) user: Option<String>,
    /// Add a supplementary group
    #[arg(short = 'g', long, value_name = "GID")]
    pub(crate) additional_gids: Vec<u32>,
    /// Do not wait for the process
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// File for the id of the process
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// SELinux label of the process
    #[arg(long, value_name = "LABEL")]
    pub(crate) process_label: Option<String>,
    /// AppArmor profile of the process
    #[arg(long, value_name = "PROFILE")]
    pub(crate) apparmor: Option<String>,
    /// Forbid gaining privileges
    #[arg(long)]
    pub(crate) no_new_privs: bool,
    /// Add a capability
    #[arg(short, long, value_name = "CAP")]
    pub(crate) cap: Vec<String>,
    /// Pass on N more descriptors after the standard ones and those of $LISTEN_FDS
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) preserve_fds: u32,
    /// Existing cgroup below the container's
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup: Option<String>,
    /// Do it in a paused container too
    #[arg(long)]
    pub(crate) ignore_paused: bool,
    /// Keep the caller's session keyring
    #[arg(long, hide = true)]
    pub(crate) no_new_keyring: bool,
}

#[derive(Debug, Args)]
pub(crate) struct List {
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    pub(crate) format: Format,
    /// Only names
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// Name of the container
    pub(crate) id: String,
    /// Options for ps(1)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) options: Vec<String>,
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct Update {
    /// Name of the container
    pub(crate) id: String,
    /// File with the limits to change (LinuxResources), - for standard input; other flags are
    /// ignored then
    #[arg(short, long, value_name = "FILE")]
    pub(crate) resources: Option<PathBuf>,
    /// Weight of block I/O, 10 to 1000
    #[arg(long)]
    pub(crate) blkio_weight: Option<u16>,
    /// Period of the CPU quota, µs
    #[arg(long)]
    pub(crate) cpu_period: Option<u64>,
    /// CPU time per period, µs
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) cpu_quota: Option<i64>,
    /// CPU time that may be saved for a burst, µs
    #[arg(long)]
    pub(crate) cpu_burst: Option<u64>,
    /// CPU weight
    #[arg(long)]
    pub(crate) cpu_share: Option<u64>,
    /// Period of the real-time quota, µs
    #[arg(long)]
    pub(crate) cpu_rt_period: Option<u64>,
    /// Real-time CPU time per period, µs
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) cpu_rt_runtime: Option<i64>,
    /// CPUs to use
    #[arg(long)]
    pub(crate) cpuset_cpus: Option<String>,
    /// Memory nodes to use
    #[arg(long)]
    pub(crate) cpuset_mems: Option<String>,
    /// 1 for SCHED_IDLE
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) cpu_idle: Option<i64>,
    /// Memory limit, bytes
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) memory: Option<i64>,
    /// Soft memory limit, bytes
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) memory_reservation: Option<i64>,
    /// Limit of memory and swap together, bytes; -1 for none
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) memory_swap: Option<i64>,
    /// Most processes and threads
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) pids_limit: Option<i64>,
    /// Cache allocation (not supported)
    #[arg(long, hide = true)]
    pub(crate) l3_cache_schema: Option<String>,
    /// Memory bandwidth allocation (not supported)
    #[arg(long, hide = true)]
    pub(crate) mem_bw_schema: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Name of the container
    pub(crate) id: String,
    /// Time between statistics, such as 5s or 500ms
    #[arg(long, default_value = "5s", value_parser = parse_duration)]
    pub(crate) interval: std::time::Duration,
    /// Print statistics once and end
    #[arg(long)]
    pub(crate) stats: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Spec {
    /// Directory to write config.json to
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub(crate) bundle: PathBuf,
    /// For a container of an unprivileged user
    #[arg(long)]
    pub(crate) rootless: bool,
}

/// The part of Go's duration syntax that has one unit.
fn parse_duration(text: &str) -> Result<std::time::Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let scale = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("expected a number and one of ms, s, m, h".into()),
    };
    let seconds = number.parse::<f64>().map_err(|error| error.to_string())? * scale;
    match std::time::Duration::try_from_secs_f64(seconds) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err("must be greater than 0".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Cli {
        Cli::try_parse_from(line.split(' ')).unwrap()
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_are_taken_before_and_after_the_name() {
        for line in [
            "pinion --root=/r create --bundle /b --pid-file p c1",
            "pinion create c1 --bundle=/b --pid-file p --root /r",
        ] {
            let cli = parse(line);
            assert_eq!(cli.global.root.unwrap().to_str(), Some("/r"), "{line}");
            let Verb::Create(create) = cli.verb else { panic!("{line}") };
            assert_eq!((create.id.as_str(), create.bundle.to_str()), ("c1", Some("/b")));
        }
    }

    #[test]
    fn what_follows_the_program_of_exec_belongs_to_it() {
        let Verb::Exec(exec) = parse("pinion exec -t --user 1:2 c1 ls -d --root x").verb else {
            panic!()
        };
        assert_eq!(exec.command, ["ls", "-d", "--root", "x"]);
        assert!(exec.tty && !exec.detach);
        let Verb::Exec(exec) = parse("pinion exec c1 --process f --detach").verb else { panic!() };
        assert!(exec.detach && exec.command.is_empty());
    }

    #[test]
    fn the_lines_of_known_clients_are_understood() {
        for line in [
            "pinion --root /r --log /l --log-format json --systemd-cgroup create --bundle /b --pid-file /p --console-socket /s --no-pivot --no-new-keyring c",
            "pinion --log /l --log-format json exec --process /f --console-socket /s --detach --pid-file /p c",
            "pinion kill --all c 9",
            "pinion kill c SIGTERM",
            "pinion delete --force c",
            "pinion ps --format json c",
            "pinion events --stats c",
            "pinion update --resources=- c",
            "pinion update --resources - c",
            "pinion update --cpu-quota -1 --memory-swap -1 c",
            "pinion run --detach --keep --no-subreaper --bundle /b c",
            "pinion checkpoint --image-path /x --leave-running c",
            "pinion list -q",
            "pinion --debug state c",
        ] {
            parse(line);
        }
    }

    #[test]
    fn durations_are_those_of_go() {
        assert_eq!(parse_duration("500ms").unwrap().as_millis(), 500);
        assert_eq!(parse_duration("1.5s").unwrap().as_millis(), 1500);
        for bad in ["", "5", "0s", "-1s", "s", "1d"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
