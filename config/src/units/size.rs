//! Byte sizes: `1g`, `1GiB`, `1.5G`, `1024`.

use std::fmt;
use std::str::FromStr;

use super::Fault;

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(pub u64);

const REMEDY: &str = "write a whole number of bytes or a number with k, m, g, t, p or e, such as \"512m\" or \"1.5g\"";
/// Digits after the point that can matter: 2^60 has 19 digits.
const MAX_DECIMALS: usize = 18;

impl ByteSize {
    /// The number of bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }

    /// Parses a size whose plain `kb`, `mb`, ... are powers of 1000 (`kib`, `mib`, ... stay
    /// powers of 1024): the rule of the `[logging]` section of the original.
    ///
    /// # Errors
    /// It is no size, or more than 64 bits hold.
    pub fn parse_decimal(text: &str) -> Result<Self, Fault> {
        parse(text, true)
    }
}

impl FromStr for ByteSize {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self, Fault> {
        parse(text, false)
    }
}

fn parse(text: &str, decimal_units: bool) -> Result<ByteSize, Fault> {
    let text = text.trim();
    let number_end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(number_end);
    let (whole, decimals) = match number.split_once('.') {
        Some((whole, decimals)) => (whole, Some(decimals)),
        None => (number, None),
    };
    if whole.is_empty() {
        return Err(Fault::new("a size starts with a digit", REMEDY));
    }
    if let Some(decimals) = decimals
        && (decimals.is_empty() || decimals.contains('.') || decimals.len() > MAX_DECIMALS)
    {
        return Err(Fault::new(
            "the digits after the point are not a number",
            REMEDY,
        ));
    }
    let Some(unit) = unit(suffix.trim_start(), decimal_units) else {
        return Err(Fault::new("the unit is not known", REMEDY));
    };
    if unit == 1 && decimals.is_some() {
        return Err(Fault::new("a byte can not be divided", REMEDY));
    }
    let too_large = || Fault::new("the size does not fit in 64 bits", REMEDY);
    let whole: u128 = whole.parse().map_err(|_| too_large())?;
    let mut bytes = whole.checked_mul(u128::from(unit)).ok_or_else(too_large)?;
    if let Some(decimals) = decimals {
        let digits: u128 = decimals.parse().map_err(|_| too_large())?;
        let scale = 10u128.pow(u32::try_from(decimals.len()).map_err(|_| too_large())?);
        bytes = bytes
            .checked_add(digits * u128::from(unit) / scale)
            .ok_or_else(too_large)?;
    }
    Ok(ByteSize(u64::try_from(bytes).map_err(|_| too_large())?))
}

fn unit(suffix: &str, decimal_units: bool) -> Option<u64> {
    let suffix = suffix.to_ascii_lowercase();
    if matches!(suffix.as_str(), "" | "b" | "byte" | "bytes") {
        return Some(1);
    }
    let exponent = 1 + "kmgtpe".find(suffix.chars().next()?)?;
    let exponent = u32::try_from(exponent).ok()?;
    let base: u64 = match &suffix[1..] {
        "ib" => 1024,
        "" | "b" if decimal_units => 1000,
        "" | "b" => 1024,
        _ => return None,
    };
    Some(base.pow(exponent))
}

impl fmt::Display for ByteSize {
    /// The largest binary unit that divides the size, else plain bytes; always parses back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, name) in [
            (60, 'E'),
            (50, 'P'),
            (40, 'T'),
            (30, 'G'),
            (20, 'M'),
            (10, 'K'),
        ] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{name}iB", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_form_of_the_original_is_read() {
        for (text, bytes) in [
            ("1g", 1 << 30),
            ("1GiB", 1 << 30),
            ("1KB", 1024),
            ("1.5G", 3 << 29),
            ("1024", 1024),
            ("64 kib", 65536),
            ("0", 0),
            ("0.1k", 102),
            ("8b", 8),
            ("15e", 15 << 60),
            ("2P", 2 << 50),
            ("3t", 3 << 40),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap(), ByteSize(bytes), "{text}");
        }
    }

    #[test]
    fn the_logging_section_counts_in_thousands() {
        assert_eq!(ByteSize::parse_decimal("10 MB").unwrap().0, 10_000_000);
        assert_eq!(ByteSize::parse_decimal("10MiB").unwrap().0, 10 << 20);
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in [
            "",
            "g",
            "-1",
            "1,5g",
            "1.g",
            ".5g",
            "1.5",
            "1..5g",
            "1x",
            "1gg",
            "1 g b",
            "inf",
            "16e",
            "99999999999999999999999999999999999999999",
            "1e3",
            "0x10",
            "1.1.1k",
            "1_000",
        ] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "\\PC{0,40}") {
            let _ = text.parse::<ByteSize>();
            let _ = ByteSize::parse_decimal(&text);
        }

        #[test]
        fn digits_and_units_never_panic(text in "[0-9.]{0,45} ?[kmgtpeib]{0,3}") {
            let _ = text.parse::<ByteSize>();
        }

        #[test]
        fn what_is_shown_parses_back(bytes in any::<u64>(), shift in 0u32..64) {
            let size = ByteSize(bytes >> shift << (shift / 2));
            prop_assert_eq!(size.to_string().parse::<ByteSize>().unwrap(), size);
        }
    }
}
