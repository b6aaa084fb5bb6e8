//! Side-by-side benchmarks: the same work through every peer, interleaved round by round, so
//! that whatever else the machine does hits all of them alike. Read the results as ratios.

mod bundle;
mod cpu;
mod cri;
mod insert;
mod memory;
mod oci;
mod plot;
mod probes;
mod process;
mod report;
mod samples;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use report::Report;

/// Compare container runtimes side by side.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// The life of one container through OCI runtimes, by their command line.
    Oci {
        /// NAME=PATH, once per runtime; the first one is what the others are compared with.
        #[arg(long = "runtime", required = true, value_parser = named)]
        runtimes: Vec<(String, String)>,
        /// Rounds; each runs every runtime once per configuration.
        #[arg(short = 'n', long, default_value_t = 30)]
        rounds: usize,
        /// A static busybox, the root file system's only program.
        #[arg(long, default_value = "/bin/busybox")]
        busybox: PathBuf,
        #[command(flatten)]
        output: Output,
    },
    /// The life of one pod through CRI servers.
    Cri {
        /// NAME=SOCKET, once per server; the first one is what the others are compared with.
        #[arg(long = "endpoint", required = true, value_parser = named)]
        endpoints: Vec<(String, String)>,
        /// NAME=PID of a server, whose memory is then reported.
        #[arg(long = "daemon", value_parser = daemon)]
        daemons: Vec<(String, u32)>,
        /// Rounds; each runs one pod on every server.
        #[arg(short = 'n', long, default_value_t = 20)]
        rounds: usize,
        /// Pods that are started at once, after the rounds.
        #[arg(long, default_value_t = 50)]
        pods: usize,
        /// An image with `sleep` and `true`; pulled where it is missing.
        #[arg(long, default_value = "docker.io/library/busybox:latest")]
        image: String,
        /// NAME=IMAGE, once per image whose pull is measured; it is removed before each.
        #[arg(long = "pull", value_parser = named)]
        pulls: Vec<(String, String)>,
        /// The runtime handler (RuntimeClass) to ask for.
        #[arg(long, default_value = "")]
        handler: String,
        /// Pods use the host's network, which leaves network plugins out of the comparison.
        #[arg(long)]
        host_network: bool,
        /// The pods' parent cgroup; the server's default if empty.
        #[arg(long, default_value = "")]
        cgroup_parent: String,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Debug, Args)]
struct Output {
    /// Also write the table to a file.
    #[arg(long)]
    markdown: Option<PathBuf>,
    /// Also write the results as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Also draw the medians as an SVG bar chart.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Also put the medians into a Markdown file, between the lines
    /// `<!-- bench:WHAT:begin -->` and `<!-- bench:WHAT:end -->` (WHAT: oci or cri), with links
    /// to the table and the chart that were written.
    #[arg(long)]
    insert: Option<PathBuf>,
}

fn named(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !value.is_empty() => {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

fn daemon(text: &str) -> Result<(String, u32), String> {
    let (name, pid) = named(text)?;
    pid.parse().map(|pid| (name, pid)).map_err(|error| format!("{pid:?}: {error}"))
}

fn main() -> ExitCode {
    // A process whose children are one command: see `process::peak_memory`.
    let mut arguments = std::env::args_os();
    if arguments.nth(1).is_some_and(|first| first == process::MEASURE) {
        return process::measure(arguments);
    }
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("pinion-bench: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<(), Box<dyn Error>> {
    let (name, report, output) = match cli.what {
        What::Oci { runtimes, rounds, busybox, output } => {
            ("oci", oci::compare(&runtimes, rounds, &busybox)?, output)
        }
        What::Cri {
            endpoints,
            daemons,
            rounds,
            pods,
            image,
            pulls,
            handler,
            host_network,
            cgroup_parent,
            output,
        } => {
            let pod = cri::PodShape { image, pulls, handler, host_network, cgroup_parent };
            ("cri", cri::compare(&endpoints, &daemons, (rounds, pods), &pod)?, output)
        }
    };
    finish(name, &report, &output)
}

fn finish(name: &str, report: &Report, output: &Output) -> Result<(), Box<dyn Error>> {
    println!("{report}");
    if let Some(path) = &output.markdown {
        write(path, &report.to_string())?;
    }
    if let Some(path) = &output.json {
        write(path, &serde_json::to_string_pretty(report)?)?;
    }
    if let Some(path) = &output.svg {
        write(path, &plot::svg(report))?;
    }
    if let Some(path) = &output.insert {
        let text = fs::read_to_string(path)
            .map_err(|error| format!("read {}: {error}", path.display()))?;
        let section = insert::section(report, output.markdown.as_deref(), output.svg.as_deref());
        let text = insert::between_marks(&text, name, &section)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        write(path, &text)?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("write {}: {error}", path.display()))
}
