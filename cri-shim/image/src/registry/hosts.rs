//! Which hosts serve a registry: mirrors from `certs.d/<host>/hosts.toml`, then the registry.
//!
//! The files are containerd's (docs/hosts.md): `server`, `[host."URL"]` tables in order, with
//! `capabilities`, `ca`, `skip_verify`, `override_path` and `header`. `<host>` may be `name:port`,
//! `name_port_` or `_default`.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use reqwest::Url;
use toml::{Table, Value};

use crate::{Error, ImageConfig, error::Result};

/// One host that serves a registry's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// Up to and including `/v2`, without a slash at the end.
    pub(crate) base: Url,
    /// May answer for content by digest.
    pub(crate) pull: bool,
    /// May answer what a tag means.
    pub(crate) resolve: bool,
    /// Certificates to trust besides the system's.
    pub(crate) ca: Vec<PathBuf>,
    pub(crate) skip_verify: bool,
    pub(crate) headers: Vec<(String, String)>,
    /// Not the registry itself: never sent the registry's credentials.
    pub(crate) is_mirror: bool,
}

impl Endpoint {
    /// `host[:port]`, for messages and for matching credentials.
    pub(crate) fn host(&self) -> String {
        let host = self.base.host_str().unwrap_or_default();
        self.base.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
    }
}

/// The hosts to try for `registry`, in order; never empty.
pub(crate) fn endpoints(config: &ImageConfig, registry: &str) -> Result<Vec<Endpoint>> {
    for dir in &config.certs_dirs {
        for name in [registry.to_owned(), registry.replacen(':', "_", 1) + "_", "_default".into()] {
            let path = dir.join(name).join("hosts.toml");
            match fs::read_to_string(&path) {
                Ok(text) => return from_file(&path, &text, registry, config),
                Err(e) if absent(&e) => {}
                Err(e) => return Err(Error::file("read", path)(e)),
            }
        }
    }
    own(registry, config)
}

fn absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Reads one `hosts.toml`.
fn from_file(
    path: &Path,
    text: &str,
    registry: &str,
    config: &ImageConfig,
) -> Result<Vec<Endpoint>> {
    let refuse = |reason: String| Error::Hosts { path: path.to_owned(), reason };
    let file: Table = text.parse().map_err(|e: toml::de::Error| refuse(e.message().to_owned()))?;
    let mut endpoints = Vec::new();
    match file.get("host") {
        None => {}
        Some(Value::Table(hosts)) => {
            for (url, settings) in hosts {
                let Value::Table(settings) = settings else {
                    return Err(refuse(format!("host {url:?} is not a table")));
                };
                endpoints.push(endpoint(url, settings, path, true).map_err(refuse)?);
            }
        }
        Some(_) => return Err(refuse("\"host\" is not a table".to_owned())),
    }
    match file.get("server") {
        Some(Value::String(url)) => {
            let mut server = endpoint(url, &file, path, false).map_err(refuse)?;
            // Naming a stand-in does not make it the registry.
            let own_hosts = own(registry, config)?;
            server.is_mirror = own_hosts.iter().all(|own| own.host() != server.host());
            endpoints.push(server);
        }
        None => endpoints.extend(own(registry, config)?),
        Some(_) => return Err(refuse("\"server\" is not a string".to_owned())),
    }
    Ok(endpoints)
}

fn endpoint(url: &str, settings: &Table, file: &Path, is_mirror: bool) -> Result<Endpoint, String> {
    let flag = |key: &str| match settings.get(key) {
        None => Ok(false),
        Some(Value::Boolean(value)) => Ok(*value),
        Some(_) => Err(format!("{key:?} of {url:?} is neither true nor false")),
    };
    let list = |key: &str| -> Result<Option<Vec<String>>, String> {
        let text = |value: &Value| match value {
            Value::String(text) => Ok(text.clone()),
            _ => Err(format!("{key:?} of {url:?} is not a list of strings")),
        };
        match settings.get(key) {
            None => Ok(None),
            Some(Value::Array(values)) => {
                values.iter().map(text).collect::<Result<_, _>>().map(Some)
            }
            Some(value) => text(value).map(|text| Some(vec![text])),
        }
    };
    if settings.contains_key("client") {
        return Err(format!("{url:?} asks for client certificates, which are not supported"));
    }
    let mut base = parse_url(url)?;
    let path = base.path().trim_end_matches('/').to_owned();
    if flag("override_path")? || path.ends_with("/v2") {
        base.set_path(&path);
    } else {
        base.set_path(&format!("{path}/v2"));
    }
    let capabilities = list("capabilities")?;
    let can = |what: &str| capabilities.as_ref().is_none_or(|c| c.iter().any(|c| c == what));
    let dir = file.parent().unwrap_or(Path::new("/"));
    Ok(Endpoint {
        base,
        pull: can("pull"),
        resolve: can("resolve"),
        ca: list("ca")?.unwrap_or_default().iter().map(|ca| dir.join(ca)).collect(),
        skip_verify: flag("skip_verify")?,
        headers: headers(url, settings.get("header"))?,
        is_mirror,
    })
}

fn headers(url: &str, value: Option<&Value>) -> Result<Vec<(String, String)>, String> {
    let wrong = || format!("\"header\" of {url:?} is not a table of strings");
    let Some(value) = value else { return Ok(Vec::new()) };
    let Value::Table(table) = value else { return Err(wrong()) };
    let mut headers = Vec::new();
    for (name, value) in table {
        let values = match value {
            Value::Array(values) => values.clone(),
            value => vec![value.clone()],
        };
        for value in values {
            let Value::String(value) = value else { return Err(wrong()) };
            headers.push((name.clone(), value));
        }
    }
    Ok(headers)
}

/// A URL whose scheme may be missing: HTTP for loopback, else HTTPS.
fn parse_url(text: &str) -> Result<Url, String> {
    let with_scheme = if text.contains("://") {
        text.to_owned()
    } else {
        let host = text.split('/').next().unwrap_or(text);
        format!("{}://{text}", if is_loopback(host) { "http" } else { "https" })
    };
    match Url::parse(&with_scheme) {
        Ok(url) if matches!(url.scheme(), "http" | "https") && url.host_str().is_some() => Ok(url),
        Ok(_) => Err(format!("{text:?} is not an http or https URL")),
        Err(e) => Err(format!("{text:?} is not a URL: {e}")),
    }
}

/// The registry itself.
fn own(registry: &str, config: &ImageConfig) -> Result<Vec<Endpoint>> {
    let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
    let name = host.rsplit_once(':').map_or(host, |(name, _port)| name);
    let is_insecure = config.insecure_registries.iter().any(|r| r == registry || r == name);
    let schemes: &[(&str, bool)] = if is_loopback(host) {
        &[("http", false)]
    } else if is_insecure {
        &[("https", true), ("http", false)]
    } else {
        &[("https", false)]
    };
    let endpoint = |&(scheme, skip_verify): &(&str, bool)| {
        let base = Url::parse(&format!("{scheme}://{host}/v2")).map_err(|e| Error::Setup {
            host: host.to_owned(),
            reason: format!("is not a host name: {e}"),
        })?;
        Ok(Endpoint {
            base,
            pull: true,
            resolve: true,
            ca: Vec::new(),
            skip_verify,
            headers: Vec::new(),
            is_mirror: false,
        })
    };
    schemes.iter().map(endpoint).collect()
}

/// Whether `host[:port]` is this machine.
pub(crate) fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.split(':').next().unwrap_or(host),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> (tempfile::TempDir, ImageConfig) {
        let dir = tempfile::tempdir().unwrap();
        let config =
            ImageConfig { certs_dirs: vec![dir.path().to_owned()], ..ImageConfig::default() };
        (dir, config)
    }

    fn write(dir: &tempfile::TempDir, host: &str, text: &str) {
        fs::create_dir_all(dir.path().join(host)).unwrap();
        fs::write(dir.path().join(host).join("hosts.toml"), text).unwrap();
    }

    fn bases(config: &ImageConfig, registry: &str) -> Vec<String> {
        endpoints(config, registry).unwrap().iter().map(|e| e.base.to_string()).collect()
    }

    #[test]
    fn without_files_a_registry_serves_itself() {
        let (_dir, mut config) = config();
        config.insecure_registries = vec!["lab.example:5000".into(), "old.example".into()];
        assert_eq!(bases(&config, "docker.io"), ["https://registry-1.docker.io/v2"]);
        assert_eq!(bases(&config, "quay.io"), ["https://quay.io/v2"]);
        assert_eq!(bases(&config, "127.0.0.1:5000"), ["http://127.0.0.1:5000/v2"]);
        assert_eq!(bases(&config, "localhost"), ["http://localhost/v2"]);
        assert_eq!(bases(&config, "[::1]:5000"), ["http://[::1]:5000/v2"]);
        let both = ["https://lab.example:5000/v2", "http://lab.example:5000/v2"];
        assert_eq!(bases(&config, "lab.example:5000"), both);
        assert_eq!(bases(&config, "old.example:81").len(), 2);
        assert_eq!(bases(&config, "lab.example").len(), 1);
    }

    #[test]
    fn mirrors_come_first_in_the_order_of_the_file() {
        let (dir, config) = config();
        let text = r#"
            server = "https://registry.k8s.io"
            [host."http://127.0.0.1:5000"]
              capabilities = ["pull", "resolve"]
            [host."https://b.example/proxy/k8s"]
              capabilities = ["pull"]
              skip_verify = true
              ca = "ca.pem"
              [host."https://b.example/proxy/k8s".header]
                x-token = ["secret"]
            [host."a.example/exact"]
              override_path = true
        "#;
        write(&dir, "registry.k8s.io", text);
        let endpoints = endpoints(&config, "registry.k8s.io").unwrap();
        let bases: Vec<_> = endpoints.iter().map(|e| e.base.as_str()).collect();
        let expected = [
            "http://127.0.0.1:5000/v2",
            "https://b.example/proxy/k8s/v2",
            "https://a.example/exact",
            "https://registry.k8s.io/v2",
        ];
        assert_eq!(bases, expected);
        let b = &endpoints[1];
        assert!(b.pull && !b.resolve && b.skip_verify && b.is_mirror);
        assert_eq!(b.ca, [dir.path().join("registry.k8s.io/ca.pem")]);
        assert_eq!(b.headers, [("x-token".to_owned(), "secret".to_owned())]);
        assert!(!endpoints[3].is_mirror);
    }

    #[test]
    fn a_port_may_be_written_with_underscores_and_default_is_for_the_rest() {
        let (dir, config) = config();
        write(&dir, "a.example_5000_", "server = \"http://one.example\"");
        write(&dir, "_default", "[host.\"http://two.example\"]");
        assert_eq!(bases(&config, "a.example:5000"), ["http://one.example/v2"]);
        assert!(endpoints(&config, "a.example:5000").unwrap()[0].is_mirror);
        let other = ["http://two.example/v2", "https://quay.io/v2"];
        assert_eq!(bases(&config, "quay.io"), other);
    }

    #[test]
    fn mistakes_name_the_file() {
        let (dir, config) = config();
        for bad in [
            "server = ",
            "server = 1",
            "host = 1",
            "[host.\"ftp://x\"]",
            "[host.\"https://x\"]\ncapabilities = [1]",
            "[host.\"https://x\"]\nskip_verify = \"yes\"",
            "[host.\"https://x\"]\nclient = \"cert.pem\"",
        ] {
            write(&dir, "quay.io", bad);
            let error = endpoints(&config, "quay.io").unwrap_err();
            assert!(error.to_string().contains("quay.io/hosts.toml"), "{bad}: {error}");
        }
    }
}
