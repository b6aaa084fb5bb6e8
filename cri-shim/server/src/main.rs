//! The `piniond` binary; everything is in the library.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    if piniond::pod_init::is_init(std::env::args_os().next().as_deref()) {
        return piniond::pod_init::init();
    }
    piniond::cli::Cli::parse().run()
}
