//! Server streams: lists in chunks, and container events.

use std::pin::Pin;

use futures::{Stream, StreamExt, stream};
use pinion_cri_proto::v1::ContainerEventResponse;
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;
use tonic::Status;

/// What a streaming RPC answers with.
pub(crate) type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Items in one message of a streamed list: far below the message limit even with large
/// annotations, and few messages on a full node.
const CHUNK: usize = 32;

/// A list as messages of a few items each.
pub(crate) fn chunked<I, T>(items: Vec<I>, message: fn(Vec<I>) -> T) -> Messages<T>
where
    I: Send + 'static,
    T: Send + 'static,
{
    Box::pin(stream::iter(items).chunks(CHUNK).map(move |chunk| Ok(message(chunk))))
}

/// What was missed, then events from now on. A reader too slow to follow is told so and cut off.
pub(crate) fn events(
    missed: Vec<ContainerEventResponse>,
    receiver: broadcast::Receiver<ContainerEventResponse>,
) -> Messages<ContainerEventResponse> {
    let events = BroadcastStream::new(receiver).map(|event| match event {
        Ok(event) => Ok(event),
        Err(BroadcastStreamRecvError::Lagged(lost)) => Err(Status::resource_exhausted(format!(
            "too slow: {lost} events were not read in time"
        ))),
    });
    // The first error ends the stream.
    let events = stream::iter(missed.into_iter().map(Ok)).chain(events);
    Box::pin(events.scan(false, |ended, event| {
        let next = (!*ended).then_some(event);
        *ended |= next.as_ref().is_some_and(Result::is_err);
        std::future::ready(next)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_long_list_comes_in_several_messages_and_loses_nothing() {
        let messages: Vec<_> = chunked((0..70).collect(), |c: Vec<i32>| c).collect().await;
        assert_eq!(messages.len(), 3);
        let all: Vec<i32> = messages.into_iter().flat_map(Result::unwrap).collect();
        assert_eq!(all, (0..70).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_reader_that_lags_is_cut_off() {
        let (sender, receiver) = broadcast::channel(1);
        for _ in 0..3 {
            sender.send(ContainerEventResponse::default()).unwrap();
        }
        let received: Vec<_> = events(Vec::new(), receiver).collect().await;
        assert_eq!(received.len(), 1);
        assert_eq!(received[0].as_ref().unwrap_err().code(), tonic::Code::ResourceExhausted);
    }
}
