//! Answering `WWW-Authenticate`: which credential goes where.
//!
//! A registry chooses the token service (the realm), so a hostile one could have credentials sent
//! to itself or requests made inside the network. A credential goes to a realm only on the same
//! host or domain, or one the configuration trusts, and never from HTTPS down to HTTP.

use std::net::IpAddr;

use reqwest::{Url, header::HeaderMap};
use serde::Deserialize;

use super::hosts::is_loopback;

/// What a registry asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// Picks the challenge to answer: a token if one is offered, else basic.
pub(super) fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    let mut basic = None;
    for value in headers.get_all(reqwest::header::WWW_AUTHENTICATE) {
        let Ok(parsed) = value.to_str().map(http_auth::parse_challenges) else { continue };
        for challenge in parsed.unwrap_or_default() {
            let parameter = |name: &str| {
                let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.to_unescaped())
            };
            if challenge.scheme.eq_ignore_ascii_case("bearer")
                && let Some(realm) = parameter("realm")
            {
                let (service, scope) = (parameter("service"), parameter("scope"));
                return Some(Challenge::Bearer { realm, service, scope });
            }
            if challenge.scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Challenge::Basic);
            }
        }
    }
    basic
}

/// Whether a token may be asked of `realm` on behalf of the registry at `base`.
pub(super) fn check_realm(
    base: &Url,
    realm: &str,
    has_credential: bool,
    trusted: &[String],
) -> Result<Url, &'static str> {
    let url = Url::parse(realm).map_err(|_e| "it is not a URL")?;
    let host = url.host_str().ok_or("it names no host")?;
    let registry = base.host_str().unwrap_or_default();
    match url.scheme() {
        "https" => {}
        "http" if base.scheme() == "http" => {}
        "http" => return Err("it is plain HTTP while the registry uses HTTPS"),
        _ => return Err("it is neither http nor https"),
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("it contains credentials of its own");
    }
    if host == registry || trusted.iter().any(|t| t == host) {
        return Ok(url);
    }
    if is_internal(host) {
        return Err("it is a local address, unlike the registry");
    }
    if has_credential && !same_domain(host, registry) {
        return Err("it belongs to another domain and is not in trusted_realms");
    }
    Ok(url)
}

/// Addresses a remote registry has no business naming: this machine, and link-local ones, where
/// clouds keep their metadata service.
fn is_internal(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    is_loopback(host)
        || match bare.parse::<IpAddr>() {
            Ok(IpAddr::V4(ip)) => ip.is_link_local() || ip.is_unspecified(),
            Ok(IpAddr::V6(ip)) => {
                ip.is_unicast_link_local() || ip.is_unspecified() || ip.to_ipv4_mapped().is_some()
            }
            Err(_) => false,
        }
}

/// `auth.docker.io` and `registry-1.docker.io` share `docker.io`; addresses share nothing.
fn same_domain(a: &str, b: &str) -> bool {
    let domain = |host: &str| -> Option<String> {
        if host.parse::<IpAddr>().is_ok() || host.starts_with('[') {
            return None;
        }
        let labels: Vec<&str> = host.rsplitn(3, '.').take(2).collect();
        (labels.len() == 2).then(|| labels.join(".").to_ascii_lowercase())
    };
    domain(a).is_some_and(|a| domain(b) == Some(a))
}

/// A token service's answer.
#[derive(Deserialize)]
pub(super) struct TokenAnswer {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
}

impl TokenAnswer {
    pub(super) fn token(self) -> Option<String> {
        [self.token, self.access_token].into_iter().find(|token| !token.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(values: &[&str]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for value in values {
            map.append(reqwest::header::WWW_AUTHENTICATE, value.parse().unwrap());
        }
        map
    }

    #[test]
    fn a_token_is_preferred_over_basic() {
        let bearer = r#"Bearer realm="https://a/token",service="a",scope="repository:x:pull""#;
        let Some(Challenge::Bearer { realm, service, .. }) =
            challenge(&headers(&["Basic realm=\"x\"", bearer]))
        else {
            panic!("no bearer challenge")
        };
        assert_eq!((realm.as_str(), service.as_deref()), ("https://a/token", Some("a")));
        assert_eq!(challenge(&headers(&["basic realm=x"])), Some(Challenge::Basic));
        for junk in [&[][..], &["Negotiate"], &["Bearer"], &["\"\"=,,"], &["Bearer service=a"]] {
            assert_eq!(challenge(&headers(junk)), None);
        }
    }

    #[test]
    fn credentials_stay_with_the_registry_and_its_domain() {
        let check = |base: &str, realm: &str, credential| {
            check_realm(&Url::parse(base).unwrap(), realm, credential, &["sso.example".to_owned()])
                .is_ok()
        };
        let docker = "https://registry-1.docker.io/v2";
        assert!(check(docker, "https://auth.docker.io/token", true));
        assert!(check(docker, "https://sso.example/token", true), "trusted by configuration");
        assert!(check(docker, "https://other.example/token", false), "anonymous");
        assert!(check("http://127.0.0.1:5000/v2", "http://127.0.0.1:5001/token", true));
        for realm in [
            "https://other.example/token",
            "http://auth.docker.io/token",
            "file:///etc/passwd",
            "https://user:pass@auth.docker.io/",
            "nonsense",
        ] {
            assert!(!check(docker, realm, true), "{realm}");
        }
        for realm in [
            "https://169.254.169.254/latest",
            "https://127.0.0.1/x",
            "https://localhost/x",
            "https://[::1]/x",
            "https://[fe80::1]/x",
            "https://[::ffff:169.254.169.254]/x",
            "https://0.0.0.0/x",
        ] {
            assert!(!check(docker, realm, false), "{realm}");
        }
        assert!(!check("http://10.0.0.1/v2", "http://10.0.0.2/token", true), "addresses differ");
    }
}
