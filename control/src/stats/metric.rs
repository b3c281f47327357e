//! One measured quantity over time: the moving statistics of the manager's records.
//!
//! In: measurements with the moment they were taken. Out: the figures of a record. Invariants:
//! maximum and average are over the measured values, whatever `current` shows; a counter that went
//! backwards was reset, and its difference and rate are zero for that step.

use std::borrow::Cow;

use rust_decimal::Decimal;

use super::decimal::{percentage_text, seconds, value_text};
use super::record::{Figures, Record};

/// What a record shows as the current value, from the second measurement on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Current {
    /// The value itself.
    Value,
    /// The difference to the one before.
    Difference,
    /// The difference per second.
    Rate,
}

/// One of the moving statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Statistic {
    /// Largest value.
    Maximum,
    /// Their average.
    Average,
    /// Difference of the last two, per second.
    Rate,
}

impl Statistic {
    /// Its key in a record.
    pub fn key(self) -> &'static str {
        match self {
            Statistic::Maximum => "stats.max",
            Statistic::Average => "stats.avg",
            Statistic::Rate => "stats.rate",
        }
    }
}

/// What is measured, and how records show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quantity {
    /// Its key in records.
    pub key: Cow<'static, str>,
    /// Its unit in records.
    pub unit: &'static str,
    /// What is shown as current.
    pub current: Current,
    /// What is shown besides, in the order of [`Statistic`].
    pub statistics: &'static [Statistic],
}

impl Quantity {
    /// A quantity whose current value is the measured one.
    pub const fn new(
        key: &'static str,
        unit: &'static str,
        current: Current,
        statistics: &'static [Statistic],
    ) -> Self {
        Self {
            key: Cow::Borrowed(key),
            unit,
            current,
            statistics,
        }
    }
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measurement {
    /// Of what.
    pub quantity: Quantity,
    /// The value.
    pub value: Decimal,
    /// The most it can be, if there is such a thing.
    pub capacity: Option<Decimal>,
}

impl Measurement {
    /// A measurement of `quantity`.
    pub fn of(quantity: Quantity, value: Decimal, capacity: Option<Decimal>) -> Self {
        Self {
            quantity,
            value,
            capacity,
        }
    }
}

/// What stands in for a capacity that the first measurement does not give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissingCapacity {
    /// It stays missing (node and devices).
    Absent,
    /// The first value, for good (kernels and processes); readers of the records expect one.
    FirstValue,
}

/// A value and when it was taken, ns of the monotonic clock.
type Point = (Decimal, u64);

/// The state of one quantity.
#[derive(Clone, Debug)]
pub struct Metric {
    quantity: Quantity,
    capacity: Option<Decimal>,
    last: Point,
    before: Option<Point>,
    count: u64,
    sum: Decimal,
    maximum: Decimal,
}

impl Metric {
    /// Begins with the first measurement.
    pub fn begin(first: Measurement, at_ns: u64, missing: MissingCapacity) -> Self {
        let value = first.value;
        let capacity = match missing {
            MissingCapacity::Absent => first.capacity,
            MissingCapacity::FirstValue => {
                let given = first.capacity.filter(|capacity| !capacity.is_zero());
                Some(given.unwrap_or(value))
            }
        };
        Self {
            quantity: first.quantity,
            capacity,
            last: (value, at_ns),
            before: None,
            count: 1,
            sum: value,
            maximum: value,
        }
    }

    /// Takes the next measurement.
    pub fn observe(&mut self, next: Measurement, at_ns: u64) {
        let value = next.value;
        if next.capacity.is_some() {
            self.capacity = next.capacity;
        }
        self.before = Some(std::mem::replace(&mut self.last, (value, at_ns)));
        self.count = self.count.saturating_add(1);
        self.sum = self.sum.saturating_add(value);
        self.maximum = self.maximum.max(value);
    }

    /// Its key in records.
    pub fn key(&self) -> &str {
        &self.quantity.key
    }

    /// When it was last measured, ns of the monotonic clock.
    pub fn last_ns(&self) -> u64 {
        self.last.1
    }

    fn difference(&self) -> Decimal {
        let Some(before) = self.before else {
            return Decimal::ZERO;
        };
        self.last.0.saturating_sub(before.0).max(Decimal::ZERO)
    }

    fn rate(&self) -> Decimal {
        let elapsed = self
            .before
            .map_or(0, |before| self.last.1.saturating_sub(before.1));
        self.difference()
            .checked_div(seconds(elapsed))
            .unwrap_or(Decimal::ZERO)
    }

    fn current(&self) -> Decimal {
        match self.quantity.current {
            // The original shows the first measurement as it is, too.
            _ if self.before.is_none() => self.last.0,
            Current::Value => self.last.0,
            Current::Difference => self.difference(),
            Current::Rate => self.rate(),
        }
    }

    fn statistic(&self, which: Statistic) -> Decimal {
        match which {
            Statistic::Maximum => self.maximum,
            Statistic::Average => self
                .sum
                .checked_div(Decimal::from(self.count))
                .unwrap_or(Decimal::ZERO),
            Statistic::Rate => self.rate(),
        }
    }

    /// What a record says of it.
    pub fn figures(&self) -> Figures {
        let current = self.current();
        Figures {
            current: value_text(current),
            capacity: self.capacity.map(value_text),
            percentage: percentage_text(current, self.capacity),
            unit: self.quantity.unit,
            statistics: self
                .quantity
                .statistics
                .iter()
                .map(|which| (which.key(), value_text(self.statistic(*which))))
                .collect(),
        }
    }
}

/// All quantities of one object, in the order they were first measured.
#[derive(Clone, Debug)]
pub struct Metrics {
    missing: MissingCapacity,
    list: Vec<Metric>,
}

impl Metrics {
    /// None yet.
    pub fn new(missing: MissingCapacity) -> Self {
        Self {
            missing,
            list: Vec::new(),
        }
    }

    /// Takes the measurements of one moment. What is not among them keeps its last value.
    pub fn observe(&mut self, measurements: impl IntoIterator<Item = Measurement>, at_ns: u64) {
        for measurement in measurements {
            let known = self
                .list
                .iter_mut()
                .find(|metric| metric.quantity.key == measurement.quantity.key);
            match known {
                Some(metric) => metric.observe(measurement, at_ns),
                None => self
                    .list
                    .push(Metric::begin(measurement, at_ns, self.missing)),
            }
        }
    }

    /// Forgets all but what `stays`.
    pub fn retain(&mut self, stays: impl Fn(&Metric) -> bool) {
        self.list.retain(stays);
    }

    fn find(&self, key: &str) -> Option<&Metric> {
        self.list.iter().find(|metric| metric.quantity.key == key)
    }

    /// Whether a quantity was ever measured.
    pub fn has(&self, key: &str) -> bool {
        self.find(key).is_some()
    }

    /// Whether a quantity was measured twice, so that it has a rate.
    pub fn has_rate(&self, key: &str) -> bool {
        self.find(key).is_some_and(|metric| metric.before.is_some())
    }

    /// When a quantity was last measured.
    pub fn last_ns(&self, key: &str) -> Option<u64> {
        Some(self.find(key)?.last_ns())
    }

    /// What a record says of them.
    pub fn record(&self) -> Record {
        Record(
            self.list
                .iter()
                .map(|metric| (metric.quantity.key.clone(), metric.figures()))
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests;
