//! `pinion-monitor`: see the library for what it does.

use std::io::Write;
use std::process::ExitCode;

use pinion_monitor::options::{Command, Options, USAGE, parse};
use pinion_monitor::{daemon, vmm};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == vmm::BECOME) {
        complain(&*Box::<dyn std::error::Error>::from(vmm::become_machine(arguments)));
        return ExitCode::FAILURE;
    }
    let result = match parse(std::env::args_os().skip(1)) {
        Ok(Command::Monitor(options)) => monitor(&options),
        Ok(Command::Version) => print(&format!("pinion-monitor {}\n", env!("CARGO_PKG_VERSION"))),
        Ok(Command::Help) => print(USAGE),
        Err(error) => Err(format!("{error}\n\n{USAGE}").into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&*error);
            ExitCode::FAILURE
        }
    }
}

fn monitor(options: &Options) -> Result<(), Box<dyn std::error::Error>> {
    if options.foreground {
        Ok(daemon::serve(options)?)
    } else {
        Ok(daemon::launch(std::env::args_os().skip(1))?)
    }
}

fn print(text: &str) -> Result<(), Box<dyn std::error::Error>> {
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

fn complain(error: &dyn std::error::Error) {
    let mut line = format!("pinion-monitor: {error}");
    let mut cause = error.source();
    while let Some(inner) = cause {
        line.push_str(": ");
        line.push_str(&inner.to_string());
        cause = inner.source();
    }
    // Without a stderr there is nobody to tell.
    drop(writeln!(std::io::stderr(), "{line}"));
}
