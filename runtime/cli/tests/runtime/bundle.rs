//! A bundle, a state directory and a container's name of their own for every test.

use std::ffi::OsStr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Says why the point of a test cannot be shown here, with the arguments of `format!`.
///
/// A test that then returns counts as passed; `PINION_MOOT` names a file that collects these
/// lines, so that whoever runs the suite can count and name them.
macro_rules! moot {
    ($($reason:tt)*) => { $crate::bundle::report_moot(&format!($($reason)*)) };
}
pub(crate) use moot;

pub(crate) fn report_moot(reason: &str) {
    use std::io::Write;
    println!("not possible here: {reason}");
    let Some(path) = std::env::var_os("PINION_MOOT") else { return };
    let thread = std::thread::current();
    let line = format!("{}: {}\n", thread.name().unwrap_or("?"), reason.replace('\n', " "));
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    file.and_then(|mut file| file.write_all(line.as_bytes())).unwrap();
}

/// The runtime under test.
pub(crate) fn runtime() -> PathBuf {
    match std::env::var_os("PINION_RUNTIME") {
        Some(path) => path.into(),
        None => env!("CARGO_BIN_EXE_pinion").into(),
    }
}

/// True when the runtime under test is this project's; otherwise says why the test is moot.
pub(crate) fn is_pinion() -> bool {
    let own = std::env::var_os("PINION_RUNTIME").is_none_or(|path| {
        Path::new(&path).file_name().is_some_and(|name| name.to_string_lossy().contains("pinion"))
    });
    if !own {
        moot!("only pinion does this");
    }
    own
}

/// True when the runtime under test is this project's or a runc of at least `1.minor`;
/// otherwise says why the test is moot.
pub(crate) fn is_runc_since(minor: u32) -> bool {
    let version = output(Command::new(runtime()).arg("--version"));
    let text = String::from_utf8_lossy(&version.stdout).into_owned();
    let number = text.lines().next().and_then(|line| line.split_once("runc version 1."));
    let older = number.is_some_and(|(_, rest)| {
        rest.split('.').next().and_then(|n| n.parse().ok()).is_none_or(|has: u32| has < minor)
    });
    if older {
        moot!("runc before 1.{minor} does not do this");
    }
    !older
}

/// True when a program is installed; otherwise says why the test is moot.
pub(crate) fn has_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let has = std::env::split_paths(&path).any(|directory| directory.join(name).exists());
    if !has {
        moot!("{name} is not installed");
    }
    has
}

/// True when a program is installed, and it is not busybox, which knows half its options.
pub(crate) fn has_full_program(name: &str) -> bool {
    // As scripts run it: busybox's shell takes its own before what is in the path.
    let version = format!("{name} -V");
    let full =
        has_program(name) && output(Command::new("sh").args(["-c", &version])).status.success();
    if !full {
        moot!("{name} is only busybox's");
    }
    full
}

/// True when the host's cgroups have this controller; otherwise says why the test is moot.
pub(crate) fn has_controller(name: &str) -> bool {
    let v2 = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    let has = v2.split_whitespace().any(|controller| controller == name)
        || Path::new("/sys/fs/cgroup").join(name).is_dir();
    if !has {
        moot!("there is no {name} controller");
    }
    has
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// The standard output of a success.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout
    }

    /// Asserts a failure whose message contains `text`.
    #[track_caller]
    pub(crate) fn fails_with(&self, text: &str) {
        assert!(self.code.is_some_and(|code| code != 0), "{self:?}");
        let message = self.stderr.replace("\\\"", "\"");
        assert!(message.contains(text), "{self:?} lacks {text:?}");
    }
}

/// One container to be.
pub(crate) struct Bundle {
    directory: tempfile::TempDir,
    pub(crate) id: String,
    pub(crate) config: Value,
}

impl Bundle {
    /// A bundle with busybox in it that runs `script` in a shell.
    pub(crate) fn new(script: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let directory = tempfile::tempdir().unwrap();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let id = format!("pinion-test-{}-{number}", std::process::id());
        let bundle = Self { config: template(&id, script), directory, id };
        make_rootfs(&bundle.rootfs());
        bundle
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.path().join("rootfs")
    }

    pub(crate) fn state_root(&self) -> PathBuf {
        self.path().join("state")
    }

    /// Adds a mount to the configuration.
    pub(crate) fn mount(&mut self, destination: &str, kind: &str, source: &str, options: &[&str]) {
        let mount = json!({
            "destination": destination, "type": kind, "source": source, "options": options,
        });
        self.config["mounts"].as_array_mut().unwrap().push(mount);
    }

    pub(crate) fn write_config(&self) {
        std::fs::write(self.path().join("config.json"), self.config.to_string()).unwrap();
    }

    /// A command of the runtime with this test's state directory.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(runtime());
        command.arg("--root").arg(self.state_root()).args(arguments);
        command.stdin(Stdio::null()).current_dir(self.path());
        command
    }

    /// Runs a verb to its end. Output goes through files: a waiting container would keep
    /// pipes open.
    pub(crate) fn verb<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Outcome {
        let mut command = self.command(arguments);
        finish(&mut command, self.path())
    }

    /// `run` in the foreground.
    pub(crate) fn run(&self) -> Outcome {
        self.write_config();
        self.verb(&["run", &self.id])
    }

    /// Runs it where all mounts are shared, as on a machine with systemd, and `before` and
    /// `after` with it.
    #[track_caller]
    pub(crate) fn run_on_shared_mounts(&self, before: &str, after: &str) -> Outcome {
        self.write_config();
        let run = self.command(&["run", &self.id]);
        let words: Vec<_> = std::iter::once(run.get_program())
            .chain(run.get_args())
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        let script = format!("{before}\n{}\nstatus=$?\n{after}\nexit $status", words.join(" "));
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "shared", "sh", "-c", &script]);
        finish(command.current_dir(self.path()), self.path())
    }

    #[track_caller]
    pub(crate) fn create(&self) {
        self.write_config();
        self.verb(&["create", &self.id]).ok();
    }

    #[track_caller]
    pub(crate) fn start(&self) {
        self.verb(&["start", &self.id]).ok();
    }

    /// Creates and starts a container that is to keep running.
    #[track_caller]
    pub(crate) fn launch(&self) {
        self.create();
        self.start();
    }

    #[track_caller]
    pub(crate) fn state(&self) -> Value {
        serde_json::from_str(&self.verb(&["state", &self.id]).ok()).unwrap()
    }

    #[track_caller]
    pub(crate) fn status(&self) -> String {
        self.state()["status"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.state()["pid"].as_i64().unwrap()).unwrap()
    }

    /// Runs a script in the container.
    pub(crate) fn exec(&self, script: &str) -> Outcome {
        self.verb(&["exec", &self.id, "/bin/sh", "-c", script])
    }

    #[track_caller]
    pub(crate) fn wait_for(&self, status: &str) {
        eventually(|| self.status() == status);
    }

    /// The container's cgroup directories that exist now.
    pub(crate) fn cgroups(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let below = Path::new(&self.id);
        let root = Path::new("/sys/fs/cgroup");
        let hierarchies = std::fs::read_dir(root).unwrap().flatten().map(|entry| entry.path());
        for hierarchy in hierarchies.chain([root.to_owned()]) {
            let directory = hierarchy.join(below);
            if directory.is_dir() {
                found.push(directory);
            }
        }
        found
    }

    /// Asserts that nothing of the container is left.
    #[track_caller]
    pub(crate) fn assert_nothing_left(&self) {
        let left = std::fs::read_dir(self.state_root()).map_or(0, Iterator::count);
        assert_eq!(left, 0, "state is left");
        assert_eq!(self.cgroups(), Vec::<PathBuf>::new(), "cgroups are left");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let own = self.path().to_string_lossy().into_owned();
        assert!(!mounts.contains(&own), "mounts are left");
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = self.command(&["delete", "--force", &self.id]).stderr(Stdio::null()).status();
    }
}

/// Runs a command with its output in files below `directory`.
pub(crate) fn finish(command: &mut Command, directory: &Path) -> Outcome {
    let open = |name: &str| {
        let path = directory.join(name);
        (std::fs::File::create(&path).unwrap(), path)
    };
    let number = std::thread::current().id();
    let (stdout, stdout_path) = open(&format!("stdout-{number:?}"));
    let (stderr, stderr_path) = open(&format!("stderr-{number:?}"));
    let status = command.stdout(stdout).stderr(stderr).status().unwrap();
    let read = |path| String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned();
    Outcome { code: status.code(), stdout: read(stdout_path), stderr: read(stderr_path) }
}

/// Output of a command that needs no container.
pub(crate) fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

/// Waits up to ten seconds.
#[track_caller]
pub(crate) fn eventually(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "it did not happen within ten seconds");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn make_rootfs(rootfs: &Path) {
    for directory in ["bin", "proc", "sys", "dev", "etc", "tmp", "root"] {
        std::fs::create_dir_all(rootfs.join(directory)).unwrap();
    }
    std::fs::copy(busybox(), rootfs.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "ls", "id", "echo", "sleep", "true", "false", "env", "pwd", "readlink",
        "stat", "touch", "mkdir", "hostname", "grep", "head", "wc", "test", "dd", "umask", "mount",
        "ps", "ip", "uname", "tty", "kill", "nice", "mknod", "stty", "dirname", "sort", "tr",
        "cut", "rm", "date",
    ] {
        symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
    }
    std::fs::write(
        rootfs.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    )
    .unwrap();
}

fn busybox() -> PathBuf {
    let places = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
    places.into_iter().find(|path| path.exists()).expect("busybox-static is needed")
}

fn template(id: &str, script: &str) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": ["/bin/sh", "-c", script],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": capabilities(&["CAP_KILL", "CAP_CHOWN"]),
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs" },
        "hostname": "box",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] },
        ],
        "linux": {
            "cgroupsPath": format!("/{id}"),
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                { "type": "network" },
            ],
            "maskedPaths": ["/proc/kcore", "/proc/acpi"],
            "readonlyPaths": ["/proc/sys"],
        },
    })
}

/// The three sets a container usually has.
pub(crate) fn capabilities(names: &[&str]) -> Value {
    json!({ "bounding": names, "effective": names, "permitted": names })
}
