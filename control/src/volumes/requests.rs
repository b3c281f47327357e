//! Requests of the bus, carried out one after the other.
//!
//! In: what managers ask of all agents. Out: one answer each, as an event. Invariant: an answer is
//! sent whatever becomes of the request, so that nobody waits for this node.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::{MountOrder, UnmountOrder, UsedFolder, VolumeOutcome};
use crate::causes::chain;
use crate::events::bus::VolumeRequest;
use crate::events::{Event, VolumeAnswer};
use crate::kernel::Node;

/// The table of a request that names none.
const USUAL_FSTAB: &str = "/etc/fstab";

/// Carries out requests until the agent stops or nobody makes any more.
pub async fn serve(node: Arc<Node>, mut requests: mpsc::Receiver<VolumeRequest>) {
    loop {
        let request = tokio::select! {
            request = requests.recv() => request,
            () = node.stopping.cancelled() => return,
        };
        let Some(request) = request else { return };
        let event = carry_out(&node, request).await;
        node.events.emit(event);
    }
}

/// One request; its answer.
pub async fn carry_out(node: &Arc<Node>, request: VolumeRequest) -> Event {
    match request {
        VolumeRequest::Mount {
            dir_name,
            quota_scope,
            location,
            fs_type,
            options,
            edit_fstab,
            fstab_path,
            ..
        } => {
            let order = MountOrder {
                dir_name,
                location,
                fs_type,
                options,
                fstab: edit_fstab.then(|| PathBuf::from(fstab_path)),
            };
            let outcome = node.volumes.mount(&order).await;
            Event::VolumeMounted(answer(node, quota_scope, &outcome))
        }
        VolumeRequest::Unmount {
            dir_name,
            quota_scope,
            edit_fstab,
            fstab_path,
            ..
        } => {
            let table = fstab_path.unwrap_or_else(|| USUAL_FSTAB.to_owned());
            let order = UnmountOrder {
                dir_name,
                fstab: edit_fstab.then(|| PathBuf::from(table)),
            };
            let used = || used_folders(node);
            let outcome = node.volumes.unmount(&order, &used).await;
            Event::VolumeUnmounted(answer(node, quota_scope, &outcome))
        }
    }
}

fn answer(node: &Node, quota_scope: String, outcome: &VolumeOutcome) -> VolumeAnswer {
    if let Some(err) = &outcome.error {
        tracing::warn!(
            err = chain(err),
            "a request for a volume was not carried out"
        );
    }
    VolumeAnswer {
        agent: node.agent_id().to_owned(),
        path: outcome.path.to_string_lossy().into_owned(),
        quota_scope,
        error: outcome.error.as_ref().map(|err| chain(err)),
    }
}

/// The folders of all kernels.
fn used_folders(node: &Node) -> Vec<UsedFolder> {
    let kernels = node.registry.all().into_iter();
    let folders = kernels.flat_map(|kernel| {
        let user = kernel.id.to_string();
        kernel.with_record(|record| {
            let mounts = record.mounts.iter();
            let used = mounts.map(|mount| (PathBuf::from(&mount.source), user.clone()));
            used.collect::<Vec<_>>()
        })
    });
    folders.collect()
}
