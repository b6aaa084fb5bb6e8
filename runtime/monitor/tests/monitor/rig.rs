//! A pod with its monitor, a client of it, and containers from busybox.

use std::collections::VecDeque;
use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pinion_monitor_proto::channel::Channel;
use pinion_monitor_proto::message::{
    Attach, ContainerState, Create, Delete, Error, Event, Exec, Exited, Hello, Request, Response,
    Shutdown, Signal, Start, event::What, request::Verb, response::Outcome,
};
use serde_json::{Value, json};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

const APPLETS: &[&str] = &[
    "sh", "echo", "cat", "sleep", "true", "false", "dd", "yes", "head", "seq", "stty", "tail",
    "kill", "printf", "setsid", "mkdir", "tty", "ls", "usleep", "wc", "nproc",
];

static RIGS: AtomicU32 = AtomicU32::new(0);

pub fn runtime() -> PathBuf {
    std::env::var_os("PINION_TEST_RUNTIME").map_or_else(|| "/usr/sbin/runc".into(), PathBuf::from)
}

pub fn monitor_binary() -> PathBuf {
    std::env::var_os("PINION_TEST_MONITOR")
        .map_or_else(|| env!("CARGO_BIN_EXE_pinion-monitor").into(), PathBuf::from)
}

/// A pod directory, its monitor and a connection to it.
pub struct Rig {
    pub dir: tempfile::TempDir,
    pub pod: PathBuf,
    cgroup: String,
    client: Option<Channel>,
    last_id: u64,
    waiting: VecDeque<Response>,
}

impl Rig {
    pub fn new() -> Self {
        let rig = Self::without_monitor();
        rig.launch();
        rig.connected()
    }

    pub fn without_monitor() -> Self {
        let dir = tempfile::Builder::new().prefix("pm").tempdir().unwrap();
        let number = RIGS.fetch_add(1, Ordering::Relaxed);
        let cgroup = format!("pinion-monitor-test-{}-{number}", std::process::id());
        let pod = dir.path().join("pod");
        fs::create_dir_all(pod.join("containers")).unwrap();
        make_rootfs(&dir.path().join("rootfs"));
        Self { dir, pod, cgroup, client: None, last_id: 0, waiting: VecDeque::new() }
    }

    pub fn launch(&self) {
        assert!(self.launcher().status().unwrap().success(), "the monitor did not come up");
    }

    pub fn launcher(&self) -> Command {
        let mut command = Command::new(monitor_binary());
        command
            .args(["--pod", "test", "--dir"])
            .arg(&self.pod)
            .arg("--runtime")
            .arg(runtime())
            .arg("--runtime-root")
            .arg(self.dir.path().join("runtime"));
        command
    }

    fn connected(mut self) -> Self {
        self.connect();
        self
    }

    /// Connects anew and subscribes; what the former connection would have received is lost.
    pub fn connect(&mut self) -> Vec<ContainerState> {
        let channel = Channel::connect(&self.pod.join("monitor.sock")).unwrap();
        channel.stream().set_read_timeout(Some(PATIENCE)).unwrap();
        self.client = Some(channel);
        self.waiting.clear();
        match self.call(Verb::Hello(Hello { version: 1, subscribe: true }), &[]) {
            Outcome::Hello(reply) => reply.containers,
            other => panic!("{other:?}"),
        }
    }

    pub fn disconnect(&mut self) {
        self.client = None;
    }

    pub fn monitor_pid(&self) -> i32 {
        fs::read_to_string(self.pod.join("monitor.pid")).unwrap().trim().parse().unwrap()
    }

    pub fn directory(&self, id: &str) -> PathBuf {
        self.pod.join("containers").join(id)
    }

    pub fn log_path(&self, id: &str) -> PathBuf {
        self.dir.path().join(format!("{id}.log"))
    }

    /// Directory of a container in a cgroup v1 controller.
    pub fn v1_cgroup(&self, controller: &str, id: &str) -> PathBuf {
        Path::new("/sys/fs/cgroup").join(controller).join(&self.cgroup).join(id)
    }

    // ----- requests

    pub fn send(&mut self, verb: Verb, fds: &[BorrowedFd<'_>]) -> u64 {
        self.last_id += 1;
        let request = Request { id: self.last_id, verb: Some(verb) };
        self.client.as_mut().unwrap().send(&request, fds).unwrap();
        self.last_id
    }

    /// The next response for which `wanted` holds; others stay for later.
    pub fn receive(&mut self, wanted: impl Fn(&Response) -> bool) -> Response {
        if let Some(index) = self.waiting.iter().position(&wanted) {
            return self.waiting.remove(index).unwrap();
        }
        loop {
            let next = self.client.as_mut().unwrap().receive().unwrap();
            let response = next.expect("the monitor has closed the connection");
            if wanted(&response) {
                return response;
            }
            self.waiting.push_back(response);
        }
    }

    pub fn answer(&mut self, id: u64) -> Outcome {
        self.receive(|response| response.request == id).outcome.unwrap()
    }

    pub fn call(&mut self, verb: Verb, fds: &[BorrowedFd<'_>]) -> Outcome {
        let id = self.send(verb, fds);
        self.answer(id)
    }

    pub fn done(&mut self, verb: Verb) {
        let outcome = self.call(verb, &[]);
        assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    }

    pub fn error(&mut self, verb: Verb) -> Error {
        match self.call(verb, &[]) {
            Outcome::Error(error) => error,
            other => panic!("{other:?}"),
        }
    }

    // ----- containers

    /// Writes a bundle whose process is `args`; `edit` may change its config.json.
    pub fn bundle(&self, id: &str, args: &[&str], edit: impl FnOnce(&mut Value)) -> Create {
        let directory = self.directory(id);
        fs::create_dir_all(&directory).unwrap();
        let mut config = config(&self.dir.path().join("rootfs"), args);
        config["linux"]["cgroupsPath"] = json!(format!("/{}/{id}", self.cgroup));
        edit(&mut config);
        fs::write(directory.join("config.json"), config.to_string()).unwrap();
        let directory = directory.to_str().unwrap().to_owned();
        Create {
            id: id.to_owned(),
            bundle: directory.clone(),
            directory,
            log_path: self.log_path(id).to_str().unwrap().to_owned(),
            terminal: config["process"]["terminal"] == true,
            ..Create::default()
        }
    }

    pub fn create(&mut self, create: Create) -> i32 {
        match self.call(Verb::Create(create), &[]) {
            Outcome::Created(started) => started.pid,
            other => panic!("{other:?}"),
        }
    }

    pub fn start(&mut self, id: &str) {
        self.done(Verb::Start(Start { id: id.to_owned() }));
    }

    pub fn run(&mut self, id: &str, args: &[&str]) -> i32 {
        let create = self.bundle(id, args, |_| {});
        let pid = self.create(create);
        self.start(id);
        pid
    }

    pub fn run_shell(&mut self, id: &str, script: &str) -> i32 {
        self.run(id, &["/bin/sh", "-c", script])
    }

    pub fn kill(&mut self, id: &str, signal: i32) {
        self.done(Verb::Signal(Signal { id: id.to_owned(), signal, all: false }));
    }

    pub fn delete(&mut self, id: &str, force: bool) {
        self.done(Verb::Delete(Delete { id: id.to_owned(), force }));
    }

    /// Waits for the event that tells of a container's end.
    pub fn exit_of(&mut self, id: &str) -> Exited {
        let response = self.receive(|response| match event(response) {
            Some(What::Exited(exited)) => exited.id == id,
            _ => false,
        });
        match event(&response) {
            Some(What::Exited(exited)) => exited.exited.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    pub fn exit_file_exists(&self, id: &str) -> bool {
        self.directory(id).join("exit.json").exists()
    }

    pub fn exit_file(&self, id: &str) -> Value {
        let text = fs::read_to_string(self.directory(id).join("exit.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    // ----- execs and attach

    /// An exec request with its process file; `exec_id` names both.
    pub fn exec_request(&self, id: &str, exec_id: &str, args: &[&str]) -> Exec {
        let path = self.dir.path().join(format!("{exec_id}.json"));
        fs::write(&path, process(args).to_string()).unwrap();
        Exec {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            process: path.to_str().unwrap().to_owned(),
            stdout: true,
            stderr: true,
            ..Exec::default()
        }
    }

    /// Starts an exec; its pid, and where to read its output and its end.
    pub fn exec(&mut self, exec: Exec) -> Running {
        let ((out, their_out), (err, their_err)) = (pipe(), pipe());
        let id = self.send(Verb::Exec(exec), &[their_out.as_fd(), their_err.as_fd()]);
        drop((their_out, their_err));
        match self.answer(id) {
            Outcome::ExecStarted(started) => Running { id, pid: started.pid, out, err },
            other => panic!("{other:?}"),
        }
    }

    pub fn exec_shell(&mut self, id: &str, exec_id: &str, script: &str) -> Running {
        let request = self.exec_request(id, exec_id, &["/bin/sh", "-c", script]);
        self.exec(request)
    }

    pub fn exec_exit(&mut self, running: &Running) -> Exited {
        match self.answer(running.id) {
            Outcome::ExecExited(exited) => exited,
            other => panic!("{other:?}"),
        }
    }

    /// Attaches to a container's output; with `stdin` also to its input.
    pub fn attach(&mut self, id: &str, stdin: bool) -> Attached {
        let ((their_in, input), (out, their_out), (err, their_err)) = (pipe(), pipe(), pipe());
        let verb = Attach { id: id.to_owned(), stdin, stdout: true, stderr: true, patient: false };
        let fds = [their_in.as_fd(), their_out.as_fd(), their_err.as_fd()];
        let fds = if stdin { &fds[..] } else { &fds[1..] };
        let outcome = self.call(Verb::Attach(verb), fds);
        assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
        Attached { input: stdin.then_some(input), out, err }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let pid = fs::read_to_string(self.pod.join("monitor.pid")).ok();
        let pid = pid.and_then(|text| text.trim().parse::<i32>().ok());
        if let Ok(mut channel) = Channel::connect(&self.pod.join("monitor.sock")) {
            let verb = Some(Verb::Shutdown(Shutdown { force: true }));
            channel.send(&Request { id: 1, verb }, &[]).unwrap();
            let pid = pid.unwrap();
            wait_until("the monitor leaves", || !alive(pid));
        } else if let Some(pid) = pid.filter(|pid| is_monitor(*pid)) {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).ok();
        }
        for entry in fs::read_dir(self.dir.path().join("runtime")).into_iter().flatten() {
            let id = entry.unwrap().file_name();
            let root = self.dir.path().join("runtime");
            Command::new(runtime())
                .arg("--root")
                .arg(root)
                .args(["delete", "--force"])
                .arg(id)
                .output()
                .unwrap();
        }
        remove_cgroups(&self.cgroup);
    }
}

/// A started exec.
pub struct Running {
    pub id: u64,
    pub pid: i32,
    pub out: OwnedFd,
    pub err: OwnedFd,
}

impl Running {
    /// Reads the output to its end.
    pub fn output(&self) -> String {
        read_all(&self.out)
    }
}

/// Our ends of an attached client's pipes.
pub struct Attached {
    pub input: Option<OwnedFd>,
    pub out: OwnedFd,
    pub err: OwnedFd,
}

/// Reads what has arrived until it contains `wanted`.
pub fn read_until(fd: &OwnedFd, wanted: &str) -> String {
    let mut text = Vec::new();
    let mut file = fs::File::from(fd.try_clone().unwrap());
    while !String::from_utf8_lossy(&text).contains(wanted) {
        let mut bytes = [0; 4096];
        let n = file.read(&mut bytes).unwrap();
        assert!(n > 0, "ended without {wanted:?}: {:?}", String::from_utf8_lossy(&text));
        text.extend_from_slice(&bytes[..n]);
    }
    String::from_utf8_lossy(&text).into_owned()
}

pub fn read_all(fd: &OwnedFd) -> String {
    let mut bytes = Vec::new();
    fs::File::from(fd.try_clone().unwrap()).read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

pub fn write(fd: &OwnedFd, bytes: &[u8]) {
    let mut rest = bytes;
    while !rest.is_empty() {
        let n = rustix::io::write(fd, rest).unwrap();
        rest = &rest[n..];
    }
}

pub fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

pub fn event(response: &Response) -> Option<&What> {
    match &response.outcome {
        Some(Outcome::Event(Event { what })) => what.as_ref(),
        _ => None,
    }
}

pub fn alive(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat"));
    status.is_ok_and(|text| !text.contains(") Z ") && !text.contains(") X "))
}

fn is_monitor(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .is_ok_and(|name| name.trim() == "pinion-monitor")
}

#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Parses a CRI log strictly and joins what one stream has written.
pub fn logged(text: &str, stream: &str) -> Vec<u8> {
    let mut joined = Vec::new();
    for line in text.split_terminator('\n') {
        let mut parts = line.splitn(4, ' ');
        let (time, name) = (parts.next().unwrap(), parts.next().unwrap());
        assert!(time.len() == 30 && time.ends_with('Z'), "{line:?}");
        assert!(["stdout", "stderr"].contains(&name), "{line:?}");
        let tag = parts.next().unwrap();
        let content = parts.next().unwrap();
        if name == stream {
            joined.extend_from_slice(content.as_bytes());
            match tag {
                "F" => joined.push(b'\n'),
                "P" => {}
                other => panic!("{other:?}"),
            }
        }
    }
    joined
}

fn make_rootfs(rootfs: &Path) {
    for name in ["bin", "proc", "dev", "tmp", "sys"] {
        fs::create_dir_all(rootfs.join(name)).unwrap();
    }
    // A copy: a container must not be able to reach the host's own.
    let places = ["/bin/busybox", "/usr/bin/busybox"];
    let busybox = places.iter().find(|path| Path::new(path).exists()).expect("busybox-static");
    fs::copy(busybox, rootfs.join("bin/busybox")).unwrap();
    for applet in APPLETS {
        symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
    }
}

pub fn process(args: &[&str]) -> Value {
    json!({
        "terminal": false,
        "user": { "uid": 0, "gid": 0 },
        "args": args,
        "env": ["PATH=/bin", "TERM=xterm"],
        "cwd": "/",
        "noNewPrivileges": true,
    })
}

fn config(rootfs: &Path, args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": process(args),
        "root": { "path": rootfs, "readonly": false },
        "hostname": "test",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] },
        ],
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" },
            ],
        },
    })
}

/// Removes our own groups, in every hierarchy, deepest first.
fn remove_cgroups(name: &str) {
    fn remove(directory: &Path) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                remove(&entry.path());
            }
        }
        wait_until("a cgroup is empty", || {
            fs::remove_dir(directory).is_ok() || !directory.exists()
        });
    }
    let mut places: Vec<PathBuf> = fs::read_dir("/sys/fs/cgroup")
        .unwrap()
        .map(|entry| entry.unwrap().path().join(name))
        .collect();
    places.push(Path::new("/sys/fs/cgroup").join(name));
    for place in places.iter().filter(|place| place.is_dir()) {
        remove(place);
    }
}
