//! Writing the text format: families one after the other, each with its samples together.

use std::fmt::Write;

use rust_decimal::Decimal;

/// What a family's values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// They only grow, until whatever counts them starts anew.
    Counter,
    /// They go up and down.
    Gauge,
    /// Observations by size.
    Histogram,
}

impl Kind {
    /// The format's word.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// One family of series.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// Name.
    pub name: &'static str,
    /// Kind.
    pub kind: Kind,
    /// Names of its labels, separated by blanks.
    pub labels: &'static str,
    /// What it says, in a sentence.
    pub help: &'static str,
}

/// Declares families, and the list of all of them in order.
macro_rules! families {
    ($( $name:ident = $kind:ident $text:literal [$($labels:literal)?] $help:literal; )*) => {
        $( pub(super) const $name: $crate::metrics::Family = $crate::metrics::Family {
            name: $text,
            kind: $crate::metrics::Kind::$kind,
            labels: concat!($($labels)?),
            help: $help,
        }; )*
        /// All of this module, in the order of the page.
        pub(super) const FAMILIES: &[&$crate::metrics::Family] = &[ $( &$name ),* ];
    };
}
pub(super) use families;

/// A value of a sample.
#[derive(Clone, Copy, Debug)]
pub enum Number {
    /// A count.
    Whole(u64),
    /// Anything else.
    Real(f64),
    /// A decimal as it is.
    Exact(Decimal),
}

impl From<u64> for Number {
    fn from(value: u64) -> Self {
        Number::Whole(value)
    }
}

impl From<f64> for Number {
    fn from(value: f64) -> Self {
        Number::Real(value)
    }
}

impl From<bool> for Number {
    fn from(value: bool) -> Self {
        Number::Whole(u64::from(value))
    }
}

impl From<Decimal> for Number {
    fn from(value: Decimal) -> Self {
        Number::Exact(value)
    }
}

/// Nanoseconds as seconds.
pub(super) fn seconds(nanoseconds: u64) -> Number {
    Number::Real(std::time::Duration::from_nanos(nanoseconds).as_secs_f64())
}

/// Thousandths of a unit, in units.
pub(super) fn thousandths(value: u64) -> Number {
    Number::Exact(Decimal::from(value) / Decimal::ONE_THOUSAND)
}

/// A page that is being written.
#[derive(Debug, Default)]
pub struct Page {
    text: String,
    family: Option<&'static str>,
}

impl Page {
    /// Adds a sample; `labels` is what the function of that name makes. The samples of a family come together.
    pub fn sample(&mut self, family: &Family, labels: &str, value: impl Into<Number>) {
        if self.family != Some(family.name) {
            self.family = Some(family.name);
            let (name, kind) = (family.name, family.kind.word());
            let _ = writeln!(
                self.text,
                "# HELP {name} {help}\n# TYPE {name} {kind}",
                help = family.help
            );
        }
        self.text.push_str(family.name);
        if !labels.is_empty() {
            self.text.push('{');
            self.text.push_str(labels);
            self.text.push('}');
        }
        // Writing to a text cannot fail.
        let _ = match value.into() {
            Number::Whole(value) => writeln!(self.text, " {value}"),
            Number::Real(value) => writeln!(self.text, " {value}"),
            Number::Exact(value) => writeln!(self.text, " {value}"),
        };
    }

    /// Adds a sample if there is a value.
    pub fn measured(&mut self, family: &Family, labels: &str, value: Option<impl Into<Number>>) {
        if let Some(value) = value {
            self.sample(family, labels, value);
        }
    }

    /// The page.
    pub fn into_text(self) -> String {
        self.text
    }
}

/// Labels as they stand between braces.
pub(super) fn labels(list: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (name, value) in list {
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(name);
        text.push_str("=\"");
        if value.contains(['\\', '"', '\n']) {
            for character in value.chars() {
                match character {
                    '\\' => text.push_str("\\\\"),
                    '"' => text.push_str("\\\""),
                    '\n' => text.push_str("\\n"),
                    other => text.push(other),
                }
            }
        } else {
            text.push_str(value);
        }
        text.push('"');
    }
    text
}
