//! The link over regions of its own, with a relay and without the kernel path.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;

use shared::Sizes;
use shared::desired::DesiredWriter;
use shared::doorbell::Ringer;
use shared::observed::{ObservedReader, ObservedWriter};
use shared::run_dir::RunDir;

use super::*;
use crate::accelerator::Accelerators;
use crate::forward::relay;

/// A link, and the ends of both regions that are control's.
struct Place {
    link: Link,
    desired: DesiredWriter,
    observed: PathBuf,
    _base: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let base = tempfile::tempdir_in("/dev/shm").unwrap();
        let run_dir = RunDir::choose(Some(base.path()), "i-link").unwrap();
        run_dir.create_control().unwrap();
        let observed = run_dir.create_dataplane().unwrap();
        let board = Board::new(
            ObservedWriter::open(&observed, Sizes::default()).unwrap(),
            Ringer::of(run_dir.control()).unwrap(),
            Accelerators::none(),
        );
        let defaults = Defaults {
            allowed: Vec::new(),
            max_sessions: 0,
            total_sessions: 0,
            idle_timeout: Duration::ZERO,
            connect_timeout: Duration::from_secs(5),
            drain: Duration::ZERO,
            sample_interval: Duration::from_secs(1),
        };
        Self {
            desired: DesiredWriter::open(run_dir.control(), Sizes::default()).unwrap(),
            link: Link::new(
                DesiredReader::at(run_dir.control()),
                Relay::start(relay::Options::default()).unwrap(),
                board,
                LinkLookup::open().unwrap(),
                defaults,
                1024,
                Vec::new(),
            ),
            observed,
            _base: base,
        }
    }

    fn status(&self, key: PortKey) -> PortStatus {
        let mut reader = ObservedReader::at(&self.observed);
        let ports = &reader.snapshot().unwrap().ports;
        ports.iter().find(|it| it.key == key).unwrap().clone()
    }
}

/// What comes up after another process has taken the place is that one's.
#[test]
fn a_link_whose_place_another_has_does_nothing_more() {
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let target = server.local_addr().unwrap();
    let (kernel, container) = (KernelId([7; 16]), ContainerId([9; 32]));
    let mut place = Place::new();
    let put = |place: &mut Place| {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let key = PortKey {
            protocol: Protocol::Tcp,
            host_port: address.port(),
        };
        let mut row = PortRow::new(key, kernel, container, target.ip(), target.port());
        row.bind = address.ip();
        place.desired.batch(|batch| batch.put_port(row)).unwrap();
        address
    };
    let now = Instant::now();
    let address = put(&mut place);
    place.link.look(now).expect("news");
    std::fs::remove_file(place.observed.join("lock")).unwrap();
    let _other = shared::lock::WriterLock::acquire(&place.observed).unwrap();
    let late = put(&mut place);
    assert!(place.link.look(now).is_none());
    TcpStream::connect(late).expect_err("nobody listens");
    let _client = TcpStream::connect(address).expect("what was served is served");
    place.link.board.is_writer().expect_err("it is another's");
}

#[test]
fn a_port_whose_listener_cannot_be_watched_is_refused_and_tried_again() {
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let key = PortKey {
        protocol: Protocol::Tcp,
        host_port: address.port(),
    };
    let target = server.local_addr().unwrap();
    let (kernel, container) = (KernelId([7; 16]), ContainerId([9; 32]));
    let mut row = PortRow::new(key, kernel, container, target.ip(), target.port());
    row.bind = address.ip();
    let mut place = Place::new();
    place.desired.batch(|batch| batch.put_port(row)).unwrap();
    let now = Instant::now();
    place.link.look(now).expect("news");
    let before = place.status(key);
    assert_eq!(before.state, PortState::Serving, "{}", before.reason);

    // As a thread of the relay does with a listener that epoll does not take.
    let port = place.link.running[&key].port.clone().expect("a listener");
    place.link.relay.close(&[Arc::clone(&port)]);
    port.set_unwatched();
    place.link.tick(now);
    let refused = place.status(key);
    let way = (refused.state, refused.path);
    assert_eq!(way, (PortState::Refused, ForwardPath::None));
    assert!(refused.reason.contains("watched"), "{}", refused.reason);
    assert_eq!(refused.acknowledged, before.acknowledged);
    TcpStream::connect(address).expect_err("nobody listens");
    place.link.tick(now + RETRY_INTERVAL / 2);
    assert_eq!(place.status(key).state, PortState::Refused, "not at once");

    place.link.tick(now + RETRY_INTERVAL);
    let again = place.status(key);
    let way = (again.state, again.path, again.reason.as_str());
    assert_eq!(way, (PortState::Serving, ForwardPath::Relay, ""));
    let _client = TcpStream::connect(address).expect("a listener");
    server.accept().expect("led to the server");
}

#[test]
fn a_refused_port_is_not_opened_while_the_process_stops() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = taken.local_addr().unwrap();
    let key = PortKey {
        protocol: Protocol::Tcp,
        host_port: address.port(),
    };
    let (kernel, container) = (KernelId([7; 16]), ContainerId([9; 32]));
    let mut row = PortRow::new(key, kernel, container, address.ip(), 1);
    row.bind = address.ip();
    let mut place = Place::new();
    place.desired.batch(|batch| batch.put_port(row)).unwrap();
    let now = Instant::now();
    place.link.look(now).expect("news");
    assert_eq!(place.status(key).state, PortState::Refused);
    place.link.stop_accepting();
    drop(taken);
    place.link.tick(now + RETRY_INTERVAL);
    TcpStream::connect(address).expect_err("nobody listens");
    assert_ne!(place.status(key).state, PortState::Serving);
}

/// As after an upgrade with another layout of the regions, while control still waits for the cluster.
#[test]
fn nothing_is_given_up_before_a_region_says_anything() {
    let mut place = Place::new();
    let now = Instant::now();
    place.link.look(now).expect("a region that is empty");
    assert_eq!(place.link.unclaimed_at, None, "nobody could claim anything");
    let row = ContainerRow {
        container_id: ContainerId([9; 32]),
        ..ContainerRow::default()
    };
    let put = |place: &mut Place| {
        let row = row.clone();
        place.desired.batch(|batch| batch.put_container(row))
    };
    put(&mut place).unwrap();
    let later = now + 10 * ORPHAN_GRACE;
    place.link.look(later).expect("news");
    let due = place
        .link
        .unclaimed_at
        .expect("there is something to claim");
    assert_eq!(due, later + ORPHAN_GRACE);
    // Once in a life.
    place.link.unclaimed_at = None;
    put(&mut place).unwrap();
    place.link.look(later).expect("news");
    assert_eq!(place.link.unclaimed_at, None);

    // Another region that is empty: what was known of containers is.
    let Place {
        mut link,
        desired,
        _base,
        ..
    } = place;
    let control = desired.directory().to_owned();
    std::fs::remove_file(control.join("desired")).unwrap();
    drop(desired);
    let _silent = DesiredWriter::open(&control, Sizes::default()).unwrap();
    link.look(later).expect("news");
    assert_eq!(link.containers.len(), 1);
}
