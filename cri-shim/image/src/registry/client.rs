//! HTTP clients with the TLS settings an endpoint asks for.
//!
//! TLS is rustls with graviola, which needs certain CPU features and panics without them: they are
//! checked before the first HTTPS request, and plain HTTP works on any CPU.

use std::{
    collections::HashMap,
    fs,
    path::PathBuf,
    sync::{Mutex, Once, PoisonError},
    time::Duration,
};

use reqwest::{Certificate, Client, redirect};

use super::hosts::{Endpoint, is_loopback};
use crate::{Error, error::Result};

const USER_AGENT: &str = concat!("pinion/", env!("CARGO_PKG_VERSION"));
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_REDIRECTS: usize = 10;

/// What makes two endpoints need different clients.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Settings {
    tls: bool,
    skip_verify: bool,
    ca: Vec<PathBuf>,
    proxy: bool,
}

/// Clients made so far; each keeps its connections.
#[derive(Debug)]
pub(super) struct Clients {
    stall: Duration,
    made: Mutex<HashMap<Settings, Client>>,
}

impl Clients {
    pub(super) fn new(stall: Duration) -> Self {
        Self { stall, made: Mutex::new(HashMap::new()) }
    }

    pub(super) fn for_endpoint(&self, endpoint: &Endpoint) -> Result<Client> {
        let host = endpoint.host();
        let settings = Settings {
            tls: endpoint.base.scheme() == "https",
            skip_verify: endpoint.skip_verify,
            ca: endpoint.ca.clone(),
            proxy: !is_loopback(&host),
        };
        if settings.tls {
            require_cpu_features(&host)?;
        }
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = made.get(&settings) {
            return Ok(client.clone());
        }
        let client = build(&settings, self.stall, &host)?;
        made.insert(settings, client.clone());
        Ok(client)
    }
}

fn build(settings: &Settings, stall: Duration, host: &str) -> Result<Client> {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // An error only says that the process has chosen a provider already.
        let _ = rustls_graviola::default_provider().install_default();
    });
    let mut builder = Client::builder()
        .user_agent(USER_AGENT)
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(stall)
        .redirect(redirects());
    if !settings.proxy {
        builder = builder.no_proxy();
    }
    if settings.skip_verify {
        builder = builder.tls_danger_accept_invalid_certs(true);
    } else if settings.tls {
        builder = builder.tls_certs_merge(certificates(&settings.ca, host)?);
    } else {
        // Plain HTTP must not depend on the system having certificates.
        builder = builder.tls_certs_only([]);
    }
    builder.build().map_err(|e| {
        let reason = Error::Http { method: "set up TLS for", url: host.to_owned(), source: e };
        Error::Setup { host: host.to_owned(), reason: reason.chain() }
    })
}

fn certificates(files: &[PathBuf], host: &str) -> Result<Vec<Certificate>> {
    let mut all = Vec::new();
    for path in files {
        let pem = fs::read(path).map_err(Error::file("read", path))?;
        let bundle = Certificate::from_pem_bundle(&pem).map_err(|_e| Error::Setup {
            host: host.to_owned(),
            reason: format!("{} holds no PEM certificates", path.display()),
        })?;
        all.extend(bundle);
    }
    Ok(all)
}

/// At most ten, never from HTTPS to HTTP. reqwest itself drops credentials between hosts.
fn redirects() -> redirect::Policy {
    redirect::Policy::custom(|attempt| {
        let was_tls = attempt.previous().last().is_some_and(|url| url.scheme() == "https");
        if attempt.previous().len() > MAX_REDIRECTS {
            attempt.error("more than 10 redirects")
        } else if was_tls && attempt.url().scheme() != "https" {
            attempt.error("redirect from HTTPS to plain HTTP")
        } else {
            attempt.follow()
        }
    })
}

fn require_cpu_features(host: &str) -> Result<()> {
    let missing: Vec<&str> =
        cpu_features().iter().filter(|(_, present)| !present).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::Tls { host: host.to_owned(), missing: missing.join(", ") })
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> [(&'static str, bool); 6] {
    use std::arch::is_x86_feature_detected as has;
    [
        ("aes", has!("aes")),
        ("pclmulqdq", has!("pclmulqdq")),
        ("bmi1", has!("bmi1")),
        ("adx", has!("adx")),
        ("avx", has!("avx")),
        ("avx2", has!("avx2")),
    ]
}

#[cfg(target_arch = "aarch64")]
fn cpu_features() -> [(&'static str, bool); 4] {
    use std::arch::is_aarch64_feature_detected as has;
    [("neon", has!("neon")), ("aes", has!("aes")), ("pmull", has!("pmull")), ("sha2", has!("sha2"))]
}
