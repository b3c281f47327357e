//! Pull, push and import: long transfers that report progress line by line.
//!
//! Any `error` in the stream fails the transfer, wherever it stands; so does a stream without a
//! single line. A transfer is cancelled by dropping its future: the connection closes and dockerd
//! stops (layers already downloaded are kept and used by the next attempt).

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use hyper::Method;

use super::Docker;
use super::error::DockerError;
use super::lines::JsonLines;
use super::transport::{Call, Class, image_path};

/// How often in turn a transfer may be silent for `Deadlines::transfer_silence`.
const SILENCES: u32 = 12;

/// Credentials for a registry; never shown.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RegistryAuth {
    /// User name.
    pub username: String,
    /// Password or token.
    pub password: String,
}

impl fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryAuth")
            .field("username", &self.username)
            .field("password", &"***")
            .finish()
    }
}

impl RegistryAuth {
    /// Credentials, when both parts are non-empty.
    pub fn from_parts(username: Option<&str>, password: Option<&str>) -> Option<Self> {
        let username = username.filter(|text| !text.is_empty())?;
        let password = password.filter(|text| !text.is_empty())?;
        Some(Self {
            username: username.to_owned(),
            password: password.to_owned(),
        })
    }

    /// The header value for an image of that name. dockerd decodes the URL-safe alphabet and quietly
    /// goes on without credentials when it finds another one. With its containerd image store, before
    /// version 25, it uses them only for the registry they name (moby/moby#46743).
    fn header(&self, name: &str) -> String {
        let json = serde_json::json!({
            "username": self.username,
            "password": self.password,
            "serveraddress": name.split_once('/').map_or("", |(registry, _)| registry),
        });
        URL_SAFE.encode(json.to_string())
    }
}

/// Progress of a transfer, summed over its layers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Progress {
    /// The engine's last words, e.g. `Downloading`.
    pub status: String,
    /// Layer the words are about; empty for the whole image.
    pub layer: String,
    /// Bytes transferred, of the layers that tell.
    pub current: u64,
    /// Bytes to transfer, of the layers that tell.
    pub total: u64,
    /// Layers known so far and layers done.
    pub layers: (usize, usize),
}

/// Sums the lines of a transfer.
#[derive(Debug, Default)]
struct Ledger {
    layers: HashMap<String, Layer>,
    lines: usize,
}

#[derive(Debug, Default, Clone, Copy)]
struct Layer {
    current: u64,
    total: u64,
    done: bool,
}

impl Ledger {
    /// Takes one line in; `Err` holds the engine's words when the line is an error.
    fn take(&mut self, line: &serde_json::Value) -> Result<Progress, String> {
        self.lines += 1;
        let words = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        if let Some(detail) = line.get("errorDetail").filter(|detail| !detail.is_null()) {
            let message = detail.get("message").and_then(words);
            return Err(message.unwrap_or_else(|| detail.to_string()));
        }
        if let Some(error) = line.get("error").filter(|error| !error.is_null()) {
            return Err(words(error).unwrap_or_else(|| error.to_string()));
        }
        let status = line.get("status").and_then(words).unwrap_or_default();
        let layer = line.get("id").and_then(words).unwrap_or_default();
        let number = |name: &str| line.get("progressDetail")?.get(name)?.as_u64();
        // The image itself reports under its tag ("Pulling from ..."), which is not a layer. The
        // bound keeps a hostile registry from growing the map.
        let is_layer = !layer.is_empty() && !status.starts_with("Pulling from");
        if is_layer && (self.layers.len() < 1024 || self.layers.contains_key(&layer)) {
            let entry = self.layers.entry(layer.clone()).or_default();
            // Extraction counts the same bytes again; only the transfer is summed.
            if (status == "Downloading" || status == "Pushing")
                && let Some(current) = number("current")
            {
                entry.current = current;
                entry.total = number("total").unwrap_or(entry.total).max(current);
            }
            if matches!(
                status.as_str(),
                "Download complete"
                    | "Pull complete"
                    | "Already exists"
                    | "Pushed"
                    | "Layer already exists"
            ) {
                entry.current = entry.total;
                entry.done = !matches!(status.as_str(), "Download complete");
            }
        }
        Ok(Progress {
            status,
            layer,
            current: self.layers.values().map(|layer| layer.current).sum(),
            total: self.layers.values().map(|layer| layer.total).sum(),
            layers: (
                self.layers.len(),
                self.layers.values().filter(|layer| layer.done).count(),
            ),
        })
    }
}

impl Docker {
    /// Pulls an image by reference with tag or digest; `report` sees every step.
    ///
    /// # Errors
    /// `NotFound` for an unknown image (some registries answer `Engine` or `Progress` instead),
    /// `Progress` with the engine's words, `Timeout`, `Late`, `Standstill`.
    pub async fn pull_image(
        &self,
        image: &str,
        auth: Option<&RegistryAuth>,
        report: impl FnMut(&Progress) + Send,
    ) -> Result<(), DockerError> {
        let step = format!("pull image {image}");
        image_path(&step, image)?;
        let (name, tag) = split_reference(image);
        let call = self
            .transfer(step, "/images/create".into(), name, auth)
            .query("fromImage", name)
            .query("tag", tag);
        self.follow(call, self.deadlines.transfer, report).await
    }

    /// Pushes an image to the registry its name points to.
    ///
    /// # Errors
    /// `Progress` with the engine's words, `Timeout`, `Late`, `Standstill`.
    pub async fn push_image(
        &self,
        image: &str,
        auth: Option<&RegistryAuth>,
        report: impl FnMut(&Progress) + Send,
    ) -> Result<(), DockerError> {
        let step = format!("push image {image}");
        image_path(&step, image)?;
        let (name, tag) = split_reference(image);
        // dockerd insists on the header for a push, empty credentials included.
        let none = RegistryAuth {
            username: String::new(),
            password: String::new(),
        };
        let call = self
            .transfer(
                step,
                format!("/images/{name}/push"),
                name,
                Some(auth.unwrap_or(&none)),
            )
            .query("tag", tag);
        self.follow(call, self.deadlines.push, report).await
    }

    fn transfer<'a>(
        &self,
        step: String,
        path: String,
        name: &str,
        auth: Option<&RegistryAuth>,
    ) -> Call<'a> {
        // The head comes with the first progress line, after the registry was asked.
        let head = self.deadlines.transfer_silence;
        let call = Call::new(step, Class::Transfer, head, Method::POST, path);
        match auth {
            Some(auth) => call.header("X-Registry-Auth", auth.header(name)),
            None => call,
        }
    }

    async fn follow(
        &self,
        call: Call<'_>,
        deadline: Option<Duration>,
        mut report: impl FnMut(&Progress) + Send,
    ) -> Result<(), DockerError> {
        let step = call.step.clone();
        let work = async {
            let streaming = self.transport.stream(&call).await?;
            let mut lines = JsonLines::new(streaming.response.into_body());
            let mut ledger = Ledger::default();
            while let Some(line) = self.next_line(&step, &mut lines).await? {
                match ledger.take(&line) {
                    Ok(progress) => report(&progress),
                    Err(message) => {
                        return Err(DockerError::Progress {
                            step: step.clone(),
                            message,
                        });
                    }
                }
            }
            if ledger.lines == 0 {
                return Err(DockerError::Progress {
                    step: step.clone(),
                    message: "the engine ended the transfer without a word".into(),
                });
            }
            Ok(())
        };
        match deadline {
            Some(after) => match tokio::time::timeout(after, work).await {
                Ok(result) => result,
                Err(_) => Err(DockerError::Late { step, after }),
            },
            None => work.await,
        }
    }

    /// The next line of a transfer. One that waits for its turn in the engine's queue of layers
    /// (three downloads, five uploads) says nothing meanwhile: as long as the engine answers others,
    /// it is waited for, but not for ever: its registry may hang.
    async fn next_line(
        &self,
        step: &str,
        lines: &mut JsonLines,
    ) -> Result<Option<serde_json::Value>, DockerError> {
        let next = lines.next(step);
        tokio::pin!(next);
        let silence = self.deadlines.transfer_silence;
        for _ in 0..SILENCES {
            tokio::select! {
                line = &mut next => return line,
                () = tokio::time::sleep(silence) => self.ping().await?,
            }
        }
        Err(DockerError::Standstill {
            step: step.to_owned(),
            after: silence * SILENCES,
        })
    }
}

/// Name and tag (or digest) of a reference; without one the tag is `latest`, so that a pull never
/// fetches every tag of a repository.
pub(super) fn split_reference(image: &str) -> (&str, &str) {
    if let Some((name, digest)) = image.split_once('@') {
        return (name, digest);
    }
    match image.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, tag),
        _ => (image, "latest"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn credentials_name_their_registry() {
        let auth = RegistryAuth::from_parts(Some("user"), Some("word")).unwrap();
        for (name, registry) in [
            ("host:5000/a/b", "host:5000"),
            ("index.docker.io/lablup/x", "index.docker.io"),
            ("busybox", ""),
        ] {
            let decoded = URL_SAFE.decode(auth.header(name)).unwrap();
            let decoded: serde_json::Value = serde_json::from_slice(&decoded).unwrap();
            let expected =
                json!({"username": "user", "password": "word", "serveraddress": registry});
            assert_eq!(decoded, expected);
        }
    }

    #[test]
    fn a_port_is_not_a_tag() {
        for (image, expected) in [
            ("busybox", ("busybox", "latest")),
            ("127.0.0.1:5000/a/b", ("127.0.0.1:5000/a/b", "latest")),
            ("127.0.0.1:5000/a/b:1.0", ("127.0.0.1:5000/a/b", "1.0")),
            ("a/b@sha256:00", ("a/b", "sha256:00")),
        ] {
            assert_eq!(split_reference(image), expected);
        }
    }

    #[test]
    fn pull_error_that_is_not_last_is_noticed() {
        let mut ledger = Ledger::default();
        assert!(
            ledger
                .take(&json!({"status": "Pulling from x", "id": "latest"}))
                .is_ok()
        );
        let error = ledger.take(&json!({"error": "denied"})).unwrap_err();
        assert_eq!(error, "denied");
        let error = ledger
            .take(&json!({"error": "a", "errorDetail": {"code": 1, "message": "denied: b"}}))
            .unwrap_err();
        assert_eq!(error, "denied: b");
    }

    #[test]
    fn progress_sums_the_layers() {
        let mut ledger = Ledger::default();
        for line in [
            json!({"status": "Pulling from x", "id": "latest"}),
            json!({"status": "Pulling fs layer", "progressDetail": {}, "id": "a"}),
            json!({"status": "Pulling fs layer", "progressDetail": {}, "id": "b"}),
            json!({"status": "Downloading", "progressDetail": {"current": 10, "total": 100}, "id": "a"}),
            json!({"status": "Downloading", "progressDetail": {"current": 5, "total": 50}, "id": "b"}),
        ] {
            ledger.take(&line).unwrap();
        }
        let progress = ledger
            .take(&json!({"status": "Download complete", "progressDetail": {}, "id": "b"}))
            .unwrap();
        assert_eq!((progress.current, progress.total), (60, 150));
        assert_eq!(progress.layers, (2, 0));
        let progress = ledger
            .take(&json!({"status": "Extracting", "progressDetail": {"current": 1, "total": 50}, "id": "b"}))
            .unwrap();
        assert_eq!(progress.current, 60);
        let progress = ledger
            .take(&json!({"status": "Pull complete", "progressDetail": {}, "id": "b"}))
            .unwrap();
        assert_eq!(progress.layers, (2, 1));
    }

    #[test]
    fn credentials_need_both_parts_and_are_never_shown() {
        assert_eq!(RegistryAuth::from_parts(Some("u"), Some("")), None);
        assert_eq!(RegistryAuth::from_parts(None, Some("p")), None);
        let auth = RegistryAuth::from_parts(Some("u"), Some("s3cret>>>???")).unwrap();
        assert!(!format!("{auth:?}").contains("s3cret"));
        assert!(!auth.header("a").contains(['+', '/']));
    }
}
