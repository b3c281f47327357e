//! Why a kernel does not get what it asked for, in the original's classes and texts: the manager's
//! users see them and admins search for them.

use rust_decimal::Decimal;

/// A refused request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResourceError {
    /// The general class.
    #[error("{0}")]
    General(String),
    /// A slot this node does not have.
    #[error("{slot} is not a resource of this node, which has {known}")]
    Unsupported {
        /// The slot asked for.
        slot: String,
        /// The slots there are.
        known: String,
    },
    /// Slots that exclude each other.
    #[error("{first} and {second} can not be given together; ask for one of them")]
    Combination {
        /// One slot.
        first: String,
        /// The other.
        second: String,
    },
    /// An amount that can not be.
    #[error("{0}")]
    Argument(String),
    /// Less than the smallest share.
    #[error("the requested amount {requested} of {slot} is less than its smallest share {quantum}")]
    Quantum {
        /// The slot.
        slot: String,
        /// The amount asked for.
        requested: Decimal,
        /// The smallest share.
        quantum: Decimal,
    },
    /// Not enough left.
    #[error(
        "InsufficientResource: {message} ({slot}{}, allocating {requested} out of {total})",
        tag(context)
    )]
    Insufficient {
        /// Which map and what about it.
        message: &'static str,
        /// The slot.
        slot: String,
        /// The amount asked for.
        requested: Decimal,
        /// What is left.
        total: Decimal,
        /// Device name.
        context: Option<String>,
    },
    /// The request would have to be split, and must not be.
    #[error(
        "FractionalResourceFragmented: {message} ({slot}{}, allocating {requested})",
        tag(context)
    )]
    Fragmented {
        /// What about it.
        message: &'static str,
        /// The slot.
        slot: String,
        /// The amount asked for.
        requested: Decimal,
        /// Device name.
        context: Option<String>,
    },
}

impl ResourceError {
    pub(super) fn argument(text: impl Into<String>) -> Self {
        Self::Argument(text.into())
    }

    /// The class the manager knows the error by.
    pub fn class(&self) -> &'static str {
        match self {
            Self::General(_) => "ResourceError",
            Self::Unsupported { .. } => "UnsupportedResource",
            Self::Combination { .. } => "InvalidResourceCombination",
            Self::Argument(_) => "InvalidResourceArgument",
            Self::Quantum { .. } => "NotMultipleOfQuantum",
            Self::Insufficient { .. } => "InsufficientResource",
            Self::Fragmented { .. } => "FractionalResourceFragmented",
        }
    }
}

fn tag(context: &Option<String>) -> String {
    context
        .as_ref()
        .map_or(String::new(), |device| format!(" (tag: '{device}')"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn insufficient_reads_as_in_the_original() {
        let mut err = ResourceError::Insufficient {
            message: "DiscretePropertyAllocMap: insufficient allocatable amount!",
            slot: "cpu".to_owned(),
            requested: 6.into(),
            total: 5.into(),
            context: Some("cpu".to_owned()),
        };
        assert_eq!(
            err.to_string(),
            "InsufficientResource: DiscretePropertyAllocMap: insufficient allocatable amount! \
             (cpu (tag: 'cpu'), allocating 6 out of 5)"
        );
        if let ResourceError::Insufficient { context, .. } = &mut err {
            *context = None;
        }
        assert!(err.to_string().ends_with("(cpu, allocating 6 out of 5)"));
    }
}
