//! Series of mounted folders and their volumes, as a storage proxy tells them.

use std::time::Instant;

use super::page::{Number, families, labels};
use super::{NodeSnapshot, Page};
use crate::storage_proxy::{Answer, Cache, CacheEntry, Mounted, Query};

families! {
    PROXY = Gauge "bai_storage_proxy_up" []
        "Whether the storage proxy answered the last time it was asked; no series before that.";
    PROXY_QUESTIONS = Counter "bai_storage_proxy_requests_total" ["outcome"]
        "Questions to the storage proxy: answered, refused, and failed (nobody answered).";
    MOUNT = Gauge "bai_vfolder_mounted" ["vfolder name kernel_id"] "Always 1; the folders of a kernel.";
    USED = Gauge "bai_vfolder_used_bytes" ["volume vfolder"] "Bytes in a mounted folder.";
    FILES = Gauge "bai_vfolder_files" ["volume vfolder"] "Files and directories in a mounted folder.";
    AGE = Gauge "bai_vfolder_answer_age_seconds" ["volume vfolder"] "Since the storage proxy told of a folder.";
    QUOTA_USED = Gauge "bai_quota_scope_used_bytes" ["volume quota_scope"]
        "Bytes that count against the quota of mounted folders' owners.";
    QUOTA_LIMIT = Gauge "bai_quota_scope_limit_bytes" ["volume quota_scope"] "The quota; missing when there is none.";
    QUOTA_AGE = Gauge "bai_quota_scope_answer_age_seconds" ["volume quota_scope"]
        "Since the storage proxy told of a quota.";
    VOLUME_HEALTHY = Gauge "bai_volume_healthy" ["volume"]
        "0: the storage proxy calls the volume anything but healthy.";
    VOLUME_CAPACITY = Gauge "bai_volume_capacity_bytes" ["volume"] "Size of the file system of mounted folders.";
    VOLUME_USED = Gauge "bai_volume_used_bytes" ["volume"] "Bytes used in it.";
    VOLUME_AGE = Gauge "bai_volume_answer_age_seconds" ["volume"] "Since the storage proxy told of a volume.";
}

/// One look at the folders.
#[derive(Debug)]
pub struct Folders {
    /// The mounts of all kernels.
    pub mounted: Vec<Mounted>,
    /// What the storage proxy told of them.
    pub known: std::sync::Arc<Cache>,
    /// Now.
    pub now: Instant,
}

pub(super) fn render(node_snapshot: &NodeSnapshot, page: &mut Page) {
    let Some(folders) = &node_snapshot.folders else {
        return;
    };
    let known = &folders.known;
    if known.trouble.is_some() || known.answered.is_some() {
        page.sample(&PROXY, "", known.trouble.is_none());
    }
    for (outcome, count) in ["answered", "refused", "failed"].iter().zip(known.counts) {
        page.sample(&PROXY_QUESTIONS, &labels(&[("outcome", outcome)]), count);
    }
    let mut mounts: Vec<String> = folders
        .mounted
        .iter()
        .filter_map(|mount| {
            Some(labels(&[
                ("vfolder", mount.folder.as_ref()?.as_str()),
                ("name", &mount.name),
                ("kernel_id", &mount.kernel),
            ]))
        })
        .collect();
    // A folder may be in a kernel at several places.
    mounts.sort_unstable();
    mounts.dedup();
    for labels in mounts {
        page.sample(&MOUNT, &labels, 1_u64);
    }
    each(known, page, &USED, folder, &|known| match known {
        Answer::Folder(usage) => usage.used.map(Number::Whole),
        _ => None,
    });
    each(known, page, &FILES, folder, &|known| match known {
        Answer::Folder(usage) => usage.files.map(Number::Whole),
        _ => None,
    });
    ages(folders, page, &AGE, folder);
    each(known, page, &QUOTA_USED, scope, &|known| match known {
        Answer::Scope(quota) => quota.used.map(Number::Whole),
        _ => None,
    });
    each(known, page, &QUOTA_LIMIT, scope, &|known| match known {
        Answer::Scope(quota) => quota.limit.map(Number::Whole),
        _ => None,
    });
    ages(folders, page, &QUOTA_AGE, scope);
    each(known, page, &VOLUME_HEALTHY, volume, &|known| match known {
        Answer::Volume(health, _) => Some((health.status == "healthy").into()),
        _ => None,
    });
    each(
        known,
        page,
        &VOLUME_CAPACITY,
        volume,
        &|known| match known {
            Answer::Volume(_, space) => space.capacity.map(Number::Whole),
            _ => None,
        },
    );
    each(known, page, &VOLUME_USED, volume, &|known| match known {
        Answer::Volume(_, space) => space.used.map(Number::Whole),
        _ => None,
    });
    ages(folders, page, &VOLUME_AGE, volume);
}

/// How long ago the storage proxy told of each.
fn ages(
    folders: &Folders,
    page: &mut Page,
    family: &super::Family,
    of: fn(&Query) -> Option<String>,
) {
    for (question, CacheEntry { answer, .. }) in folders.known.all() {
        if let (Some(labels), Some((_, at))) = (of(question), answer) {
            let age = folders.now.saturating_duration_since(*at);
            page.sample(family, &labels, age.as_secs_f64());
        }
    }
}

fn each(
    known: &Cache,
    page: &mut Page,
    family: &super::Family,
    of: fn(&Query) -> Option<String>,
    read: &dyn Fn(&Answer) -> Option<Number>,
) {
    for (question, known) in known.all() {
        if let (Some(labels), Some((answer, _))) = (of(question), &known.answer) {
            page.measured(family, &labels, read(answer));
        }
    }
}

fn folder(question: &Query) -> Option<String> {
    match question {
        Query::Folder(volume, folder) => {
            Some(labels(&[("volume", volume), ("vfolder", folder.as_str())]))
        }
        _ => None,
    }
}

fn scope(question: &Query) -> Option<String> {
    match question {
        Query::Scope(volume, scope) => Some(labels(&[("volume", volume), ("quota_scope", scope)])),
        _ => None,
    }
}

fn volume(question: &Query) -> Option<String> {
    match question {
        Query::Volume(name) => Some(labels(&[("volume", name)])),
        _ => None,
    }
}
