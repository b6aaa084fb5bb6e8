//! Image references: `[registry[:port]/]repository[:tag][@digest]`, normalised as Docker does
//! (`busybox` is `docker.io/library/busybox:latest`).

use std::{fmt, net::Ipv6Addr};

use crate::Digest;

const DEFAULT_REGISTRY: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// A parsed, normalised reference. Ordered and printed by its normalised text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// A reference that cannot be parsed, with the part that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("image reference {reference:?}: {part} {value:?} {reason}")]
pub struct ReferenceError {
    /// The whole text, cut at 100 characters.
    pub reference: String,
    /// `registry`, `port`, `repository`, `tag` or `digest`.
    pub part: &'static str,
    /// The part's text, cut at 100 characters.
    pub value: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl Reference {
    /// Parses and normalises `text`. Without tag and digest the tag is `latest`.
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        let refuse = |(part, value, reason): (&'static str, &str, &'static str)| ReferenceError {
            reference: cut(text),
            part,
            value: cut(value),
            reason,
        };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let parsed =
                    Digest::parse(digest).map_err(|e| refuse(("digest", digest, e.reason)))?;
                (rest, Some(parsed))
            }
            None => (text, None),
        };
        let (name, tag) = match rest.rsplit_once(':') {
            // A colon before a slash belongs to the registry's port.
            Some((name, tag)) if !tag.contains('/') => {
                check_tag(tag).map_err(refuse)?;
                (name, Some(tag.to_owned()))
            }
            _ => (rest, None),
        };
        let (registry, path) = split_registry(name);
        check_registry(registry).map_err(refuse)?;
        let repository = if registry == DEFAULT_REGISTRY && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        check_repository(registry, path, &repository).map_err(refuse)?;
        let tag = tag.or_else(|| digest.is_none().then(|| DEFAULT_TAG.to_owned()));
        Ok(Self { registry: registry.to_owned(), repository, tag, digest })
    }

    /// `docker.io`, `registry.k8s.io`, `127.0.0.1:5000` …
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// `library/busybox`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if one was given or implied.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one was given; it decides, whatever the tag says.
    #[must_use]
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// `docker.io/library/busybox`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// What CRI lists as a repo tag: `name:tag`, unless a digest pins the reference, which would
    /// leave the tag unverified.
    #[must_use]
    pub fn repo_tag(&self) -> Option<String> {
        match (&self.tag, &self.digest) {
            (Some(tag), None) => Some(format!("{}:{tag}", self.name())),
            _ => None,
        }
    }

    /// What CRI lists as a repo digest for content with this digest.
    #[must_use]
    pub fn repo_digest(&self, digest: &Digest) -> String {
        format!("{}@{digest}", self.name())
    }

    /// The last path part of a manifest URL.
    pub(crate) fn manifest_selector(&self) -> &str {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.as_str(),
            (None, Some(tag)) => tag,
            (None, None) => DEFAULT_TAG,
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

type Fault<'a> = (&'static str, &'a str, &'static str);

fn cut(text: &str) -> String {
    text.chars().take(100).collect()
}

/// The first part is a registry if it looks like a host name, otherwise the registry is Docker's.
fn split_registry(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((first, rest))
            if first == "localhost"
                || first.contains(['.', ':', '['])
                || first.chars().any(|c| c.is_ascii_uppercase()) =>
        {
            if first == "index.docker.io" {
                (DEFAULT_REGISTRY, rest)
            } else {
                (first, rest)
            }
        }
        _ => (DEFAULT_REGISTRY, name),
    }
}

fn check_tag(tag: &str) -> Result<(), Fault<'_>> {
    let first_is_word = tag.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if tag.is_empty() {
        Err(("tag", tag, "is empty"))
    } else if tag.len() > MAX_TAG {
        Err(("tag", tag, "is longer than 128 characters"))
    } else if !first_is_word || !tag.chars().all(allowed) {
        Err(("tag", tag, "may hold letters, digits, '_', '.', '-' and not start with '.' or '-'"))
    } else {
        Ok(())
    }
}

fn check_registry(registry: &str) -> Result<(), Fault<'_>> {
    let (host, port) = match registry.strip_prefix('[') {
        Some(rest) => {
            let (address, port) =
                rest.split_once(']').ok_or(("registry", registry, "has '[' without ']'"))?;
            if address.parse::<Ipv6Addr>().is_err() {
                return Err(("registry", registry, "is not an IPv6 address"));
            }
            if !port.is_empty() && !port.starts_with(':') {
                return Err(("registry", registry, "has text after ']'"));
            }
            (None, port.strip_prefix(':'))
        }
        None => match registry.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(registry), None),
        },
    };
    if let Some(port) = port
        && (!port.bytes().all(|b| b.is_ascii_digit()) || port.parse::<u16>().is_err())
    {
        return Err(("port", port, "is not a number from 0 to 65535"));
    }
    let label = |l: &str| {
        !l.is_empty()
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    };
    match host {
        Some(host) if !host.split('.').all(label) => {
            Err(("registry", registry, "is not a host name"))
        }
        _ => Ok(()),
    }
}

/// `given` is the repository as written, `full` with `library/` where that is implied.
fn check_repository<'a>(registry: &str, given: &'a str, full: &str) -> Result<(), Fault<'a>> {
    if given.is_empty() {
        return Err(("repository", given, "is empty"));
    }
    if registry.len() + 1 + full.len() > MAX_NAME {
        return Err(("repository", given, "makes the name longer than 255 characters"));
    }
    if given.chars().any(|c| c.is_ascii_uppercase()) {
        return Err(("repository", given, "must be lower case"));
    }
    if given.len() == 64 && given.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(("repository", given, "is an image id; write sha256:<id> instead"));
    }
    if given.split('/').all(is_path_component) {
        Ok(())
    } else {
        Err((
            "repository",
            given,
            "may hold a-z, 0-9 and single '.', '_', '__' or '-' runs between them",
        ))
    }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_path_component(component: &str) -> bool {
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if !component.starts_with(word) || !component.ends_with(word) {
        return false;
    }
    component
        .split(word)
        .filter(|separator| !separator.is_empty())
        .all(|s| matches!(s, "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn normal(text: &str) -> String {
        Reference::parse(text).unwrap_or_else(|e| panic!("{e}")).to_string()
    }

    #[test]
    fn names_are_normalised_as_docker_does() {
        let table = [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("a/b", "docker.io/a/b:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/x", "localhost:5000/x:latest"),
            ("127.0.0.1:5000/a/b:c", "127.0.0.1:5000/a/b:c"),
            ("[::1]:5000/x:y", "[::1]:5000/x:y"),
            ("[::1]/x", "[::1]/x:latest"),
            ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9"),
            ("UPPER/x", "UPPER/x:latest"),
            ("a__b/c---d.e_f", "docker.io/a__b/c---d.e_f:latest"),
            ("foo:65536", "docker.io/library/foo:65536"),
        ];
        for (given, expected) in table {
            assert_eq!(normal(given), expected, "{given}");
        }
        assert_eq!(normal(&format!("busybox@{D}")), format!("docker.io/library/busybox@{D}"));
        assert_eq!(normal(&format!("a.b/c:t@{D}")), format!("a.b/c:t@{D}"));
    }

    #[test]
    fn a_digest_decides_over_the_tag() {
        let pinned = Reference::parse(&format!("busybox:1.36@{D}")).unwrap();
        assert_eq!(pinned.manifest_selector(), D);
        assert_eq!(pinned.repo_tag(), None);
    }

    #[test]
    fn errors_name_the_bad_part() {
        let long_tag = format!("x:{}", "t".repeat(129));
        let long_name = format!("x.y/{}", "n".repeat(260));
        let hex = "a".repeat(64);
        let huge = "é".repeat(10_000);
        let table = [
            ("", "repository"),
            ("x:", "tag"),
            (":tag", "repository"),
            ("x:-t", "tag"),
            ("x:a b", "tag"),
            (&long_tag, "tag"),
            ("Busybox", "repository"),
            ("a/Busybox", "repository"),
            ("a//b", "repository"),
            ("a/", "repository"),
            ("a..b", "repository"),
            ("a___b", "repository"),
            ("-a", "repository"),
            ("a-", "repository"),
            ("../x", "registry"),
            ("a.b/../x", "repository"),
            (&long_name, "repository"),
            (&hex, "repository"),
            (&huge, "repository"),
            ("a.b:port/x", "port"),
            ("a.b:99999/x", "port"),
            ("a.b:+1/x", "port"),
            ("-a.b/x", "registry"),
            ("a..b/x", "registry"),
            ("[::1/x", "registry"),
            ("[zz]/x", "registry"),
            ("[::1]5/x", "registry"),
            ("x@sha256:abc", "digest"),
            ("x@", "digest"),
            ("x@sha512:abc", "digest"),
            ("x\0y", "repository"),
            ("x\ny", "repository"),
        ];
        for (given, part) in table {
            let error = Reference::parse(given).expect_err(given);
            assert_eq!(error.part, part, "{error}");
            assert!(error.to_string().len() < 1000, "long input is cut");
        }
    }

    proptest! {
        #[test]
        fn parsing_is_idempotent_and_never_panics(text in "\\PC{0,60}") {
            if let Ok(reference) = Reference::parse(&text) {
                prop_assert_eq!(Reference::parse(&reference.to_string()).unwrap(), reference);
            }
        }

        #[test]
        fn plausible_references_survive_a_round_trip(
            text in "([a-z0-9]{1,6}(\\.[a-z]{2,3})?(:[0-9]{1,4})?/)?[a-z0-9]{1,5}(/[a-z0-9_]{1,5})?(:[a-zA-Z0-9_.-]{1,8})?"
        ) {
            if let Ok(reference) = Reference::parse(&text) {
                prop_assert_eq!(Reference::parse(&reference.to_string()).unwrap(), reference);
            }
        }
    }
}
