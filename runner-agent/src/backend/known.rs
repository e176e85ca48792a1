//! What a backend holds in memory of attempts. Nothing of it is needed after a restart.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use runner_core::id::AttemptId;
use tokio_util::sync::CancellationToken;

/// The attempts that somebody holds something of, each with what a backend needs.
#[derive(Debug)]
pub struct Known<W> {
    attempts: Mutex<HashMap<AttemptId, Arc<W>>>,
}

impl<W> Default for Known<W> {
    fn default() -> Self {
        Self { attempts: Mutex::default() }
    }
}

impl<W> Known<W> {
    /// What is known of the attempt; made where nothing is.
    pub fn get(&self, attempt: AttemptId, make: impl FnOnce() -> W) -> Arc<W> {
        Arc::clone(lock(&self.attempts).entry(attempt).or_insert_with(|| Arc::new(make())))
    }

    /// Forgets an attempt that nobody but the caller holds. What is on the substrate stays.
    pub fn forget(&self, attempt: AttemptId, held: &Arc<W>) {
        let mut attempts = lock(&self.attempts);
        // The map's and the caller's.
        let unused = Arc::strong_count(held) == 2;
        if unused && attempts.get(&attempt).is_some_and(|known| Arc::ptr_eq(known, held)) {
            attempts.remove(&attempt);
        }
    }

    /// How many attempts are known.
    pub fn len(&self) -> usize {
        lock(&self.attempts).len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Ends the staging of one attempt from elsewhere.
#[derive(Debug, Default)]
pub struct StagingSwitch {
    current: Mutex<Option<CancellationToken>>,
}

impl StagingSwitch {
    /// Begins a staging that [`Self::abort`] can end. One at a time.
    pub fn begin(&self) -> Staging<'_> {
        let token = CancellationToken::new();
        *lock(&self.current) = Some(token.clone());
        Staging { switch: self, token }
    }

    /// Ends the staging that is going on, if there is one. A later one is not touched.
    pub fn abort(&self) {
        if let Some(token) = lock(&self.current).as_ref() {
            token.cancel();
        }
    }
}

/// A staging that is going on, until it is dropped.
#[derive(Debug)]
pub struct Staging<'a> {
    switch: &'a StagingSwitch,
    token: CancellationToken,
}

impl Staging<'_> {
    /// Cancelled when the staging is to end.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }
}

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        *lock(&self.switch.current) = None;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use runner_core::id::RunId;

    use super::*;

    #[test]
    fn an_attempt_that_somebody_holds_is_not_forgotten() {
        let known = Known::default();
        let attempt = AttemptId { run: RunId::new(uuid::Uuid::from_u128(7)), number: 1 };
        let held = known.get(attempt, || 1);
        known.forget(attempt, &known.get(attempt, || 2));
        assert_eq!((known.len(), *held), (1, 1));
        known.forget(attempt, &held);
        assert!(known.is_empty());
    }

    #[test]
    fn what_was_forgotten_does_not_forget_its_successor() {
        let known = Known::default();
        let attempt = AttemptId { run: RunId::new(uuid::Uuid::from_u128(7)), number: 1 };
        let old = known.get(attempt, || 1);
        known.forget(attempt, &old);
        drop(known.get(attempt, || 2));
        let also = Arc::clone(&old);
        known.forget(attempt, &old);
        assert_eq!((known.len(), *also), (1, 1));
    }

    #[test]
    fn only_a_staging_that_goes_on_is_aborted() {
        let switch = StagingSwitch::default();
        switch.abort();
        let staging = switch.begin();
        assert!(!staging.token().is_cancelled());
        switch.abort();
        assert!(staging.token().is_cancelled());
        drop(staging);
        assert!(!switch.begin().token().is_cancelled());
    }
}
