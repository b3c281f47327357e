//! Peers that are silent, send junk, never read, or come and go by the thousand cost the server
//! their own connection and nobody else's time.

use std::collections::HashSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use bytes::Bytes;
use control::metrics::Recorder;
use control::rpc::frame::{Header, Kind};
use control::rpc::{Client, ClientCurve, ClientError, CurveServer, KeyPair, Limits, Server, Value};
use harness::rpc_service::{self, Keys};
use harness::wait;
use harness::zmtp::{self, Connection};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// For what must come at once: only a machine that stands still reaches it. What would come late comes
/// [`NEVER`], so that nothing here depends on how fast the machine is.
const DEADLINE: Duration = Duration::from_secs(60);
const NEVER: Duration = Duration::from_secs(24 * 3600);

/// Silent clients are not cut for their silence, and who waits for them waits for ever.
fn patient() -> Limits {
    Limits {
        handshake_deadline: NEVER,
        reply_deadline: NEVER,
        ..Limits::default()
    }
}

/// Room for as many descriptors, if this process may have it.
fn room_for(count: u64) -> bool {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit of descriptors");
    if soft < count && hard >= count {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("up to the hard limit");
    }
    if hard < count {
        harness::skip::needs(format!("{count} descriptors; the hard limit is {hard}"));
    }
    hard >= count
}

/// Descriptors this process holds of connections to and from a port, at either end. Other tests of the
/// process have their own.
fn descriptors(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/self/net/tcp").expect("/proc/self/net/tcp");
    let end = format!(":{port:04X}");
    let sockets: HashSet<String> = table
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let ours = fields.get(1..3)?.iter().any(|it| it.ends_with(&end));
            // A listener's other end has no port.
            let connected = !fields[2].ends_with(":0000");
            (ours && connected).then(|| format!("socket:[{}]", fields.get(9).unwrap_or(&"")))
        })
        .collect();
    let held = std::fs::read_dir("/proc/self/fd").expect("/proc/self/fd");
    let held = held.flatten().filter_map(|it| it.path().read_link().ok());
    held.filter(|it| it.to_str().is_some_and(|it| sockets.contains(it)))
        .count()
}

async fn until_none_is_held(server: &Server) {
    let port = server.local_addr().port();
    until("no connection being held", || descriptors(port) == 0).await;
}

fn call_frames(method: &str, sequence: u32, args: Vec<Value>) -> Vec<Bytes> {
    let header = Header {
        kind: Kind::Function,
        method: method.into(),
        order_key: "".into(),
        sequence: sequence.into(),
        zipped: false,
    };
    header
        .function(args, vec![])
        .expect("a call packs")
        .to_vec()
}

fn send(connection: &mut Connection, frames: &[Bytes]) -> std::io::Result<()> {
    connection.send(&frames.iter().map(AsRef::as_ref).collect::<Vec<_>>())
}

/// A fresh client's connect and ping.
async fn prompt_ping(address: SocketAddr) {
    let client = Client::connect(&address.to_string(), None, DEADLINE)
        .await
        .expect("connects");
    let value = client
        .call("ping", vec!["x".into()], vec![], DEADLINE)
        .await
        .expect("a reply");
    assert_eq!(value, Value::from("x"));
}

async fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let condition = || std::future::ready(reached().then_some(()));
    let outcome = wait::until(what, DEADLINE, condition).await;
    outcome.unwrap_or_else(|err| panic!("{err}"));
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work)
        .await
        .expect("the thread ends")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_connections_leave_no_descriptor() {
    let server = rpc_service::start(None, Limits::default()).await;
    let address = server.local_addr();
    prompt_ping(address).await;
    blocking(move || {
        for sequence in 0..2000 {
            let mut connection = Connection::open(address).expect("connects");
            connection.ping().expect("a PONG");
            // Half of them go away without waiting for the reply.
            send(
                &mut connection,
                &call_frames("ping", sequence, vec!["x".into()]),
            )
            .expect("sends");
            if sequence % 2 == 0 {
                assert_eq!(connection.receive().expect("a reply")[0], b"UPPER");
            }
        }
    })
    .await;
    until_none_is_held(&server).await;
    until("all probes", || server.counters().probes == 2001).await;
    until("all calls", || {
        server.counters().calls == 2001 || server.in_flight() == 0
    })
    .await;
    server.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_and_junk_clients_delay_nobody() {
    let server = rpc_service::start(None, patient()).await;
    let address = server.local_addr();
    let mut hostile: Vec<TcpStream> = Vec::new();
    for index in 0_usize..300 {
        let mut stream = TcpStream::connect(address).expect("connects");
        let junk: &[u8] = match index % 6 {
            0 => b"",
            1 => b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            2 => &zmtp::greeting()[..10],
            3 => &zmtp::greeting(),
            4 => &[0xff; 200],
            _ => &[0x00; 64],
        };
        // A refused one may be closed already.
        let _ = stream.write_all(junk);
        hostile.push(stream);
    }
    prompt_ping(address).await;
    assert!(is_open(&hostile[0]), "a silent one is still waited for");

    // After a good handshake: nonsense frames, a READY flood, a frame length from outer space.
    for junk in [
        &[0x00, 0x03, 1, 2, 3][..],
        &[0x04, 0x02, 0x05, b'R'],
        &[0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        &[0x02, 0x00, 0x00, 0x00, 0x10, 0x00, 0x00, 0x00, 0x00],
        &[0x80, 0x01, 0x00],
    ] {
        let mut connection = blocking(move || Connection::open(address))
            .await
            .expect("connects");
        connection.stream().write_all(junk).expect("sends");
        hostile.push(connection.stream().try_clone().expect("a clone"));
    }
    prompt_ping(address).await;
    assert!(
        descriptors(address.port()) > 50,
        "all silent ones are counted"
    );
    assert!(is_open(&hostile[0]), "a silent one is still waited for");
    drop(hostile);
    until_none_is_held(&server).await;
    server.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_keys_leave_no_descriptor() {
    let (server, keys) = rpc_service::start_with_keys(Limits::default()).await;
    let Keys {
        agent,
        manager,
        stranger,
    } = keys;
    let address = server.local_addr().to_string();
    let keys = |pair| ClientCurve {
        pair,
        node: agent.public,
    };
    for _ in 0..50 {
        let refused = Client::connect(&address, Some(&keys(stranger.clone())), DEADLINE).await;
        assert!(
            matches!(refused, Err(ClientError::Lost { .. })),
            "{refused:?}"
        );
    }
    until_none_is_held(&server).await;
    Client::connect(&address, Some(&keys(manager)), DEADLINE)
        .await
        .expect("the right key is let in");
    until("the only probe", || server.counters().probes == 1).await;
    server.shutdown(Duration::from_secs(5)).await;
}

/// A client that asks for much and reads nothing; all its calls are taken.
async fn never_reads(server: &Server) -> Connection {
    let address = server.local_addr();
    let lazy = blocking(move || {
        let mut connection = Connection::open(address).expect("connects");
        for sequence in 0..60 {
            let call = call_frames("big", sequence, vec![(1_i64 << 20).into()]);
            send(&mut connection, &call).expect("sends");
        }
        connection
    })
    .await;
    until("all its calls", || server.counters().calls == 60).await;
    lazy
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_never_reads_is_cut_and_holds_nobody_up() {
    // For as long as its replies wait, others are answered.
    let server = rpc_service::start(None, patient()).await;
    let lazy = never_reads(&server).await;
    for _ in 0..5 {
        prompt_ping(server.local_addr()).await;
    }
    assert!(server.in_flight() > 0, "its replies wait");
    drop(lazy);
    server.shutdown(Duration::from_secs(5)).await;

    let limits = Limits {
        reply_deadline: Duration::from_secs(1),
        ..patient()
    };
    let server = rpc_service::start(None, limits).await;
    let mut lazy = never_reads(&server).await;
    until("the end of its calls", || server.in_flight() == 0).await;
    assert!(
        server.counters().undeliverable > 0,
        "{:?}",
        server.counters()
    );
    // What was queued before the cut can be read; then the connection ends.
    let cut = blocking(move || {
        lazy.stream()
            .set_read_timeout(Some(DEADLINE))
            .expect("a timeout");
        is_ended(lazy.stream())
    });
    assert!(cut.await, "the connection was ended");
    server.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oversized_messages_end_their_connection_only() {
    let limits = Limits {
        message_bytes: 1 << 20,
        ..Limits::default()
    };
    let server = rpc_service::start(None, limits).await;
    let address = server.local_addr();
    let client = Client::connect(&address.to_string(), None, DEADLINE)
        .await
        .expect("connects");
    let fits = vec![Value::Bin(vec![1; 900 << 10].into())];
    assert_eq!(
        client
            .call("echo", fits.clone(), vec![], DEADLINE)
            .await
            .expect("fits"),
        fits[0]
    );

    let other = Client::connect(&address.to_string(), None, DEADLINE)
        .await
        .expect("connects");
    let too_large = vec![Value::Bin(vec![1; 2 << 20].into())];
    let err = other
        .call("echo", too_large, vec![], DEADLINE)
        .await
        .expect_err("too large");
    assert!(matches!(err, ClientError::Lost { .. }), "{err}");

    assert_eq!(
        client
            .call("echo", fits.clone(), vec![], DEADLINE)
            .await
            .expect("alive"),
        fits[0]
    );
    server.shutdown(Duration::from_secs(5)).await;
}

async fn refused(server: &Server, sleepers: usize, words: &str) {
    let address = server.local_addr().to_string();
    let client = Client::connect(&address, None, DEADLINE)
        .await
        .expect("connects");
    let wait = || client.call("wait", vec![], vec![], DEADLINE);
    let sleeping = futures_util::future::join_all((0..sleepers).map(|_| wait()));
    let probing = async {
        until("the sleepers", || server.in_flight() == sleepers).await;
        let refusal = client.call("get_logs", vec![], vec![], DEADLINE).await;
        let Err(ClientError::Failure(failure)) = refusal else {
            panic!("not refused: {refusal:?}")
        };
        assert!(failure.repr.contains(words), "{}", failure.repr);
        // Who asks what they wait for is let in all the same.
        let let_in = client.call("bai.status", vec![], vec![], DEADLINE).await;
        let Err(ClientError::Failure(unknown)) = let_in else {
            panic!("not answered: {let_in:?}")
        };
        assert!(
            unknown.repr.contains("has no RPC method"),
            "{}",
            unknown.repr
        );
        // A probe is not a call, and what is answered at once is never in flight.
        prompt_ping(server.local_addr()).await;
        for _ in 0..sleepers {
            let released = client.call("release_at_once", vec![], vec![], DEADLINE);
            released.await.expect("answered at once");
        }
    };
    let (slept, ()) = tokio::join!(sleeping, probing);
    assert!(slept.iter().all(Result::is_ok), "{slept:?}");
    let again = client
        .call("echo", vec!["x".into()], vec![], DEADLINE)
        .await;
    assert_eq!(again.expect("let in again"), Value::from("x"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_beyond_the_cap_are_told_so() {
    let recorder = Recorder::install().expect("counters");
    let server = rpc_service::start(
        None,
        Limits {
            calls: 3,
            ..Limits::default()
        },
    )
    .await;
    refused(&server, 3, "3 calls are in flight").await;
    assert_eq!(server.counters().refused, 1);
    server.shutdown(Duration::from_secs(5)).await;

    let limits = Limits {
        calls_per_connection: 2,
        ..Limits::default()
    };
    let server = rpc_service::start(None, limits).await;
    refused(&server, 2, "2 calls of this connection are in flight").await;
    server.shutdown(Duration::from_secs(5)).await;
    // Both of them are counted, each as any failure is.
    let page = recorder.render(0);
    let failures = page.lines().find(|line| {
        line.starts_with("backendai_rpc_failure_requests_total{")
            && line.contains("get_logs")
            && line.contains("RuntimeError")
    });
    assert!(failures.is_some_and(|line| line.ends_with(" 2")), "{page}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_fetches_something_ends_with_its_caller() {
    let server = rpc_service::start(None, patient()).await;
    let address = server.local_addr();
    let caller = move || {
        let mut connection = Connection::open(address).expect("connects");
        send(&mut connection, &call_frames("attend", 1, vec![])).expect("sent");
        send(&mut connection, &call_frames("wait", 2, vec![])).expect("sent");
        connection
    };
    let caller = blocking(caller).await;
    until("both calls", || server.in_flight() == 2).await;
    drop(caller);
    until("the end of one", || server.in_flight() == 1).await;
    // The other runs to its end.
    let client = Client::connect(&address.to_string(), None, DEADLINE)
        .await
        .expect("connects");
    let released = client.call("release_at_once", vec![], vec![], DEADLINE);
    released.await.expect("answered at once");
    until("the end of both", || server.in_flight() == 0).await;
    let told = server.counters();
    assert_eq!((told.calls, told.undeliverable), (3, 2), "{told:?}");
    server.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_that_are_bombs_become_failures() {
    let server = rpc_service::start(None, Limits::default()).await;
    let address = server.local_addr();
    let replies = blocking(move || {
        let deep = [vec![0x91; 100_000], vec![0xc0]].concat();
        let long = vec![0xdd, 0xff, 0xff, 0xff, 0xff];
        let pickle = [&[0xc7, 9, 6, 0x80, 5][..], b"cos\nx\n."].concat();
        let mut replies = Vec::new();
        let mut connection = Connection::open(address).expect("connects");
        for body in [deep, long, pickle, vec![], vec![0xc1]] {
            let header = &call_frames("ping", 0, vec![])[1];
            let envelope = Value::map([
                ("meta", Value::Bin(Bytes::new())),
                ("body", Value::Bin(body.into())),
            ]);
            let envelope = envelope.encode().expect("packs");
            connection
                .send(&[b"UPPER", header, &envelope])
                .expect("sends");
            replies.push(connection.receive().expect("a reply"));
        }
        connection.ping().expect("alive");
        replies
    })
    .await;
    for reply in replies {
        let header = Header::decode(&reply[1].clone().into()).expect("a header");
        assert_eq!(header.kind, Kind::Failure);
    }
    server.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_sent_without_waiting_are_answered_in_order() {
    let server = rpc_service::start(None, Limits::default()).await;
    let address = server.local_addr();
    blocking(move || {
        let mut connection = Connection::open(address).expect("connects");
        for sequence in 0..400 {
            let call = call_frames("ping", sequence, vec![sequence.into()]);
            send(&mut connection, &call).expect("sends");
        }
        for sequence in 0..400_u32 {
            let reply = connection.receive().expect("a reply");
            let header = Header::decode(&reply[1].clone().into()).expect("a header");
            assert_eq!(header.sequence, sequence.into());
            assert_eq!(header.kind, Kind::Result);
        }
    })
    .await;
    until("all replies", || server.counters().replies == 400).await;
    server.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_promised_heartbeats_and_is_silent_is_cut() {
    let server = rpc_service::start(None, Limits::default()).await;
    let address = server.local_addr();
    blocking(move || {
        let mut connection = Connection::open(address).expect("connects");
        // A heartbeat that allows 0.5 s of silence (RFC 37, in tenths of a second).
        let heartbeat = b"\x04\x07\x04PING\x00\x05";
        let stream = connection.stream();
        for _ in 0..3 {
            stream.write_all(heartbeat).expect("sends");
            let mut answer = [0; 7];
            stream.read_exact(&mut answer).expect("an answer");
            assert_eq!(&answer, b"\x04\x05\x04PONG");
        }
        let silent = Instant::now();
        assert_eq!(stream.read(&mut [0]).expect("the end"), 0);
        assert!(silent.elapsed() >= Duration::from_millis(400));
    })
    .await;
    server.shutdown(Duration::from_secs(5)).await;
}

/// Whether the other end has not closed the connection so far.
fn is_open(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).expect("an option");
    let mut sink = [0; 4096];
    let open = loop {
        match (&mut &*stream).read(&mut sink) {
            Ok(0) => break false,
            Ok(_) => {}
            Err(err) => break err.kind() == std::io::ErrorKind::WouldBlock,
        }
    };
    stream.set_nonblocking(false).expect("an option");
    open
}

/// Whether the other end closes the connection, whatever it sends before. Blocks.
fn is_ended(stream: &mut TcpStream) -> bool {
    let mut sink = [0; 4096];
    loop {
        match stream.read(&mut sink) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(err) => return err.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_of_many_bytes_are_ended_before_these_are_gathered() {
    let server = rpc_service::start(None, patient()).await;
    let address = server.local_addr();
    // A READY of 200,000 bytes; and heartbeats, which are no part of a handshake.
    let long = [&[0x06, 0, 0, 0, 0, 0, 3, 0x0d, 0x40][..], &[b'x'; 100_000]].concat();
    let ended = blocking(move || {
        let mut hostile = Vec::new();
        for _ in 0..50 {
            let mut stream = TcpStream::connect(address).expect("connects");
            stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
            stream.write_all(&zmtp::greeting()).expect("sends");
            // What is sent after the end fails.
            let _ = stream.write_all(&long);
            hostile.push(stream);
        }
        hostile
            .iter_mut()
            .filter_map(|it| is_ended(it).then_some(()))
            .count()
    });
    assert_eq!(ended.await, 50);
    prompt_ping(address).await;
    server.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_silent_clients_than_may_shake_hands_keep_nobody_out() {
    // Both ends of each are here.
    if !room_for(2 * 2100 + 200) {
        return;
    }
    let server = rpc_service::start(None, patient()).await;
    let address = server.local_addr();
    let silent = blocking(move || {
        let connects = |_| TcpStream::connect(address).expect("connects");
        (0..2100).map(connects).collect::<Vec<_>>()
    })
    .await;
    // None of them ever ends by itself.
    prompt_ping(address).await;
    let mut silent = silent.into_iter();
    let mut oldest = silent.next().expect("the first");
    oldest.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    assert!(
        blocking(move || is_ended(&mut oldest)).await,
        "it gives way"
    );
    let newest = silent.next_back().expect("the last");
    assert!(is_open(&newest), "there is room for it");
    server.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_of_the_smallest_messages_leave_others_their_turn() {
    let server = rpc_service::start(None, Limits::default()).await;
    let address = server.local_addr();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flooding = (0..4).map(|_| {
        let stop = stop.clone();
        blocking(move || {
            let mut connection = Connection::open(address).expect("connects");
            let frames = [0x00, 0x01, b'x'].repeat(100_000);
            let mut sent = 0_u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                connection.stream().write_all(&frames).expect("sends");
                sent += 100_000;
            }
            sent
        })
    });
    let flooding: Vec<_> = flooding.map(tokio::spawn).collect();
    until("a flood", || server.counters().ignored > 1_000_000).await;
    let ignored = || server.counters().ignored;
    let mut meanwhile = Vec::new();
    for _ in 0..20 {
        let before = ignored();
        prompt_ping(address).await;
        meanwhile.push(ignored() - before);
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let mut sent = 0;
    for flood in flooding {
        sent += flood.await.expect("the flood ends");
    }
    // A turn takes some of what was read. Were it all of it, each round of a ping's would wait for as much.
    const ONE_READ: u64 = 128 * 1024 / 3;
    let least = meanwhile.iter().min().expect("some");
    assert!(*least < ONE_READ, "{meanwhile:?}");
    until("all of it", || server.counters().ignored >= sent).await;
    server.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_of_a_hundred_thousand_parts_is_read_by_its_last_three() {
    let server = rpc_service::start(None, Limits::default()).await;
    let address = server.local_addr();
    let small = Limits {
        message_bytes: 1 << 20,
        ..Limits::default()
    };
    let narrow = rpc_service::start(None, small).await;
    let narrow_address = narrow.local_addr();
    blocking(move || {
        let parts = [0x01, 0x01, b'x'].repeat(100_000);
        let mut connection = Connection::open(address).expect("connects");
        connection.stream().write_all(&parts).expect("sends");
        connection.ping().expect("a PONG");
        // Parts count with what each takes in memory, also those without a byte.
        let mut connection = Connection::open(narrow_address).expect("connects");
        let empty = [0x01, 0x00].repeat(100_000);
        let _ = connection.stream().write_all(&empty);
        assert!(is_ended(connection.stream()), "too large for the limit");
    })
    .await;
    prompt_ping(narrow_address).await;
    server.shutdown(Duration::from_secs(5)).await;
    narrow.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_finished_and_wrong_curve_handshakes_delay_nobody() {
    let (agent, manager) = (KeyPair::generate(), KeyPair::generate());
    let curve = CurveServer {
        pair: agent.clone(),
        manager: manager.public,
        own_is_private: true,
    };
    let server = rpc_service::start(Some(curve), patient()).await;
    let address = server.local_addr();
    let mut greeting = zmtp::greeting();
    greeting[12..17].copy_from_slice(b"CURVE");
    // Of a HELLO: its head only, a part, all of it with a key and a box of nothing.
    let hello = [&[0x04, 200][..], b"\x05HELLO\x01\x00", &[0; 192]].concat();
    let hostile = blocking(move || {
        let begin = |index: usize| {
            let mut stream = TcpStream::connect(address).expect("connects");
            stream.write_all(&greeting).expect("sends");
            let part = [0, 2, 100, hello.len()][index % 4];
            stream.write_all(&hello[..part]).expect("sends");
            stream
        };
        (0..400).map(begin).collect::<Vec<_>>()
    })
    .await;
    let keys = |node| ClientCurve {
        pair: manager.clone(),
        node,
    };
    let text = address.to_string();
    let wrong = keys(KeyPair::generate().public);
    // Refused, which is something else than not answered in time.
    let refused = Client::connect(&text, Some(&wrong), DEADLINE).await;
    assert!(
        matches!(refused, Err(ClientError::Lost { .. })),
        "the server's key is another one: {refused:?}"
    );
    let plain = Client::connect(&text, None, DEADLINE).await;
    assert!(
        matches!(plain, Err(ClientError::Lost { .. })),
        "without CURVE nobody is let in: {plain:?}"
    );
    let right = keys(agent.public);
    let client = Client::connect(&text, Some(&right), DEADLINE).await;
    let client = client.expect("the right keys are let in");
    let answer = client
        .call("ping", vec!["x".into()], vec![], DEADLINE)
        .await;
    assert_eq!(answer.expect("a reply"), Value::from("x"));
    assert_eq!((server.counters().calls, server.in_flight()), (1, 0));
    drop(hostile);
    server.shutdown(Duration::from_secs(5)).await;
}
