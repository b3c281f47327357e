//! How busy MIG instances are, by the driver's performance monitoring (GPM).
//!
//! In: a divided device and the ids of its instances. Out: busy shares of an instance since the last
//! look. Invariants: the numbers are of one GPU instance and belong to a compute instance only where
//! that is all of it; the first look tells nothing, because a share takes two samples; a library, a
//! device or a driver without GPM (before Hopper) tells nothing at all.
//!
//! Source: NVIDIA's NVML API reference, "GPM Functions"; shares are percents from 0.0 to 100.0.

use std::collections::{HashMap, HashSet};

use nvml_wrapper::enums::gpm::GpmMetricId;
use nvml_wrapper::gpm::{GpmSample, gpm_metrics_get};
use nvml_wrapper::{Device, Nvml};

use super::is_not_offered;

/// Busy shares, thousandths.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Load {
    /// Of its processors: the share of time in which any program ran on it.
    pub busy: Option<u64>,
    /// Of its memory's bandwidth.
    pub memory: Option<u64>,
}

/// The last sample of each instance.
#[derive(Debug)]
pub(super) struct InstanceLoads<'nvml> {
    nvml: &'nvml Nvml,
    /// Whether the library has the calls.
    offered: bool,
    /// Whether a device has them, by UUID.
    supported: HashMap<String, bool>,
    /// By the instance's UUID: one that is made anew under an old number begins anew.
    samples: HashMap<String, GpmSample<'nvml>>,
    /// Instances of this look.
    seen: HashSet<String>,
}

impl<'nvml> InstanceLoads<'nvml> {
    pub(super) fn new(nvml: &'nvml Nvml) -> Self {
        let library = nvml.lib();
        let offered = library.nvmlGpmSampleAlloc.is_ok()
            && library.nvmlGpmSampleFree.is_ok()
            && library.nvmlGpmMigSampleGet.is_ok()
            && library.nvmlGpmMetricsGet.is_ok()
            && library.nvmlGpmQueryDeviceSupport.is_ok();
        Self {
            nvml,
            offered,
            supported: HashMap::new(),
            samples: HashMap::new(),
            seen: HashSet::new(),
        }
    }

    /// The load of an instance since the last look.
    pub(super) fn read(
        &mut self,
        (device, id): (&Device<'nvml>, &str),
        (instance, instance_id): (u32, &str),
    ) -> Load {
        if !self.offered || !self.is_supported(device, id) {
            return Load::default();
        }
        self.seen.insert(instance_id.to_owned());
        let before = self.samples.remove(instance_id);
        let Ok(now) = device.gpm_mig_sample(instance) else {
            return Load::default();
        };
        let load = before.map_or_else(Load::default, |before| self.between(&before, &now));
        self.samples.insert(instance_id.to_owned(), now);
        load
    }

    fn is_supported(&mut self, device: &Device<'nvml>, id: &str) -> bool {
        if let Some(known) = self.supported.get(id) {
            return *known;
        }
        match device.gpm_support() {
            Ok(supported) => {
                self.supported.insert(id.to_owned(), supported);
                supported
            }
            Err(err) => {
                if is_not_offered(&err) {
                    self.supported.insert(id.to_owned(), false);
                }
                false
            }
        }
    }

    fn between(&self, before: &GpmSample<'nvml>, now: &GpmSample<'nvml>) -> Load {
        const WANTED: [GpmMetricId; 3] = [
            GpmMetricId::GraphicsUtil,
            GpmMetricId::SmUtil,
            GpmMetricId::DramBwUtil,
        ];
        let told = gpm_metrics_get(self.nvml, before, now, &WANTED).unwrap_or_default();
        let percent = |wanted: GpmMetricId| {
            let mut all = told.iter().flatten();
            permille(all.find(|metric| metric.metric_id == wanted)?.value)
        };
        Load {
            busy: percent(GpmMetricId::GraphicsUtil).or_else(|| percent(GpmMetricId::SmUtil)),
            memory: percent(GpmMetricId::DramBwUtil),
        }
    }

    /// Ends a look: samples of instances that were not in it are given back.
    pub(super) fn end_look(&mut self) {
        let seen = std::mem::take(&mut self.seen);
        self.samples.retain(|id, _| seen.contains(id));
    }
}

/// Thousandths; what is no share is no answer.
fn permille(percent: f64) -> Option<u64> {
    if !percent.is_finite() || percent < 0.0 {
        return None;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "from 0 to 1000"
    )]
    Some((percent.min(100.0) * 10.0).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_share_is_no_answer() {
        assert_eq!(
            [0.0, 0.04, 0.05, 33.34, 100.0, 100.4].map(permille),
            [0, 0, 1, 333, 1000, 1000].map(Some)
        );
        for odd in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.1] {
            assert_eq!(permille(odd), None, "{odd}");
        }
    }
}
