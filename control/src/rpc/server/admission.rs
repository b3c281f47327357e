//! How much may be in flight: calls and request bytes, over all and per connection.
//!
//! Most calls in flight only wait (for a kernel to start or to end), so that there may be many; a few places
//! beside theirs are for the command line, which has to tell what they wait for.
//!
//! In: a connection and a size; out: a [`Ticket`] that gives everything back when dropped, or the
//! failure that is sent instead. Invariant: counts return to zero when all tickets are gone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::Limits;
use crate::rpc::failure::Failure;

/// Calls of the command line that are let in beyond the limits of calls.
const RESERVE: usize = 16;

#[derive(Debug)]
pub(super) struct Admission {
    counts: Arc<Mutex<Counts>>,
    calls: usize,
    calls_per_connection: usize,
    request_bytes: usize,
}

#[derive(Debug, Default)]
struct Counts {
    calls: usize,
    bytes: usize,
    by_connection: HashMap<u64, usize>,
}

/// The right to run one call.
#[derive(Debug)]
pub(super) struct Ticket {
    counts: Arc<Mutex<Counts>>,
    connection: u64,
    bytes: usize,
}

impl Admission {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            counts: Arc::default(),
            calls: limits.calls,
            calls_per_connection: limits.calls_per_connection,
            request_bytes: limits.request_bytes,
        }
    }

    /// `ours` is a call of the command line.
    pub(super) fn admit(
        &self,
        connection: u64,
        bytes: usize,
        ours: bool,
    ) -> Result<Ticket, Failure> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let here = counts.by_connection.get(&connection).copied().unwrap_or(0);
        let refuse = |what: &str, limit: usize| {
            Failure::runtime_error(format!(
                "the agent is busy: {limit} {what} in flight; try again later"
            ))
        };
        let reserve = if ours { RESERVE } else { 0 };
        if counts.calls >= self.calls.saturating_add(reserve) {
            return Err(refuse("calls are", self.calls));
        }
        if here >= self.calls_per_connection.saturating_add(reserve) {
            return Err(refuse(
                "calls of this connection are",
                self.calls_per_connection,
            ));
        }
        // One request alone is bounded by the message size and always let in.
        if counts.bytes > 0 && counts.bytes + bytes > self.request_bytes {
            return Err(refuse("bytes of requests may be", self.request_bytes));
        }
        counts.calls += 1;
        counts.bytes += bytes;
        counts.by_connection.insert(connection, here + 1);
        Ok(Ticket {
            counts: self.counts.clone(),
            connection,
            bytes,
        })
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.calls -= 1;
        counts.bytes -= self.bytes;
        if let Some(here) = counts.by_connection.get_mut(&self.connection) {
            *here -= 1;
            if *here == 0 {
                counts.by_connection.remove(&self.connection);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bound_refuses_and_recovers() {
        let limits = Limits {
            calls: 3,
            calls_per_connection: 2,
            request_bytes: 100,
            ..Limits::default()
        };
        let admission = Admission::new(&limits);
        let first = admission.admit(1, 10, false).unwrap();
        let second = admission.admit(1, 10, false).unwrap();
        assert!(
            admission
                .admit(1, 1, false)
                .unwrap_err()
                .repr
                .contains("this connection")
        );
        assert!(
            admission
                .admit(2, 81, false)
                .unwrap_err()
                .repr
                .contains("bytes")
        );
        let third = admission.admit(2, 80, false).unwrap();
        assert!(
            admission
                .admit(3, 1, false)
                .unwrap_err()
                .repr
                .contains("3 calls")
        );
        // What tells of them is not kept from it by them, within bounds.
        let told: Vec<_> = (0..RESERVE)
            .map(|_| admission.admit(3, 0, true).unwrap())
            .collect();
        assert!(admission.admit(4, 0, true).is_err());
        drop(told);
        drop((first, second, third));
        // Alone, even an oversized one is let in.
        drop(admission.admit(9, 1000, false).unwrap());
        let counts = admission.counts.lock().unwrap();
        assert_eq!(
            (counts.calls, counts.bytes, counts.by_connection.len()),
            (0, 0, 0)
        );
    }
}
