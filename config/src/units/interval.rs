//! Intervals: a number of seconds, or a number with a unit such as `500ms`, `10s`, `5m`, `2h`, `1d`.

use std::time::Duration;

use super::Fault;

const REMEDY: &str =
    "write seconds as a number, or a number with ms, s, m, h or d, such as \"500ms\" or \"2h\"";
/// About a hundred years: longer is a slip of the hand, and stays far from overflow in sums.
const LONGEST_SECONDS: f64 = 100.0 * 365.0 * 86_400.0;

/// Parses an interval; a bare number counts seconds.
///
/// # Errors
/// It is no interval.
pub fn parse_interval(text: &str) -> Result<Duration, Fault> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor = match unit.trim_start() {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3_600.0,
        "d" => 86_400.0,
        _ => {
            return Err(Fault::new(
                "the interval is not a number with a known unit",
                REMEDY,
            ));
        }
    };
    let digits = number.bytes().any(|b| b.is_ascii_digit());
    match number.parse::<f64>() {
        Ok(value) if digits => interval_from_seconds(value * factor),
        _ => Err(Fault::new(
            "the interval does not start with a number",
            REMEDY,
        )),
    }
}

pub(crate) fn interval_from_seconds(seconds: f64) -> Result<Duration, Fault> {
    if !seconds.is_finite() || seconds < 0.0 {
        return Err(Fault::new(
            "an interval is a finite number, not below zero",
            REMEDY,
        ));
    }
    if seconds > LONGEST_SECONDS {
        return Err(Fault::new(
            "the interval is longer than a hundred years",
            REMEDY,
        ));
    }
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| Fault::new("the interval can not be represented", REMEDY))
}

/// Shortest text that parses back to the same number of milliseconds or seconds.
pub(crate) fn interval_text(interval: Duration) -> String {
    if interval.subsec_nanos() == 0 {
        format!("{}s", interval.as_secs())
    } else if interval.subsec_nanos().is_multiple_of(1_000_000) {
        format!("{}ms", interval.as_millis())
    } else {
        format!("{}s", interval.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_count_seconds_and_units_scale() {
        for (text, millis) in [
            ("20", 20_000),
            ("0.25", 250),
            ("500ms", 500),
            ("10 s", 10_000),
            ("5m", 300_000),
            ("2h", 7_200_000),
            ("1d", 86_400_000),
            ("0", 0),
        ] {
            assert_eq!(
                parse_interval(text).unwrap(),
                Duration::from_millis(millis),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_not_an_interval_is_refused() {
        for text in [
            "",
            "-1",
            "s",
            "1w",
            "1e9",
            "nan",
            "inf",
            "1.2.3",
            ".",
            "1 s s",
            "99999999999",
        ] {
            assert!(parse_interval(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "\\PC{0,40}") {
            let _ = parse_interval(&text);
        }

        #[test]
        fn any_float_is_taken_or_refused(seconds in any::<f64>()) {
            let _ = interval_from_seconds(seconds);
        }

        #[test]
        fn milliseconds_parse_back(millis in 0u64..1_000_000_000) {
            let interval = Duration::from_millis(millis);
            prop_assert_eq!(parse_interval(&interval_text(interval)).unwrap(), interval);
        }
    }
}
