//! A Redis (or Valkey) server with its own directory, a gate in front of it, and a small client
//! that shares no code with the one under test.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use control::rpc::Value;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use crate::host_ports;

/// How a server is started.
#[derive(Clone, Debug, Default)]
pub struct RedisOptions {
    /// Lines of its configuration besides the usual ones.
    pub lines: Vec<String>,
    /// Password the client here logs in with.
    pub password: Option<String>,
    /// Run as a sentinel.
    pub sentinel: bool,
}

/// A running server; ends with the value.
#[derive(Debug)]
pub struct Redis {
    child: Option<Child>,
    directory: tempfile::TempDir,
    options: RedisOptions,
    program: PathBuf,
    /// Its port on 127.0.0.1.
    pub port: u16,
}

const REDIS: &str = "/usr/bin/redis-server";

/// Names another program for all servers: a suite is run on Valkey by
/// `BAI_TEST_REDIS=$(tests/scripts/valkey)`.
const CHOSEN: &str = "BAI_TEST_REDIS";

/// What the script answers where no Valkey can be had.
const UNAVAILABLE: i32 = 69;

/// Valkey's server: the machine's, or Debian's unpacked by `tests/scripts/valkey`; `None` (with the
/// reason printed as a skip) where that is not possible.
pub fn valkey(suite: &str) -> Result<Option<PathBuf>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/valkey");
    let output = Command::new(script)
        .output()
        .context("cannot run tests/scripts/valkey")?;
    let reason = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(UNAVAILABLE) {
        crate::skip::needs(format!("{suite}: {}", reason.trim()));
        return Ok(None);
    }
    ensure!(
        output.status.success(),
        "tests/scripts/valkey failed: {reason}"
    );
    let path = String::from_utf8(output.stdout).context("a path is UTF-8")?;
    Ok(Some(PathBuf::from(path.trim())))
}

impl Redis {
    /// Starts a server that keeps nothing on disk.
    pub fn start() -> Result<Self> {
        Self::start_with(RedisOptions::default())
    }

    /// Starts a server.
    pub fn start_with(options: RedisOptions) -> Result<Self> {
        let chosen = std::env::var_os(CHOSEN).map(PathBuf::from);
        let program = chosen.unwrap_or_else(|| PathBuf::from(REDIS));
        ensure!(
            program.exists(),
            "there is no {}; try: apt-get install redis-server",
            program.display()
        );
        Self::start_program(&program, options)
    }

    /// Starts a given program.
    pub fn start_program(program: &Path, options: RedisOptions) -> Result<Self> {
        let mut last = None;
        // Between the look for a free port and the server's bind it could be taken.
        for _ in 0..5 {
            let port = host_ports::one()?;
            let mut redis = Self {
                child: None,
                directory: tempfile::tempdir().context("directory of a Redis")?,
                options: options.clone(),
                program: program.to_owned(),
                port,
            };
            match redis.spawn() {
                Ok(()) => return Ok(redis),
                Err(err) => last = Some(err),
            }
        }
        Err(last.unwrap_or_else(|| anyhow::anyhow!("no attempt was made")))
    }

    fn spawn(&mut self) -> Result<()> {
        let file = self.directory.path().join("redis.conf");
        let mut config = format!(
            "port {}\nbind 127.0.0.1\ndaemonize no\nlogfile {}\ndir {}\n",
            self.port,
            self.directory.path().join("log").display(),
            self.directory.path().display()
        );
        if !self.options.sentinel {
            config.push_str("save \"\"\nappendonly no\n");
        }
        for line in &self.options.lines {
            config.push_str(line);
            config.push('\n');
        }
        std::fs::write(&file, config)?;
        let mut command = Command::new(&self.program);
        command.arg(&file);
        if self.options.sentinel {
            command.arg("--sentinel");
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until {
            if child.try_wait()?.is_some() {
                break;
            }
            if let Ok(mut client) = self.client()
                && client.ask(&["PING"]).is_ok()
            {
                self.child = Some(child);
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = child.kill();
        let _ = child.wait();
        let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        bail!("{} did not come up:\n{log}", self.program.display())
    }

    /// Kills the server at once; what it held is gone.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Starts it again on the same port, empty unless its options say otherwise.
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.spawn()
    }

    /// Stops it without ending it: it takes connections and answers nothing.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Lets it go on.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let child = self.child.as_ref().context("the server does not run")?;
        kill(Pid::from_raw(i32::try_from(child.id())?), signal).context("cannot signal Redis")
    }

    /// A new connection to database 0.
    pub fn client(&self) -> Result<RedisClient> {
        let mut client = RedisClient::connect(self.port)?;
        if let Some(password) = &self.options.password {
            client.ask(&["AUTH", password])?;
        }
        Ok(client)
    }

    /// The entries of the stream of events, oldest first: fields by position.
    pub fn stream(&self) -> Result<Vec<StreamEntry>> {
        let mut client = self.client()?;
        client.ask(&["SELECT", "4"])?;
        entries(&client.ask(&["XRANGE", "events", "-", "+"])?)
    }

    /// A manager that begins to read events now.
    pub fn manager(&self) -> Result<ManagerReader> {
        let mut client = self.client()?;
        client.ask(&["SELECT", "4"])?;
        // A group that is there is as good.
        let made = client.ask(&["XGROUP", "CREATE", "events", "manager", "$", "MKSTREAM"]);
        if let Err(err) = made {
            ensure!(err.to_string().contains("BUSYGROUP"), "{err}");
        }
        Ok(ManagerReader { client })
    }
}

/// Reads the stream as managers do: each entry once, from where their group is.
#[derive(Debug)]
pub struct ManagerReader {
    client: RedisClient,
}

impl ManagerReader {
    /// The next entries, at most 64; none when there are none for `wait`.
    pub fn read(&mut self, wait: Duration) -> Result<Vec<StreamEntry>> {
        let wait = wait.as_millis().max(1).to_string();
        let read = self.client.ask(&[
            "XREADGROUP",
            "GROUP",
            "manager",
            "a-manager",
            "COUNT",
            "64",
            "BLOCK",
            &wait,
            "STREAMS",
            "events",
            ">",
        ])?;
        match read {
            Answer::Nil => Ok(Vec::new()),
            streams => entries(streams.item(0)?.item(1)?),
        }
    }
}

fn entries(answer: &Answer) -> Result<Vec<StreamEntry>> {
    answer
        .items()?
        .iter()
        .map(|entry| {
            let fields = entry.item(1)?.items()?;
            let pairs: Vec<(String, Vec<u8>)> = fields
                .chunks_exact(2)
                .map(|pair| Ok((pair[0].text()?, pair[1].bytes()?.to_vec())))
                .collect::<Result<_>>()?;
            Ok(StreamEntry { fields: pairs })
        })
        .collect()
}

impl Drop for Redis {
    fn drop(&mut self) {
        // A stopped process is killed all the same.
        let _ = self.kill();
    }
}

/// One entry of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamEntry {
    /// Field names and values, in order.
    pub fields: Vec<(String, Vec<u8>)>,
}

impl StreamEntry {
    /// The value of a field as text.
    pub fn text(&self, name: &str) -> String {
        let value = self.fields.iter().find(|(field, _)| field == name);
        String::from_utf8_lossy(value.map_or(&[][..], |(_, value)| value)).into_owned()
    }

    /// The value of a field.
    pub fn bytes(&self, name: &str) -> &[u8] {
        let value = self.fields.iter().find(|(field, _)| field == name);
        value.map_or(&[][..], |(_, value)| value)
    }

    /// The arguments of an event; none of one that is sent with pickles.
    pub fn args(&self) -> Vec<Value> {
        let read = Value::decode(&Bytes::copy_from_slice(self.bytes("args")));
        let args = read.ok().and_then(|args| Some(args.as_array()?.to_vec()));
        args.unwrap_or_default()
    }
}

/// What a server answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing.
    Nil,
    /// A number.
    Int(i64),
    /// Text or bytes.
    Bytes(Vec<u8>),
    /// Several answers.
    Array(Vec<Answer>),
}

impl Answer {
    /// The bytes of a bulk or simple string.
    pub fn bytes(&self) -> Result<&[u8]> {
        match self {
            Answer::Bytes(bytes) => Ok(bytes),
            other => bail!("{other:?} instead of bytes"),
        }
    }

    /// The same as text.
    pub fn text(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(self.bytes()?).into_owned())
    }

    /// The answers of an array.
    pub fn items(&self) -> Result<&[Answer]> {
        match self {
            Answer::Array(items) => Ok(items),
            other => bail!("{other:?} instead of an array"),
        }
    }

    /// One answer of an array.
    pub fn item(&self, at: usize) -> Result<&Answer> {
        self.items()?.get(at).context("the array is too short")
    }

    /// A number.
    pub fn int(&self) -> Result<i64> {
        match self {
            Answer::Int(number) => Ok(*number),
            other => bail!("{other:?} instead of a number"),
        }
    }
}

/// A plain connection.
#[derive(Debug)]
pub struct RedisClient {
    stream: BufReader<TcpStream>,
}

impl RedisClient {
    /// Connects to a port of 127.0.0.1.
    pub fn connect(port: u16) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port)).context("no connection to Redis")?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Sends a command and reads its answer; an error answer is an error.
    pub fn ask<A: AsRef<[u8]>>(&mut self, arguments: &[A]) -> Result<Answer> {
        let mut request = format!("*{}\r\n", arguments.len()).into_bytes();
        for argument in arguments {
            let argument = argument.as_ref();
            request.extend(format!("${}\r\n", argument.len()).into_bytes());
            request.extend(argument);
            request.extend(b"\r\n");
        }
        self.stream.get_mut().write_all(&request)?;
        self.read()
    }

    /// Reads the next answer, for one a message of a subscription.
    pub fn read(&mut self) -> Result<Answer> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let line = line.trim_end();
        ensure!(!line.is_empty(), "the server closed the connection");
        let rest = &line[1..];
        Ok(match line.as_bytes()[0] {
            b'+' => Answer::Bytes(rest.as_bytes().to_vec()),
            b'-' => bail!("Redis refuses: {rest}"),
            b':' => Answer::Int(rest.parse()?),
            b'$' | b'*' if rest == "-1" => Answer::Nil,
            b'$' => {
                let mut bytes = vec![0; rest.parse::<usize>()? + 2];
                self.stream.read_exact(&mut bytes)?;
                bytes.truncate(bytes.len() - 2);
                Answer::Bytes(bytes)
            }
            b'*' => Answer::Array(
                (0..rest.parse::<usize>()?)
                    .map(|_| self.read())
                    .collect::<Result<_>>()?,
            ),
            other => bail!("unknown answer {other}"),
        })
    }
}

/// A gate before a server: open it forwards, shut it holds everything back without a sign, as a
/// network that drops packets does.
#[derive(Debug)]
pub struct Gate {
    shut: Arc<AtomicBool>,
    server: Arc<AtomicU16>,
    ended: CancellationToken,
    /// Its port on 127.0.0.1.
    pub port: u16,
}

impl Gate {
    /// A gate before a port of 127.0.0.1.
    pub async fn before(server: u16) -> Result<Self> {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
        let port = listener.local_addr()?.port();
        let shut = Arc::new(AtomicBool::new(false));
        let target = Arc::new(AtomicU16::new(server));
        let server = target.clone();
        let ended = CancellationToken::new();
        let (held, end) = (shut.clone(), ended.clone());
        tokio::spawn(async move {
            loop {
                let client = tokio::select! {
                    accepted = listener.accept() => match accepted {
                        Ok((client, _)) => client,
                        Err(_) => return,
                    },
                    () = end.cancelled() => return,
                };
                let (held, end) = (held.clone(), end.clone());
                let target = target.load(Ordering::SeqCst);
                tokio::spawn(async move {
                    tokio::select! {
                        () = carry(client, target, held) => {}
                        () = end.cancelled() => {}
                    }
                });
            }
        });
        Ok(Self {
            shut,
            server,
            ended,
            port,
        })
    }

    /// Leads new connections to another port, as a name or a virtual address that moves does;
    /// those that are there stay.
    pub fn lead_to(&self, server: u16) {
        self.server.store(server, Ordering::SeqCst);
    }

    /// Holds everything back from now on.
    pub fn shut(&self) {
        self.shut.store(true, Ordering::SeqCst);
    }

    /// Lets through what was held back, and all that comes.
    pub fn open(&self) {
        self.shut.store(false, Ordering::SeqCst);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.ended.cancel();
    }
}

async fn carry(client: tokio::net::TcpStream, server: u16, shut: Arc<AtomicBool>) {
    if shut.load(Ordering::SeqCst) {
        while shut.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // What others have sent before comes first, or nobody could know of it.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let Ok(server) = tokio::net::TcpStream::connect(("127.0.0.1", server)).await else {
        return;
    };
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    tokio::select! {
        () = pump(client_read, server_write, &shut) => {}
        () = pump(server_read, client_write, &shut) => {}
    }
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    shut: &AtomicBool,
) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let Ok(read) = from.read(&mut buffer).await else {
            return;
        };
        // What was read while the gate is shut is on its way; it arrives later or never.
        while shut.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if read == 0 || to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
