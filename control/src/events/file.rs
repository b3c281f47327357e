//! The events file: one JSON object per line.
//!
//! In: occurrences through a bounded queue. Out: `events.jsonl`, and the previous one as
//! `events.jsonl.1` once the file has grown past its limit. Invariant: emitting never waits for
//! the disk; what the queue could not take is counted and logged.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use thiserror::Error;

use super::{EventRecord, Sink};

/// Lines waiting for the disk. A create makes about five.
const QUEUE: usize = 1024;
/// Size at which the file is put aside.
const FILE_LIMIT: u64 = 16 << 20;

/// The file could not be opened.
#[derive(Debug, Error)]
#[error(
    "cannot open the events file {path}; see that it is a file this user may write, or move it away"
)]
pub struct FileSinkError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Writes events to a file from its own thread.
#[derive(Debug)]
pub struct FileSink {
    queue: Mutex<Option<SyncSender<String>>>,
    left_out: Arc<AtomicU64>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl FileSink {
    /// Appends to `path`, which is created with mode 0600.
    ///
    /// # Errors
    /// The file cannot be made or opened.
    pub fn open(path: &Path) -> Result<FileSink, FileSinkError> {
        FileSink::with_limit(path, FILE_LIMIT)
    }

    fn with_limit(path: &Path, limit: u64) -> Result<FileSink, FileSinkError> {
        let failed = |source| FileSinkError {
            path: path.to_owned(),
            source,
        };
        let file = open(path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        let (queue, lines) = sync_channel(QUEUE);
        let path = path.to_owned();
        let writer = std::thread::Builder::new()
            .name("events-file".into())
            .spawn(move || {
                Writer {
                    path,
                    file: BufWriter::new(file),
                    size,
                    limit,
                }
                .run(&lines);
            })
            .map_err(|source| FileSinkError {
                path: PathBuf::from("(thread)"),
                source,
            })?;
        Ok(FileSink {
            queue: Mutex::new(Some(queue)),
            left_out: Arc::default(),
            writer: Mutex::new(Some(writer)),
        })
    }
}

impl Sink for FileSink {
    fn accept(&self, occurrence: &EventRecord) {
        let line = occurrence.to_json().to_string();
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let full = match &*queue {
            Some(queue) => queue.try_send(line).is_err(),
            None => true,
        };
        if full {
            let count = self.left_out.fetch_add(1, Ordering::Relaxed) + 1;
            // One line per power of two: a stuck disk cannot flood the log.
            if count.is_power_of_two() {
                tracing::warn!(count, "events file cannot keep up; events left out of it");
            }
        }
    }
}

impl Drop for FileSink {
    fn drop(&mut self) {
        let queue = self
            .queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(queue);
        let writer = self
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(writer) = writer
            && writer.join().is_err()
        {
            tracing::error!("the events file writer panicked");
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
    size: u64,
    limit: u64,
}

impl Writer {
    fn run(mut self, lines: &Receiver<String>) {
        while let Ok(first) = lines.recv() {
            let result = self.write(&first).and_then(|()| {
                // Take what has gathered meanwhile, then flush once.
                while let Ok(line) = lines.try_recv() {
                    self.write(&line)?;
                }
                self.file.flush()
            });
            if let Err(err) = result {
                tracing::warn!(%err, path = %self.path.display(), "cannot write the events file");
            }
        }
    }

    fn write(&mut self, line: &str) -> io::Result<()> {
        if self.size >= self.limit {
            self.rotate()?;
        }
        self.file.write_all(line.as_bytes())?;
        self.file.write_all(b"\n")?;
        self.size += line.len() as u64 + 1;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.file.flush()?;
        let mut aside = self.path.clone().into_os_string();
        aside.push(".1");
        std::fs::rename(&self.path, aside)?;
        self.file = BufWriter::new(open(&self.path)?);
        self.size = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{Event, Events};

    #[test]
    fn lines_are_whole_and_the_file_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let events = Events::new(4, vec![Box::new(FileSink::with_limit(&path, 200).unwrap())]);
        for _ in 0..6 {
            events.emit(Event::AgentStarted {
                reason: "self-started",
            });
        }
        drop(events);
        let old = std::fs::read_to_string(dir.path().join("events.jsonl.1")).unwrap();
        let new = std::fs::read_to_string(&path).unwrap();
        let seqs: Vec<u64> = old
            .lines()
            .chain(new.lines())
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
            .map(|value| value["seq"].as_u64().unwrap())
            .collect();
        assert_eq!(seqs, (1..=6).collect::<Vec<_>>());
    }
}
