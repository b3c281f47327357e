//! What an earlier life of the agent, or an earlier connection, has left to the runner.

use super::super::earlier::digest;
use super::*;

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
