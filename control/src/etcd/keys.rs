//! Where a logical key lies in etcd: namespace, scope, quoting.
//!
//! In: logical keys such as `config/agent`. Out: the byte strings that the original's programs use.
//! Invariant: a key written here is found by them, and the other way round.

/// What every key begins with.
const ROOT: &str = "/sorna";

/// For whom a value is meant. A narrower scope hides a wider one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// The whole cluster.
    Global,
    /// One resource group.
    ScalingGroup,
    /// One agent.
    Node,
}

impl Scope {
    /// All, the one that wins first.
    pub const BY_PRECEDENCE: [Scope; 3] = [Scope::Node, Scope::ScalingGroup, Scope::Global];

    /// The name shown to people.
    pub fn name(self) -> &'static str {
        match self {
            Scope::Global => "global",
            Scope::ScalingGroup => "scaling group",
            Scope::Node => "node",
        }
    }
}

/// The key layout of one agent in one namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    namespace: String,
    agent_id: String,
}

impl Keys {
    /// The layout for an agent.
    pub fn new(namespace: &str, agent_id: &str) -> Keys {
        Keys {
            namespace: namespace.to_owned(),
            agent_id: agent_id.to_owned(),
        }
    }

    /// The key as etcd has it. One leading slash of the logical key is dropped; names in it are
    /// taken as they are, whoever builds a key of foreign names quotes them.
    pub fn physical(&self, scope: Scope, scaling_group: &str, key: &str) -> String {
        let key = key.strip_prefix('/').unwrap_or(key);
        let (root, namespace, agent_id) = (ROOT, &self.namespace, &self.agent_id);
        match scope {
            Scope::Global => format!("{root}/{namespace}/{key}"),
            Scope::ScalingGroup => format!("{root}/{namespace}/sgroup/{scaling_group}/{key}"),
            Scope::Node => format!("{root}/{namespace}/nodes/agents/{agent_id}/{key}"),
        }
    }
}

/// One path component with everything but letters, digits and `_.-~` percent-encoded.
pub fn quote(component: &str) -> String {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut quoted = String::with_capacity(component.len());
    for byte in component.bytes() {
        if byte.is_ascii_alphanumeric() || b"_.-~".contains(&byte) {
            quoted.push(char::from(byte));
        } else {
            quoted.push('%');
            quoted.push(char::from(HEX[usize::from(byte >> 4)]));
            quoted.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
    quoted
}

/// The reverse of [`quote`]. What is no escape stays as it is.
pub fn unquote(component: &str) -> String {
    let digit = |at: usize| {
        let byte = component.as_bytes().get(at)?;
        char::from(*byte)
            .to_digit(16)
            .and_then(|digit| u8::try_from(digit).ok())
    };
    let mut bytes = Vec::with_capacity(component.len());
    let mut at = 0;
    while let Some(byte) = component.as_bytes().get(at) {
        match (byte, digit(at + 1), digit(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push(high << 4 | low);
                at += 3;
            }
            _ => {
                bytes.push(*byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_lie_where_the_original_has_them() {
        let keys = Keys::new("local", "i-node:1");
        let cases = [
            (Scope::Global, "config/redis", "/sorna/local/config/redis"),
            (Scope::Global, "/config/redis", "/sorna/local/config/redis"),
            (
                Scope::ScalingGroup,
                "config/agent",
                "/sorna/local/sgroup/default/config/agent",
            ),
            (Scope::Node, "ip", "/sorna/local/nodes/agents/i-node:1/ip"),
            // The status lies at the empty key: it ends with the slash.
            (Scope::Node, "", "/sorna/local/nodes/agents/i-node:1/"),
        ];
        for (scope, key, physical) in cases {
            assert_eq!(keys.physical(scope, "default", key), physical);
        }
    }

    #[test]
    fn components_are_quoted_without_exceptions() {
        assert_eq!(quote("cuda.shares"), "cuda.shares");
        assert_eq!(quote("a:b/c d%e~"), "a%3Ab%2Fc%20d%25e~");
        assert_eq!(quote("ü"), "%C3%BC");
        assert_eq!(unquote("a%3ab%2Fc%"), "a:b/c%");
        assert_eq!(unquote("%zz%4"), "%zz%4");
    }

    proptest! {
        #[test]
        fn quoting_is_reversible(text in ".{0,40}") {
            prop_assert_eq!(unquote(&quote(&text)), text);
        }

        #[test]
        fn unquoting_never_panics(text in "[%0-9a-fA-Fü/]{0,20}") {
            let _ = unquote(&text);
        }
    }
}
