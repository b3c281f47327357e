//! How many error events go out: they share the stream's few entries with lifecycle events.
//!
//! In: error events as they happen. Out: those that may be sent, with a count of those that were
//! not. Invariant: over any hour at most a burst and one for every interval are sent.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::events::Event;

/// Error events that may go out at once.
const BURST: u32 = 5;
/// After this time one more may.
const INTERVAL: Duration = Duration::from_secs(20);
/// Longest message and trace; the rest is cut off.
const TEXT_LIMIT: usize = 4096;

/// A bucket of allowances.
#[derive(Debug)]
pub(super) struct ErrorRate {
    left: u32,
    counted_from: Option<Instant>,
    suppressed: u64,
}

impl Default for ErrorRate {
    fn default() -> Self {
        Self {
            left: BURST,
            counted_from: None,
            suppressed: 0,
        }
    }
}

impl ErrorRate {
    /// The event to send, if it may be sent now.
    pub(super) fn admit(&mut self, event: &Event, now: Instant) -> Option<Event> {
        let from = *self.counted_from.get_or_insert(now);
        let earned = now.saturating_duration_since(from).as_secs() / INTERVAL.as_secs();
        if earned > 0 {
            let earned = u32::try_from(earned).unwrap_or(u32::MAX);
            self.left = self.left.saturating_add(earned).min(BURST);
            self.counted_from = Some(now);
        }
        if self.left == 0 {
            self.suppressed += 1;
            return None;
        }
        self.left -= 1;
        let mut event = event.clone();
        if let Event::AgentError {
            message,
            trace,
            context,
            ..
        } = &mut event
        {
            cut(message);
            if let Some(trace) = trace {
                cut(trace);
            }
            if self.suppressed > 0 {
                context.insert("suppressed".into(), Value::from(self.suppressed));
            }
        }
        self.suppressed = 0;
        Some(event)
    }
}

fn cut(text: &mut String) {
    if text.len() > TEXT_LIMIT {
        text.truncate(text.floor_char_boundary(TEXT_LIMIT));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Severity;

    fn error(message: &str) -> Event {
        Event::AgentError {
            message: message.into(),
            trace: None,
            context: serde_json::Map::new(),
            severity: Severity::Error,
        }
    }

    #[test]
    fn a_burst_then_one_each_interval_with_the_count_of_the_others() {
        let mut rate = ErrorRate::default();
        let start = Instant::now();
        let admitted = (0..100)
            .filter(|_| rate.admit(&error("x"), start).is_some())
            .count();
        assert_eq!(admitted, 5);
        assert!(rate.admit(&error("x"), start + INTERVAL / 2).is_none());
        let later = rate.admit(&error("y"), start + INTERVAL).unwrap();
        let Event::AgentError { context, .. } = later else {
            panic!()
        };
        assert_eq!(context["suppressed"], 96);
        assert!(rate.admit(&error("z"), start + INTERVAL).is_none());
        // A quiet day earns no more than a burst.
        let much_later = start + Duration::from_secs(86_400);
        let admitted = (0..100)
            .filter(|_| rate.admit(&error("x"), much_later).is_some())
            .count();
        assert_eq!(admitted, 5);
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        let mut rate = ErrorRate::default();
        let long = "é".repeat(TEXT_LIMIT);
        let Some(Event::AgentError { message, .. }) = rate.admit(&error(&long), Instant::now())
        else {
            panic!()
        };
        assert_eq!(message.len(), TEXT_LIMIT);
    }
}
