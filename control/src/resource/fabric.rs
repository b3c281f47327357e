//! Which devices to give together: those with the fastest ways between them.
//!
//! In: devices that are as good as each other otherwise, and how near they are. Out: an order. Invariant:
//! without knowledge of the ways, and for a single device, the order stays.

use std::collections::HashMap;

use super::affinity::Candidate;

/// How near the devices of a plugin are: id of one, id of the other, the larger the nearer.
pub(super) type Ways<'a> = HashMap<(&'a str, &'a str), u8>;

/// Puts the `count` devices with the best ways among those that are equally free first.
///
/// Every device is tried as the first one, and the nearest to those taken is added again and again:
/// not always the best set, but always one without a worse neighbour than needed, in `n² count` steps.
pub(super) fn together(mut all: Vec<Candidate>, count: usize, ways: &Ways<'_>) -> Vec<Candidate> {
    let Some(first) = all.first() else {
        return all;
    };
    let equal = all.iter().take_while(|one| one.free == first.free).count();
    if count < 2 || count >= equal || ways.is_empty() {
        return all;
    }
    let ids: Vec<&str> = all[..equal].iter().map(|one| one.id.as_str()).collect();
    let near = |one: usize, other: usize| -> u32 {
        ways.get(&(ids[one], ids[other]))
            .copied()
            .map_or(0, u32::from)
    };
    let grown = (0..equal).map(|seed| {
        let mut taken = vec![seed];
        let mut sum = 0;
        let mut gain: Vec<u32> = (0..equal).map(|other| near(seed, other)).collect();
        while taken.len() < count {
            let left = (0..equal).filter(|place| !taken.contains(place));
            let Some(next) = left.max_by_key(|place| (gain[*place], std::cmp::Reverse(*place)))
            else {
                break;
            };
            sum += gain[next];
            taken.push(next);
            for (other, gain) in gain.iter_mut().enumerate() {
                *gain += near(next, other);
            }
        }
        (sum, taken)
    });
    // The first of the best, so that equal sets go in the order of the list.
    let best = grown.reduce(|best, next| if next.0 > best.0 { next } else { best });
    let Some((1.., mut taken)) = best else {
        return all;
    };
    taken.sort_unstable();
    let mut chosen: Vec<Candidate> = taken.iter().map(|place| all[*place].clone()).collect();
    let mut place = 0;
    all.retain(|_| {
        place += 1;
        !taken.contains(&(place - 1))
    });
    chosen.append(&mut all);
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use rust_decimal::Decimal;

    fn order(free: &[i64], count: usize, near: &[(&'static str, &'static str, u8)]) -> String {
        let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
        let all = free.iter().zip(names).map(|(free, id)| Candidate {
            id: id.to_owned(),
            used: Decimal::ZERO,
            free: Decimal::from(*free),
        });
        let ways = near
            .iter()
            .flat_map(|(one, other, way)| [((*one, *other), *way), ((*other, *one), *way)]);
        let ordered = together(all.collect(), count, &ways.collect());
        ordered.into_iter().map(|one| one.id).collect()
    }

    #[test]
    fn nothing_known_or_nothing_to_choose_keeps_the_order() {
        let near = [("b", "d", 20)];
        assert_eq!(order(&[1, 1, 1, 1], 2, &[]), "abcd");
        assert_eq!(order(&[1, 1, 1, 1], 1, &near), "abcd");
        assert_eq!(order(&[1, 1, 1, 1], 4, &near), "abcd");
        assert_eq!(order(&[], 2, &near), "");
        // Only those that are as free as the first one are exchanged.
        assert_eq!(order(&[2, 2, 1, 1], 2, &near), "abcd");
    }

    #[test]
    fn devices_with_the_best_ways_come_first() {
        assert_eq!(
            order(&[1, 1, 1, 1], 2, &[("a", "b", 1), ("b", "d", 20)]),
            "bdac"
        );
        // Two pairs are as good: the earlier one.
        assert_eq!(
            order(&[1, 1, 1, 1], 2, &[("c", "d", 20), ("a", "b", 20)]),
            "abcd"
        );
        // Four of six: not the pair that is near and far from all others, but the island of four.
        let mut near = vec![("a", "b", 20)];
        for (one, other) in [
            ("c", "d"),
            ("c", "e"),
            ("c", "f"),
            ("d", "e"),
            ("d", "f"),
            ("e", "f"),
        ] {
            near.push((one, other, 20));
        }
        assert_eq!(order(&[1; 6], 4, &near), "cdefab");
    }
}
