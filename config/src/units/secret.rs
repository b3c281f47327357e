//! Values that must never be printed, and passwords inside addresses.

use std::fmt;

/// A secret text. It shows as `***`; only [`Secret::reveal`] gives it away.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that sends it.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether the text is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Replaces the password of `user:password@host`, with or without a scheme before it. Errs on the
/// side of hiding: whatever stands between the first colon and the last `@` is hidden.
pub(crate) fn mask_password(text: &str) -> String {
    let start = text.find("://").map_or(0, |at| at + 3);
    let rest = &text[start..];
    match (rest.find(':'), rest.rfind('@')) {
        (Some(colon), Some(at)) if colon < at => {
            format!("{}{}:***{}", &text[..start], &rest[..colon], &rest[at..])
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_secret_never_shows_its_text() {
        let secret = Secret::new("hunter2");
        assert_eq!(
            format!("{secret} {secret:?} {:?}", Some(&secret)),
            "*** *** Some(***)"
        );
        assert_eq!(secret.reveal(), "hunter2");
    }

    #[test]
    fn a_password_in_an_address_is_hidden() {
        for (text, shown) in [
            ("http://me:hunter2@etcd:2379/x", "http://me:***@etcd:2379/x"),
            ("me:hunter2@etcd:2379", "me:***@etcd:2379"),
            ("redis://:hunt@er2@h", "redis://:***@h"),
            ("tcp://10.0.0.1:2375", "tcp://10.0.0.1:2375"),
            ("someone@example", "someone@example"),
        ] {
            assert_eq!(mask_password(text), shown);
        }
    }

    proptest! {
        #[test]
        fn masking_never_panics_and_never_shows_the_password(
            user in "[a-z]{0,5}", password in "[a-zA-Z0-9:/@]{8,20}", host in "[a-z]{1,8}",
        ) {
            let shown = mask_password(&format!("http://{user}:{password}@{host}"));
            prop_assert_eq!(shown, format!("http://{user}:***@{host}"));
            let _ = mask_password(&password);
        }
    }
}
