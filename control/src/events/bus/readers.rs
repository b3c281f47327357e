//! The managers that read the stream: their group, and how far they are behind.
//!
//! In: a connection to the stream's server. Out: a group that is there before anything is added; a
//! pause while the stream is about to lose what nobody has read. Invariants: a group that is there
//! is left as it is; a server that does not tell, or a manager that does not read, holds nothing up
//! for longer than a bounded time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::connection::{Command, Connection, ConnectionError, Reply};
use super::message::{GROUP, STREAM};

/// Unread entries beyond which a backlog waits: with a batch more the stream, which keeps about 128,
/// still has all of them.
const UNREAD: i64 = 64;
/// How long a backlog waits for managers at a time.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause between looks.
pub(super) const LOOK_PAUSE: Duration = Duration::from_millis(50);

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

/// The question how much managers have not read; `unread` reads the answer.
pub(super) fn look() -> Command {
    Command::new("XINFO").arg("GROUPS").arg(STREAM)
}

/// How many entries managers have not read; `None` when the server does not tell (older than Redis
/// 7, no group, or a place in the stream from which it cannot count).
pub(super) fn unread(reply: &Reply) -> Option<i64> {
    let groups = reply.array()?;
    let ours = groups.iter().find_map(|group| {
        let fields = group.array()?;
        let is_ours = field(fields, b"name")?.bytes()?.as_ref() == GROUP.as_bytes();
        is_ours.then_some(fields)
    })?;
    match field(ours, b"lag")? {
        Reply::Int(lag) => Some(*lag),
        _ => None,
    }
}

fn field<'a>(fields: &'a [Reply], name: &[u8]) -> Option<&'a Reply> {
    fields
        .chunks_exact(2)
        .find(|pair| pair[0].bytes().is_some_and(|key| key.as_ref() == name))
        .map(|pair| &pair[1])
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
    pub(super) fn lets_go(&self, unread: Option<i64>, waited: Duration) -> bool {
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

    fn group(name: &str, lag: Reply) -> Reply {
        let text = |text: &str| Reply::Status(text.into());
        Reply::Array(vec![
            text("name"),
            text(name),
            text("pending"),
            Reply::Int(900),
            text("lag"),
            lag,
        ])
    }

    #[test]
    fn only_what_the_managers_group_has_not_read_counts() {
        let other = || group("other", Reply::Int(700));
        let of = |groups: Vec<Reply>| unread(&Reply::Array(groups));
        assert_eq!(of(vec![other(), group("manager", Reply::Int(5))]), Some(5));
        assert_eq!(of(vec![group("manager", Reply::Nil), other()]), None);
        assert_eq!(of(vec![other()]), None);
        let short = Reply::Array(vec![Reply::Status("name".into())]);
        assert_eq!(of(vec![short, Reply::Int(3)]), None);
        assert_eq!(unread(&Reply::Error("ERR no such key".into())), None);
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
        assert!(!at_once(Some(96)));
    }
}
