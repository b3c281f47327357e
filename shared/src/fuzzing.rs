//! Regions made of arbitrary bytes, for the fuzz target `region_reader` and the property test below.
//!
//! In: bytes. Out: nothing, or a panic that is a defect. Invariant checked: readers and starting
//! writers take any bytes without a panic or an endless loop, and never answer more rows than the
//! region has.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::Sizes;
use crate::desired::{ContainerRow, DesiredReader, DesiredWriter, PortKey, PortRow, Protocol};
use crate::ids::{ContainerId, KernelId};
use crate::observed::{
    AcceleratorKind, AcceleratorRow, ContainerSample, NodeSample, ObservedReader, ObservedWriter,
    PortState, PortStatus, ProcessSample, Processes,
};

/// Small, so that most bytes hit something.
const SIZES: Sizes = Sizes {
    ports: 3,
    containers: 2,
    accelerators: 2,
    processes: 3,
};

/// A directory on tmpfs with two good regions, to be damaged again and again.
#[derive(Debug)]
pub struct DamagedRegions {
    directory: PathBuf,
    good: [(&'static str, Vec<u8>); 2],
}

impl DamagedRegions {
    /// Makes the directory and the good regions.
    pub fn create() -> io::Result<Self> {
        let directory = Path::new("/dev/shm").join(format!(
            "bai-fuzz-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let mut good = [("desired", Vec::new()), ("observed", Vec::new())];
        for (name, bytes) in &mut good {
            let home = directory.join(*name);
            std::fs::create_dir_all(&home)?;
            write_good(&home, name).map_err(io::Error::other)?;
            *bytes = std::fs::read(home.join(*name))?;
        }
        Ok(Self { directory, good })
    }

    /// Reads regions damaged by `data`. The first byte chooses how: bit 0 the region, bit 1 whether
    /// `data` is the whole file or a list of patches, bit 2 whether a writer starts on it as well. A
    /// patch is a 16-bit word index, a length, and that many bytes.
    pub fn read(&self, data: &[u8]) {
        let Some((&how, data)) = data.split_first() else {
            return;
        };
        let (name, good) = &self.good[usize::from(how & 1)];
        let mut bytes;
        if how & 2 == 0 {
            bytes = good.clone();
            patch(&mut bytes, data);
        } else {
            bytes = data.to_vec();
        }
        let home = self.directory.join(name);
        let path = home.join(name);
        let made = File::create(&path).and_then(|file| file.write_all_at(&bytes, 0));
        made.expect("a file on tmpfs can be written");
        if *name == "desired" {
            read_desired(&home);
        } else {
            read_observed(&home);
        }
        if how & 4 != 0 {
            start_writer(&home, name);
            // What the writer leaves behind must be good again for every reader.
            if *name == "desired" {
                let snapshot = DesiredReader::at(&home)
                    .snapshot()
                    .expect("a repaired region");
                assert_eq!(snapshot.invalid_rows, 0);
            } else {
                let snapshot = ObservedReader::at(&home)
                    .snapshot()
                    .expect("a repaired region");
                assert_eq!(snapshot.invalid_rows, 0);
            }
        }
    }
}

impl Drop for DamagedRegions {
    fn drop(&mut self) {
        // Best effort: it is our own directory on tmpfs.
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn patch(bytes: &mut [u8], mut patches: &[u8]) {
    while let [low, high, length, rest @ ..] = patches {
        let start = usize::from(u16::from_le_bytes([*low, *high])) * 8 % bytes.len();
        let (new, others) = rest.split_at(rest.len().min(usize::from(*length)));
        for (byte, new) in bytes[start..].iter_mut().zip(new) {
            *byte = *new;
        }
        patches = others;
    }
}

fn write_good(home: &Path, name: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let key = PortKey {
        protocol: Protocol::Tcp,
        host_port: 30_000,
    };
    let (kernel, container) = (KernelId([1; 16]), ContainerId([2; 32]));
    if name == "desired" {
        let mut writer = DesiredWriter::open(home, SIZES)?;
        for _ in 0..2 {
            writer.batch(|batch| {
                let target = std::net::Ipv4Addr::LOCALHOST.into();
                batch.put_port(PortRow::new(key, kernel, container, target, 80));
                batch.put_container(ContainerRow {
                    container_id: container,
                    ..ContainerRow::default()
                });
                batch.set_node(crate::desired::NodeRow::default());
            })?;
        }
    } else {
        let mut writer = ObservedWriter::open(home, SIZES)?;
        for tick in 0..2 {
            let region = writer.region_id();
            writer.batch(|batch| {
                batch.put_port(PortStatus::new(key, kernel, region, PortState::Serving));
                batch.put_container(ContainerSample {
                    container_id: container,
                    ..ContainerSample::default()
                });
                batch.put_accelerator(accelerator());
                batch.set_node(NodeSample::default());
                batch.set_processes(Processes {
                    tick,
                    list: vec![ProcessSample::default(); 2],
                    ..Processes::default()
                });
            })?;
        }
    }
    Ok(())
}

fn accelerator() -> AcceleratorRow {
    AcceleratorRow {
        model: "mock".to_owned(),
        ..AcceleratorRow::new(AcceleratorKind::Cuda, 0, "mock")
    }
}

fn read_desired(home: &Path) {
    let mut reader = DesiredReader::at(home);
    // An error is a good answer; a panic is not.
    if let Ok(snapshot) = reader.snapshot() {
        let sizes = reader.sizes().expect("a snapshot was just made");
        assert!(snapshot.ports.len() + snapshot.removed_ports.len() <= sizes.ports as usize);
        assert!(snapshot.containers.len() <= sizes.containers as usize);
        assert!(
            snapshot
                .ports
                .is_sorted_by(|one, other| one.key() < other.key())
        );
        let _ = (reader.snapshot(), reader.writer());
    }
}

fn read_observed(home: &Path) {
    let mut reader = ObservedReader::at(home);
    if let Ok(snapshot) = reader.snapshot() {
        let sizes = reader.sizes().expect("a snapshot was just made");
        assert!(snapshot.ports.len() <= sizes.ports as usize);
        assert!(snapshot.containers.len() <= sizes.containers as usize);
    }
    if let Ok(processes) = reader.processes() {
        let room = reader.sizes().map_or(0, |sizes| sizes.processes as usize);
        assert!(processes.list.len() <= room);
    }
    let _ = reader.applied();
}

fn start_writer(home: &Path, name: &str) {
    // Only a file that is there is taken over; a file cut short must not be.
    let path = home.join(name);
    let length = OpenOptions::new()
        .read(true)
        .open(&path)
        .and_then(|file| file.metadata());
    assert!(length.is_ok());
    if name == "desired" {
        let mut writer = DesiredWriter::open(home, SIZES).expect("any bytes can be taken over");
        let before = writer.committed();
        let target = std::net::Ipv4Addr::LOCALHOST.into();
        let key = PortKey {
            protocol: Protocol::Udp,
            host_port: 9,
        };
        let row = PortRow::new(key, KernelId([3; 16]), ContainerId([4; 32]), target, 9);
        // All rows may be in use; that is an answer too.
        if let Ok(generation) = writer.batch(|batch| batch.put_port(row)) {
            assert!(generation > before);
            let snapshot = writer.snapshot().expect("the writer's own region");
            assert!(snapshot.ports.iter().any(|row| row.key() == key));
        }
    } else {
        let mut writer = ObservedWriter::open(home, SIZES).expect("any bytes can be taken over");
        let before = writer.committed();
        let after = writer.batch(|batch| batch.set_node(NodeSample::default()));
        assert!(after.expect("a table of one row is never full") > before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RegionKind;
    use proptest::prelude::*;

    fn patches() -> impl Strategy<Value = Vec<u8>> {
        // Any word of the file, with the values that break things more often than chance would.
        let value = prop_oneof![
            Just(0u64),
            Just(1),
            Just(u64::MAX),
            Just(u64::MAX / 2),
            Just(u64::from(u32::MAX)),
            any::<u64>(),
        ];
        let one = (any::<u16>(), value).prop_map(|(word, value)| {
            let mut bytes = word.to_le_bytes().to_vec();
            bytes.push(8);
            bytes.extend(value.to_le_bytes());
            bytes
        });
        // One in four aims at the header.
        let header = (0u16..16, any::<u64>()).prop_map(|(word, value)| {
            let mut bytes = word.to_le_bytes().to_vec();
            bytes.push(8);
            bytes.extend(value.to_le_bytes());
            bytes
        });
        prop::collection::vec(prop_oneof![3 => one, 1 => header], 1..40)
            .prop_map(|patches| patches.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

        #[test]
        fn a_damaged_region_is_survived(how in 0u8..2, writer in any::<bool>(), data in patches()) {
            let regions = DamagedRegions::create().unwrap();
            let mut input = vec![how | (u8::from(writer) << 2)];
            input.extend(data);
            regions.read(&input);
        }

        #[test]
        fn a_file_of_any_bytes_is_survived(
            how in 0u8..2,
            data in prop::collection::vec(any::<u8>(), 0..9_000),
        ) {
            let regions = DamagedRegions::create().unwrap();
            let mut input = vec![how | 2 | 4];
            input.extend(data);
            regions.read(&input);
        }
    }

    #[test]
    fn every_single_word_may_be_anything() {
        let regions = DamagedRegions::create().unwrap();
        for region in [0u8, 1] {
            let words = regions.good[usize::from(region)].1.len() / 8;
            // The node's lists are a thousand words of one kind; some of them will do.
            let tables = RegionKind::Observed.tables(SIZES);
            let node = tables[crate::observed::table::NODE];
            let lists = node.offset_words + 64..node.end_words();
            for word in 0..words {
                if region == 1 && lists.contains(&word) && word % 16 != 0 {
                    continue;
                }
                for value in [0u64, 1, 2, u64::MAX / 2, u64::MAX] {
                    let mut input = vec![region | 4];
                    input.extend(u16::try_from(word).unwrap().to_le_bytes());
                    input.push(8);
                    input.extend(value.to_le_bytes());
                    regions.read(&input);
                }
            }
        }
    }

    #[test]
    fn both_stamps_of_a_cell_may_be_anything() {
        let regions = DamagedRegions::create().unwrap();
        for (region, kind) in [(0, RegionKind::Desired), (1, RegionKind::Observed)] {
            for table in kind.tables(SIZES) {
                let first = table.offset_words;
                let mut input = vec![region | 4];
                for stamp in [first, first + 1 + table.payload_words] {
                    input.extend(u16::try_from(stamp).unwrap().to_le_bytes());
                    input.push(8);
                    input.extend([0xff; 8]);
                }
                regions.read(&input);
            }
        }
    }

    #[test]
    fn a_file_cut_anywhere_is_survived() {
        let regions = DamagedRegions::create().unwrap();
        for region in [0u8, 1] {
            let good = regions.good[usize::from(region)].1.clone();
            for length in (0..good.len()).step_by(97) {
                let mut input = vec![region | 2 | 4];
                input.extend(&good[..length]);
                regions.read(&input);
            }
        }
    }
}
