//! The name of a virtual folder: `<kind>:<scope>/<folder>`, or the folder alone (older ones).

use std::fmt;

use uuid::Uuid;

/// A folder's id as the manager writes it, checked: it goes into questions, labels and tables.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FolderId {
    text: String,
    /// Length of the quota scope in front, if there is one.
    scope: usize,
}

impl FolderId {
    /// Reads an id; nothing when it is none.
    pub fn parse(text: &str) -> Option<FolderId> {
        let Some((scope, folder)) = text.split_once('/') else {
            let folder: Uuid = text.parse().ok()?;
            return Some(FolderId {
                text: folder.simple().to_string(),
                scope: 0,
            });
        };
        let folder: Uuid = folder.parse().ok()?;
        let (kind, owner) = scope.split_once(':')?;
        let kind = kind.to_ascii_lowercase();
        let owner: Uuid = owner.parse().ok()?;
        if !matches!(kind.as_str(), "user" | "project") {
            return None;
        }
        let scope = format!("{kind}:{}", owner.hyphenated());
        Some(FolderId {
            text: format!("{scope}/{}", folder.simple()),
            scope: scope.len(),
        })
    }

    /// The whole id.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The 32 digits of the folder itself.
    pub fn digits(&self) -> &str {
        self.text.rsplit('/').next().unwrap_or_default()
    }

    /// The quota scope it counts against.
    pub fn scope(&self) -> Option<&str> {
        match self.scope {
            0 => None,
            length => self.text.get(..length),
        }
    }
}

impl fmt::Display for FolderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_as_the_manager_writes_them() {
        let scope = "user:f38dea23-50fa-42a0-b5ae-338f5f4693f4";
        let text = format!("{scope}/0123456789abcdef0123456789abcdef");
        let id = FolderId::parse(&text).unwrap();
        assert_eq!((id.as_str(), id.scope()), (text.as_str(), Some(scope)));
        let old = FolderId::parse("01234567-89ab-cdef-0123-456789abcdef").unwrap();
        assert_eq!(old.as_str(), "0123456789abcdef0123456789abcdef");
        assert_eq!(old.scope(), None);
        for text in [
            "",
            "x",
            "user:1/2",
            "/",
            "host:f38dea23-50fa-42a0-b5ae-338f5f4693f4/0123456789abcdef0123456789abcdef",
            "../../etc",
        ] {
            assert_eq!(FolderId::parse(text), None, "{text}");
        }
    }
}
