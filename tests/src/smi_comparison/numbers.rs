//! The numbers of a device in the two programs' words and units.

use shared::observed::AcceleratorRow;

/// MiB by which two amounts of memory may differ: both are rounded.
pub(super) const ROUNDED: f64 = 2.0;
/// Percent by which busy shares may differ: they are sampled at different times.
pub(super) const SAMPLED: f64 = 15.0;

/// A number of a device in the two programs' words, and by how much they may differ: an amount, and
/// a share of what `nvidia-smi` says.
pub(super) type Number = (&'static str, fn(&AcceleratorRow) -> Option<f64>, f64, f64);

pub(super) const NUMBERS: [Number; 13] = [
    (
        "memory.total",
        |row| mib(row.counters.memory_total_bytes),
        1.0,
        0.0,
    ),
    ("memory.free", |row| free(row), ROUNDED, 0.0),
    (
        "utilization.gpu",
        |row| percent(row.counters.utilisation_permille),
        SAMPLED,
        0.0,
    ),
    (
        "utilization.memory",
        |row| percent(row.counters.memory_utilisation_permille),
        SAMPLED,
        0.0,
    ),
    (
        "utilization.encoder",
        |row| percent(row.counters.encoder_permille),
        SAMPLED,
        0.0,
    ),
    (
        "utilization.decoder",
        |row| percent(row.counters.decoder_permille),
        SAMPLED,
        0.0,
    ),
    (
        "power.draw",
        |row| thousandths(row.counters.power_mw),
        5.0,
        0.1,
    ),
    (
        "enforced.power.limit",
        |row| thousandths(row.counters.power_limit_mw),
        0.1,
        0.0,
    ),
    (
        "temperature.gpu",
        |row| thousandths(row.counters.temperature_mc),
        3.0,
        0.0,
    ),
    ("clocks.sm", |row| whole(row.counters.clock_mhz), 15.0, 0.05),
    (
        "clocks.mem",
        |row| whole(row.counters.memory_clock_mhz),
        0.0,
        0.05,
    ),
    (
        "ecc.errors.corrected.volatile.total",
        |row| whole(row.counters.ecc_corrected),
        0.0,
        0.0,
    ),
    (
        "ecc.errors.uncorrected.volatile.total",
        |row| whole(row.counters.ecc_uncorrected),
        0.0,
        0.0,
    ),
];

pub(super) fn whole(number: Option<u64>) -> Option<f64> {
    // Exact below 2^53, which none of these reaches.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    number.map(|number| number as f64)
}

pub(super) fn thousandths(number: Option<u64>) -> Option<f64> {
    Some(whole(number)? / 1000.0)
}

pub(super) fn mib(bytes: Option<u64>) -> Option<f64> {
    Some(whole(Some(bytes? >> 10))? / 1024.0)
}

pub(super) fn free(row: &AcceleratorRow) -> Option<f64> {
    let counters = &row.counters;
    mib(Some(
        counters
            .memory_total_bytes?
            .saturating_sub(counters.memory_used_bytes?),
    ))
}

pub(super) fn percent<N: Into<u64>>(permille: Option<N>) -> Option<f64> {
    Some(whole(Some(permille?.into()))? / 10.0)
}

pub(super) fn show(number: Option<f64>) -> String {
    number.map_or_else(
        || "not told".to_owned(),
        |number| {
            let text = format!("{number:.1}");
            text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
        },
    )
}
