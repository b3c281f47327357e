//! Placing shares: amounts with two decimals, rounded down to a quantum.

use std::cmp::Ordering;

use rust_decimal::prelude::ToPrimitive;
use rust_decimal::{Decimal, RoundingStrategy};

use super::affinity::Candidate;
use super::allocation::Shares;
use super::map::{AllocationMap, MapRequest, Strategy};
use super::{Amount, ResourceError};

/// Resolution of the arithmetic.
pub(super) const RESOLUTION: Decimal = Decimal::from_parts(1, 0, 0, false, 2);
const NOT_ENOUGH: &str = "FractionAllocMap: insufficient allocatable amount!";

fn rounded(amount: Amount) -> Amount {
    amount.round_dp_with_strategy(2, RoundingStrategy::MidpointNearestEven)
}

/// The largest multiple of the quantum that is not above the amount.
fn multiple(amount: Amount, quantum: Amount) -> Amount {
    let rest = amount % quantum;
    amount
        - if rest < Decimal::ZERO {
            rest + quantum
        } else {
            rest
        }
}

pub(super) fn allocate(
    map: &mut AllocationMap,
    slot: &str,
    requested: Amount,
    strategy: Strategy,
    quantum: Amount,
    request: MapRequest<'_>,
) -> Result<Shares, ResourceError> {
    let devices = map.ordered(slot, requested, request.hint);
    if !request.allow_fragmentation {
        check_whole(&devices, slot, requested, request)?;
    }
    let mut shares = match strategy {
        Strategy::Fill => fill(devices, slot, requested, request)?,
        Strategy::Evenly => evenly(devices, slot, requested, request)?,
    };
    let mut sum = Decimal::ZERO;
    for (id, share) in &mut shares {
        if let Some(used) = map.used_mut(slot, id) {
            *used = multiple(*used + *share, quantum);
        }
        *share = multiple(*share, quantum);
        sum += *share;
    }
    if sum.is_zero() {
        return Err(ResourceError::Quantum {
            slot: slot.to_owned(),
            requested,
            quantum,
        });
    }
    Ok(shares)
}

fn check_whole(
    devices: &[Candidate],
    slot: &str,
    requested: Amount,
    request: MapRequest<'_>,
) -> Result<(), ResourceError> {
    let message = match devices.first() {
        None => "no device left",
        Some(first) if first.free < requested => "no device has the whole amount left",
        Some(_) => return Ok(()),
    };
    let context = request.context.map(str::to_owned);
    Err(ResourceError::Fragmented {
        message,
        slot: slot.to_owned(),
        requested,
        context,
    })
}

fn insufficient(
    slot: &str,
    requested: Amount,
    total: Amount,
    request: MapRequest<'_>,
) -> ResourceError {
    ResourceError::Insufficient {
        message: NOT_ENOUGH,
        slot: slot.to_owned(),
        requested,
        total,
        context: request.context.map(str::to_owned),
    }
}

fn fill(
    devices: Vec<Candidate>,
    slot: &str,
    requested: Amount,
    request: MapRequest<'_>,
) -> Result<Shares, ResourceError> {
    let total: Amount = devices.iter().map(|device| device.free).sum();
    if total < requested {
        return Err(insufficient(slot, requested, total, request));
    }
    let mut remaining = requested;
    let mut shares = Shares::new();
    for device in devices {
        let share = device.free.min(remaining);
        if share > Decimal::ZERO {
            shares.push((device.id, share));
            remaining -= share;
        }
    }
    Ok(shares)
}

fn evenly(
    devices: Vec<Candidate>,
    slot: &str,
    requested: Amount,
    request: MapRequest<'_>,
) -> Result<Shares, ResourceError> {
    let devices: Vec<Candidate> = devices
        .into_iter()
        .filter(|device| rounded(device.free) >= RESOLUTION)
        .collect();
    let free = |window: &[Candidate]| rounded(window.iter().map(|device| device.free).sum());
    let total = free(&devices);
    if total < rounded(requested) {
        return Err(insufficient(slot, requested, total, request));
    }
    // Best fit: the device with the least room that still takes it all.
    if let Some(last) = devices.iter().rev().find(|device| requested <= device.free)
        && devices.first().is_some_and(|first| requested <= first.free)
    {
        return Ok(vec![(last.id.clone(), rounded(requested))]);
    }
    let fewest = (1..=devices.len()).find(|n| free(&devices[..*n]) >= rounded(requested));
    let mut kept: Vec<Split> = Vec::new();
    for count in fewest.unwrap_or(devices.len()).max(1)..=devices.len() {
        let mut windows = devices.windows(count);
        let Some(first) = windows.next().map(|window| split(window, requested)) else {
            continue;
        };
        let bar = first.evenness;
        let mut best = first;
        for window in windows {
            let next = split(window, requested);
            if free(window) < rounded(requested) || next.evenness < bar {
                break;
            }
            if next.shares.len() <= best.shares.len() {
                best = next;
            }
        }
        kept.push(best);
    }
    // The last of equals, as after a stable sort.
    let chosen = kept.into_iter().reduce(|best, next| {
        let order = next
            .evenness
            .cmp(&best.evenness)
            .then(best.shares.len().cmp(&next.shares.len()));
        if order == Ordering::Less { best } else { next }
    });
    Ok(chosen.map(|split| split.shares).unwrap_or_default())
}

/// A way to split a request over some devices.
struct Split {
    shares: Shares,
    /// Zero when all parts are equal, below when they differ.
    evenness: Amount,
}

/// Gives devices with too little room all they have, from the last on, and the rest equal parts.
fn split(window: &[Candidate], requested: Amount) -> Split {
    let mut remaining = requested;
    let mut left = window;
    let mut shares = Shares::new();
    while let Some((last, others)) = left.split_last() {
        if last.free >= remaining / Decimal::from(left.len()) {
            break;
        }
        shares.push((last.id.clone(), rounded(last.free)));
        remaining -= last.free;
        left = others;
    }
    if !left.is_empty() {
        let count = Decimal::from(left.len());
        let part =
            (remaining / count).round_dp_with_strategy(2, RoundingStrategy::ToNegativeInfinity);
        let cents = (remaining - part * count) * Decimal::ONE_HUNDRED;
        let larger = cents.round_dp_with_strategy(0, RoundingStrategy::MidpointNearestEven);
        let larger = larger.to_usize().unwrap_or(0);
        for (index, device) in left.iter().enumerate() {
            let extra = if index < larger {
                RESOLUTION
            } else {
                Decimal::ZERO
            };
            shares.push((device.id.clone(), part + extra));
        }
    }
    let amounts = || shares.iter().map(|(_, share)| *share);
    // Neighbours of a sorted list differ by its span in sum.
    let span = amounts().max().unwrap_or_default() - amounts().min().unwrap_or_default();
    Split {
        shares,
        evenness: -span,
    }
}
