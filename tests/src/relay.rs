//! The engine a relay suite runs with.
//!
//! `relay_uring` has all suites of the relay in it, as modules; there they run with the engine on
//! io_uring, by themselves with the one that is the default. Invariant: a suite names no engine itself.

use dataplane::forward::relay::{Engine, Options, Relay};

/// The crate of the suites that run once more.
const ONCE_MORE: &str = "relay_uring";

fn once_more(suite: &str) -> bool {
    suite.split("::").next() == Some(ONCE_MORE)
}

/// Options of the relay for a suite, which gives its `module_path!()`.
pub fn options(suite: &str) -> Options {
    Options {
        engine: if once_more(suite) {
            Engine::Uring
        } else {
            Engine::Splice
        },
        ..Options::default()
    }
}

/// The same for the configuration's `[node]`.
pub fn setting(suite: &str) -> &'static str {
    if once_more(suite) {
        "relay-engine = \"uring\"\n"
    } else {
        "relay-engine = \"splice\"\n"
    }
}

/// The same for a suite that is about the relay once more: there the kernel path takes no client.
pub fn setting_alone(suite: &str) -> String {
    let forward = if once_more(suite) {
        "forward = \"relay\"\n"
    } else {
        ""
    };
    forward.to_owned() + setting(suite)
}

/// A relay for a suite.
pub fn start(suite: &str) -> Relay {
    Relay::start(options(suite)).expect("a relay")
}
