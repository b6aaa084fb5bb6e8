//! Namespaces that belong to a user namespace of the pod.
//!
//! unshare(2) makes no user namespace for one thread of many, and a namespace belongs for ever
//! to the user namespace its maker was in. So the maker is a process of its own: the program
//! this code is part of, executed anew, which ends when its namespaces are pinned.
//!
//! ```text
//!  create ──execve──▶ maker: unshare(user) ──"unshared"──▶ create: writes uid_map, gid_map
//!                     maker ◀──── the order, as JSON ────── create
//!                     maker: root inside, unshare(net, ipc, uts), lo, sysctls, name
//!                     maker ──"done"─────────────────────▶ create: binds /proc/<pid>/ns/*
//!                     maker ends with its standard input
//! ```
//!
//! The maps are written by the parent, which has the right to map any id; setgroups(2) stays
//! allowed inside, as kubelet's supplemental groups need it.

use super::{Kind, Pins, Setup, enter, failed};
use crate::error::NetworkError;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};

/// What the program is called when it is executed as the maker.
pub const ARGV0: &str = "pinion-namespaces";

const UNSHARED: &str = "unshared";
const DONE: &str = "done";

/// A run of ids: as `/proc/<pid>/uid_map` has them (user_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// First id inside.
    pub inside: u32,
    /// First id on the host.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

/// The user namespace to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserNamespace {
    /// User ids.
    pub uids: Vec<IdRange>,
    /// Group ids.
    pub gids: Vec<IdRange>,
    /// A program whose `main` calls [`make`] when its name is [`ARGV0`].
    pub program: PathBuf,
}

/// What the maker is told, once its ids are mapped.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    kinds: Vec<String>,
    hostname: Option<String>,
    sysctls: Vec<(PathBuf, String)>,
}

/// As [`create`](super::create), in a new user namespace, which is pinned as `<dir>/user`.
///
/// # Errors
/// As [`create`](super::create); the map that the kernel refused, with its lines.
pub fn create(
    kinds: &[Kind],
    dir: &Path,
    setup: &Setup,
    user: &UserNamespace,
) -> Result<(), NetworkError> {
    fs::create_dir_all(dir).map_err(|error| failed(format!("create {}", dir.display()), error))?;
    let all: Vec<Kind> = [Kind::User].into_iter().chain(kinds.iter().copied()).collect();
    let pins = Pins::reserve(&all, dir)?;
    let made = || {
        let mut maker = Maker::start(&user.program)?;
        maker.order(kinds, setup, user)?;
        pins.bind(&all, &Path::new("/proc").join(maker.pid()).join("ns"))
    };
    let outcome = made();
    if outcome.is_err() {
        pins.release();
    }
    outcome
}

/// The process, and the ends of its standard streams. It is killed with this value.
struct Maker {
    process: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Maker {
    fn start(program: &Path) -> Result<Self, NetworkError> {
        let action = || format!("execute {} to make namespaces", program.display());
        let mut process = Command::new(program)
            .arg0(ARGV0)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| failed(action(), error))?;
        let (input, output) = (process.stdin.take(), process.stdout.take());
        let output = output.ok_or_else(|| failed(action(), io::Error::other("no pipe")))?;
        Ok(Self { process, input, output: BufReader::new(output) })
    }

    fn pid(&self) -> String {
        self.process.id().to_string()
    }

    /// Has the namespaces made. They live as long as the maker.
    fn order(
        &mut self,
        kinds: &[Kind],
        setup: &Setup,
        user: &UserNamespace,
    ) -> Result<(), NetworkError> {
        self.expect(UNSHARED)?;
        for (file, ranges) in [("uid_map", &user.uids), ("gid_map", &user.gids)] {
            let path = format!("/proc/{}/{file}", self.pid());
            let lines = lines(ranges);
            fs::write(&path, &lines)
                .map_err(|error| failed(format!("write {lines:?} to {path}"), error))?;
        }
        let order = Order {
            kinds: kinds.iter().map(|kind| kind.name().to_owned()).collect(),
            hostname: setup.hostname.clone(),
            sysctls: setup.sysctls.clone(),
        };
        let mut text = serde_json::to_string(&order)
            .map_err(|error| failed("encode an order for namespaces".to_owned(), error))?;
        text.push('\n');
        if let Some(input) = &mut self.input {
            let sent = input.write_all(text.as_bytes());
            sent.map_err(|error| failed("order namespaces".to_owned(), error))?;
        }
        self.expect(DONE)
    }

    /// Reads one line; anything but `word` is what went wrong.
    fn expect(&mut self, word: &str) -> Result<(), NetworkError> {
        let action = "make namespaces in a user namespace";
        let mut line = String::new();
        self.output.read_line(&mut line).map_err(|error| failed(action.to_owned(), error))?;
        match line.trim_end() {
            said if said == word => Ok(()),
            "" => Err(failed(action.to_owned(), io::Error::other("the maker ended silently"))),
            said => Err(failed(action.to_owned(), io::Error::other(said.to_owned()))),
        }
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        // Ends by itself; the signal is for one that hangs.
        self.input = None;
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn lines(ranges: &[IdRange]) -> String {
    ranges.iter().map(|r| format!("{} {} {}\n", r.inside, r.outside, r.count)).collect()
}

/// Whether this process was executed to make namespaces.
#[must_use]
pub fn is_maker(argv0: Option<&OsStr>) -> bool {
    argv0.is_some_and(|name| name == ARGV0)
}

/// The life of the maker. To be called before any thread is started.
#[must_use]
pub fn make() -> ExitCode {
    let mut output = io::stdout();
    match work(&mut io::stdin().lock(), &mut output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            if let Some(source) = std::error::Error::source(&error) {
                text.push_str(&format!(": {source}"));
            }
            // Whoever asked may be gone.
            let _ = writeln!(output, "{}", text.replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

fn work(input: &mut impl BufRead, output: &mut impl Write) -> Result<(), NetworkError> {
    let mut say = |word: &str| {
        let said = writeln!(output, "{word}").and_then(|()| output.flush());
        said.map_err(|error| failed("report".to_owned(), error))
    };
    enter(&[Kind::User], &Setup::default())?;
    say(UNSHARED)?;
    let mut line = String::new();
    input.read_line(&mut line).map_err(|error| failed("read the order".to_owned(), error))?;
    let order: Order = serde_json::from_str(&line)
        .map_err(|error| failed("decode the order".to_owned(), error))?;
    become_root().map_err(|errno| failed("become root of the user namespace".to_owned(), errno))?;
    let kinds: Vec<Kind> =
        Kind::ALL.into_iter().filter(|k| order.kinds.iter().any(|n| n == k.name())).collect();
    if !kinds.is_empty() {
        enter(&kinds, &Setup { hostname: order.hostname, sysctls: order.sysctls })?;
    }
    say(DONE)?;
    // The namespaces are held by this process until they are pinned.
    let _ = input.read_to_end(&mut Vec::new());
    Ok(())
}

/// Files of the new namespaces shall belong to the id that is root inside.
fn become_root() -> nix::Result<()> {
    setgroups(&[])?;
    setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0))?;
    setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_written_as_the_kernel_reads_them() {
        let ranges = [
            IdRange { inside: 0, outside: 65536, count: 1000 },
            IdRange { inside: 1000, outside: 200_000, count: 5 },
        ];
        assert_eq!(lines(&ranges), "0 65536 1000\n1000 200000 5\n");
    }

    #[test]
    fn only_the_exact_name_makes_a_maker() {
        assert!(is_maker(Some(OsStr::new(ARGV0))));
        assert!(!is_maker(Some(OsStr::new("piniond"))));
        assert!(!is_maker(None));
    }
}
