//! Asking the storage proxy's manager-facing API (25.15.8) about folders, quota scopes and volumes.
//!
//! In: a question. Out: its answer, or a [`ProxyError`] that says what to do. Invariants: one
//! connection for one question, and one deadline from the look into the secret's file to the last
//! byte; an answer is read up to a limit; no redirection is followed, so the secret goes to the
//! configured place only; neither the secret nor an answer's raw text gets into an error.
//!
//! Questions are GET requests with parameters in a JSON body: that is how this API wants them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde::de::DeserializeOwned;
use serde_json::{Value as Json, json};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::OnceCell;
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

use super::answers::{FolderUsage, Quota, Refusal, Space, Status, Volume, VolumeHealth, Volumes};
use super::folder::FolderId;
use crate::blocking::blocking;
use config::{ProxyUrl, SecretFileError, read_secret_file};

/// The header that carries the secret.
const TOKEN: &str = "x-backendai-storage-auth-token";
/// The largest answer read: the list of a hundred volumes takes 30 KiB.
const ANSWER_LIMIT: usize = 1 << 20;
/// The largest head of an answer.
const HEAD_LIMIT: usize = 16 << 10;

/// Why a question has no answer.
#[derive(Debug, Error)]
pub enum ProxyError {
    /// The secret cannot be read.
    #[error("cannot read the storage proxy's secret in {path}", path = path.display())]
    SecretFile {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        #[source]
        source: SecretFileError,
    },
    /// The authorities to trust cannot be had.
    #[error("cannot read the authorities to trust{}", in_file(path.as_deref()))]
    Authorities {
        /// The configured file; none for the system's.
        path: Option<PathBuf>,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The host is no name a certificate can be for.
    #[error("{host} is no name of a TLS server; correct node.storage-proxy.url")]
    ServerName {
        /// The host.
        host: String,
        /// Why.
        #[source]
        source: InvalidDnsNameError,
    },
    /// Nobody listens there, or the host is away.
    #[error(
        "cannot connect to the storage proxy at {place}; see that it runs, and node.storage-proxy.url"
    )]
    Connect {
        /// Where.
        place: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not who it should be, or speaks no TLS.
    #[error("no TLS with the storage proxy at {place}; see node.storage-proxy.ca-file")]
    Tls {
        /// Where.
        place: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It takes too long.
    #[error("the storage proxy did not answer {what} within {after:?}")]
    Timeout {
        /// What was asked.
        what: &'static str,
        /// How long it had.
        after: Duration,
    },
    /// The connection broke, or what came is not HTTP.
    #[error("the storage proxy's answer to {what} broke off or is not HTTP")]
    Broken {
        /// What was asked.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The secret is not its secret.
    #[error(
        "the storage proxy refuses the secret of node.storage-proxy.secret-file ({status}); it is that of [api.manager] in its configuration"
    )]
    Forbidden {
        /// 401 or 403.
        status: u16,
    },
    /// It sends elsewhere.
    #[error(
        "the storage proxy answers {what} with a redirection ({status}), which is not followed; name the place itself in node.storage-proxy.url"
    )]
    Redirected {
        /// What was asked.
        what: &'static str,
        /// 300 to 399.
        status: u16,
    },
    /// The answer is too long.
    #[error("the storage proxy's answer to {what} is longer than {ANSWER_LIMIT} bytes")]
    TooLarge {
        /// What was asked.
        what: &'static str,
    },
    /// The answer means nothing.
    #[error(
        "the storage proxy's answer to {what} is not what 25.15.8 answers; is node.storage-proxy.url its manager-facing API?"
    )]
    Undecodable {
        /// What was asked.
        what: &'static str,
    },
    /// It cannot answer this question.
    #[error("the storage proxy has no answer to {what} ({status}{words})")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Its status.
        status: u16,
        /// What it says, after a colon.
        words: String,
    },
}

impl ProxyError {
    /// Whether other questions would end the same way.
    pub fn is_of_proxy(&self) -> bool {
        !matches!(
            self,
            ProxyError::Refused { .. } | ProxyError::TooLarge { .. }
        )
    }
}

fn in_file(path: Option<&Path>) -> String {
    path.map_or_else(
        || " of this system; install ca-certificates or set node.storage-proxy.ca-file".to_owned(),
        |path| format!(" in {}", path.display()),
    )
}

/// A storage proxy, as configured.
pub struct ProxyClient {
    url: ProxyUrl,
    secret_file: PathBuf,
    ca_file: Option<PathBuf>,
    timeout: Duration,
    tls: OnceCell<TlsConnector>,
}

impl std::fmt::Debug for ProxyClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProxyClient")
            .field("url", &self.url)
            .field("secret_file", &self.secret_file)
            .finish_non_exhaustive()
    }
}

impl ProxyClient {
    /// A client of the configured proxy; nothing is asked yet.
    pub fn new(settings: &config::StorageProxy) -> Self {
        Self {
            url: settings.url.clone(),
            secret_file: settings.secret_file.clone(),
            ca_file: settings.ca_file.clone(),
            timeout: settings.timeout,
            tls: OnceCell::new(),
        }
    }

    /// Its version.
    ///
    /// # Errors
    /// There is no answer.
    pub async fn version(&self) -> Result<String, ProxyError> {
        let status: Status = self.ask("status", "/status", None).await?;
        Ok(status.version)
    }

    /// Its volumes.
    ///
    /// # Errors
    /// There is no answer.
    pub async fn volumes(&self) -> Result<Vec<Volume>, ProxyError> {
        let volumes: Volumes = self.ask("the list of volumes", "/volumes", None).await?;
        Ok(volumes.volumes)
    }

    /// How a volume is, in its backend's words.
    ///
    /// # Errors
    /// There is no answer.
    pub async fn health(&self, volume: &str) -> Result<VolumeHealth, ProxyError> {
        let asked = json!({"volume": volume});
        self.ask("a volume's health", "/volume/hwinfo", Some(asked))
            .await
    }

    /// How full a volume's file system is.
    ///
    /// # Errors
    /// There is no answer.
    pub async fn space(&self, volume: &str) -> Result<Space, ProxyError> {
        let asked = json!({"volume": volume});
        self.ask("a volume's space", "/folder/fs-usage", Some(asked))
            .await
    }

    /// What a folder holds.
    ///
    /// # Errors
    /// There is no answer.
    pub async fn usage(&self, volume: &str, folder: &FolderId) -> Result<FolderUsage, ProxyError> {
        let asked = json!({"volume": volume, "vfid": folder.as_str()});
        self.ask("a folder's usage", "/folder/usage", Some(asked))
            .await
    }

    /// What a quota scope holds and may hold.
    ///
    /// # Errors
    /// There is no answer.
    pub async fn quota(&self, volume: &str, scope: &str) -> Result<Quota, ProxyError> {
        let asked = json!({"volume": volume, "qsid": scope});
        self.ask("a quota scope", "/quota-scope", Some(asked)).await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        what: &'static str,
        path: &'static str,
        asked: Option<Json>,
    ) -> Result<T, ProxyError> {
        let exchange = Box::pin(self.exchange(what, path, asked));
        let body = match tokio::time::timeout(self.timeout, exchange).await {
            Ok(body) => body?,
            Err(_) => {
                return Err(ProxyError::Timeout {
                    what,
                    after: self.timeout,
                });
            }
        };
        // The cause would quote the answer, and who knows what answers there.
        serde_json::from_slice(&body).map_err(|_| ProxyError::Undecodable { what })
    }

    async fn exchange(
        &self,
        what: &'static str,
        path: &'static str,
        asked: Option<Json>,
    ) -> Result<Bytes, ProxyError> {
        let secret = self.secret().await?;
        let place = (self.url.address.host.as_str(), self.url.address.port);
        let socket = TcpStream::connect(place)
            .await
            .map_err(|source| ProxyError::Connect {
                place: self.url.to_string(),
                source,
            })?;
        let request = self.request(path, &secret, asked);
        if self.url.tls {
            let host = self.url.address.host.clone();
            let name = ServerName::try_from(host.clone())
                .map_err(|source| ProxyError::ServerName { host, source })?;
            let stream = self
                .connector()
                .await?
                .connect(name, socket)
                .await
                .map_err(|source| ProxyError::Tls {
                    place: self.url.to_string(),
                    source,
                })?;
            speak(what, stream, request).await
        } else {
            speak(what, socket, request).await
        }
    }

    fn request(
        &self,
        path: &'static str,
        secret: &HeaderValue,
        asked: Option<Json>,
    ) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::default());
        *request.method_mut() = Method::GET;
        *request.uri_mut() = hyper::Uri::from_static(path);
        if let Ok(host) = HeaderValue::from_str(&self.url.address.to_string()) {
            request.headers_mut().insert(HOST, host);
        }
        request.headers_mut().insert(TOKEN, secret.clone());
        if let Some(asked) = asked {
            let kind = HeaderValue::from_static("application/json");
            request.headers_mut().insert(CONTENT_TYPE, kind);
            *request.body_mut() = Full::new(Bytes::from(asked.to_string()));
        }
        request
    }

    async fn secret(&self) -> Result<HeaderValue, ProxyError> {
        let path = self.secret_file.clone();
        // Read each time, so that a new one counts without a restart.
        let read = blocking(move || read_secret_file(&path)).await;
        read.and_then(|secret| {
            let mut value =
                HeaderValue::from_str(secret.reveal()).map_err(|_| SecretFileError::Unusable)?;
            value.set_sensitive(true);
            Ok(value)
        })
        .map_err(|source| ProxyError::SecretFile {
            path: self.secret_file.clone(),
            source,
        })
    }

    async fn connector(&self) -> Result<&TlsConnector, ProxyError> {
        let made = self.tls.get_or_try_init(|| async {
            let path = self.ca_file.clone();
            blocking(move || connector(path.as_deref())).await
        });
        made.await.map_err(|source| ProxyError::Authorities {
            path: self.ca_file.clone(),
            source,
        })
    }
}

fn connector(ca_file: Option<&Path>) -> Result<TlsConnector, std::io::Error> {
    let unusable = |err: &dyn std::fmt::Display| {
        std::io::Error::new(std::io::ErrorKind::InvalidData, err.to_string())
    };
    let mut roots = RootCertStore::empty();
    match ca_file {
        Some(path) => {
            let text = std::fs::read(path)?;
            for certificate in CertificateDer::pem_slice_iter(&text) {
                let certificate = certificate.map_err(|err| unusable(&err))?;
                roots.add(certificate).map_err(|err| unusable(&err))?;
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
        }
    }
    if roots.is_empty() {
        return Err(unusable(&"there is no certificate in it"));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|err| unusable(&err))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// One request and its answer on a connection that ends with them.
async fn speak(
    what: &'static str,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
) -> Result<Bytes, ProxyError> {
    let broken = |source: hyper::Error| ProxyError::Broken {
        what,
        source: source.into(),
    };
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(HEAD_LIMIT)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(broken)?;
    // Its end is told by the request's.
    let _driver = AbortOnDropHandle::new(tokio::spawn(async move {
        let _ = connection.await;
    }));
    let answer = sender.send_request(request).await.map_err(broken)?;
    let status = answer.status();
    if status.is_redirection() {
        return Err(ProxyError::Redirected {
            what,
            status: status.as_u16(),
        });
    }
    if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        return Err(ProxyError::Forbidden {
            status: status.as_u16(),
        });
    }
    let reason = answer
        .extensions()
        .get::<hyper::ext::ReasonPhrase>()
        .map(|reason| String::from_utf8_lossy(reason.as_bytes()).into_owned());
    let body = match Limited::new(answer.into_body(), ANSWER_LIMIT)
        .collect()
        .await
    {
        Ok(body) => body.to_bytes(),
        Err(source) if source.is::<LengthLimitError>() => {
            return Err(ProxyError::TooLarge { what });
        }
        Err(source) => return Err(ProxyError::Broken { what, source }),
    };
    if status != StatusCode::OK {
        return Err(ProxyError::Refused {
            what,
            status: status.as_u16(),
            words: Refusal::words(&body, reason.as_deref()),
        });
    }
    Ok(body)
}
