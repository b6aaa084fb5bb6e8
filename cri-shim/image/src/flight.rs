//! Single flight: callers who want the same thing at the same time share one piece of work.
//!
//! The work runs in a task of its own, so it goes on when every caller has left.

use std::{
    collections::HashMap,
    fmt,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};

use crate::{Error, error::Result};

type Landing<V> = Shared<BoxFuture<'static, Result<V, Arc<Error>>>>;

type UnderWay<K, V, S> = Mutex<HashMap<K, (Landing<V>, S)>>;

/// Work under way, by key. `S` is what joining callers share with it besides the result.
pub(crate) struct Flights<K, V, S = ()> {
    under_way: Arc<UnderWay<K, V, S>>,
}

/// A seat in a flight: await [`Seat::landing`].
pub(crate) struct Seat<V, S> {
    /// The result, when it is there.
    pub(crate) landing: Landing<V>,
    pub(crate) shared: S,
    /// This caller started the work.
    pub(crate) is_first: bool,
}

impl<K, V, S> Flights<K, V, S>
where
    K: Clone + Eq + Hash + Send + fmt::Display + 'static,
    V: Clone + Send + Sync + 'static,
    S: Clone + Send + 'static,
{
    pub(crate) fn new() -> Self {
        Self { under_way: Arc::default() }
    }

    /// Joins the work for `key`, starting it with `work` if there is none.
    pub(crate) fn board<F>(&self, key: K, shared: S, work: impl FnOnce(S) -> F) -> Seat<V, S>
    where
        F: Future<Output = Result<V>> + Send + 'static,
    {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((landing, shared)) = under_way.get(&key) {
            let (landing, shared) = (landing.clone(), shared.clone());
            return Seat { landing, shared, is_first: false };
        }
        let name = key.to_string();
        let done = Arc::clone(&self.under_way);
        let leaving = key.clone();
        let work = work(shared.clone());
        let task = tokio::spawn(async move {
            // Dropped on panic too, so that no key stays taken.
            let _departure = Departure { done, key: leaving };
            work.await
        });
        let landing: BoxFuture<'static, _> = Box::pin(async move {
            match task.await {
                Ok(result) => result.map_err(Arc::new),
                Err(_) => Err(Arc::new(Error::Abandoned { what: name })),
            }
        });
        let landing = landing.shared();
        under_way.insert(key, (landing.clone(), shared.clone()));
        Seat { landing, shared, is_first: true }
    }
}

/// Takes a finished flight off the list.
struct Departure<K: Eq + Hash, V, S> {
    done: Arc<UnderWay<K, V, S>>,
    key: K,
}

impl<K: Eq + Hash, V, S> Drop for Departure<K, V, S> {
    fn drop(&mut self) {
        self.done.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

impl<K, V, S> fmt::Debug for Flights<K, V, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flights").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test]
    async fn callers_at_the_same_time_share_one_piece_of_work() {
        let flights: Flights<String, u32> = Flights::new();
        let (gate, runs) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicU32::new(0)));
        let board = || {
            let (gate, runs) = (gate.clone(), runs.clone());
            flights.board("x".to_owned(), (), |()| async move {
                let _open = gate.acquire().await;
                Ok(runs.fetch_add(1, Ordering::SeqCst))
            })
        };
        let (first, second) = (board(), board());
        assert!(first.is_first && !second.is_first);
        gate.add_permits(10);
        assert_eq!(first.landing.await.unwrap(), 0);
        assert_eq!(second.landing.await.unwrap(), 0);
        let later = board();
        assert!(later.is_first, "a finished flight is not joined");
        assert_eq!(later.landing.await.unwrap(), 1);
    }

    #[tokio::test]
    async fn work_goes_on_without_its_callers_and_a_panic_frees_the_key() {
        let flights: Flights<String, ()> = Flights::new();
        let finished = Arc::new(Semaphore::new(0));
        let signal = finished.clone();
        drop(flights.board("x".to_owned(), (), |()| async move {
            tokio::task::yield_now().await;
            signal.add_permits(1);
            Ok(())
        }));
        let _ = finished.acquire().await.unwrap();
        let lost = flights.board("y".to_owned(), (), |()| async { panic!("on purpose") });
        assert!(matches!(*lost.landing.await.unwrap_err(), Error::Abandoned { .. }));
        assert!(flights.board("y".to_owned(), (), |()| async { Ok(()) }).is_first);
    }
}
