//! Readiness of descriptors (epoll) and timers, for one thread.
//!
//! Each registration has a token that is never used again, so an event that was already
//! fetched when its source went away finds nothing and is dropped.
//!
//! A descriptor must be removed before it is closed: one that came from another process
//! may live on there, and would keep reporting under a token nobody knows.

use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

/// Events fetched by one system call.
const BATCH: usize = 16;

/// A delay that no clock can express is this long.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Names a registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token(u64);

/// Names a timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimerId(Instant, u64);

/// What is ready on a descriptor.
#[derive(Debug, Clone, Copy)]
pub struct Ready(EventFlags);

impl Ready {
    /// What is said of a descriptor that is to be read without having been waited for.
    #[must_use]
    pub fn to_read() -> Self {
        Self(EventFlags::IN)
    }

    /// A read would not block (data, end of file or an error).
    #[must_use]
    pub fn readable(self) -> bool {
        self.0.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP)
    }

    /// A write would not block.
    #[must_use]
    pub fn writable(self) -> bool {
        self.0.contains(EventFlags::OUT)
    }

    /// The other side is gone or the descriptor failed.
    #[must_use]
    pub fn broken(self) -> bool {
        self.0.intersects(EventFlags::HUP | EventFlags::ERR)
    }
}

/// What to wait for; failure of a descriptor is always reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Data to read.
    Read,
    /// Room to write.
    Write,
    /// Data to read and room to write.
    Both,
    /// A change of a kernel file (`EPOLLPRI`), reported once per change.
    Change,
    /// Nothing but failure.
    Failure,
}

impl Interest {
    fn flags(self) -> EventFlags {
        match self {
            Self::Read => EventFlags::IN,
            Self::Write => EventFlags::OUT,
            Self::Both => EventFlags::IN | EventFlags::OUT,
            Self::Change => EventFlags::PRI | EventFlags::ET,
            Self::Failure => EventFlags::empty(),
        }
    }
}

/// Descriptors and timers, each with what it means to the caller: `S` for descriptors, `T`
/// for timers.
#[derive(Debug)]
pub struct Reactor<S, T> {
    epoll: OwnedFd,
    sources: BTreeMap<Token, S>,
    timers: BTreeMap<TimerId, T>,
    next: u64,
}

impl<S: Copy, T> Reactor<S, T> {
    /// An empty reactor.
    ///
    /// # Errors
    /// Those of epoll_create1(2).
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            sources: BTreeMap::new(),
            timers: BTreeMap::new(),
            next: 0,
        })
    }

    /// Starts to report on `fd`.
    ///
    /// # Errors
    /// Those of epoll_ctl(2); `PermissionDenied` for files that cannot be polled.
    pub fn add(&mut self, fd: impl AsFd, interest: Interest, source: S) -> io::Result<Token> {
        let token = Token(self.unique());
        epoll::add(&self.epoll, fd, EventData::new_u64(token.0), interest.flags())?;
        self.sources.insert(token, source);
        Ok(token)
    }

    /// Reports something else on `fd` from now on.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn change(&mut self, token: Token, fd: impl AsFd, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, EventData::new_u64(token.0), interest.flags())?)
    }

    /// Reports nothing more on `fd`.
    pub fn remove(&mut self, token: Token, fd: impl AsFd) {
        self.sources.remove(&token);
        // Fails only if the descriptor is not registered, which is what is wanted.
        epoll::delete(&self.epoll, fd).ok();
    }

    /// What a token stands for, unless it was removed.
    #[must_use]
    pub fn source(&self, token: Token) -> Option<S> {
        self.sources.get(&token).copied()
    }

    /// Lets `timer` expire after `delay`.
    pub fn after(&mut self, delay: Duration, timer: T) -> TimerId {
        let now = Instant::now();
        let due = now.checked_add(delay).unwrap_or(now + FOREVER);
        let id = TimerId(due, self.unique());
        self.timers.insert(id, timer);
        id
    }

    /// Forgets a timer that may have expired already.
    pub fn cancel(&mut self, timer: TimerId) {
        self.timers.remove(&timer);
    }

    /// Waits until something is ready or a timer expires, and lists what is ready.
    ///
    /// # Errors
    /// Those of epoll_wait(2), except an interruption.
    pub fn wait(&mut self, ready: &mut Vec<(Token, Ready)>) -> io::Result<()> {
        ready.clear();
        let timeout = self.timers.first_key_value().map(|(id, _)| {
            // epoll counts whole milliseconds; waking before a timer is due is a busy loop.
            let left = id.0.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            rustix::event::Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        let mut events = [const { MaybeUninit::<Event>::uninit() }; BATCH];
        let events = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        for event in events {
            let (data, flags) = (event.data, event.flags);
            ready.push((Token(data.u64()), Ready(flags)));
        }
        Ok(())
    }

    /// Takes the next timer that is due.
    pub fn expired(&mut self) -> Option<T> {
        let first = self.timers.first_entry()?;
        if first.key().0 <= Instant::now() { Some(first.remove()) } else { None }
    }

    fn unique(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

/// A descriptor with its registration, if it has one.
#[derive(Debug)]
pub struct Watched {
    fd: OwnedFd,
    token: Option<Token>,
}

impl Watched {
    /// Takes over a descriptor that is not registered.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd, token: None }
    }

    /// Registers the descriptor or changes its registration.
    ///
    /// # Errors
    /// As [`Reactor::add`].
    pub fn watch<S: Copy, T>(
        &mut self,
        reactor: &mut Reactor<S, T>,
        interest: Interest,
        source: S,
    ) -> io::Result<()> {
        if let Some(token) = self.token {
            return reactor.change(token, &self.fd, interest);
        }
        self.token = Some(reactor.add(&self.fd, interest, source)?);
        Ok(())
    }

    /// Ends the registration and keeps the descriptor.
    pub fn unwatch<S: Copy, T>(&mut self, reactor: &mut Reactor<S, T>) {
        if let Some(token) = self.token.take() {
            reactor.remove(token, &self.fd);
        }
    }
}

impl AsFd for Watched {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn once(reactor: &mut Reactor<u8, u8>) -> Vec<(Option<u8>, Ready)> {
        let mut ready = Vec::new();
        reactor.wait(&mut ready).unwrap();
        ready.iter().map(|(token, what)| (reactor.source(*token), *what)).collect()
    }

    #[test]
    fn readiness_names_its_source_until_removed() {
        let mut reactor = Reactor::<u8, u8>::new().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut watched = Watched::new(reader);
        watched.watch(&mut reactor, Interest::Read, 7).unwrap();
        rustix::io::write(&writer, b"x").unwrap();
        let events = once(&mut reactor);
        assert_eq!(events.len(), 1);
        assert!(events[0].0 == Some(7) && events[0].1.readable());
        watched.unwatch(&mut reactor);
        reactor.after(Duration::ZERO, 1);
        assert!(once(&mut reactor).is_empty());
    }

    #[test]
    fn timers_expire_in_order_and_can_be_cancelled() {
        let mut reactor = Reactor::<u8, u8>::new().unwrap();
        reactor.after(Duration::from_millis(2), 2);
        let cancelled = reactor.after(Duration::from_millis(1), 9);
        reactor.after(Duration::ZERO, 1);
        reactor.after(Duration::from_secs(60), 3);
        reactor.after(Duration::MAX, 4);
        reactor.cancel(cancelled);
        std::thread::sleep(Duration::from_millis(3));
        let expired: Vec<u8> = std::iter::from_fn(|| reactor.expired()).collect();
        assert_eq!(expired, [1, 2]);
    }
}
