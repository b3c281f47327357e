use super::*;
use crate::kernel::runner_link::frame::Stream;

mod earlier_life;

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

fn answer(table: &mut RunTable, now: Instant) -> Vec<Outgoing> {
    assert!(table.record(now, step(Step::Build)).is_empty());
    table.record(now, step(Step::Clean))
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
fn a_run_that_is_held_is_sent_when_that_is_asked_for() {
    use Milestone::{Finished, Started};
    // Its turn comes at once, or after another run.
    for behind in [false, true] {
        let now = Instant::now();
        let mut table = RunTable::new(RunLimits::default(), false, now);
        if behind {
            table.submit(now, "first", query("1")).expect("sent");
        }
        table.submit_held(now, "job", batch()).expect("accepted");
        if behind {
            assert!(table.record(now, finished(0)).is_empty());
        }
        assert_eq!((table.current(), table.at_work()), (Some("job"), None));
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
        assert_eq!(table.release("job"), batch().messages);
        assert!(table.release("job").is_empty());
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
        table.submit_held(now, "job", batch()).expect("accepted");
        table.submit(now, "next", query("2")).expect("waits");
        let mut sent = table.withdraw(now, "job").expect("not sent");
        assert_eq!(table.withdraw(now, "job"), None);
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
    table.submit_held(now, "job", batch()).expect("waits");
    assert!(table.release("job").is_empty());
    assert_eq!(table.record(now, finished(0)), batch().messages);
}

#[test]
fn a_run_of_a_client_that_has_the_id_of_one_to_be_held_goes_on() {
    let now = Instant::now();
    let mut table = RunTable::new(RunLimits::default(), false, now);
    table.submit(now, "job", query("1")).expect("sent");
    assert!(table.submit_held(now, "job", batch()).is_err());
    assert_eq!(table.at_work(), Some("job"));
    table.record(now, out("its own"));
    table.record(now, finished(0));
    let end = table.take(now, "job", false).expect("the end");
    assert_eq!(end.records, [out("its own")]);
    // Then it is free.
    table.submit_held(now, "job", batch()).expect("accepted");
    assert_eq!(table.release("job"), batch().messages);
}

#[test]
fn only_what_was_not_sent_is_withdrawn() {
    let now = Instant::now();
    let mut table = RunTable::new(RunLimits::default(), false, now);
    for run_id in ["first", "waits"] {
        table.submit(now, run_id, query(run_id)).expect("accepted");
    }
    assert_eq!(table.withdraw(now, "first"), None);
    assert_eq!(table.withdraw(now, "unknown"), None);
    assert_eq!(table.withdraw(now, "waits"), Some(Vec::new()));
    assert_eq!(table.at_work(), Some("first"));
    assert!(table.record(now, finished(0)).is_empty());
    assert_not_started(&mut table, now, "waits");
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
