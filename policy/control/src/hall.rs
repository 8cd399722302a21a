//! Who may hold a connection, and for how long.
//!
//! ```text
//! admit ─► arriving ──────► answering ─► gone
//!          at most           at most
//!          MAX_ARRIVING      MAX_ANSWERING
//! └──────────────── at most LIFE ──────────┘
//! ```
//!
//! When one more arrives than may, the one that has been arriving for longest is closed: a host needs a
//! fraction of a second to arrive, so whoever opens many connections and says nothing on them closes its
//! own.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    task::{AbortHandle, JoinSet},
    time::timeout,
};

/// Connections whose request has not arrived yet.
pub(crate) const MAX_ARRIVING: usize = 256;
/// Connections whose request is being answered.
pub(crate) const MAX_ANSWERING: usize = 64;
/// How long a connection lives, from its first packet to the end of its answer.
pub(crate) const LIFE: Duration = Duration::from_secs(10);

/// The connections that there are.
#[derive(Default)]
pub(crate) struct Hall {
    present: Arc<Mutex<Present>>,
    connections: JoinSet<()>,
    admitted: u64,
}

/// One of them; gone when this is dropped.
pub(crate) struct Guest {
    number: u64,
    present: Arc<Mutex<Present>>,
}

#[derive(Default)]
struct Present {
    arriving: BTreeMap<u64, AbortHandle>,
    answering: BTreeSet<u64>,
}

impl Hall {
    /// Lets one more in, and lives it for as long as it may.
    pub(crate) fn admit<L>(&mut self, live: impl FnOnce(Guest) -> L)
    where
        L: Future<Output = ()> + Send + 'static,
    {
        let number = self.admitted;
        self.admitted += 1;
        let life = live(Guest { number, present: Arc::clone(&self.present) });
        // Held until the connection is listed, so that it cannot be gone before.
        let mut present = lock(&self.present);
        if present.arriving.len() >= MAX_ARRIVING
            && let Some((_, oldest)) = present.arriving.pop_first()
        {
            oldest.abort();
        }
        let handle = self.connections.spawn(async move {
            // Out of time: dropping the connection closes it.
            let _ = timeout(LIFE, life).await;
        });
        present.arriving.insert(number, handle);
    }

    /// Waits for the next connection to end; forever, when there is none.
    pub(crate) async fn see_off(&mut self) {
        match self.connections.join_next().await {
            Some(Err(error)) if error.is_panic() => tracing::error!("a connection ended in a panic"),
            Some(_) => {}
            None => std::future::pending().await,
        }
    }

    /// Closes those that still arrive, and waits for at most `grace` for the others.
    pub(crate) async fn close(mut self, grace: Duration) {
        for (_, arriving) in std::mem::take(&mut lock(&self.present).arriving) {
            arriving.abort();
        }
        let _ = timeout(grace, async { while self.connections.join_next().await.is_some() {} }).await;
    }
}

impl Guest {
    /// The request is here. False when too many are being answered already.
    pub(crate) fn arrived(&self) -> bool {
        let mut present = lock(&self.present);
        if present.answering.len() >= MAX_ANSWERING {
            return false;
        }
        present.arriving.remove(&self.number);
        present.answering.insert(self.number);
        true
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut present = lock(&self.present);
        present.arriving.remove(&self.number);
        present.answering.remove(&self.number);
    }
}

fn lock(present: &Mutex<Present>) -> MutexGuard<'_, Present> {
    present.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::{Guest, Hall, LIFE, MAX_ANSWERING, MAX_ARRIVING, lock};
    use std::{future::pending, time::Duration};
    use tokio::{sync::oneshot, time::Instant};

    /// A connection that does nothing, and the news of its end.
    fn idle(hall: &mut Hall) -> oneshot::Receiver<()> {
        let (alive, gone) = oneshot::channel();
        hall.admit(|guest: Guest| async move {
            let _held: (Guest, oneshot::Sender<()>) = (guest, alive);
            pending().await
        });
        gone
    }

    #[tokio::test]
    async fn one_more_than_may_arrive_closes_the_oldest() {
        let mut hall = Hall::default();
        let mut arriving: Vec<_> = (0..MAX_ARRIVING).map(|_| idle(&mut hall)).collect();
        tokio::task::yield_now().await;
        assert!(arriving.iter_mut().all(|gone| gone.try_recv() == Err(oneshot::error::TryRecvError::Empty)));
        let _last = idle(&mut hall);
        assert!(arriving.remove(0).await.is_err());
        assert_eq!(lock(&hall.present).arriving.len(), MAX_ARRIVING);
        assert!(arriving.iter_mut().all(|gone| gone.try_recv() == Err(oneshot::error::TryRecvError::Empty)));
    }

    #[tokio::test]
    async fn as_many_are_answered_as_may_be_and_a_crowd_closes_none_of_them() {
        let mut hall = Hall::default();
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        for _ in 0..=MAX_ANSWERING {
            let tell = tell.clone();
            hall.admit(|guest: Guest| async move {
                let _ = tell.send(guest.arrived());
                let _held = guest;
                pending().await
            });
        }
        for _ in 0..MAX_ANSWERING {
            assert_eq!(told.recv().await, Some(true));
        }
        assert_eq!(told.recv().await, Some(false));
        let _crowd: Vec<_> = (0..2 * MAX_ARRIVING).map(|_| idle(&mut hall)).collect();
        assert_eq!(lock(&hall.present).answering.len(), MAX_ANSWERING);
        hall.close(Duration::ZERO).await;
    }

    #[tokio::test(start_paused = true)]
    async fn connection_out_of_time_is_closed() {
        let mut hall = Hall::default();
        let (begin, gone) = (Instant::now(), idle(&mut hall));
        assert!(gone.await.is_err());
        assert_eq!(begin.elapsed().as_secs(), LIFE.as_secs());
        hall.see_off().await;
        assert!(lock(&hall.present).arriving.is_empty());
    }

    #[tokio::test]
    async fn closing_waits_for_answers_and_not_for_arrivals() {
        let mut hall = Hall::default();
        let silent = idle(&mut hall);
        let (go, gone) = oneshot::channel::<()>();
        let (done, is_done) = oneshot::channel();
        let (tell, told) = oneshot::channel();
        hall.admit(|guest: Guest| async move {
            let _ = tell.send(guest.arrived());
            let _ = gone.await;
            let _ = done.send(());
        });
        assert_eq!(told.await, Ok(true));
        let closing = tokio::spawn(hall.close(Duration::from_secs(60)));
        assert!(silent.await.is_err());
        go.send(()).unwrap();
        assert!(is_done.await.is_ok());
        closing.await.unwrap();
    }
}
