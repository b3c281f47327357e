//! A region over the lives of its writers, and what others do to its files.

use super::*;

#[test]
fn another_layout_means_a_new_region_that_readers_find() {
    let directory = directory();
    let mut writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    writer.batch(|batch| batch.put_port(port(1))).unwrap();
    let mut reader = DesiredReader::open(directory.path()).unwrap();
    let before = reader.snapshot().unwrap();
    drop(writer);
    // What a build of another layout leaves behind: the same name, another hash.
    let path = directory.path().join("desired");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0xEE; 8], 16).unwrap();
    // A new reader refuses it with words; the old one keeps its mapping and its copy.
    let refused = DesiredReader::open(directory.path()).unwrap_err();
    assert!(matches!(refused, ReadError::Unreadable { .. }), "{refused}");
    assert!(refused.to_string().contains("layout"), "{refused}");

    let mut writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    assert_eq!(writer.start(), Start::Fresh);
    let mut retired = [0u8; 8];
    // The old file has no name any more, but a descriptor still leads to it.
    let old = std::fs::File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    old.read_exact_at(&mut retired, 24).unwrap();
    assert_eq!(u64::from_le_bytes(retired), 1);
    let after = reader.snapshot().unwrap();
    assert_ne!(after.region_id, before.region_id);
    assert_eq!(after.committed, Generation(0));
    writer.batch(|batch| batch.put_port(port(2))).unwrap();
    assert_eq!(reader.snapshot().unwrap().ports.len(), 1);
}

#[test]
fn a_second_writer_is_told_who_the_first_is() {
    let directory = directory();
    let writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    let err = DesiredWriter::open(directory.path(), SIZES).unwrap_err();
    assert!(matches!(err, OpenError::Lock { .. }));
    let cause = std::error::Error::source(&err).unwrap().to_string();
    assert!(cause.contains(&std::process::id().to_string()), "{cause}");
    drop(writer);
    DesiredWriter::open(directory.path(), SIZES).unwrap();
}

#[test]
fn a_region_off_tmpfs_or_of_impossible_size_is_refused() {
    let on_disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let err = DesiredWriter::open(on_disk.path(), SIZES).unwrap_err();
    assert!(matches!(err, OpenError::NotTmpfs(_)), "{err}");
    let directory = directory();
    let err = DesiredWriter::open(directory.path(), Sizes { ports: 0, ..SIZES }).unwrap_err();
    assert!(matches!(err, OpenError::Sizes { .. }), "{err}");
}

#[test]
fn files_are_for_the_writer_and_its_group() {
    use std::os::unix::fs::MetadataExt;
    let directory = directory();
    let _writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    let status = std::fs::metadata(directory.path().join("desired")).unwrap();
    assert_eq!(status.mode() & 0o7777, 0o640);
    // Allocated up front: no hole that could fail later.
    assert!(status.blocks() * 512 >= status.len());
}

#[test]
fn a_missing_region_is_said_to_be_missing() {
    let directory = directory();
    assert!(matches!(
        DesiredReader::open(directory.path()),
        Err(ReadError::Missing { .. })
    ));
    let mut reader = ObservedReader::at(directory.path());
    assert!(matches!(reader.snapshot(), Err(ReadError::Missing { .. })));
    let _writer = ObservedWriter::open(directory.path(), SIZES).unwrap();
    assert!(reader.snapshot().is_ok());
}

#[test]
fn a_region_made_shorter_while_it_is_read_is_an_error_and_never_fewer_rows() {
    const PORTS: u16 = 900;
    const LIMIT: std::time::Duration = std::time::Duration::from_secs(40);
    let sizes = Sizes {
        ports: 1024,
        ..SIZES
    };
    let directory = directory();
    let place = directory.path().join("desired");
    let mut writer = DesiredWriter::open(directory.path(), sizes).unwrap();
    writer
        .batch(|batch| (0..PORTS).for_each(|number| batch.put_port(port(30_000 + number))))
        .unwrap();
    drop(writer);
    let whole = std::fs::read(&place).unwrap();
    let (mut gone, mut caught) = (0, 0);
    let begun = std::time::Instant::now();
    let mut round = 0_u64;
    // Most rounds miss the time of the copy.
    while caught < 5 && begun.elapsed() < LIMIT {
        round += 1;
        let fresh = directory.path().join("fresh");
        std::fs::write(&fresh, &whole).unwrap();
        std::fs::rename(&fresh, &place).unwrap();
        let whole_rows = DesiredReader::at(directory.path()).snapshot().unwrap();
        assert_eq!(whole_rows.ports.len(), usize::from(PORTS));
        let file = std::fs::File::options().write(true).open(&place).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(std::time::Duration::from_micros(round * 37 % 2000));
                let length = (whole.len() as u64).min(round * 4096 % 50_000);
                file.set_len(length).unwrap();
            });
            for _ in 0..10 {
                match DesiredReader::at(directory.path()).snapshot() {
                    Ok(snapshot) => {
                        assert_eq!(snapshot.ports.len(), usize::from(PORTS));
                    }
                    Err(err) if err.to_string().contains("while it was read") => caught += 1,
                    Err(err) => {
                        assert!(matches!(err, ReadError::Unreadable { .. }), "{err}");
                        gone += 1;
                    }
                }
            }
        });
    }
    assert!(caught >= 5, "{caught} caught, {gone} gone");
    // One that had a good copy keeps it, and finds the next file.
    std::fs::write(&place, &whole).unwrap();
    let mut reader = DesiredReader::open(directory.path()).unwrap();
    let rows = reader.snapshot().unwrap();
    let file = std::fs::File::options().write(true).open(&place).unwrap();
    file.set_len(0).unwrap();
    assert!(reader.snapshot().is_err());
    assert_eq!(reader.last(), Some(&rows));
    let writer = DesiredWriter::open(directory.path(), sizes).unwrap();
    assert_eq!(reader.snapshot().unwrap().region_id, writer.region_id());
}

#[test]
fn a_writer_whose_region_is_damaged_goes_on_and_puts_the_header_right() {
    let directory = directory();
    let path = directory.path().join("desired");
    let mut writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    writer.batch(|batch| batch.put_port(port(1))).unwrap();
    let mut reader = DesiredReader::open(directory.path()).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    for (byte, number) in [0x00, 0xff, 0x80].into_iter().zip(2..) {
        file.write_all_at(&[byte; 512], 0).unwrap();
        let generation = writer.batch(|batch| batch.put_port(port(number))).unwrap();
        assert_eq!(generation, writer.committed());
        assert!(!writer.heartbeat().unwrap());
        let snapshot = reader.snapshot().unwrap();
        assert_eq!(snapshot.committed, generation);
        assert_eq!(snapshot.ports.len(), usize::from(number));
        assert_eq!(*snapshot, writer.snapshot().unwrap());
        assert_eq!(reader.writer().unwrap().epoch, writer.epoch());
    }
}

#[test]
fn a_writer_whose_lock_was_taken_away_takes_it_again_or_leaves_all_to_the_next() {
    let directory = directory();
    let path = directory.path().join("desired");
    let take_all = || {
        for name in ["lock", "desired"] {
            std::fs::remove_file(directory.path().join(name)).unwrap();
        }
    };
    let mut first = DesiredWriter::open(directory.path(), SIZES).unwrap();
    take_all();
    assert!(first.heartbeat().unwrap());
    assert!(DesiredWriter::open(directory.path(), SIZES).is_err());
    take_all();
    let mut second = DesiredWriter::open(directory.path(), SIZES).unwrap();
    let inode = || std::fs::metadata(&path).unwrap().ino();
    let made = inode();
    let refused = first.heartbeat().unwrap_err();
    assert!(matches!(refused, OpenError::LockLost(_)), "{refused}");
    assert!(!second.heartbeat().unwrap());
    assert_eq!(inode(), made);
}

/// With the lock's name alone gone, the next writer takes the very region over that the first one has mapped.
#[test]
fn a_writer_whose_lock_is_anothers_writes_nothing_more() {
    let directory = directory();
    let lock = directory.path().join("lock");
    let mut first = DesiredWriter::open(directory.path(), SIZES).unwrap();
    first.batch(|batch| batch.put_port(port(1))).unwrap();
    std::fs::remove_file(&lock).unwrap();
    let mut second = DesiredWriter::open(directory.path(), SIZES).unwrap();
    assert_eq!(second.region_id(), first.region_id());
    second.batch(|batch| batch.put_port(port(2))).unwrap();
    let mut reader = DesiredReader::open(directory.path()).unwrap();
    // Before any sign of life too.
    let refused = first.batch(|batch| batch.remove_port(port(1).key()));
    assert!(
        matches!(refused, Err(BatchError::LockLost(_))),
        "{refused:?}"
    );
    let refused = first.heartbeat().unwrap_err();
    let words = refused.to_string();
    assert!(matches!(refused, OpenError::LockLost(_)), "{words}");
    assert!(
        words.contains(&format!("process {}", std::process::id())),
        "{words}"
    );
    let found = reader.snapshot().unwrap();
    assert_eq!(found.committed, second.committed());
    assert_eq!(found.ports.len(), 2);
    assert_eq!(reader.writer().unwrap().epoch, second.epoch());
    // Nor when the other is gone: what it has written the first one does not know.
    drop(second);
    assert!(matches!(first.heartbeat(), Err(OpenError::LockLost(_))));
    assert!(first.batch(|batch| batch.put_port(port(3))).is_err());
}

#[test]
fn a_writer_does_not_go_on_after_another_that_has_come_and_gone() {
    let directory = directory();
    let lock = directory.path().join("lock");
    let mut first = ObservedWriter::open(directory.path(), SIZES).unwrap();
    std::fs::remove_file(&lock).unwrap();
    let second = ObservedWriter::open(directory.path(), SIZES).unwrap();
    let epoch = second.epoch();
    drop(second);
    let refused = first.heartbeat().unwrap_err();
    assert!(matches!(refused, OpenError::LockLost(_)), "{refused}");
    assert!(
        first
            .batch(|batch| batch.put_container(sample(1, 1)))
            .is_err()
    );
    let mut reader = ObservedReader::open(directory.path()).unwrap();
    assert_eq!(reader.writer().unwrap().epoch, epoch);
    // The next one may have it.
    assert!(ObservedWriter::open(directory.path(), SIZES).is_ok());
}

#[test]
fn a_region_whose_name_was_taken_away_is_there_again_after_a_sign_of_life() {
    let directory = directory();
    let path = directory.path().join("desired");
    let mut writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    writer.batch(|batch| batch.put_port(port(1))).unwrap();
    let mut reader = DesiredReader::open(directory.path()).unwrap();
    let before = reader.snapshot().unwrap();
    type Take = fn(&std::path::Path);
    let takes: [(&str, Take); 4] = [
        ("nothing", |_| {}),
        ("a link", |path| {
            std::os::unix::fs::symlink("/dev/null", path).unwrap();
        }),
        ("a pipe", |path| {
            let mode = nix::sys::stat::Mode::S_IRUSR;
            nix::unistd::mkfifo(path, mode).unwrap();
        }),
        ("another file", |path| std::fs::write(path, "x").unwrap()),
    ];
    for (what, take) in takes {
        std::fs::remove_file(&path).unwrap();
        take(&path);
        assert!(reader.snapshot().is_err(), "{what}");
        assert!(writer.heartbeat().unwrap(), "{what}");
        assert!(!writer.heartbeat().unwrap(), "{what}");
        let after = reader.snapshot().unwrap();
        assert_eq!(after.region_id, before.region_id);
        assert_eq!(after.ports.len(), before.ports.len(), "{what}");
        let generation = writer.batch(|batch| batch.put_port(port(1))).unwrap();
        assert_eq!(reader.snapshot().unwrap().committed, generation, "{what}");
        writer
            .batch(|batch| batch.put_container(container(1)))
            .unwrap();
        let after = reader.snapshot().unwrap();
        assert_eq!((after.ports.len(), after.containers.len()), (1, 1));
    }
    // A starting writer puts a region in the place of a link too.
    drop(writer);
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/null", &path).unwrap();
    let mut writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    assert_eq!(writer.start(), Start::Fresh);
    // A directory is nobody's to remove: that is said.
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert!(matches!(writer.heartbeat(), Err(OpenError::File { .. })));
    std::fs::remove_dir(&path).unwrap();
    assert!(writer.heartbeat().unwrap());
    assert!(reader.snapshot().is_ok());
}
