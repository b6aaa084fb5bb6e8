//! Starts the servers that `pinion-bench cri` compares, with the same images, the same
//! plugins and a network of its own for each.

use std::process::Command;

use crate::assets::{self, Assets};
use crate::error::{During, Result, ensure};
use crate::server::Kind;
use crate::site::Site;

/// Runs the comparison; further arguments go to `pinion-bench cri`.
pub(crate) fn cri(assets: &Assets, arguments: &[String]) -> Result<()> {
    let kinds = [Kind::Piniond, Kind::Containerd];
    let sites = kinds.map(|kind| Site::open(assets, kind).map(|site| (kind, site)));
    let mut bench = Command::new(assets::binary("pinion-bench")?);
    bench.arg("cri");
    let mut running = Vec::new();
    for site in sites {
        let (kind, site) = site?;
        site.warm_up(&site.connect()?)?;
        bench.arg("--endpoint").arg(format!("{}={}", kind.name(), site.server.socket.display()));
        bench.arg("--daemon").arg(format!("{}={}", kind.name(), site.server.pid()));
        running.push(site);
    }
    let status = bench.args(arguments).status().during(|| "run pinion-bench".into())?;
    drop(running);
    ensure(status.success(), || format!("pinion-bench ended with {status}"))
}
