//! Errors with their causes, for people.

use std::error::Error;

/// An error with its causes, the nearest first, in one line.
#[must_use]
pub fn chain(err: &dyn Error) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Step(&'static str, #[source] Option<Box<Step>>);

    #[test]
    fn causes_follow_and_none_is_told_twice() {
        let cause = |words| Some(Box::new(Step(words, None)));
        let told = Step(
            "cannot read",
            Some(Box::new(Step("no answer", cause("timed out")))),
        );
        assert_eq!(chain(&told), "cannot read: no answer: timed out");
        let twice = Step("cannot read: timed out", cause("timed out"));
        assert_eq!(chain(&twice), "cannot read: timed out");
    }
}
