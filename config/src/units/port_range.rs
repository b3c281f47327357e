//! A range of ports, both ends included.

use std::fmt;
use std::str::FromStr;

use super::Fault;

/// Ports `first` to `last`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PortRange {
    /// Lowest port, at least 1.
    pub first: u16,
    /// Highest port, not below `first`.
    pub last: u16,
}

pub(crate) const REMEDY: &str = "write [30000, 31000] or \"30000-31000\"";

impl PortRange {
    /// A range from its two ends.
    ///
    /// # Errors
    /// An end is 0, or the first is above the last.
    pub fn new(first: u16, last: u16) -> Result<Self, Fault> {
        if first == 0 {
            return Err(Fault::new("port 0 can not be published", REMEDY));
        }
        if first > last {
            return Err(Fault::new("the first port is above the last", REMEDY));
        }
        Ok(Self { first, last })
    }

    /// Whether the port lies in the range.
    pub fn contains(&self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// Number of ports, at least one.
    pub fn count(&self) -> usize {
        usize::from(self.last - self.first) + 1
    }

    /// Every port, lowest first.
    pub fn iter(&self) -> std::ops::RangeInclusive<u16> {
        self.first..=self.last
    }

    pub(crate) fn parse_end(text: &str) -> Result<u16, Fault> {
        let text = text.trim();
        if !text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(Fault::new("an end of the range is not a number", REMEDY));
        }
        text.parse()
            .map_err(|_| Fault::new("an end of the range is not a port from 1 to 65535", REMEDY))
    }
}

impl FromStr for PortRange {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self, Fault> {
        let (first, last) = text
            .split_once('-')
            .ok_or_else(|| Fault::new("a port range has two ends", REMEDY))?;
        Self::new(Self::parse_end(first)?, Self::parse_end(last)?)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_ends_are_included() {
        let range: PortRange = " 30000 - 30002 ".parse().unwrap();
        assert_eq!(range.iter().collect::<Vec<_>>(), [30000, 30001, 30002]);
        assert_eq!(range.count(), 3);
        assert!(range.contains(30002) && !range.contains(30003));
    }

    #[test]
    fn what_is_not_a_range_is_refused() {
        for text in [
            "", "30000", "2-1", "0-5", "1-65536", "a-b", "-1-5", "1-2-3", "1-", "+1-2",
        ] {
            assert!(text.parse::<PortRange>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "\\PC{0,30}") {
            let _ = text.parse::<PortRange>();
        }

        #[test]
        fn what_is_shown_parses_back(a in 1u16.., b in 1u16..) {
            let range = PortRange::new(a.min(b), a.max(b)).unwrap();
            prop_assert_eq!(range.to_string().parse::<PortRange>().unwrap(), range);
            prop_assert_eq!(range.iter().count(), range.count());
        }
    }
}
