//! The programs inside the test images, in one static binary told apart by its name.
//!
//! | name | does |
//! |---|---|
//! | `pause` | waits to be told to end |
//! | `nginx` | a web server that names itself a master process and leaves a pid file |
//! | `httpd-foreground` | a web server that says "httpd" |
//! | `nnp` | prints the effective user: installed setuid root |
//! | `pinion-workload` | `spin` burns a CPU; `where` and `hugepages` report where it runs and what it maps; `serve` is there to be probed; `count` writes a log; `vfio` uses a PCI function |

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use nix::sys::signal::{SigSet, Signal};

mod hugepages;
mod serve;
mod vfio;

const PID_FILE: &str = "/var/run/nginx.pid";
const MASTER: &str = "nginx: master process nginx -g daemon off;";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let name = args.first().map(|arg| program_name(arg)).unwrap_or_default();
    let result = match name {
        "pause" => wait_for_end(),
        "nginx" => nginx(&args),
        "httpd-foreground" => httpd(),
        "nnp" => {
            println!("Effective uid: {}", nix::unistd::geteuid());
            Ok(())
        }
        _ => workload(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The name a program was called by: `nginx: master process …` is nginx.
fn program_name(arg: &str) -> &str {
    let path = arg.split([':', ' ']).next().unwrap_or(arg);
    Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or(path)
}

fn workload(args: &[String]) -> std::io::Result<()> {
    match args.get(1).map(String::as_str) {
        Some("spin") => loop {
            std::hint::spin_loop();
        },
        Some("where") => hugepages::report_place(),
        Some("hugepages") => hugepages::run(&args[2..]),
        Some("vfio") => vfio::run(&args[2..]),
        Some("wait") => wait_for_end(),
        Some("serve") => serve::run(&args[2..]),
        Some("count") => count(&args[2..]),
        _ => Err(std::io::Error::other(
            "usage: pinion-workload spin|where|wait|hugepages|vfio|serve|count …",
        )),
    }
}

/// `count LINES`: writes that many numbered lines of 100 bytes, a thousand a second, then
/// waits to be told to end.
fn count(args: &[String]) -> std::io::Result<()> {
    let lines: u32 = args
        .first()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| std::io::Error::other("count LINES"))?;
    for line in 0..lines {
        println!("{line:<99}");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    wait_for_end()
}

fn end_signals() -> SigSet {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT] {
        set.add(signal);
    }
    set
}

/// Waits for a signal that asks for the end. As PID 1 of a container such signals are
/// ignored unless waited for.
pub(crate) fn wait_for_end() -> std::io::Result<()> {
    let set = end_signals();
    set.thread_block()?;
    set.wait()?;
    Ok(())
}

/// Serves until told to end; `-p PORT` changes the port.
fn nginx(args: &[String]) -> std::io::Result<()> {
    let port = args.iter().position(|arg| arg == "-p").and_then(|at| args.get(at + 1));
    let port = port.and_then(|text| text.parse().ok()).unwrap_or(80);
    if !args[0].starts_with(MASTER) {
        let again = Command::new("/proc/self/exe").arg0(MASTER).args(&args[1..]).exec();
        return Err(again);
    }
    std::fs::write("/proc/self/comm", "nginx")?;
    std::fs::write(PID_FILE, format!("{}\n", std::process::id()))?;
    serve(port, "<html><title>Welcome to nginx!</title></html>\n")
}

fn httpd() -> std::io::Result<()> {
    eprintln!("[core:notice] [pid {0}] Command line: 'httpd -D FOREGROUND'", std::process::id());
    serve(80, "<html><body><h1>It works!</h1></body></html>\n")
}

fn serve(port: u16, page: &'static str) -> std::io::Result<()> {
    let listener =
        TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))?;
    let set = end_signals();
    set.thread_block()?;
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            std::thread::spawn(move || answer(client, page));
        }
    });
    set.wait()?;
    Ok(())
}

/// Reads one request's head and answers it.
fn answer(mut client: TcpStream, page: &str) {
    let mut head = Vec::new();
    let mut chunk = [0; 1024];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        match client.read(&mut chunk) {
            Ok(0) | Err(_) => return,
            Ok(count) => head.extend_from_slice(&chunk[..count]),
        }
        if head.len() > 16 << 10 {
            return;
        }
    }
    let length = page.len();
    let _ = write!(
        client,
        "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{page}"
    );
}
