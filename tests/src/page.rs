//! The page of a node with pods, in a real browser: what it shows is read from its document,
//! and a picture of it is taken for the README.
//!
//! ```text
//!  this machine                                     virtual node
//!  chromium ──▶ 127.0.0.1:PORT ──QEMU's user net──▶ piniond, page on 0.0.0.0:PORT
//!     │  document, picture                            pods that own CPUs, pages, or nothing
//!     └─ share/done ───────────────9p───────────────▶ the node ends
//! ```

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::assets::Assets;
use crate::command;
use crate::cri::{Container, Cri};
use crate::error::{During, Error, Result, ensure};
use crate::image::catalogue;
use crate::node::{self, Job};
use crate::pinned::{self, Ask, STRICT};
use crate::server::{Kind, Scratch};
use crate::site::Site;

const EXCLUSIVE: (&str, &str) = ("cpu.pinion.dev/exclusive", "true");
const PROFILE: &str =
    "reserved_cpus = \"0-1\"\n\n[[hugepages]]\nnode = 1\nsize = \"2MB\"\npages = 128\n";
/// The pods, by what the page is to say of them.
const PODS: usize = 4;
/// Until the node has booted and its pods run.
const PATIENCE: Duration = Duration::from_secs(400);

/// Boots a node with pods, looks at its page, and keeps a picture of it if told where.
pub(crate) fn run(assets: &Assets, picture: Option<&Path>) -> Result<()> {
    let browser = browser()?;
    let share = tempfile::tempdir().during(|| "make a directory to share".into())?;
    let port = free_port()?;
    let job = Job {
        command: ["pinion-tests", "page", "serve", &port.to_string()].map(str::to_owned).to_vec(),
        share: Some(share.path().to_owned()),
        forward: Some(port),
        ..Job::with_devices()
    };
    let done = share.path().join("done");
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let viewer = scope.spawn(|| {
            let outcome = look(&browser, port, picture, &ended);
            let told = fs::write(&done, "").during(|| format!("write {}", done.display()));
            outcome.and(told)
        });
        let code = node::run(assets, &job);
        ended.store(true, Ordering::Relaxed);
        let seen = viewer.join().map_err(|_panic| Error::check("the viewer panicked"))?;
        let code = code?;
        seen?;
        ensure(code == 0, || format!("the node ended with {code}"))
    })
}

fn browser() -> Result<PathBuf> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let names = ["chromium", "chromium-headless-shell", "google-chrome"];
    let mut candidates =
        std::env::split_paths(&paths).flat_map(|dir| names.map(|name| dir.join(name)).into_iter());
    candidates.find(|path| path.is_file()).ok_or_else(|| {
        Error::check("there is no chromium; apt-get install --no-install-recommends chromium")
    })
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).during(|| "find a port".into())?;
    Ok(listener.local_addr().during(|| "find a port".into())?.port())
}

/// Waits for the pods, then reads the page and takes its picture.
fn look(browser: &Path, port: u16, picture: Option<&Path>, ended: &AtomicBool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let state = loop {
        ensure(!ended.load(Ordering::Relaxed), || "the node is gone".into())?;
        let answer = get(port, "/node.json").and_then(|text| {
            serde_json::from_str::<serde_json::Value>(&text).during(|| "decode the node".into())
        });
        match answer {
            Ok(state) if running(&state) == PODS => break state,
            Ok(_) | Err(_) if Instant::now() < deadline => {}
            Ok(state) => return Err(Error::check(format!("{} containers run", running(&state)))),
            Err(error) => return Err(error),
        }
        std::thread::sleep(Duration::from_millis(500));
    };
    let profile = tempfile::tempdir().during(|| "make a browser profile".into())?;
    let url = format!("http://127.0.0.1:{port}/");
    let open = |options: &[&str]| {
        let mut chromium = Command::new(browser);
        chromium
            .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"])
            .args(["--no-first-run", "--disable-background-networking", "--mute-audio"])
            .args(["--window-size=1280,1180", "--virtual-time-budget=6000", "--timeout=60000"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .args(options)
            .arg(&url);
        command::text(&mut chromium)
    };
    let document = open(&["--dump-dom"])?;
    shows(&document, &state)?;
    if let Some(path) = picture {
        open(&[&format!("--screenshot={}", path.display())])?;
        let size = fs::metadata(path).during(|| format!("look at {}", path.display()))?.len();
        println!("  {}: {} KiB", path.display(), size >> 10);
    }
    Ok(())
}

fn running(state: &serde_json::Value) -> usize {
    state["containers"].as_array().map_or(0, Vec::len)
}

fn get(port: u16, path: &str) -> Result<String> {
    let what = || format!("get {path}");
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).during(what)?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).during(what)?;
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).during(what)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).during(what)?;
    let (_, body) = answer.split_once("\r\n\r\n").ok_or_else(|| Error::check("no answer"))?;
    Ok(body.to_owned())
}

/// The document after its script ran, against what the node is known to have.
fn shows(document: &str, state: &serde_json::Value) -> Result<()> {
    let has = |what: &str, times: usize| {
        let found = document.matches(what).count();
        println!("  {what:?}: {found} times");
        ensure(found == times, || format!("the page has {what:?} {found} times, not {times}"))
    };
    let cpus = state["topology"]["cpus"].as_array().map_or(0, Vec::len);
    has("data-cpu=", cpus)?;
    has("data-node=", 2)?;
    // Two pods with a core each, and one with half a core; no others.
    has("data-owner=", 5)?;
    has("data-verdict=\"aligned\"", 2)?;
    has("data-verdict=\"degraded\"", 1)?;
    has("class=\"lost\"", 0)?;
    ensure(document.contains("upf/main"), || "no owner is called upf/main".into())?;
    ensure(document.contains("8086:10c9") && document.contains("64 granted"), || {
        "neither the NICs nor the hugepages are shown".into()
    })
}

/// In the node: the pods and their page, until `/mnt/share/done` is there.
pub(crate) fn serve(assets: &Assets, port: u16) -> Result<()> {
    for words in [
        &["modprobe", "virtio_net"][..],
        &["ip", "link", "set", "eth0", "up"],
        &["ip", "address", "add", "10.0.2.15/24", "dev", "eth0"],
    ] {
        command::run(Command::new(words[0]).args(&words[1..]))?;
    }
    let write = |path: &Path, text: &str| {
        path.parent().map_or(Ok(()), fs::create_dir_all).during(|| path.display().to_string())?;
        fs::write(path, text).during(|| format!("write {}", path.display()))
    };
    write(Path::new("/etc/pinion/node.toml"), PROFILE)?;
    let scratch = Scratch::new()?;
    let web = format!("[web]\naddress = \"0.0.0.0:{port}\"\nallow_remote = true\n");
    write(&scratch.path("config.d/web.toml"), &web)?;
    let site = Site::over(assets, Kind::Piniond, scratch)?;
    let cri = site.connect()?;
    cri.pull(catalogue::WORKLOAD)?;
    pods(&site, &cri)?;
    let deadline = Instant::now() + PATIENCE;
    while !Path::new("/mnt/share/done").exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(200));
    }
    cri.remove_all()?;
    pinned::remove_kubelet_cgroups();
    Ok(())
}

/// Two strict pods, one on each NUMA node; one that gets less than it asked for; one that
/// asked for nothing.
fn pods(site: &Site, cri: &Cri) -> Result<()> {
    let start = |name: &str, handler: &str, annotations: &[_], container: &Container| {
        let mut pod = pinned::kubelet_pod(site, name, "")?;
        pod.handler = handler.into();
        pod.annotations = annotations.to_vec();
        let id = cri.run_pod(&pod)?;
        cri.launch(&id, &pod, container)
    };
    let topology = crate::evidence::topology()?;
    for (name, node, core, hugepages) in [("upf", 1, 0, 64), ("du-l1", 0, 1, 32)] {
        let cpus = pinned::whole_core(&topology, node, core)?.to_string();
        let ask = Ask { cpus, mems: node.to_string(), hugepages };
        start(name, STRICT, &[EXCLUSIVE], &pinned::holder("main", &ask)?)?;
    }
    let mut sleeper = Container::new("main", catalogue::WORKLOAD, &["sleep", "3600"]);
    start("web", "", &[], &sleeper)?;
    let half = pinned::whole_core(&topology, 1, 2)?.first().map(|cpu| cpu.to_string());
    let half = Ask { cpus: half.unwrap_or_default(), mems: "1".into(), hugepages: 0 };
    sleeper.resources = Some(half.resources()?);
    start("amf", "", &[EXCLUSIVE], &sleeper)?;
    Ok(())
}
