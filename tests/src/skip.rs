//! The one way to leave a test out: a line `SKIP <reason>`, by which `make test` counts it.
//!
//! In: what is missing, and whether this host should have it. Out: the line, or a failure. Also part
//! of `control`'s and `dataplane`'s own tests, so it uses nothing but the standard library.

/// Whoever sets a machine up for tests gives it this: rights, a tool. Fails where continuous
/// integration (`CI` in the environment) runs everything.
pub fn needs(what: impl std::fmt::Display) {
    let everything = std::env::var("CI").is_ok_and(|it| !matches!(it.as_str(), "" | "0" | "false"));
    here(what, everything);
}

/// This is missing here; fails when the host should have it.
#[track_caller]
pub fn here(why: impl std::fmt::Display, host_should: bool) {
    println!("SKIP {why}");
    assert!(!host_should, "this host should support it: {why}");
}
