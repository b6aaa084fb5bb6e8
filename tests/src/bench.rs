//! Starts the servers that `pinion-bench cri` compares, with the same images, the same
//! plugins and a network of its own for each.

use std::process::Command;

use crate::assets::{self, Assets};
use crate::error::{During, Result, ensure};
use crate::image::large;
use crate::server::{Kind, Scratch};
use crate::site::Site;

/// Runs the comparison; further arguments go to `pinion-bench cri`.
pub(crate) fn cri(assets: &Assets, arguments: &[String]) -> Result<()> {
    let kinds = [Kind::Piniond, Kind::Containerd];
    let sites = kinds.map(|kind| Site::open(assets, kind).map(|site| (kind, site)));
    let mut bench = Command::new(assets::binary("pinion-bench")?);
    bench.arg("cri");
    let scratch = Scratch::new()?;
    let large_images = assets.registry_over(&assets.large_images()?, &scratch.path("logs"))?;
    let mut running = Vec::new();
    for site in sites {
        let (kind, site) = site?;
        site.warm_up(&site.connect()?)?;
        large_images.write_mirror(&site.scratch.path("certs.d"), large::HOST)?;
        bench.arg("--endpoint").arg(format!("{}={}", kind.name(), site.server.socket.display()));
        bench.arg("--daemon").arg(format!("{}={}", kind.name(), site.server.pid()));
        running.push(site);
    }
    for (name, image) in [
        ("small image", "docker.io/library/busybox:latest"),
        ("64 MiB in one file", large::BLOB),
        ("11,600 files, four layers", large::MANY_FILES),
    ] {
        bench.arg("--pull").arg(format!("{name}={image}"));
    }
    let status = bench.args(arguments).status().during(|| "run pinion-bench".into())?;
    drop(running);
    ensure(status.success(), || format!("pinion-bench ended with {status}"))
}
