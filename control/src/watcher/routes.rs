//! The routes of the watcher, as managers of 25.15.8 call them.
//!
//! In: requests with a token. Out: the original's answers; what went wrong with status 500 and words
//! that the manager shows to its administrator. Invariants: nothing is looked at before the token is
//! right, unknown paths included; one action on the units at a time; bodies are bounded.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::Watcher;
use super::systemctl::{self, CallError};
use crate::blocking::blocking;
use crate::causes::chain;
use crate::volumes::{MountOrder, UnmountOrder, VolumeOutcome};

/// The header that carries the token.
const TOKEN: &str = "x-backendai-watcher-token";
/// How the original names itself.
const SERVER: HeaderValue = HeaderValue::from_static("BackendAI-AgentWatcher");
/// The largest body of a request.
const BODY: usize = 64 << 10;
/// The table of a request that names none.
const USUAL_FSTAB: &str = "/etc/fstab";
/// Managers give the question for the state 5 s.
const STATE_LIMIT: Duration = Duration::from_secs(4);
/// Between the answer to a shutdown and the shutdown.
const LAST_WORDS: Duration = Duration::from_secs(1);

pub(super) fn router(watcher: Arc<Watcher>) -> Router {
    let mut routes = Router::new()
        .route("/", get(state))
        .route("/hard-reset", post(hard_reset))
        .route("/agent/start", post(start))
        .route("/agent/stop", post(stop))
        .route("/agent/restart", post(restart))
        .route("/fstab", get(fstab))
        .route("/mounts", get(mounts).post(mount).delete(unmount));
    if watcher.settings.soft_reset {
        routes = routes.route("/soft-reset", post(soft_reset));
    }
    if watcher.settings.shutdown {
        routes = routes.route("/shutdown", post(shutdown));
    }
    routes
        .fallback(async || (StatusCode::NOT_FOUND, "404: Not Found"))
        .layer(DefaultBodyLimit::max(BODY))
        .layer(middleware::from_fn_with_state(watcher.clone(), admit))
        .with_state(watcher)
}

async fn admit(State(watcher): State<Arc<Watcher>>, request: Request, next: Next) -> Response {
    let given = request.headers().get(TOKEN).map(HeaderValue::as_bytes);
    let mut response = if given.is_some_and(|given| watcher.token.is(given)) {
        tracing::debug!(method = %request.method(), path = request.uri().path(), "a request");
        next.run(request).await
    } else {
        watcher.turned_away();
        (StatusCode::FORBIDDEN, "403: Forbidden").into_response()
    };
    response.headers_mut().insert(header::SERVER, SERVER);
    response
}

fn done() -> Response {
    axum::Json(json!({"result": "ok"})).into_response()
}

/// What the original answers where there is no systemctl.
fn no_systemd() -> Json {
    json!({"message": "Agent is not loaded with systemctl."})
}

fn words(status: StatusCode, err: &dyn std::error::Error) -> Response {
    tracing::warn!(err = chain(err), "a request was not carried out");
    (status, chain(err)).into_response()
}

fn trouble(err: &CallError) -> Response {
    match err {
        CallError::Missing(_) => {
            tracing::warn!(err = chain(err), "a request was not carried out");
            (StatusCode::SERVICE_UNAVAILABLE, axum::Json(no_systemd())).into_response()
        }
        _ => words(StatusCode::INTERNAL_SERVER_ERROR, err),
    }
}

async fn state(State(watcher): State<Arc<Watcher>>) -> Response {
    match systemctl::is_active(&watcher.settings.unit, STATE_LIMIT).await {
        Ok(word) => {
            axum::Json(json!({"agent-status": word, "watcher-status": "active"})).into_response()
        }
        Err(CallError::Missing(_)) => axum::Json(no_systemd()).into_response(),
        Err(err) => trouble(&err),
    }
}

/// Calls one after the other, unless another action is under way.
async fn act(watcher: &Watcher, calls: &[(&'static str, &str)]) -> Result<(), Response> {
    let Ok(_turn) = watcher.turn.try_lock() else {
        let text = "another action on this node is under way; try again when it is done";
        return Err((StatusCode::CONFLICT, text).into_response());
    };
    for (verb, unit) in calls {
        tracing::info!(verb, unit, "asked for by a manager");
        let called = systemctl::systemctl(verb, unit, watcher.settings.timeout).await;
        called.map_err(|err| trouble(&err))?;
    }
    Ok(())
}

async fn one(watcher: &Watcher, verb: &'static str) -> Response {
    match act(watcher, &[(verb, &watcher.settings.unit)]).await {
        Ok(()) => done(),
        Err(response) => response,
    }
}

async fn start(State(watcher): State<Arc<Watcher>>) -> Response {
    one(&watcher, "start").await
}

async fn stop(State(watcher): State<Arc<Watcher>>) -> Response {
    one(&watcher, "stop").await
}

async fn restart(State(watcher): State<Arc<Watcher>>) -> Response {
    one(&watcher, "restart").await
}

/// The agent reads its configuration when it starts, and a restart leaves kernels alone.
async fn soft_reset(State(watcher): State<Arc<Watcher>>) -> Response {
    one(&watcher, "restart").await
}

async fn hard_reset(State(watcher): State<Arc<Watcher>>) -> Response {
    let unit = watcher.settings.unit.as_str();
    let reset = act(&watcher, &[("stop", unit), ("restart", "docker.service")]).await;
    // Also after a failure: a node without an agent helps nobody.
    let started = match &reset {
        Err(response) if response.status() == StatusCode::CONFLICT => Ok(()),
        _ => act(&watcher, &[("start", unit)]).await,
    };
    match reset.and(started) {
        Ok(()) => done(),
        Err(response) => response,
    }
}

async fn shutdown(State(watcher): State<Arc<Watcher>>) -> Response {
    if let Err(response) = act(&watcher, &[("stop", &watcher.settings.unit)]).await {
        return response;
    }
    tracing::warn!("a manager has this host switched off");
    let limit = watcher.settings.timeout;
    tokio::spawn(async move {
        tokio::time::sleep(LAST_WORDS).await;
        match systemctl::power_off(limit).await {
            Ok(()) => watcher.stopping.cancel(),
            Err(err) => tracing::error!(err = chain(&err), "the host is not switched off"),
        }
    });
    done()
}

#[derive(Debug, Deserialize)]
struct Table {
    #[serde(default)]
    fstab_path: Option<String>,
}

async fn fstab(State(watcher): State<Arc<Watcher>>, Query(table): Query<Table>) -> Response {
    let path = table.fstab_path.unwrap_or_else(|| USUAL_FSTAB.to_owned());
    let table = PathBuf::from(path);
    match blocking(move || watcher.volumes.table(&table)).await {
        Ok(text) => text.into_response(),
        Err(err) => words(StatusCode::INTERNAL_SERVER_ERROR, &err),
    }
}

async fn mounts(State(watcher): State<Arc<Watcher>>) -> Response {
    match watcher.volumes.mounted().await {
        Ok(paths) => axum::Json(paths).into_response(),
        Err(err) => words(StatusCode::INTERNAL_SERVER_ERROR, &err),
    }
}

#[derive(Debug, Deserialize)]
struct MountRequest {
    name: String,
    fs_type: String,
    fs_location: String,
    #[serde(default)]
    options: Option<String>,
    #[serde(default)]
    edit_fstab: bool,
    #[serde(default)]
    fstab_path: Option<String>,
}

#[derive(Debug, Deserialize)]
struct UnmountRequest {
    name: String,
    #[serde(default)]
    edit_fstab: bool,
    #[serde(default)]
    fstab_path: Option<String>,
}

fn table(edit: bool, path: Option<String>) -> Option<PathBuf> {
    edit.then(|| PathBuf::from(path.unwrap_or_else(|| USUAL_FSTAB.to_owned())))
}

/// The request, whatever its content type; the manager's says JSON.
fn read<'de, T: Deserialize<'de>>(body: &'de Bytes) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|err| format!("the request cannot be read: {err}"))
}

fn outcome(outcome: &VolumeOutcome) -> Response {
    match &outcome.error {
        None => String::new().into_response(),
        Some(err) => words(StatusCode::INTERNAL_SERVER_ERROR, err),
    }
}

async fn mount(State(watcher): State<Arc<Watcher>>, body: Bytes) -> Response {
    let request: MountRequest = match read(&body) {
        Ok(request) => request,
        Err(text) => return (StatusCode::BAD_REQUEST, text).into_response(),
    };
    let order = MountOrder {
        dir_name: request.name,
        location: request.fs_location,
        fs_type: request.fs_type,
        options: request.options,
        fstab: table(request.edit_fstab, request.fstab_path),
    };
    outcome(&watcher.volumes.mount(&order).await)
}

async fn unmount(State(watcher): State<Arc<Watcher>>, body: Bytes) -> Response {
    let request: UnmountRequest = match read(&body) {
        Ok(request) => request,
        Err(text) => return (StatusCode::BAD_REQUEST, text).into_response(),
    };
    let sources = match watcher.sources().await {
        Ok(sources) => sources,
        Err(err) => return words(StatusCode::INTERNAL_SERVER_ERROR, &err),
    };
    let order = UnmountOrder {
        dir_name: request.name,
        fstab: table(request.edit_fstab, request.fstab_path),
    };
    outcome(&watcher.volumes.unmount(&order, &|| sources.clone()).await)
}
