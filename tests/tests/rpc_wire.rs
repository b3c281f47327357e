//! The published manager client and the published ZeroMQ library talk to our server, over NULL and
//! CURVE, and every value arrives as the manager's own decoder would have it.

use std::path::PathBuf;
use std::time::Duration;

use control::rpc::{
    Client, ClientCurve, ClientError, CurveServer, KeyPair, Limits, PublicKey, Server, Value,
};
use harness::python;
use harness::rpc_service::{self, Keys};

const PROGRAM: &str = "rpc_peer.py";

/// Runs a group of checks while the server answers.
async fn checks(interpreter: PathBuf, arguments: Vec<String>) -> String {
    let checking = tokio::task::spawn_blocking(move || {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        python::check(&interpreter, PROGRAM, &arguments)
    });
    let output = checking.await.expect("the checking thread ends");
    let output = output.unwrap_or_else(|err| panic!("{err:#}"));
    println!("{output}");
    assert!(
        output.ends_with("0 failed\n"),
        "the checks ran to their end"
    );
    output
}

fn passed(output: &str) -> usize {
    output
        .lines()
        .filter(|line| line.starts_with("ok "))
        .count()
}

struct CurveNode {
    server: Server,
    agent: PublicKey,
    directory: tempfile::TempDir,
}

/// A server with keys that pyzmq has made.
async fn curve_node(interpreter: &std::path::Path) -> CurveNode {
    let directory = tempfile::tempdir().expect("a directory for keys");
    let path = directory.path().to_str().expect("UTF-8");
    python::check(interpreter, PROGRAM, &["keys", path]).expect("pyzmq makes key files");
    let pair = KeyPair::from_file(&directory.path().join("agent.key_secret")).expect("agent keys");
    let manager =
        PublicKey::from_file(&directory.path().join("manager.key")).expect("the manager's key");
    let agent = pair.public;
    let server = rpc_service::start(
        Some(CurveServer {
            pair,
            manager,
            own_is_private: true,
        }),
        Limits::default(),
    )
    .await;
    CurveNode {
        server,
        agent,
        directory,
    }
}

impl CurveNode {
    fn key_file(&self, name: &str) -> String {
        let path = self.directory.path().join(format!("{name}.key_secret"));
        path.to_str().expect("UTF-8").to_owned()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_manager_client_over_null() {
    let Some(python) = python::interpreter("rpc_wire").expect("an environment") else {
        return;
    };
    let server = rpc_service::start(None, Limits::default()).await;
    let address = server.local_addr().to_string();
    let output = checks(python, vec!["null".into(), address]).await;
    assert!(passed(&output) >= 45, "{} checks", passed(&output));
    server.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_manager_client_over_curve() {
    let Some(python) = python::interpreter("rpc_wire").expect("an environment") else {
        return;
    };
    let node = curve_node(&python).await;
    let arguments = vec![
        "curve".into(),
        node.server.local_addr().to_string(),
        node.agent.to_z85(),
        node.key_file("manager"),
    ];
    let output = checks(python, arguments).await;
    assert!(passed(&output) >= 42, "{} checks", passed(&output));
    node.server.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_keys_and_no_key_are_refused() {
    let Some(python) = python::interpreter("rpc_wire").expect("an environment") else {
        return;
    };
    let node = curve_node(&python).await;
    let null_server = rpc_service::start(None, Limits::default()).await;
    let arguments = vec![
        "refused".into(),
        node.server.local_addr().to_string(),
        null_server.local_addr().to_string(),
        node.agent.to_z85(),
        node.key_file("manager"),
    ];
    let output = checks(python, arguments).await;
    assert_eq!(passed(&output), 5);
    // Only the last check's call got through.
    assert_eq!(node.server.counters().calls, 1);
    assert_eq!(null_server.counters().calls, 0);
    node.server.shutdown(Duration::from_secs(5)).await;
    null_server.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_captured_conversations_are_answered_and_nothing_ends_the_loop() {
    let Some(python) = python::interpreter("rpc_wire").expect("an environment") else {
        return;
    };
    let server = rpc_service::start(None, Limits::default()).await;
    let vectors = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/vectors/rpc/agent_conformance.json"
    );
    let arguments = vec![
        "conformance".into(),
        server.local_addr().to_string(),
        vectors.to_owned(),
    ];
    let output = checks(python, arguments).await;
    assert!(passed(&output) >= 50, "{} checks", passed(&output));
    server.shutdown(Duration::from_secs(5)).await;
}

const DEADLINE: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_over_null() {
    let server = rpc_service::start(None, Limits::default()).await;
    let address = server.local_addr().to_string();
    let client = Client::connect(&address, None, DEADLINE)
        .await
        .expect("connects");
    let slow = client.call("sleep", vec![0.5.into()], vec![], DEADLINE);
    let fast = client.call("ping", vec!["x".into()], vec![], DEADLINE);
    tokio::pin!(slow);
    tokio::select! {
        value = fast => assert_eq!(value.expect("a reply"), Value::from("x")),
        value = &mut slow => panic!("the slow call came first: {value:?}"),
    }
    assert_eq!(slow.await.expect("a reply"), Value::from("slow-done"));
    let by_name = client
        .call("ping", vec![], vec![("msg".into(), 7.into())], DEADLINE)
        .await;
    assert_eq!(by_name.expect("a reply"), Value::Int(7));
    let failed = client
        .call("fail", vec![], vec![], DEADLINE)
        .await
        .expect_err("a failure");
    assert_eq!(failed.to_string(), "RuntimeError(\"it's broken\")");
    let late = client
        .call("sleep", vec![5.0.into()], vec![], Duration::from_millis(50))
        .await
        .expect_err("no reply in time");
    assert!(matches!(late, ClientError::Deadline { .. }), "{late}");
    let big = client
        .call("big", vec![(3 << 20).into()], vec![], DEADLINE)
        .await
        .expect("a reply");
    assert_eq!(big.as_bin().map(bytes::Bytes::len), Some(3 << 20));

    // A call that waits when the server goes is told so; its handler was given its grace.
    let waiting = client.call("sleep", vec![30.0.into()], vec![], DEADLINE);
    let (outcome, ()) = tokio::join!(waiting, async {
        while server.counters().calls < 7 {
            tokio::task::yield_now().await;
        }
        server.shutdown(Duration::from_millis(100)).await;
    });
    assert!(
        matches!(outcome, Err(ClientError::Lost { .. })),
        "{outcome:?}"
    );
    let err = client
        .call("ping", vec!["x".into()], vec![], DEADLINE)
        .await
        .expect_err("gone");
    assert!(matches!(err, ClientError::Lost { .. }), "{err}");
    let err = Client::connect(&address, None, DEADLINE)
        .await
        .expect_err("nobody listens");
    assert!(matches!(err, ClientError::Lost { .. }), "{err}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_over_curve() {
    let (server, keys) = rpc_service::start_with_keys(Limits::default()).await;
    let Keys {
        agent,
        manager,
        stranger,
    } = keys;
    let address = server.local_addr().to_string();
    let with = |pair: &KeyPair, node| ClientCurve {
        pair: pair.clone(),
        node,
    };

    let ours = with(&manager, agent.public);
    let client = Client::connect(&address, Some(&ours), DEADLINE)
        .await
        .expect("connects");
    let value = client
        .call("ping", vec!["x".into()], vec![], DEADLINE)
        .await;
    assert_eq!(value.expect("a reply"), Value::from("x"));
    // The commands beside the agent have its own pair.
    let own = with(&agent, agent.public);
    Client::connect(&address, Some(&own), DEADLINE)
        .await
        .expect("connects from this host");

    let wrong_pair = with(&stranger, agent.public);
    let err = Client::connect(&address, Some(&wrong_pair), DEADLINE)
        .await
        .expect_err("refused");
    assert!(matches!(err, ClientError::Lost { .. }), "{err}");
    let short = Duration::from_millis(1500);
    let wrong_node = with(&manager, stranger.public);
    for keys in [Some(&wrong_node), None] {
        let err = Client::connect(&address, keys, short)
            .await
            .expect_err("refused");
        assert!(
            matches!(err, ClientError::Lost { .. } | ClientError::Deadline { .. }),
            "{err}"
        );
    }
    assert_eq!(
        server.counters().probes,
        2,
        "only the right keys were answered"
    );

    let mixed = KeyPair {
        public: manager.public,
        secret: agent.secret.clone(),
    };
    let curve = CurveServer {
        pair: mixed,
        manager: manager.public,
        own_is_private: true,
    };
    let options = control::rpc::ServerOptions {
        address: "127.0.0.1:0".into(),
        curve: Some(curve),
        limits: Limits::default(),
    };
    let service = std::sync::Arc::new(rpc_service::TestService::default());
    let err = Server::bind(options, service)
        .await
        .expect_err("a mixed pair");
    assert!(matches!(err, control::rpc::BindError::KeyMismatch), "{err}");
    server.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn what_is_answered_at_once_needs_no_worker() {
    let node = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("worker")
        .enable_all()
        .build()
        .expect("a runtime");
    let starting = node.spawn(rpc_service::start(None, Limits::default()));
    let server = starting.await.expect("a server");
    let address = server.local_addr().to_string();
    let client = Client::connect(&address, None, DEADLINE)
        .await
        .expect("connects");
    let call = |method: &'static str, argument: f64| {
        client.call(method, vec![argument.into()], vec![], DEADLINE)
    };

    for (method, thread) in [("thread_at_once", "bai-rpc"), ("thread", "worker")] {
        let answered = call(method, 0.0).await.expect("a reply");
        assert_eq!(answered, thread.into());
    }
    // One that panics harms nobody.
    let failed = call("boom_at_once", 0.0).await.expect_err("a failure");
    assert!(failed.to_string().contains("own words"), "{failed}");

    let blocked = call("block", 2.0);
    tokio::pin!(blocked);
    let waited = tokio::time::timeout(Duration::from_millis(200), &mut blocked).await;
    assert!(waited.is_err(), "the worker is blocked");
    tokio::select! {
        pong = call("ping", 1.0) => assert_eq!(pong.expect("a reply"), Value::Float(1.0)),
        _ = &mut blocked => panic!("the ping waited for the worker"),
    }
    assert_eq!(blocked.await.expect("a reply"), Value::Nil);
    // A task ends a moment after its reply has gone.
    let ended = async {
        while server.in_flight() > 0 {
            tokio::task::yield_now().await;
        }
    };
    let ended = tokio::time::timeout(DEADLINE, ended).await;
    ended.expect("no call is left");
    drop(server);
    node.shutdown_background();
}
