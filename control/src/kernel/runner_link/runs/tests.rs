use super::earlier::digest;
use super::*;
use crate::kernel::runner_link::frame::Stream;

fn query(code: &str) -> Submission {
    Submission {
        messages: vec![Outgoing::text("code", code)],
        starts: true,
    }
}

fn go_on() -> Submission {
    Submission {
        messages: Vec::new(),
        starts: false,
    }
}

fn out(text: &str) -> Record {
    Record::Text(Stream::Stdout, text.to_owned())
}

fn finished(code: i64) -> Record {
    Record::StepEnd(Step::Run, Some(code))
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

#[test]
fn a_waiting_run_whose_client_gave_up_is_never_sent() {
    let now = Instant::now();
    let mut table = RunTable::new(RunLimits::default(), false, now);
    assert_eq!(table.submit(now, "a", query("1")).expect("sent").len(), 1);
    for run_id in ["gone", "stays"] {
        assert!(
            table
                .submit(now, run_id, query(run_id))
                .expect("queued")
                .is_empty()
        );
    }
    table.begin_poll(now, "stays");
    assert_eq!(table.milestones(), [Milestone::Started; 3]);
    table.sweep(now + seconds(61));
    assert_eq!(table.milestones(), [Milestone::Cancelled]);
    let next = table.record(now + seconds(62), finished(0));
    assert_eq!(next, query("stays").messages);
    assert_eq!(table.current(), Some("stays"));
    assert_eq!(table.milestones(), [Milestone::Finished]);
    // Its client comes back after all.
    assert_not_started(&mut table, now + seconds(62), "gone");
    // The kernel is not idle, though an end was told last.
    table.sweep(now + seconds(63));
    table.sweep(now + seconds(64));
    assert_eq!(table.milestones(), [Milestone::Started]);
    table.abandon();
    table.abandon();
    assert_eq!(table.milestones(), [Milestone::Cancelled]);
}

#[test]
fn a_run_that_started_ends_once_however_it_ends() {
    use Milestone::{Finished, Started};
    let now = Instant::now();
    let limits = RunLimits {
        waiting: 1,
        ..RunLimits::default()
    };
    let mut table = RunTable::new(limits, false, now);
    // Nobody polls, and it ends; a client that asks afterwards does not begin it anew.
    table.submit(now, "a", query("1")).expect("sent");
    table.submit(now, "a", go_on()).expect("a call on it");
    table.record(now, finished(0));
    table.submit(now, "a", go_on()).expect("a late call");
    table.submit(now, "a", query("1")).expect("a repetition");
    table.take(now, "a", true).expect("the end");
    table.submit(now, "unknown", go_on()).expect("nothing");
    assert_eq!(table.milestones(), [Started, Started, Finished]);
    table.submit(now, "b", query("2")).expect("sent");
    table.submit(now, "c", query("3")).expect("queued");
    // What is refused has not started.
    table.submit(now, "d", query("4")).expect_err("full");
    assert_eq!(table.milestones(), [Started, Started]);
}

#[test]
fn an_ended_run_answers_repeats_until_it_is_forgotten() {
    let now = Instant::now();
    let mut table = RunTable::new(RunLimits::default(), false, now);
    table.submit(now, "a", query("1")).expect("sent");
    table.record(now, out("x"));
    table.record(now, finished(2));
    let first = table.take(now, "a", false).expect("finished");
    assert_eq!(first.ending, Ending::Step(Step::Run, Some(2)));
    // The manager repeats a call whose reply was lost after 30 s.
    let later = now + seconds(30);
    table.sweep(later);
    assert!(
        table
            .submit(later, "a", query("1"))
            .expect("repeat")
            .is_empty()
    );
    assert_eq!(table.take(later, "a", false), Some(first));
    // Other code under the same id is a new run.
    assert_eq!(table.submit(later, "a", query("2")).expect("sent").len(), 1);
    table.record(later, finished(0));
    table.take(later, "a", false).expect("finished");
    let much_later = later + seconds(61);
    table.sweep(much_later);
    assert_eq!(
        table
            .submit(much_later, "a", query("2"))
            .expect("sent")
            .len(),
        1
    );
}

#[test]
fn unread_output_is_bounded_and_step_ends_survive() {
    let now = Instant::now();
    let limits = RunLimits {
        bytes: 10_000,
        ..RunLimits::default()
    };
    let mut table = RunTable::new(limits, false, now);
    table.submit(now, "a", query("1")).expect("sent");
    table.record(now, Record::StepEnd(Step::Clean, Some(0)));
    for number in 0..100 {
        table.record(now, out(&"y".repeat(500)));
        table.record(
            now,
            Record::Media {
                mime: "text/plain".into(),
                content: number.to_string(),
            },
        );
    }
    let held = table.runs.get("a").expect("run").weight;
    assert!(held <= 10_000, "{held} bytes are held");
    let clean = table.take(now, "a", false).expect("the step's end");
    assert_eq!(clean.ending, Ending::Step(Step::Clean, Some(0)));
    table.record(now, finished(0));
    let end = table.take(now, "a", false).expect("the end");
    assert_eq!(end.ending, Ending::Step(Step::Run, Some(0)));
    assert!(end.records.len() > 1);
}

#[test]
fn wishes_for_input_count_with_what_they_hold() {
    let now = Instant::now();
    let limits = RunLimits {
        bytes: 1_000_000,
        ..RunLimits::default()
    };
    let mut table = RunTable::new(limits, false, now);
    table.submit(now, "a", query("1")).expect("sent");
    // A kilobyte of text, a hundred of memory.
    let Ok(Value::Object(options)) =
        serde_json::from_str(&format!("{{\"a\": [{}0]}}", "{\"\":0},".repeat(128)))
    else {
        panic!("a map");
    };
    for _ in 0..1000 {
        table.record(now, Record::WaitingInput(options.clone()));
    }
    let run = table.runs.get("a").expect("run");
    assert!(
        run.weight <= 1_000_000 && run.records.len() < 20,
        "{}",
        run.records.len()
    );
    while table.take(now, "a", false).is_some() {}
    let run = table.runs.get("a").expect("run");
    assert_eq!((run.weight, run.ends), (0, 0));
}

#[test]
fn a_run_nobody_polls_for_long_loses_its_output_but_not_its_end() {
    let now = Instant::now();
    let mut table = RunTable::new(RunLimits::default(), false, now);
    table.submit(now, "a", query("1")).expect("sent");
    table.record(now, out("old"));
    table.sweep(now + seconds(601));
    table.record(now + seconds(602), out("new"));
    table.record(now + seconds(603), finished(0));
    let end = table.take(now + seconds(604), "a", false).expect("the end");
    let Some(Record::Text(Stream::Stderr, words)) = end.records.first() else {
        panic!("the loss is told: {end:?}");
    };
    assert!(words.contains("dropped"));
    assert_eq!(end.records[1..], [out("new")]);
}

#[test]
fn after_a_restart_unknown_output_waits_for_its_client() {
    let now = Instant::now();
    let mut table = RunTable::new(RunLimits::default(), true, now);
    table.record(now, out("rest"));
    // Something runs: a new run waits for its end.
    assert!(
        table
            .submit(now, "new", query("1"))
            .expect("queued")
            .is_empty()
    );
    assert!(
        table
            .submit(now, "old", go_on())
            .expect("adopted")
            .is_empty()
    );
    assert_eq!(table.record(now, finished(3)), query("1").messages);
    let end = table.take(now, "old", false).expect("the end");
    assert_eq!(
        (end.records, end.ending),
        (vec![out("rest")], Ending::Step(Step::Run, Some(3)))
    );
    let told = [Milestone::Started, Milestone::Started, Milestone::Finished];
    assert_eq!(table.milestones(), told);
    // An earlier life has told of the start of a run that nobody continues.
    let mut table = RunTable::new(RunLimits::default(), true, now);
    table.record(now, finished(0));
    table.abandon();
    assert_eq!(table.milestones(), [Milestone::Finished]);
}

#[test]
fn a_run_taken_over_by_name_alone_does_not_block_others() {
    let now = Instant::now();
    let mut table = RunTable::new(RunLimits::default(), true, now);
    table.submit(now, "guess", go_on()).expect("taken over");
    assert_eq!(table.current(), Some("guess"));
    assert_eq!(table.submit(now, "new", query("1")).expect("sent").len(), 1);
    assert_eq!(table.current(), Some("new"));
    // The guess may never have been there: of it alone nothing is told.
    assert_eq!(table.milestones(), [Milestone::Started]);
    // Nor does a new run of the same name wait for two ends.
    let mut table = RunTable::new(RunLimits::default(), true, now);
    table.submit(now, "guess", go_on()).expect("taken over");
    let sent = table.submit(now, "guess", query("1")).expect("sent");
    assert_eq!(sent.len(), 1);
    table.record(now, finished(0));
    assert_eq!(table.current(), None);
    let told = [Milestone::Started, Milestone::Finished];
    assert_eq!(table.milestones(), told);
}

fn batch() -> Submission {
    let steps = ["clean", "build", "exec"];
    Submission {
        messages: steps.map(|kind| Outgoing::text(kind, "x")).into(),
        starts: true,
    }
}

fn step(step: Step) -> Record {
    Record::StepEnd(step, Some(0))
}

/// The table of a new agent, whose runner has been asked.
fn taken_over(owed: u32) -> (RunTable, Instant) {
    let now = Instant::now();
    let mut table = RunTable::new(RunLimits::default(), true, now);
    table.owe(now, owed, RunIds::default());
    let asked = table.probe(now);
    let asked: Vec<_> = asked
        .iter()
        .map(|message| (message.kind, message.payload.len()))
        .collect();
    assert_eq!(asked, [("build", 0), ("clean", 0)]);
    (table, now)
}

fn answer(table: &mut RunTable, now: Instant) -> Vec<Outgoing> {
    assert!(table.record(now, step(Step::Build)).is_empty());
    table.record(now, step(Step::Clean))
}

/// What a client is told at last: the marker and an end without an exit code.
fn assert_lost(table: &mut RunTable, now: Instant, run_id: &str) {
    let end = table.take(now, run_id, false).expect("an end");
    assert_eq!(end.ending, Ending::Step(Step::Run, None));
    let Some(Record::Text(Stream::Stderr, words)) = end.records.last() else {
        panic!("the loss is told: {end:?}");
    };
    assert!(words.contains("lost"), "{words}");
}

#[test]
fn a_run_whose_end_an_earlier_life_has_lost_is_told_to_have_ended() {
    use Milestone::{Cancelled, Finished, Started};
    // It is over, and two others were never sent.
    let (mut table, now) = taken_over(3);
    assert_eq!(table.milestones(), [Cancelled; 2]);
    assert_eq!(table.owed(), 1);
    assert!(
        table
            .submit(now, "new", query("1"))
            .expect("held")
            .is_empty()
    );
    assert_eq!(answer(&mut table, now), query("1").messages);
    assert_eq!(table.milestones(), [Started, Cancelled]);
    table.record(now, finished(0));
    assert_eq!((table.milestones(), table.owed()), (vec![Finished], 0));

    // More than there can be.
    let (mut table, _) = taken_over(u32::MAX);
    assert_eq!(table.milestones(), [Cancelled; 16]);
    table.abandon();
    assert_eq!(table.milestones(), [Cancelled]);

    // The rest of an answer to an earlier life's probe tells of no run.
    let (mut table, now) = taken_over(0);
    assert!(table.record(now, step(Step::Clean)).is_empty());
    assert!(!table.tells_of_unknown());
    assert!(answer(&mut table, now).is_empty());
    assert_eq!(table.milestones(), []);

    // Nothing was owed: nothing is told, and who goes on with a run of old waits for nothing.
    let (mut table, now) = taken_over(0);
    table.submit(now, "old", go_on()).expect("taken over");
    assert!(answer(&mut table, now).is_empty());
    assert_eq!(table.milestones(), []);
    assert_eq!(table.submit(now, "new", query("1")).expect("sent").len(), 1);

    // Who goes on with one that was owed gets its end, before the answer or after it.
    let (mut table, now) = taken_over(1);
    table.submit(now, "old", go_on()).expect("taken over");
    answer(&mut table, now);
    assert_lost(&mut table, now, "old");
    assert_eq!(table.milestones(), [Started, Cancelled]);
    let (mut table, now) = taken_over(1);
    answer(&mut table, now);
    assert!(
        !table.tells_of_unknown(),
        "the runner has said nothing of it"
    );
    table.submit(now, "old", go_on()).expect("taken over");
    assert_lost(&mut table, now, "old");
    assert_eq!(table.milestones(), [Cancelled]);
    // The batch job likewise, also when the journal did not know yet that it was sent.
    for owed in [0, 1] {
        let (mut table, now) = taken_over(owed);
        answer(&mut table, now);
        table.adopt(now, "batch-job");
        if owed == 1 {
            assert_lost(&mut table, now, "batch-job");
        } else {
            assert!(table.take(now, "batch-job", false).is_some());
        }
        assert_eq!(table.current(), None);
    }
}

/// What a client is told whose run was never sent.
fn assert_not_started(table: &mut RunTable, now: Instant, run_id: &str) {
    assert!(
        table
            .submit(now, run_id, go_on())
            .expect("a call")
            .is_empty()
    );
    let end = table.take(now, run_id, false).expect("an end");
    assert_eq!(end.ending, Ending::Step(Step::Run, None));
    let [Record::Text(Stream::Stderr, words)] = &end.records[..] else {
        panic!("it is told: {end:?}");
    };
    assert!(words.contains("not started"), "{words}");
}

#[test]
fn what_an_earlier_life_has_left_reaches_nobody_but_its_client() {
    use Milestone::{Cancelled, Finished, Started};
    let ids = |current: Option<&str>, waiting: &[&str]| RunIds {
        current: current.map(str::to_owned),
        request: None,
        waiting: waiting.iter().map(|&id| id.to_owned()).collect(),
    };
    // Who waited comes first, or when all is over, or when the next run has begun.
    for b_comes in 0..3 {
        let now = Instant::now();
        let mut table = RunTable::new(RunLimits::default(), true, now);
        table.owe(now, 2, ids(Some("a"), &["b"]));
        table.probe(now);
        assert_eq!((table.milestones(), table.owed()), (vec![Cancelled], 1));
        assert_eq!(table.ids(), ids(Some("a"), &[]));
        if b_comes == 0 {
            assert_not_started(&mut table, now, "b");
        }
        table.record(now, out("of a"));
        table.submit(now, "new", query("1")).expect("held");
        // Nothing is known of this one: it does not wait, and gets nothing of another's.
        table.submit(now, "c", go_on()).expect("a call");
        assert_lost(&mut table, now, "c");
        table.record(now, finished(0));
        if b_comes == 1 {
            assert_not_started(&mut table, now, "b");
        }
        assert_eq!(answer(&mut table, now), query("1").messages);
        assert!(table.tells_of_unknown());
        table.record(now, finished(1));
        table.submit(now, "newer", query("2")).expect("sent");
        table.submit(now, "a", go_on()).expect("its client comes");
        let end = table.take(now, "a", false).expect("the end");
        assert_eq!(end.records, [out("of a")]);
        assert_eq!(end.ending, Ending::Step(Step::Run, Some(0)));
        if b_comes == 2 {
            assert_not_started(&mut table, now, "b");
        }
        let told = table.milestones();
        assert_eq!(told, [Started, Finished, Finished, Started]);
        let newer = |waiting| RunIds {
            request: Some(digest(&query("2").messages)),
            ..ids(Some("newer"), waiting)
        };
        assert_eq!(table.ids(), newer(&[]));
        // What has not run is run when it is asked for again.
        table.submit(now, "b", query("3")).expect("queued");
        assert_eq!(table.ids(), newer(&["b"]));
        assert_eq!(table.record(now, finished(0)), query("3").messages);
    }
    // Journals of before name nobody, and one may know of a run that was not sent only.
    let now = Instant::now();
    let old: RunIds = serde_json::from_str("{}").expect("a journal");
    assert_eq!(old, RunIds::default());
    let mut table = RunTable::new(RunLimits::default(), true, now);
    table.owe(now, 1, ids(None, &["b"]));
    assert_eq!((table.milestones(), table.owed()), (vec![Cancelled], 0));
    table.record(now, out("rest"));
    assert_not_started(&mut table, now, "b");
    table.submit(now, "a", go_on()).expect("taken over");
    assert_eq!(table.current(), Some("a"));
}

#[test]
fn a_request_that_an_earlier_life_has_sent_is_not_sent_again() {
    // While the run of old is silent, once it has said something, and when it is over.
    for at in 0..3 {
        let now = Instant::now();
        let mut before = RunTable::new(RunLimits::default(), false, now);
        before.submit(now, "a", query("1")).expect("sent");
        let noted = serde_json::to_string(&before.ids()).expect("a journal");
        let mut table = RunTable::new(RunLimits::default(), true, now);
        table.owe(now, 1, serde_json::from_str(&noted).expect("a journal"));
        table.probe(now);
        assert_eq!(table.ids(), before.ids());
        if at > 0 {
            table.record(now, out("x"));
        }
        if at > 1 {
            table.record(now, finished(3));
        }
        for call in 0..2 {
            assert!(table.repeats(now, "a", &query("1")));
            let sent = table.submit(now, "a", query("1")).expect("a repetition");
            assert!(sent.is_empty(), "{at} {call}");
        }
        assert_eq!(table.ids().request, before.ids().request.filter(|_| at < 2));
        if at == 0 {
            table.record(now, out("x"));
        }
        if at < 2 {
            table.record(now, finished(3));
        }
        let end = table.take(now, "a", false).expect("the end");
        assert_eq!(end.records, [out("x")]);
        assert_eq!(end.ending, Ending::Step(Step::Run, Some(3)));
        answer(&mut table, now);
        assert_eq!(table.milestones().len(), if at < 2 { 3 } else { 1 });
        // Anything else is run.
        let other = table.submit(now, "a", query("2")).expect("sent");
        assert_eq!(other, query("2").messages);
    }
    let taken_over = |request: Option<String>| {
        let now = Instant::now();
        let mut table = RunTable::new(RunLimits::default(), true, now);
        let current = Some("a".to_owned());
        table.owe(
            now,
            1,
            RunIds {
                current,
                request,
                ..RunIds::default()
            },
        );
        table.record(now, finished(0));
        (table, now)
    };
    let request = || Some(digest(&query("1").messages));
    // What was asked for is not known, or it is something else, or long ago.
    for (request, code, later) in [(None, "1", 0), (request(), "2", 0), (request(), "1", 601)] {
        let (mut table, now) = taken_over(request);
        let now = now + seconds(later);
        assert!(!table.repeats(now, "a", &query(code)));
        let sent = table.submit(now, "a", query(code)).expect("sent");
        assert_eq!(sent, query(code).messages);
    }
    // Whoever knows that it was not sent has it sent: while nothing is heard, and when it counts as lost.
    for (lost, forgotten) in [(false, "a"), (true, "a"), (false, "b")] {
        let now = Instant::now();
        let mut table = RunTable::new(RunLimits::default(), true, now);
        let noted = RunIds {
            current: Some("a".to_owned()),
            request: request(),
            ..RunIds::default()
        };
        table.owe(now, 1, noted);
        table.probe(now);
        if lost {
            answer(&mut table, now);
        }
        table.forget_request(forgotten);
        assert_eq!(table.repeats(now, "a", &query("1")), forgotten != "a");
        let mut sent = table.submit(now, "a", query("1")).expect("accepted");
        sent.extend(answer(&mut table, now));
        let asked = match forgotten {
            "a" => query("1").messages,
            _ => Vec::new(),
        };
        assert_eq!(sent, asked, "{lost} {forgotten}");
    }
    // Its end is kept for it while another is at work.
    let (mut table, now) = taken_over(request());
    table.submit(now, "other", query("1")).expect("sent");
    assert!(table.repeats(now, "a", &query("1")));
}

#[test]
fn a_run_that_is_kept_back_is_sent_when_that_is_asked_for() {
    use Milestone::{Finished, Started};
    // Its turn comes at once, or after another run.
    for behind in [false, true] {
        let now = Instant::now();
        let mut table = RunTable::new(RunLimits::default(), false, now);
        if behind {
            table.submit(now, "first", query("1")).expect("sent");
        }
        table.keep_back("job");
        let sent = table.submit(now, "job", batch()).expect("accepted");
        assert!(sent.is_empty(), "{sent:?}");
        if behind {
            assert!(table.record(now, finished(0)).is_empty());
        }
        assert_eq!(table.current(), Some("job"));
        let noted = RunIds {
            waiting: vec!["job".to_owned()],
            ..RunIds::default()
        };
        assert_eq!(table.ids(), noted);
        assert!(
            table
                .submit(now, "next", query("2"))
                .expect("waits")
                .is_empty()
        );
        // Nothing that the runner says meanwhile is of it, nor does a new connection end it.
        table.probe(now);
        table.record(now, out("stray"));
        table.record(now, finished(1));
        assert!(answer(&mut table, now).is_empty());
        table.probe(now + seconds(2));
        assert_eq!(table.send_kept_back(), batch().messages);
        assert!(table.send_kept_back().is_empty());
        assert!(answer(&mut table, now).is_empty());
        assert_eq!(table.ids().current.as_deref(), Some("job"));
        for kind in [Step::Clean, Step::Build] {
            table.record(now, step(kind));
        }
        assert_eq!(table.record(now, finished(0)), query("2").messages);
        let told = table.milestones();
        match behind {
            true => assert_eq!(told, [Started, Started, Finished, Started, Finished]),
            false => assert_eq!(told, [Started, Started, Finished]),
        }
    }
    // It is not wanted any more: never sent, in its turn or before, and nobody's hindrance.
    for its_turn in [true, false] {
        let now = Instant::now();
        let mut table = RunTable::new(RunLimits::default(), false, now);
        if !its_turn {
            table.submit(now, "first", query("1")).expect("sent");
        }
        table.keep_back("job");
        table.submit(now, "job", batch()).expect("accepted");
        table.submit(now, "next", query("2")).expect("waits");
        let mut sent = table.withdraw_kept_back(now);
        assert!(table.withdraw_kept_back(now).is_empty());
        if !its_turn {
            sent.extend(table.record(now, finished(0)));
        }
        assert_eq!((sent, table.current()), (query("2").messages, Some("next")));
        assert_not_started(&mut table, now, "job");
        assert!(table.milestones().contains(&Milestone::Cancelled));
    }
    // Before its turn it is released: then its turn alone sends it.
    let now = Instant::now();
    let mut table = RunTable::new(RunLimits::default(), false, now);
    table.submit(now, "first", query("1")).expect("sent");
    table.keep_back("job");
    table.submit(now, "job", batch()).expect("waits");
    assert!(table.send_kept_back().is_empty());
    assert_eq!(table.record(now, finished(0)), batch().messages);
}

#[test]
fn a_run_that_ended_before_its_client_came_back_is_kept_for_it() {
    let now = Instant::now();
    let mut table = RunTable::new(RunLimits::default(), false, now);
    let runs = ["a", "b", "c", "d", "e", "f", "g"];
    for run_id in runs {
        table.submit(now, run_id, batch()).expect("accepted");
    }
    for (number, run_id) in runs.into_iter().enumerate() {
        table.record(now, step(Step::Clean));
        let taken = table.take(now, run_id, false).expect("a step");
        assert_eq!(taken.ending, Ending::Step(Step::Clean, Some(0)));
        table.record(now, step(Step::Build));
        table.record(now, out(run_id));
        table.record(now + seconds(number as u64), finished(0));
    }
    let later = now + seconds(60);
    table.sweep(later);
    for run_id in runs {
        let build = table.take(later, run_id, false).expect("a step");
        assert_eq!(build.ending, Ending::Step(Step::Build, Some(0)));
        let end = table.take(later, run_id, false).expect("the end");
        assert_eq!(end.records, [out(run_id)]);
        assert_eq!(end.ending, Ending::Step(Step::Run, Some(0)));
    }
}

#[test]
fn what_runs_that_ended_hold_is_bounded() {
    let now = Instant::now();
    let limits = RunLimits {
        ended: 8,
        ended_bytes: 10_000,
        ..RunLimits::default()
    };
    let mut table = RunTable::new(limits, false, now);
    let run = |table: &mut RunTable, number: u32| {
        let (at, run_id) = (now + seconds(number.into()), number.to_string());
        table
            .submit(at, &run_id, query(&"x".repeat(1000)))
            .expect("sent");
        table.record(at, Record::WaitingInput(Map::new()));
        table.record(at, out(&"y".repeat(1000)));
        table.record(at, finished(number.into()));
        let ended = table.runs.values().filter(|run| run.phase == Phase::Ended);
        let bytes: usize = ended.clone().map(Run::bytes).sum();
        assert!(bytes <= 10_000 && ended.count() <= 16, "{bytes}");
    };
    for number in 0..6 {
        run(&mut table, number);
        while table
            .take(now, &number.to_string(), false)
            .is_some_and(|taken| taken.ending != Ending::Step(Step::Run, Some(number.into())))
        {
        }
    }
    // What was fetched goes first, then output, and ends last.
    for number in 6..30 {
        run(&mut table, number);
    }
    let kept: std::collections::BTreeSet<&str> = table.runs.keys().map(String::as_str).collect();
    assert_eq!(
        kept,
        (22..30)
            .map(|number| number.to_string())
            .collect::<Vec<_>>()
            .iter()
            .map(String::as_str)
            .collect()
    );
    let (mut told, mut dropped) = (0, 0);
    for number in 22..30 {
        let run_id = number.to_string();
        let mut taken = table.take(now, &run_id, false).expect("an end");
        if taken.ending == Ending::WaitingInput(Map::new()) {
            taken = table.take(now, &run_id, false).expect("the end");
            assert_eq!(taken.records, [out(&"y".repeat(1000))]);
            told += 1;
        } else {
            dropped += 1;
        }
        assert_eq!(taken.ending, Ending::Step(Step::Run, Some(number)));
    }
    assert_eq!((told, dropped), (3, 5));
}

#[test]
fn a_silent_run_of_an_earlier_life_is_waited_for() {
    use Milestone::{Cancelled, Finished, Started};
    let (mut table, now) = taken_over(1);
    assert!(
        table
            .submit(now, "new", query("1"))
            .expect("held")
            .is_empty()
    );
    assert!(table.record(now, finished(0)).is_empty());
    assert_eq!(answer(&mut table, now), query("1").messages);
    assert_eq!(table.milestones(), [Started, Finished]);
    // Its client comes when the next one is at work.
    table.submit(now, "old", go_on()).expect("taken over");
    let end = table.take(now, "old", false).expect("the end");
    assert_eq!(end.ending, Ending::Step(Step::Run, Some(0)));
    assert_eq!(table.current(), Some("new"));

    // The kernel is restarted meanwhile.
    let (mut table, now) = taken_over(1);
    table.submit(now, "new", query("1")).expect("held");
    table.abandon();
    assert_eq!(table.milestones(), [Started, Cancelled, Cancelled]);
    assert_eq!(table.owed(), 0);

    // Its own steps are no answer, wherever in them the agent was restarted.
    for left in 0..3 {
        let (mut table, now) = taken_over(1);
        table.submit(now, "old", go_on()).expect("taken over");
        table.submit(now, "new", batch()).expect("held");
        let own = [Step::Clean, Step::Build].map(step);
        for end in &own[left..] {
            assert!(table.record(now, end.clone()).is_empty());
        }
        assert!(table.record(now, out("x")).is_empty());
        assert!(table.record(now, finished(7)).is_empty());
        assert_eq!(answer(&mut table, now), batch().messages, "{left}");
        for end in &own[left..] {
            let taken = table.take(now, "old", false).expect("a step");
            let Record::StepEnd(step, code) = *end else {
                panic!("{end:?}");
            };
            assert_eq!(taken.ending, Ending::Step(step, code));
        }
        let taken = table.take(now, "old", false).expect("the end");
        assert_eq!(taken.ending, Ending::Step(Step::Run, Some(7)));
        assert_eq!(table.milestones(), [Started, Started, Finished]);
        // A question that was asked twice is answered twice.
        assert!(answer(&mut table, now).is_empty());
        for record in own.into_iter().chain([finished(0)]) {
            table.record(now, record);
        }
        for expected in [Step::Clean, Step::Build, Step::Run] {
            let taken = table.take(now, "new", false).expect("a step");
            assert_eq!(taken.ending, Ending::Step(expected, Some(0)));
        }
        assert_eq!(table.milestones(), [Finished]);
    }
}

#[test]
fn a_step_that_may_be_an_answer_is_not_held_for_long() {
    let (mut table, now) = taken_over(1);
    table.submit(now, "old", go_on()).expect("taken over");
    table.record(now, step(Step::Build));
    assert_eq!(table.take(now, "old", false), None);
    let taken = table.take(now + seconds(1), "old", false).expect("a step");
    assert_eq!(taken.ending, Ending::Step(Step::Build, Some(0)));
    // It was the answer after all.
    table.record(now + seconds(2), step(Step::Clean));
    assert_lost(&mut table, now + seconds(2), "old");

    // Nobody asks. Of two the first was no answer.
    let (mut table, now) = taken_over(1);
    table.submit(now, "old", go_on()).expect("taken over");
    table.record(now, step(Step::Build));
    table.record(now, step(Step::Build));
    assert!(table.take(now, "old", false).is_some());
    assert_eq!(table.take(now, "old", false), None);
    table.sweep(now + seconds(1));
    assert!(table.take(now, "old", false).is_some());
}

#[test]
fn what_a_new_connection_has_lost_is_found_out() {
    use Milestone::{Cancelled, Finished, Started};
    let now = Instant::now();
    // Wherever in its steps a run is when messages are lost.
    for heard in 0..3 {
        let mut table = RunTable::new(RunLimits::default(), false, now);
        assert!(!table.is_in_doubt());
        table.submit(now, "a", batch()).expect("sent");
        table.submit(now, "b", query("1")).expect("queued");
        for own in &[Step::Clean, Step::Build].map(step)[..heard] {
            table.record(now, own.clone());
        }
        assert!(table.is_in_doubt());
        assert_eq!(table.probe(now).len(), 2);
        assert!(table.probe(now).is_empty(), "connections may come and go");
        assert_eq!(answer(&mut table, now), query("1").messages);
        assert_eq!(table.milestones(), [Started, Started, Cancelled]);
        for _ in 0..heard {
            table.take(now, "a", false).expect("a step");
        }
        assert_lost(&mut table, now, "a");
        assert_eq!(table.current(), Some("b"));
    }
    // Nothing is lost: the answer comes after the end.
    let mut table = RunTable::new(RunLimits::default(), false, now);
    table.submit(now, "a", query("1")).expect("sent");
    table.submit(now, "b", batch()).expect("queued");
    table.probe(now);
    assert_eq!(table.record(now, finished(0)), batch().messages);
    assert!(answer(&mut table, now).is_empty());
    assert_eq!(table.current(), Some("b"));
    assert_eq!(table.milestones(), [Started, Started, Finished]);
    // A request that came after the question is not over when that is answered.
    table.probe(now);
    table.submit(now, "b", query("2")).expect("sent");
    answer(&mut table, now);
    assert_eq!((table.current(), table.owed()), (Some("b"), 1));
    table.record(now, finished(0));
    assert_eq!((table.current(), table.owed()), (None, 0));
    // No answer: it is asked again, less and less often.
    let mut table = RunTable::new(RunLimits::default(), true, now);
    table.probe(now);
    let again = |table: &mut RunTable, after| table.probe_again(now + seconds(after)).len();
    let asked = [9, 10, 29, 30, 69, 70].map(|after| again(&mut table, after));
    assert_eq!(asked, [0, 2, 0, 2, 0, 2]);
    // A new connection is asked as soon as ever, however many there were; two at once, a little later.
    let mut after = 70;
    for _ in 0..100 {
        after += 2;
        assert_eq!(table.probe(now + seconds(after)).len(), 2);
    }
    assert!(table.probe(now + seconds(after)).is_empty());
    let asked = [0, 1, 10, 11, 30, 31].map(|later| again(&mut table, after + later));
    assert_eq!(asked, [0, 2, 0, 2, 0, 2]);
    // No one waits for hours.
    for _ in 0..100 {
        after += 400;
        assert_eq!(again(&mut table, after), 2);
    }
    assert_eq!(again(&mut table, after + 299), 0);
    assert_eq!(again(&mut table, after + 300), 2);
}

#[test]
fn many_small_records_are_handed_over_before_any_is_dropped() {
    let now = Instant::now();
    let limits = RunLimits {
        records: 4096,
        ..RunLimits::default()
    };
    let mut table = RunTable::new(limits, false, now);
    table.submit(now, "a", query("1")).expect("sent");
    let mut texts = Vec::new();
    for number in 0..10_000 {
        // Streams that take turns make a record each.
        let stream = [Stream::Stdout, Stream::Stderr][number % 2];
        table.record(now, Record::Text(stream, number.to_string()));
        texts.extend(
            table
                .take(now, "a", false)
                .into_iter()
                .flat_map(|taken| taken.records),
        );
    }
    texts.extend(table.take(now, "a", true).expect("flushed").records);
    assert_eq!(texts.len(), 10_000);
    for (number, record) in texts.iter().enumerate() {
        assert!(matches!(record, Record::Text(_, text) if *text == number.to_string()));
    }
}

#[test]
fn ends_without_end_make_no_room_for_themselves_slowly() {
    let now = Instant::now();
    let mut table = RunTable::new(RunLimits::default(), false, now);
    table.submit(now, "a", query("1")).expect("sent");
    for _ in 0..100_000 {
        table.record(now, Record::StepEnd(Step::Build, None));
    }
    for number in 0..70_000 {
        let stream = [Stream::Stdout, Stream::Stderr][number % 2];
        table.record(now, Record::Text(stream, "x".to_owned()));
    }
    let first = table.take(now, "a", true).expect("an end");
    assert!(first.records.len() < 2048, "{}", first.records.len());
}

#[test]
fn reading_waits_a_moment_for_a_client_that_has_much_to_take() {
    let now = Instant::now();
    let limits = RunLimits {
        records: 100,
        ..RunLimits::default()
    };
    let hold_up = limits.hold_up;
    let mut table = RunTable::new(limits, false, now);
    table.submit(now, "a", query("1")).expect("sent");
    let fill = |table: &mut RunTable, at: Instant| {
        for number in 0..50 {
            assert_eq!(table.holds_up(at), None, "{number}");
            let stream = [Stream::Stdout, Stream::Stderr][number % 2];
            table.record(at, Record::Text(stream, "x".to_owned()));
        }
    };
    fill(&mut table, now);
    assert_eq!(table.holds_up(now), Some(hold_up));
    assert_eq!(table.holds_up(now + hold_up / 2), Some(hold_up / 2));
    // Nobody has taken it: the runner goes on, and is not stopped again.
    let late = now + hold_up;
    fill(&mut table, late);
    fill(&mut table, late);
    // Somebody has: there is room, and then another moment.
    table.take(late, "a", false).expect("much");
    fill(&mut table, late);
    assert_eq!(table.holds_up(late), Some(hold_up * 4), "it comes back");
    // What ends a run lets the next one's output in.
    table.record(late, finished(0));
    assert_eq!(table.holds_up(late), None);
}
