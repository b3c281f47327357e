//! What is answered to which path.
//!
//! In: method and path of a request, and who asks. Out: the original's answer
//! (`tests/vectors/metadata` has them as `tests/python/record_metadata.py` was given them). Invariant: nothing but what `Asker` holds.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::net::Ipv4Addr;

use crate::kernel::request::TextMap;

/// Where the answers about a kernel are, which have a name of the server of their own.
const APP: &str = "/latest/meta-data";
/// Its documents, in their order.
const DOCUMENTS: &str = "envs\nlocal-ipv4\nsandbox";
const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json; charset=utf-8";

/// The kernel that asks.
#[derive(Debug, Clone)]
pub struct Asker {
    /// Its address where it asks from, if it has one of version 4 there.
    pub address: Option<Ipv4Addr>,
    /// Its environment, if it is known.
    pub environment: Option<TextMap>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The kind of the content; nothing is said of none.
    pub kind: Option<&'static str>,
    /// The name of the server, where it is said.
    pub server: Option<&'static str>,
    /// The content.
    pub body: String,
}

/// A path without its escapes, but for those of `/` and `%`: what they stand for divides nothing.
pub fn plain(path: &str) -> Cow<'_, str> {
    if !path.contains('%') {
        return path.into();
    }
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        let digit = |place: usize| char::from(*after.get(place)?).to_digit(16);
        let escaped = match (first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => u8::try_from(high * 16 + low).ok(),
            _ => None,
        };
        match escaped {
            Some(byte) if !matches!(byte, b'/' | b'%') => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => bytes.push(*first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned().into()
}

/// The answer to a request for a plain path; `asker` is none for strangers.
pub fn answer(method: &str, path: &str, asker: Option<&Asker>, sandbox: &str) -> Answer {
    let inside = path.strip_prefix(APP);
    let inside = inside.filter(|rest| rest.is_empty() || rest.starts_with('/'));
    let answer = |status, kind, body| Answer {
        status,
        kind,
        server: inside.map(|_| "BackendAI"),
        body,
    };
    let text = |body: &str| answer(200, Some(TEXT), body.to_owned());
    let Some(asker) = asker else {
        return answer(403, None, String::new());
    };
    let document = match inside {
        Some("/envs") => Some(match &asker.environment {
            Some(environment) => answer(200, Some(JSON), json(environment)),
            None => answer(404, None, String::new()),
        }),
        Some("/sandbox") => Some(text(sandbox)),
        Some("/local-ipv4") => Some(match asker.address {
            Some(address) => text(&address.to_string()),
            None => answer(404, None, String::new()),
        }),
        Some(_) => None,
        None => match path.strip_prefix('/') {
            Some("") => Some(text("latest/")),
            Some(version) if !version.contains('/') => Some(text("meta-data/")),
            _ => None,
        },
    };
    match document {
        Some(document) if method == "GET" => document,
        Some(_) => answer(405, Some(TEXT), "405: Method Not Allowed".to_owned()),
        // Directories are listed whatever the method.
        None => match path {
            "/latest/" => text("extension/\nmeta-data/"),
            "/latest/meta-data" | "/latest/meta-data/" => text(DOCUMENTS),
            "/latest/extension" | "/latest/extension/" => text(""),
            _ => answer(404, Some(TEXT), "404: Not Found".to_owned()),
        },
    }
}

/// As Python writes it: blanks after separators, nothing but printable ASCII.
fn json(map: &TextMap) -> String {
    let mut text = String::from("{");
    for (place, (name, value)) in map.iter().enumerate() {
        if place > 0 {
            text.push_str(", ");
        }
        quote(&mut text, name);
        text.push_str(": ");
        quote(&mut text, value);
    }
    text.push('}');
    text
}

fn quote(text: &mut String, value: &str) {
    text.push('"');
    for letter in value.chars() {
        match letter {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            ' '..='~' => text.push(letter),
            _ => {
                for unit in letter.encode_utf16(&mut [0; 2]) {
                    // Writing to a text cannot fail.
                    let _ = write!(text, "\\u{unit:04x}");
                }
            }
        }
    }
    text.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the original fails and ours does not.
    fn is_mended(path: &str) -> bool {
        path.starts_with("/latest/meta-data/envs/") || path == "/latest/meta-data%2Fenvs"
    }

    #[test]
    fn answers_are_those_of_the_original() {
        let text = include_str!("../../../tests/vectors/metadata/answers.json");
        let recorded: serde_json::Value = serde_json::from_str(text).unwrap();
        let environment: TextMap = serde_json::from_value(recorded["environ"].clone()).unwrap();
        let cases = recorded["answers"].as_array().unwrap();
        assert!(cases.len() > 40);
        let mut mended = 0;
        for case in cases {
            let word = |name: &str| case[name].as_str();
            let path = word("path").unwrap();
            let asker = Asker {
                address: Some(recorded["address"].as_str().unwrap().parse().unwrap()),
                environment: (case["asker"] == "kernel").then(|| environment.clone()),
            };
            let asker = (case["asker"] != "stranger").then_some(&asker);
            let mut given = answer(word("method").unwrap(), &plain(path), asker, "docker");
            if word("method") == Some("HEAD") {
                given.body.clear();
            }
            if is_mended(path) && asker.is_some() {
                mended += 1;
                assert_eq!((given.status, case["status"].as_u64()), (404, Some(500)));
                continue;
            }
            assert_eq!(
                Some(u64::from(given.status)),
                case["status"].as_u64(),
                "{case}"
            );
            assert_eq!(given.kind, word("type"), "{case}");
            assert_eq!(given.body, word("body").unwrap(), "{case}");
            // Where the original names its libraries, none is recorded.
            assert_eq!(given.server, word("server"), "{case}");
        }
        assert_eq!(mended, 3);
    }
    #[test]
    fn no_address_of_version_6_is_called_one_of_version_4() {
        let asker = Asker {
            address: None,
            environment: None,
        };
        let given = answer(
            "GET",
            "/latest/meta-data/local-ipv4",
            Some(&asker),
            "docker",
        );
        assert_eq!((given.status, given.body.as_str()), (404, ""));
    }

    #[test]
    fn escapes_are_read_once_and_none_makes_a_divider() {
        for (path, expected) in [
            ("/latest/", "/latest/"),
            ("/l%61test/%6d", "/latest/m"),
            ("/a%2Fb%2fc", "/a%2Fb%2fc"),
            ("/%2541", "/%2541"),
            ("/%", "/%"),
            ("/%4", "/%4"),
            ("/%4g%zz", "/%4g%zz"),
            ("/%c3%a4", "/ä"),
            ("/%ff", "/\u{fffd}"),
        ] {
            assert_eq!(plain(path), expected);
        }
    }
}
