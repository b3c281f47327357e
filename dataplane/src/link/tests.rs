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

/// A port of a container that nobody has to listen at.
fn seen(host_port: u16, container: u8) -> PortRow {
    let key = PortKey {
        protocol: Protocol::Tcp,
        host_port,
    };
    let target = Ipv4Addr::LOCALHOST.into();
    let id = ContainerId([container; 32]);
    PortRow {
        observe_only: true,
        ..PortRow::new(key, KernelId([container; 16]), id, target, 80)
    }
}

fn holder(container: u8, link: u32) -> ContainerRow {
    ContainerRow {
        container_id: ContainerId([container; 32]),
        link_indexes: vec![link],
        ..ContainerRow::default()
    }
}

#[test]
fn only_what_has_changed_is_worked_on_and_all_of_it_now_and_then() {
    let mut place = Place::new();
    let now = Instant::now();
    place
        .desired
        .batch(|batch| {
            for container in 1..=10 {
                batch.put_container(holder(container, container.into()));
                let first = 1000 + u16::from(container) * 10;
                (first..first + 4).for_each(|port| batch.put_port(seen(port, container)));
            }
        })
        .unwrap();
    let all = place.link.look(now).expect("all of it");
    assert!(all.whole && all.rows.ports.len() == 40 && all.rows.containers.len() == 10);
    assert!(place.link.look(now).is_none(), "nothing has changed");

    place
        .desired
        .batch(|batch| {
            batch.put_port(seen(1014, 1));
            batch.remove_port(seen(1020, 2).key());
            batch.put_container(holder(3, 33));
        })
        .unwrap();
    let news = place.link.reader.changes().unwrap().expect("news");
    let rows = &news.rows;
    let read = (
        rows.ports.len(),
        rows.removed_ports.len(),
        rows.containers.len(),
    );
    assert_eq!((news.whole, read), (false, (1, 1, 1)));
    assert_eq!(plan(&place.link.known, &news).len(), 2, "steps");
    place.link.note_containers(&news, now);
    let due = place.link.due();
    let due: Vec<u16> = due.iter().map(|it| it.host_port).collect();
    assert_eq!(due, [1030, 1031, 1032, 1033], "ports of the one container");

    let later = now + LIFT_ALL_INTERVAL;
    place.link.tick(later);
    let all = place.link.look(later).expect("all of it");
    assert!(all.whole && all.rows.ports.len() == 40);
    let status = place.status(seen(1014, 1).key());
    assert_eq!(status.state, PortState::Serving);
}

#[test]
fn a_container_whose_row_makes_no_sense_stays_what_it_was() {
    let mut place = Place::new();
    let now = Instant::now();
    place
        .desired
        .batch(|batch| (1..=2).for_each(|id| batch.put_container(holder(id, id.into()))))
        .unwrap();
    place.link.look(now).expect("news");
    let mut news = DesiredChanges {
        whole: true,
        ..DesiredChanges::default()
    };
    news.rows.committed = Generation(2);
    news.rows.containers = vec![holder(1, 1)];
    news.rows.invalid_rows = 1;
    place.link.note_containers(&news, now);
    assert!(place.link.containers.contains_key(&ContainerId([2; 32])));
    news.rows.invalid_rows = 0;
    place.link.note_containers(&news, now);
    assert!(!place.link.containers.contains_key(&ContainerId([2; 32])));
}

#[test]
fn a_region_begun_anew_has_time_to_name_containers_whose_ports_go_on() {
    let mut place = Place::new();
    let now = Instant::now();
    place
        .desired
        .batch(|batch| {
            (1..=4).for_each(|id| batch.put_container(holder(id, id.into())));
            (1..=3).for_each(|id| batch.put_port(seen(1000 + u16::from(id), id)));
        })
        .unwrap();
    place.link.look(now).expect("news");
    let Place {
        mut link,
        desired,
        _base,
        ..
    } = place;
    let control = desired.directory().to_owned();
    std::fs::remove_file(control.join("desired")).unwrap();
    drop(desired);
    let mut desired = DesiredWriter::open(&control, Sizes::default()).unwrap();
    let known = |link: &Link| -> Vec<u8> { link.containers.keys().map(|id| id.0[0]).collect() };
    desired
        .batch(|batch| batch.put_container(holder(9, 9)))
        .unwrap();
    let news = link.look(now).expect("news");
    assert_eq!(known(&link), [1, 2, 3, 9], "nothing leads to the fourth");
    let sampled = news.rows.containers.iter();
    let sampled: Vec<u8> = sampled.map(|row| row.container_id.0[0]).collect();
    assert_eq!(sampled, [1, 2, 3, 9]);

    desired
        .batch(|batch| {
            (1..=2).for_each(|id| batch.put_port(seen(1000 + u16::from(id), id)));
            batch.put_container(holder(1, 1));
        })
        .unwrap();
    link.look(now).expect("news");
    link.reader.forget_changes();
    link.look(now).expect("all of it");
    link.tick(now);
    assert_eq!(known(&link), [1, 2, 3, 9]);
    desired
        .batch(|batch| batch.remove_port(seen(1002, 2).key()))
        .unwrap();
    link.look(now).expect("news");
    link.tick(now);
    assert_eq!(known(&link), [1, 3, 9], "its port is removed");
    link.tick(now + ORPHAN_GRACE);
    assert_eq!(known(&link), [1, 9], "its time is over");
    assert!(!link.known.contains_key(&seen(1003, 3).key()));
    // From now on what is not listed is gone.
    desired
        .batch(|batch| batch.remove_container(ContainerId([9; 32])))
        .unwrap();
    link.look(now).expect("news");
    assert_eq!(known(&link), [1]);
}

#[test]
fn statuses_of_ports_go_once_control_has_let_go_of_them_or_knows_none() {
    let mut place = Place::new();
    let now = Instant::now();
    let keys: Vec<PortKey> = (1..=3).map(|port| seen(port, 1).key()).collect();
    let told = |place: &Place| -> Vec<(u16, PortState)> {
        let mut reader = ObservedReader::at(&place.observed);
        let snapshot = reader.snapshot().unwrap();
        let ports = snapshot.ports.iter();
        ports.map(|it| (it.key.host_port, it.state)).collect()
    };
    // As an earlier life has left it.
    let earlier = PortStatus::new(
        seen(9, 1).key(),
        KernelId([1; 16]),
        RegionId([1; 16]),
        PortState::Serving,
    );
    let removed = removed(
        earlier.key,
        earlier.kernel_id,
        earlier.region_id,
        Generation(1),
    );
    place.link.publish(Changes {
        put: vec![removed],
        ..Changes::default()
    });
    place
        .desired
        .batch(|batch| (1..=3).for_each(|port| batch.put_port(seen(port, 1))))
        .unwrap();
    place.link.look(now).expect("news");
    let serving = |port| (port, PortState::Serving);
    assert_eq!(told(&place), [1, 2, 3].map(serving));

    place
        .desired
        .batch(|batch| keys[..2].iter().for_each(|key| batch.remove_port(*key)))
        .unwrap();
    place.link.look(now).expect("news");
    let gone = |port| (port, PortState::Removed);
    assert_eq!(told(&place), [gone(1), gone(2), serving(3)]);
    let answered = ObservedReader::at(&place.observed).snapshot().unwrap();
    assert_eq!(place.desired.release_acknowledged(&answered), 2);
    // One of them is wanted again at once.
    place
        .desired
        .batch(|batch| batch.put_port(seen(2, 1)))
        .unwrap();
    place.link.look(now).expect("news");
    assert_eq!(told(&place), [2, 3].map(serving));
    assert!(place.link.settling.is_empty() && place.link.ended.is_empty());
}

#[test]
fn room_of_rows_that_have_gone_is_given_back_once() {
    let mut ebb = Ebb::default();
    let rows = [0, 90, 0, 2000, 1001, 1000, 1000, 0, 0, 99, 0];
    let come = rows.map(|rows| ebb.has_come(rows));
    let at: Vec<usize> = (0..rows.len()).filter(|at| come[*at]).collect();
    assert_eq!(at, [5, 7]);
}
