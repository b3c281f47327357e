//! Two processes and a region between them: either may be killed with SIGKILL at any moment, and
//! nobody ever sees a torn, unreadable or lost row.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use harness::regions::{self, Watch};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use shared::desired::{DesiredReader, DesiredWriter};
use shared::observed::ObservedWriter;

/// Kills per test, and how long they may take.
const KILLS: u32 = 1_500;
const PATIENCE: Duration = Duration::from_secs(50);
/// Fewer kills than this in that time prove nothing.
const ENOUGH: u32 = 300;
/// Bounds of the time a killed process has lived at most, microseconds.
const SHORTEST_SPAN_US: u64 = 8_000;
const LONGEST_SPAN_US: u64 = 100_000;

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").expect("tests need a tmpfs at /dev/shm")
}

fn seed() -> StdRng {
    let seed: u64 = rand::rng().random();
    eprintln!("seed {seed}");
    StdRng::seed_from_u64(seed)
}

fn start(mode: &str, directory: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_region-exerciser"))
        .arg(mode)
        .arg(directory)
        .stderr(Stdio::piped())
        .spawn()
        .expect("the exerciser is built with the tests")
}

/// Kills `child` and makes sure that it was alive until then.
fn kill(mut child: Child) {
    child.kill().expect("a child of ours can be killed");
    let output = child
        .wait_with_output()
        .expect("a child of ours can be waited for");
    let killed = std::os::unix::process::ExitStatusExt::signal(&output.status) == Some(9);
    assert!(
        killed,
        "it ended by itself with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Starts and kills writers while `watch` looks on.
fn kill_writers(mode: &str, directory: &Path, mut watch: Watch) {
    let mut random = seed();
    let begun = Instant::now();
    let mut kills = 0;
    let mut lives_that_wrote = 0;
    // How long a life may last. Grows on a loaded machine, where a process takes long to start.
    let mut span = SHORTEST_SPAN_US;
    while (kills < KILLS || watch.repairs == 0) && begun.elapsed() < PATIENCE {
        let before = watch.number();
        let child = start(mode, directory);
        // From "not even mapped yet" to "hundreds of batches in".
        let until = Instant::now() + Duration::from_micros(random.random_range(0..span));
        loop {
            watch
                .look()
                .unwrap_or_else(|seen| panic!("before kill {kills}: {seen}"));
            if Instant::now() >= until {
                break;
            }
        }
        kill(child);
        watch
            .look()
            .unwrap_or_else(|seen| panic!("after kill {kills}: {seen}"));
        let wrote = watch.number() > before;
        lives_that_wrote += u32::from(wrote);
        span = if wrote { span * 9 / 10 } else { span * 5 / 4 };
        span = span.clamp(SHORTEST_SPAN_US, LONGEST_SPAN_US);
        kills += 1;
    }
    eprintln!(
        "{kills} writers killed in {:?}, {lives_that_wrote} of them had written, {} died inside a \
         batch; {} whole snapshots, {} times the writer was faster",
        begun.elapsed(),
        watch.repairs,
        watch.whole,
        watch.busy
    );
    assert!(kills >= ENOUGH, "only {kills} kills in {PATIENCE:?}");
    assert!(
        lives_that_wrote > kills / 10,
        "most writers were killed before they wrote"
    );
    assert!(
        watch.repairs > 0,
        "no kill hit the inside of a batch: the test proved nothing"
    );
}

#[test]
fn a_writer_of_the_desired_region_may_be_killed_at_any_point() {
    let directory = directory();
    kill_writers(
        "write-desired",
        directory.path(),
        Watch::desired(directory.path()),
    );
    // And the region is still good for a writer and its rows for a reader.
    let writer = DesiredWriter::open(directory.path(), regions::SIZES).unwrap();
    assert_eq!(writer.snapshot().unwrap().invalid_rows, 0);
}

#[test]
fn a_writer_of_the_observed_region_may_be_killed_at_any_point() {
    let directory = directory();
    kill_writers(
        "write-observed",
        directory.path(),
        Watch::observed(directory.path()),
    );
}

#[test]
fn readers_may_be_killed_at_any_point_and_the_writer_never_notices() {
    let (control, dataplane) = (directory(), directory());
    let mut desired = DesiredWriter::open(control.path(), regions::SIZES).unwrap();
    let mut observed = ObservedWriter::open(dataplane.path(), regions::SIZES).unwrap();
    let mut watches = [
        Watch::desired(control.path()),
        Watch::observed(dataplane.path()),
    ];
    let mut random = seed();
    let begun = Instant::now();
    let (mut kills, mut number) = (0, 0u64);
    while kills < KILLS && begun.elapsed() < PATIENCE {
        let child = if kills % 2 == 0 {
            start("read-desired", control.path())
        } else {
            start("read-observed", dataplane.path())
        };
        let until =
            Instant::now() + Duration::from_micros(random.random_range(0..SHORTEST_SPAN_US));
        while Instant::now() < until {
            number += 1;
            desired
                .batch(|batch| regions::fill_desired(batch, number, 0))
                .unwrap();
            observed
                .batch(|batch| regions::fill_observed(batch, number, 0))
                .unwrap();
        }
        kill(child);
        for watch in &mut watches {
            watch
                .look()
                .unwrap_or_else(|seen| panic!("after kill {kills}: {seen}"));
            assert_eq!(watch.number(), number);
        }
        kills += 1;
    }
    eprintln!(
        "{kills} readers killed in {:?} during {number} batches",
        begun.elapsed()
    );
    assert!(kills >= ENOUGH, "only {kills} kills in {PATIENCE:?}");
}

#[test]
fn a_second_writer_names_the_first_and_exits() {
    let directory = directory();
    let mut reader = DesiredReader::at(directory.path());
    let first = start("write-desired", directory.path());
    let deadline = Instant::now() + Duration::from_secs(10);
    while reader.snapshot().map_or(0, |snapshot| snapshot.committed.0) == 0 {
        assert!(Instant::now() < deadline, "the first writer never wrote");
    }
    let second = start("write-desired", directory.path())
        .wait_with_output()
        .unwrap();
    assert_eq!(second.status.code(), Some(2));
    let words = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(
        words.contains(&format!("process {}", first.id())),
        "{words}"
    );
    kill(first);
    // The lock died with its holder.
    DesiredWriter::open(directory.path(), regions::SIZES).unwrap();
}
