//! Start, serve, stop.

use std::fs::{self, DirBuilder, File, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::Stream;
use pinion_cgroup::{Driver, Hierarchies};
use pinion_cri_proto::admin::admin_server::AdminServer;
use pinion_cri_proto::v1::image_service_server::ImageServiceServer;
use pinion_cri_proto::v1::runtime_service_server::RuntimeServiceServer;
use pinion_image::{ImageConfig, Images};
use pinion_network::{Network, NetworkConfig};
use pinion_store::Store;
use rustix::fs::{FlockOperation, flock};
use sd_notify::NotifyState;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Server;

use crate::cgroups::Cgroups;
use crate::config::{CgroupDriver, Config};
use crate::contract::infra;
use crate::error::{Context, Error, Kind, Result};
use crate::node::{Node, Parts};
use crate::paths::Paths;
use crate::pod::users;
use crate::profile::{self, Profile};
use crate::programs::Programs;
use crate::services::{AdminApi, DeadlineLayer, ImageApi, MAX_MESSAGE, RuntimeApi};
use crate::streaming::Streams;
use crate::{logging, nri, recovery, web};

/// Event loop threads: the work is in the monitors and in blocking calls, not here.
const WORKERS: usize = 2;
/// Threads for blocking calls, which end when they are idle.
const BLOCKING: usize = 64;
/// How long calls in flight may go on after SIGTERM.
const DRAIN: Duration = Duration::from_secs(8);
/// Streams one client connection may have open.
const MAX_STREAMS: u32 = 1024;
/// Bytes of headers of one call.
const MAX_HEADERS: u32 = 64 << 10;

/// Runs the server until it is told to stop.
pub(crate) fn run(config: Config) -> Result<()> {
    let systemd = sd_notify::booted().unwrap_or(false);
    logging::init(&config.log, std::env::var_os("JOURNAL_STREAM").is_some())?;
    // What must be private is made so by its own mode; nothing may be group-writable.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let began = Instant::now();
    let paths = Paths::new(&config);
    for directory in [paths.root(), paths.run_dir(), &paths.pods(), &paths.runtime_root()] {
        private_directory(directory)?;
    }
    let _lock = lock(&paths.run_dir().join("piniond.lock"))?;
    let profile = Profile::load(config.node.profile.clone());
    // Before the first thread, since threads inherit it.
    infra::confine_start(&profile.reserved());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING)
        .thread_keep_alive(Duration::from_secs(5))
        .enable_all()
        .build()
        .context(|| "start the event loop".to_string())?;
    let result = runtime.block_on(async {
        let node = Arc::new(open(config, &paths, profile, systemd).await?);
        recovery::run(&node).await?;
        tokio::spawn(crate::contract::settings::watch(node.clone()));
        tokio::spawn(crate::contract::watch::run(node.clone()));
        tokio::spawn(infra::run(node.clone()));
        tokio::spawn(crate::contract::pools::run(node.clone()));
        nri::start(&node).await?;
        serve(node, began).await
    });
    // Blocking calls that still run are left to themselves; intents undo what they began.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

fn private_directory(path: &Path) -> Result<()> {
    let what = || format!("create {}", path.display());
    DirBuilder::new().recursive(true).mode(0o700).create(path).context(what)
}

/// One server per run directory.
fn lock(path: &Path) -> Result<File> {
    let what = || format!("open {}", path.display());
    let file = File::options().create(true).truncate(false).write(true).open(path).context(what)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let message = format!("another piniond holds {}", path.display());
            Err(Error::new(Kind::Unavailable, message))
        }
        Err(e) => Err(e).context(|| format!("lock {}", path.display())),
    }
}

/// Opens everything the node is made of.
async fn open(config: Config, paths: &Paths, profile: Profile, systemd: bool) -> Result<Node> {
    let hierarchies =
        Hierarchies::detect().context(|| "find the cgroup hierarchies".to_string())?;
    let driver = match config.runtime.cgroup_driver {
        CgroupDriver::Systemd => Driver::Systemd,
        CgroupDriver::Cgroupfs => Driver::Cgroupfs,
        CgroupDriver::Auto if systemd => Driver::Systemd,
        CgroupDriver::Auto => Driver::Cgroupfs,
    };
    let mut cgroups = Cgroups::new(hierarchies, driver, &config.runtime.default_cgroup_parent);
    cgroups.separate_monitors(&config.runtime.monitor_cgroup)?;
    let programs = Programs::find(&config, paths.runtime_root(), driver == Driver::Systemd)?;
    let opened = Store::open(paths.store()).context(|| "open the store".to_string())?;
    let images = ImageConfig {
        root: paths.root().to_path_buf(),
        insecure_registries: config.image.insecure_registries.clone(),
        certs_dirs: config.image.registry_configs.clone(),
        ..ImageConfig::default()
    };
    let images = Images::open(images, opened.store.clone())
        .context(|| "open the image store".to_string())?;
    let network = Network::new(NetworkConfig {
        conf_dir: config.network.conf_dir.clone(),
        bin_dirs: config.network.bin_dirs.clone(),
        cache_dir: config.network.cache_dir.clone(),
        native: config.network.native,
        guard: config.network.guard,
    });
    let facts = cgroups.host_facts();
    let no_user_namespaces = users::probe(&images, paths.run_dir());
    if let Some(reason) = &no_user_namespaces {
        tracing::info!(reason, "pods cannot have user namespaces of their own here");
    }
    let node = Node::new(Parts {
        config,
        programs,
        store: opened.store,
        images: Arc::new(images),
        network,
        cgroups,
        facts,
        profile,
        no_user_namespaces,
    });
    if let Some(moved) = opened.quarantined {
        node.find(format!(
            "the store was damaged; it is kept as {}, and a new one was begun",
            moved.display()
        ));
    }
    Ok(node)
}

async fn serve(node: Arc<Node>, began: Instant) -> Result<()> {
    let socket = node.config.server.socket.clone();
    let listener = listen(&socket, node.config.server.socket_group)?;
    let mut terminate = signal(SignalKind::terminate()).context(|| "watch SIGTERM".to_string())?;
    let mut interrupt = signal(SignalKind::interrupt()).context(|| "watch SIGINT".to_string())?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();

    let streams = Arc::new(Streams(node.clone()));
    let streams = pinion_streaming::Server::listen(node.config.server.stream_address, streams)
        .await
        .context(|| "serve streams".to_string())?;
    let runtime = RuntimeServiceServer::new(RuntimeApi::new(node.clone(), streams))
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let image = ImageServiceServer::new(ImageApi::new(node.clone()))
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let admin = AdminServer::new(AdminApi::new(node.clone()))
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let serving = Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADERS)
        .layer(DeadlineLayer)
        .add_service(runtime)
        .add_service(image)
        .add_service(admin)
        .serve_with_incoming_shutdown(connections(listener), async {
            let _ = stopped.await;
        });
    let mut serving = tokio::spawn(serving);
    tokio::spawn(profile::watch(node.clone()));
    if let Some(address) = node.config.web.address {
        web::serve(node.clone(), address).await?;
    }

    let pods = node.registry.snapshot().pods().count();
    let ms = began.elapsed().as_millis();
    tracing::info!(socket = %socket.display(), pods, ms, "serving");
    notify(&[NotifyState::Ready]);
    tokio::spawn(stay_small());

    let ended = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        ended = &mut serving => Some(ended),
    };
    if let Some(ended) = ended {
        let what = || "serve".to_string();
        return ended.context(what)?.context(what);
    }
    tracing::info!("stopping; containers stay");
    notify(&[NotifyState::Stopping]);
    let _ = stop.send(());
    // Event streams never end by themselves, hence the limit.
    if tokio::time::timeout(DRAIN, serving).await.is_err() {
        tracing::info!("calls were still in flight");
    }
    // Still there only if nobody has replaced it.
    let _ = fs::remove_file(&socket);
    Ok(())
}

/// Lets go of the code that the start, or a busy time, has made resident: at once, and then
/// every minute. What is in use comes back by faults that read nothing.
async fn stay_small() {
    let mut minutes = tokio::time::interval(Duration::from_secs(60));
    minutes.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        minutes.tick().await;
        let let_go = || pinion_sys::resident::let_go_of_code().context(|| "let go of code".into());
        if let Err(error) = crate::services::blocking(let_go).await {
            tracing::debug!(error = %error.chain(), "what was used once stays resident");
            return;
        }
    }
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "systemd was not notified");
    }
}

/// Binds the socket. The lock makes sure that a file in its place is a dead server's.
fn listen(path: &Path, group: Option<u32>) -> Result<UnixListener> {
    let what = || format!("listen on {}", path.display());
    if let Some(parent) = path.parent() {
        private_directory(parent)?;
    }
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e).context(what),
    }
    // No moment in which others could connect.
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = bound.context(what)?;
    if let Some(group) = group {
        std::os::unix::fs::chown(path, None, Some(group)).context(what)?;
        fs::set_permissions(path, Permissions::from_mode(0o660)).context(what)?;
    }
    Ok(listener)
}

/// Accepts connections for ever. Running out of descriptors is waited out.
fn connections(
    listener: UnixListener,
) -> impl Stream<Item = Result<UnixStream, std::io::Error>> + Send {
    futures::stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => return Some((Ok(stream), listener)),
                Err(error) => {
                    tracing::warn!(%error, "accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    })
}
