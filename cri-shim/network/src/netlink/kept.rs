//! A nfnetlink socket that stays open between calls.
//!
//! The kernel frees deleted nf_tables rules after an RCU grace period, and closing *any*
//! nfnetlink socket of the namespace waits for that (`nft_rcv_nl_event`), with the lock held
//! that every other change needs: 5 to 20 ms at each detachment of a pod, and as much again
//! for the next one in line. A socket that is not closed waits for nothing.
//!
//! A socket on which something failed may still have answers in it; it is closed and the next
//! call opens another.

use super::Socket;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// A NETLINK_NETFILTER socket in the network namespace of the first thread that uses it.
/// Clones share it; its users take turns, as the kernel would have them do.
#[derive(Debug, Clone, Default)]
pub(crate) struct KeptSocket {
    shared: Arc<Mutex<Option<Socket>>>,
}

impl KeptSocket {
    /// Runs `work` on the socket.
    ///
    /// # Errors
    /// Those of opening it and of `work`.
    pub(crate) fn run<T>(&self, work: impl FnOnce(&mut Socket) -> io::Result<T>) -> io::Result<T> {
        let mut slot = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let mut socket = match slot.take() {
            Some(socket) => socket,
            None => Socket::netfilter()?,
        };
        let result = work(&mut socket)?;
        *slot = Some(socket);
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_kept_until_something_fails_on_it() {
        let kept = KeptSocket::default();
        let there = || kept.shared.lock().unwrap().as_ref().map(|socket| socket.sequence);
        assert_eq!(there(), None);
        kept.run(|socket| Ok(socket.next_sequence())).unwrap();
        kept.run(|socket| Ok(socket.next_sequence())).unwrap();
        assert_eq!(there(), Some(2), "one socket for both");
        kept.run(|_| Err::<(), _>(io::Error::other("no"))).unwrap_err();
        assert_eq!(there(), None, "answers may be left in it");
    }
}
