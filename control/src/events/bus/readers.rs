//! The managers that read the stream: their group, and how far they are behind.
//!
//! In: a connection to the stream's server. Out: a group that is there before anything is added; a
//! pause while the stream is about to lose what nobody has read. Invariants: a group that is there
//! is left as it is; a server that does not tell, or a manager that does not read, holds nothing up
//! for longer than a bounded time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rand::Rng;

use super::connection::{Command, Connection, ConnectionError, Reply};
use super::message::{GROUP, STREAM};

/// Unread entries beyond which a backlog waits: with a batch more the stream, which keeps about 128,
/// still has all of them.
const UNREAD: usize = 64;
/// Unread entries beyond which a backlog goes in small batches: several agents may look at a time.
const SEVERAL: usize = 16;
/// How long a backlog waits for managers at a time.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause between looks, on average.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// Makes the managers' group, so that they are given all that is added from now on. Without it, a
/// manager makes its group when it next reads, at the end that the stream has then, and what was
/// added before is read by nobody.
///
/// # Errors
/// As `Connection::ask`, but for a group that is there, and for a user that may not make one: such a
/// server's managers are told of nothing less than before.
pub(super) async fn make_group(connection: &mut Connection) -> Result<(), ConnectionError> {
    let command = Command::new("XGROUP")
        .arg("CREATE")
        .arg(STREAM)
        .arg(GROUP)
        .arg("$")
        .arg("MKSTREAM");
    match connection.ask(command).await {
        Ok(_) => {
            tracing::info!(
                group = GROUP,
                "made the group by which managers read events"
            );
            Ok(())
        }
        Err(ConnectionError::Refused { message, .. }) if message.starts_with("BUSYGROUP") => Ok(()),
        Err(ConnectionError::Refused { message, .. }) if message.starts_with("NOPERM") => {
            tracing::debug!(
                err = message,
                "the group by which managers read events is left to them"
            );
            Ok(())
        }
        Err(err) => Err(err),
    }
}

/// A way to ask the stream's server.
pub(super) trait Ask {
    /// Why there is no answer.
    type Error;

    /// One command's reply; `Reply::Error` when the server refuses it.
    async fn ask_one(&mut self, command: Command) -> Result<Reply, Self::Error>;
}

impl Ask for Connection {
    type Error = ConnectionError;

    async fn ask_one(&mut self, command: Command) -> Result<Reply, ConnectionError> {
        let replies = self.run(&[command]).await?;
        Ok(replies.into_iter().next().unwrap_or(Reply::Nil))
    }
}

/// How far managers have read.
#[derive(Debug, Default)]
pub(super) struct Readers {
    /// The last entry they had taken when they were too far behind: as long as it is the same, they
    /// still are.
    behind_at: Option<Bytes>,
}

impl Readers {
    /// How many entries managers have not read, counted up to one more than may be; `None` when the
    /// server does not tell. What the stream has lost does not count: the `lag` that some versions
    /// tell has it in for ever.
    ///
    /// # Errors
    /// As `Ask::ask_one`.
    pub(super) async fn unread<A: Ask>(&mut self, ask: &mut A) -> Result<Option<usize>, A::Error> {
        let groups = Command::new("XINFO").arg("GROUPS").arg(STREAM);
        let Some(last) = last_taken(&ask.ask_one(groups).await?) else {
            return Ok(None);
        };
        if self.behind_at.as_ref() == Some(&last) {
            return Ok(Some(UNREAD + 1));
        }
        let mut after = b"(".to_vec();
        after.extend_from_slice(&last);
        let entries = Command::new("XRANGE")
            .arg(STREAM)
            .arg(after)
            .arg("+")
            .arg("COUNT")
            .number(UNREAD + 1);
        let reply = ask.ask_one(entries).await?;
        let unread = reply.array().map(<[Reply]>::len);
        self.behind_at = unread.is_some_and(|unread| unread > UNREAD).then_some(last);
        Ok(unread)
    }
}

/// The id of the last entry that the managers' group has taken; `None` without the group.
fn last_taken(groups: &Reply) -> Option<Bytes> {
    groups.array()?.iter().find_map(|group| {
        let fields = group.array()?;
        let is_ours = field(fields, b"name")?.bytes()?.as_ref() == GROUP.as_bytes();
        let last = field(fields, b"last-delivered-id")?.bytes()?;
        is_ours.then_some(last)
    })
}

/// How long to wait before the next look.
pub(super) fn look_pause() -> Duration {
    out_of_step(LOOK_PAUSE)
}

/// About this long, so that agents that began at the same time do not go on in step.
pub(super) fn out_of_step(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.5..1.5))
}

fn field<'a>(fields: &'a [Reply], name: &[u8]) -> Option<&'a Reply> {
    fields
        .chunks_exact(2)
        .find(|pair| pair[0].bytes().is_some_and(|key| key.as_ref() == name))
        .map(|pair| &pair[1])
}

/// Whether managers, who have not read `unread` entries, may be given small batches only.
pub(super) fn are_behind(unread: Option<usize>) -> bool {
    unread.is_some_and(|unread| (SEVERAL + 1..=UNREAD).contains(&unread))
}

/// The patience that a backlog has with managers.
#[derive(Debug, Default)]
pub(super) struct Patience {
    /// They let it run out, and have not caught up since.
    out: AtomicBool,
}

impl Patience {
    /// Whether more may be added: there is room in the stream, or managers, who have not read
    /// `unread` entries, were waited for long enough: for a bounded time, `waited` so far, and not at
    /// all while they have not caught up since the last time that was not enough.
    pub(super) fn lets_go(&self, unread: Option<usize>, waited: Duration) -> bool {
        if unread.is_none_or(|unread| unread <= UNREAD) {
            self.out.store(false, Ordering::Relaxed);
            return true;
        }
        if self.out.load(Ordering::Relaxed) {
            return true;
        }
        let runs_out = waited >= PATIENCE;
        if runs_out {
            self.out.store(true, Ordering::Relaxed);
            tracing::warn!(
                "no manager reads the events that wait; the oldest may go before one does"
            );
        }
        runs_out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Reply {
        Reply::Status(text.into())
    }

    fn group(name: &str, last: &str) -> Reply {
        let fields = [("name", name), ("lag", "700"), ("last-delivered-id", last)];
        let fields = fields.into_iter().flat_map(|(key, value)| [key, value]);
        Reply::Array(fields.map(text).collect())
    }

    /// Gives these replies, and notes what was asked.
    struct Replies(Vec<Reply>, Vec<Command>);

    impl Ask for Replies {
        type Error = ();

        async fn ask_one(&mut self, command: Command) -> Result<Reply, ()> {
            self.1.push(command);
            if self.0.is_empty() {
                return Err(());
            }
            Ok(self.0.remove(0))
        }
    }

    async fn unread(readers: &mut Readers, replies: Vec<Reply>) -> (Option<usize>, Vec<Command>) {
        let mut replies = Replies(replies, Vec::new());
        let unread = readers.unread(&mut replies).await.unwrap();
        (unread, replies.1)
    }

    #[tokio::test]
    async fn only_what_the_managers_group_has_not_read_counts() {
        let groups = |last| Reply::Array(vec![group("other", "9-0"), group("manager", last)]);
        let entries = |count| Reply::Array(vec![Reply::Array(Vec::new()); count]);
        let mut readers = Readers::default();
        let (five, asked) = unread(&mut readers, vec![groups("1-7"), entries(5)]).await;
        assert_eq!(five, Some(5));
        let range = [STREAM, "(1-7", "+", "COUNT", "65"];
        let range = range.into_iter().fold(Command::new("XRANGE"), Command::arg);
        assert_eq!(asked[1], range);
        let far = unread(&mut readers, vec![groups("1-7"), entries(65)]).await;
        assert_eq!(far.0, Some(65));
        // They have taken nothing: there is nothing to count.
        let still = unread(&mut readers, vec![groups("1-7")]).await;
        assert_eq!(still.0, Some(65));
        let moved = unread(&mut readers, vec![groups("2-0"), entries(64)]).await;
        assert_eq!(moved.0, Some(64));
        let again = unread(&mut readers, vec![groups("2-0"), entries(0)]).await;
        assert_eq!(again.0, Some(0));
    }

    #[tokio::test]
    async fn a_server_that_does_not_tell_is_not_asked_for_more() {
        let short = Reply::Array(vec![text("name")]);
        for groups in [
            Reply::Array(vec![group("other", "1-0")]),
            Reply::Array(vec![short, Reply::Int(3)]),
            Reply::Error("ERR no such key".into()),
        ] {
            assert_eq!(unread(&mut Readers::default(), vec![groups]).await.0, None);
        }
        let ours = Reply::Array(vec![group("manager", "1-0")]);
        let refused = Reply::Error("NOPERM".into());
        let told = unread(&mut Readers::default(), vec![ours, refused]).await;
        assert_eq!(told.0, None);
    }

    #[test]
    fn managers_that_do_not_read_are_waited_for_once() {
        let patience = Patience::default();
        let at_once = |unread| patience.lets_go(unread, Duration::ZERO);
        assert!(at_once(None), "a server that does not tell");
        assert!(at_once(Some(UNREAD)));
        assert!(!at_once(Some(UNREAD + 1)));
        assert!(!patience.lets_go(Some(96), PATIENCE - LOOK_PAUSE));
        assert!(patience.lets_go(Some(96), PATIENCE));
        assert!(at_once(Some(200)));
        // They have caught up: they may be waited for again.
        assert!(at_once(Some(1)));
        assert!(!are_behind(Some(SEVERAL)) && are_behind(Some(SEVERAL + 1)));
        assert!(!at_once(Some(96)));
    }
}
