//! What attaching and detaching a pod costs: built-in chain and executed plugins, interleaved,
//! with and without the guard, in a network namespace of its own. Run as root:
//! `cargo run --release -p pinion-network --example attach -- 50 110` (rounds, other pods).

use pinion_network::namespaces::{self, Kind, Setup};
use pinion_network::{Network, NetworkConfig, PodNetwork, PortMapping, Protocol, Watch};
use std::error::Error;
use std::path::Path;
use std::time::Instant;

const LIST: &str = r#"{"cniVersion":"1.0.0","name":"bench","plugins":[
  {"type":"bridge","bridge":"br0","isGateway":true,"ipMasq":true,"hairpinMode":true,
   "ipam":{"type":"host-local","dataDir":"DIR/leases","ranges":[[{"subnet":"10.77.0.0/16"}]],
           "routes":[{"dst":"0.0.0.0/0"}]}},
  {"type":"portmap","capabilities":{"portMappings":true}}]}"#;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<u16>());
    let rounds = arguments.next().transpose()?.unwrap_or(30);
    let others = arguments.next().transpose()?.unwrap_or(0);
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
    let dir = std::env::temp_dir().join(format!("pinion-attach-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("net.d"))?;
    let list = LIST.replace("DIR", &dir.to_string_lossy());
    std::fs::write(dir.join("net.d/10.conflist"), list)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(measure(&dir, rounds, others));
    std::fs::remove_dir_all(&dir)?;
    outcome
}

fn pod(dir: &Path, number: u16) -> Result<PodNetwork, Box<dyn Error>> {
    let id = format!("pod{number}");
    let place = dir.join("pods").join(&id);
    namespaces::create(&[Kind::Net], &place, &Setup::default())?;
    let port = PortMapping {
        host_port: 20_000 + number,
        container_port: 80,
        protocol: Protocol::Tcp,
        host_ip: None,
    };
    Ok(PodNetwork {
        name: id.clone(),
        sandbox_id: id,
        netns: place.join("net"),
        port_mappings: vec![port],
        ..Default::default()
    })
}

async fn measure(dir: &Path, rounds: u16, others: u16) -> Result<(), Box<dyn Error>> {
    let network = |native, guard| {
        Network::new(NetworkConfig {
            conf_dir: dir.join("net.d"),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            cache_dir: dir.join("records"),
            native,
            guard,
        })
    };
    let mut kinds = [
        ("built-in", network(true, Watch::Off), Vec::new(), Vec::new()),
        ("built-in, guard", network(true, Watch::All), Vec::new(), Vec::new()),
        ("plugins", network(false, Watch::Off), Vec::new(), Vec::new()),
        ("plugins, guard", network(false, Watch::All), Vec::new(), Vec::new()),
    ];
    let resident = (0..others).map(|n| pod(dir, 1000 + n)).collect::<Result<Vec<_>, _>>()?;
    for pod in &resident {
        network(true, Watch::Off).add(pod).await?;
    }
    for round in 0..=rounds {
        for (_, network, adds, dels) in &mut kinds {
            let pod = pod(dir, round)?;
            let began = Instant::now();
            network.add(&pod).await?;
            let added = began.elapsed();
            let began = Instant::now();
            network.del(&pod, None).await?;
            if round > 0 {
                adds.push(added.as_secs_f64() * 1e3);
                dels.push(began.elapsed().as_secs_f64() * 1e3);
            }
            namespaces::remove(&dir.join("pods").join(&pod.sandbox_id))?;
        }
    }
    for pod in &resident {
        network(true, Watch::Off).del(pod, None).await?;
        namespaces::remove(&dir.join("pods").join(&pod.sandbox_id))?;
    }
    println!("{others} other pods, {rounds} rounds, ms min/median/p95");
    for (name, _, adds, dels) in &mut kinds {
        println!("{name:16} ADD {}   DEL {}", summary(adds), summary(dels));
    }
    Ok(())
}

fn summary(times: &mut [f64]) -> String {
    times.sort_by(f64::total_cmp);
    let at = |part: usize| times.get((times.len() * part / 100).min(times.len() - 1)).copied();
    let [min, median, p95] = [0, 50, 95].map(|part| at(part).unwrap_or_default());
    format!("{min:.2}/{median:.2}/{p95:.2}")
}
