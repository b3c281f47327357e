//! Real etcd servers for a test: one or several members, with users or TLS, that can be stopped, paused and
//! started again on the same ports and data.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::node::free_port;
use crate::wait;

const LIMIT: Duration = Duration::from_secs(60);

/// What a test wants of its servers.
#[derive(Debug, Clone, Copy, Default)]
pub struct EtcdOptions {
    /// How many members; 0 counts as 1.
    pub members: usize,
    /// Whether clients must use TLS and show a certificate of the same authority.
    pub tls: bool,
}

#[derive(Debug)]
struct Member {
    name: String,
    client_port: u16,
    peer_port: u16,
    child: Option<Child>,
}

/// A running etcd. Dropping it stops every member and removes the data.
#[derive(Debug)]
pub struct EtcdServer {
    directory: TempDir,
    members: Vec<Member>,
    tls: bool,
    /// With the peers' addresses it makes the cluster's id.
    token: String,
}

impl EtcdServer {
    /// One member without users and encryption.
    pub async fn start() -> Result<EtcdServer> {
        Self::start_with(EtcdOptions::default()).await
    }

    /// Starts the members and waits until the first answers.
    pub async fn start_with(options: EtcdOptions) -> Result<EtcdServer> {
        let directory = tempfile::Builder::new()
            .prefix("bai-etcd-")
            .tempdir_in("/dev/shm")
            .context("no directory on tmpfs")?;
        let members = (0..options.members.max(1))
            .map(|number| {
                Ok(Member {
                    name: format!("m{number}"),
                    client_port: free_port()?,
                    peer_port: free_port()?,
                    child: None,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let mut server = EtcdServer {
            directory,
            members,
            tls: options.tls,
            token: "first".to_owned(),
        };
        if options.tls {
            make_certificates(server.directory.path())?;
        }
        for number in 0..server.members.len() {
            server.spawn(number)?;
        }
        server.wait_ready(0).await?;
        Ok(server)
    }

    /// `host:port` of each member.
    pub fn addresses(&self) -> Vec<String> {
        self.members
            .iter()
            .map(|member| format!("127.0.0.1:{}", member.client_port))
            .collect()
    }

    /// The `[etcd]` section for a namespace, with the certificates when there are any.
    pub fn section(&self, namespace: &str) -> String {
        let addresses: Vec<String> = self
            .members
            .iter()
            .map(|member| format!("{{ host = \"127.0.0.1\", port = {} }}", member.client_port))
            .collect();
        let mut section = format!(
            "[etcd]\nnamespace = \"{namespace}\"\naddr = [{}]\n",
            addresses.join(", ")
        );
        if self.tls {
            let file = |name: &str| self.certificate(name).display().to_string();
            section += &format!(
                "tls = true\ntls-ca-file = \"{}\"\ntls-cert-file = \"{}\"\ntls-key-file = \"{}\"\n",
                file("ca.pem"),
                file("client.pem"),
                file("client.key"),
            );
        }
        section
    }

    /// A file made for TLS: `ca.pem`, `server.pem`, `client.pem` and their keys.
    pub fn certificate(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A client of our own, to look from outside.
    pub async fn client(&self) -> Result<Client> {
        self.client_of(0, None).await
    }

    /// A client with a log-in.
    pub async fn client_as(&self, user: &str, password: &str) -> Result<Client> {
        self.client_of(0, Some((user, password))).await
    }

    async fn client_of(&self, number: usize, login: Option<(&str, &str)>) -> Result<Client> {
        let mut options = ConnectOptions::new().with_timeout(Duration::from_secs(10));
        if let Some((user, password)) = login {
            options = options.with_user(user, password);
        }
        let mut scheme = "http";
        if self.tls {
            scheme = "https";
            let read = |name: &str| std::fs::read(self.certificate(name));
            options = options.with_tls(
                TlsOptions::new()
                    .ca_certificate(Certificate::from_pem(read("ca.pem")?))
                    .identity(Identity::from_pem(read("client.pem")?, read("client.key")?)),
            );
        }
        let port = self.members[number].client_port;
        let endpoint = format!("{scheme}://127.0.0.1:{port}");
        Client::connect([endpoint], Some(options))
            .await
            .context("etcd can't be reached")
    }

    /// Every key and value, sorted by key.
    pub async fn dump(&self) -> Result<Vec<(String, String)>> {
        let mut client = self.client().await?;
        let options = etcd_client::GetOptions::new().with_all_keys();
        let answer = client.get("", Some(options)).await?;
        answer
            .kvs()
            .iter()
            .map(|pair| Ok((pair.key_str()?.to_owned(), pair.value_str()?.to_owned())))
            .collect()
    }

    fn spawn(&mut self, number: usize) -> Result<()> {
        let cluster: Vec<String> = self
            .members
            .iter()
            .map(|member| format!("{}=http://127.0.0.1:{}", member.name, member.peer_port))
            .collect();
        let scheme = if self.tls { "https" } else { "http" };
        let member = &self.members[number];
        ensure!(member.child.is_none(), "the member runs already");
        let client_url = format!("{scheme}://127.0.0.1:{}", member.client_port);
        let peer_url = format!("http://127.0.0.1:{}", member.peer_port);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.directory.path().join(format!("{}.log", member.name)))?;
        let mut command = Command::new("etcd");
        command
            .arg("--data-dir")
            .arg(self.directory.path().join(&member.name))
            .args(["--name", &member.name])
            .args(["--listen-client-urls", &client_url])
            .args(["--advertise-client-urls", &client_url])
            .args(["--listen-peer-urls", &peer_url])
            .args(["--initial-advertise-peer-urls", &peer_url])
            .args(["--initial-cluster", &cluster.join(",")])
            .args(["--initial-cluster-state", "new"])
            .args(["--initial-cluster-token", &self.token])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        if self.tls {
            command
                .arg("--client-cert-auth")
                .arg("--trusted-ca-file")
                .arg(self.certificate("ca.pem"))
                .arg("--cert-file")
                .arg(self.certificate("server.pem"))
                .arg("--key-file")
                .arg(self.certificate("server.key"));
        }
        let child = command
            .spawn()
            .context("etcd can't be started; install etcd-server (deploy/setup test)")?;
        self.members[number].child = Some(child);
        Ok(())
    }

    async fn wait_ready(&self, number: usize) -> Result<()> {
        let ready = wait::until("etcd answers", LIMIT, || async {
            // A server with users refuses this read, which is an answer too.
            let mut client = self.client_of(number, None).await.ok()?;
            match client.get("/", None).await {
                Ok(_) => Some(()),
                Err(etcd_client::Error::GRpcStatus(status))
                    if status.message().contains("user name is empty") =>
                {
                    Some(())
                }
                Err(_) => None,
            }
        });
        if let Err(error) = ready.await {
            let log = self.directory.path().join("m0.log");
            let log = std::fs::read_to_string(log).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(20).collect();
            anyhow::bail!(
                "{error}; the end of its log, last line first:\n{}",
                tail.join("\n")
            );
        }
        Ok(())
    }

    fn signal(&self, number: usize, signal: Signal) -> Result<()> {
        let child = self.members[number].child.as_ref();
        let pid = child.context("the member is stopped")?.id();
        kill(Pid::from_raw(i32::try_from(pid)?), signal).context("the member is gone")
    }

    /// Kills a member.
    pub fn stop(&mut self, number: usize) {
        if let Some(mut child) = self.members[number].child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts a stopped member on its ports and data, and waits until it answers.
    pub async fn restart(&mut self, number: usize) -> Result<()> {
        self.spawn(number)?;
        self.wait_ready(number).await
    }

    /// Stops a member and forgets its data.
    pub fn wipe(&mut self, number: usize) -> Result<()> {
        self.stop(number);
        std::fs::remove_dir_all(self.directory.path().join(&self.members[number].name))
            .context("the data can't be removed")
    }

    /// Stops a member and forgets its data; the next start makes a cluster with another id.
    pub fn make_anew(&mut self, number: usize) -> Result<()> {
        self.token.push_str("-next");
        self.wipe(number)
    }

    /// Starts a stopped member on its data under another client port, where nobody but the test looks for it, and
    /// gives a client of it. [`EtcdServer::stop`] ends it.
    pub async fn moved_aside(&mut self, number: usize) -> Result<Client> {
        let known = self.members[number].client_port;
        self.members[number].client_port = free_port()?;
        let started = self.restart(number).await;
        let client = self.client_of(number, None).await;
        self.members[number].client_port = known;
        started?;
        client
    }

    /// Leaves a member running without an answer to anything.
    pub fn pause(&self, number: usize) -> Result<()> {
        self.signal(number, Signal::SIGSTOP)
    }

    /// Ends a pause.
    pub fn resume(&self, number: usize) -> Result<()> {
        self.signal(number, Signal::SIGCONT)
    }

    /// The number of the member that leads.
    pub async fn leader(&self) -> Result<usize> {
        wait::until("a leader is known", LIMIT, || async {
            for number in 0..self.members.len() {
                if self.members[number].child.is_none() {
                    continue;
                }
                let Ok(mut client) = self.client_of(number, None).await else {
                    continue;
                };
                let Ok(status) = client.status().await else {
                    continue;
                };
                let own = status.header().map(|header| header.member_id());
                if own == Some(status.leader()) {
                    return Some(number);
                }
            }
            None
        })
        .await
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        for number in 0..self.members.len() {
            self.stop(number);
        }
    }
}

/// An authority, and certificates of it for the server and for a client.
fn make_certificates(directory: &Path) -> Result<()> {
    let openssl = |args: &[&str]| -> Result<()> {
        let output = Command::new("openssl")
            .args(args)
            .current_dir(directory)
            .output()
            .context("openssl can't be started; install openssl (deploy/setup test)")?;
        ensure!(
            output.status.success(),
            "openssl {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    };
    let curve = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
    ];
    let authority = [
        "req",
        "-x509",
        "-days",
        "2",
        "-subj",
        "/CN=test authority",
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
    ];
    openssl(&[&authority[..], &curve[..]].concat())?;
    std::fs::write(
        directory.join("extensions"),
        "subjectAltName=IP:127.0.0.1,DNS:localhost,DNS:etcd.test\nextendedKeyUsage=serverAuth,clientAuth\n",
    )?;
    for name in ["server", "client"] {
        let (key, request, certificate) = (
            format!("{name}.key"),
            format!("{name}.csr"),
            format!("{name}.pem"),
        );
        let subject = format!("/CN={name}");
        let request_args = ["req", "-subj", &subject, "-keyout", &key, "-out", &request];
        openssl(&[&request_args[..], &curve[..]].concat())?;
        openssl(&[
            "x509",
            "-req",
            "-days",
            "2",
            "-in",
            &request,
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-extfile",
            "extensions",
            "-out",
            &certificate,
        ])?;
    }
    Ok(())
}
