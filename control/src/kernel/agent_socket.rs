//! The socket inside every container at `/opt/kernel/agent.sock`, served by this process.
//!
//! In: questions of the preloaded hook library and the jail about process ids. Out: translations between
//! the host's and the container's ids. One socket for all containers, in a directory that is mounted
//! read-only into them: a restarted agent puts a new socket into the same directory, so running
//! containers reach it without a relay.
//!
//! Invariants: a peer is known by its credentials, not by what it says, and learns only about processes
//! of its own container (in the original any container can ask about any other); connections, their
//! number per container, message sizes and the time that a container's questions take are bounded.

use std::collections::HashMap;
use std::fs::Permissions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec};
use shared::ids::ContainerId;
use shared::log_limit::LogLimit;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::container_processes::{ContainerCgroup, KernelFiles};
use super::zmtp::{self, ReadLimits, ZmtpError};

/// File name of the socket in its directory.
pub const SOCKET_NAME: &str = "agent.sock";
/// Where the directory is mounted in containers.
pub const CONTAINER_DIRECTORY: &str = "/opt/kernel";

/// Files the runner's own mounts put over the directory. The directory is
/// read-only inside, so the engine cannot make them there.
pub const MOUNT_POINTS: [&str; 13] = [
    "dropbearmulti",
    "entrypoint.sh",
    "extract_dotfiles.py",
    "fantompass.py",
    "hash_phrase.py",
    "jail",
    "libbaihook.so",
    "sftp-server",
    "su-exec",
    "tmux",
    "ttyd",
    "words.json",
    "yank.sh",
];

const CONNECTIONS: usize = 1024;
const CONNECTIONS_PER_CONTAINER: usize = 32;
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// A client that says nothing for this long is disconnected; ZeroMQ clients reconnect by themselves.
const IDLE_LIMIT: Duration = Duration::from_secs(600);
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// A container rests so many times as long as its question took, so that its questions use a fifth of
/// a core at most, whoever asks them: to find a process, those of the container are looked through.
const REST: u32 = 4;
const LONGEST_REST: Duration = Duration::from_secs(20);
const LIMITS: ReadLimits = ReadLimits {
    frame: 256,
    frames: 8,
    cut: false,
};

const NOT_FOUND: i32 = -1;
const ELSEWHERE: i32 = -2;
const FAILED: i32 = -1;
const INVALID_ACTION: i32 = -2;

/// How the socket is served.
#[derive(Clone, Debug)]
pub struct AgentSocketOptions {
    /// Directory of the socket; made if missing. It belongs to this socket alone.
    pub directory: PathBuf,
    /// Whether containers run in the jail (`container.sandbox-type`).
    pub jail: bool,
    /// Where the kernel's files are.
    pub files: KernelFiles,
}

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum AgentSocketError {
    /// The directory cannot be prepared.
    #[error(
        "the directory {path} of the agent socket cannot be prepared; check its owner and mode"
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be bound.
    #[error(
        "the agent socket {path} cannot be bound; its path may be longer than a socket's may be (107 bytes)"
    )]
    Bind {
        /// The socket.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// Makes empty files that the engine can mount others over. Names with a slash are left out.
///
/// # Errors
/// The directory or a file in it cannot be made, or is another user's.
pub fn ensure_mount_points<'a>(
    directory: &Path,
    names: impl IntoIterator<Item = &'a str>,
) -> Result<(), AgentSocketError> {
    let failed = |source| AgentSocketError::Directory {
        path: directory.to_owned(),
        source,
    };
    std::fs::create_dir_all(directory).map_err(failed)?;
    shared::run_dir::require_own(directory).map_err(|err| failed(io::Error::other(err)))?;
    std::fs::set_permissions(directory, Permissions::from_mode(0o755)).map_err(failed)?;
    for name in names {
        if name.is_empty()
            || name.contains('/')
            || name == ".."
            || name == "."
            || name == SOCKET_NAME
        {
            continue;
        }
        match std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(directory.join(name))
        {
            Ok(_) => {}
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {}
            Err(err) => return Err(failed(err)),
        }
    }
    Ok(())
}

/// Binds the socket and serves it in the background until `stop`. Must be called inside a runtime.
///
/// # Errors
/// As for [`ensure_mount_points`]; the socket cannot be bound.
pub fn serve(options: AgentSocketOptions, stop: CancellationToken) -> Result<(), AgentSocketError> {
    ensure_mount_points(&options.directory, MOUNT_POINTS)?;
    let path = options.directory.join(SOCKET_NAME);
    let listener = bind(&options.directory, &path).map_err(|source| AgentSocketError::Bind {
        path: path.clone(),
        source,
    })?;
    // Nothing below a locked directory is cleaned away by its age (tmpfiles.d(5)).
    let lock = std::fs::File::open(&options.directory)
        .and_then(|directory| directory.lock_shared().map(|()| directory));
    let server = Arc::new(Server {
        options,
        peers: Mutex::new(HashMap::new()),
    });
    tokio::spawn(async move {
        stop.run_until_cancelled(server.accept(&listener)).await;
        drop(lock);
        // A newer agent may have put its own socket there already; a stale one only refuses.
    });
    Ok(())
}

/// Binds under another name and renames, so that containers always find a socket there.
fn bind(directory: &Path, path: &Path) -> io::Result<UnixListener> {
    let fresh = directory.join(format!(".{SOCKET_NAME}.{}", std::process::id()));
    match std::fs::remove_file(&fresh) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh)?;
    std::fs::set_permissions(&fresh, Permissions::from_mode(0o666))?;
    std::fs::rename(&fresh, path)?;
    Ok(listener)
}

#[derive(Debug)]
struct Server {
    options: AgentSocketOptions,
    /// By container; `None` = from outside of containers.
    peers: Mutex<HashMap<Option<ContainerId>, Connected>>,
}

/// What a container has open.
#[derive(Debug)]
struct Connected {
    connections: usize,
    /// Held while one of its questions is answered, and for the rest after it.
    turn: Arc<Semaphore>,
}

/// A counted connection.
struct Admission {
    server: Arc<Server>,
    container: Option<ContainerId>,
    turn: Arc<Semaphore>,
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut peers = self
            .server
            .peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(connected) = peers.get_mut(&self.container) {
            connected.connections -= 1;
            // One that still answers or rests is remembered by it: else a new connection were a way
            // around the rest.
            if connected.connections == 0 && connected.turn.available_permits() > 0 {
                peers.remove(&self.container);
            }
        }
    }
}

impl Server {
    async fn accept(self: &Arc<Self>, listener: &UnixListener) {
        // Whoever connects waits for a place before anything is looked up for it, so a container
        // that connects all the time costs no more than this many tasks.
        let places = Arc::new(Semaphore::new(CONNECTIONS + CONNECTIONS_PER_CONTAINER));
        let mut trouble = LogLimit::new();
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let server = Arc::clone(self);
                    tokio::spawn(async move {
                        server.serve(stream).await;
                        drop(place);
                    });
                }
                Err(err) => {
                    // Out of descriptors, most likely: later it works again.
                    if let Some(suppressed) = trouble.pass() {
                        tracing::warn!(%err, suppressed, "the agent socket cannot accept a connection; it is tried again");
                    }
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, container: Option<ContainerId>) -> Option<Admission> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        // Containers without connections that were at rest when the last one ended.
        peers.retain(|_, connected| {
            connected.connections > 0 || connected.turn.available_permits() == 0
        });
        let total: usize = peers.values().map(|own| own.connections).sum();
        let own = peers.entry(container).or_insert_with(|| Connected {
            connections: 0,
            turn: Arc::new(Semaphore::new(1)),
        });
        if total >= CONNECTIONS || own.connections >= CONNECTIONS_PER_CONTAINER {
            if own.connections == 0 && own.turn.available_permits() > 0 {
                peers.remove(&container);
            }
            return None;
        }
        own.connections += 1;
        Some(Admission {
            server: Arc::clone(self),
            container,
            turn: Arc::clone(&own.turn),
        })
    }

    async fn serve(self: Arc<Self>, mut stream: UnixStream) {
        let asker = Asker::of(&stream);
        let pid = asker.pid;
        let files = self.options.files.clone();
        let peer = tokio::task::spawn_blocking(move || asker.container(&files))
            .await
            .unwrap_or(None);
        let Some(admission) = self.admit(peer.as_ref().map(|peer| peer.id)) else {
            tracing::debug!(
                peer = pid,
                "too many connections to the agent socket; one is refused"
            );
            return;
        };
        let handshake = zmtp::handshake(&mut stream, "REP", &["REQ", "DEALER"]);
        if !matches!(
            tokio::time::timeout(HANDSHAKE_LIMIT, handshake).await,
            Ok(Ok(()))
        ) {
            return;
        }
        // Ends with the peer, with silence, or with the first thing that is not a request.
        let turn = &admission.turn;
        while let Ok(Ok(())) =
            tokio::time::timeout(IDLE_LIMIT, self.exchange(&mut stream, peer.as_ref(), turn)).await
        {
        }
    }

    async fn exchange(
        &self,
        stream: &mut UnixStream,
        peer: Option<&ContainerCgroup>,
        turn: &Arc<Semaphore>,
    ) -> Result<(), ZmtpError> {
        let (frames, _) = zmtp::read_message(stream, &LIMITS).await?;
        // The envelope of a request ends with an empty frame; it goes back as it came.
        let Some(delimiter) = frames.iter().position(Bytes::is_empty) else {
            return Err(ZmtpError::Frame);
        };
        let (envelope, request) = frames.split_at(delimiter + 1);
        let request: Vec<Bytes> = request.to_vec();
        let (peer, files, jail) = (peer.cloned(), self.options.files.clone(), self.options.jail);
        let turn = Arc::clone(turn).acquire_owned();
        let work = async move {
            let place = turn.await.ok()?;
            // Goes on, with its place, when nobody waits for the answer any more.
            let work = tokio::spawn(async move {
                let begun = Instant::now();
                let reply = tokio::task::spawn_blocking(move || {
                    answer(&files, jail, peer.as_ref(), &request)
                });
                let reply = reply.await.ok();
                tokio::spawn(async move {
                    let rest = begun.elapsed().saturating_mul(REST);
                    tokio::time::sleep(rest.min(LONGEST_REST)).await;
                    drop(place);
                });
                reply
            });
            work.await.ok().flatten()
        };
        let reply = match tokio::time::timeout(ANSWER_LIMIT, work).await {
            Ok(Some(reply)) => reply,
            _ => error("the agent could not look at the processes in time; ask more seldom"),
        };
        let parts: Vec<&[u8]> = envelope.iter().chain(&reply).map(AsRef::as_ref).collect();
        zmtp::write_message(stream, &parts).await
    }
}

/// The process that has connected.
struct Asker {
    pid: i32,
    /// The process itself, where the kernel hands it out (since 6.5): its number may be another's by
    /// the time that is looked up, and whoever held a connection would pass for that.
    held: nix::Result<OwnedFd>,
}

impl Asker {
    fn of(stream: &UnixStream) -> Asker {
        let credentials = stream.peer_cred().ok();
        Asker {
            pid: credentials.and_then(|it| it.pid()).unwrap_or(0),
            held: nix::sys::socket::getsockopt(stream, nix::sys::socket::sockopt::PeerPidfd),
        }
    }

    /// The container it is in; none when it has ended meanwhile. Blocks.
    fn container(&self, files: &KernelFiles) -> Option<ContainerCgroup> {
        let found = files.container_of(self.pid)?;
        let lives = match &self.held {
            // Readable once it has ended.
            Ok(process) => {
                let mut polled = [PollFd::new(process, PollFlags::IN)];
                rustix::event::poll(&mut polled, Some(&Timespec::default())) == Ok(0)
            }
            Err(err) => *err == nix::errno::Errno::ENOPROTOOPT,
        };
        lives.then_some(found)
    }
}

fn number(value: i32) -> Bytes {
    Bytes::copy_from_slice(&value.to_ne_bytes())
}

fn value(value: i32) -> Vec<Bytes> {
    vec![number(0), number(value)]
}

fn error(text: &str) -> Vec<Bytes> {
    vec![number(FAILED), Bytes::from(format!("Error: {text}"))]
}

/// The reply to one request of a peer.
fn answer(
    files: &KernelFiles,
    jail: bool,
    peer: Option<&ContainerCgroup>,
    request: &[Bytes],
) -> Vec<Bytes> {
    let Some((action, arguments)) = request.split_first() else {
        return vec![
            number(INVALID_ACTION),
            Bytes::from_static(b"Invalid action"),
        ];
    };
    let inward = match action.as_ref() {
        b"is-jail-enabled" => return value(i32::from(jail)),
        b"host-pid-to-container-pid" => true,
        b"container-pid-to-host-pid" => false,
        _ => {
            return vec![
                number(INVALID_ACTION),
                Bytes::from_static(b"Invalid action"),
            ];
        }
    };
    let [container, pid] = arguments else {
        return error("a container id and a process id are needed");
    };
    let Ok(pid) = <[u8; 4]>::try_from(pid.as_ref()).map(i32::from_ne_bytes) else {
        return error("a process id has four bytes");
    };
    let asked: Option<ContainerId> = std::str::from_utf8(container)
        .ok()
        .and_then(|text| text.parse().ok());
    let Some(peer) = peer.filter(|peer| asked == Some(peer.id)) else {
        // Others' processes are none of the peer's business.
        return value(if inward { ELSEWHERE } else { NOT_FOUND });
    };
    if !inward {
        return value(files.outer_pid(peer, pid).unwrap_or(NOT_FOUND));
    }
    match files.container_of(pid) {
        None => value(NOT_FOUND),
        Some(container) if container.id != peer.id => value(ELSEWHERE),
        Some(_) => value(files.inner_pid(pid).unwrap_or(NOT_FOUND)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine;

    const ID: &str = "7baa8d979384b2736ae6e9ad41a9ae02912117e0765da6481dd4ed6044a05955";
    const OTHER: &str = "0000000000000000000000000000000000000000000000000000000000000001";

    #[test]
    fn what_is_missing_of_the_mount_points_is_made_again_and_nothing_behind_a_link_of_others() {
        let place = tempfile::tempdir().unwrap();
        let own = place.path().join("own");
        ensure_mount_points(&own, MOUNT_POINTS).unwrap();
        std::fs::remove_file(own.join("su-exec")).unwrap();
        ensure_mount_points(&own, MOUNT_POINTS).unwrap();
        assert!(own.join("su-exec").exists());
        if rustix::process::geteuid().is_root() {
            let (victim, link) = (place.path().join("victim"), place.path().join("link"));
            std::fs::create_dir(&victim).unwrap();
            std::os::unix::fs::symlink(&victim, &link).unwrap();
            std::os::unix::fs::lchown(&link, Some(65534), None).unwrap();
            ensure_mount_points(&link, MOUNT_POINTS).unwrap_err();
            assert_eq!(std::fs::read_dir(&victim).unwrap().count(), 0);
        }
    }

    fn host(directory: &Path) -> KernelFiles {
        let files = KernelFiles {
            proc: directory.join("proc"),
            cgroup: directory.join("cgroup"),
        };
        for (pid, inner, id) in [(1527, 164, ID), (1600, 7, OTHER)] {
            let process = files.proc.join(pid.to_string());
            std::fs::create_dir_all(&process).expect("directory");
            std::fs::write(process.join("cgroup"), format!("8:pids:/docker/{id}\n")).expect("file");
            std::fs::write(process.join("status"), format!("NSpid:\t{pid}\t{inner}\n"))
                .expect("file");
            let group = files.cgroup.join("pids/docker").join(id);
            std::fs::create_dir_all(&group).expect("directory");
            std::fs::write(group.join("cgroup.procs"), format!("{pid}\n")).expect("file");
        }
        files
    }

    fn frame(frame: &serde_json::Value) -> Bytes {
        match (frame["utf8"].as_str(), frame["b64"].as_str()) {
            (Some(text), _) => Bytes::from(text.to_owned()),
            (_, Some(text)) => Bytes::from(
                base64::engine::general_purpose::STANDARD
                    .decode(text)
                    .expect("base64"),
            ),
            _ => panic!("not a frame"),
        }
    }

    #[test]
    fn captured_requests_get_the_captured_replies() {
        let directory = tempfile::tempdir().expect("directory");
        let files = host(directory.path());
        let peer = files.container_of(1527).expect("container");
        let text = include_str!("../../../tests/vectors/runner/agent_sock.json");
        let vector: serde_json::Value = serde_json::from_str(text).expect("vector");
        let mut checked = 0;
        for exchange in vector["data"].as_array().expect("exchanges") {
            let parts = |side: usize| -> Vec<Bytes> {
                exchange[side]
                    .as_array()
                    .expect("frames")
                    .iter()
                    .map(frame)
                    .collect()
            };
            assert_eq!(
                answer(&files, false, Some(&peer), &parts(0)),
                parts(1),
                "{exchange}"
            );
            checked += 1;
        }
        assert_eq!(checked, 4);
    }

    #[test]
    fn any_container_can_ask_about_any_other_in_the_original() {
        let directory = tempfile::tempdir().expect("directory");
        let files = host(directory.path());
        let peer = files.container_of(1527);
        let ask =
            |peer: Option<&ContainerCgroup>, action: &'static str, id: &'static str, pid: i32| {
                let request = [
                    Bytes::from_static(action.as_bytes()),
                    Bytes::from_static(id.as_bytes()),
                    number(pid),
                ];
                answer(&files, true, peer, &request)
            };
        let (inward, outward) = ("host-pid-to-container-pid", "container-pid-to-host-pid");
        assert_eq!(ask(peer.as_ref(), outward, ID, 164), value(1527));
        assert_eq!(ask(peer.as_ref(), outward, OTHER, 7), value(-1));
        assert_eq!(ask(peer.as_ref(), inward, OTHER, 1600), value(-2));
        assert_eq!(ask(peer.as_ref(), inward, ID, 1600), value(-2));
        assert_eq!(ask(peer.as_ref(), inward, ID, 99_999), value(-1));
        assert_eq!(ask(None, inward, ID, 1527), value(-2));
        assert_eq!(ask(None, outward, ID, 164), value(-1));
    }

    #[test]
    fn malformed_requests_get_an_error() {
        let files = KernelFiles::default();
        let inward = Bytes::from_static(b"host-pid-to-container-pid");
        for request in [
            vec![inward.clone()],
            vec![
                inward.clone(),
                Bytes::from_static(b"\xff"),
                Bytes::from_static(b"12345"),
            ],
            vec![inward; 4],
        ] {
            let reply = answer(&files, false, None, &request);
            assert_eq!(reply[0], number(-1));
            assert!(reply[1].starts_with(b"Error: "));
        }
        assert_eq!(answer(&files, true, None, &[])[0], number(-2));
        assert_eq!(
            answer(
                &files,
                true,
                None,
                &[Bytes::from_static(b"is-jail-enabled")]
            ),
            value(1)
        );
    }

    async fn ask(path: &Path, parts: &[&[u8]]) -> Vec<Bytes> {
        let mut stream = UnixStream::connect(path).await.expect("connected");
        zmtp::handshake(&mut stream, "REQ", &["REP"])
            .await
            .expect("handshake");
        let mut frames: Vec<&[u8]> = vec![b""];
        frames.extend(parts);
        zmtp::write_message(&mut stream, &frames)
            .await
            .expect("sent");
        let (reply, _) = zmtp::read_message(&mut stream, &LIMITS)
            .await
            .expect("reply");
        assert!(reply[0].is_empty());
        reply[1..].to_vec()
    }

    #[tokio::test]
    async fn a_restarted_agent_serves_the_same_path() {
        let directory = tempfile::tempdir().expect("directory");
        let options = AgentSocketOptions {
            directory: directory.path().join("sockets"),
            jail: false,
            files: KernelFiles::default(),
        };
        let path = options.directory.join(SOCKET_NAME);
        for jail in [false, true] {
            let stop = CancellationToken::new();
            serve(
                AgentSocketOptions {
                    jail,
                    ..options.clone()
                },
                stop.clone(),
            )
            .expect("served");
            assert_eq!(
                ask(&path, &[b"is-jail-enabled"]).await,
                value(i32::from(jail))
            );
            // This test is no container: its own process is nobody's business here.
            let own = i32::try_from(std::process::id())
                .expect("pid")
                .to_ne_bytes();
            let reply = ask(&path, &[b"host-pid-to-container-pid", ID.as_bytes(), &own]).await;
            assert_eq!(reply, value(-2));
            stop.cancel();
        }
        assert!(options.directory.join("su-exec").exists());
        assert_eq!(
            path.metadata().expect("socket").permissions().mode() & 0o777,
            0o666
        );
    }

    const CONNECT_TO: &str = "BAI_TEST_CONNECT_TO";

    /// The other process of the test below; does nothing by itself.
    #[test]
    fn connects_and_waits_for_a_line() {
        if let Ok(path) = std::env::var(CONNECT_TO) {
            let _stream = std::os::unix::net::UnixStream::connect(path).expect("connected");
            std::io::stdin()
                .read_line(&mut String::new())
                .expect("a line");
        }
    }

    #[tokio::test]
    async fn a_process_that_has_ended_is_not_its_successor() {
        let directory = tempfile::tempdir().expect("directory");
        let files = host(directory.path());
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).expect("bound");
        let mut other = std::process::Command::new(std::env::current_exe().expect("this test"))
            .args([
                "--exact",
                "kernel::agent_socket::tests::connects_and_waits_for_a_line",
            ])
            .env(CONNECT_TO, &path)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("started");
        let (stream, _) = listener.accept().await.expect("accepted");
        let asker = Asker::of(&stream);
        assert_eq!(asker.pid, other.id().cast_signed());
        let process = files.proc.join(other.id().to_string());
        std::fs::create_dir_all(&process).expect("directory");
        let group = format!("8:pids:/docker/{ID}\n");
        std::fs::write(process.join("cgroup"), group).expect("file");
        assert!(asker.container(&files).is_some());
        drop(other.stdin.take());
        other.wait().expect("ended");
        // The number and its files are there, as those of a container's next process would be.
        let known = !matches!(asker.held, Err(nix::errno::Errno::ENOPROTOOPT));
        assert_eq!(asker.container(&files).is_none(), known);
        assert_eq!(Asker::of(&stream).container(&files).is_none(), known);
    }

    /// A container asks without end for a process that it does not have, on many connections: each
    /// time all its processes are looked through.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn questions_without_end_do_not_use_the_nodes_processors() {
        let directory = tempfile::tempdir().expect("directory");
        let files = host(directory.path());
        // The peer of this test's connections is this process: a member of the container.
        let group = files.cgroup.join("pids/docker").join(ID);
        let own = std::process::id().to_string();
        std::fs::create_dir_all(files.proc.join(&own)).expect("directory");
        std::fs::write(
            files.proc.join(&own).join("cgroup"),
            format!("8:pids:/docker/{ID}\n"),
        )
        .expect("file");
        let mut members = String::new();
        for pid in 10_000..10_300 {
            let process = files.proc.join(pid.to_string());
            std::fs::create_dir_all(&process).expect("directory");
            std::fs::write(process.join("status"), format!("NSpid:\t{pid}\t{pid}\n"))
                .expect("file");
            members.push_str(&format!("{pid}\n"));
        }
        std::fs::write(group.join("cgroup.procs"), members).expect("file");
        let peer = files.container_of(std::process::id().cast_signed());
        let peer = peer.expect("container");
        let look = |_| {
            let begun = Instant::now();
            assert_eq!(files.outer_pid(&peer, 1), None);
            begun.elapsed()
        };
        let once = (0..5).map(look).min().expect("looked");
        let options = AgentSocketOptions {
            directory: directory.path().join("sockets"),
            jail: false,
            files,
        };
        let path = options.directory.join(SOCKET_NAME);
        serve(options, CancellationToken::new()).expect("served");
        let until = Instant::now() + once * 60;
        let asking = (0..8).map(|_| {
            let path = path.clone();
            tokio::spawn(async move {
                let mut answers = 0;
                while Instant::now() < until {
                    let request: [&[u8]; 3] = [
                        b"container-pid-to-host-pid",
                        ID.as_bytes(),
                        &1_i32.to_ne_bytes(),
                    ];
                    answers += u32::from(ask(&path, &request).await == value(-1));
                }
                answers
            })
        });
        let mut answers = 0;
        for asking in asking.collect::<Vec<_>>() {
            answers += asking.await.expect("answered");
        }
        // A fifth of the time, and who waited when it ended: twenty. Unbounded it is sixty per core.
        assert!((1..=30).contains(&answers), "{answers} answers");
    }

    #[tokio::test]
    async fn connections_are_counted_by_container() {
        let server = Arc::new(Server {
            options: AgentSocketOptions {
                directory: PathBuf::new(),
                jail: false,
                files: KernelFiles::default(),
            },
            peers: Mutex::new(HashMap::new()),
        });
        let id: ContainerId = ID.parse().expect("id");
        let held: Vec<_> = (0..CONNECTIONS_PER_CONTAINER)
            .map(|_| server.admit(Some(id)).expect("room"))
            .collect();
        assert!(server.admit(Some(id)).is_none());
        assert!(server.admit(None).is_some(), "others are not affected");
        drop(held);
        assert!(server.admit(Some(id)).is_some());
        assert!(server.peers.lock().expect("lock").is_empty());
    }
}
