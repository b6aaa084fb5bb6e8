//! Follows a running node and tells four endings apart.
//!
//! ```text
//! booting ──READY──▶ running ──DONE n──▶ the command's verdict
//!    │                  │ └── over the deadline ──▶ the command failed
//!    └── silent ────────┴── silent ──▶ the node failed: no verdict
//! ```
//! A node that hangs after `DONE` has still given its verdict.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Child;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use crate::error::{During, Error, Result};

/// The longest boot: ten seconds on a quiet machine, thirty under heavy load.
const BOOT: Duration = Duration::from_secs(90);
/// The longest silence of a running node; it says every two seconds that it is alive.
const SILENCE: Duration = Duration::from_secs(120);

/// What to listen to, and for how long.
#[derive(Debug)]
pub(super) struct Watch {
    /// Where QEMU connects the control port.
    pub(super) control: UnixListener,
    /// Where it connects the port with the command's output.
    pub(super) out: UnixListener,
    /// How long the command may take.
    pub(super) deadline: Duration,
}

/// What the control port says.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    Ready(String),
    Alive,
    Broken(String),
    Done(i32),
}

fn parse(line: &str) -> Option<Event> {
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    match word {
        "READY" => Some(Event::Ready(rest.to_owned())),
        "ALIVE" => Some(Event::Alive),
        "BROKEN" => Some(Event::Broken(rest.to_owned())),
        "DONE" => rest.trim().parse().ok().map(Event::Done),
        _ => None,
    }
}

/// Prints what the command writes and returns its exit code.
pub(super) fn follow(child: &mut Child, watch: &Watch) -> Result<i32> {
    let (sender, events) = channel();
    let accept = |listener: &UnixListener| listener.try_clone().during(|| "clone a socket".into());
    let (control, out) = (accept(&watch.control)?, accept(&watch.out)?);
    std::thread::spawn(move || read_control(&control, &sender));
    let printer = std::thread::spawn(move || print_output(&out));
    let code = wait(child, &events, watch.deadline)?;
    // all output comes before DONE in the guest, so what is left is in the sockets
    let end = Instant::now() + Duration::from_secs(10);
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let _ = child.wait();
    let _ = printer.join();
    Ok(code)
}

fn wait(child: &mut Child, events: &Receiver<Event>, deadline: Duration) -> Result<i32> {
    let started = Instant::now();
    let mut heard = started;
    let mut running: Option<Instant> = None;
    loop {
        match events.recv_timeout(Duration::from_millis(200)) {
            Ok(Event::Done(code)) => return Ok(code),
            Ok(Event::Broken(what)) => return Err(Error::Node(format!("is broken: {what}"))),
            Ok(Event::Ready(_)) => running = Some(Instant::now()),
            Ok(Event::Alive) => {}
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                let ended = child.try_wait().during(|| "wait for QEMU".into())?;
                check_time(running, started, heard, deadline)?;
                if let Some(status) = ended {
                    return Err(Error::Node(format!("ended on its own: QEMU {status}")));
                }
                continue;
            }
        }
        heard = Instant::now();
        check_time(running, started, heard, deadline)?;
    }
}

fn check_time(
    running: Option<Instant>,
    started: Instant,
    heard: Instant,
    deadline: Duration,
) -> Result<()> {
    match running {
        None if started.elapsed() > BOOT => {
            Err(Error::Node(format!("did not boot within {} s", BOOT.as_secs())))
        }
        Some(_) if heard.elapsed() > SILENCE => {
            Err(Error::Node(format!("stopped answering {} s ago", SILENCE.as_secs())))
        }
        Some(since) if since.elapsed() > deadline => {
            Err(Error::check(format!("the command took longer than {} s", deadline.as_secs())))
        }
        _ => Ok(()),
    }
}

fn read_control(listener: &UnixListener, events: &Sender<Event>) {
    let Ok((stream, _)) = listener.accept() else { return };
    for line in BufReader::new(stream).lines().map_while(std::result::Result::ok) {
        if let Some(event) = parse(&line)
            && events.send(event).is_err()
        {
            return;
        }
    }
}

fn print_output(listener: &UnixListener) {
    let Ok((mut stream, _)): std::io::Result<(UnixStream, _)> = listener.accept() else { return };
    let mut chunk = [0; 8192];
    while let Ok(count @ 1..) = stream.read(&mut chunk) {
        let mut terminal = std::io::stdout().lock();
        if terminal.write_all(&chunk[..count]).and_then(|()| terminal.flush()).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_lines_are_understood_and_noise_is_not() {
        assert_eq!(parse("DONE 3"), Some(Event::Done(3)));
        assert_eq!(parse("READY 4.2"), Some(Event::Ready("4.2".into())));
        assert_eq!(parse("garbage"), None);
        assert_eq!(parse("DONE"), None);
    }

    #[test]
    fn a_slow_command_fails_and_a_silent_node_gives_no_verdict() {
        let now = Instant::now();
        let error = check_time(Some(now), now, now, Duration::ZERO).unwrap_err();
        assert!(matches!(error, Error::Check(_)));
        let Some(long_ago) = now.checked_sub(SILENCE + Duration::from_secs(1)) else { return };
        let error = check_time(Some(now), now, long_ago, Duration::from_secs(9)).unwrap_err();
        assert!(matches!(error, Error::Node(_)));
    }
}
