//! The `piniond` binary; everything is in the library.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    if piniond::pod_init::is_init(std::env::args_os().next().as_deref()) {
        return piniond::pod_init::init();
    }
    if piniond::namespace_maker::is_maker(std::env::args_os().next().as_deref()) {
        return piniond::namespace_maker::make();
    }
    piniond::cli::Cli::parse().run()
}
