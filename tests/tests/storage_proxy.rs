//! A storage proxy that misbehaves. How the published one answers is shown by `make compat`.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use control::storage_proxy::{FolderId, ProxyClient, ProxyError};
use harness::images::Image;
use harness::kernels::{self, Order};
use harness::node::{Node, NodeOptions};
use harness::{scrape, wait};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

const SECRET: &str = "the-secret-of-the-storage-proxy";
const FOLDER: &str = "user:f38dea23-50fa-42a0-b5ae-338f5f4693f4/0123456789abcdef0123456789abcdef";
const PATIENCE: Duration = Duration::from_secs(60);

/// What happens to a request.
#[derive(Clone, Debug)]
enum Fault {
    /// Taken and not answered.
    Hang,
    /// The connection closes.
    Close,
    /// Answered with these bytes.
    Bytes(Vec<u8>),
    /// A byte now and then, for ever.
    Trickle,
}

#[derive(Debug, Default)]
struct State {
    answers: BTreeMap<String, Value>,
    fault: Option<Fault>,
    /// Path, token and body of each.
    requests: Vec<(String, String, String)>,
}

/// Answers with fixed documents, or as badly as it is told to.
#[derive(Debug)]
struct Fake {
    state: Arc<Mutex<State>>,
    port: u16,
    task: JoinHandle<()>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fake {
    async fn start(volume: &Path, tls: Option<TlsAcceptor>) -> Result<Fake> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let port = listener.local_addr()?.port();
        let answers = [
            (
                "/status",
                json!({"status": "ok", "type": "manager-facing", "storage-proxy": "25.15.8"}),
            ),
            (
                "/volumes",
                json!({"volumes": [{"name": "vol", "backend": "vfs", "path": volume, "fsprefix": "", "capabilities": ["vfolder"]}]}),
            ),
            (
                "/volume/hwinfo",
                json!({"status": "degraded", "status_info": "a disk is lost", "metadata": {}}),
            ),
            (
                "/folder/fs-usage",
                json!({"capacity_bytes": 1000, "used_bytes": 400}),
            ),
            (
                "/folder/usage",
                json!({"file_count": 3, "used_bytes": 2048}),
            ),
            (
                "/quota-scope",
                json!({"used_bytes": 4096, "limit_bytes": null}),
            ),
        ];
        let answers = answers.map(|(path, answer)| (path.to_owned(), answer));
        let state = Arc::new(Mutex::new(State {
            answers: answers.into(),
            ..State::default()
        }));
        let shared = state.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (state, tls) = (shared.clone(), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        Some(tls) => match tls.accept(stream).await {
                            Ok(stream) => exchange(stream, &state).await,
                            Err(_) => Some(()),
                        },
                        None => exchange(stream, &state).await,
                    }
                });
            }
        });
        Ok(Fake { state, port, task })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spoil(&self, fault: impl Into<Option<Fault>>) {
        self.state().fault = fault.into();
    }

    fn requests(&self) -> Vec<(String, String, String)> {
        std::mem::take(&mut self.state().requests)
    }
}

async fn exchange(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    state: &Mutex<State>,
) -> Option<()> {
    let mut taken = Vec::new();
    let (head, length) = loop {
        let mut part = [0; 4096];
        let count = stream.read(&mut part).await.ok().filter(|it| *it > 0)?;
        taken.extend_from_slice(&part[..count]);
        let text = String::from_utf8_lossy(&taken).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let header = |name: &str| {
                let lines = head.lines().filter_map(|line| line.split_once(": "));
                let mut found = lines.filter(|(key, _)| key.eq_ignore_ascii_case(name));
                found.next().map(|(_, value)| value.to_owned())
            };
            let length: usize = header("content-length").map_or(0, |it| it.parse().unwrap_or(0));
            if body.len() >= length {
                let token = header("x-backendai-storage-auth-token").unwrap_or_default();
                break ((head.to_owned(), token, body.to_owned()), length);
            }
        }
    };
    let (head, token, body) = head;
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let (fault, answer) = {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.requests.push((path.clone(), token.clone(), body));
        (state.fault.clone(), state.answers.get(&path).cloned())
    };
    let reply = match fault {
        // Until it is told to behave in another way.
        Some(Fault::Hang) => {
            while matches!(
                state.lock().unwrap_or_else(PoisonError::into_inner).fault,
                Some(Fault::Hang)
            ) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            return None;
        }
        Some(Fault::Close) => return None,
        Some(Fault::Bytes(bytes)) => bytes,
        Some(Fault::Trickle) => {
            stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n")
                .await
                .ok()?;
            loop {
                stream.write_all(b" ").await.ok()?;
                stream.flush().await.ok()?;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        None if token != SECRET => answered(403, "Forbidden", "403: Forbidden"),
        // Parameters come in a body, whatever the method; without one there is an error of its JSON reader.
        None => match answer {
            Some(answer) if path == "/volumes" || path == "/status" || length > 0 => {
                answered(200, "OK", &answer.to_string())
            }
            Some(_) => answered(500, "Internal Server Error", "no parameters"),
            None => answered(404, "Not Found", r#"{"title": "nothing there"}"#),
        },
    };
    stream.write_all(&reply).await.ok()?;
    stream.shutdown().await.ok()
}

fn answered(status: u16, reason: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")
        .into_bytes()
}

/// A directory with the secret in it.
fn secret() -> Result<(TempDir, PathBuf)> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("secret");
    std::fs::write(&file, format!("{SECRET}\n"))?;
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600))?;
    Ok((directory, file))
}

fn client(
    url: &str,
    secret: &Path,
    ca_file: Option<PathBuf>,
    timeout: Duration,
) -> Result<ProxyClient> {
    Ok(ProxyClient::new(&config::StorageProxy {
        url: url.parse().context("a URL")?,
        secret_file: secret.to_owned(),
        ca_file,
        timeout,
        interval: PATIENCE,
    }))
}

fn chain(err: &ProxyError) -> String {
    control::causes::chain(err)
}

#[tokio::test]
async fn questions_are_asked_with_the_secret_and_their_parameters() -> Result<()> {
    let fake = Fake::start(Path::new("/mnt/vol"), None).await?;
    let (_directory, secret) = secret()?;
    let url = format!("http://127.0.0.1:{}", fake.port);
    let client = client(&url, &secret, None, PATIENCE)?;
    let folder = FolderId::parse(FOLDER).context("a folder's id")?;
    assert_eq!(client.version().await?, "25.15.8");
    let volumes = client.volumes().await?;
    assert_eq!(
        (volumes[0].name.as_str(), volumes[0].path.as_str()),
        ("vol", "/mnt/vol")
    );
    let health = client.health("vol").await?;
    assert_eq!(health.status, "degraded");
    assert_eq!(health.words.as_deref(), Some("a disk is lost"));
    assert_eq!(client.space("vol").await?.capacity, Some(1000));
    let usage = client.usage("vol", &folder).await?;
    assert_eq!((usage.files, usage.used), (Some(3), Some(2048)));
    let quota = client
        .quota("vol", folder.scope().context("a scope")?)
        .await?;
    assert_eq!((quota.used, quota.limit), (Some(4096), None));
    let requests = fake.requests();
    assert!(requests.iter().all(|(_, token, _)| token == SECRET));
    let asked: Vec<(&str, &str)> = requests
        .iter()
        .map(|(path, _, body)| (path.as_str(), body.as_str()))
        .collect();
    assert_eq!(
        asked,
        [
            ("/status", ""),
            ("/volumes", ""),
            ("/volume/hwinfo", r#"{"volume":"vol"}"#),
            ("/folder/fs-usage", r#"{"volume":"vol"}"#),
            (
                "/folder/usage",
                &format!(r#"{{"volume":"vol","vfid":"{FOLDER}"}}"#)
            ),
            (
                "/quota-scope",
                r#"{"volume":"vol","qsid":"user:f38dea23-50fa-42a0-b5ae-338f5f4693f4"}"#
            ),
        ]
    );
    Ok(())
}

#[tokio::test]
async fn each_fault_ends_in_time_in_words_and_without_the_secret() -> Result<()> {
    let fake = Fake::start(Path::new("/mnt/vol"), None).await?;
    let elsewhere = Fake::start(Path::new("/mnt/vol"), None).await?;
    let (_directory, secret) = secret()?;
    let url = format!("http://127.0.0.1:{}", fake.port);
    let quick = client(&url, &secret, None, Duration::from_millis(300))?;
    let client = client(&url, &secret, None, PATIENCE)?;
    let folder = FolderId::parse(FOLDER).context("a folder's id")?;
    let redirect = format!(
        "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{}/folder/usage\r\nContent-Length: 0\r\n\r\n",
        elsewhere.port
    );
    let echo = answered(200, "OK", &format!("<html>{SECRET}"));
    let huge = vec![b' '; 2 << 20];
    let endless_head = [
        b"HTTP/1.1 200 OK\r\n".as_slice(),
        &b"a: b\r\n".repeat(100_000),
    ]
    .concat();
    for (fault, client, words, of_proxy) in [
        (
            Fault::Hang,
            &quick,
            "did not answer a folder's usage within 300ms",
            true,
        ),
        (Fault::Trickle, &quick, "did not answer", true),
        (Fault::Close, &client, "broke off", true),
        (
            Fault::Bytes(b"SSH-2.0-x\r\n".to_vec()),
            &client,
            "not HTTP",
            true,
        ),
        (Fault::Bytes(endless_head), &client, "not HTTP", true),
        (
            Fault::Bytes(answered(401, "Unauthorized", "")),
            &client,
            "secret-file (401)",
            true,
        ),
        (
            Fault::Bytes(answered(403, "Forbidden", "403")),
            &client,
            "secret-file (403)",
            true,
        ),
        (
            Fault::Bytes(redirect.into_bytes()),
            &client,
            "redirection (302)",
            true,
        ),
        (
            Fault::Bytes(echo),
            &client,
            "not what 25.15.8 answers",
            true,
        ),
        (
            Fault::Bytes(answered(200, "OK", &String::from_utf8(huge)?)),
            &client,
            "longer than 1048576 bytes",
            false,
        ),
        (
            Fault::Bytes(answered(
                404,
                "Not Found",
                r#"{"title": "no such\u001b[2J folder"}"#,
            )),
            &client,
            "(404: no such[2J folder)",
            false,
        ),
        (
            Fault::Bytes(answered(
                500,
                "Storage server is busy. Please try again",
                "",
            )),
            &client,
            "(500: Storage server is busy. Please try again)",
            false,
        ),
    ] {
        fake.spoil(fault.clone());
        let err = match client.usage("vol", &folder).await {
            Ok(usage) => anyhow::bail!("{fault:?} gave {usage:?}"),
            Err(err) => err,
        };
        let told = chain(&err);
        assert!(told.contains(words), "{told}");
        assert!(!told.contains(SECRET), "{told}");
        assert!(!format!("{err:?} {client:?}").contains(SECRET));
        assert_eq!(err.is_of_proxy(), of_proxy, "{told}");
    }
    assert_eq!(elsewhere.requests(), [], "no redirection is followed");
    // And well again, by the same client.
    fake.spoil(None);
    assert_eq!(client.usage("vol", &folder).await?.used, Some(2048));
    // Nobody there.
    let port = fake.port;
    drop(fake);
    let gone = wait::until("the fake is gone", PATIENCE, || async {
        match client.volumes().await {
            Err(err @ ProxyError::Connect { .. }) => Some(chain(&err)),
            _ => None,
        }
    })
    .await?;
    assert!(gone.contains(&format!("127.0.0.1:{port}")), "{gone}");
    // A secret that others may read is not used, and one that changed is.
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o644))?;
    let told = chain(&client.volumes().await.err().context("an error")?);
    assert!(
        told.contains("0644") && told.contains("chmod 0600") && !told.contains(SECRET),
        "{told}"
    );
    Ok(())
}

/// A certificate for the name and its key.
fn certificate(directory: &Path, name: &str) -> Result<()> {
    let made = Command::new("openssl")
        .current_dir(directory)
        .args(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2".split(' '),
        )
        .args([
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
            "-subj",
            "/CN=storage",
        ])
        .args(["-addext", &format!("subjectAltName={name}")])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .output()
        .context("openssl can't be started; install openssl (deploy/setup test)")?;
    ensure!(
        made.status.success(),
        "openssl: {}",
        String::from_utf8_lossy(&made.stderr)
    );
    Ok(())
}

fn acceptor(directory: &Path) -> Result<TlsAcceptor> {
    let chain =
        CertificateDer::pem_file_iter(directory.join("cert.pem"))?.collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_file(directory.join("key.pem"))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[tokio::test]
async fn a_proxy_with_a_certificate_is_trusted_only_as_told() -> Result<()> {
    let (directory, secret) = secret()?;
    certificate(directory.path(), "IP:127.0.0.1")?;
    let ca = directory.path().join("cert.pem");
    let fake = Fake::start(Path::new("/mnt/vol"), Some(acceptor(directory.path())?)).await?;
    let url = format!("https://127.0.0.1:{}", fake.port);
    let trusting = client(&url, &secret, Some(ca.clone()), PATIENCE)?;
    assert_eq!(trusting.volumes().await?[0].name, "vol");
    fake.requests();
    // Neither by another name, nor with other authorities, nor without encryption.
    let named = client(
        &format!("https://localhost:{}", fake.port),
        &secret,
        Some(ca),
        PATIENCE,
    )?;
    let other = tempfile::tempdir()?;
    certificate(other.path(), "IP:127.0.0.1")?;
    let other = client(&url, &secret, Some(other.path().join("cert.pem")), PATIENCE)?;
    for client in [named, other] {
        let err = client.volumes().await.err().context("an error")?;
        assert!(matches!(err, ProxyError::Tls { .. }), "{}", chain(&err));
    }
    let plain = format!("http://127.0.0.1:{}", fake.port);
    let plain = client(&plain, &secret, None, PATIENCE)?;
    assert!(plain.volumes().await.is_err());
    assert_eq!(fake.requests(), [], "the secret was told to nobody");
    Ok(())
}

fn folders(node: &Node) -> Option<Value> {
    let output = node
        .command(&["kernel", "folders", "--output", "json"])
        .ok()?;
    serde_json::from_slice(&output.stdout).ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_shows_its_folders_and_never_waits_for_the_proxy() -> Result<()> {
    let (directory, secret) = secret()?;
    let volume = directory.path().join("vol");
    let place = volume.join("a/folder");
    std::fs::create_dir_all(&place)?;
    let fake = Fake::start(&volume, None).await?;
    let node = Node::start(NodeOptions {
        sections: format!(
            "[node.storage-proxy]\nurl = \"http://127.0.0.1:{}\"\nsecret-file = \"{}\"\ntimeout = \"5m\"\ninterval = \"2s\"\n",
            fake.port,
            secret.display()
        ),
        ..NodeOptions::default()
    })
    .await?;
    let mount = |name: &str, vfid: Value, source: &Path| {
        json!({"name": name, "vfid": vfid, "vfsubpath": ".", "host_path": source.display().to_string(),
            "kernel_path": format!("/home/work/{name}"), "mount_perm": "rw", "usage_mode": "general"})
    };
    let mut order = Order::of(Image::Runner)?;
    let other = tempfile::tempdir()?;
    order.config["mounts"] = json!([
        mount("data", json!(FOLDER), &place),
        mount("nameless", Value::Null, &place),
        mount(
            "astray",
            json!(FOLDER.replace("0123", "4567")),
            other.path()
        ),
    ]);
    kernels::create(&node, &order).await?;
    let shown = wait::until("the folder is known", PATIENCE, || async {
        folders(&node).filter(|shown| {
            let first = &shown["folders"][0];
            first["used_bytes"] == 2048
                && first["quota"]["used_bytes"] == 4096
                && shown["volumes"][0]["health"] == "degraded"
        })
    })
    .await?;
    let list = shown["folders"].as_array().context("a list")?;
    assert_eq!(list.len(), 3, "{shown}");
    assert_eq!(
        (&list[0]["volume"], &list[0]["files"]),
        (&json!("vol"), &json!(3))
    );
    assert_eq!(list[1]["error"], "the manager sent no id for it");
    assert!(
        list[2]["error"]
            .as_str()
            .is_some_and(|it| it.contains("no volume")),
        "{shown}"
    );
    let text = node.command(&["kernel", "folders", &order.kernel.to_string()])?;
    let text = String::from_utf8(text.stdout)?;
    assert!(
        text.contains("2.00 KiB") && text.contains("volume vol is degraded (a disk is lost)"),
        "{text}"
    );
    let page = scrape::page(node.http_address())?;
    let value = |series: &str| scrape::value(&page, series, "");
    assert_eq!(value("bai_storage_proxy_up"), Some(1.0));
    assert_eq!(
        scrape::value(
            &page,
            "bai_vfolder_used_bytes",
            &format!("volume=\"vol\",vfolder=\"{FOLDER}\"")
        ),
        Some(2048.0)
    );
    assert_eq!(
        scrape::value(
            &page,
            "bai_vfolder_mounted",
            &format!("name=\"data\",kernel_id=\"{}\"", order.kernel)
        ),
        Some(1.0)
    );
    assert_eq!(value("bai_volume_healthy"), Some(0.0));
    assert_eq!(value("bai_quota_scope_limit_bytes"), None);

    // It hangs: old figures stand with their age, and a kernel is made as ever.
    fake.spoil(Fault::Hang);
    fake.requests();
    wait::until("a question hangs", PATIENCE, || async {
        (!fake.requests().is_empty()).then_some(())
    })
    .await?;
    let mut second = Order::of(Image::Runner)?;
    second.config["mounts"] = json!([mount("data", json!(FOLDER), &place)]);
    kernels::create(&node, &second).await?;
    kernels::destroy(&node, &second).await?;
    assert_eq!(fake.requests(), [], "the one question still hangs");
    // It refuses the secret: told by `status`, and the figures are still there.
    fake.spoil(Fault::Bytes(answered(403, "Forbidden", "")));
    let status = wait::until("the trouble is told", PATIENCE, || async {
        let output = node.command(&["status"]).ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        text.contains("(403)").then_some(text)
    })
    .await?;
    assert!(status.contains("does not answer for"), "{status}");
    let shown = folders(&node).context("folders")?;
    assert_eq!(shown["folders"][0]["used_bytes"], 2048);
    assert_eq!(shown["storage_proxy"]["answers"], false);
    let page = scrape::page(node.http_address())?;
    assert_eq!(scrape::value(&page, "bai_storage_proxy_up", ""), Some(0.0));
    let doctor = node.command(&[
        "doctor",
        "--config",
        &node.config_file().display().to_string(),
    ])?;
    let doctor = String::from_utf8(doctor.stdout)?;
    assert!(
        doctor.contains("storage proxy") && doctor.contains("(403)"),
        "{doctor}"
    );

    // Well again; and what is not mounted any more has no series.
    fake.spoil(None);
    wait::until("it answers again", PATIENCE, || async {
        (folders(&node)?["storage_proxy"]["answers"] == true).then_some(())
    })
    .await?;
    kernels::destroy(&node, &order).await?;
    wait::until("the series are gone", PATIENCE, || async {
        let page = scrape::page(node.http_address()).ok()?;
        (!page.contains("bai_vfolder_") && !page.contains("bai_volume_")).then_some(())
    })
    .await?;
    let log = node.log("bai-agent");
    assert!(!log.contains(SECRET), "{log}");
    assert!(log.contains("the storage proxy answers again"), "{log}");
    Ok(())
}
