//! The result of an operation that several callers wait for.
//!
//! The operation runs in a task of its own; callers hold a [`Ticket`] and may go away
//! without it noticing.

use tokio::sync::watch;

use crate::error::{Error, Kind, Result};

/// A claim on a result that is or will be there.
#[derive(Debug, Clone)]
pub(crate) struct Ticket<T>(watch::Receiver<Option<Result<T>>>);

/// The other end, held by the operation.
#[derive(Debug)]
pub(crate) struct Completion<T>(watch::Sender<Option<Result<T>>>);

/// A completion and the first ticket for it.
pub(crate) fn ticket<T>() -> (Completion<T>, Ticket<T>) {
    let (sender, receiver) = watch::channel(None);
    (Completion(sender), Ticket(receiver))
}

impl<T> Completion<T> {
    /// Publishes the result to everyone who waits.
    pub(crate) fn complete(self, result: Result<T>) {
        self.0.send_replace(Some(result));
    }
}

impl<T: Clone> Ticket<T> {
    /// Waits for the result.
    pub(crate) async fn wait(mut self) -> Result<T> {
        match self.0.wait_for(Option::is_some).await {
            Ok(value) => value.clone().unwrap_or_else(|| Err(lost())),
            Err(_) => Err(lost()),
        }
    }
}

/// The operation's task ended without a word: only at shutdown.
fn lost() -> Error {
    Error::new(Kind::Unavailable, "the server is shutting down")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_holder_gets_the_result() {
        let (completion, first) = ticket();
        let second = first.clone();
        let waiting = tokio::spawn(first.wait());
        completion.complete(Ok(7));
        assert_eq!(waiting.await.unwrap().unwrap(), 7);
        assert_eq!(second.wait().await.unwrap(), 7);
    }

    #[tokio::test]
    async fn a_dropped_completion_is_an_error_not_a_hang() {
        let (completion, ticket) = ticket::<u8>();
        drop(completion);
        assert_eq!(ticket.wait().await.unwrap_err().kind(), Kind::Unavailable);
    }
}
