//! Datetimes in the temporenc form of ext 2.
//!
//! In: payload bytes; out: a [`DateTime`], and back. The types DTS (naive) and DTSZ (aware) are
//! read with every precision; microseconds are written. Invariant: what is decoded is a real
//! calendar date within the years 1 to 4094.

use std::fmt;

/// A point in time, naive or with a zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DateTime {
    /// Microseconds since 1970-01-01T00:00:00, in UTC when there is a zone, else on a clock
    /// nobody named.
    pub microseconds: i64,
    /// The zone's distance from UTC in quarter hours (-64 to 63); `None` is a naive datetime.
    pub offset_quarters: Option<i8>,
}

/// Why a payload is no datetime, or a datetime can't be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemporencError {
    /// Not a DTS or DTSZ value.
    #[error("not a temporenc date and time")]
    Kind,
    /// The length does not fit the kind and precision.
    #[error("a temporenc value of wrong length")]
    Length,
    /// A field is outside the calendar or the clock.
    #[error("a temporenc field is out of range")]
    Field,
}

const MICROS_PER_SECOND: i64 = 1_000_000;
const SECONDS_PER_DAY: i64 = 86_400;

/// Fields of a broken-down date and time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fields {
    year: i64,
    month: i64,
    day: i64,
    hour: i64,
    minute: i64,
    second: i64,
    microsecond: i64,
}

/// Reads bits from the most significant end of at most 16 bytes.
struct Bits {
    word: u128,
    left: u32,
}

impl Bits {
    fn new(bytes: &[u8]) -> Option<Self> {
        if bytes.len() > 16 {
            return None;
        }
        let word = bytes
            .iter()
            .fold(0_u128, |word, byte| (word << 8) | u128::from(*byte));
        Some(Self {
            word,
            left: 8 * u32::try_from(bytes.len()).ok()?,
        })
    }

    fn take(&mut self, count: u32) -> Option<i64> {
        self.left = self.left.checked_sub(count)?;
        let field = (self.word >> self.left) & ((1_u128 << count) - 1);
        i64::try_from(field).ok()
    }
}

impl DateTime {
    /// Reads an ext 2 payload.
    ///
    /// # Errors
    /// It is no date with time, of wrong length, or a field is out of range.
    pub fn decode(payload: &[u8]) -> Result<Self, TemporencError> {
        let first = *payload.first().ok_or(TemporencError::Length)?;
        let (tag_bits, aware) = match first {
            0b0100_0000..=0b0111_1111 => (2, false),
            0b1110_0000..=0b1111_1111 => (3, true),
            _ => return Err(TemporencError::Kind),
        };
        let mut bits = Bits::new(payload).ok_or(TemporencError::Length)?;
        let mut take = |count| bits.take(count).ok_or(TemporencError::Length);
        take(tag_bits)?;
        let precision = take(2)?;
        let year = take(12)?;
        let month = take(4)? + 1;
        let day = take(5)? + 1;
        let hour = take(5)?;
        let minute = take(6)?;
        let second = take(6)?;
        let (digits, scale_to_micro) = match precision {
            0 => (take(10)?, (1_000, 1)),
            1 => (take(20)?, (1, 1)),
            2 => (take(30)?, (1, 1_000)),
            _ => (0, (1, 1)),
        };
        let microsecond = digits * scale_to_micro.0 / scale_to_micro.1;
        let offset_quarters = if aware {
            let zone = take(7)? - 64;
            // 62 and 63 mean "zone elsewhere" and "no zone" in temporenc; the original never
            // writes them.
            Some(i8::try_from(zone).map_err(|_| TemporencError::Field)?)
        } else {
            None
        };
        if bits.left >= 8 || bits.take(bits.left) != Some(0) {
            return Err(TemporencError::Length);
        }
        let fields = Fields {
            year,
            month,
            day,
            hour,
            minute,
            second,
            microsecond,
        };
        Ok(Self {
            microseconds: fields.to_microseconds().ok_or(TemporencError::Field)?,
            offset_quarters,
        })
    }

    /// Writes an ext 2 payload with microseconds, as the original does.
    ///
    /// # Errors
    /// A field is out of range.
    pub fn encode(self) -> Result<Vec<u8>, TemporencError> {
        let fields = self.fields().ok_or(TemporencError::Field)?;
        let mut word = 0_u128;
        let mut put = |value: i64, bits: u32| {
            word = (word << bits) | u128::from(value.unsigned_abs());
        };
        match self.offset_quarters {
            None => put(0b01, 2),
            Some(_) => put(0b111, 3),
        }
        put(1, 2);
        put(fields.year, 12);
        put(fields.month - 1, 4);
        put(fields.day - 1, 5);
        put(fields.hour, 5);
        put(fields.minute, 6);
        put(fields.second, 6);
        put(fields.microsecond, 20);
        let length = match self.offset_quarters {
            None => {
                put(0, 2);
                8
            }
            Some(quarters) => {
                let zone = i64::from(quarters) + 64;
                if !(0..=127).contains(&zone) {
                    return Err(TemporencError::Field);
                }
                put(zone, 7);
                put(0, 2);
                9
            }
        };
        Ok(word.to_be_bytes()[16 - length..].to_vec())
    }

    fn fields(self) -> Option<Fields> {
        let seconds = self.microseconds.div_euclid(MICROS_PER_SECOND);
        let (year, month, day) = civil_from_days(seconds.div_euclid(SECONDS_PER_DAY));
        let second_of_day = seconds.rem_euclid(SECONDS_PER_DAY);
        (1..=4094).contains(&year).then_some(Fields {
            year,
            month,
            day,
            hour: second_of_day / 3_600,
            minute: second_of_day / 60 % 60,
            second: second_of_day % 60,
            microsecond: self.microseconds.rem_euclid(MICROS_PER_SECOND),
        })
    }
}

impl fmt::Display for DateTime {
    /// ISO 8601, with `+00:00` for an instant (the wire holds instants in UTC).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(at) = self.fields() else {
            return write!(f, "{} us since 1970", self.microseconds);
        };
        write!(
            f,
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}",
            at.year, at.month, at.day, at.hour, at.minute, at.second
        )?;
        if at.microsecond != 0 {
            write!(f, ".{:06}", at.microsecond)?;
        }
        if self.offset_quarters.is_some() {
            write!(f, "+00:00")?;
        }
        Ok(())
    }
}

impl Fields {
    fn to_microseconds(self) -> Option<i64> {
        let days = days_from_civil(self.year, self.month, self.day);
        let in_range = (1..=4094).contains(&self.year)
            && (1..=12).contains(&self.month)
            && civil_from_days(days) == (self.year, self.month, self.day)
            && self.hour < 24
            && self.minute < 60
            && self.second < 60
            && self.microsecond < MICROS_PER_SECOND;
        in_range.then(|| {
            let seconds =
                days * SECONDS_PER_DAY + self.hour * 3_600 + self.minute * 60 + self.second;
            seconds * MICROS_PER_SECOND + self.microsecond
        })
    }
}

/// Days since 1970-01-01 of a date in the proleptic Gregorian calendar, by counting from March
/// so that the leap day is the last of its year.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// The inverse of [`days_from_civil`].
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_original_captures_read_and_write_the_same() {
        let naive = DateTime::decode(&[0x57, 0xe9, 0x83, 0x9c, 0x61, 0x47, 0x89, 0x00]).unwrap();
        assert_eq!(naive.to_string(), "2025-09-08T07:06:05.123456");
        assert_eq!(naive.offset_quarters, None);
        assert_eq!(
            naive.encode().unwrap(),
            [0x57, 0xe9, 0x83, 0x9c, 0x61, 0x47, 0x89, 0x00]
        );
        let seoul = [0xeb, 0xf4, 0xc1, 0xac, 0x30, 0xa3, 0xc4, 0x81, 0x90];
        let aware = DateTime::decode(&seoul).unwrap();
        assert_eq!(aware.to_string(), "2025-09-07T22:06:05.123456+00:00");
        assert_eq!(aware.offset_quarters, Some(36));
        assert_eq!(aware.encode().unwrap(), seoul);
    }

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(DateTime::decode(&[]), Err(TemporencError::Length));
        assert_eq!(DateTime::decode(&[0x57]), Err(TemporencError::Length));
        assert_eq!(DateTime::decode(&[0x00; 8]), Err(TemporencError::Kind));
        assert_eq!(DateTime::decode(&[0xff; 9]), Err(TemporencError::Length));
        assert_eq!(
            DateTime::decode(&[0xef, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfc]),
            Err(TemporencError::Field)
        );
        assert_eq!(DateTime::decode(&[0x57; 17]), Err(TemporencError::Length));
        // 30 February.
        let mut word = (0b01_u64 << 62) | (1 << 60) | (2025 << 48) | (1 << 44) | (29 << 39);
        assert_eq!(
            DateTime::decode(&word.to_be_bytes()),
            Err(TemporencError::Field)
        );
        word -= 2 << 39;
        assert!(DateTime::decode(&word.to_be_bytes()).is_ok());
    }

    proptest! {
        #[test]
        fn every_instant_survives(
            microseconds in -62_135_596_800_000_000_i64..=67_000_000_000_000_000,
            offset_quarters in proptest::option::of(-64_i8..=60),
        ) {
            let at = DateTime { microseconds, offset_quarters };
            prop_assert_eq!(DateTime::decode(&at.encode().unwrap()), Ok(at));
        }

        #[test]
        fn decoding_never_panics(payload in proptest::collection::vec(any::<u8>(), 0..20)) {
            let _ = DateTime::decode(&payload);
        }
    }
}
