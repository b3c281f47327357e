//! Numbers of the records: exact decimals, and the text the manager parses.
//!
//! Invariant: a text has no exponent and no needless zero, and is a number for every reader.

use rust_decimal::{Decimal, RoundingStrategy};

/// The text of a percentage that can not be told: no capacity, or one of zero.
pub const NO_PERCENTAGE: &str = "0.00";

/// A value as text: at most three places, half to even.
pub fn value_text(value: Decimal) -> String {
    text(value, 3)
}

/// `value` of `capacity` in percent as text: at most two places.
pub fn percentage_text(value: Decimal, capacity: Option<Decimal>) -> String {
    capacity
        .filter(|capacity| *capacity > Decimal::ZERO)
        .and_then(|capacity| {
            value
                .checked_div(capacity)?
                .checked_mul(Decimal::ONE_HUNDRED)
        })
        .map_or_else(
            || NO_PERCENTAGE.to_owned(),
            |percentage| text(percentage, 2),
        )
}

fn text(value: Decimal, places: u32) -> String {
    value
        .round_dp_with_strategy(places, RoundingStrategy::MidpointNearestEven)
        .normalize()
        .to_string()
}

/// Nanoseconds as milliseconds with three places.
pub fn milliseconds(nanoseconds: u64) -> Decimal {
    (Decimal::from(nanoseconds) / Decimal::from(1_000_000))
        .round_dp_with_strategy(3, RoundingStrategy::MidpointNearestEven)
}

/// Nanoseconds as seconds, exactly.
pub fn seconds(nanoseconds: u64) -> Decimal {
    Decimal::from(nanoseconds) / Decimal::from(1_000_000_000)
}

/// Thousandths as percent.
pub fn percent_of_permille(permille: u64) -> Decimal {
    Decimal::from(permille) / Decimal::TEN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_those_of_the_original() {
        let golden: serde_json::Value = serde_json::from_str(include_str!(
            "../../../tests/vectors/telemetry/stats_golden.json"
        ))
        .unwrap();
        let mut compared = 0;
        for row in golden["decimal_format"].as_array().unwrap() {
            let [input, places, wanted] = [0, 1, 2].map(|index| row[index].as_str().unwrap());
            // What no counter can be: infinite, negative, beyond 28 digits.
            let Ok(value) =
                Decimal::from_str_exact(input).or_else(|_| Decimal::from_scientific(input))
            else {
                assert!(matches!(input, "Infinity" | "NaN"), "{input}");
                continue;
            };
            if value.is_sign_negative() || wanted.contains("E+") {
                continue;
            }
            let places = u32::try_from(places.len() - 2).unwrap();
            assert_eq!(text(value, places), wanted, "{input}");
            compared += 1;
        }
        assert!(compared >= 9, "{compared}");
    }

    #[test]
    fn a_percentage_needs_a_capacity() {
        let percentage = |value: u64, capacity: Option<u64>| {
            percentage_text(Decimal::from(value), capacity.map(Decimal::from))
        };
        assert_eq!(percentage(5, None), "0.00");
        assert_eq!(percentage(5, Some(0)), "0.00");
        assert_eq!(percentage(0, Some(5)), "0");
        assert_eq!(percentage(33, Some(800)), "4.12");
        assert_eq!(percentage(u64::MAX, Some(1)), "1844674407370955161500");
    }

    #[test]
    fn nanoseconds_become_milliseconds_with_three_places() {
        assert_eq!(milliseconds(1_234_567_890).to_string(), "1234.568");
        assert_eq!(value_text(milliseconds(2_000_000_000)), "2000");
    }
}
