//! A brake for log lines that others can trigger.
//!
//! Invariant: at most one line per [`PAUSE`] passes; the next one says how many were held back.

use std::time::{Duration, Instant};

/// Distance between two lines.
pub const PAUSE: Duration = Duration::from_secs(10);

/// The brake of one log line.
#[derive(Debug, Default)]
pub struct LogLimit {
    next: Option<Instant>,
    suppressed: u64,
}

impl LogLimit {
    /// A brake that has held back nothing yet.
    pub const fn new() -> Self {
        Self {
            next: None,
            suppressed: 0,
        }
    }

    /// `Some(lines held back since the last one)` when a line may be written now.
    pub fn pass(&mut self) -> Option<u64> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&mut self, now: Instant) -> Option<u64> {
        if self.next.is_some_and(|next| now < next) {
            self.suppressed += 1;
            return None;
        }
        self.next = Some(now + PAUSE);
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_per_pause_with_the_count_of_the_others() {
        let mut limit = LogLimit::default();
        let start = Instant::now();
        assert_eq!(limit.pass_at(start), Some(0));
        assert_eq!(limit.pass_at(start + PAUSE / 2), None);
        assert_eq!(limit.pass_at(start + PAUSE / 2), None);
        assert_eq!(limit.pass_at(start + PAUSE), Some(2));
    }
}
