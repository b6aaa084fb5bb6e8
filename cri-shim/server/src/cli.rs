//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::{Config, ConfigError, Overrides};
use crate::server;

/// The Pinion CRI server.
#[derive(Debug, Parser)]
#[command(name = "piniond", version, about, long_about = None)]
pub struct Cli {
    /// Configuration file [default: /etc/pinion/config.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The socket to serve CRI on
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Directory of persistent state
    #[arg(long, global = true, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Directory of state that ends with the boot
    #[arg(long, global = true, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Log filter: error, warn, info, debug, trace, or per module
    #[arg(long, global = true, value_name = "FILTER")]
    log_level: Option<String>,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Print the configuration in force and exit
    Config,
    /// Ask the kernel from inside a container's group what may be opened there
    #[command(hide = true)]
    ProbeDevices,
}

impl Cli {
    /// Does what was asked for. Errors go to standard error.
    #[must_use]
    pub fn run(self) -> ExitCode {
        if matches!(self.verb, Some(Verb::ProbeDevices)) {
            return match crate::contract::devices::probe_stdin() {
                Ok(line) => {
                    println!("{line}");
                    ExitCode::SUCCESS
                }
                Err(error) => complain(&error.to_string()),
            };
        }
        let print = matches!(self.verb, Some(Verb::Config));
        match self.load() {
            Err(error) => complain(&chain(&error)),
            Ok(config) if print => match config.to_toml() {
                Ok(text) => {
                    print!("{text}");
                    ExitCode::SUCCESS
                }
                Err(error) => complain(&error.to_string()),
            },
            Ok(config) => match server::run(config) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => complain(&error.chain()),
            },
        }
    }

    fn load(self) -> Result<Config, ConfigError> {
        let overrides = Overrides {
            socket: self.socket,
            root: self.root,
            run_dir: self.run_dir,
            log_level: self.log_level,
        };
        Config::load(self.config.as_deref(), &overrides)
    }
}

fn complain(text: &str) -> ExitCode {
    eprintln!("piniond: {text}");
    ExitCode::FAILURE
}

fn chain(error: &ConfigError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
