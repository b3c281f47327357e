//! The transitions as a table, and what holds for any inputs.

use super::*;
use proptest::prelude::*;

fn parse_input(word: &str) -> Input {
    match word {
        "create" => Input::Create,
        "reserved" => Input::Entered(Stage::Reserved),
        "files" => Input::Entered(Stage::Files),
        "container" => Input::Entered(Stage::Container),
        "started" => Input::Entered(Stage::Started),
        "ready" => Input::Ready,
        "failed" => Input::CreationFailed { exit_code: None },
        "destroy" => Input::Destroy {
            reason: Reason::USER_REQUESTED,
            suppress: false,
        },
        "purge" => Input::Destroy {
            reason: Reason::USER_PURGED,
            suppress: true,
        },
        "died" => Input::Died { exit_code: Some(7) },
        "missing" => Input::Missing,
        "restart" => Input::Restart,
        "old-gone" => Input::OldContainerGone,
        "restart-failed" => Input::RestartFailed,
        "cleaned" => Input::Cleaned {
            exit_code: Some(9),
            death: None,
        },
        "cleaned-oom" => Input::Cleaned {
            exit_code: Some(9),
            death: Some(Death::OutOfMemory),
        },
        other => panic!("unknown input {other}"),
    }
}

fn ending_text(ending: &Ending) -> String {
    let mut text = ending.told().to_string();
    if let Some(code) = ending.exit_code {
        text += &format!("={code}");
    }
    if ending.suppress {
        text += "!";
    }
    text
}

fn state_text(state: &State) -> String {
    let abort_text = |abort: &Option<Ending>| match abort {
        Some(ending) => format!("/{}", ending_text(ending)),
        None => String::new(),
    };
    match state {
        State::Creating {
            stage,
            restart,
            abort,
        } => format!(
            "{}{:?}{}",
            if *restart { "re" } else { "" },
            stage,
            abort_text(abort)
        ),
        State::Running => "Running".into(),
        State::Restarting { abort } => format!("Restarting{}", abort_text(abort)),
        State::Ending(ending) => format!("Ending:{}", ending_text(ending)),
        State::Ended(ending) => format!("Ended:{}", ending_text(ending)),
    }
}

fn action_text(actions: &[Action]) -> String {
    actions
        .iter()
        .map(|action| match action {
            Action::Proceed => "-".into(),
            Action::Refuse(why) => format!("Refuse{why:?}"),
            other => format!("{other:?}"),
        })
        .collect::<Vec<_>>()
        .join("+")
}

/// Every way through the machine: the inputs that lead there, then the expected state and the
/// actions of the last input.
const TABLE: &str = "
    create                                 | Queued                                   | RefuseCreationInProgress
    reserved                               | Reserved                                 | -
    reserved files                         | Files                                    | -
    reserved files container               | Container                                | -
    started container                      | Started                                  | -
    started ready                          | Running                                  | AnnounceStarted
    restart                                | Queued                                   | RefuseNotRunning
    missing                                | Queued                                   | -
    died                                   | Queued                                   | -
    failed                                 | Ending:failed-to-create                  | StopAndClean
    failed cleaned                         | Ended:failed-to-create=9                 | Forget
    reserved failed cleaned                | Ended:failed-to-create=9                 | Forget
    files failed cleaned                   | Ended:failed-to-create=9                 | AnnounceTerminated+Forget
    destroy                                | Queued/user-requested                    | AbortCreation+JoinEnding
    destroy failed                         | Ending:user-requested                    | StopAndClean
    destroy failed cleaned                 | Ended:user-requested=9                   | AnnounceTerminated+Forget
    reserved destroy failed cleaned        | Ended:user-requested=9                   | AnnounceTerminated+Forget
    purge failed cleaned                   | Ended:user-purged=9!                     | Forget
    failed destroy                         | Ending:failed-to-create                  | JoinEnding
    failed destroy cleaned                 | Ended:failed-to-create=9                 | AnnounceTerminated+Forget
    failed purge cleaned                   | Ended:failed-to-create=9                 | Forget
    failed cleaned destroy                 | Ended:failed-to-create=9                 | AnnounceTerminated+JoinEnding
    failed cleaned destroy destroy         | Ended:failed-to-create=9                 | JoinEnding
    failed cleaned purge                   | Ended:failed-to-create=9                 | JoinEnding
    started failed                         | Ending:failed-to-start                   | StopAndClean
    started died                           | Started/failed-to-start=7                | AbortCreation
    started died died                      | Started/failed-to-start=7                | -
    started missing                        | Started/failed-to-start                  | AbortCreation
    started missing missing                | Started/failed-to-start                  | -
    started missing failed cleaned         | Ended:failed-to-start=9                  | AnnounceTerminated+Forget
    started destroy missing                | Started/user-requested                   | -
    container missing                      | Container                                | -
    started died failed                    | Ending:failed-to-start=7                 | StopAndClean
    started died ready                     | Ending:failed-to-start=7                 | StopAndClean
    started died failed cleaned            | Ended:failed-to-start=7                  | AnnounceTerminated+Forget
    files destroy                          | Files/user-requested                     | AbortCreation+JoinEnding
    files destroy destroy                  | Files/user-requested                     | JoinEnding
    files destroy purge                    | Files/user-requested                     | JoinEnding
    files destroy container                | Container/user-requested                 | AbortCreation
    files destroy failed                   | Ending:user-requested                    | StopAndClean
    files destroy failed cleaned           | Ended:user-requested=9                   | AnnounceTerminated+Forget
    started purge ready                    | Ending:user-purged!                      | StopAndClean
    started purge ready cleaned            | Ended:user-purged=9!                     | Forget
    started ready create                   | Running                                  | AnswerStored
    started ready ready                    | Running                                  | -
    started ready destroy                  | Ending:user-requested                    | StopAndClean+JoinEnding
    started ready destroy died             | Ending:user-requested=7                  | -
    started ready destroy missing          | Ending:user-requested                    | -
    started ready destroy purge            | Ending:user-requested                    | JoinEnding
    started ready destroy create           | Ending:user-requested                    | RefuseEnding
    started ready destroy restart          | Ending:user-requested                    | RefuseEnding
    started ready destroy died cleaned     | Ended:user-requested=7                   | AnnounceTerminated+Forget
    started ready purge cleaned            | Ended:user-purged=9!                     | Forget
    started ready purge destroy            | Ending:user-requested                    | NoteEnding+JoinEnding
    started ready purge destroy purge      | Ending:user-requested                    | JoinEnding
    started ready purge destroy cleaned    | Ended:user-requested=9                   | AnnounceTerminated+Forget
    started ready purge cleaned destroy    | Ended:user-requested=9                   | AnnounceTerminated+NoteEnding+JoinEnding
    started purge destroy                  | Started/user-requested                   | NoteEnding+JoinEnding
    started purge destroy ready            | Ending:user-requested                    | StopAndClean
    started ready died                     | Ending:self-terminated=7                 | Clean
    started ready died destroy             | Ending:self-terminated=7                 | JoinEnding
    started ready died cleaned             | Ended:self-terminated=7                  | AnnounceTerminated+Forget
    started ready died cleaned-oom         | Ended:out-of-memory=7                    | AnnounceTerminated+Forget
    started ready destroy died cleaned-oom | Ended:user-requested=7                   | AnnounceTerminated+Forget
    started ready missing                  | Ending:container-not-found               | Clean
    started ready died cleaned destroy     | Ended:self-terminated=7                  | JoinEnding
    started ready died cleaned create      | Ended:self-terminated=7                  | RefuseEnding
    started ready died cleaned cleaned     | Ended:self-terminated=7                  | -
    started ready restart                  | Restarting                               | StopForRestart
    started ready restart restart          | Restarting                               | JoinRestart
    started ready restart create           | Restarting                               | RefuseCreationInProgress
    started ready restart died             | Restarting                               | -
    started ready restart missing          | Restarting                               | -
    started ready restart old-gone         | reFiles                                  | -
    started ready restart old-gone restart | reFiles                                  | JoinRestart
    started ready restart old-gone died    | reFiles                                  | -
    started ready restart old-gone started ready   | Running                          | AnnounceStarted
    started ready restart old-gone started failed  | Ending:failed-to-start           | StopAndClean
    started ready restart restart-failed           | Ending:restart-timeout           | StopAndClean
    started ready restart destroy                  | Restarting/user-requested        | JoinEnding
    started ready restart destroy old-gone         | Ending:user-requested            | StopAndClean
    started ready restart destroy restart-failed   | Ending:user-requested            | StopAndClean
";

#[test]
fn transition_table() {
    for row in TABLE.lines().map(str::trim).filter(|row| !row.is_empty()) {
        let mut columns = row.split('|').map(str::trim);
        let inputs = columns.next().unwrap();
        let mut kernel = Lifecycle::creating();
        let mut actions = Vec::new();
        for word in inputs.split_whitespace() {
            actions = kernel.step(parse_input(word));
        }
        assert_eq!(state_text(kernel.state()), columns.next().unwrap(), "{row}");
        assert_eq!(action_text(&actions), columns.next().unwrap(), "{row}");
    }
}

#[test]
fn found_kernels_start_in_their_state() {
    let mut starting = Lifecycle::found_starting();
    assert_eq!(starting.step(Input::Ready), vec![Action::AnnounceStarted]);
    let mut restarting = Lifecycle::found_restarting();
    assert_eq!(restarting.step(Input::Restart), vec![Action::JoinRestart]);
    assert_eq!(restarting.step(Input::Missing), vec![Action::Proceed]);
    assert_eq!(restarting.step(Input::Ready), vec![Action::AnnounceStarted]);
    let mut running = Lifecycle::found_running();
    assert_eq!(running.step(Input::Create), vec![Action::AnswerStored]);
    let mut ending = Lifecycle::found_ending(Ending::new(Reason::USER_REQUESTED, false));
    assert_eq!(
        ending.step(Input::Cleaned {
            exit_code: None,
            death: None
        }),
        vec![Action::AnnounceTerminated, Action::Forget]
    );
}

proptest! {
    /// Whatever is asked for and seen, in whatever order: one ending is started, one end is
    /// announced, and the reason stored first, or the first that is to be told, is the one announced.
    #[test]
    fn one_end_per_life(words in proptest::collection::vec(
        proptest::sample::select(vec![
            "create", "reserved", "files", "container", "started", "ready", "failed",
            "destroy", "purge", "died", "missing", "restart", "old-gone", "restart-failed",
            "cleaned",
        ]), 0..40))
    {
        let mut kernel = Lifecycle::creating();
        let (mut cleans, mut announced, mut forgotten) = (0, 0, 0);
        let mut first: Option<Ending> = None;
        for word in words {
            for action in kernel.step(parse_input(word)) {
                match action {
                    Action::StopAndClean | Action::Clean => cleans += 1,
                    Action::AnnounceTerminated => announced += 1,
                    Action::Forget => forgotten += 1,
                    _ => {}
                }
            }
            match (&first, kernel.ending()) {
                (None, Some(ending)) => first = Some(ending.clone()),
                (Some(before), Some(ending)) if before.suppress && !ending.suppress => {
                    first = Some(ending.clone());
                }
                (Some(before), Some(ending)) => {
                    prop_assert_eq!(&before.reason, &ending.reason);
                    prop_assert_eq!(before.suppress, ending.suppress);
                }
                (Some(_), None) => prop_assert!(false, "an ending was forgotten"),
                (None, None) => {}
            }
        }
        prop_assert!(cleans <= 1 && announced <= 1 && forgotten <= 1);
        prop_assert!(announced <= forgotten && forgotten <= cleans);
    }
}
