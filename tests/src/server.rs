//! A CRI server under test, in directories of its own: piniond, or containerd as the peer
//! that shows the suites themselves to be right.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::assets::{self, Assets};
use crate::command;
use crate::cri::Cri;
use crate::error::{During, Error, Result};

/// Which server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// Ours.
    Piniond,
    /// Debian's containerd with runc.
    Containerd,
}

impl Kind {
    /// As on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Piniond => "piniond",
            Kind::Containerd => "containerd",
        }
    }
}

/// The directories a server runs in. They are removed with this value, mounts first.
#[derive(Debug)]
pub(crate) struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    /// A fresh set of directories.
    pub(crate) fn new() -> Result<Self> {
        let dir = tempfile::Builder::new()
            // short: a unix socket below it, with a 64-digit id in its path, has 107 bytes
            .prefix("pin-")
            .tempdir()
            .during(|| "make a scratch directory".into())?;
        let scratch = Self { dir };
        for name in ["root", "run", "certs.d", "cni/net.d", "cni/cache", "logs"] {
            let path = scratch.path(name);
            fs::create_dir_all(&path).during(|| format!("create {}", path.display()))?;
        }
        Ok(scratch)
    }

    /// A path in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for mount in crate::leaks::mounts_below(self.dir.path()).into_iter().rev() {
            let _ = nix::mount::umount2(&mount, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// A running server.
#[derive(Debug)]
pub(crate) struct Server {
    kind: Kind,
    process: Child,
    config: PathBuf,
    log: PathBuf,
    /// The CRI socket.
    pub(crate) socket: PathBuf,
    /// Where NRI plugins connect, if they can.
    pub(crate) nri_socket: Option<PathBuf>,
}

impl Server {
    /// Writes the configuration and starts the server; returns when it answers.
    pub(crate) fn start(kind: Kind, assets: &Assets, scratch: &Scratch) -> Result<Self> {
        let cni = assets.cni_plugins()?;
        let (socket, text) = match kind {
            Kind::Piniond => piniond_config(scratch, &cni),
            Kind::Containerd => containerd_config(scratch, &cni),
        };
        let config = scratch.path("config.toml");
        fs::write(&config, text).during(|| format!("write {}", config.display()))?;
        let log = scratch.path("server.log");
        let process = spawn(kind, &config, &log)?;
        let nri_socket = (kind == Kind::Piniond).then(|| scratch.path("run/nri.sock"));
        let mut server = Self { kind, process, config, log, socket, nri_socket };
        server.wait_ready()?;
        Ok(server)
    }

    /// The socket as clients want it.
    pub(crate) fn endpoint(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// The server's process.
    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Which server it is.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The last lines of the server's log.
    pub(crate) fn log_tail(&self, lines: usize) -> String {
        command::tail(&fs::read_to_string(&self.log).unwrap_or_default(), lines)
    }

    /// Whether its process has not ended.
    pub(crate) fn alive(&mut self) -> Result<bool> {
        // A signal that was just sent takes effect before its sender's next call, strace's not.
        std::thread::sleep(Duration::from_millis(20));
        Ok(self.process.try_wait().during(|| "look at the server".into())?.is_none())
    }

    /// Kills the server as a power cut would: SIGKILL, nothing said.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.process.kill().during(|| "kill the server".into())?;
        self.process.wait().during(|| "wait for the server".into())?;
        Ok(())
    }

    /// Starts the killed server again over the same state; the time until it answers.
    pub(crate) fn restart(&mut self) -> Result<Duration> {
        let started = Instant::now();
        self.process = spawn(self.kind, &self.config, &self.log)?;
        self.wait_ready()?;
        Ok(started.elapsed())
    }

    /// Waits until the server answers; listening alone does not say that it has recovered.
    fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let answer = Cri::connect(&self.socket).and_then(|cri| cri.pods());
            let Err(error) = answer else { return Ok(()) };
            let ended = self.process.try_wait().during(|| "wait for the server".into())?;
            let failure = match ended {
                Some(status) => format!("the server ended with {status}"),
                None if Instant::now() > deadline => format!("no answer: {}", error.chain()),
                None => {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
            };
            return Err(Error::check(format!("{failure}\n{}", self.log_tail(20))));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.process.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(10);
        while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn spawn(kind: Kind, config: &Path, log: &Path) -> Result<Child> {
    let output = fs::File::options()
        .create(true)
        .append(true)
        .open(log)
        .during(|| format!("open {}", log.display()))?;
    let errors = output.try_clone().during(|| "duplicate a descriptor".into())?;
    let program = match kind {
        Kind::Piniond => assets::binary("piniond")?,
        Kind::Containerd => "containerd".into(),
    };
    Command::new(&program)
        .arg("--config")
        .arg(config)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .during(|| format!("start {}", program.display()))
}

fn piniond_config(scratch: &Scratch, cni: &Path) -> (PathBuf, String) {
    let socket = scratch.path("run/piniond.sock");
    let driver = if crate::pinned::is_systemd() { "systemd" } else { "cgroupfs" };
    let path = |name: &str| scratch.path(name).display().to_string();
    let text = format!(
        "[server]\nroot = {:?}\nrun_dir = {:?}\n\n[log]\nlevel = \"info\"\n\n\
         [runtime]\ncgroup_driver = {driver:?}\n\n[image]\nregistry_configs = [{:?}]\n\n\
         [network]\nconf_dir = {:?}\nbin_dirs = [{:?}]\ncache_dir = {:?}\n\n\
         [nri]\nsocket = {:?}\nplugin_dir = {:?}\nrequest_timeout_ms = 10000\n",
        path("root"),
        path("run"),
        path("certs.d"),
        path("cni/net.d"),
        cni.display().to_string(),
        path("cni/cache"),
        path("run/nri.sock"),
        path("nri-plugins"),
    );
    (socket, text)
}

fn containerd_config(scratch: &Scratch, cni: &Path) -> (PathBuf, String) {
    let socket = scratch.path("run/containerd.sock");
    let path = |name: &str| scratch.path(name).display().to_string();
    let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
    let text = format!(
        "version = 2\nroot = {:?}\nstate = {:?}\n[grpc]\naddress = {:?}\n[{cri}]\n\
         sandbox_image = \"registry.k8s.io/pause:3.9\"\ndisable_apparmor = true\nrestrict_oom_score_adj = true\n\
         [{cri}.cni]\nbin_dir = {:?}\nconf_dir = {:?}\n[{cri}.registry]\nconfig_path = {:?}\n\
         [{cri}.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n",
        path("root"),
        path("run"),
        socket.display().to_string(),
        cni.display().to_string(),
        path("cni/net.d"),
        path("certs.d"),
    );
    (socket, text)
}
