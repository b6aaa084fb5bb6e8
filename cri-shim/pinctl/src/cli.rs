//! The command line.

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::time::Duration;

/// Look at and drive a Pinion node.
#[derive(Debug, Parser)]
#[command(name = "pinctl", version, max_term_width = 100)]
pub(crate) struct Cli {
    /// Socket of piniond.
    #[arg(long, global = true, env = "PINION_SOCKET", default_value = "/run/pinion/piniond.sock")]
    pub(crate) socket: PathBuf,
    /// Print JSON instead of tables.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Give up connecting after this many seconds.
    #[arg(long, global = true, default_value = "5", value_parser = seconds, value_name = "SECONDS")]
    pub(crate) connect_timeout: Duration,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Images on the node.
    #[command(subcommand, visible_alias = "images")]
    Image(ImageCommand),
    /// Start a container in a pod of its own.
    Run(Box<RunArgs>),
    /// List pods.
    Pods,
    /// List containers.
    Ps {
        /// Also those that have ended.
        #[arg(short, long)]
        all: bool,
    },
    /// Print a container's log.
    Logs(LogArgs),
    /// Run a command in a container and print its output.
    Exec {
        /// Container id, a prefix of it, or the container's name.
        id: String,
        /// Kill the command after this many seconds; 0 never does.
        #[arg(long, default_value = "0")]
        timeout: i64,
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Stop containers or pods.
    Stop {
        /// Ids, prefixes or names.
        #[arg(required = true)]
        ids: Vec<String>,
        /// Seconds between the stop signal and SIGKILL.
        #[arg(long, default_value = "10")]
        grace: i64,
    },
    /// Remove containers or pods.
    Rm {
        /// Ids, prefixes or names.
        #[arg(required = true)]
        ids: Vec<String>,
        /// Also when they run.
        #[arg(short, long)]
        force: bool,
    },
    /// Draw sockets, NUMA nodes, cores and hugepages, and who owns them.
    Topology,
    /// Show what was promised to a container, and the kernel's evidence.
    Receipt {
        /// Container or pod; all when left out.
        id: Option<String>,
    },
    /// Show version, paths, drivers and conditions of the node.
    Info,
    /// The node against its profile.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Print a completion script.
    Completions { shell: clap_complete::Shell },
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Compare the node with /etc/pinion/node.toml; ends with 1 where they differ.
    Check,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Fetch an image from its registry.
    Pull(PullArgs),
    /// Load images from an OCI layout directory or an OCI or Docker archive.
    Load {
        /// The directory or archive.
        path: PathBuf,
        /// Name for an image that carries none.
        #[arg(long)]
        name: Option<String>,
    },
    /// List images.
    Ls,
    /// Remove images by name, digest or id.
    Rm {
        #[arg(required = true)]
        images: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// Such as busybox, registry.k8s.io/pause:3.9 or name@sha256:….
    pub(crate) image: String,
    /// User name at the registry.
    #[arg(long, requires = "password_file")]
    pub(crate) username: Option<String>,
    /// File with the password, - for standard input.
    #[arg(long)]
    pub(crate) password_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct LogArgs {
    /// Container id, a prefix of it, or the container's name.
    pub(crate) id: String,
    /// Keep printing as the log grows, until the container ends.
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only the last N lines.
    #[arg(long)]
    pub(crate) tail: Option<usize>,
    /// Print the time of each line.
    #[arg(short, long)]
    pub(crate) timestamps: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Image; pulled when it is not on the node.
    pub(crate) image: String,
    /// Command and arguments instead of the image's.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
    /// Name of the container and its pod.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// RuntimeClass handler, such as pinion-strict.
    #[arg(long, default_value = "")]
    pub(crate) handler: String,
    /// Return at once and print the container's id.
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Keep pod and container after the command has ended.
    #[arg(long, conflicts_with = "detach")]
    pub(crate) keep: bool,
    /// CPUs the container may use, such as 4-5.
    #[arg(long)]
    pub(crate) cpus: Option<String>,
    /// NUMA nodes of its memory, such as 1.
    #[arg(long)]
    pub(crate) mems: Option<String>,
    /// The CPUs belong to this container alone.
    #[arg(long, requires = "cpus")]
    pub(crate) exclusive: bool,
    /// This many CPUs that belong to this container alone, chosen by piniond: whole cores.
    #[arg(long, conflicts_with_all = ["cpus", "exclusive"], value_name = "COUNT")]
    pub(crate) cpus_exclusive: Option<u32>,
    /// The NUMA node of those CPUs.
    #[arg(long, requires = "cpus_exclusive", value_name = "NODE")]
    pub(crate) numa: Option<u32>,
    /// Device node as PATH[:PATH-INSIDE[:rwm]]; may be repeated.
    #[arg(long)]
    pub(crate) device: Vec<String>,
    /// CDI device as vendor.com/class=name; may be repeated.
    #[arg(long)]
    pub(crate) cdi: Vec<String>,
    /// PCI function to hand over by VFIO, such as 0000:41:10.0; may be repeated.
    #[arg(long)]
    pub(crate) vfio: Vec<String>,
    /// Hugepages as SIZE=PAGES, such as 2MB=64, mounted at /dev/hugepages; may be repeated.
    #[arg(long, value_parser = crate::run::hugepages)]
    pub(crate) hugepages: Vec<(String, u64)>,
    /// Memory limit, such as 256M.
    #[arg(long, value_parser = crate::run::bytes)]
    pub(crate) memory: Option<i64>,
    /// Environment as NAME=VALUE; may be repeated.
    #[arg(short, long)]
    pub(crate) env: Vec<String>,
    /// Bind mount as SOURCE:TARGET[:ro]; may be repeated.
    #[arg(short, long)]
    pub(crate) volume: Vec<String>,
    /// Use the host's network.
    #[arg(long)]
    pub(crate) host_network: bool,
    /// All capabilities and devices of the host.
    #[arg(long)]
    pub(crate) privileged: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse().map(Duration::from_secs).map_err(|e| format!("{text:?} is not seconds: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn no_two_arguments_collide() {
        Cli::command().debug_assert();
        Cli::try_parse_from(["pinctl", "exec", "--timeout", "3", "c", "ls", "-l"]).unwrap();
    }
}
