//! Laying raw JSON over a typed body: maps merge, lists add, single values replace.

use super::ContainerRequestError;
use bollard::models::ContainerCreateBody;
use serde_json::Value;

/// Merges `part` into the body; keys that the engine's API does not have go to `unknown`.
pub(super) fn into_body(
    body: ContainerCreateBody,
    part: &Value,
    source_name: &str,
    unknown: &mut Vec<String>,
) -> Result<ContainerCreateBody, ContainerRequestError> {
    let refused = |cause| ContainerRequestError::Override {
        source_name: source_name.to_owned(),
        cause,
    };
    let mut merged = serde_json::to_value(&body).map_err(refused)?;
    let part = spelled_right(part.clone());
    deep(&mut merged, part.clone());
    let body: ContainerCreateBody = serde_json::from_value(merged).map_err(refused)?;
    let kept = serde_json::to_value(&body).map_err(refused)?;
    note_lost(&part, &kept, "", unknown);
    Ok(body)
}

/// The original writes `EntryPoint`, which the engine reads without regard to case.
fn spelled_right(mut part: Value) -> Value {
    if let Some(map) = part.as_object_mut()
        && let Some(entrypoint) = map.remove("EntryPoint")
    {
        map.insert("Entrypoint".to_owned(), entrypoint);
    }
    part
}

fn deep(into: &mut Value, part: Value) {
    match (into, part) {
        (Value::Object(into), Value::Object(part)) => {
            for (key, value) in part {
                match into.get_mut(&key) {
                    Some(present) => deep(present, value),
                    None => {
                        into.insert(key, value);
                    }
                }
            }
        }
        (Value::Array(into), Value::Array(part)) => into.extend(part),
        (into, part) => *into = part,
    }
}

/// Names the keys of `part` that did not survive the typed form.
fn note_lost(part: &Value, kept: &Value, path: &str, unknown: &mut Vec<String>) {
    let (Value::Object(part), Value::Object(kept)) = (part, kept) else {
        return;
    };
    for (key, value) in part {
        let name = if path.is_empty() {
            key.clone()
        } else {
            format!("{path}.{key}")
        };
        match kept.get(key) {
            Some(kept) => note_lost(value, kept, &name, unknown),
            // Null is how a key is left out.
            None if value.is_null() => {}
            None => unknown.push(name),
        }
    }
}
