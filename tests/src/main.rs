//! `pinion-tests`: everything that proves Pinion, on this machine or in a virtual telco
//! node.

mod assets;
mod badinput;
mod bench;
mod budget;
mod cache;
mod churn;
mod command;
mod crash;
mod crates;
mod cri;
mod critest;
mod debian;
mod demo;
mod devices;
mod error;
mod evidence;
mod image;
mod isolation;
mod kubelet;
mod leaks;
mod manual;
mod network;
mod node;
mod page;
mod pinned;
mod server;
mod site;
mod suites;
mod tools;
mod torn;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use assets::Assets;
use error::Result;

/// Proves Pinion: suites on this machine and in a virtual telco node.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// CRI conformance.
    Critest {
        place: Place,
        #[command(flatten)]
        options: critest::Options,
    },
    /// The server dies while pods run: nothing is lost, nothing is left behind.
    Crash {
        place: Place,
        #[arg(long, value_enum, default_value = "piniond")]
        server: server::Kind,
        /// Kill it at every system call that ends a step of a call, not at a few (many minutes).
        #[arg(long)]
        every: bool,
    },
    /// Many pods at once and many in sequence: nothing leaks, lists are answered meanwhile.
    Churn {
        place: Place,
        #[arg(long, value_enum, default_value = "piniond")]
        server: server::Kind,
        #[command(flatten)]
        options: churn::Options,
    },
    /// Bad input and broken surroundings: clear errors, no leftovers.
    Badinput {
        place: Place,
        #[arg(long, value_enum, default_value = "piniond")]
        server: server::Kind,
    },
    /// The isolation contract against this machine's kernel; wants the virtual node.
    Isolation {
        /// Only cases whose name contains this.
        only: Option<String>,
    },
    /// Pods come and go beside one with exclusive CPUs; nobody else may run on these.
    Undisturbed {
        /// How many.
        #[arg(long, default_value_t = 50)]
        pods: usize,
    },
    /// The crates' own tests, in the virtual node.
    Crates,
    /// A real kubelet, standalone, drives the server; in the virtual node only.
    Kubelet {
        /// Only what prepares the pods, and cases whose name contains this.
        only: Option<String>,
    },
    /// Devices, CDI and VFIO against this machine's kernel; wants a node with devices.
    Devices { place: Place },
    /// The page of a virtual node in a real browser.
    #[command(subcommand)]
    Page(PageVerb),
    /// A pod with CPUs and hugepages of its own, and one that is refused.
    Demo { place: Place },
    /// Pods with a kernel of their own, on this machine.
    Vm,
    /// One such pod, shown.
    DemoVm,
    /// The suites meant for the inside of the virtual node.
    Suite,
    /// What pinion may cost before it does anything: size, start.
    Budget,
    /// Benchmarks that need servers.
    #[command(subcommand)]
    Bench(BenchVerb),
    /// Everything.
    All,
    /// The virtual telco node.
    #[command(subcommand)]
    Node(NodeVerb),
    /// Writes the man pages and completions of pinion below a directory such as
    /// /usr/local/share.
    Manual { share: PathBuf },
    /// Builds critest and crictl, and prints where they are.
    Tools {
        /// Builds kubelet too, which takes minutes.
        #[arg(long)]
        kubelet: bool,
    },
}

/// Where a suite runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Place {
    /// This machine.
    Host,
    /// A fresh virtual node.
    Node,
}

#[derive(Debug, Subcommand)]
enum BenchVerb {
    /// Pods through piniond and containerd, side by side.
    Cri {
        /// Further arguments of `pinion-bench cri`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
enum PageVerb {
    /// Looks at it with this machine's Chromium.
    Look {
        /// Keep a picture of it here.
        #[arg(long)]
        picture: Option<PathBuf>,
    },
    /// In the node: serves it at this port until it has been looked at.
    Serve { port: u16 },
}

#[derive(Debug, Subcommand)]
enum NodeVerb {
    /// Fetches and builds what a node boots from.
    Fetch,
    /// Runs every suite of the node in a fresh one.
    Suite,
    /// Runs a command in a fresh node with Pinion installed; ends with its exit code.
    Run(NodeRun),
}

#[derive(Debug, clap::Args)]
struct NodeRun {
    /// Take Pinion's binaries from this directory.
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// Share this directory with the node, as /mnt/share.
    #[arg(long)]
    share: Option<PathBuf>,
    /// Install critest and crictl too.
    #[arg(long)]
    clients: bool,
    /// Install kubelet too; building it takes minutes.
    #[arg(long)]
    kubelet: bool,
    /// Boot with systemd as PID 1.
    #[arg(long)]
    systemd: bool,
    /// Install this program too, in /usr/local/bin.
    #[arg(long)]
    program: Vec<PathBuf>,
    /// Add an IOMMU and NICs with virtual functions.
    #[arg(long)]
    devices: bool,
    /// MiB of memory, half on each NUMA node.
    #[arg(long, default_value_t = 4096)]
    memory: u32,
    /// Add to the kernel's command line.
    #[arg(long)]
    kernel_arg: Vec<String>,
    /// Seconds the command may take.
    #[arg(long, default_value_t = 900)]
    deadline: u64,
    /// The command.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

fn main() -> ExitCode {
    match run(Cli::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("pinion-tests: {}", error.chain());
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    if let Verb::Manual { share } = verb {
        manual::write(&share)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Verb::Budget = verb {
        budget::run()?;
        return Ok(ExitCode::SUCCESS);
    }
    let assets = Assets::open()?;
    match verb {
        Verb::Manual { .. } | Verb::Budget => {}
        Verb::Critest { place: Place::Host, options } => critest::run(&assets, &options)?,
        Verb::Critest { place: Place::Node, options } => {
            return Ok(exit_code(critest::run_in_node(&assets, &options)?));
        }
        Verb::Crash { place: Place::Host, server, every } => {
            crash::run(&assets, server, restart_budget(&assets), every)?;
        }
        Verb::Crash { place: Place::Node, server, every } => {
            let mut words = vec!["crash", "host", "--server", server.name()];
            words.extend(every.then_some("--every"));
            return in_node(&assets, &words);
        }
        Verb::Churn { place: Place::Host, server, options } => {
            churn::run(&assets, server, &options)?;
        }
        Verb::Churn { place: Place::Node, server, options } => {
            let words = options.words();
            let fixed = ["churn", "host", "--server", server.name()];
            let words: Vec<&str> =
                fixed.into_iter().chain(words.iter().map(String::as_str)).collect();
            return in_node(&assets, &words);
        }
        Verb::Badinput { place: Place::Host, server } => badinput::run(&assets, server)?,
        Verb::Badinput { place: Place::Node, server } => {
            return in_node(&assets, &["badinput", "host", "--server", server.name()]);
        }
        Verb::Isolation { only } => isolation::run(&assets, only.as_deref())?,
        Verb::Undisturbed { pods } if assets.in_node() => isolation::churn(&assets, pods)?,
        Verb::Undisturbed { pods } => {
            return in_node(&assets, &["undisturbed", "--pods", &pods.to_string()]);
        }
        Verb::Crates if assets.in_node() => crates::run()?,
        Verb::Crates => return in_node(&assets, &["crates"]),
        Verb::Kubelet { only } if assets.in_node() => kubelet::run(&assets, only.as_deref())?,
        Verb::Kubelet { only } => {
            let words: Vec<&str> = std::iter::once("kubelet").chain(only.as_deref()).collect();
            return in_node(&assets, &words);
        }
        Verb::Devices { place: Place::Host } => devices::run(&assets)?,
        Verb::Devices { place: Place::Node } => {
            let job = node::Job {
                command: ["pinion-tests", "devices", "host"].map(str::to_owned).to_vec(),
                ..node::Job::with_devices()
            };
            return Ok(exit_code(node::run(&assets, &job)?));
        }
        Verb::Demo { place: Place::Host } if assets.in_node() => demo::in_node(&assets)?,
        Verb::Demo { place: Place::Host } => demo::on_host(&assets)?,
        Verb::Demo { place: Place::Node } => return in_node(&assets, &["demo", "host"]),
        Verb::Page(PageVerb::Look { picture }) => page::run(&assets, picture.as_deref())?,
        Verb::Page(PageVerb::Serve { port }) => page::serve(&assets, port)?,
        Verb::Vm => vm::run(&assets)?,
        Verb::DemoVm => vm::demo(&assets)?,
        Verb::Bench(BenchVerb::Cri { arguments }) => bench::cri(&assets, &arguments)?,
        Verb::Suite => suites::in_node()?,
        Verb::All => suites::all()?,
        Verb::Node(NodeVerb::Suite) => return in_node(&assets, &["suite"]),
        Verb::Node(NodeVerb::Fetch) => {
            node::fetch(assets.cache()?)?;
        }
        Verb::Node(NodeVerb::Run(options)) => {
            return Ok(exit_code(node::run(&assets, &options.job())?));
        }
        Verb::Tools { kubelet } => {
            let mut wanted = vec![tools::CRITEST, tools::CRICTL, tools::GINKGO];
            wanted.extend(kubelet.then_some(tools::KUBELET));
            for tool in wanted {
                println!("{}", assets.tool(&tool)?.display());
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// How long a server with twenty pods may take to answer again: two seconds, and more where
/// the processor is emulated.
fn restart_budget(assets: &Assets) -> Duration {
    Duration::from_secs(if assets.in_node() { 20 } else { 2 })
}

/// Runs the harness with these arguments in a fresh node.
fn in_node(assets: &Assets, arguments: &[&str]) -> Result<ExitCode> {
    let has = |word: &str| arguments.contains(&word);
    let words = ["pinion-tests"].iter().chain(arguments).map(|word| (*word).to_owned());
    let job = node::Job {
        command: words.collect(),
        clients: has("suite"),
        kubelet: has("suite") || has("kubelet"),
        tests: if has("suite") || has("crates") { crates::build()? } else { Vec::new() },
        deadline: Duration::from_secs(2 * 3600),
        ..node::Job::default()
    };
    Ok(exit_code(node::run(assets, &job)?))
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

impl NodeRun {
    fn job(self) -> node::Job {
        node::Job {
            command: self.command,
            bin_dir: self.bin_dir,
            share: self.share,
            clients: self.clients,
            kubelet: self.kubelet,
            programs: self.program,
            tests: Vec::new(),
            systemd: self.systemd,
            devices: self.devices,
            forward: None,
            memory: self.memory,
            kernel_args: self.kernel_arg,
            deadline: Duration::from_secs(self.deadline),
        }
    }
}
