//! A real node with the kernel path, its engine and its containers: bytes pass while neither of our
//! processes lives, and what agents that are gone have left is cleared away.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::dataplane::until;
use harness::images::Image;
use harness::kernel_path::{Node as Sandbox, ask, host};
use harness::kernels::{self, Order, docker};
use harness::netns::ip;
use harness::node::{Node, NodeOptions};
use harness::remote_client::{may_use_bpf, within};
use harness::skip;
use harness::traffic::{self, Manner};
use harness::wait;
use nix::sched::{CloneFlags, setns};
use serde_json::Value as Json;

/// What each kind of client has done so far.
#[derive(Debug, Default)]
struct Done {
    requests: AtomicU64,
    bytes: AtomicU64,
    connections: AtomicU64,
    over: AtomicBool,
}

impl Done {
    fn now(&self) -> [u64; 3] {
        [&self.requests, &self.bytes, &self.connections].map(|it| it.load(Relaxed))
    }

    /// Waits until every kind of client has got on by a good deal.
    fn goes_on(&self, when: &str) -> Result<()> {
        let before = self.now();
        until(&format!("the load getting on {when}"), || {
            let now = self.now();
            let far = now.iter().zip(before).zip([100, 4 << 20, 20]);
            far.into_iter()
                .all(|((now, before), more)| *now >= before + more)
                .then_some(())
        })
    }
}

/// Requests over connections that stay, a stream in bulk, and clients that come and go. Each ends in
/// a panic when a byte is wrong or a connection ends.
fn load(address: SocketAddr, done: &Arc<Done>) -> Vec<JoinHandle<()>> {
    let mut threads = Vec::new();
    for _ in 0..4 {
        let done = Arc::clone(done);
        threads.push(thread::spawn(move || {
            let mut stream = traffic::connect(address).expect("accepted");
            let mut back = [0; 64];
            while !done.over.load(Relaxed) {
                stream.write_all(&[7; 64]).expect("sent");
                stream.read_exact(&mut back).expect("echoed");
                done.requests.fetch_add(1, Relaxed);
            }
        }));
    }
    let bulk = traffic::connect(address).expect("accepted");
    let mut sender = bulk.try_clone().expect("a clone");
    let (sending, receiving) = (Arc::clone(done), Arc::clone(done));
    let sent = Arc::new(AtomicU64::new(0));
    let length = Arc::clone(&sent);
    threads.push(thread::spawn(move || {
        let mut piece = vec![0; 65_536];
        while !sending.over.load(Relaxed) {
            let offset = sent.load(Relaxed);
            traffic::fill(3, offset, &mut piece);
            sender.write_all(&piece).expect("sent");
            sent.store(offset + 65_536, Relaxed);
            sending.bytes.fetch_add(65_536, Relaxed);
        }
        sender.shutdown(Shutdown::Write).expect("ended");
    }));
    threads.push(thread::spawn(move || {
        let mut stream: TcpStream = bulk;
        let back = traffic::receive(&mut stream, 3, Manner::eager(65_536)).expect("whole");
        assert!(receiving.over.load(Relaxed), "ended too early");
        assert_eq!(back, length.load(Relaxed));
    }));
    let coming = Arc::clone(done);
    threads.push(thread::spawn(move || {
        while !coming.over.load(Relaxed) {
            assert_eq!(ask(address, b"new").expect("served"), b"new");
            coming.connections.fetch_add(1, Relaxed);
        }
    }));
    threads
}

/// An echo server at a port of a container's network.
fn echo_in(container: &str, port: u16) -> Result<()> {
    let pid = docker(&["inspect", "--format", "{{.State.Pid}}", container])?;
    let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net"))?;
    let started = thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        traffic::echo_server(&format!("0.0.0.0:{port}"));
        nix::Result::Ok(())
    });
    started.join().ok().context("the server")??;
    Ok(())
}

async fn shown(node: &Node, port: u16) -> Result<Json> {
    let all = kernels::ask(node, "bai.ports", Vec::new()).await?;
    let list = all["ports"].as_array().context("a list")?;
    let found = list.iter().find(|it| it["host_port"] == port);
    found.cloned().context("the port")
}

/// Another machine, on a link of its own to this one.
struct Neighbour {
    namespace: String,
    link: String,
    /// This host's address on the link.
    host: Ipv4Addr,
}

impl Neighbour {
    fn new() -> Result<Self> {
        let id = std::process::id();
        let net = u8::try_from(id % 251)?;
        let made = Self {
            namespace: format!("bai-kpn-{id}"),
            link: format!("kpn{id}"),
            host: Ipv4Addr::new(10, 79, net, 1),
        };
        let Self {
            namespace,
            link,
            host,
        } = &made;
        for words in [
            format!("netns add {namespace}"),
            format!("link add {link} type veth peer name eth0 netns {namespace}"),
            format!("addr add {host}/24 dev {link}"),
            format!("link set {link} up"),
            format!("-n {namespace} addr add 10.79.{net}.2/24 dev eth0"),
            format!("-n {namespace} link set eth0 up"),
            format!("-n {namespace} route add default via {host}"),
        ] {
            ip(&words)?;
        }
        Ok(made)
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = ip(&format!("link del {}", self.link));
        let _ = ip(&format!("netns del {}", self.namespace));
    }
}

async fn both_die(node: &mut Node, neighbour: &Neighbour) -> Result<()> {
    let order = Order::of(Image::Runner)?;
    let result = kernels::create(node, &order).await?;
    let port = kernels::host_ports(&result, "web")[0];
    let status = shown(node, port).await?;
    let reason = status["reason"].as_str().unwrap_or_default();
    if status["path"] != "kernel" || !reason.is_empty() {
        let firewall = reason.contains("the host's firewall decides");
        skip::here(format!("not all by the kernel path: {status}"), !firewall);
        return kernels::destroy(node, &order).await;
    }
    let container = result["container_id"].as_str().context("a container")?;
    echo_in(container, 8080)?;
    let address = SocketAddr::from((neighbour.host, port));
    let (own, theirs) = (Arc::new(Done::default()), Arc::new(Done::default()));
    let mut threads = load(address, &own);
    let done = Arc::clone(&theirs);
    threads.extend(within(&neighbour.namespace, move || load(address, &done))?);
    let goes_on = |when: &str| -> Result<()> {
        own.goes_on(&format!("of this host {when}"))?;
        theirs.goes_on(&format!("of another host {when}"))
    };
    goes_on("with both")?;
    node.kill_control()?;
    node.kill_dataplane()?;
    goes_on("with neither")?;
    node.start_dataplane()?;
    node.start_control().await?;
    goes_on("with both again")?;
    own.over.store(true, Relaxed);
    theirs.over.store(true, Relaxed);
    for thread in threads {
        thread.join().ok().context("a client has failed")?;
    }
    let made = own.connections.load(Relaxed) + theirs.connections.load(Relaxed) + 10;
    wait::until("the counters going on", Duration::from_secs(30), || async {
        let status = shown(node, port).await.ok()?;
        (status["path"] == "kernel" && status["sessions_total"].as_u64()? == made).then_some(())
    })
    .await?;
    kernels::destroy(node, &order).await
}

#[tokio::test(flavor = "multi_thread")]
async fn flows_live_and_new_ones_are_served_while_both_processes_are_dead() -> Result<()> {
    if !may_use_bpf() {
        return Ok(());
    }
    let neighbour = Neighbour::new()?;
    let mut node = Node::start(NodeOptions {
        bind_host: neighbour.host.to_string(),
        ..NodeOptions::default()
    })
    .await?;
    let run_dir = node.regions();
    both_die(&mut node, &neighbour).await?;
    drop(node);
    ensure!(pins_of(&run_dir).is_empty(), "something stays attached");
    Ok(())
}

/// Directories of pins that belong to a run directory.
fn pins_of(run_dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(shared::pins::HOME).into_iter().flatten();
    let paths = entries.flatten().map(|it| it.path());
    paths
        .filter(|it| std::fs::read_link(it.join("owner")).is_ok_and(|to| to == run_dir))
        .collect()
}

#[test]
fn what_an_agent_that_is_gone_has_left_goes_with_the_next_start() {
    if !may_use_bpf() {
        return;
    }
    let mut gone = Sandbox::new();
    let row = gone
        .container
        .port(gone.container.echo().expect("a server"));
    gone.lift(&row);
    let run_dir = gone.place.run_dir().root().to_owned();
    let other = Sandbox::new();
    assert_eq!(pins_of(&run_dir).len(), 1, "it runs");
    gone.kill();
    drop(other);
    let other = Sandbox::new();
    assert_eq!(pins_of(&run_dir).len(), 1, "it may come back");
    let address = host(&row, 0);
    let answer = gone.at_client(move || ask(address, b"x"));
    assert_eq!(answer.expect("served"), b"x");
    drop(other);
    std::fs::remove_dir_all(&run_dir).expect("the end of an agent");
    let mut other = Sandbox::new();
    let row = other
        .container
        .port(other.container.echo().expect("a server"));
    other.lift(&row);
    assert!(pins_of(&run_dir).is_empty(), "nobody will come back to it");
    let refused = gone.at_client(move || TcpStream::connect(address));
    assert!(refused.is_err(), "nothing is attached");
}

/// A page from a local port, or none when the client is turned away.
fn page(port: u16) -> Option<String> {
    kernels::fetch(port, "/")
        .ok()
        .filter(|text| !text.is_empty())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_services_client_networks_are_its_own() -> Result<()> {
    for (networks, lets_in) in [("'192.0.2.0/24'", false), ("'127.0.0.0/8'", true)] {
        let node = Node::start(NodeOptions {
            node: format!("service-clients = {{ web = [{networks}] }}"),
            ..NodeOptions::default()
        })
        .await?;
        let order = Order::of(Image::Runner)?;
        let result = kernels::create(&node, &order).await?;
        let container = result["container_id"].as_str().context("a container")?;
        let port = kernels::host_ports(&result, "web")[0];
        let pid = docker(&["inspect", "--format", "{{.State.Pid}}", container])?;
        let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net"))?;
        let started = thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            let listener = traffic::listener("0.0.0.0:8080");
            thread::spawn(move || {
                while let Ok((mut stream, _)) = listener.accept() {
                    // What is left unread would make a reset of the end.
                    let _ = stream.read(&mut [0; 1024]);
                    let _ = stream.write_all(b"page");
                }
            });
            nix::Result::Ok(())
        });
        started.join().ok().context("the server")??;
        assert_eq!(page(port).is_some(), lets_in, "{networks}");
        let counted = if lets_in {
            "sessions_total"
        } else {
            "sessions_refused"
        };
        wait::until("the count", Duration::from_secs(30), || async {
            let status = shown(&node, port).await.ok()?;
            (status[counted].as_u64()? == 1).then_some(())
        })
        .await?;
        kernels::destroy(&node, &order).await?;
    }
    Ok(())
}
