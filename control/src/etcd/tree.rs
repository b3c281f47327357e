//! Keys below a prefix as nested maps.
//!
//! In: flat pairs of keys and values. Out: a tree whose nodes may have a value, members, or both.
//! Invariant: names are unquoted; nothing that only shares its first letters with the prefix is in.

use std::collections::BTreeMap;

use super::keys::unquote;

/// A value and what lies below it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    /// The value of the key itself.
    pub value: Option<String>,
    /// What lies below, by unquoted name.
    pub members: BTreeMap<String, Tree>,
}

impl Tree {
    /// The tree below `prefix` (a physical key). The original also takes keys that merely begin like
    /// the prefix (`config/redisx` for `config/redis`); those are left out here.
    pub fn below<'p>(prefix: &str, pairs: impl IntoIterator<Item = (&'p str, &'p str)>) -> Tree {
        let prefix = prefix.trim_end_matches('/');
        let mut tree = Tree::default();
        for (key, value) in pairs {
            let Some(rest) = key.strip_prefix(prefix) else {
                continue;
            };
            let node = match rest.strip_prefix('/') {
                Some("") | None if !rest.is_empty() && rest != "/" => continue,
                Some("") | None => &mut tree,
                Some(path) => path.split('/').fold(&mut tree, |node, name| {
                    node.members.entry(unquote(name)).or_default()
                }),
            };
            node.value = Some(value.to_owned());
        }
        tree
    }

    /// Whether there is nothing at all.
    pub fn is_empty(&self) -> bool {
        self.value.is_none() && self.members.is_empty()
    }

    /// A member, several levels down.
    pub fn at(&self, path: &[&str]) -> Option<&Tree> {
        path.iter()
            .try_fold(self, |node, name| node.members.get(*name))
    }

    /// The value of a member, several levels down.
    pub fn text(&self, path: &[&str]) -> Option<&str> {
        self.at(path)?.value.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_may_have_a_value_and_members() {
        let tree = Tree::below(
            "/sorna/x/config/a",
            [
                ("/sorna/x/config/a", "root"),
                ("/sorna/x/config/a/b", "1"),
                ("/sorna/x/config/a/b/c%3Ad", "2"),
                ("/sorna/x/config/ab/c", "no"),
                ("/sorna/y/config/a/b", "no"),
            ],
        );
        assert_eq!(tree.value.as_deref(), Some("root"));
        assert_eq!(tree.text(&["b"]), Some("1"));
        assert_eq!(tree.text(&["b", "c:d"]), Some("2"));
        assert_eq!(tree.members.len(), 1);
        assert!(Tree::below("/x", [("/xy", "1")]).is_empty());
    }

    #[test]
    fn a_slash_at_the_end_of_the_prefix_changes_nothing() {
        let pairs = [("/n/a/", "v"), ("/n/a/b", "w")];
        let tree = Tree::below("/n/a/", pairs);
        assert_eq!(tree, Tree::below("/n/a", pairs));
        assert_eq!(tree.value.as_deref(), Some("v"));
    }
}
