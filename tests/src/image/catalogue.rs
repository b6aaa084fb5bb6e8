//! The images the suites want, under the names the suites use.
//!
//! critest pulls by fixed names and checks what is inside (users, groups, ports, a setuid
//! program, images that differ only by tag), so each image honours that contract while its
//! programs are Debian's busybox and our own `pinion-workload`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::{Image, Layer, LayerBuilder, Process};
use crate::command;
use crate::debian::Tree;
use crate::error::Result;

/// Raised whenever the images change, so that cached ones are made again.
pub(crate) const REVISION: u32 = 2;
/// The image of the demo and of our own suites: busybox and the workload.
pub(crate) const WORKLOAD: &str = "docker.io/pinion/workload:1";
/// busybox under the name that critest and kubelet tests use.
pub(crate) const BUSYBOX: &str = "registry.k8s.io/e2e-test-images/busybox:1.29-2";
/// What critest pulls by digest; its constant is replaced by ours.
pub(crate) const DIGEST_IMAGE: &str = "gcr.io/k8s-staging-cri-tools/test-image-digest";

const STAGING: &str = "gcr.io/k8s-staging-cri-tools";
const E2E: &str = "registry.k8s.io/e2e-test-images";

const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
bin:x:2:2:bin:/bin:/bin/false
mail:x:8:8:mail:/var/mail:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
operator:x:37:37:Operator:/var:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
";
const GROUP: &str = "\
root:x:0:
daemon:x:1:
bin:x:2:
mail:x:8:
www-data:x:33:
operator:x:37:
users:x:100:
nobody:x:65534:
";

/// An image and the names it is pulled by.
#[derive(Debug)]
pub(crate) struct Named {
    /// Full references: host/path:tag.
    pub(crate) references: Vec<String>,
    /// The image.
    pub(crate) image: Image,
}

/// Builds every image from a tree of Debian's files and the workload program.
pub(crate) fn build(tree: &Tree, workload: &Path) -> Result<Vec<Named>> {
    let base = base_layer(tree)?;
    let program = |path: &str, mode: u32| -> Result<Arc<Layer>> {
        let bytes = std::fs::read(workload).map_err(|source| crate::error::Error::Io {
            what: format!("read {}", workload.display()),
            source,
        })?;
        let mut layer = LayerBuilder::default();
        layer.file(path, mode, &bytes)?;
        layer.finish()
    };
    let mut images = Vec::new();
    let mut add = |reference: String, process: &Process, layers: &[&Arc<Layer>]| {
        images.push(Named { references: vec![reference], image: Image::new(process, layers) });
    };

    let shell = Process { cmd: &["sh"], ..Process::default() };
    for name in [
        BUSYBOX,
        "docker.io/library/busybox:latest",
        "public.ecr.aws/docker/library/busybox:latest",
        "public.ecr.aws/docker/library/busybox:1",
    ] {
        add(name.into(), &shell, &[&base]);
    }
    let workload_layer = program("usr/bin/pinion-workload", 0o755)?;
    add(WORKLOAD.into(), &shell, &[&base, &workload_layer]);

    let nginx = program("usr/sbin/nginx", 0o755)?;
    let serve =
        Process { cmd: &["nginx", "-g", "daemon off;"], ports: &["80/tcp"], ..Process::default() };
    add(format!("{E2E}/nginx:1.14-2"), &serve, &[&base, &nginx]);
    let host = Process { cmd: &["nginx", "-p", "12003"], ports: &["12003/tcp"], ..serve };
    add(format!("{STAGING}/hostnet-nginx-amd64:latest"), &host, &[&base, &nginx]);
    let httpd = program("usr/local/bin/httpd-foreground", 0o755)?;
    let serve = Process { cmd: &["httpd-foreground"], ports: &["80/tcp"], ..Process::default() };
    add(format!("{E2E}/httpd:2.4.39-4"), &serve, &[&base, &httpd]);

    let nnp = program("nnp", 0o4755)?;
    let setuid = Process { entrypoint: &["/nnp"], ..Process::default() };
    add(format!("{E2E}/nonewprivs:1.3"), &setuid, &[&base, &nnp]);

    for (suffix, user) in [
        ("uid", "1002"),
        ("username", "www-data"),
        ("uid-group", "1003:1004"),
        ("username-group", "www-data:1004"),
    ] {
        let process = Process { user, ..shell.clone() };
        add(format!("{STAGING}/test-image-user-{suffix}:latest"), &process, &[&base]);
    }
    let process = Process { user: "1000", ..shell.clone() };
    let group = predefined_group_layer()?;
    add(format!("{STAGING}/test-image-predefined-group:latest"), &process, &[&base, &group]);

    for name in ["1:latest", "2:latest", "3:latest", "latest:latest", "digest:latest"] {
        let marked = marker_layer(name)?;
        add(format!("{STAGING}/test-image-{name}"), &shell, &[&base, &marked]);
    }
    for tag in ["test", "all"] {
        let marked = marker_layer(tag)?;
        add(format!("{STAGING}/test-image-tag:{tag}"), &shell, &[&base, &marked]);
    }

    let pause = Process { entrypoint: &["/pause"], user: "65535:65535", ..Process::default() };
    let pause = Image::new(&pause, &[&program("pause", 0o755)?]);
    let names = ["registry.k8s.io/pause:3.9", "k8s.gcr.io/pause:3.9", "registry.k8s.io/pause:3.6"];
    images.push(Named { references: names.map(Into::into).into(), image: pause });
    let same = Image::new(&shell, &[&base, &marker_layer("same-image")?]);
    let names = ["1", "2", "3"].map(|tag| format!("{STAGING}/test-image-tags:{tag}"));
    images.push(Named { references: names.into(), image: same });
    Ok(images)
}

/// busybox with all its applets, the two tools it lacks, libraries, users and groups.
fn base_layer(tree: &Tree) -> Result<Arc<Layer>> {
    let mut layer = LayerBuilder::default();
    for dir in [
        "bin",
        "dev",
        "etc",
        "home",
        "lib64",
        "proc",
        "run",
        "sbin",
        "sys",
        "usr",
        "usr/bin",
        "usr/sbin",
        "usr/local",
        "usr/local/bin",
        "usr/lib",
        "usr/lib/x86_64-linux-gnu",
        "var",
        "var/www",
        "var/log",
        "lib",
        "lib/x86_64-linux-gnu",
    ] {
        layer.dir(dir, 0o755)?;
    }
    layer.dir("root", 0o700)?.dir("tmp", 0o1777)?.dir("var/tmp", 0o1777)?;
    layer.link("var/run", "/run")?;

    let busybox = tree.find("bin/busybox")?;
    let extra = [tree.find("usr/bin/pgrep")?, tree.find("usr/bin/ipcs")?];
    layer.copy("bin/busybox", &busybox)?;
    let mut libraries = BTreeMap::new();
    for program in std::iter::once(&busybox).chain(&extra) {
        libraries.extend(tree.libraries(program)?);
    }
    for (inside, path) in &libraries {
        layer.copy(inside, path)?;
    }
    let loader = tree.find("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")?;
    layer.copy("lib64/ld-linux-x86-64.so.2", &loader)?;
    for program in &extra {
        let name = program.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        layer.copy(&format!("usr/bin/{name}"), program)?;
    }
    let applets = command::text(tree.command("bin/busybox")?.arg("--list-full"))?;
    for applet in applets.lines().filter(|path| *path != "bin/busybox") {
        // hard links, so that masking the path of one applet leaves the others alone
        layer.hard_link(applet, "bin/busybox")?;
    }
    layer.file("etc/passwd", 0o644, PASSWD.as_bytes())?;
    layer.file("etc/group", 0o644, GROUP.as_bytes())?;
    layer.finish()
}

fn predefined_group_layer() -> Result<Arc<Layer>> {
    let mut layer = LayerBuilder::default();
    let passwd = format!("{PASSWD}default-user:x:1000:1000::/home/default-user:/bin/sh\n");
    let group =
        format!("{GROUP}default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n");
    layer.file("etc/passwd", 0o644, passwd.as_bytes())?;
    layer.file("etc/group", 0o644, group.as_bytes())?;
    layer.finish()
}

/// A layer that makes an image differ from all others.
fn marker_layer(name: &str) -> Result<Arc<Layer>> {
    let mut layer = LayerBuilder::default();
    layer.file(&name.replace(':', "-"), 0o644, b"")?;
    layer.finish()
}
