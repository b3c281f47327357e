//! The engine a relay suite runs with.
//!
//! `relay_uring` has all suites of the relay in it, as modules; there they run with the engine on
//! io_uring, by themselves with the one that is the default. Invariants: a suite names no engine itself;
//! what io_uring's refusal has left on the default engine counts as skipped.

use std::sync::OnceLock;

use dataplane::forward::relay::{Engine, Options, Relay};

use crate::skip;

/// The crate of the suites that run once more.
const ONCE_MORE: &str = "relay_uring";

fn once_more(suite: &str) -> bool {
    suite.split("::").next() == Some(ONCE_MORE)
}

/// Whether this host lets its programs have io_uring. Where it does not, that is said once.
pub fn has_uring() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        let trial = Relay::start(Options {
            engine: Engine::Uring,
            threads: 1,
            ..Options::default()
        });
        let trial = trial.expect("a relay");
        if let Some(why) = trial.refused() {
            skip::here(why, should_have_uring());
        }
        trial.refused().is_none()
    })
}

/// The kernel has all that is needed, and nothing forbids it.
fn should_have_uring() -> bool {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let release = read("/proc/sys/kernel/osrelease");
    let mut numbers = release.split(['.', '-']).map_while(|it| it.parse().ok());
    let version: (u32, u32) = (
        numbers.next().unwrap_or(0),
        numbers.next().unwrap_or_default(),
    );
    let filtered = read("/proc/self/status").lines().any(|line| {
        matches!(
            line.strip_prefix("Seccomp:").map(str::trim),
            Some("1" | "2")
        )
    });
    let allowed = read("/proc/sys/kernel/io_uring_disabled");
    // Kernels before 6.6 have no such setting.
    version >= (6, 1) && !filtered && matches!(allowed.trim(), "" | "0")
}

fn tries_uring(suite: &str) -> bool {
    let once_more = once_more(suite);
    if once_more {
        has_uring();
    }
    once_more
}

/// Options of the relay for a suite, which gives its `module_path!()`.
pub fn options(suite: &str) -> Options {
    Options {
        engine: if tries_uring(suite) {
            Engine::Uring
        } else {
            Engine::Splice
        },
        ..Options::default()
    }
}

/// The same for the configuration's `[node]`.
pub fn setting(suite: &str) -> &'static str {
    if tries_uring(suite) {
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
