//! Bad input and broken surroundings: a clear error, no leftovers, and the server keeps
//! serving.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::MsFlags;
use serde_json::json;

use crate::assets::{self, Assets};
use crate::command;
use crate::cri::{Container, Cri};
use crate::error::{During, Error, Result, ensure};
use crate::image::catalogue;
use crate::leaks::{self, Snapshot};
use crate::server::{Kind, Scratch};
use crate::site::{CNI_CONFIG, Site};

const CLEANUP: Duration = Duration::from_secs(20);
/// How long an unreachable registry may keep a caller waiting.
const UNREACHABLE: Duration = Duration::from_secs(60);

type Case = (&'static str, fn(&Assets, &Site, &Cri) -> Result<()>);

const CASES: [Case; 6] = [
    ("an unknown capability", unknown_capability),
    ("an unreachable registry", unreachable_registry),
    ("an image that does not exist", absent_image),
    ("a corrupt layer", corrupt_layer),
    ("a broken CNI plugin", broken_cni_plugin),
    ("a full disk", full_disk),
];

/// Runs every case and names those that failed.
pub(crate) fn run(assets: &Assets, kind: Kind) -> Result<()> {
    let mut failed = 0;
    let mut report = |name: &str, outcome: Result<()>| match outcome {
        Ok(()) => println!("ok      {name}"),
        Err(error) => {
            println!("FAILED  {name}: {}", error.chain());
            failed += 1;
        }
    };
    if kind == Kind::Piniond {
        report("a malformed config.json", malformed_bundle("{ not json", "config.json"));
        report(
            "a config.json without root",
            malformed_bundle("{\"ociVersion\":\"1.0.2\"}", "root"),
        );
        report("a missing rootfs", missing_rootfs());
    }
    let site = Site::open(assets, kind)?;
    let cri = site.connect()?;
    site.warm_up(&cri)?;
    let before = Snapshot::take();
    for (name, case) in CASES {
        let outcome = case(assets, &site, &cri)
            .and_then(|()| leaks::nothing_since(&before, CLEANUP))
            .and_then(|()| site.warm_up(&cri));
        if outcome.is_err() {
            // the next case is judged on its own
            let _ = cri.remove_all();
        }
        report(name, outcome);
    }
    ensure(failed == 0, || format!("{failed} cases of bad input are not handled well"))
}

/// The error's text, lower case; a success is a failure here.
fn refused<T>(outcome: Result<T>, what: &str) -> Result<String> {
    match outcome {
        Ok(_) => Err(Error::check(format!("{what} was accepted"))),
        Err(error) => Ok(error.chain().to_lowercase()),
    }
}

fn names_one_of(text: &str, words: &[&str]) -> Result<()> {
    ensure(words.iter().any(|word| text.contains(word)), || {
        format!("the error names none of {words:?}: {text}")
    })
}

/// `pinion create` on a bundle whose config.json is this text.
fn malformed_bundle(config: &str, named: &str) -> Result<()> {
    let bundle = tempfile::tempdir().during(|| "make a bundle".into())?;
    let path = bundle.path().join("config.json");
    fs::write(&path, config).during(|| format!("write {}", path.display()))?;
    let text = refused(create(bundle.path()), "the bundle")?;
    names_one_of(&text, &[named])
}

fn missing_rootfs() -> Result<()> {
    let bundle = tempfile::tempdir().during(|| "make a bundle".into())?;
    let config = json!({
        "ociVersion": "1.0.2",
        "root": { "path": "nowhere" },
        "process": { "cwd": "/", "args": ["true"], "user": { "uid": 0, "gid": 0 } },
        "linux": { "namespaces": [{ "type": "mount" }, { "type": "pid" }] },
    });
    let path = bundle.path().join("config.json");
    fs::write(&path, config.to_string()).during(|| format!("write {}", path.display()))?;
    let text = refused(create(bundle.path()), "the bundle")?;
    names_one_of(&text, &["nowhere"])
}

/// Creates a container that cannot be; whatever happens, nothing may be left.
fn create(bundle: &Path) -> Result<()> {
    let state = tempfile::tempdir().during(|| "make a state directory".into())?;
    let before = Snapshot::take();
    let outcome = command::run(
        Command::new(assets::binary("pinion")?)
            .arg("--root")
            .arg(state.path())
            .args(["create", "--bundle"])
            .arg(bundle)
            .arg("bad-bundle"),
    );
    leaks::nothing_since(&before, CLEANUP)?;
    let left = fs::read_dir(state.path()).during(|| "list the state directory".into())?.count();
    ensure(left == 0 || outcome.is_ok(), || "state of the failed container is left".into())?;
    outcome.map(drop)
}

fn unknown_capability(_: &Assets, site: &Site, cri: &Cri) -> Result<()> {
    let pod = site.pod("capability")?;
    let pod_id = cri.run_pod(&pod)?;
    let mut container = Container::new("main", catalogue::WORKLOAD, &["true"]);
    container.capabilities.push("WARP_DRIVE".into());
    let text = refused(cri.launch(&pod_id, &pod, &container), "CAP_WARP_DRIVE")?;
    let left = cri.containers()?.len();
    cri.remove_pod(&pod_id)?;
    names_one_of(&text, &["warp_drive"])?;
    ensure(left <= 1, || format!("{left} containers are listed"))
}

fn unreachable_registry(_: &Assets, _: &Site, cri: &Cri) -> Result<()> {
    let started = Instant::now();
    let text = refused(cri.pull("127.0.0.1:9/nobody/listens:1"), "the pull")?;
    ensure(started.elapsed() < UNREACHABLE, || format!("it took {:?}", started.elapsed()))?;
    names_one_of(&text, &["127.0.0.1:9"])?;
    names_one_of(&text, &["refused", "connect"])
}

fn absent_image(_: &Assets, _: &Site, cri: &Cri) -> Result<()> {
    let text = refused(cri.pull("registry.k8s.io/no/such/image:1"), "the pull")?;
    names_one_of(&text, &["not found", "notfound", "unknown"])
}

/// A registry whose copy of a layer has a wrong byte in the middle.
fn corrupt_layer(assets: &Assets, site: &Site, cri: &Cri) -> Result<()> {
    let storage = site.scratch.path("corrupt");
    command::run(Command::new("cp").arg("-a").arg(assets.images()?).arg(&storage))?;
    let biggest = command::text(
        Command::new("find").arg(&storage).args(["-name", "data", "-size", "+200k"]),
    )?;
    for path in biggest.lines() {
        let mut bytes = fs::read(path).during(|| format!("read {path}"))?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0xff;
        fs::write(path, bytes).during(|| format!("write {path}"))?;
    }
    let logs = site.scratch.path("corrupt-logs");
    fs::create_dir_all(&logs).during(|| "make a directory".into())?;
    let registry = assets.registry_over(&storage, &logs)?;
    // an image of which no layer is on the node yet
    let reference = format!("{}/e2e-test-images/httpd:2.4.39-4", registry.address);
    let text = refused(cri.pull(&reference), "the corrupt image")?;
    names_one_of(&text, &["digest", "sha256", "corrupt", "checksum"])?;
    let names = cri.image_names()?;
    ensure(!names.contains(&reference), || "the corrupt image is listed".into())
}

/// A network configuration whose plugin fails with an error of its own.
fn broken_cni_plugin(_: &Assets, site: &Site, cri: &Cri) -> Result<()> {
    let good = site.scratch.path(CNI_CONFIG);
    let kept = fs::read(&good).during(|| format!("read {}", good.display()))?;
    let error = json!({
        "cniVersion": "1.0.0", "code": 999, "msg": "the flux capacitor is empty",
    });
    let plugins = site.scratch.path("cni/broken");
    fs::create_dir_all(&plugins).during(|| "make a directory".into())?;
    let plugin = plugins.join("broken");
    let script =
        format!("#!/bin/sh\n[ \"$CNI_COMMAND\" = ADD ] || exit 0\necho '{error}'\nexit 1\n");
    fs::write(&plugin, script).during(|| format!("write {}", plugin.display()))?;
    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755))
        .during(|| format!("chmod {}", plugin.display()))?;
    let list = json!({
        "cniVersion": "1.0.0", "name": "broken", "plugins": [{ "type": "broken" }],
    });
    let restore = || fs::write(&good, &kept).during(|| format!("write {}", good.display()));
    fs::write(&good, list.to_string()).during(|| format!("write {}", good.display()))?;
    // servers notice a changed directory in their own time
    std::thread::sleep(Duration::from_secs(1));
    let outcome = refused(cri.run_pod(&site.pod("no-network")?), "the pod");
    let listed = cri.pods();
    restore()?;
    std::thread::sleep(Duration::from_secs(1));
    names_one_of(&outcome?, &["flux capacitor", "broken"])?;
    for pod in listed? {
        cri.remove_pod(&pod.id)?;
    }
    Ok(())
}

/// No room for images. The space comes back, and so does the server.
fn full_disk(assets: &Assets, site: &Site, _: &Cri) -> Result<()> {
    let scratch = Scratch::new()?;
    let root = scratch.path("root");
    let tmpfs = |options: &str, flags| {
        nix::mount::mount(Some("tmpfs"), &root, Some("tmpfs"), flags, Some(options))
            .during(|| format!("mount a tmpfs with {options}"))
    };
    tmpfs("size=5M", MsFlags::empty())?;
    let full = Site::over(assets, site.server.kind(), scratch)?;
    let cri = full.connect()?;
    let text = refused(cri.pull(catalogue::WORKLOAD), "the pull to a full disk")?;
    names_one_of(&text, &["no space", "enospc", "full"])?;
    cri.version()?;
    ensure(cri.image_names()?.is_empty(), || "half an image is listed".into())?;
    tmpfs("size=200M", MsFlags::MS_REMOUNT)?;
    full.warm_up(&cri)
}
