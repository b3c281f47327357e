//! Faults as devices report them (XID).
//!
//! In: the driver's events. Out: the last fault of each device, and whether it is the device's own. Invariant: a fault
//! of an application never hides one of the device.
//!
//! Source: NVIDIA's XID catalogue.

use std::time::Instant;

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::{Device, EventSet};

use super::{INTERVAL, RETRY, Session, is_not_offered};

/// XIDs that an application causes: they say nothing about the device.
const OF_APPLICATIONS: [u64; 7] = [13, 31, 43, 45, 68, 94, 109];

/// So often a device is asked to tell faults, with pauses that grow to [`RETRY`], before it is taken to
/// tell none.
const REGISTRATIONS: u32 = 16;

/// How a device tells its faults.
pub(super) enum Watch<'nvml> {
    By(EventSet<'nvml>),
    /// It could not be asked to, so often; it is asked again then.
    Failed {
        times: u32,
        again: Instant,
    },
    /// It has none to tell, or has failed too often.
    Silent,
}

impl<'nvml> Session<'nvml> {
    /// Asks to be told of a device's faults, if that is not done; again later where it fails.
    pub(super) fn watch(&mut self, device: &Device<'nvml>, id: &str) {
        let failed = match self.events.get(id) {
            Some(Watch::By(_) | Watch::Silent) => return,
            Some(Watch::Failed { again, .. }) if Instant::now() < *again => return,
            Some(Watch::Failed { times, .. }) => *times,
            None => 0,
        };
        let kinds = EventTypes::CRITICAL_XID_ERROR | EventTypes::DOUBLE_BIT_ECC_ERROR;
        // Asked for one that it does not have, a device tells none.
        let kinds = device
            .supported_event_types()
            .map_or(kinds, |its| kinds & its);
        let set = self.nvml.create_event_set();
        let set = set.and_then(|set| device.register_events(kinds, set).map_err(|err| err.error));
        let watch = match set {
            Ok(set) => {
                if failed > 0 {
                    tracing::info!(device = id, "the device tells faults now");
                }
                Watch::By(set)
            }
            Err(err) if is_not_offered(&err) => {
                tracing::debug!(device = id, %err, "the device tells no faults");
                Watch::Silent
            }
            Err(err) => {
                let times = failed + 1;
                if times == 1 {
                    tracing::warn!(device = id, %err,
                        "a device can't be asked to tell its faults, this is tried again");
                }
                if times < REGISTRATIONS {
                    let pause = INTERVAL * 2_u32.saturating_pow(failed);
                    let again = Instant::now() + pause.min(RETRY);
                    Watch::Failed { times, again }
                } else {
                    tracing::warn!(device = id, %err,
                        "a device could not be asked to tell its faults: restart bai-dataplane when the driver works");
                    Watch::Silent
                }
            }
        };
        self.events.insert(id.to_owned(), watch);
    }

    pub(super) fn take_events(&mut self) {
        let mut all = Vec::new();
        for watch in self.events.values() {
            let Watch::By(set) = watch else {
                continue;
            };
            // As many as there may reasonably be: a storm of them must not keep the thread.
            all.extend((0..64).map_while(|_| set.wait(0).ok()));
        }
        for event in all {
            let Ok(id) = event.device.uuid() else {
                continue;
            };
            let (code, own) = match event.event_data {
                Some(XidError::Value(code)) => (code, !OF_APPLICATIONS.contains(&code)),
                _ => (48, true),
            };
            tracing::warn!(
                device = id,
                xid = code,
                of_device = own,
                "an NVIDIA device reports a fault"
            );
            let code = u32::try_from(code).unwrap_or(u32::MAX);
            let kept = self.history.faults.entry(id).or_insert((code, own));
            // An application's fault never hides one of the device.
            *kept = (if own || !kept.1 { code } else { kept.0 }, kept.1 || own);
        }
    }
}
