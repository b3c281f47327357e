//! Pages on their way to those who have asked for them.
//!
//! In: how a page is made. Out: answers that read from it. Invariants: so many are made at once at most; who asks
//! while those are made, or within a second after that, gets the same one if another still reads it; so many are kept
//! at most, and whoever still reads the oldest loses it to the next one, so that slow readers can't fill the memory; a page that nobody reads is not kept.

use std::collections::VecDeque;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use thiserror::Error;
use tokio::sync::Semaphore;

/// Pages made at once; further scrapes wait for them.
const MADE: usize = 2;
/// Pages at once; one of a thousand containers takes 14 MB.
const KEPT: usize = 8;
/// How long a page may have been ready for one more to read it.
const FRESH: Duration = Duration::from_secs(1);
/// What of a page is handed over at once, bytes: it is copied.
const PIECE: usize = 64 << 10;

/// A page ended before it was read to its end.
#[derive(Debug, Error)]
#[error("the client reads too slowly: newer pages took the place of its own")]
pub(super) struct Withdrawn;

#[derive(Debug)]
struct Page {
    /// When it was ready.
    made: Instant,
    /// `None` once it was withdrawn.
    text: Mutex<Option<String>>,
}

impl Page {
    fn text(&self) -> MutexGuard<'_, Option<String>> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pages that are made, and those that somebody reads.
#[derive(Debug)]
pub(super) struct Pages {
    making: Semaphore,
    /// The oldest first.
    read: Mutex<VecDeque<Weak<Page>>>,
}

impl Default for Pages {
    fn default() -> Self {
        Self {
            making: Semaphore::new(MADE),
            read: Mutex::default(),
        }
    }
}

impl Pages {
    fn read(&self) -> MutexGuard<'_, VecDeque<Weak<Page>>> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An answer from a page of another's, or else from one that is made as told.
    pub(super) async fn answer(&self, make: impl Future<Output = String>) -> Answer {
        let asked = Instant::now();
        // Nobody closes it.
        let _place = self.making.acquire().await;
        match self.newest(asked) {
            Some(answer) => answer,
            None => self.add(make.await, Instant::now()),
        }
    }

    /// An answer from the newest page, if that is new enough for who has asked then.
    fn newest(&self, asked: Instant) -> Option<Answer> {
        let page = self.read().back()?.upgrade()?;
        (page.made >= asked || page.made.elapsed() < FRESH).then(|| Answer::of(page))
    }

    /// As many newer pages as are kept, for whose readers others lose theirs.
    #[cfg(test)]
    pub(super) fn fill(&self) -> Vec<Answer> {
        let newer = (0..KEPT).map(|_| self.add(String::new(), Instant::now()));
        newer.collect()
    }

    /// An answer from a page that was ready at `made`.
    fn add(&self, text: String, made: Instant) -> Answer {
        let page = Arc::new(Page {
            made,
            text: Mutex::new(Some(text)),
        });
        let mut read = self.read();
        read.retain(|page| page.strong_count() > 0);
        while read.len() >= KEPT {
            let oldest = read.pop_front().and_then(|oldest| oldest.upgrade());
            if let Some(oldest) = oldest {
                oldest.text().take();
            }
        }
        read.push_back(Arc::downgrade(&page));
        Answer::of(page)
    }
}

/// The body of an answer.
#[derive(Debug)]
pub(super) struct Answer {
    page: Arc<Page>,
    left: Range<usize>,
}

impl Answer {
    fn of(page: Arc<Page>) -> Answer {
        let size = page.text().as_ref().map_or(0, String::len);
        let left = 0..size;
        Answer { page, left }
    }

    fn next(&mut self) -> Option<Result<Bytes, Withdrawn>> {
        if self.left.is_empty() {
            return None;
        }
        let text = self.page.text();
        let end = self.left.end.min(self.left.start.saturating_add(PIECE));
        let piece = text
            .as_ref()
            .and_then(|text| text.as_bytes().get(self.left.start..end));
        let Some(piece) = piece else {
            self.left = 0..0;
            return Some(Err(Withdrawn));
        };
        self.left.start = end;
        Some(Ok(Bytes::copy_from_slice(piece)))
    }
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = Withdrawn;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Withdrawn>>> {
        let next = self.get_mut().next();
        Poll::Ready(next.map(|piece| piece.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.left.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(u64::try_from(self.left.len()).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering::SeqCst;

    use futures_util::future::join_all;

    use super::*;

    fn text_of(mut answer: Answer) -> Result<String, Withdrawn> {
        let mut all = Vec::new();
        while let Some(piece) = answer.next() {
            all.extend_from_slice(&piece?);
        }
        Ok(String::from_utf8(all).expect("text"))
    }

    #[test]
    fn who_asks_while_another_reads_gets_the_same_page_for_a_second() {
        let pages = Pages::default();
        assert!(pages.newest(Instant::now()).is_none());
        // More than one piece, and no whole number of them.
        let text = "ä".repeat(PIECE);
        let first = pages.add(text.clone() + "b", Instant::now());
        let second = pages.newest(Instant::now()).expect("the page is new");
        assert!(Arc::ptr_eq(&first.page, &second.page));
        assert_eq!(first.size_hint().exact(), Some(2 * PIECE as u64 + 1));
        assert_eq!(text_of(first).expect("all of it"), text.clone() + "b");
        assert_eq!(text_of(second).expect("all of it"), text + "b");
        assert!(
            pages.newest(Instant::now()).is_none(),
            "nobody reads it any more"
        );
        let old = Instant::now().checked_sub(FRESH).expect("after boot");
        let _old = pages.add("c".to_owned(), old);
        assert!(pages.newest(Instant::now()).is_none());
    }

    #[tokio::test]
    async fn who_waits_while_a_page_is_made_gets_it_however_long_that_takes() {
        let (pages, made) = (Pages::default(), AtomicUsize::new(0));
        let scrape = || {
            pages.answer(async {
                tokio::time::sleep(FRESH + Duration::from_millis(100)).await;
                made.fetch_add(1, SeqCst);
                "page".to_owned()
            })
        };
        let answers = join_all((0..3 * MADE).map(|_| scrape())).await;
        assert_eq!(made.load(SeqCst), MADE);
        for answer in answers {
            assert_eq!(text_of(answer).expect("all of it"), "page");
        }
    }

    #[test]
    fn the_slowest_reader_loses_its_page_when_there_are_too_many() {
        let pages = Pages::default();
        let add = |number: usize| pages.add(format!("{number}"), Instant::now());
        let mut answers: VecDeque<Answer> = (0..KEPT).map(add).collect();
        // One has read all of its page, which makes room.
        assert_eq!(text_of(answers.remove(3).expect("it")).expect("all"), "3");
        answers.push_back(add(KEPT));
        assert!(answers.iter().all(|answer| answer.page.text().is_some()));
        answers.push_back(add(KEPT + 1));
        let slowest = answers.pop_front().expect("it");
        assert!(slowest.page.text().is_none(), "its memory is given back");
        assert!(matches!(text_of(slowest), Err(Withdrawn)));
        assert!(answers.into_iter().all(|answer| text_of(answer).is_ok()));
        let _last = add(0);
        assert_eq!(pages.read().len(), 1);
    }
}
