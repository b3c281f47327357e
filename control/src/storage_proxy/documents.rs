//! What is known of folders and volumes as documents, for the command line.

use std::time::Instant;

use serde_json::{Value as Json, json};

use super::{Answer, Cache, CacheEntry, Mounted, Query, StorageProxy};

/// How the proxy itself does.
pub fn status(proxy: &StorageProxy, now: Instant) -> Json {
    let known = proxy.known();
    let trouble = known.trouble.as_ref();
    let oldest = known
        .all()
        .filter_map(|(_, known)| known.answer.as_ref())
        .map(|(_, at)| *at)
        .min();
    let refused = known.all().filter(|(_, known)| known.error.is_some());
    json!({
        "url": proxy.url(),
        "answers": match (known.answered, trouble) {
            (_, Some(_)) => Some(false),
            (Some(_), None) => Some(true),
            (None, None) => None,
        },
        "error": trouble.map(|(words, _)| words),
        "away_s": trouble.map(|(_, since)| seconds(now, *since)),
        "answered_s_ago": known.answered.map(|at| seconds(now, at)),
        "oldest_answer_s": oldest.map(|at| seconds(now, at)),
        "questions": known.all().count(),
        "without_answer": refused.count(),
        "left_out": known.left_out,
    })
}

/// The folders of kernels and the volumes they lie on.
pub fn folders(proxy: Option<&StorageProxy>, mounted: &[Mounted], now: Instant) -> Json {
    let known = proxy.map(StorageProxy::known);
    let known = known.as_deref();
    json!({
        "storage_proxy": proxy.map(|proxy| status(proxy, now)),
        "folders": mounted.iter().map(|mount| folder(known, mount, now)).collect::<Vec<_>>(),
        "volumes": known.map(|known| volumes(known, now)).unwrap_or_default(),
    })
}

fn folder(known: Option<&Cache>, mount: &Mounted, now: Instant) -> Json {
    let volume = known.and_then(|known| known.volume_of(&mount.source));
    let of = |question: &Query| known.and_then(|known| known.of(question));
    let named = volume.map(|volume| volume.name.clone());
    let usage = named.clone().zip(mount.folder.clone());
    let usage = usage.and_then(|(volume, folder)| of(&Query::Folder(volume, folder)));
    let scope = mount.folder.as_ref().and_then(|folder| folder.scope());
    let quota = named.clone().zip(scope.map(str::to_owned));
    let quota = quota.and_then(|(volume, scope)| of(&Query::Scope(volume, scope)));
    let (used, files) = match usage.and_then(|known| known.answer.as_ref()) {
        Some((Answer::Folder(usage), _)) => (usage.used, usage.files),
        _ => (None, None),
    };
    let (quota_used, quota_limit) = match quota.and_then(|known| known.answer.as_ref()) {
        Some((Answer::Scope(quota), _)) => (quota.used, quota.limit),
        _ => (None, None),
    };
    let error = usage
        .and_then(|known| known.error.clone())
        .or_else(|| unasked(known, mount, named.is_some()));
    json!({
        "kernel_id": mount.kernel,
        "name": mount.name,
        "target": mount.target,
        "folder": mount.folder.as_ref().map(|folder| folder.as_str()),
        "volume": named,
        "used_bytes": used,
        "files": files,
        "age_s": usage.and_then(|known| age(known, now)),
        "error": error,
        "quota": {
            "scope": scope,
            "used_bytes": quota_used,
            "limit_bytes": quota_limit,
            "age_s": quota.and_then(|known| age(known, now)),
            "error": quota.and_then(|known| known.error.clone()),
        },
    })
}

/// Why nobody is asked about a folder.
fn unasked(known: Option<&Cache>, mount: &Mounted, on_volume: bool) -> Option<String> {
    let Some(known) = known else {
        return Some("no storage proxy is configured (node.storage-proxy)".to_owned());
    };
    if mount.folder.is_none() {
        return Some("the manager sent no id for it".to_owned());
    }
    let listed = known.of(&Query::Volumes)?.answer.is_some();
    (listed && !on_volume).then(|| {
        format!(
            "no volume of the storage proxy is mounted above {}",
            mount.source
        )
    })
}

fn volumes(known: &Cache, now: Instant) -> Vec<Json> {
    let all = known.all().filter_map(|(question, known)| match question {
        Query::Volume(name) => Some((name, known)),
        _ => None,
    });
    all.map(|(name, known)| {
        let (health, space) = match &known.answer {
            Some((Answer::Volume(health, space), _)) => (Some(health), Some(space)),
            _ => (None, None),
        };
        json!({
            "name": name,
            "health": health.map(|health| &health.status),
            "words": health.and_then(|health| health.words.as_ref()),
            "capacity_bytes": space.and_then(|space| space.capacity),
            "used_bytes": space.and_then(|space| space.used),
            "age_s": age(known, now),
            "error": known.error,
        })
    })
    .collect()
}

fn age(known: &CacheEntry, now: Instant) -> Option<f64> {
    known.answer.as_ref().map(|(_, at)| seconds(now, *at))
}

fn seconds(now: Instant, at: Instant) -> f64 {
    now.saturating_duration_since(at).as_secs_f64()
}
