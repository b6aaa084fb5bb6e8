//! Credentials for a registry, as CRI's `AuthConfig` carries them.

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};

use crate::Error;

/// The fields of CRI's `AuthConfig`; empty means absent. Never printed.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Auth {
    /// User name for basic authentication or for the token service.
    pub username: String,
    /// Its password.
    pub password: String,
    /// `base64(username:password)`, as Docker's config file has it; used if `username` is empty.
    pub auth: String,
    /// The registry the credentials are meant for; empty means that of the image.
    pub server_address: String,
    /// An OAuth2 refresh token for the token service.
    pub identity_token: String,
    /// A bearer token to send to the registry as it is.
    pub registry_token: String,
}

/// What an [`Auth`] amounts to.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credential {
    Basic { username: String, password: String },
    Identity(String),
    Bearer(String),
}

impl Auth {
    /// The credential to use; `None` if every field is empty.
    pub(crate) fn credential(&self) -> Result<Option<Credential>, Error> {
        if !self.registry_token.is_empty() {
            return Ok(Some(Credential::Bearer(self.registry_token.clone())));
        }
        if !self.identity_token.is_empty() {
            return Ok(Some(Credential::Identity(self.identity_token.clone())));
        }
        if !self.username.is_empty() {
            let (username, password) = (self.username.clone(), self.password.clone());
            return Ok(Some(Credential::Basic { username, password }));
        }
        if self.auth.is_empty() {
            return Ok(None);
        }
        let refuse = |reason| Error::Auth { reason };
        let decoded = STANDARD
            .decode(self.auth.trim())
            .map_err(|_e| refuse("the field \"auth\" is not base64"))?;
        let text = String::from_utf8(decoded)
            .map_err(|_e| refuse("the field \"auth\" does not decode to text"))?;
        let (username, password) = text
            .split_once(':')
            .ok_or_else(|| refuse("the field \"auth\" lacks a ':' between user and password"))?;
        // Docker pads the password with NUL bytes.
        let password = password.trim_end_matches('\0').to_owned();
        Ok(Some(Credential::Basic { username: username.to_owned(), password }))
    }

    /// The host part of `server_address`, `None` if the credentials are not bound to one.
    pub(crate) fn server_host(&self) -> Option<&str> {
        let address = self.server_address.trim();
        let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
        let host = rest.split('/').next().unwrap_or(rest);
        (!host.is_empty()).then_some(host)
    }
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth").field("server_address", &self.server_address).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(username: &str, password: &str) -> Option<Credential> {
        let (username, password) = (username.to_owned(), password.to_owned());
        Some(Credential::Basic { username, password })
    }

    #[test]
    fn every_form_of_credentials_is_understood() {
        let auth = |auth: &str| Auth { auth: auth.into(), ..Auth::default() };
        let named = Auth { username: "u".into(), password: "p".into(), ..auth("bm90OnVzZWQ=") };
        assert!(named.credential().unwrap() == basic("u", "p"));
        assert!(auth(&STANDARD.encode("u:p:q\0\0")).credential().unwrap() == basic("u", "p:q"));
        assert!(Auth::default().credential().unwrap().is_none());
        let token = Auth { registry_token: "t".into(), ..named };
        assert!(token.credential().unwrap() == Some(Credential::Bearer("t".into())));
        for bad in ["%%%", &STANDARD.encode("nocolon"), &STANDARD.encode([0xff, 0xfe])] {
            assert!(matches!(auth(bad).credential(), Err(Error::Auth { .. })), "{bad}");
        }
    }

    #[test]
    fn the_server_address_is_reduced_to_its_host() {
        let host = |text: &str| {
            Auth { server_address: text.into(), ..Auth::default() }.server_host().map(str::to_owned)
        };
        assert_eq!(host("https://index.docker.io/v1/").as_deref(), Some("index.docker.io"));
        assert_eq!(host("a.b:5000").as_deref(), Some("a.b:5000"));
        assert_eq!(host(""), None);
    }

    #[test]
    fn secrets_are_not_printed() {
        let auth = Auth { password: "hunter2".into(), ..Auth::default() };
        assert!(!format!("{auth:?}").contains("hunter2"));
    }
}
