//! Placing whole units.

use rust_decimal::Decimal;
use rust_decimal::prelude::ToPrimitive;

use super::allocation::Shares;
use super::map::{AllocationMap, MapRequest};
use super::{Amount, ResourceError};

const NOT_ENOUGH: &str = "DiscretePropertyAllocMap: insufficient allocatable amount!";
const NO_CANDIDATE: &str = "DiscretePropertyAllocMap: insufficient allocatable candidate devices!";
/// Rounds after which the original gives up; devices with parts of a unit left could go on for ever.
const ROUNDS: usize = 100;

fn insufficient(
    message: &'static str,
    slot: &str,
    requested: Amount,
    total: Amount,
    request: MapRequest<'_>,
) -> ResourceError {
    let context = request.context.map(str::to_owned);
    ResourceError::Insufficient {
        message,
        slot: slot.to_owned(),
        requested,
        total,
        context,
    }
}

pub(super) fn fill(
    map: &mut AllocationMap,
    slot: &str,
    requested: Amount,
    request: MapRequest<'_>,
) -> Result<Shares, ResourceError> {
    let devices = map.ordered(slot, requested, request.hint);
    let total: Amount = devices.iter().map(|device| device.free.trunc()).sum();
    if total < requested {
        return Err(insufficient(NOT_ENOUGH, slot, requested, total, request));
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
    for (id, share) in &shares {
        map.add(slot, id, *share);
    }
    Ok(shares)
}

pub(super) fn evenly(
    map: &mut AllocationMap,
    slot: &str,
    requested: Amount,
    request: MapRequest<'_>,
) -> Result<Shares, ResourceError> {
    let mut remaining = requested.trunc();
    let order = map.ordered(slot, requested, request.hint);
    // Amounts taken, in the order of `order`.
    let mut taken = vec![Decimal::ZERO; order.len()];
    let mut rounds = 0;
    while remaining > Decimal::ZERO {
        rounds += 1;
        if rounds > ROUNDS {
            return Err(ResourceError::General(format!(
                "DiscretePropertyAllocMap: too many repeats placing {requested} of {slot}"
            )));
        }
        let free = |index: usize| order[index].free - taken[index];
        let total: Amount = (0..order.len()).map(free).sum::<Amount>().trunc();
        if total < remaining {
            return Err(insufficient(NOT_ENOUGH, slot, requested, total, request));
        }
        let candidates: Vec<usize> = (0..order.len())
            .filter(|index| free(*index) > Decimal::ZERO)
            .collect();
        if candidates.is_empty() {
            return Err(insufficient(NO_CANDIDATE, slot, requested, total, request));
        }
        let parts = distribute(remaining, candidates.len());
        for (index, part) in candidates.into_iter().zip(parts) {
            let share = part
                .min((order[index].free - taken[index]).trunc())
                .min(remaining);
            taken[index] += share;
            remaining -= share;
        }
    }
    // Device-list order, not the order of choice.
    let mut shares = Shares::new();
    for device in map.candidates(slot) {
        let place = order.iter().position(|candidate| candidate.id == device.id);
        let share = place.map_or(Decimal::ZERO, |index| taken[index]);
        if share > Decimal::ZERO {
            shares.push((device.id, share));
        }
    }
    for (id, share) in &shares {
        map.add(slot, id, *share);
    }
    Ok(shares)
}

/// `count` whole parts of a whole amount that differ by at most one, the larger first.
fn distribute(amount: Amount, count: usize) -> Vec<Amount> {
    let groups = Decimal::from(count);
    let base = (amount / groups).trunc();
    let larger = (amount - base * groups).to_usize().unwrap_or(0);
    (0..count)
        .map(|index| {
            if index < larger {
                base + Decimal::ONE
            } else {
                base
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_differ_by_one_at_most() {
        for (amount, count, expected) in [
            (5, 3, vec![2, 2, 1]),
            (2, 4, vec![1, 1, 0, 0]),
            (10, 4, vec![3, 3, 2, 2]),
        ] {
            let expected: Vec<Decimal> = expected.into_iter().map(Decimal::from).collect();
            assert_eq!(distribute(amount.into(), count), expected);
        }
    }
}
