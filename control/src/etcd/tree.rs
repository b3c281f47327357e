//! Keys below a prefix as nested maps.
//!
//! In: flat pairs of keys and values. Out: a tree whose nodes may have a value, members, or both.
//! Invariants: names are unquoted; nothing that only shares its first letters with the prefix is in;
//! no tree is deeper than [`DEPTH`], for what is nested is dropped and compared by recursion.

use std::collections::BTreeMap;

use super::keys::unquote;

/// Levels of a tree; keys with more are nobody's settings (ours have three) and are left out.
const DEPTH: usize = 32;

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
                Some(path) if path.bytes().filter(|byte| *byte == b'/').count() >= DEPTH => {
                    continue;
                }
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
    fn keys_deeper_than_any_setting_are_left_out() {
        // As long as etcd takes keys, once with names and once without.
        for level in ["/x", "/"] {
            let deep = "/n".to_owned() + &level.repeat(700_000);
            let tree = Tree::below("/n", [(deep.as_str(), "v"), ("/n/a", "w")]);
            assert_eq!(tree, Tree::below("/n", [("/n/a", "w")]));
        }
        let deepest = "/n".to_owned() + &"/x".repeat(DEPTH);
        let tree = Tree::below("/n", [(deepest.as_str(), "v")]);
        assert_eq!(tree.text(&["x"; DEPTH]), Some("v"));
    }

    #[test]
    fn a_slash_at_the_end_of_the_prefix_changes_nothing() {
        let pairs = [("/n/a/", "v"), ("/n/a/b", "w")];
        let tree = Tree::below("/n/a/", pairs);
        assert_eq!(tree, Tree::below("/n/a", pairs));
        assert_eq!(tree.value.as_deref(), Some("v"));
    }
}
