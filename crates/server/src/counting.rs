//! Work on texts that are only counted, not answered: it takes at most half of the cores, so that it cannot hold up those
//! who wait for a reply. Must not know what is worked out.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use crate::error::ApiError;

/// Most requests that wait.
const MAX_WAITING: usize = 64;

/// Lets a few requests work at once, off the threads that answer, and a bounded number wait.
#[derive(Debug)]
pub(crate) struct Counting {
    /// One for whoever works or waits.
    places: Arc<Semaphore>,
    /// One for whoever works.
    workers: Arc<Semaphore>,
}

impl Counting {
    /// As large as the machine allows.
    pub(crate) fn new() -> Self {
        let num_cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self::bounded((num_cores / 2).max(1), MAX_WAITING)
    }

    fn bounded(num_workers: usize, max_waiting: usize) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        Self { places: semaphore(num_workers + max_waiting), workers: semaphore(num_workers) }
    }

    /// Does the work when it is its turn; 429 when too many wait for theirs.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let place = self.places.clone().try_acquire_owned().map_err(|_| {
            ApiError::too_many_waiting(
                "too many requests wait for their tokens to be counted; come back later",
            )
        })?;
        let worker = self.workers.clone().acquire_owned().await.expect("the semaphore is never closed");
        // A client may leave while its work goes on: the work itself holds what it takes.
        let working = spawn_blocking(move || {
            let _held = (place, worker);
            work()
        });
        working.await.map_err(|error| ApiError::unread(&error))?
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn few_work_some_wait_and_the_rest_is_sent_away() {
        let counting = Arc::new(Counting::bounded(1, 1));
        let (started, mut starts) = tokio::sync::mpsc::unbounded_channel();
        let mut running = Vec::new();
        for i in 0..2 {
            let (shared, started) = (counting.clone(), started.clone());
            let (go_on, wait) = mpsc::channel::<()>();
            let task = tokio::spawn(async move {
                let work = move || {
                    started.send(i).unwrap();
                    wait.recv().unwrap();
                    Ok(i)
                };
                shared.run(work).await
            });
            running.push((task, go_on));
            // The first works; the second has taken its place.
            if i == 0 {
                assert_eq!(starts.recv().await, Some(0));
            }
            while counting.places.available_permits() > 1 - i {
                tokio::task::yield_now().await;
            }
        }
        assert!(starts.try_recv().is_err(), "one works at a time");
        let refused = counting.run(|| Ok(())).await.unwrap_err();
        assert!(refused.status == 429 && refused.retry_after.is_some(), "{refused:?}");
        for (i, (task, go_on)) in running.into_iter().enumerate() {
            go_on.send(()).unwrap();
            assert_eq!(task.await.unwrap(), Ok(i));
        }
        assert_eq!(counting.run(|| Ok(7)).await, Ok(7), "there is room again");
    }

    #[tokio::test]
    async fn a_panic_gives_its_place_back() {
        let counting = Counting::bounded(1, 0);
        for _ in 0..3 {
            let failed = counting.run::<()>(|| panic!("secret")).await.unwrap_err();
            assert!(failed.status == 500 && !failed.message.contains("secret"), "{failed:?}");
        }
    }
}
