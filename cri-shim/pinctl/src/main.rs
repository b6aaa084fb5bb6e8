//! `pinctl`: piniond for people.
//!
//! Speaks CRI, so it sees what kubelet sees, and piniond's admin protocol for what CRI
//! does not have: the topology map, receipts, image loading, pull progress. It needs no
//! state of its own; what it starts carries the label `pinctl=true`.

mod cli;
mod connect;
mod containers;
mod error;
mod exec;
mod images;
mod logs;
mod lookup;
mod node;
mod output;
mod remove;
mod run;

use clap::{CommandFactory as _, Parser as _};
use cli::{Cli, Command, ImageCommand, NodeCommand};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(cause) => {
            eprintln!("pinctl: cannot start: {cause}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(dispatch(cli)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            error::print(&error);
            ExitCode::FAILURE
        }
    }
}

/// Runs one command; the answer is the exit code of the process that was run, or 0.
async fn dispatch(cli: Cli) -> Result<u8, error::Error> {
    if let Command::Completions { shell } = cli.command {
        clap_complete::generate(shell, &mut Cli::command(), "pinctl", &mut std::io::stdout());
        return Ok(0);
    }
    let mut node = connect::Node::connect(&cli.socket, cli.connect_timeout).await?;
    let format = output::Format::of(cli.json);
    match cli.command {
        Command::Image(ImageCommand::Pull(args)) => images::pull(&mut node, format, args).await?,
        Command::Image(ImageCommand::Load { path, name }) => {
            images::load(&mut node, format, &path, name).await?;
        }
        Command::Image(ImageCommand::Ls) => images::list(&mut node, format).await?,
        Command::Image(ImageCommand::Rm { images }) => images::remove(&mut node, &images).await?,
        Command::Run(args) => return run::run(&mut node, format, *args).await,
        Command::Pods => containers::pods(&mut node, format).await?,
        Command::Ps { all } => containers::list(&mut node, format, all).await?,
        Command::Logs(args) => logs::show(&mut node, &args).await?,
        Command::Exec { id, timeout, command } => {
            return exec::run(&mut node, &id, timeout, command).await;
        }
        Command::Stop { ids, grace } => remove::stop(&mut node, &ids, grace).await?,
        Command::Rm { ids, force } => remove::remove(&mut node, &ids, force).await?,
        Command::Topology => node::topology(&mut node, format).await?,
        Command::Receipt { id } => node::receipts(&mut node, format, id).await?,
        Command::Node(NodeCommand::Check) => return node::check(&mut node, format).await,
        Command::Info => node::info(&mut node, format).await?,
        Command::Completions { .. } => {}
    }
    Ok(0)
}
