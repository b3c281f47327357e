//! loom's models of the cell: every interleaving and every permitted reordering of a writer and a
//! reader, within loom's bounds. Run by `RUSTFLAGS="--cfg loom" cargo test -p shared --lib --release loom_`.

use loom::sync::Arc;
use loom::thread;

use super::{Cell, ReadOutcome, words_for};
use crate::sync::{AtomicU64, Ordering};

/// Words of a payload: two, so that a torn copy is possible.
const PAYLOAD: usize = 2;

/// A region of some cells and the committed word.
struct Region {
    cells: Vec<Vec<AtomicU64>>,
    committed: AtomicU64,
}

impl Region {
    fn of(cells: usize) -> Arc<Self> {
        let words = || (0..words_for(PAYLOAD)).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self {
            cells: (0..cells).map(|_| words()).collect(),
            committed: AtomicU64::new(0),
        })
    }

    fn cell(&self, index: usize) -> Cell<'_> {
        Cell::over(&self.cells[index], PAYLOAD).expect("the words of one cell")
    }

    fn committed(&self) -> u64 {
        self.committed.load(Ordering::Acquire)
    }

    /// Writes every cell under `generation`; each payload repeats the generation.
    fn write_all(&self, generation: u64) {
        let committed = self.committed();
        for index in 0..self.cells.len() {
            self.cell(index)
                .write(committed, generation, [generation; PAYLOAD].into_iter());
        }
    }

    fn commit(&self, generation: u64) {
        self.committed.store(generation, Ordering::Release);
    }

    /// What a reader sees of one cell.
    fn read(&self, index: usize, committed: u64) -> (ReadOutcome, [u64; PAYLOAD]) {
        let mut copy = [0; PAYLOAD];
        let outcome = self.cell(index).read(committed, |slot| {
            for (value, word) in copy.iter_mut().zip(slot) {
                *value = word.load(Ordering::Relaxed);
            }
        });
        (outcome, copy)
    }
}

/// Writes while a reader reads. The reader is the thread that is spawned: loom runs the writer first and
/// then moves each load before the stores that it depends on. The other way round it finds nothing to
/// move, because of each word it keeps the last access alone, and a writer loads before it stores.
fn beside(
    region: &Arc<Region>,
    write: impl FnOnce(&Region),
    read: impl FnOnce(&Region) + Send + 'static,
) {
    let reader = {
        let region = Arc::clone(region);
        thread::spawn(move || read(&region))
    };
    write(region);
    reader.join().unwrap();
}

#[test]
fn loom_a_whole_copy_is_of_the_committed_generation() {
    loom::model(|| {
        let region = Region::of(1);
        region.write_all(1);
        region.commit(1);
        beside(
            &region,
            |region| {
                for generation in 2..=3 {
                    region.write_all(generation);
                    region.commit(generation);
                }
            },
            |region| {
                let committed = region.committed();
                match region.read(0, committed) {
                    (ReadOutcome::Empty, _) => panic!("a committed value was lost at {committed}"),
                    (ReadOutcome::Whole(generation), copy) => {
                        assert_eq!(generation, committed);
                        assert_eq!(copy, [generation; PAYLOAD]);
                    }
                    (ReadOutcome::Moved, _) => {}
                }
            },
        );
        assert_eq!(
            region.read(0, region.committed()),
            (ReadOutcome::Whole(3), [3; PAYLOAD])
        );
    });
}

#[test]
fn loom_a_cell_that_was_written_is_not_taken_for_an_older_one() {
    loom::model(|| {
        let region = Region::of(1);
        for generation in 1..=2 {
            region.write_all(generation);
            region.commit(generation);
        }
        beside(
            &region,
            |region| {
                for generation in 3..=4 {
                    region.write_all(generation);
                    region.commit(generation);
                }
            },
            |region| {
                let committed = region.committed();
                if let Some(generation) = region.cell(0).generation(committed) {
                    assert_eq!(generation, committed);
                }
            },
        );
    });
}

#[test]
fn loom_the_first_value_is_seen_whole_or_not_at_all() {
    loom::model(|| {
        let region = Region::of(1);
        beside(
            &region,
            |region| {
                region.write_all(1);
                region.commit(1);
            },
            |region| {
                let committed = region.committed();
                match region.read(0, committed) {
                    (ReadOutcome::Whole(generation), copy) => {
                        assert_eq!((committed, generation, copy), (1, 1, [1; PAYLOAD]));
                    }
                    // Its stamp may be seen before it is committed; that never counts.
                    (ReadOutcome::Empty | ReadOutcome::Moved, _) => assert_eq!(committed, 0),
                }
            },
        );
    });
}

#[test]
fn loom_rows_of_a_batch_become_visible_as_one() {
    loom::model(|| {
        let region = Region::of(2);
        beside(
            &region,
            |region| {
                for generation in 1..=2 {
                    region.write_all(generation);
                    region.commit(generation);
                }
            },
            |region| {
                let committed = region.committed();
                let looks = [region.read(0, committed), region.read(1, committed)];
                for (outcome, copy) in looks {
                    match outcome {
                        ReadOutcome::Empty => assert_eq!(committed, 0),
                        ReadOutcome::Whole(generation) => {
                            assert_eq!((generation, copy), (committed, [committed; PAYLOAD]));
                        }
                        ReadOutcome::Moved => {}
                    }
                }
            },
        );
    });
}

#[test]
fn loom_a_row_left_out_of_a_batch_keeps_its_value() {
    loom::model(|| {
        let region = Region::of(2);
        region.write_all(1);
        region.commit(1);
        beside(
            &region,
            |region| {
                for generation in 2..=3 {
                    region
                        .cell(0)
                        .write(generation - 1, generation, [generation; 2].into_iter());
                    region.commit(generation);
                }
            },
            |region| {
                // The row no batch touches can always be read, whatever happens to its neighbours.
                let committed = region.committed();
                assert_eq!(
                    region.read(1, committed),
                    (ReadOutcome::Whole(1), [1; PAYLOAD])
                );
                if let (ReadOutcome::Whole(generation), copy) = region.read(0, committed) {
                    assert_eq!((generation, copy), (committed, [committed; PAYLOAD]));
                }
            },
        );
    });
}

/// A writer dies after `stored` payload words of generation 2, the next one repairs and goes on.
fn killed_after(stored: usize) {
    loom::model(move || {
        let region = Region::of(1);
        region.write_all(1);
        region.commit(1);
        beside(
            &region,
            |region| {
                region
                    .cell(0)
                    .write(1, 2, [2; PAYLOAD].into_iter().take(stored));
                assert!(region.cell(0).repair(1));
                assert!(!region.cell(0).repair(1));
                region.write_all(3);
                region.commit(3);
            },
            |region| {
                let committed = region.committed();
                match region.read(0, committed) {
                    (ReadOutcome::Whole(generation), copy) => {
                        assert_eq!(generation, committed);
                        assert_eq!(copy, [generation; PAYLOAD]);
                    }
                    // Nothing overwrites the value of generation 1 before 3 is committed.
                    other => panic!("{other:?} at {committed}"),
                }
            },
        );
        assert_eq!(
            region.read(0, region.committed()),
            (ReadOutcome::Whole(3), [3; PAYLOAD])
        );
    });
}

#[test]
fn loom_a_writer_killed_mid_write_leaves_the_last_value_readable() {
    for stored in 0..=PAYLOAD {
        killed_after(stored);
    }
}
