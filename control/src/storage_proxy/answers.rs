//! What the storage proxy answers, read with care: its words end up in tables and labels.

use serde::{Deserialize, Deserializer};

/// The most characters kept of a text.
const TEXT: usize = 200;

/// `GET /status`.
#[derive(Debug, Deserialize)]
pub(super) struct Status {
    #[serde(rename = "storage-proxy", deserialize_with = "text")]
    pub version: String,
}

/// `GET /volumes`.
#[derive(Debug, Deserialize)]
pub(super) struct Volumes {
    pub volumes: Vec<Volume>,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Volume {
    /// Its name.
    #[serde(deserialize_with = "text")]
    pub name: String,
    /// The kind of storage.
    #[serde(deserialize_with = "text")]
    pub backend: String,
    /// Where it is mounted, on the proxy's host and on nodes.
    pub path: String,
}

/// `GET /volume/hwinfo`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct VolumeHealth {
    /// `healthy`, `degraded`, `offline` or `unavailable`.
    #[serde(deserialize_with = "text")]
    pub status: String,
    /// More words.
    #[serde(default, rename = "status_info", deserialize_with = "maybe_text")]
    pub words: Option<String>,
}

/// `GET /folder/fs-usage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Space {
    /// All of it, bytes.
    #[serde(rename = "capacity_bytes", deserialize_with = "amount")]
    pub capacity: Option<u64>,
    /// What is used, bytes.
    #[serde(rename = "used_bytes", deserialize_with = "amount")]
    pub used: Option<u64>,
}

/// `GET /folder/usage`: nothing where the proxy gave up counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct FolderUsage {
    /// Files and directories.
    #[serde(rename = "file_count", deserialize_with = "amount")]
    pub files: Option<u64>,
    /// Bytes in them.
    #[serde(rename = "used_bytes", deserialize_with = "amount")]
    pub used: Option<u64>,
}

/// `GET /quota-scope`: nothing where the backend knows no quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Quota {
    /// Bytes that count.
    #[serde(rename = "used_bytes", deserialize_with = "amount")]
    pub used: Option<u64>,
    /// Bytes allowed.
    #[serde(rename = "limit_bytes", deserialize_with = "amount")]
    pub limit: Option<u64>,
}

/// The body of a refusal, in any of the proxy's forms.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Refusal {
    #[serde(default)]
    title: Option<String>,
    #[serde(default)]
    msg: Option<String>,
}

impl Refusal {
    /// What it says, after a colon; the reason of the status line when the body says nothing.
    pub(super) fn words(body: &[u8], reason: Option<&str>) -> String {
        let said: Refusal = serde_json::from_slice(body).unwrap_or_default();
        let words = said.title.or(said.msg);
        let words = words.as_deref().or(reason).map(plain).unwrap_or_default();
        match words.is_empty() {
            true => words,
            false => format!(": {words}"),
        }
    }
}

/// A text that can be shown on a terminal.
fn plain(text: &str) -> String {
    let shown = text.chars().filter(|character| !character.is_control());
    shown.take(TEXT).collect::<String>().trim().to_owned()
}

fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    String::deserialize(deserializer).map(|text| plain(&text))
}

fn maybe_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    Ok(text
        .map(|text| plain(&text))
        .filter(|text| !text.is_empty()))
}

/// A number of bytes or files; what is below zero stands for "not known".
fn amount<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let number = Option::<serde_json::Number>::deserialize(deserializer)?;
    Ok(number.and_then(|number| {
        number.as_u64().or_else(|| {
            // Some backends compute with fractions.
            let real = number.as_f64().filter(|real| *real >= 0.0)?;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "not below zero; a cast of a larger one gives the largest"
            )]
            Some(real as u64)
        })
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_below_zero_and_null_are_not_known() {
        let usage: FolderUsage =
            serde_json::from_str(r#"{"file_count": -1, "used_bytes": -1}"#).unwrap();
        assert_eq!((usage.files, usage.used), (None, None));
        let quota: Quota =
            serde_json::from_str(r#"{"used_bytes": 7.9, "limit_bytes": null}"#).unwrap();
        assert_eq!((quota.used, quota.limit), (Some(7), None));
        assert!(serde_json::from_str::<Quota>(r#"{"used_bytes": "7"}"#).is_err());
    }

    #[test]
    fn words_of_a_peer_are_cut_and_plain() {
        let long = "x".repeat(1000);
        for (body, reason, words) in [
            (
                r#"{"title": "Not found\u001b[31m"}"#.to_owned(),
                None,
                ": Not found[31m".to_owned(),
            ),
            (
                r#"{"msg": "no such folder"}"#.to_owned(),
                Some("Bad"),
                ": no such folder".to_owned(),
            ),
            ("<html>".to_owned(), Some("Busy"), ": Busy".to_owned()),
            ("<html>".to_owned(), None, String::new()),
            (
                format!(r#"{{"msg": "{long}"}}"#),
                None,
                format!(": {}", "x".repeat(TEXT)),
            ),
        ] {
            assert_eq!(Refusal::words(body.as_bytes(), reason), words);
        }
    }
}
