//! What kind of part of a device a MIG instance is, in NVIDIA's words.
//!
//! In: the name of an instance, else its sizes. Out: the profile, which names its slot. Invariant: the
//! same for all instances of a kind, whatever the driver keeps of their memory for itself.
//!
//! Source: NVIDIA's guide to MIG, "Supported MIG Profiles".

use nvml_wrapper::struct_wrappers::device::DeviceAttributes;

/// Profiles are fractions of the memory with this denominator.
const EIGHTHS: u64 = 8;

/// `1g.18gb` of `NVIDIA H200 MIG 1g.18gb`, as drivers name instances. Media extensions are written
/// as in the resource names of NVIDIA's device plugin: `1g.18gb.me` is `1g.18gb+me`.
pub(super) fn of_name(name: &str) -> Option<String> {
    let (_, profile) = name.rsplit_once(" MIG ")?;
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+.,-".contains(c);
    let is_profile = profile.contains("g.") && profile.starts_with(|c: char| c.is_ascii_digit());
    (is_profile && profile.chars().all(plain)).then(|| profile.replace(['+', ','], "."))
}

/// `3g.71gb`: slices of the chip, and the eighths of the device's memory that the instance has a part
/// of, in whole GiB of the device. A compute instance that is a part of its GPU instance has its own
/// slices before that: `1c.3g.71gb`.
pub(super) fn of_sizes(sizes: &DeviceAttributes, memory: u64, of_whole: u64) -> String {
    let whole_gib = of_whole.div_ceil(1 << 30);
    let eighths = memory.saturating_mul(EIGHTHS).div_ceil(of_whole.max(1));
    // To the nearest whole number.
    let gib = (eighths.min(EIGHTHS) * whole_gib * 2 + EIGHTHS) / (2 * EIGHTHS);
    let (compute, gpu) = (
        sizes.compute_instance_slice_count,
        sizes.gpu_instance_slice_count,
    );
    let own = match compute == gpu || compute == 0 {
        true => String::new(),
        false => format!("{compute}c."),
    };
    format!("{own}{gpu}g.{gib}gb")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(gpu: u32, compute: u32) -> DeviceAttributes {
        DeviceAttributes {
            multiprocessor_count: 0,
            shared_copy_engine_count: 0,
            shared_decoder_count: 0,
            shared_encoder_count: 0,
            shared_jpeg_count: 0,
            shared_ofa_count: 0,
            gpu_instance_slice_count: gpu,
            compute_instance_slice_count: compute,
            memory_size_mb: 0,
        }
    }

    #[test]
    fn names_of_instances_end_in_their_profile() {
        let of = |name: &str| of_name(name).unwrap_or_default();
        assert_eq!(of("NVIDIA A100-SXM4-40GB MIG 1g.5gb"), "1g.5gb");
        assert_eq!(of("NVIDIA H200 MIG 1c.3g.71gb"), "1c.3g.71gb");
        assert_eq!(of("NVIDIA H100 80GB HBM3 MIG 1g.10gb+me"), "1g.10gb.me");
        for other in [
            "NVIDIA H200",
            "MIG 1g.5gb",
            "X MIG ",
            "X MIG Yg.5gb",
            "X MIG 1g.5gb/x",
            "X MIG 12",
        ] {
            assert_eq!(of(other), "", "{other}");
        }
    }

    /// Sizes as published for each device: of an instance, and of the whole, MiB.
    #[test]
    fn sizes_are_named_as_nvidia_names_them() {
        for (slices, part, whole, name) in [
            (1, 4_864, 40_960, "1g.5gb"),
            (3, 19_968, 40_960, "3g.20gb"),
            (7, 40_192, 40_960, "7g.40gb"),
            (1, 9_856, 81_559, "1g.10gb"),
            (2, 20_096, 81_559, "2g.20gb"),
            (1, 16_384, 143_771, "1g.18gb"),
            (1, 33_280, 143_771, "1g.35gb"),
            (3, 71_424, 143_771, "3g.71gb"),
            (7, 143_000, 143_771, "7g.141gb"),
        ] {
            let found = of_sizes(&sizes(slices, slices), part << 20, whole << 20);
            assert_eq!(found, name, "{part} MiB of {whole}");
        }
        let part = of_sizes(&sizes(3, 1), 19_968 << 20, 40_960 << 20);
        assert_eq!(part, "1c.3g.20gb");
        assert_eq!(of_sizes(&sizes(1, 1), 5, 0), "1g.0gb");
    }
}
