//! Merge keys of YAML (`<<`), which its newer versions do not have and the original's parser reads.
//!
//! In: a value as it was parsed. Out: the same with the maps of its merge keys laid under their own.
//! Invariant: nothing is copied, so it holds no more than before.

use serde::de::Error as _;
use serde_yaml_ng::{Error, Value};

/// Puts what merge keys name into the maps that have them, where these have no such key themselves; of
/// several maps the first counts. True when there were any. The depth is the parser's, which is bounded.
///
/// # Errors
/// A merge key names something else than a map or a list of maps.
pub(super) fn fold(value: &mut Value) -> Result<bool, Error> {
    let map = match value {
        Value::Mapping(map) => map,
        Value::Sequence(items) => return any(items.iter_mut()),
        Value::Tagged(tagged) => return fold(&mut tagged.value),
        _ => return Ok(false),
    };
    // What is to be merged may have been merged itself.
    let below = any(map.values_mut())?;
    let named = match map.shift_remove("<<") {
        None => return Ok(below),
        Some(Value::Sequence(maps)) => maps,
        Some(one) => vec![one],
    };
    for named in named {
        let Value::Mapping(named) = named else {
            return Err(Error::custom(
                "a merge key (<<) needs a map or a list of maps",
            ));
        };
        for (key, value) in named {
            map.entry(key).or_insert(value);
        }
    }
    Ok(true)
}

fn any<'v>(values: impl Iterator<Item = &'v mut Value>) -> Result<bool, Error> {
    let mut any = false;
    for value in values {
        any |= fold(value)?;
    }
    Ok(any)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folded(text: &str) -> Result<(bool, Value), Error> {
        let mut value: Value = serde_yaml_ng::from_str(text)?;
        Ok((fold(&mut value)?, value))
    }

    #[test]
    fn own_keys_come_before_merged_ones_and_earlier_maps_before_later() {
        for (text, plain) in [
            ("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", "{x: 1, y: 3}"),
            ("a: &a {x: 1}\nb: {<<: [*a, {x: 2, y: 2}]}", "{x: 1, y: 2}"),
            ("a: &a {<<: {x: 1}}\nb: {<<: *a}", "{x: 1}"),
            ("b: {x: 1, <<: []}", "{x: 1}"),
            ("b: {x: [{<<: {y: 1}}]}", "{x: [{y: 1}]}"),
        ] {
            let (any, value) = folded(text).unwrap();
            let plain: Value = serde_yaml_ng::from_str(plain).unwrap();
            assert!(any, "{text}");
            assert_eq!(value["b"], plain, "{text}");
        }
        assert!(!folded("b: {x: [1, !t {y: 2}]}").unwrap().0);
    }

    #[test]
    fn what_is_no_map_is_not_merged() {
        for text in ["{<<: 3}", "{<<: }", "[{<<: [{}, [{}]]}]", "!t {<<: text}"] {
            let told = folded(text).unwrap_err().to_string();
            assert!(told.contains("merge key"), "{text}: {told}");
        }
    }
}
