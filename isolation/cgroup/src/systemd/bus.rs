//! A connection to systemd's manager object, and the five calls made on it.

use std::env;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::wire::{
    self, ERROR, Encoder, FIXED_HEADER, METHOD_RETURN, Message, Method, Property, SIGNAL,
};

/// systemd answers in milliseconds; a loaded node may take seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connected stream, past authentication.
#[derive(Debug)]
pub(super) struct Bus {
    stream: UnixStream,
    serial: u32,
    /// Results of jobs that ended before we asked: job path and result.
    finished: Vec<(String, String)>,
}

/// A call that did not succeed.
#[derive(Debug)]
pub(super) enum Failure {
    /// systemd said no.
    Refused { name: String, text: String },
    /// A job was accepted and then ended otherwise than with `done`.
    Job(String),
    /// The connection.
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Failure> for io::Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused { name, text } => {
                let kind = match name.as_str() {
                    "org.freedesktop.DBus.Error.AccessDenied"
                    | "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired" => {
                        io::ErrorKind::PermissionDenied
                    }
                    "org.freedesktop.systemd1.NoSuchUnit" => io::ErrorKind::NotFound,
                    _ => io::ErrorKind::Other,
                };
                Self::new(kind, format!("{name}: {text}"))
            }
            Failure::Job(result) => Self::other(format!("job ended with {result:?}")),
            Failure::Io(error) => error,
        }
    }
}

fn manager(name: &'static str, signature: &'static str) -> Method {
    Method {
        destination: "org.freedesktop.systemd1",
        path: "/org/freedesktop/systemd1",
        interface: "org.freedesktop.systemd1.Manager",
        name,
        signature,
    }
}

fn daemon(name: &'static str, signature: &'static str) -> Method {
    Method {
        destination: "org.freedesktop.DBus",
        path: "/org/freedesktop/DBus",
        interface: "org.freedesktop.DBus",
        name,
        signature,
    }
}

impl Bus {
    /// Connects to systemd's private socket, which needs no bus daemon, else to the bus: the
    /// system's for root, the user's otherwise.
    pub(super) fn connect() -> io::Result<Self> {
        let (private, bus) = if rustix::process::geteuid().is_root() {
            (PathBuf::from("/run/systemd/private"), PathBuf::from("/run/dbus/system_bus_socket"))
        } else {
            let runtime = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
            let runtime = runtime.ok_or_else(|| {
                io::Error::new(io::ErrorKind::NotFound, "XDG_RUNTIME_DIR is not set")
            })?;
            (runtime.join("systemd/private"), runtime.join("bus"))
        };
        match Self::open(&private) {
            Ok(direct) => Ok(direct),
            Err(_no_private_socket) => {
                let mut bus = Self::open(&bus)?;
                bus.introduce().map_err(io::Error::from)?;
                Ok(bus)
            }
        }
    }

    /// Connects and authenticates as ourselves.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut stream = UnixStream::connect(path).map_err(|error| {
            io::Error::new(error.kind(), format!("connect to {}: {error}", path.display()))
        })?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let uid = rustix::process::geteuid().as_raw().to_string();
        let hex: String = uid.bytes().map(|byte| format!("{byte:02x}")).collect();
        stream.write_all(format!("\0AUTH EXTERNAL {hex}\r\n").as_bytes())?;
        let answer = read_line(&mut stream)?;
        if !answer.starts_with("OK ") {
            let text = format!("{} refused authentication: {answer}", path.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        stream.write_all(b"BEGIN\r\n")?;
        Ok(Self { stream, serial: 0, finished: Vec::new() })
    }

    /// What a bus daemon, but not systemd itself, wants to hear first.
    fn introduce(&mut self) -> Result<(), Failure> {
        self.call(daemon("Hello", ""), &[])?;
        let mut rule = Encoder::default();
        rule.text(
            "type='signal',sender='org.freedesktop.systemd1',\
             interface='org.freedesktop.systemd1.Manager',member='JobRemoved'",
        );
        self.call(daemon("AddMatch", "s"), &rule.bytes())?;
        self.call(manager("Subscribe", ""), &[]).map(drop)
    }

    /// Starts a transient unit and waits until it is up.
    pub(super) fn start_transient_unit(
        &mut self,
        name: &str,
        properties: &[Property],
    ) -> Result<(), Failure> {
        let mut body = Encoder::default();
        body.text(name);
        body.text("replace");
        body.properties(properties);
        body.array(8, |_no_auxiliary_units| {});
        let reply = self.call(manager("StartTransientUnit", "ssa(sv)a(sa(sv))"), &body.bytes())?;
        self.wait_for_job(&reply)
    }

    /// Stops a unit and waits until it is down.
    pub(super) fn stop_unit(&mut self, name: &str) -> Result<(), Failure> {
        let mut body = Encoder::default();
        body.text(name);
        body.text("replace");
        let reply = self.call(manager("StopUnit", "ss"), &body.bytes())?;
        self.wait_for_job(&reply)
    }

    /// Lets systemd forget a failed unit.
    pub(super) fn reset_failed_unit(&mut self, name: &str) -> Result<(), Failure> {
        let mut body = Encoder::default();
        body.text(name);
        self.call(manager("ResetFailedUnit", "s"), &body.bytes()).map(drop)
    }

    /// Changes properties until the next reboot.
    pub(super) fn set_unit_properties(
        &mut self,
        name: &str,
        properties: &[Property],
    ) -> Result<(), Failure> {
        let mut body = Encoder::default();
        body.text(name);
        body.bool(true);
        body.properties(properties);
        self.call(manager("SetUnitProperties", "sba(sv)"), &body.bytes()).map(drop)
    }

    fn call(&mut self, method: Method, body: &[u8]) -> Result<Message, Failure> {
        self.serial += 1;
        let serial = self.serial;
        self.stream.write_all(&wire::method_call(serial, method, body))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let message = self.receive(deadline)?;
            if message.reply_to != Some(serial) {
                self.note(&message);
            } else if message.kind == METHOD_RETURN {
                return Ok(message);
            } else if message.kind == ERROR {
                let text = message.text(0).unwrap_or_default().to_owned();
                return Err(Failure::Refused { name: message.error.unwrap_or_default(), text });
            }
        }
    }

    /// Waits for the end of the job whose path is in `reply`. The signal may have come
    /// before the reply.
    fn wait_for_job(&mut self, reply: &Message) -> Result<(), Failure> {
        let job = reply.text(0).ok_or_else(malformed)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some((_, result)) = self.finished.iter().find(|(path, _)| path == job) {
                return match result.as_str() {
                    "done" => Ok(()),
                    other => Err(Failure::Job(other.to_owned())),
                };
            }
            let message = self.receive(deadline)?;
            self.note(&message);
        }
    }

    /// Keeps what a `JobRemoved(u id, o job, s unit, s result)` says.
    fn note(&mut self, message: &Message) {
        if message.kind == SIGNAL
            && message.member.as_deref() == Some("JobRemoved")
            && let (Some(job), Some(result)) = (message.text(1), message.text(3))
        {
            self.finished.push((job.to_owned(), result.to_owned()));
        }
    }

    fn receive(&mut self, deadline: Instant) -> io::Result<Message> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        let mut header = [0; FIXED_HEADER];
        self.stream.read_exact(&mut header).map_err(as_timeout)?;
        let length = wire::message_length(&header).ok_or_else(malformed)?;
        let mut bytes = header.to_vec();
        bytes.resize(length, 0);
        self.stream.read_exact(&mut bytes[FIXED_HEADER..]).map_err(as_timeout)?;
        wire::decode(&bytes).ok_or_else(malformed)
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "malformed D-Bus message")
}

/// A socket timeout shows as `EAGAIN`.
fn as_timeout(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

/// One line of the authentication dialogue, byte by byte: what follows it is not ours yet.
fn read_line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\r\n") {
        stream.read_exact(&mut byte).map_err(as_timeout)?;
        line.push(byte[0]);
        if line.len() > 512 {
            return Err(malformed());
        }
    }
    Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::systemd::wire::Value;
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    /// A message of the given kind: `method_call` with another type and reply field.
    fn answer(
        kind: u8,
        reply_to: u32,
        name: &'static str,
        signature: &'static str,
        texts: &[&str],
    ) -> Vec<u8> {
        let mut body = Encoder::default();
        let mut texts = texts.iter();
        for kind in signature.chars() {
            match kind {
                'u' => body.u32(1),
                _ => body.text(texts.next().unwrap()),
            }
        }
        let body = body.bytes();
        let fields = |out: &mut Vec<u8>| {
            let (code, kind): (u8, &[u8]) = if kind == ERROR { (4, b"s") } else { (3, b"s") };
            out.extend([code, 1, kind[0], 0]);
            out.extend((name.len() as u32).to_le_bytes());
            out.extend(name.as_bytes());
            out.push(0);
            out.resize(out.len().next_multiple_of(8), 0);
            out.extend([5, 1, b'u', 0]);
            out.extend(reply_to.to_le_bytes());
            out.extend([8, 1, b'g', 0, signature.len() as u8]);
            out.extend(signature.as_bytes());
            out.push(0);
        };
        let mut field_bytes = Vec::new();
        fields(&mut field_bytes);
        let mut message = vec![b'l', kind, 0, 1];
        message.extend((body.len() as u32).to_le_bytes());
        message.extend(77u32.to_le_bytes());
        message.extend((field_bytes.len() as u32).to_le_bytes());
        message.extend(field_bytes);
        message.resize(message.len().next_multiple_of(8), 0);
        message.extend(body);
        message
    }

    /// Accepts one connection, authenticates it, then gives these answers, one per call.
    fn systemd(answers: Vec<Vec<u8>>) -> (tempfile::TempDir, PathBuf, JoinHandle<Vec<Message>>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("private");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let auth = read_line(&mut stream).unwrap();
            assert!(auth.starts_with("\0AUTH EXTERNAL "), "{auth:?}");
            stream.write_all(b"OK 0123456789abcdef0123456789abcdef\r\n").unwrap();
            assert_eq!(read_line(&mut stream).unwrap(), "BEGIN");
            let mut bus = Bus { stream, serial: 0, finished: Vec::new() };
            let mut seen = Vec::new();
            for answer in answers {
                seen.push(bus.receive(Instant::now() + PATIENCE).unwrap());
                bus.stream.write_all(&answer).unwrap();
            }
            seen
        });
        (directory, path, thread)
    }

    #[test]
    fn starting_a_unit_waits_for_its_job_even_when_the_signal_comes_first() {
        let other = answer(SIGNAL, 0, "JobRemoved", "uoss", &["/job/8", "y.scope", "failed"]);
        let removed = answer(SIGNAL, 0, "JobRemoved", "uoss", &["/job/9", "x.scope", "done"]);
        let reply = answer(METHOD_RETURN, 1, "", "o", &["/job/9"]);
        let (_directory, path, server) = systemd(vec![[other, removed, reply].concat()]);
        let mut bus = Bus::open(&path).unwrap();
        bus.start_transient_unit("x.scope", &[("Delegate", Value::Bool(true))]).unwrap();
        let seen = server.join().unwrap();
        assert_eq!(seen[0].member.as_deref(), Some("StartTransientUnit"));
        assert_eq!((seen[0].text(0), seen[0].text(1)), (Some("x.scope"), Some("replace")));
    }

    #[test]
    fn a_job_that_fails_after_it_was_accepted_is_a_failure() {
        let reply = answer(METHOD_RETURN, 1, "", "o", &["/job/9"]);
        let removed = answer(SIGNAL, 0, "JobRemoved", "uoss", &["/job/9", "x.scope", "failed"]);
        let (_directory, path, server) = systemd(vec![[reply, removed].concat()]);
        let failure = Bus::open(&path).unwrap().stop_unit("x.scope").unwrap_err();
        assert!(matches!(failure, Failure::Job(result) if result == "failed"));
        server.join().unwrap();
    }

    #[test]
    fn a_refusal_carries_the_errors_name_and_text() {
        let error = "org.freedesktop.systemd1.UnitExists";
        let refusal = answer(ERROR, 1, error, "s", &["Unit x.scope exists."]);
        let (_directory, path, server) = systemd(vec![refusal]);
        let mut bus = Bus::open(&path).unwrap();
        let failure = bus.start_transient_unit("x.scope", &[]).unwrap_err();
        assert_eq!(io::Error::from(failure).to_string(), format!("{error}: Unit x.scope exists."));
        server.join().unwrap();
    }

    #[test]
    fn a_server_that_goes_away_is_an_error_not_a_hang() {
        let (_directory, path, server) = systemd(vec![]);
        let mut bus = Bus::open(&path).unwrap();
        server.join().unwrap();
        assert!(matches!(bus.reset_failed_unit("x.scope"), Err(Failure::Io(_))));
    }

    /// The reference implementation is the judge of what we send.
    #[test]
    fn a_real_bus_daemon_understands_us() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bus");
        let daemon = std::process::Command::new("dbus-daemon")
            .args(["--session", "--nofork", "--nopidfile"])
            .arg(format!("--address=unix:path={}", path.display()))
            .stderr(std::process::Stdio::null())
            .spawn();
        let Ok(mut daemon) = daemon else {
            println!("not possible here: dbus-daemon is not installed");
            return;
        };
        let deadline = Instant::now() + PATIENCE;
        while !path.exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        // The daemon takes Hello and AddMatch; nobody owns systemd's name on this bus.
        let mut bus = Bus::open(&path).unwrap();
        let outcome = bus.introduce();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        assert!(matches!(outcome, Err(Failure::Refused { .. })), "{outcome:?}");
        assert_eq!(bus.serial, 3, "Hello and AddMatch were answered, Subscribe refused");
    }
}
