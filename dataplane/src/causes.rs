//! What went wrong and why, for people.
//!
//! In: an error. Out: it and its causes in one line.

use std::error::Error;

/// The error and its causes in one line.
pub fn words(err: &dyn Error) -> String {
    let mut text = err.to_string();
    let mut cause = err.source();
    while let Some(source) = cause {
        let more = source.to_string();
        // Some libraries repeat their cause in their own words.
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = source.source();
    }
    text
}
