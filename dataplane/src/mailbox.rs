//! What one thread waits for and others change.
//!
//! In: changes by anybody. Out: the state as it is, to a thread that sleeps until it is what the
//! thread needs. Invariant: a panic while the state is held is the business of the thread that
//! panicked; the others go on with what is there.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A state and the word that it has changed.
#[derive(Debug, Default)]
pub(crate) struct Mailbox<T> {
    state: Mutex<T>,
    changed: Condvar,
}

impl<T> Mailbox<T> {
    pub(crate) fn new(state: T) -> Self {
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// The state; who changes it here wakes nobody.
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes all that wait.
    pub(crate) fn wake(&self) {
        self.changed.notify_all();
    }

    /// Changes the state and wakes all that wait.
    pub(crate) fn change(&self, change: impl FnOnce(&mut T)) {
        change(&mut self.lock());
        self.wake();
    }

    /// Sleeps until something may have changed.
    pub(crate) fn wait<'a>(&self, held: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        let woken = self.changed.wait(held);
        woken.unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until something may have changed, or for so long.
    pub(crate) fn wait_for<'a>(
        &self,
        held: MutexGuard<'a, T>,
        time: Duration,
    ) -> MutexGuard<'a, T> {
        let woken = self.changed.wait_timeout(held, time);
        woken.unwrap_or_else(PoisonError::into_inner).0
    }
}
