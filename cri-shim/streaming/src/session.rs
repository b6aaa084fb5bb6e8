//! Sessions waiting for their client: single-use tokens with a deadline.

use crate::backend::Session;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a URL stays good.
pub(crate) const LIFETIME: Duration = Duration::from_secs(60);
/// Sessions waiting at once; more is refused, so that a client that never connects cannot
/// fill the memory.
pub(crate) const MOST: usize = 1000;

/// The sessions that wait.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    sessions: Mutex<HashMap<String, (Session, Instant)>>,
}

impl Waiting {
    /// Keeps a session under a token; `None` when too many wait.
    pub(crate) fn insert(&self, token: String, session: Session, now: Instant) -> Option<()> {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|_, (_, until)| *until > now);
        if sessions.len() >= MOST {
            return None;
        }
        sessions.insert(token, (session, now + LIFETIME));
        Some(())
    }

    /// Takes the session of a token: at most once, and not after its deadline.
    pub(crate) fn take(&self, token: &str, now: Instant) -> Option<Session> {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        let (session, until) = sessions.remove(token)?;
        (until > now).then_some(session)
    }
}

/// A token nobody can guess: 128 random bits in hexadecimal.
pub(crate) fn token() -> std::io::Result<String> {
    let mut bytes = [0u8; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        let flags = rustix::rand::GetRandomFlags::empty();
        filled += rustix::rand::getrandom(&mut bytes[filled..], flags)?;
    }
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> Session {
        Session::PortForward { pod: "p".into(), ports: vec![80] }
    }

    #[test]
    fn a_token_works_once() {
        let (waiting, now) = (Waiting::default(), Instant::now());
        waiting.insert("t".into(), session(), now).unwrap();
        assert_eq!(waiting.take("t", now), Some(session()));
        assert_eq!(waiting.take("t", now), None);
    }

    #[test]
    fn a_token_does_not_outlive_its_deadline() {
        let (waiting, now) = (Waiting::default(), Instant::now());
        waiting.insert("t".into(), session(), now).unwrap();
        assert_eq!(waiting.take("t", now + LIFETIME), None);
    }

    #[test]
    fn clients_that_never_connect_cannot_fill_the_memory() {
        let (waiting, now) = (Waiting::default(), Instant::now());
        for i in 0..MOST {
            waiting.insert(i.to_string(), session(), now).unwrap();
        }
        assert!(waiting.insert("more".into(), session(), now).is_none());
        assert!(waiting.insert("later".into(), session(), now + LIFETIME).is_some());
    }

    #[test]
    fn tokens_are_long_and_differ() {
        let (a, b) = (token().unwrap(), token().unwrap());
        assert_eq!(a.len(), 32);
        assert_ne!(a, b);
    }
}
