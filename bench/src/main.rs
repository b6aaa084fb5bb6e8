//! Side-by-side benchmarks: the same work through every peer, interleaved round by round, so
//! that whatever else the machine does hits all of them alike. Read the results as ratios.

mod bundle;
mod cri;
mod oci;
mod plot;
mod process;
mod report;
mod samples;

use std::error::Error;
use std::fs;
use std::path::PathBuf;
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
        /// Rounds; each runs one pod on every server.
        #[arg(short = 'n', long, default_value_t = 20)]
        rounds: usize,
        /// An image with `sleep` and `true`; pulled where it is missing.
        #[arg(long, default_value = "docker.io/library/busybox:latest")]
        image: String,
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
    /// Also write the results as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Also draw the medians as an SVG bar chart.
    #[arg(long)]
    svg: Option<PathBuf>,
}

fn named(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !value.is_empty() => {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err("expected NAME=VALUE".to_owned()),
    }
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
    let (report, output) = match cli.what {
        What::Oci { runtimes, rounds, busybox, output } => {
            (oci::compare(&runtimes, rounds, &busybox)?, output)
        }
        What::Cri { endpoints, rounds, image, handler, host_network, cgroup_parent, output } => {
            let pod = cri::PodShape { image, handler, host_network, cgroup_parent };
            (cri::compare(&endpoints, rounds, &pod)?, output)
        }
    };
    finish(&report, &output)
}

fn finish(report: &Report, output: &Output) -> Result<(), Box<dyn Error>> {
    println!("{report}");
    if let Some(path) = &output.json {
        fs::write(path, serde_json::to_string_pretty(report)?)
            .map_err(|error| format!("write {}: {error}", path.display()))?;
    }
    if let Some(path) = &output.svg {
        fs::write(path, plot::svg(report))
            .map_err(|error| format!("write {}: {error}", path.display()))?;
    }
    Ok(())
}
