//! The command line, flag by flag that of runc.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pinion_cgroup::Driver;

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
    /// Who makes cgroups, as crun takes it: podman disables them by this flag
    #[arg(long, global = true, value_enum, value_name = "WHO", conflicts_with = "systemd_cgroup")]
    pub(crate) cgroup_manager: Option<CgroupManager>,
    /// Accepted for compatibility: whether rights are missing is found out where they are
    /// needed (true, false or auto)
    #[arg(id = "rootless-mode", long = "rootless", value_name = "WHEN")]
    rootless: Option<String>,
    /// Accepted for compatibility
    #[arg(long, global = true, value_name = "PATH", hide = true)]
    criu: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CgroupManager {
    Cgroupfs,
    Systemd,
    Disabled,
}

impl Global {
    pub(crate) fn cgroup_driver(&self) -> Option<Driver> {
        match self.cgroup_manager {
            None if self.systemd_cgroup => Some(Driver::Systemd),
            None | Some(CgroupManager::Cgroupfs) => Some(Driver::Cgroupfs),
            Some(CgroupManager::Systemd) => Some(Driver::Systemd),
            Some(CgroupManager::Disabled) => None,
        }
    }
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
    /// Checkpoint a running container
    Checkpoint(Box<Checkpoint>),
    /// Restore a container from a checkpoint
    Restore(Box<Restore>),
}

/// A verb that only needs to know the container.
#[derive(Debug, Args)]
pub(crate) struct Id {
    /// Name of the container
    pub(crate) id: String,
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
    /// Existing cgroup below the container's; on v1 one per controller can be given
    #[arg(long, value_name = "[CONTROLLERS:]PATH")]
    pub(crate) cgroup: Vec<String>,
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
    /// Memory limit, bytes or with a unit such as 512M
    #[arg(long, allow_hyphen_values = true, value_parser = parse_size)]
    pub(crate) memory: Option<i64>,
    /// Soft memory limit, bytes or with a unit
    #[arg(long, allow_hyphen_values = true, value_parser = parse_size)]
    pub(crate) memory_reservation: Option<i64>,
    /// Limit of memory and swap together, bytes or with a unit; -1 for none
    #[arg(long, allow_hyphen_values = true, value_parser = parse_size)]
    pub(crate) memory_swap: Option<i64>,
    /// Most processes and threads
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) pids_limit: Option<i64>,
    /// Intel RDT: cache of the container, such as L3:0=f0;1=f
    #[arg(long)]
    pub(crate) l3_cache_schema: Option<String>,
    /// Intel RDT: memory bandwidth of the container, such as MB:0=20;1=70
    #[arg(long)]
    pub(crate) mem_bw_schema: Option<String>,
}

/// Flags that `checkpoint` and `restore` share.
#[derive(Debug, Args)]
pub(crate) struct Criu {
    /// Directory of the image files [default: checkpoint]
    #[arg(long, value_name = "DIR")]
    pub(crate) image_path: Option<PathBuf>,
    /// Directory for work files and logs
    #[arg(long, value_name = "DIR")]
    pub(crate) work_path: Option<PathBuf>,
    /// Allow established TCP connections
    #[arg(long)]
    pub(crate) tcp_established: bool,
    /// Allow UNIX sockets that lead outside
    #[arg(long)]
    pub(crate) ext_unix_sk: bool,
    /// Allow a terminal from outside
    #[arg(long)]
    pub(crate) shell_job: bool,
    /// Handle file locks
    #[arg(long)]
    pub(crate) file_locks: bool,
    /// How CRIU treats cgroups: soft, full, strict or ignore
    #[arg(long, value_name = "MODE", default_value = "", hide_default_value = true)]
    pub(crate) manage_cgroups_mode: String,
    /// Namespace to make anew without its properties
    #[arg(long, value_name = "NAMESPACE")]
    pub(crate) empty_ns: Vec<String>,
    /// Drop the pages of parent images that newer ones replace
    #[arg(long)]
    pub(crate) auto_dedup: bool,
    /// Restore memory on demand with userfaultfd
    #[arg(long)]
    pub(crate) lazy_pages: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Checkpoint {
    /// Name of the container
    pub(crate) id: String,
    #[command(flatten)]
    pub(crate) criu: Criu,
    /// Directory of an earlier pre-dump, relative to the image directory
    #[arg(long, value_name = "DIR")]
    pub(crate) parent_path: Option<PathBuf>,
    /// Leave the container running
    #[arg(long)]
    pub(crate) leave_running: bool,
    /// Leave out TCP connections that are just being made
    #[arg(long)]
    pub(crate) tcp_skip_in_flight: bool,
    /// Link unlinked files back where possible
    #[arg(long)]
    pub(crate) link_remap: bool,
    /// Descriptor that gets a NUL byte once lazy pages are served
    #[arg(long, value_name = "FD", default_value_t = -1, allow_negative_numbers = true)]
    pub(crate) status_fd: i32,
    /// Page server that takes the memory
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) page_server: Option<String>,
    /// Dump memory only, and leave the container running
    #[arg(long)]
    pub(crate) pre_dump: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// Name of the container
    pub(crate) id: String,
    #[command(flatten)]
    pub(crate) criu: Criu,
    /// Directory with config.json
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub(crate) bundle: PathBuf,
    /// Socket that receives the master of the container's terminal
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// Do not wait for the container
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// File for the id of the first process
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Do not become the parent of processes the container leaves behind
    #[arg(long)]
    pub(crate) no_subreaper: bool,
    /// Accepted for compatibility: CRIU changes the root in its own way
    #[arg(long)]
    pub(crate) no_pivot: bool,
    /// Security profile to restore into
    #[arg(long, value_name = "TYPE:NAME")]
    pub(crate) lsm_profile: Option<String>,
    /// SELinux context of restored mounts
    #[arg(long, value_name = "CONTEXT")]
    pub(crate) lsm_mount_context: Option<String>,
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

/// A number of bytes as go-units' RAMInBytes takes it, or -1.
fn parse_size(text: &str) -> Result<i64, String> {
    if text == "-1" {
        return Ok(-1);
    }
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = unit.trim_start().to_ascii_lowercase();
    let power = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return Err("expected bytes or a number and one of K, M, G, T, P".into()),
    };
    if power == 0 {
        return number.parse().map_err(|error: std::num::ParseIntError| error.to_string());
    }
    let number: f64 = number.parse().map_err(|_float| "expected a number".to_owned())?;
    let bytes = number * 1024_f64.powi(power);
    // Exactly representable up to 2^53 and saturating far above any memory.
    if bytes.is_finite() { Ok(bytes as i64) } else { Err("expected a number".into()) }
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
            "pinion checkpoint --image-path /x --work-path /w --parent-path ../p --tcp-established --ext-unix-sk --shell-job --page-server 1.2.3.4:5 --file-locks --manage-cgroups-mode soft --empty-ns network --lazy-pages --leave-running --pre-dump --status-fd 5 c",
            "pinion restore --image-path /x --work-path /w --tcp-established --ext-unix-sk --shell-job --file-locks --manage-cgroups-mode ignore --empty-ns network --detach --pid-file /p --console-socket /s --no-pivot --no-subreaper --bundle /b --lsm-profile apparmor:x --lsm-mount-context y c",
            "pinion update --memory 32M --memory-swap=-1 --l3-cache-schema L3:0=f c",
            "pinion exec --cgroup cpu,memory:/a --cgroup /b c true",
            "pinion list -q",
            "pinion --cgroup-manager disabled create --bundle /b c",
            "pinion --debug state c",
        ] {
            parse(line);
        }
    }

    #[test]
    fn sizes_are_those_of_go_units() {
        for (text, bytes) in [
            ("-1", -1),
            ("0", 0),
            ("42", 42),
            ("32M", 32 << 20),
            ("1.5KiB", 1536),
            ("2gb", 2 << 30),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "M", "-2", "1x", "ten"] {
            assert!(parse_size(bad).is_err(), "{bad}");
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
