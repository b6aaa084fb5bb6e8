//! The distribution protocol, as far as pulling needs it, over every host that may serve an image.
//!
//! ```text
//!   Registry ──session(reference, credentials)──▶ Session ──resolve──▶ manifest bytes
//!                                                    └──────download──▶ blob bytes, resumed after
//!                                                                       breaks, from any host
//! ```
//! Everything read is bounded or streamed; digests are checked by the caller, who knows them.

mod challenge;
mod client;
mod download;
mod hosts;

use std::time::Duration;

use reqwest::{
    Client, Response, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue, RANGE, RETRY_AFTER},
};

use self::{
    challenge::{Challenge, TokenAnswer, challenge, check_realm},
    client::Clients,
    hosts::Endpoint,
};
use crate::{
    Auth, Digest, Error, ImageConfig, Reference, auth::Credential, config::MAX_MANIFEST,
    error::Result, manifest,
};

/// Requests per host for one piece of content before giving up on it.
const ATTEMPTS: u32 = 3;
/// Longest wait a registry may ask for with `Retry-After`.
const MAX_WAIT: Duration = Duration::from_secs(10);
const MAX_ERROR_BODY: u64 = 8 << 10;
const MAX_TOKEN_BODY: u64 = 256 << 10;

/// Access to all registries.
#[derive(Debug)]
pub(crate) struct Registry {
    config: ImageConfig,
    clients: Clients,
}

impl Registry {
    pub(crate) fn new(config: &ImageConfig) -> Self {
        Self { config: config.clone(), clients: Clients::new(config.stall()) }
    }

    /// Prepares to fetch one image.
    pub(crate) fn session(&self, reference: &Reference, auth: Option<&Auth>) -> Result<Session> {
        let credential = auth.map(Auth::credential).transpose()?.flatten();
        let meant_for = auth.and_then(Auth::server_host);
        let mut hosts = Vec::new();
        for endpoint in hosts::endpoints(&self.config, reference.registry())? {
            let is_meant = meant_for_endpoint(meant_for, reference.registry(), &endpoint);
            let credential = credential.clone().filter(|_| is_meant);
            let client = self.clients.for_endpoint(&endpoint);
            hosts.push(Host { endpoint, client, credential, token: tokio::sync::Mutex::default() });
        }
        let trusted_realms = self.config.trusted_realms.clone();
        Ok(Session { reference: reference.clone(), hosts, trusted_realms })
    }
}

/// Credentials belong to the registry of the image, unless they name another host themselves.
fn meant_for_endpoint(meant_for: Option<&str>, registry: &str, endpoint: &Endpoint) -> bool {
    match meant_for {
        None => !endpoint.is_mirror,
        Some(host) if host == endpoint.host() => true,
        Some(host) => {
            let docker = ["docker.io", "index.docker.io", "registry-1.docker.io"];
            let same = host == registry || (docker.contains(&host) && registry == "docker.io");
            same && !endpoint.is_mirror
        }
    }
}

/// Fetches the parts of one image.
pub(crate) struct Session {
    reference: Reference,
    hosts: Vec<Host>,
    trusted_realms: Vec<String>,
}

struct Host {
    endpoint: Endpoint,
    /// Made early, so that its failure is one host's and not the pull's.
    client: Result<Client>,
    credential: Option<Credential>,
    /// The `Authorization` header that worked last.
    token: tokio::sync::Mutex<Option<HeaderValue>>,
}

/// A document as a registry sent it.
pub(crate) struct Fetched {
    pub(crate) bytes: Vec<u8>,
    pub(crate) content_type: Option<String>,
}

impl Session {
    /// The manifest or index the reference names; a digest in it has been verified.
    pub(crate) async fn resolve(&self) -> Result<Fetched> {
        let selector = self.reference.manifest_selector();
        self.manifest(selector, self.reference.digest()).await
    }

    /// The manifest with this digest.
    pub(crate) async fn manifest_by_digest(&self, digest: &Digest) -> Result<Fetched> {
        self.manifest(digest.as_str(), Some(digest)).await
    }

    async fn manifest(&self, selector: &str, digest: Option<&Digest>) -> Result<Fetched> {
        let path = format!("manifests/{selector}");
        let mut failures = Vec::new();
        for host in &self.hosts {
            let able = if digest.is_some() { host.endpoint.pull } else { host.endpoint.resolve };
            if !able {
                continue;
            }
            match self.manifest_from(host, &path, digest).await {
                Ok(fetched) => return Ok(fetched),
                Err(e) => failures.push((host.endpoint.host(), e)),
            }
        }
        Err(self.all_failed(failures))
    }

    async fn manifest_from(
        &self,
        host: &Host,
        path: &str,
        digest: Option<&Digest>,
    ) -> Result<Fetched> {
        let response = self.get(host, path, manifest::ACCEPT, None).await?;
        let header = |name: &str| {
            let value = response.headers().get(name)?.to_str().ok()?;
            Some(value.split(';').next().unwrap_or(value).trim().to_owned())
        };
        let content_type = header(CONTENT_TYPE.as_str());
        let stated = header("docker-content-digest").filter(|d| d.starts_with("sha256:"));
        let url = shown(response.url());
        let bytes = read_body(response, MAX_MANIFEST, &format!("manifest {url}")).await?;
        let actual = Digest::of(&bytes);
        let expected = digest.map(|d| d.as_str().to_owned()).or(stated);
        match expected {
            Some(expected) if expected != actual.as_str() => {
                let what = format!("manifest {url}");
                Err(Error::Mismatch { what, expected, actual: actual.to_string() })
            }
            _ => Ok(Fetched { bytes, content_type }),
        }
    }

    /// One successful GET below the repository, authenticated if the host wants that.
    async fn get(
        &self,
        host: &Host,
        path: &str,
        accept: &'static str,
        from: Option<u64>,
    ) -> Result<Response> {
        let client = match &host.client {
            Ok(client) => client,
            Err(e) => {
                return Err(Error::Setup { host: host.endpoint.host(), reason: e.chain() });
            }
        };
        let mut url = host.endpoint.base.clone();
        let repository = self.reference.repository();
        url.set_path(&format!("{}/{repository}/{path}", url.path().trim_end_matches('/')));
        if host.endpoint.is_mirror {
            url.query_pairs_mut().append_pair("ns", self.reference.registry());
        }
        let mut attempt = 0;
        loop {
            attempt += 1;
            let response = self.send(host, client, &url, accept, from).await?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            let again = matches!(status.as_u16(), 408 | 429 | 500 | 502..=504);
            if again && attempt < ATTEMPTS {
                tokio::time::sleep(wait_before_retry(&response, attempt)).await;
                continue;
            }
            return Err(status_error("GET", response).await);
        }
    }

    /// Sends a request; after a 401, authenticates and sends it once more.
    async fn send(
        &self,
        host: &Host,
        client: &Client,
        url: &Url,
        accept: &'static str,
        from: Option<u64>,
    ) -> Result<Response> {
        let request = |authorization: Option<HeaderValue>| {
            let mut request = client.get(url.clone()).header(ACCEPT, accept);
            for (name, value) in &host.endpoint.headers {
                request = request.header(name, value);
            }
            if let Some(from) = from {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            if let Some(authorization) = authorization {
                request = request.header(AUTHORIZATION, authorization);
            }
            async { request.send().await.map_err(|e| http_error("GET", url, e)) }
        };
        let known = host.token.lock().await.clone();
        let response = request(known.clone()).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        let mut token = host.token.lock().await;
        if *token == known {
            match self.authorize(host, client, &response).await? {
                Some(fresh) => *token = Some(fresh),
                None => return Ok(response),
            }
        }
        let authorization = token.clone();
        drop(token);
        request(authorization).await
    }

    /// The `Authorization` header that answers a 401, `None` if there is nothing to answer with.
    async fn authorize(
        &self,
        host: &Host,
        client: &Client,
        refusal: &Response,
    ) -> Result<Option<HeaderValue>> {
        if let Some(Credential::Bearer(token)) = &host.credential {
            return Ok(secret_header(format!("Bearer {token}")));
        }
        // Only the registry itself may ask, not a host it redirected to.
        if refusal.url().host_str() != host.endpoint.base.host_str() {
            return Ok(None);
        }
        match (challenge(refusal.headers()), &host.credential) {
            (Some(Challenge::Bearer { realm, service, scope }), _) => {
                let token = self.token(host, client, &realm, service, scope).await?;
                Ok(secret_header(format!("Bearer {token}")))
            }
            (Some(Challenge::Basic), Some(Credential::Basic { username, password })) => {
                Ok(secret_header(basic(username, password)))
            }
            _ => Ok(None),
        }
    }

    async fn token(
        &self,
        host: &Host,
        client: &Client,
        realm: &str,
        service: Option<String>,
        scope: Option<String>,
    ) -> Result<String> {
        let base = &host.endpoint.base;
        let has_credential = host.credential.is_some();
        let url =
            check_realm(base, realm, has_credential, &self.trusted_realms).map_err(|reason| {
                Error::Realm {
                    registry: host.endpoint.host(),
                    realm: realm.chars().take(200).collect(),
                    reason,
                }
            })?;
        let scope =
            scope.unwrap_or_else(|| format!("repository:{}:pull", self.reference.repository()));
        let mut query = vec![("scope", scope)];
        query.extend(service.map(|service| ("service", service)));
        let (method, request) = match &host.credential {
            Some(Credential::Identity(refresh)) => {
                query.push(("grant_type", "refresh_token".to_owned()));
                query.push(("client_id", "pinion".to_owned()));
                query.push(("refresh_token", refresh.clone()));
                let mut form = base.clone();
                form.query_pairs_mut().clear().extend_pairs(&query);
                let body = form.query().unwrap_or_default().to_owned();
                let kind = "application/x-www-form-urlencoded";
                ("POST", client.post(url.clone()).header(CONTENT_TYPE, kind).body(body))
            }
            Some(Credential::Basic { username, password }) => {
                let request = client.get(url.clone()).query(&query);
                ("GET", request.basic_auth(username, Some(password)))
            }
            _ => ("GET", client.get(url.clone()).query(&query)),
        };
        let response = request.send().await.map_err(|e| http_error(method, &url, e))?;
        if !response.status().is_success() {
            return Err(status_error(method, response).await);
        }
        let body = read_body(response, MAX_TOKEN_BODY, "the token service's answer").await?;
        let answer: Option<TokenAnswer> = serde_json::from_slice(&body).ok();
        answer.and_then(TokenAnswer::token).ok_or_else(|| Error::Protocol {
            url: shown(&url),
            reason: "the answer holds no token".to_owned(),
        })
    }

    /// One error out of several hosts' failures.
    fn all_failed(&self, mut failures: Vec<(String, Error)>) -> Error {
        let Some((_, last)) = failures.pop() else {
            let host = self.reference.registry().to_owned();
            return Error::Setup { host, reason: "no host is configured to serve this".to_owned() };
        };
        if failures.is_empty() {
            return last;
        }
        Error::AllHosts {
            reference: self.reference.to_string(),
            tried: failures.iter().map(|(host, e)| format!("{host}: {}", e.chain())).collect(),
            source: Box::new(last),
        }
    }
}

fn basic(username: &str, password: &str) -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    format!("Basic {}", STANDARD.encode(format!("{username}:{password}")))
}

fn secret_header(text: String) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn wait_before_retry(response: &Response, attempt: u32) -> Duration {
    let asked = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()?.parse().ok());
    let backoff = Duration::from_millis(200) * 2_u32.pow(attempt);
    asked.map_or(backoff, Duration::from_secs).min(MAX_WAIT)
}

/// A URL fit for messages: signed download URLs carry secrets in their query.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    // Fails only for URLs that cannot carry a user name at all.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.to_string()
}

fn http_error(method: &'static str, url: &Url, error: reqwest::Error) -> Error {
    Error::Http { method, url: shown(url), source: error.without_url() }
}

async fn status_error(method: &'static str, response: Response) -> Error {
    #[derive(serde::Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(serde::Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let (status, url) = (response.status(), shown(response.url()));
    let body = read_body(response, MAX_ERROR_BODY, "error").await.unwrap_or_default();
    let detail = match serde_json::from_slice::<Errors>(&body) {
        Ok(parsed) => parsed
            .errors
            .iter()
            .take(3)
            .map(|e| format!(": {} {}", e.code, e.message).chars().take(200).collect::<String>())
            .collect(),
        Err(_) => String::new(),
    };
    Error::Status { method, url, status, detail }
}

/// The whole body, refused as soon as it exceeds `limit` bytes.
async fn read_body(mut response: Response, limit: u64, what: &str) -> Result<Vec<u8>> {
    let too_large = || Error::TooLarge { what: what.to_owned(), limit: format!("{limit} bytes") };
    if response.content_length().is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let url = response.url().clone();
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|e| http_error("GET", &url, e))? {
        if (body.len() + chunk.len()) as u64 > limit {
            return Err(too_large());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}
